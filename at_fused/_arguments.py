"""Arguments of the public functions: one error that names what is wrong, or what was given."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from at_fused._numbers import as_python, check_finite, check_number, kind
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
    """The keyword arguments of ``at_loss`` that say what is compared, and how."""

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
    """The keyword arguments of ``at_loss`` that do not belong to a batch."""

    reduction: str
    channel_dim: Sides
    skip_tokens: Sides
    map_size: MapSizes


# ---- options -------------------------------------------------------------------------------------


def one_of(allowed: Sequence[str | None]) -> str:
    """Return a choice in words."""
    *most, last = map(repr, allowed)
    return f"{', '.join(most)} or {last}"


def check_choice(name: str, value: object, allowed: Sequence[str | None]) -> None:
    """Raise the ValueError that names the option, what was given, and what is allowed."""
    # An array would be compared element by element.
    if not isinstance(value, (str, type(None))) or value not in allowed:
        raise ValueError(f"{name} must be {one_of(allowed)}, got {value!r}")


def check_options(
    given: Mapping[str, Any], choices: Mapping[str, tuple[str | None, ...]] = CHOICES
) -> None:
    """Check those options of ``at_loss`` that are given, one by one and against each other."""
    for name, allowed in choices.items():
        if name in given:
            check_choice(name, given[name], allowed)
    p, eps = check_number("p", given.get("p", 2.0)), check_number("eps", given.get("eps", 1.0))
    if not 1 <= p < math.inf:
        raise ValueError(f"p must be a finite number >= 1, got {p!r}")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be a finite number > 0, got {eps!r}")
    absolute, attend = given.get("absolute", True), given.get("attend", "spatial")
    if not isinstance(absolute, bool):
        raise TypeError(f"absolute must be True or False, got {kind(absolute)}")
    if not absolute:
        if p != int(p):
            raise ValueError(f"p must be a whole number with absolute=False, got {p!r}")
        if given.get("collapse") == "max":
            raise ValueError("collapse='max' takes absolute values, got absolute=False")
    check_spatial(attend, resize=given.get("resize"), map_size=given.get("map_size"))
    if given.get("mask") is not None and attend != "spatial":
        raise ValueError(f"mask is for attend='spatial', got attend={attend!r}")


def check_spatial(attend: str | None, **options: object) -> None:
    """Raise where an option of the map's size is given for channel attention alone."""
    for name, value in options.items():
        if value is not None and attend == "channel":
            raise ValueError(f"{name} is for spatial attention, got attend='channel'")


def pair_weights(weights: Sequence[float] | None, count: int | None) -> list[float]:
    """Return one number for each pair, none at all for ones; a count of None is not known yet."""
    if weights is None:
        return []
    given, weights = weights, as_python("weights", weights)
    if not isinstance(weights, (list, tuple)):
        raise TypeError(f"weights must be a list or tuple of numbers, got {kind(given)}")
    if count is not None and len(weights) != count:
        raise ValueError(
            f"weights must have one number per pair, got {len(weights)} for {count} pairs"
        )
    return [float(check_finite(f"weights[{i}]", weight)) for i, weight in enumerate(weights)]


# ---- tensors -------------------------------------------------------------------------------------


def check_dense(name: str, x: object) -> Tensor:
    """Refuse anything but a dense tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {kind(x)}")
    if x.layout is not torch.strided or x.is_nested:
        found = "a nested one" if x.is_nested else f"layout {x.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {found}")
    return x


def check_tensor(name: str, x: object) -> Tensor:
    """Refuse anything but a dense floating-point tensor with elements."""
    x = check_dense(name, x)
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {x.dtype}")
    if 0 in x.shape:
        raise ValueError(f"{name} must not be empty, got shape {tuple(x.shape)}")
    return x


def check_feature(name: str, x: object) -> Tensor:
    """Refuse anything but a feature: such a tensor with one to three spatial dimensions."""
    x = check_tensor(name, x)
    if not 3 <= x.dim() <= 5:
        raise ValueError(
            f"{name} must be (B, C, H, W), or have one to three spatial dimensions, "
            f"got shape {tuple(x.shape)}"
        )
    return x


def check_map(name: str, q: object) -> Tensor:
    """Refuse anything but a map (B, *spatial); return it as a feature of one channel."""
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
    """Return a copy of a tensor made under ``inference_mode``, which autograd does not save."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not x.is_inference():
        return x
    return x.clone()


