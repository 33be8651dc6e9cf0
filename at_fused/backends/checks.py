"""The operators' arguments in the back ends in Python, checked as ``csrc/*_arguments.h`` do."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from at_fused._checks import DTYPES
from at_fused.backends.results import accumulate_dtype, split_sizes

_LOSSES = (torch.float32, torch.float64)


def require(condition: bool, message: str) -> None:
    """Raises the error that csrc raises."""
    if not condition:
        raise RuntimeError(f"at_fused: {message}")


# ---- features and maps ---------------------------------------------------------------------------


def _check_tensors(tensors: Sequence[Tensor], what: str) -> None:
    for x in tensors:
        require(x.dtype in DTYPES, f"{what} must be float16, bfloat16, float32 or float64")
        require(x.device == tensors[0].device, f"all {what} must be on the same device")


def _check_features(features: Sequence[Tensor]) -> None:
    for x in features:
        require(x.dim() >= 3, "features must be (B, C, *spatial)")
        require(x.numel() > 0, "features must not be empty")
    _check_tensors(features, "features")


def _check_power(p: float, absolute: bool, collapse: str) -> None:
    require(1 <= p < math.inf, f"p must be a finite number >= 1, got {p}")
    require(absolute or p == math.floor(p), f"without absolute, p must be a whole number, got {p}")
    require(
        collapse in ("mean", "sum", "max"),
        f"collapse must be 'mean', 'sum' or 'max', got '{collapse}'",
    )
    require(collapse != "max" or absolute or p % 2 == 0, "collapse 'max' takes absolute values")


def _check_sizes(features: Sequence[Tensor], sizes: Sequence[int]) -> None:
    if not sizes:
        return
    wanted = sum(x.dim() - 2 for x in features)
    require(len(sizes) >= wanted, "sizes are too few for the features")
    require(len(sizes) <= wanted, "sizes are too many for the features")
    for x, size in zip(features, split_sizes(features, sizes), strict=True):
        require(x.dim() <= 5, "sizes are for one to three spatial dimensions")
        for given, asked in zip(x.shape[2:], size, strict=True):
            require(
                1 <= asked <= given,
                f"sizes must be from 1 to the feature's, {given}, got {asked}",
            )


def check_attention_map(
    features: Sequence[Tensor], p: float, collapse: str, absolute: bool, sizes: Sequence[int]
) -> None:
    """Features, how they are raised, and the sizes that they are pooled to."""
    _check_features(features)
    _check_power(p, absolute, collapse)
    _check_sizes(features, sizes)


def _check_loss_gradient(gradient: Tensor, pairs: Sequence[int], device: torch.device) -> None:
    require(
        gradient.dim() <= 1 and gradient.device == device,
        "the loss gradient must be a scalar or a vector on the inputs' device",
    )
    require(gradient.dtype in _LOSSES, "the loss gradient must be float32 or float64")
    for pair in pairs:
        require(
            gradient.dim() == 0 or 0 <= pair < gradient.numel(),
            f"pair number {pair} is out of range",
        )


def _check_map(x: Tensor, k: Tensor, positions: int, channels: Tensor | None) -> None:
    require(
        k.shape == (x.shape[0], positions)
        and k.device == x.device
        and k.dtype == accumulate_dtype(x),
        "a coefficient map must be (B, N), float64 for float64 features and float32 otherwise",
    )
    require(
        channels is None
        or (
            channels.shape == k.shape
            and channels.device == x.device
            and channels.dtype == torch.int32
        ),
        "a map of channels must be (B, N) of int32",
    )


def check_attention_map_backward(
    features: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    loss_gradient: Tensor | None,
    pairs: Sequence[int],
    p: float,
    absolute: bool,
    sizes: Sequence[int],
    channels: Sequence[Tensor],
) -> None:
    """A map and a pair number for each feature, and perhaps a map of channels."""
    check_attention_map(features, p, "max" if channels else "sum", absolute, sizes)
    count = len(features)
    require(len(coefficients) == count, "a coefficient map per feature")
    require(len(pairs) == count, "a pair number per feature")
    require(len(channels) in (0, count), "a map of channels per feature, or none")
    winners: Sequence[Tensor | None] = channels or [None] * count
    map_sizes = split_sizes(features, sizes)
    for x, k, size, named in zip(features, coefficients, map_sizes, winners, strict=True):
        _check_map(x, k, math.prod(size), named)
    if features and loss_gradient is not None:
        _check_loss_gradient(loss_gradient, pairs, features[0].device)


def check_tap(
    gradient: Tensor,
    feature: Tensor,
    map_gradient: Tensor,
    p: float,
    collapse: str,
    absolute: bool,
    channels: Tensor | None,
) -> None:
    """A gradient, its feature, and the gradient of the feature's map."""
    check_attention_map([feature], p, collapse, absolute, [])
    require(
        gradient.shape == feature.shape
        and gradient.dtype == feature.dtype
        and gradient.device == feature.device,
        "a gradient must have the shape, dtype and device of its feature",
    )
    require(
        (collapse == "max") == (channels is not None),
        "a map of channels belongs to collapse 'max', and to no other",
    )
    _check_map(feature, map_gradient, math.prod(feature.shape[2:]), channels)


