"""Checks of public arguments: an error names the argument, its value and the allowed values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from at_fused._numbers import as_python, check_finite, check_number, type_name
from at_fused._options import MapSizes, Sides
from at_fused._warnings import warn

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
CHOICES: dict[str, tuple[str | None, ...]] = {
    "collapse": ("mean", "sum", "max"),
    "form": ("code", "paper"),
    "reduction": ("sum", "none", "sample"),
    "resize": (None, "maps", "features"),
    "attend": ("spatial", "channel", "both"),
    "eps_mode": ("max", "add"),
}


class PairOptions(TypedDict, total=False):
    """Keyword arguments of ``at_loss`` about the comparison of a pair."""

    p: float
    collapse: str
    form: str
    weights: Sequence[float] | None
    resize: str | None
    attend: str
    absolute: bool
    eps: float
    eps_mode: str


class ATOptions(PairOptions, total=False):
    """Keyword arguments of ``at_loss`` that do not belong to a batch."""

    reduction: str
    channel_dim: Sides
    skip_tokens: Sides
    map_size: MapSizes


# ---- options -------------------------------------------------------------------------------------


def join_choices(allowed: Sequence[str | None]) -> str:
    """Return the allowed values as text: 'a', 'b' or 'c'."""
    *first, last = map(repr, allowed)
    return f"{', '.join(first)} or {last}"


def check_choice(name: str, value: object, allowed: Sequence[str | None]) -> None:
    """Raise a ValueError if the value is not one of the allowed ones."""
    # The type comes first: ``in`` would compare an array element by element.
    if not isinstance(value, (str, type(None))) or value not in allowed:
        raise ValueError(f"{name} must be {join_choices(allowed)}, got {value!r}")


def check_options(
    options: Mapping[str, Any], choices: Mapping[str, tuple[str | None, ...]] = CHOICES
) -> None:
    """Check a subset of the options of ``at_loss``, each alone and in combination."""
    for name, allowed in choices.items():
        if name in options:
            check_choice(name, options[name], allowed)
    p, eps = check_number("p", options.get("p", 2.0)), check_number("eps", options.get("eps", 1.0))
    if not 1 <= p < math.inf:
        raise ValueError(f"p must be a finite number >= 1, got {p!r}")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be a finite number > 0, got {eps!r}")
    absolute, attend = options.get("absolute", True), options.get("attend", "spatial")
    if not isinstance(absolute, bool):
        raise TypeError(f"absolute must be True or False, got {type_name(absolute)}")
    if not absolute:
        if p != int(p):
            raise ValueError(f"p must be an integer with absolute=False, got {p!r}")
        if options.get("collapse") == "max":
            raise ValueError("collapse='max' needs absolute=True, got absolute=False")
    check_spatial_options(attend, resize=options.get("resize"), map_size=options.get("map_size"))
    if options.get("mask") is not None and attend != "spatial":
        raise ValueError(f"mask is for attend='spatial', got attend={attend!r}")


def check_spatial_options(attend: str | None, **options: object) -> None:
    """Raise a ValueError if channel attention gets an option for spatial maps."""
    for name, value in options.items():
        if value is not None and attend == "channel":
            raise ValueError(f"{name} is for spatial attention, got attend='channel'")


def pair_weights(weights: Sequence[float] | None, count: int | None) -> list[float]:
    """Return a number per pair, or [] if all are 1; ``count`` is None if it is not known yet."""
    if weights is None:
        return []
    original_type, weights = type_name(weights), as_python("weights", weights)
    if not isinstance(weights, (list, tuple)):
        raise TypeError(f"weights must be a list or tuple of numbers, got {original_type}")
    if count is not None and len(weights) != count:
        raise ValueError(
            f"weights must have one number per pair, got {len(weights)} for {count} pairs"
        )
    return [float(check_finite(f"weights[{i}]", weight)) for i, weight in enumerate(weights)]


# ---- tensors -------------------------------------------------------------------------------------


def check_dense(name: str, x: object) -> Tensor:
    """Return x if it is a dense tensor; raise a TypeError otherwise."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type_name(x)}")
    if x.layout is not torch.strided or x.is_nested:
        layout = "a nested tensor" if x.is_nested else f"layout {x.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {layout}")
    return x


