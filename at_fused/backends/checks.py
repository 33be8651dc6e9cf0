"""Checks of the operators' arguments for the Python back ends.

They keep Triton kernels from reading out of bounds, and PyTorch from broadcasting mismatched
shapes. ``csrc`` has the same checks for the compiled back ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from at_fused._arguments import CHOICES, DTYPES, join_choices
from at_fused._options import LossOptions
from at_fused.backends.outputs import accumulate_dtype

_WIDE = (torch.float32, torch.float64)


def require(condition: bool, message: str) -> None:
    """Raise a RuntimeError for a wrong direct call if the condition is False."""
    if not condition:
        raise RuntimeError(f"at_fused: {message}")


def without_skipped(features: Sequence[Tensor], skip_tokens: Sequence[int]) -> list[Tensor]:
    """Return views of the features without their skipped tokens."""
    if not skip_tokens:
        return list(features)
    return [x[:, :, n:] if n else x for x, n in zip(features, skip_tokens, strict=True)]


def _shape_of_map(x: Tensor) -> tuple[int, int]:
    return x.shape[0], math.prod(x.shape[2:])


def _check_choice(name: str, value: str) -> None:
    require(value in CHOICES[name], f"{name} must be {join_choices(CHOICES[name])}, got {value!r}")


# ---- features and maps ---------------------------------------------------------------------------


def check_attention_map(
    features: Sequence[Tensor], p: float, collapse: str, skip_tokens: Sequence[int]
) -> None:
    """Check features, the options of their maps, and the numbers of skipped tokens."""
    for x in features:
        require(
            x.dim() >= 3 and x.numel() > 0 and x.layout is torch.strided and x.dtype in DTYPES,
            "features must not be empty, and must be dense (B, C, *spatial) of float16, bfloat16, "
            "float32 or float64",
        )
        require(x.device == features[0].device, "all features must be on the same device")
    require(1 <= p < math.inf, f"p must be a finite number >= 1, got {p}")
    _check_choice("collapse", collapse)
    count = len(skip_tokens)
    require(
        count in (0, len(features)),
        f"skip_tokens must have one number per feature, got {count} for {len(features)}",
    )
    for x, skip in zip(features, skip_tokens, strict=False):
        require(
            skip == 0 or (x.dim() == 3 and 0 < skip < x.shape[2]),
            f"skip_tokens must be >= 0 and leave a token of a feature (B, C, N), got {skip}",
        )


def _check_loss_gradient(
    gradient: Tensor | None, pairs: Sequence[int], features: Sequence[Tensor]
) -> None:
    if gradient is None or not features:
        return
    require(
        gradient.dim() <= 2 and gradient.dtype in _WIDE and gradient.device == features[0].device,
        "the loss gradient must be a scalar, (pairs,) or (pairs, B), float32 or float64, on the "
        "inputs' device",
    )
    for pair, x in zip(pairs, features, strict=True):
        require(
            (gradient.dim() == 0 or 0 <= pair < gradient.shape[0])
            and (gradient.dim() < 2 or gradient.shape[1] == x.shape[0]),
            f"the loss gradient must have a value for pair {pair} and for each of its samples",
        )


def _check_map(x: Tensor, k: Tensor, channels: Tensor | None) -> None:
    require(
        k.shape == _shape_of_map(x) and k.device == x.device and k.dtype == accumulate_dtype(x),
        "a coefficient map must be (B, N), float64 for float64 features and float32 otherwise",
    )
    require(
        channels is None
        or (channels.shape, channels.device, channels.dtype) == (k.shape, x.device, torch.int32),
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
    """Check the coefficient map and pair number of each feature, and its map of channels if any."""
    check_attention_map(features, p, "max" if channels else "sum", skip_tokens)
    count = len(features)
    require(
        len(coefficients) == len(pairs) == count and len(channels) in (0, count),
        "coefficients, pairs and channels must have one entry per feature; channels may be empty",
    )
    maximums: Sequence[Tensor | None] = channels or [None] * count
    for each in zip(without_skipped(features, skip_tokens), coefficients, maximums, strict=True):
        _check_map(*each)
    _check_loss_gradient(loss_gradient, pairs, features)


def check_tap(gradient: Tensor, feature: Tensor, map_gradient: Tensor, *rest: Any) -> None:
    """Check a gradient, its feature, and the gradient of the feature's map."""
    p, collapse, channels = rest
    check_attention_map([feature], p, collapse, [])
    require(
        (gradient.shape, gradient.dtype, gradient.device)
        == (feature.shape, feature.dtype, feature.device),
        "a gradient must have the shape, dtype and device of its feature",
    )
    require(
        (collapse == "max") == (channels is not None),
        "channels must be passed with collapse 'max', and only then",
    )
    _check_map(feature, map_gradient, channels)


