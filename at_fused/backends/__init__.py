"""Back ends, which run the operators: those there are, can be used here, and are in use.

    cpu      the compiled C++ library (csrc/cpu), CPU tensors
    cuda     the compiled CUDA library (csrc/cuda), CUDA tensors
    triton   Triton kernels (triton/), CUDA tensors, where there is no CUDA library
    eager    plain PyTorch, every device (eager/)

The dispatcher picks: a back end is a set of kernels registered for a device, the fastest on top.
``use_backend`` puts another one on top, for the whole process.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch

from at_fused._arguments import check_choice
from at_fused.backends import eager, triton
from at_fused.backends.compiled import cpu, cuda

# What a back end provides: a kernel for each of the operators in _ops, under its name.
OPERATORS: tuple[str, ...] = "attention_map", "attention_map_backward"
OPERATORS += "attention_tap_backward", "attention_tap_backward_"
OPERATORS += "map_loss", "at_loss", "at_value_and_grad"


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


# Fastest first, each with the devices whose tensors it could run.
_TABLE: dict[str, tuple[Any, tuple[str, ...]]] = {
    "cpu": (cpu, ("cpu",)),
    "cuda": (cuda, ("cuda",)),
    "triton": (triton, ("cuda",)),
    "eager": (eager, ("cpu", "cuda", "other")),
}

_forced = "auto"
_override: torch.library.Library | None = None
_triton_library: torch.library.Library | None = None


def load() -> None:
    """Registers the fastest kernels for each device, once, when the package is imported."""
    global _triton_library
    cpu.load()
    cuda.load()
    if users()["cuda"] == "triton":
        _triton_library = override(triton, ("CUDA",))


def candidates(device: str) -> list[str]:
    """The back ends that could run a device's tensors, fastest first."""
    return [name for name, (_, devices) in _TABLE.items() if device in devices]


def _forced_devices(name: str) -> tuple[str, ...]:
    """The devices that a back end takes from faster ones where it is chosen."""
    if name == "triton" and triton.interpreted():
        return "cpu", "cuda"
    return () if name == "auto" else _TABLE[name][1]


def users() -> dict[str, str]:
    """Device type -> the back end that runs its tensors."""
    fastest = {
        device: next(name for name in candidates(device) if _TABLE[name][0].loaded())
        for device in ("cpu", "cuda", "other")
    }
    return fastest | dict.fromkeys(_forced_devices(_forced), _forced)


def backends() -> dict[str, Backend]:
    """The table of back ends, fastest first.

    Returns:
        For each name a :class:`at_fused.Backend`: name, available, devices, in_use, reason.
    """
    runs = users()
    table = {}
    for name, (module, could) in _TABLE.items():
        available = module.available()
        now = tuple(device for device, user in runs.items() if user == name)
        in_use = available and bool(now)
        table[name] = Backend(name, available, now if in_use else could, in_use, module.reason())
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
    _forced, _override = name, None
    if name in ("triton", "eager"):  # a compiled library's kernels are the fastest as they are
        keys = tuple(device.upper() for device in _forced_devices(name) if device != "other")
        _override = override(_TABLE[name][0], keys)


class use_backend:  # noqa: N801 - used like torch.no_grad
    """Runs the operators on one back end: a setting, or a context manager that undoes it.

    A back end for one kind of device leaves the others' tensors to the fastest there is for them.
    The choice holds for the whole process, all threads, like ``torch.backends`` flags. It must not
    change while another thread calls the operators, whose calls may then fail: torch changes its
    tables of kernels without a lock.

    Args:
        name: "auto" (the fastest there is for each device), "cpu", "cuda", "triton" or "eager".

    Raises:
        ValueError: ``name`` is none of these.
        RuntimeError: the back end cannot be used here; the message says why.
    """

    def __init__(self, name: str) -> None:
        table = backends()
        check_choice("use_backend: name", name, ("auto", *table))
        if name != "auto" and not table[name].available:
            raise RuntimeError(f"use_backend: {name!r} cannot be used: {table[name].reason}")
        self._previous = _forced
        _force(name)

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *error: object) -> None:
        _force(self._previous)
