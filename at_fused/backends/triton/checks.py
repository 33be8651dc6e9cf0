"""What a kernel cannot check for itself: the operators' arguments, as csrc/arguments.h has them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from at_fused.backends import eager
from at_fused.backends.triton.tiles import Pool

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def require(condition: bool, message: str) -> None:
    """Raises the error that csrc/arguments.h raises."""
    if not condition:
        raise RuntimeError(f"at_fused: {message}")


def check_device(x: Tensor, interpreted: bool) -> None:
    """That Triton can run on the tensor's device."""
    require(
        x.is_cuda or interpreted,
        f"Triton runs {x.device.type} tensors under TRITON_INTERPRET=1 only",
    )


def check_dtypes(tensors: Sequence[Tensor], what: str, interpreted: bool) -> None:
    """Dtypes, and that all are on one device, which Triton can run on."""
    for x in tensors:
        require(x.dtype in _DTYPES, f"{what} must be float16, bfloat16, float32 or float64")
        require(x.device == tensors[0].device, f"all {what} must be on the same device")
        check_device(x, interpreted)


def check_features(features: Sequence[Tensor], interpreted: bool) -> None:
    """Shapes, dtypes, and that all are on one device, which Triton can run on."""
    for x in features:
        require(x.dim() >= 3, "features must be (B, C, *spatial)")
        require(x.numel() > 0, "features must not be empty")
        require(x.dtype in _DTYPES, "features must be float16, bfloat16, float32 or float64")
        require(x.device == features[0].device, "all features must be on the same device")
        check_device(x, interpreted)


def check_exponent(p: float) -> None:
    """P >= 1, and finite."""
    require(1 <= p < math.inf, f"p must be a finite number >= 1, got {p}")


def keeps_sign(p: float, absolute: bool) -> bool:
    """Whether a power keeps its sign: x^p with odd p, which "absolute" or an even p do not."""
    require(absolute or p == math.floor(p), f"without absolute, p must be a whole number, got {p}")
    return not absolute and p % 2 == 1


def check_sizes(features: Sequence[Tensor], sizes: Sequence[int]) -> None:
    """None, or for each feature the spatial size that it is pooled to."""
    if not sizes:
        return
    at = 0
    for x in features:
        require(x.dim() <= 5, "sizes are for one to three spatial dimensions")
        for size in x.shape[2:]:
            require(at < len(sizes), "sizes are too few for the features")
            require(
                1 <= sizes[at] <= size,
                f"sizes must be from 1 to the feature's, {size}, got {sizes[at]}",
            )
            at += 1
    require(at == len(sizes), "sizes are too many for the features")


def check_collapse(collapse: str, signed: bool = False) -> None:
    """One of the three; what is raised to an odd power with its sign has no maximum."""
    require(
        collapse in ("mean", "sum", "max"),
        f"collapse must be 'mean', 'sum' or 'max', got '{collapse}'",
    )
    require(collapse != "max" or not signed, "collapse 'max' takes absolute values")


def _check_pairs(
    student: Sequence[Tensor], teacher: Sequence[Tensor], weights: Sequence[float], form: str
) -> None:
    n = len(student)
    require(
        n > 0 and len(teacher) == n,
        f"as many teachers as students, got {n} and {len(teacher)}",
    )
    require(len(weights) in (0, n), f"a weight per pair, got {len(weights)} for {n}")
    require(form in ("code", "paper"), f"form must be 'code' or 'paper', got '{form}'")


def _check_eps(eps: float) -> None:
    require(0 < eps < math.inf, f"eps must be a finite number > 0, got {eps}")


