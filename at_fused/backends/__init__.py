"""What runs the operators: which back ends there are, which can be used here, which is in use.

    eager   plain PyTorch, every device (eager.py)
    cpu     the compiled C++ library (csrc/cpu), CPU tensors (cpu.py)

The dispatcher picks: a back end is a set of kernels registered for a device, the fastest on top.
``use_backend`` puts another one on top, for the whole process.
"""

from __future__ import annotations

import warnings
from types import TracebackType
from typing import NamedTuple

import torch

from at_fused.backends import cpu, eager

# What a back end provides: a kernel for each of the operators in _ops.py, under its name.
OPERATORS = ("attention_map", "at_loss", "attention_map_backward", "at_value_and_grad")


class Backend(NamedTuple):
    """One row of ``backends()``."""

    name: str
    available: bool
    devices: tuple[str, ...]
    in_use: bool
    reason: str


_forced = "auto"
_override: torch.library.Library | None = None


def backends() -> dict[str, Backend]:
    """The table of back ends, fastest first: name -> (available, devices, in_use, reason).

    ``in_use`` says whether a call on one of ``devices`` runs there now; ``reason`` why a back end
    cannot be used, or what it is.
    """
    compiled = cpu.available()
    return {
        "cpu": Backend("cpu", compiled, ("cpu",), compiled and _forced != "eager", cpu.reason()),
        "eager": Backend(
            "eager",
            True,
            ("any",) if _forced == "eager" or not compiled else ("any but cpu",),
            True,
            "plain PyTorch",
        ),
    }


def _force(name: str) -> None:
    global _forced, _override
    if _override is not None:
        _override._destroy()
        _override = None
    if name == "eager":
        _override = torch.library.Library("at_fused", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"(?s).*Overriding a previously registered kernel")
            for operator in OPERATORS:
                for key in ("CPU", "CUDA"):
                    _override.impl(operator, getattr(eager, operator), key, allow_override=True)
    _forced = name


class use_backend:  # noqa: N801 - used like torch.no_grad
    """Runs the operators on one back end: a setting, or a context manager that undoes it.

    ``name`` is "auto" (the fastest there is for each device), "cpu" or "eager". The choice holds
    for the whole process, all threads, like ``torch.backends`` flags.

    Raises:
        ValueError: ``name`` is none of these.
        RuntimeError: the back end cannot be used here; the message says why.
    """

    def __init__(self, name: str) -> None:
        table = backends()
        if name != "auto" and name not in table:
            allowed = ", ".join(repr(n) for n in ("auto", *table))
            raise ValueError(f"use_backend: name must be one of {allowed}, got {name!r}")
        if name != "auto" and not table[name].available:
            raise RuntimeError(f"use_backend: {name!r} cannot be used: {table[name].reason}")
        self._previous = _forced
        _force(name)

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _force(self._previous)
