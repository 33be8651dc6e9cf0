"""The operators' arguments in the back ends in Python, checked as ``csrc/*_arguments.h`` do."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from at_fused._checks import DTYPES
from at_fused._options import LossOptions
from at_fused.backends.results import accumulate_dtype

_LOSSES = (torch.float32, torch.float64)


def require(condition: bool, message: str) -> None:
    """Raises the error that csrc raises."""
    if not condition:
        raise RuntimeError(f"at_fused: {message}")


# ---- features and maps ---------------------------------------------------------------------------


def _check_tensors(tensors: Sequence[Tensor], what: str) -> None:
    for x in tensors:
        require(x.layout is torch.strided, f"{what} must be dense tensors")
        require(x.dtype in DTYPES, f"{what} must be float16, bfloat16, float32 or float64")
        require(x.device == tensors[0].device, f"all {what} must be on the same device")


def _check_features(features: Sequence[Tensor]) -> None:
    for x in features:
        require(x.dim() >= 3, "features must be (B, C, *spatial)")
        require(x.numel() > 0, "features must not be empty")
    _check_tensors(features, "features")


def _check_power(p: float, collapse: str) -> None:
    require(1 <= p < math.inf, f"p must be a finite number >= 1, got {p}")
    require(
        collapse in ("mean", "sum", "max"),
        f"collapse must be 'mean', 'sum' or 'max', got '{collapse}'",
    )


def check_attention_map(
    features: Sequence[Tensor], p: float, collapse: str, skip_tokens: Sequence[int]
) -> None:
    """Features, how they become maps, and how many tokens in front have no part in that."""
    _check_features(features)
    _check_power(p, collapse)
    require(
        len(skip_tokens) in (0, len(features)),
        f"skip_tokens must have one number per feature, got {len(skip_tokens)} for {len(features)}",
    )
    for x, skip in zip(features, skip_tokens, strict=False):
        require(
            skip == 0 or (x.dim() == 3 and 0 < skip < x.shape[2]),
            f"skip_tokens must be >= 0 and leave a token of a feature (B, C, N), got {skip}",
        )


def without_first(features: Sequence[Tensor], skip_tokens: Sequence[int]) -> list[Tensor]:
    """Return the features without their skipped tokens, as views."""
    if not skip_tokens:
        return list(features)
    return [x[:, :, n:] if n else x for x, n in zip(features, skip_tokens, strict=True)]


def _check_loss_gradient(
    gradient: Tensor, pairs: Sequence[int], features: Sequence[Tensor]
) -> None:
    require(
        gradient.dim() <= 2 and gradient.device == features[0].device,
        "the loss gradient must be a scalar, (pairs,) or (pairs, B), on the inputs' device",
    )
    require(gradient.dtype in _LOSSES, "the loss gradient must be float32 or float64")
    for pair in pairs:
        require(
            gradient.dim() == 0 or 0 <= pair < gradient.shape[0],
            f"pair number {pair} is out of range",
        )
    for x in features:
        require(
            gradient.dim() < 2 or gradient.shape[1] == x.shape[0],
            "a loss gradient (pairs, B) must have the batch size of the features",
        )


def _check_map(x: Tensor, k: Tensor, channels: Tensor | None) -> None:
    require(
        k.shape == (x.shape[0], math.prod(x.shape[2:]))
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
    skip_tokens: Sequence[int],
    channels: Sequence[Tensor],
) -> None:
    """A map and a pair number for each feature, and perhaps a map of channels."""
    check_attention_map(features, p, "max" if channels else "sum", skip_tokens)
    count = len(features)
    require(len(coefficients) == count, "a coefficient map per feature")
    require(len(pairs) == count, "a pair number per feature")
    require(len(channels) in (0, count), "a map of channels per feature, or none")
    winners: Sequence[Tensor | None] = channels or [None] * count
    mapped = without_first(features, skip_tokens)
    for x, k, named in zip(mapped, coefficients, winners, strict=True):
        _check_map(x, k, named)
    if features and loss_gradient is not None:
        _check_loss_gradient(loss_gradient, pairs, features)


def check_tap(
    gradient: Tensor,
    feature: Tensor,
    map_gradient: Tensor,
    p: float,
    collapse: str,
    channels: Tensor | None,
) -> None:
    """A gradient, its feature, and the gradient of the feature's map."""
    check_attention_map([feature], p, collapse, [])
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
    _check_map(feature, map_gradient, channels)


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


def _check_pairs(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weights: Sequence[float],
    form: str,
    reduction: str,
    eps_mode: str,
    eps: float,
) -> None:
    n = len(student)
    require(
        n > 0 and len(teacher) == n, f"as many teachers as students, got {n} and {len(teacher)}"
    )
    _check_weights(weights, n)
    require(form in ("code", "paper"), f"form must be 'code' or 'paper', got '{form}'")
    require(
        reduction in ("sum", "none", "sample"),
        f"reduction must be 'sum', 'none' or 'sample', got '{reduction}'",
    )
    require(eps_mode in ("max", "add"), f"eps_mode must be 'max' or 'add', got '{eps_mode}'")
    require(0 < eps < math.inf, f"eps must be a finite number > 0, got {eps}")
    for x in student:
        require(
            reduction != "sample" or x.shape[:1] == student[0].shape[:1],
            "a loss for each sample needs pairs of one batch size",
        )


def check_at_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    masks: Sequence[Tensor],
    weights: Sequence[float],
    skip_tokens: Sequence[int],
    options: LossOptions,
    loss_gradient: Tensor | None = None,
) -> None:
    """The pairs of a loss, their masks, and its options."""
    p, collapse, form, reduction, eps_mode, eps = options
    _check_pairs(student, teacher, weights, form, reduction, eps_mode, eps)
    features = [*student, *teacher]
    check_attention_map(features, p, collapse, skip_tokens)
    require(collapse != "max", "collapse must be 'mean' or 'sum' here")
    require(len(masks) in (0, len(student)), f"a mask per pair, got {len(masks)}")
    mapped = without_first(features, skip_tokens)
    for i, (s, t) in enumerate(zip(mapped[: len(student)], mapped[len(student) :], strict=True)):
        map_shape = s.shape[0], math.prod(s.shape[2:])
        require(
            map_shape == (t.shape[0], math.prod(t.shape[2:])),
            "student and teacher of a pair must have the same B and positions",
        )
        require(
            not masks
            or (
                masks[i].shape == map_shape
                and masks[i].device == s.device
                and masks[i].dtype == accumulate_dtype(s, t)
            ),
            "a mask must be (B, N) on the features' device, float64 where a feature of the pair is "
            "and float32 otherwise",
        )
    if loss_gradient is not None:
        _check_loss_gradient(loss_gradient, range(len(student)), student)


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
    _check_pairs(student, teacher, weights, form, reduction, eps_mode, eps)
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
