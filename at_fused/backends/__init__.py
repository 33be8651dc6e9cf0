"""Back ends: sets of kernels for the operators, and the choice between them.

    cpu      compiled C++ library (csrc/cpu), CPU tensors
    cuda     compiled CUDA library (csrc/cuda), CUDA tensors
    triton   Triton kernels (triton/), CUDA tensors without a CUDA library
    eager    plain PyTorch (eager.py), tensors of every device

torch's dispatcher picks the kernel that was registered last for a device, which is the fastest one.
``use_backend`` overrides this choice for the whole process.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch

from at_fused._arguments import check_choice
from at_fused.backends import eager, triton
from at_fused.backends.compiled import cpu, cuda

# A back end has a function for each of these operators.
OPERATORS: tuple[str, ...] = "attention_map", "attention_map_backward"
OPERATORS += "attention_tap_backward", "attention_tap_backward_"
OPERATORS += "map_loss", "at_loss", "at_value_and_grad"


class Backend(NamedTuple):
    """Row of the table that :func:`at_fused.backends` returns.

    Attributes:
        name: "cpu", "cuda", "triton" or "eager".
        available: True if it can be used on this machine.
        devices: the device types that use it now, or if not in use, those that could use it.
        in_use: True if a device type uses it now.
        reason: a description, or why it cannot be used.
    """

    name: str
    available: bool
    devices: tuple[str, ...]
    in_use: bool
    reason: str


# Fastest first, each with the device types that it supports.
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
    """Register the fastest kernels for each device. Called once, by importing ``_ops``."""
    global _triton_library
    cpu.load()
    cuda.load()
    if backend_by_device()["cuda"] == "triton":
        _triton_library = override(triton, ("CUDA",))


def candidates(device: str) -> list[str]:
    """Return the back ends that support a device, fastest first."""
    return [name for name, (_, devices) in _TABLE.items() if device in devices]


def _forced_devices(name: str) -> tuple[str, ...]:
    """Return the devices that a back end serves when the user chooses it."""
    if name == "triton" and triton.interpreted():
        return "cpu", "cuda"
    return () if name == "auto" else _TABLE[name][1]


def backend_by_device() -> dict[str, str]:
    """Map each device type to the back end that runs its tensors."""
    fastest = {
        device: next(name for name in candidates(device) if _TABLE[name][0].loaded())
        for device in ("cpu", "cuda", "other")
    }
    return fastest | dict.fromkeys(_forced_devices(_forced), _forced)


def backends() -> dict[str, Backend]:
    """Return the table of back ends, fastest first.

    Returns:
        A :class:`at_fused.Backend` for each name: name, available, devices, in_use, reason.
    """
    choice = backend_by_device()
    table = {}
    for name, (module, supported) in _TABLE.items():
        available = module.available()
        served = tuple(device for device, backend in choice.items() if backend == name)
        in_use = available and bool(served)
        devices = served if in_use else supported
        table[name] = Backend(name, available, devices, in_use, module.reason())
    return table


def override(functions: Any, keys: tuple[str, ...]) -> torch.library.Library:
    """Register a back end's functions over the existing kernels; ``_destroy()`` undoes it."""
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
    if name in ("triton", "eager"):  # the compiled kernels are active without an override
        keys = tuple(device.upper() for device in _forced_devices(name) if device != "other")
        _override = override(_TABLE[name][0], keys)


class use_backend:  # noqa: N801 - used like torch.no_grad
    """Choice of the back end that runs the operators: a setting, or a context manager.

    Devices that the back end does not support keep their fastest one. The choice applies to all
    threads of the process, like the flags of ``torch.backends``. Do not change it while another
    thread calls the operators: torch updates its kernel tables without a lock, so that those calls
    may fail.

    Args:
        name: "auto" (the fastest for each device), "cpu", "cuda", "triton" or "eager".

    Raises:
        ValueError: ``name`` is not one of these.
        RuntimeError: the back end cannot be used on this machine; the message says why.
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