def check_apart(gradient: Tensor) -> None:
    """That no two elements of what is written in place lie in one place."""
    reach = 1
    for step, size in sorted(zip(gradient.stride(), gradient.shape, strict=True)):
        if size > 1:
            require(
                step >= reach,
                "a gradient that is written in place must not be expanded, nor overlap itself",
            )
            reach += (size - 1) * step


# ---- losses --------------------------------------------------------------------------------------


def _check_weights(weights: Sequence[float], pairs: int) -> None:
    require(len(weights) in (0, pairs), f"a weight per pair, got {len(weights)} for {pairs}")


def _check_reduction(reduction: str) -> None:
    require(reduction in ("sum", "none"), f"reduction must be 'sum' or 'none', got '{reduction}'")


def _check_pairs(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weights: Sequence[float],
    form: str,
    eps: float,
) -> None:
    n = len(student)
    require(
        n > 0 and len(teacher) == n, f"as many teachers as students, got {n} and {len(teacher)}"
    )
    _check_weights(weights, n)
    require(form in ("code", "paper"), f"form must be 'code' or 'paper', got '{form}'")
    require(0 < eps < math.inf, f"eps must be a finite number > 0, got {eps}")


def check_at_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weights: Sequence[float],
    p: float,
    collapse: str,
    form: str,
    reduction: str,
    eps: float,
    loss_gradient: Tensor | None = None,
) -> None:
    """The pairs of a loss and its options."""
    _check_pairs(student, teacher, weights, form, eps)
    _check_reduction(reduction)
    check_attention_map((*student, *teacher), p, collapse, True, [])
    require(collapse != "max", "collapse must be 'mean' or 'sum' here")
    for s, t in zip(student, teacher, strict=True):
        require(
            s.shape[0] == t.shape[0] and math.prod(s.shape[2:]) == math.prod(t.shape[2:]),
            "student and teacher of a pair must have the same B and positions",
        )
    if loss_gradient is not None:
        _check_loss_gradient(loss_gradient, range(len(student)), student[0].device)


def check_map_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weights: Sequence[float],
    form: str,
    reduction: str,
    eps_mode: str,
    eps: float,
) -> None:
    """The pairs of a loss of maps and its options."""
    _check_pairs(student, teacher, weights, form, eps)
    require(
        reduction in ("sum", "none", "sample"),
        f"reduction must be 'sum', 'none' or 'sample', got '{reduction}'",
    )
    require(eps_mode in ("max", "add"), f"eps_mode must be 'max' or 'add', got '{eps_mode}'")
    for s, t in zip(student, teacher, strict=True):
        for q in (s, t):
            require(
                q.dim() == 2
                and q.numel() > 0
                and q.device == student[0].device
                and q.dtype in _LOSSES
                and q.shape == s.shape,
                "maps must be (B, N), not empty, float32 or float64, on one device, and both of a "
                "pair of one size",
            )
        require(
            reduction != "sample" or s.shape[0] == student[0].shape[0],
            "a loss for each sample needs pairs of one batch size",
        )
