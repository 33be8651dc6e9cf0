"""Checks of numbers, which NumPy, torch and files of configuration give as well. Without torch."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

_PYTHON = (int, float, bool, str, bytes, type(None))


def kind(value: object) -> str:
    """The name of a value's type, for messages."""
    return type(value).__name__


def as_python(name: str, value: Any) -> Any:
    """Return Python's own numbers and lists for scalars, arrays, tensors and lists of OmegaConf.

    Anything else comes back as it is, for a check to refuse. Raises a TypeError for a tensor that
    requires a gradient.
    """
    if type(value) in _PYTHON:
        return value
    if hasattr(value, "tolist"):
        if getattr(value, "requires_grad", False):
            raise TypeError(
                f"{name} must not require a gradient, which would be lost, got a tensor that "
                f"does; give {name}.detach()"
            )
        try:
            return value.tolist()
        except (NotImplementedError, RuntimeError):  # sparse, or without data
            return value
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        return value
    several = [as_python(f"{name}[{i}]", each) for i, each in enumerate(value)]
    return tuple(several) if isinstance(value, tuple) else several


def is_whole(value: object) -> bool:
    """Return True for an int, but not for a bool, which is one to Python."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_number(name: str, value: object) -> float:
    """Return the number; a TypeError for what is none, a ValueError for one that no float holds."""
    number = as_python(name, value)
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(f"{name} must be a number, got {kind(value)}")
    if isinstance(number, int) and abs(number) > sys.float_info.max:
        bits = number.bit_length()
        raise ValueError(f"{name} must be in a float's range, got one of {bits} bits")
    return number


def check_finite(name: str, value: object) -> float:
    """Return the number; an error for what is no finite one."""
    number = check_number(name, value)
    if not -math.inf < number < math.inf:  # torch.compile can trace it
        raise ValueError(f"{name} must be finite, got {value!r}")
    return number