def check_labels(labels: object, logits: Tensor, probabilities: bool = False) -> None:
    """Refuse anything but a class number for each row of (B, K, *spatial) logits.

    With ``probabilities`` one for each class and row will do as well.
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


def named(name: str, given: object) -> dict[str, Any]:
    """Return what an argument holds, a tensor or a sequence of some, by its names in messages."""
    if not isinstance(given, (Tensor, list, tuple)):
        raise TypeError(f"{name} must be a tensor or a list or tuple of tensors, got {kind(given)}")
    if not isinstance(given, Tensor) and not given:
        raise ValueError(f"{name} must not be an empty {kind(given)}")
    if isinstance(given, Tensor):
        return {name: given}
    return {f"{name}[{i}]": x for i, x in enumerate(given)}


def paired(
    first: object,
    second: object,
    check: Callable[[str, object], Tensor] = check_feature,
    names: tuple[str, str] = ("student", "teacher"),
) -> tuple[list[Tensor], list[Tensor]]:
    """Return two tensors, or two sequences, as lists of pairs of one batch size, on one device.

    ``check`` refuses what a single one must not be, or returns it.
    """
    one, other = names
    if isinstance(first, Tensor) != isinstance(second, Tensor):
        raise TypeError(
            f"{one} and {other} must both be tensors or both be sequences of tensors, "
            f"got {kind(first)} and {kind(second)}"
        )
    ours, theirs = (
        [check(own, x) for own, x in named(name, given).items()]
        for name, given in zip(names, (first, second), strict=True)
    )
    if len(ours) != len(theirs):
        raise ValueError(
            f"{one} and {other} must have the same number of tensors, "
            f"got {len(ours)} and {len(theirs)}"
        )
    device = ours[0].device
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        for name, x in ((one, a), (other, b)):
            if x.device != device:
                raise ValueError(
                    f"{name} of pair {i} is on {x.device}, the first {one} on {device}: "
                    "all tensors must be on one device"
                )
        if a.shape[0] != b.shape[0]:
            raise ValueError(
                f"{one} and {other} of pair {i} must have the same batch size, "
                f"got {a.shape[0]} and {b.shape[0]}"
            )
    return ours, theirs


def check_one_batch(students: list[Tensor], rule: str) -> None:
    """Raise where pairs have different batch sizes; ``rule`` begins the message."""
    for i, x in enumerate(students):
        if x.shape[0] != students[0].shape[0]:
            raise ValueError(f"{rule}, got {students[0].shape[0]} and, in pair {i}, {x.shape[0]}")


def check_pairs(
    names: tuple[str, str], first: object, second: object, rank: int = 2
) -> tuple[list[Tensor], list[Tensor]]:
    """Return two tensors, or two sequences of them, as lists of equal shapes and one batch size."""

    def check(own: str, given: object) -> Tensor:
        x = check_tensor(own, given)
        if x.dim() < rank:
            raise ValueError(f"{own} must have a batch dimension, got shape {tuple(x.shape)}")
        return x

    ours, theirs = paired(first, second, check, names)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a.shape != b.shape:
            raise ValueError(
                f"{names[0]} and {names[1]} of pair {i} must have the same shape, "
                f"got {tuple(a.shape)} and {tuple(b.shape)}"
            )
    check_one_batch(ours, "all pairs must have the same batch size")
    return ours, theirs


def size_of(x: Tensor) -> str:
    """Return the spatial size, for messages."""
    return "x".join(str(int(n)) for n in x.shape[2:])


def check_sizes(students: list[Tensor], teachers: list[Tensor], resize: str | None) -> bool:
    """Return True if the maps of all pairs agree in size; raise where they may not differ."""
    same = True
    for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
        positions = s.shape[2:]
        if positions != t.shape[2:]:
            same = False
            if resize is None or s.dim() != t.dim():
                advice = "; resize='maps' or, of at_loss, resize='features' makes them one"
                if s.dim() != t.dim():
                    advice = " and rank (at_loss takes channel_dim=-1 and map_size for tokens)"
                raise ValueError(
                    f"student and teacher of pair {i} must have the same map size (H x W), got "
                    f"{size_of(s)} and {size_of(t)}; choose layers of one map size{advice}"
                )
        if positions.numel() == 1:
            _warn_single_position(i)
    return same


def check_channels(students: list[Tensor], teachers: list[Tensor]) -> None:
    """Raise where channel attention finds other channels on the other side."""
    for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
        if s.shape[1] != t.shape[1]:
            raise ValueError(
                f"student and teacher of pair {i} must have the same number of channels for "
                f"channel attention, got {s.shape[1]} and {t.shape[1]}; choose layers of equal "
                "channels, or spatial attention, for which they may differ"
            )


single_position_warned = False


def _warn_single_position(i: int) -> None:
    global single_position_warned
    if not single_position_warned and not torch.compiler.is_compiling():
        single_position_warned = True
        warn(
            f"pair {i} has maps of a single position: normalised they are all 1, and the loss of "
            "this pair is 0 whatever the features"
        )


# ---- factors -------------------------------------------------------------------------------------


def gradient_scale(
    scale: float | Tensor, device: torch.device, dtype: torch.dtype
) -> tuple[float, Tensor | None]:
    """Return a scale as a number, and as what the device has to read."""
    if not isinstance(scale, Tensor):
        scale = check_finite("scale", scale)
        if not -torch.finfo(dtype).max <= scale <= torch.finfo(dtype).max:
            raise ValueError(f"scale must be finite in {dtype}, the gradient's, got {scale!r}")
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
    """Return None, or a tensor (B,) with the B of every pair."""
    if factor is None:
        return None
    factor = _check_factor("sample_weights", factor, students[0])
    for i, x in enumerate(students):
        if factor.shape != (x.shape[0],):
            raise ValueError(
                f"sample_weights must be ({x.shape[0]},), one for each sample of pair {i}, "
                f"got shape {tuple(factor.shape)}"
            )
    return factor


def check_masks(mask: object, students: list[Tensor], skip_tokens: int = 0) -> list[Tensor] | None:
    """Return None, or a mask (B, *spatial), of any size, for each pair."""
    if mask is None:
        return None
    if isinstance(mask, Tensor):
        masks = [mask] * len(students)
    elif not isinstance(mask, (list, tuple)):
        raise TypeError(f"mask must be a tensor or a list or tuple of tensors, got {kind(mask)}")
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
                f"mask must be of the {x.shape[2]} tokens that skip_tokens={skip_tokens} leaves, "
                f"got {m.shape[1]}; give mask[:, {skip_tokens}:]"
            )
    return masks
