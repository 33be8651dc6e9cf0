"""Ownership of gradients: a backward may write into a gradient that has no other owner.

Autograd promises nothing: another branch of an addition may still need the tensor, a hook may keep
it, or the user may have asked for it. Each of these holds a reference. So the references are
counted: to the tensor in C++ (branches, captures, saved variables) and in Python (hooks, closures,
frames), and to its storage in C++ (views, aliases) and in Python.

The counts of a gradient without other owners depend on the versions of torch and Python. They are
therefore measured once, on such a gradient. The same run checks that each kind of owner changes a
count. If one does not, or if a later count differs, the backward does not write in place.
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

_sole_owner_counts: Counts | None = None
_calibrated = False
_observed: list[Counts] | None = None


def may_write(gradient: Tensor, like: Tensor) -> bool:
    """Return True if ``gradient`` has no other owner and has the strides and dtype of ``like``.

    Call it on the first argument of the ``backward`` of the tap that ``calibrate`` measured.
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
        counts == _sole_owner_counts
        and gradient.stride() == like.stride()
        and gradient.dtype == like.dtype
        and torch._debug_has_internal_overlap(gradient) == 0  # 0: dense, 1: overlap, 2: unknown
        and not (gradient.requires_grad or torch.is_grad_enabled())
        and weakref.getweakrefcount(gradient) == 0
        # Memory from outside torch, such as an array or a file, may have owners not counted here.
        and storage.resizable()
    )


def calibrate(tap: Tap) -> None:
    """Measure the counts of a gradient without other owners, on the first call that allows it."""
    global _sole_owner_counts, _calibrated
    if not _calibrated and _can_calibrate():
        _calibrated = True
        sole = _count_references(tap, lambda gradient: None)
        shared = [
            _count_references(tap, lambda gradient: gradient),
            _count_references(tap, lambda gradient: gradient.detach()),
            _count_references(tap, lambda gradient: gradient[0]),
            _count_references(tap, lambda gradient: gradient.untyped_storage()),
            _count_references(tap, lambda gradient: None, capture=True),
        ]
        _sole_owner_counts = None if sole in shared or None in shared else sole


def _can_calibrate() -> bool:
    """Return True if no debugger, profiler or torch mode may hold references of its own."""
    # Imported here: importing at_fused must not load modules that torch itself has not loaded.
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._device import DeviceContext

    monitoring = getattr(sys, "monitoring", None)
    return (
        sys.gettrace() is None
        and sys.getprofile() is None
        and (monitoring is None or not any(map(monitoring.get_tool, range(6))))
        # Without the GIL, Python splits the counts over threads.
        and getattr(sys, "_is_gil_enabled", lambda: True)()
        and not torch.is_anomaly_enabled()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        # A default device is a mode that holds no references.
        and all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())
    )


def _count_references(
    tap: Tap, hold: Callable[[Tensor], Any], capture: bool = False
) -> Counts | None:
    """Return the counts of a gradient while the result of ``hold`` is alive; None if unknown."""
    global _observed
    observed: list[Counts] = []
    held: list[Any] = []
    _observed = observed
    # Hides the tensors saved here from a checkpoint around the first tap.
    no_hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    try:
        with no_hooks, torch.inference_mode(False), torch.enable_grad():
            x = torch.ones(1, 1, 2, device="cpu", dtype=torch.float32, requires_grad=True)
            y, q = tap(x * 2)
            y.register_hook(lambda gradient: held.append(hold(gradient)))
            loss = (y * y).sum() + q.sum()
            torch.autograd.grad(loss, [x, y] if capture else [x])
    finally:
        _observed = None
    return observed[0] if len(observed) == 1 else None