def check_tensor(name: str, x: object) -> Tensor:
    """Return x if it is a dense, non-empty floating-point tensor; raise an error otherwise."""
    x = check_dense(name, x)
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {x.dtype}")
    if 0 in x.shape:
        raise ValueError(f"{name} must not be empty, got shape {tuple(x.shape)}")
    return x


def check_feature(name: str, x: object) -> Tensor:
    """Return x if it has the dtype and the rank of a feature; raise an error otherwise."""
    x = check_tensor(name, x)
    if not 3 <= x.dim() <= 5:
        raise ValueError(
            f"{name} must be (B, C, H, W), or have one to three spatial dimensions, "
            f"got shape {tuple(x.shape)}"
        )
    return x


def check_map(name: str, q: object) -> Tensor:
    """Return a map (B, *spatial) as a feature of one channel; raise an error if it is not one."""
    q = check_tensor(name, q)
    if q.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, as attention maps are, got {q.dtype}")
    if not 2 <= q.dim() <= 4:
        raise ValueError(
            f"{name} must be a map (B, H, W), or have one to three spatial dimensions, "
            f"got shape {tuple(q.shape)}"
        )
    return q.unsqueeze(1)


def savable(x: Tensor) -> Tensor:
    """Return x, or a copy if x is an inference tensor, which autograd refuses to save."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not x.is_inference():
        return x
    return x.clone()


def check_labels(labels: object, logits: Tensor, probabilities: bool = False) -> None:
    """Raise an error unless labels hold a class number for each row of (B, K, *spatial) logits.

    With ``probabilities`` they may hold a probability for each class and row instead.
    """
    labels = check_dense("labels", labels)
    if not (probabilities and labels.dtype in DTYPES and labels.shape == logits.shape):
        if labels.dtype != torch.int64:
            soft = f", or class probabilities of the logits' shape, {tuple(logits.shape)}"
            raise TypeError(
                f"labels must be int64 (class numbers){soft if probabilities else ''}, "
                f"got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        rows = logits.shape[:1] + logits.shape[2:]
        if labels.shape != rows:
            raise ValueError(
                f"labels must be {'(B,)' if logits.dim() == 2 else '(B, *spatial)'}, "
                f"here {tuple(rows)}, got shape {tuple(labels.shape)}"
            )
    if labels.device != logits.device:
        raise ValueError(
            f"labels must be on the logits' device, {logits.device}, got {labels.device}"
        )


# ---- pairs ---------------------------------------------------------------------------------------


def named_tensors(name: str, value: object) -> dict[str, Any]:
    """Return the items of an argument, a tensor or a sequence, by their names in messages."""
    if isinstance(value, Tensor):
        return {name: value}
    if not isinstance(value, (list, tuple)):
        got = type_name(value)
        raise TypeError(f"{name} must be a tensor or a list or tuple of tensors, got {got}")
    if not value:
        raise ValueError(f"{name} must not be an empty {type_name(value)}")
    return {f"{name}[{i}]": x for i, x in enumerate(value)}


def as_pairs(
    first: object,
    second: object,
    check: Callable[[str, object], Tensor] = check_feature,
    names: tuple[str, str] = ("student", "teacher"),
) -> tuple[list[Tensor], list[Tensor]]:
    """Return two tensors, or two sequences of tensors, as two checked lists of equal length.

    ``check`` checks a single tensor. Both tensors of a pair must have the same batch size, and all
    tensors must be on the same device.
    """
    first_name, second_name = names
    if isinstance(first, Tensor) != isinstance(second, Tensor):
        raise TypeError(
            f"{first_name} and {second_name} must both be tensors or both be sequences of tensors, "
            f"got {type_name(first)} and {type_name(second)}"
        )
    firsts, seconds = (
        [check(name, x) for name, x in named_tensors(argument, value).items()]
        for argument, value in zip(names, (first, second), strict=True)
    )
    if len(firsts) != len(seconds):
        raise ValueError(
            f"{first_name} and {second_name} must have the same number of tensors, "
            f"got {len(firsts)} and {len(seconds)}"
        )
    device = firsts[0].device
    for i, (a, b) in enumerate(zip(firsts, seconds, strict=True)):
        for name, x in ((first_name, a), (second_name, b)):
            if x.device != device:
                raise ValueError(
                    f"{name} of pair {i} is on {x.device}, the first {first_name} on {device}: "
                    "all tensors must be on one device"
                )
        if a.shape[0] != b.shape[0]:
            raise ValueError(
                f"{first_name} and {second_name} of pair {i} must have the same batch size, "
                f"got {a.shape[0]} and {b.shape[0]}"
            )
    return firsts, seconds


def check_one_batch(students: list[Tensor], rule: str) -> None:
    """Raise a ValueError if pairs have different batch sizes; ``rule`` begins the message."""
    first = students[0].shape[0]
    for i, x in enumerate(students):
        if x.shape[0] != first:
            raise ValueError(f"{rule}, got {first} for pair 0 and {x.shape[0]} for pair {i}")


def as_equal_pairs(
    names: tuple[str, str], first: object, second: object, rank: int = 2
) -> tuple[list[Tensor], list[Tensor]]:
    """Return two checked lists as ``as_pairs`` does: equal shapes in a pair, one batch size."""

    def check(name: str, value: object) -> Tensor:
        x = check_tensor(name, value)
        if x.dim() < rank:
            raise ValueError(f"{name} must have a batch dimension, got shape {tuple(x.shape)}")
        return x

    firsts, seconds = as_pairs(first, second, check, names)
    for i, (a, b) in enumerate(zip(firsts, seconds, strict=True)):
        if a.shape != b.shape:
            raise ValueError(
                f"{names[0]} and {names[1]} of pair {i} must have the same shape, "
                f"got {tuple(a.shape)} and {tuple(b.shape)}"
            )
    check_one_batch(firsts, "all pairs must have the same batch size")
    return firsts, seconds


def format_size(x: Tensor) -> str:
    """Return the spatial size as text: 4x4."""
    return "x".join(str(int(n)) for n in x.shape[2:])


def check_sizes(students: list[Tensor], teachers: list[Tensor], resize: str | None) -> bool:
    """Return True if the maps of each pair have one size; raise if ``resize`` cannot help."""
    same = True
    for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
        positions = s.shape[2:]
        if positions != t.shape[2:]:
            same = False
            if resize is None or s.dim() != t.dim():
                advice = ", or in Python pass resize='maps' (at_loss also takes 'features')"
                if s.dim() == t.dim() == 3:
                    advice += "; at_loss needs channel_dim=-1 for tokens (B, N, C)"
                elif s.dim() != t.dim():
                    advice = " and rank (for tokens, at_loss has channel_dim=-1 and map_size)"
                sizes = f"{format_size(s)} and {format_size(t)}"
                raise ValueError(
                    f"student and teacher of pair {i} must have the same map size (H x W), got "
                    f"{sizes}; choose layers with the same map size{advice}"
                )
        if positions.numel() == 1:
            _warn_single_position(i)
    return same


def check_channels(students: list[Tensor], teachers: list[Tensor]) -> None:
    """Raise a ValueError if the features of a pair have different numbers of channels."""
    for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
        if s.shape[1] != t.shape[1]:
            raise ValueError(
                f"student and teacher of pair {i} must have the same number of channels for "
                f"channel attention, got {s.shape[1]} and {t.shape[1]}; choose layers with the "
                "same number of channels, or attend='spatial'"
            )


single_position_warned = False


def _warn_single_position(i: int) -> None:
    global single_position_warned
    if not single_position_warned and not torch.compiler.is_compiling():
        single_position_warned = True
        warn(
            f"pair {i} has maps of a single position: after normalisation they are all 1, so the "
            "loss of this pair is always 0"
        )


# ---- factors -------------------------------------------------------------------------------------


def gradient_scale(
    scale: float | Tensor, device: torch.device, dtype: torch.dtype
) -> tuple[float, Tensor | None]:
    """Check a scale; return (scale, None) for a number, and (1.0, scale) for a tensor."""
    if not isinstance(scale, Tensor):
        scale = check_finite("scale", scale)
        if not -torch.finfo(dtype).max <= scale <= torch.finfo(dtype).max:
            raise ValueError(f"scale must be finite in the gradient's {dtype}, got {scale!r}")
        return float(scale), None
    check_dense("scale", scale)
    if scale.numel() != 1 or scale.dtype not in DTYPES:
        raise ValueError(
            "scale must be a number or a floating-point tensor of one element, got "
            f"{scale.dtype} of shape {tuple(scale.shape)}"
        )
    if scale.device != device:
        raise ValueError(f"scale must be on the features' device, {device}, got {scale.device}")
    return 1.0, scale.detach().reshape(()).to(dtype)


def _check_factor(name: str, factor: object, x: Tensor) -> Tensor:
    factor = check_dense(name, factor)
    if factor.dtype not in (*DTYPES, torch.bool):
        raise TypeError(
            f"{name} must be float32, float16, bfloat16, float64 or bool, got {factor.dtype}"
        )
    if factor.device != x.device:
        raise ValueError(f"{name} must be on the features' device, {x.device}, got {factor.device}")
    return savable(factor)


def check_sample_weights(factor: object, students: list[Tensor]) -> Tensor | None:
    """Return the checked weights (B,), or None; every pair must have this batch size."""
    if factor is None:
        return None
    factor = _check_factor("sample_weights", factor, students[0])
    for i, x in enumerate(students):
        if factor.shape != (x.shape[0],):
            raise ValueError(
                f"sample_weights must be ({x.shape[0]},), one number per sample of pair {i}, "
                f"got shape {tuple(factor.shape)}"
            )
    return factor


def check_masks(mask: object, students: list[Tensor], skip_tokens: int = 0) -> list[Tensor] | None:
    """Return a checked mask (B, *spatial) per pair, or None; it may differ from the map in size."""
    if mask is None:
        return None
    if isinstance(mask, Tensor):
        masks = [mask] * len(students)
    elif not isinstance(mask, (list, tuple)):
        got = type_name(mask)
        raise TypeError(f"mask must be a tensor or a list or tuple of tensors, got {got}")
    elif len(mask) != len(students):
        raise ValueError(
            f"mask must be one tensor or one per pair, got {len(mask)} for {len(students)} pairs"
        )
    else:
        masks = list(mask)
    for i, (m, x) in enumerate(zip(masks, students, strict=True)):
        m = masks[i] = _check_factor("mask", m, x)
        if m.dim() != x.dim() - 1 or m.shape[0] != x.shape[0] or 0 in m.shape:
            raise ValueError(
                f"mask must be (B, H, W) for pair {i} of (B, C, H, W) = {tuple(x.shape)}, "
                f"got shape {tuple(m.shape)}"
            )
        if skip_tokens and x.dim() == 3 and m.shape[1] == x.shape[2] + skip_tokens:
            raise ValueError(
                f"mask must cover the {x.shape[2]} tokens left by skip_tokens={skip_tokens}, "
                f"got {m.shape[1]} tokens; pass mask[:, {skip_tokens}:]"
            )
    return masks