def check_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weights: Sequence[float],
    p: float,
    collapse: str,
    form: str,
    reduction: str,
    eps: float,
) -> None:
    """The pairs of a loss and its options."""
    _check_pairs(student, teacher, weights, form)
    require(reduction in ("sum", "none"), f"reduction must be 'sum' or 'none', got '{reduction}'")
    _check_eps(eps)
    check_exponent(p)
    check_collapse(collapse)
    require(collapse != "max", "collapse must be 'mean' or 'sum' here")
    for s, t in zip(student, teacher, strict=True):
        same = s.shape[0] == t.shape[0] and s[0, 0].numel() == t[0, 0].numel()
        require(same, "student and teacher of a pair must have the same B and positions")


def check_map_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weights: Sequence[float],
    form: str,
    reduction: str,
    eps_mode: str,
    eps: float,
    interpreted: bool,
) -> None:
    """The pairs of a loss of maps and its options."""
    _check_pairs(student, teacher, weights, form)
    require(
        reduction in ("sum", "none", "sample"),
        f"reduction must be 'sum', 'none' or 'sample', got '{reduction}'",
    )
    require(eps_mode in ("max", "add"), f"eps_mode must be 'max' or 'add', got '{eps_mode}'")
    _check_eps(eps)
    for s, t in zip(student, teacher, strict=True):
        for q in (s, t):
            require(
                q.dim() == 2
                and q.numel() > 0
                and q.device == student[0].device
                and q.dtype in (torch.float32, torch.float64)
                and q.shape == s.shape,
                "maps must be (B, N), not empty, float32 or float64, on one device, and both of a "
                "pair of one size",
            )
            check_device(q, interpreted)
        require(
            reduction != "sample" or s.shape[0] == student[0].shape[0],
            "a loss for each sample needs pairs of one batch size",
        )


def check_loss_gradient(
    gradient: Tensor | None, pairs: Sequence[int], device: torch.device
) -> None:
    """Nothing, a scalar, or one value for each pair number."""
    if gradient is None:
        return
    require(
        gradient.dim() <= 1 and gradient.device == device,
        "the loss gradient must be a scalar or a vector on the features' device",
    )
    require(
        gradient.dtype in (torch.float32, torch.float64),
        "the loss gradient must be float32 or float64",
    )
    for pair in pairs:
        require(
            gradient.dim() == 0 or 0 <= pair < gradient.numel(),
            f"pair number {pair} is out of range",
        )


def check_coefficients(
    features: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    pairs: Sequence[int],
    channels: Sequence[Tensor],
    pools: Sequence[Pool | None],
) -> None:
    """A map and a pair number for each feature, and perhaps a map of channels."""
    require(len(coefficients) == len(features), "a coefficient map per feature")
    require(len(pairs) == len(features), "a pair number per feature")
    for x, k, pool in zip(features, coefficients, pools, strict=True):
        require(
            k.shape == (x.shape[0], x[0, 0].numel() if pool is None else pool.positions())
            and k.device == x.device
            and k.dtype == eager.accumulate_dtype(x),
            "a coefficient map must be (B, N), float64 for float64 features and float32 otherwise",
        )
    require(len(channels) in (0, len(features)), "a map of channels per feature")
    for q, k in zip(channels, coefficients, strict=False):
        require(
            q.shape == k.shape and q.device == k.device and q.dtype == torch.int32,
            "a map of channels must be (B, N) of int32",
        )


def check_tap(
    gradient: Tensor,
    feature: Tensor,
    map_gradient: Tensor,
    p: float,
    collapse: str,
    absolute: bool,
    channels: Tensor | None,
    interpreted: bool,
) -> bool:
    """A gradient, its feature, and the gradient of the feature's map; gives ``keeps_sign``."""
    check_features([feature], interpreted)
    check_exponent(p)
    signed = keeps_sign(p, absolute)
    check_collapse(collapse, signed)
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
    winners = [] if channels is None else [channels]
    check_coefficients([feature], [map_gradient], [0], winners, [None])
    return signed


def check_writable(gradient: Tensor) -> None:
    """That no two elements share memory by a stride of 0."""
    require(
        all(n == 1 or step != 0 for n, step in zip(gradient.shape, gradient.stride(), strict=True)),
        "a gradient that is written in place must not be expanded",
    )
