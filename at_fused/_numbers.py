"""Checks of numbers from Python, NumPy, torch or a configuration file. Does not import torch."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

_PYTHON_TYPES = (int, float, bool, str, bytes, type(None))


def type_name(value: object) -> str:
    """Return the name of a value's type, for messages."""
    return type(value).__name__


def as_python(name: str, value: Any) -> Any:
    """Convert scalars, arrays, tensors and OmegaConf lists to Python numbers and lists.

    Other values are returned unchanged: the caller's check rejects them. A tensor that requires a
    gradient is a TypeError.
    """
    if type(value) in _PYTHON_TYPES:
        return value
    if hasattr(value, "tolist"):
        if getattr(value, "requires_grad", False):
            raise TypeError(
                f"{name} must not require a gradient, which would be lost, got a tensor that "
                f"requires one; pass {name}.detach()"
            )
        try:
            return value.tolist()
        except (NotImplementedError, RuntimeError):  # a sparse or meta tensor
            return value
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        return value
    items = [as_python(f"{name}[{i}]", item) for i, item in enumerate(value)]
    return tuple(items) if isinstance(value, tuple) else items


def is_int(value: object) -> bool:
    """Return True for an int that is not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_number(name: str, value: object) -> float:
    """Return the value as a Python number; raise an error if it is no number or overflows."""
    number = as_python(name, value)
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(f"{name} must be a number, got {type_name(value)}")
    if isinstance(number, int) and abs(number) > sys.float_info.max:
        bits = number.bit_length()
        raise ValueError(f"{name} must be in a float's range, got an int of {bits} bits")
    return number


def check_finite(name: str, value: object) -> float:
    """Return the value as a Python number; raise an error if it is not a finite one."""
    number = check_number(name, value)
    if not -math.inf < number < math.inf:  # unlike math.isfinite, torch.compile can trace this
        raise ValueError(f"{name} must be finite, got {value!r}")
    return number
