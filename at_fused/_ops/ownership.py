"""Ownership of a gradient: a backward may write into one that nobody else holds.

Autograd gives no promise: another branch of an addition may still wait for the tensor, a hook keep
it, the user have asked for it. Each of these holds a reference, and all that can hold one are
counted: owners of the tensor in C++ (a branch, a capture, a saved variable) and in Python (hooks,
closures, frames); those of its storage in C++ (views, aliases) and in Python.

The number of references to a gradient that is nobody else's depends on the versions of torch and
Python. So they are counted once, on one that is known to be free; the same run shows that each kind
of holder changes a count. Where it does not, or later a count is another one, nothing is written in
place.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

Counts = tuple[int, int, int, int]
Tap = Callable[[Tensor], tuple[Tensor, ...]]

_free: Counts | None = None
_calibrated = False
_observed: list[Counts] | None = None


def may_write(gradient: Tensor, like: Tensor) -> bool:
    """Return True if ``gradient`` has no other holder, and lies in memory as ``like`` does.

    For the ``backward`` of the Function that was given to ``calibrate``, on its first argument.
    """
    if type(gradient) is not Tensor or torch._C._are_functorch_transforms_active():
        return False
    storage = gradient.untyped_storage()
    counts = (
        cast(Any, gradient)._use_count(),
        sys.getrefcount(gradient),
        torch._C._storage_Use_Count(storage._cdata),
        sys.getrefcount(storage),
    )
    if _observed is not None:
        _observed.append(counts)
        return False
    return (
        counts == _free
        and gradient.stride() == like.stride()
        and gradient.dtype == like.dtype
        and torch._debug_has_internal_overlap(gradient) == 0  # dense; 2 is "too hard to tell"
        and not (gradient.requires_grad or torch.is_grad_enabled())
        and weakref.getweakrefcount(gradient) == 0
        # Memory that is not torch's own may have owners that nobody counts: an array, a file.
        and storage.resizable()
    )


def calibrate(tap: Tap) -> None:
    """Counts the references of a free gradient, the first time that nothing is in the way."""
    global _free, _calibrated
    if not _calibrated and _undisturbed():
        _calibrated = True
        free = _observe(tap, lambda gradient: None)
        held = [
            _observe(tap, lambda gradient: gradient),
            _observe(tap, lambda gradient: gradient.detach()),
            _observe(tap, lambda gradient: gradient[0]),
            _observe(tap, lambda gradient: gradient.untyped_storage()),
            _observe(tap, lambda gradient: None, capture=True),
        ]
        _free = None if free in held or None in held else free


def _undisturbed() -> bool:
    """Return True if nothing looks on that might hold references of its own."""
    # Not with the package: importing it brings in nothing that torch has not loaded itself.
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._device import DeviceContext

    monitoring = getattr(sys, "monitoring", None)
    return (
        sys.gettrace() is None
        and sys.getprofile() is None
        and (monitoring is None or not any(map(monitoring.get_tool, range(6))))
        # Without the lock, Python's counts are spread over threads.
        and getattr(sys, "_is_gil_enabled", lambda: True)()
        and not torch.is_anomaly_enabled()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        # A default device is such a mode too, which keeps nothing.
        and all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())
    )


def _observe(tap: Tap, hold: Callable[[Tensor], Any], capture: bool = False) -> Counts | None:
    """The counts of a gradient while ``hold`` keeps what it makes of it; None without a result."""
    global _observed
    observed: list[Counts] = []
    kept: list[Any] = []
    _observed = observed
    # A checkpoint around the first tap must not count what is saved here.
    plain = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    try:
        with plain, torch.inference_mode(False), torch.enable_grad():
            x = torch.ones(1, 1, 2, device="cpu", dtype=torch.float32, requires_grad=True)
            y, q = tap(x * 2)
            y.register_hook(lambda gradient: kept.append(hold(gradient)))
            loss = (y * y).sum() + q.sum()
            torch.autograd.grad(loss, [x, y] if capture else [x])
    finally:
        _observed = None
    return observed[0] if len(observed) == 1 else None