def check_no_overlap(gradient: Tensor) -> None:
    """Check that no two elements of a tensor that is written in place share memory."""
    extent = 1
    for step, size in sorted(zip(gradient.stride(), gradient.shape, strict=True)):
        require(
            size < 2 or step >= extent,
            "a gradient that is written in place must not be expanded, nor overlap itself",
        )
        extent += (size - 1) * step


# ---- losses --------------------------------------------------------------------------------------


def _check_pairs(
    student: Sequence[Tensor], teacher: Sequence[Tensor], weights: Sequence[float], *options: Any
) -> None:
    form, reduction, eps_mode, eps = options
    n = len(student)
    require(
        n > 0 and len(teacher) == n,
        "student and teacher must have the same number of tensors, at least one, got "
        f"{n} and {len(teacher)}",
    )
    require(
        len(weights) in (0, n), f"weights must have one number per pair, got {len(weights)} for {n}"
    )
    for name, value in (("form", form), ("reduction", reduction), ("eps_mode", eps_mode)):
        _check_choice(name, value)
    require(0 < eps < math.inf, f"eps must be a finite number > 0, got {eps}")
    one_batch = all(x.shape[:1] == student[0].shape[:1] for x in student)
    require(
        reduction != "sample" or one_batch,
        "reduction 'sample' needs the same batch size in all pairs",
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
    """Check the pairs of a loss, their masks and the options."""
    _check_pairs(student, teacher, weights, *options[2:])
    features, count = [*student, *teacher], len(student)
    check_attention_map(features, options.p, options.collapse, skip_tokens)
    require(options.collapse != "max", "collapse must be 'mean' or 'sum' for a loss, got 'max'")
    require(
        len(masks) in (0, count), f"masks must have one mask per pair, got {len(masks)} for {count}"
    )
    mapped = without_skipped(features, skip_tokens)
    for i, (s, t) in enumerate(zip(mapped[:count], mapped[count:], strict=True)):
        shape = _shape_of_map(s)
        require(
            shape == _shape_of_map(t),
            "student and teacher of a pair must have the same B and positions",
        )
        expected = shape, s.device, accumulate_dtype(s, t)
        require(
            not masks or (masks[i].shape, masks[i].device, masks[i].dtype) == expected,
            "a mask must be (B, N) on the features' device, float64 if a feature of the pair is "
            "and float32 otherwise",
        )
    _check_loss_gradient(loss_gradient, range(count), student)


def check_map_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], weights: Sequence[float], *options: Any
) -> None:
    """Check the pairs of a loss of maps and the options."""
    _check_pairs(student, teacher, weights, *options)
    for i, q in enumerate([*student, *teacher]):
        require(
            q.dim() == 2
            and q.numel() > 0
            and q.device == student[0].device
            and q.dtype in _WIDE
            and q.shape == student[i % len(student)].shape,
            "maps must be (B, N), not empty, float32 or float64, on one device, and of the same "
            "shape in a pair",
        )
