"""What runs the operators: which back ends there are, which can be used here, which is in use.

    cpu      the compiled C++ library (csrc/cpu), CPU tensors
    cuda     the compiled CUDA library (csrc/cuda), CUDA tensors
    triton   Triton kernels (triton/), CUDA tensors, where there is no CUDA library
    eager    plain PyTorch, every device (eager/)

The dispatcher picks: a back end is a set of kernels registered for a device, the fastest on top.
``use_backend`` puts another one on top, for the whole process.
"""

from __future__ import annotations

import importlib.util
import warnings
from types import TracebackType
from typing import Any, NamedTuple

import torch

from at_fused.backends import cpu, cuda, eager, triton

# What a back end provides: a kernel for each of the operators in _ops, under its name.
OPERATORS = (
    "attention_map",
    "attention_map_backward",
    "attention_tap_backward",
    "attention_tap_backward_",
    "map_loss",
    "at_loss",
    "at_value_and_grad",
    "kd_loss",
    "kd_loss_backward",
    "distance_loss",
    "distance_loss_backward",
)


class Backend(NamedTuple):
    """One row of :func:`at_fused.backends`.

    Attributes:
        name: "cpu", "cuda", "triton" or "eager".
        available: whether it can be used here.
        devices: the types of devices whose tensors run there now, or could if it were chosen.
        in_use: whether any tensors run there now.
        reason: what it is, or why it cannot be used.
    """

    name: str
    available: bool
    devices: tuple[str, ...]
    in_use: bool
    reason: str


_forced = "auto"
_override: torch.library.Library | None = None
_triton_library: torch.library.Library | None = None


def load() -> None:
    """Registers the fastest kernels for each device, once, when the package is imported."""
    global _triton_library
    cpu.load()
    cuda.load()
    if not cuda.loaded() and _triton_for_gpus():
        _triton_library = override(triton, ("CUDA",))


def _triton_for_gpus() -> bool:
    """Whether CUDA tensors can go to Triton; asks no device, so that importing stays cheap."""
    has_gpus = torch.version.cuda or torch.version.hip
    return bool(has_gpus) and importlib.util.find_spec("triton") is not None


def users() -> dict[str, str]:
    """Device type -> the back end that runs its tensors."""
    fastest = {
        "cpu": "cpu" if cpu.available() else "eager",
        "cuda": "cuda" if cuda.loaded() else "triton" if _triton_for_gpus() else "eager",
        "other": "eager",
    }
    if _forced == "eager":
        return dict.fromkeys(fastest, "eager")
    if _forced == "triton":
        return fastest | {"cuda": "triton"} | ({"cpu": "triton"} if triton.interpreted() else {})
    return fastest


def backends() -> dict[str, Backend]:
    """The table of back ends, fastest first.

    Returns:
        For each name a :class:`at_fused.Backend`: name, available, devices, in_use, reason.
    """
    runs = users()
    rows = {
        "cpu": (cpu.available(), ("cpu",), cpu.reason()),
        "cuda": (cuda.available(), ("cuda",), cuda.reason()),
        "triton": (triton.available(), ("cuda",), triton.reason() or "Triton kernels"),
        "eager": (True, ("cpu", "cuda", "other"), "plain PyTorch"),
    }
    table = {}
    for name, (available, could, reason) in rows.items():
        now = tuple(device for device, user in runs.items() if user == name)
        in_use = available and bool(now)
        table[name] = Backend(name, available, now if in_use else could, in_use, reason)
    return table


def override(functions: Any, keys: tuple[str, ...]) -> torch.library.Library:
    """Puts a back end's functions on top of what is registered; ``_destroy()`` undoes it."""
    library = torch.library.Library("at_fused", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"(?s).*Overriding a previously registered kernel")
        for operator in OPERATORS:
            for key in keys:
                library.impl(operator, getattr(functions, operator), key, allow_override=True)
    return library


def _force(name: str) -> None:
    global _forced, _override
    if _override is not None:
        _override._destroy()
        _override = None
    if name == "eager":
        _override = override(eager, ("CPU", "CUDA"))
    if name == "triton":
        _override = override(triton, ("CPU", "CUDA") if triton.interpreted() else ("CUDA",))
    _forced = name


class use_backend:  # noqa: N801 - used like torch.no_grad
    """Runs the operators on one back end: a setting, or a context manager that undoes it.

    A back end for one kind of device leaves the others' tensors to the fastest there is for them.
    The choice holds for the whole process, all threads, like ``torch.backends`` flags.

    Args:
        name: "auto" (the fastest there is for each device), "cpu", "cuda", "triton" or "eager".

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
