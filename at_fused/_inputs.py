"""What the public functions are given: checked, and brought to (B, C, *spatial)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from at_fused._checks import (
    DTYPES,
    check_choice,
    check_dense,
    check_tensor,
    named,
    pair_weights,
    savable,
)
from at_fused._numbers import as_python, check_finite, check_number, is_whole, kind
from at_fused._warnings import AtFusedWarning

Choices = Mapping[str, tuple[str | None, ...]]
_CHOICES: Choices = {
    "collapse": ("mean", "sum", "max"),
    "form": ("code", "paper"),
    "reduction": ("sum", "none", "sample"),
    "resize": (None, "maps", "features"),
    "attend": ("spatial", "channel", "both"),
    "eps_mode": ("max", "add"),
}

MapSize = Sequence[int]
Sides = int | tuple[int, int]
MapSizes = MapSize | tuple[MapSize | None, MapSize | None] | None


# ---- options -------------------------------------------------------------------------------------


def check_options(
    *,
    p: float = 2.0,
    eps: float = 1e-12,
    absolute: bool = True,
    fewer: Choices = _CHOICES,
    **choices: str | None,
) -> None:
    """Raises the ValueError or TypeError that names the option, what was given, what is allowed.

    ``fewer``: of these options not all choices are allowed here.
    """
    for name, value in choices.items():
        check_choice(name, value, fewer.get(name, _CHOICES[name]))
    p, eps = check_number("p", p), check_number("eps", eps)
    if not 1 <= p < math.inf:
        raise ValueError(f"p must be a finite number >= 1, got {p!r}")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be a finite number > 0, got {eps!r}")
    if not isinstance(absolute, bool):
        raise TypeError(f"absolute must be True or False, got {kind(absolute)}")
    if not absolute:
        if p != int(p):
            raise ValueError(f"p must be a whole number with absolute=False, got {p!r}")
        if choices.get("collapse") == "max":
            raise ValueError("collapse='max' takes absolute values, got absolute=False")
    check_spatial(choices.get("attend"), resize=choices.get("resize"))


def check_spatial(attend: str | None, **options: object) -> None:
    """Raises where an option of the map's size is given for channel attention alone."""
    for name, value in options.items():
        if value is not None and attend == "channel":
            raise ValueError(f"{name} is for spatial attention, got attend='channel'")


def check_kept(
    owner: str,
    options: Mapping[str, Any],
    allowed: Collection[str],
    fewer: Choices = _CHOICES,
) -> dict[str, Any]:
    """Return options kept for later calls, checked as far as that goes without features."""
    options = {name: as_python(name, value) for name, value in options.items()}
    for name in options:
        if name not in allowed:
            raise TypeError(f"{owner} takes no option {name!r}")
    known = ("p", "eps", "absolute", *_CHOICES)
    check_options(fewer=fewer, **{name: options[name] for name in known if name in options})
    sides(options.get("channel_dim", 1), options.get("skip_tokens", 0), options.get("map_size"))
    check_spatial(options.get("attend"), map_size=options.get("map_size"))
    pair_weights(options.get("weights"), None)
    return options


# ---- features ------------------------------------------------------------------------------------


def is_feature(x: object) -> bool:
    """Whether this is a tensor that the operators take."""
    return (
        isinstance(x, Tensor)
        and x.dtype in DTYPES
        and x.layout is torch.strided
        and not x.is_nested
        and 3 <= x.dim() <= 5
        and 0 not in x.shape
    )


def refuse_feature(name: str, x: object) -> None:
    """Raises what is wrong with something that ``is_feature`` refused."""
    x = check_tensor(name, x)
    if not 3 <= x.dim() <= 5:
        raise ValueError(
            f"{name} must be (B, C, H, W), or have one to three spatial dimensions, "
            f"got shape {tuple(x.shape)}"
        )


class Side(NamedTuple):
    """Where the channels of a side's features are, and which of its tokens make what map."""

    channel_dim: int = 1
    skip_tokens: int = 0
    map_size: MapSize | None = None


_PLAIN = Side()


def place(name: str, x: Tensor, side: Side) -> Tensor:
    """The feature as (B, C, *spatial)."""
    if side is _PLAIN or side.channel_dim == 1:
        return x
    if x.dim() != 3:
        return x.movedim(-1, 1)
    if side.skip_tokens >= x.shape[1]:
        raise ValueError(
            f"skip_tokens must leave a token of {name}, which has {x.shape[1]}, "
            f"got {side.skip_tokens}"
        )
    tokens = x[:, side.skip_tokens :] if side.skip_tokens else x
    if side.map_size is None:
        return tokens.transpose(1, 2)
    if math.prod(side.map_size) != tokens.shape[1]:
        raise ValueError(
            f"map_size must have as many positions as {name} has tokens behind skip_tokens, "
            f"{tokens.shape[1]}, got {tuple(side.map_size)}"
        )
    return tokens.transpose(1, 2).unflatten(2, tuple(side.map_size))


def given_back(gradient: Tensor, x: Tensor, side: Side) -> Tensor:
    """Return the gradient of a placed feature, perhaps with all its tokens, as that of ``x``."""
    if side.channel_dim == 1:
        return gradient
    if x.dim() != 3:
        return gradient.movedim(1, -1)
    tokens = gradient.flatten(2).transpose(1, 2)
    missing = x.shape[1] - tokens.shape[1]
    return F.pad(tokens, (0, 0, missing, 0)) if missing else tokens


def _features(name: str, given: Tensor | Sequence[Tensor], side: Side) -> list[Tensor]:
    several = named(name, given)
    for own, x in several.items():
        if not is_feature(x):
            refuse_feature(own, x)
    return [place(own, x, side) for own, x in several.items()]


def whole_tokens(
    *given: tuple[Tensor | Sequence[Tensor], list[Tensor], Side],
) -> tuple[list[Tensor], list[int]]:
    """Return all features with all their tokens, (B, C, N), and how many are to be skipped.

    From each side's arguments, its features as placed, and where they lie.
    """
    whole, skips = [], []
    for argument, placed, side in given:
        features = [argument] if isinstance(argument, Tensor) else argument
        for x, y in zip(features, placed, strict=True):
            tokens = x.dim() == 3 and side.channel_dim != 1
            whole.append(x.transpose(1, 2) if tokens else y)
            skips.append(side.skip_tokens if tokens else 0)
    return whole, skips


def both(name: str, value: Any) -> tuple[Any, Any]:
    """A value for both sides, or one for each."""
    if not isinstance(value, (tuple, list)):
        return value, value
    if len(value) != 2:
        raise ValueError(f"{name} must be one value or (student's, teacher's), got {value!r:.80}")
    return value[0], value[1]


def _check_side(channel_dim: object, skip_tokens: object, map_size: Any) -> Side:
    for name, value in (("channel_dim", channel_dim), ("skip_tokens", skip_tokens)):
        if not is_whole(value):
            raise TypeError(f"{name} must be a whole number, got {kind(value)}")
    assert isinstance(channel_dim, int)
    assert isinstance(skip_tokens, int)
    if channel_dim not in (1, -1):
        raise ValueError(f"channel_dim must be 1 or -1, got {channel_dim}")
    if skip_tokens < 0:
        raise ValueError(f"skip_tokens must be >= 0, got {skip_tokens}")
    if map_size is not None:
        several = map_size if isinstance(map_size, (tuple, list)) else ()
        wrong = [n for n in several if not (is_whole(n) and n > 0)]
        if wrong or not 1 <= len(several) <= 3:
            found = f", in which {wrong[0]!r} is none" if wrong else ""
            raise ValueError(
                f"map_size must be one to three whole numbers > 0, got {map_size!r}{found}"
            )
    return Side(channel_dim, skip_tokens, map_size)


def plain(channel_dim: object, skip_tokens: object) -> bool:
    """Return True for the defaults of both sides; True and 1.0 are 1 as well, but no ints."""
    return type(channel_dim) is type(skip_tokens) is int and channel_dim == 1 and skip_tokens == 0


def plain_sides(channel_dim: Any, skip_tokens: Any, map_size: Any) -> tuple[Any, Any, Any]:
    """Return the three as Python's own numbers and lists."""
    return (
        as_python("channel_dim", channel_dim),
        as_python("skip_tokens", skip_tokens),
        as_python("map_size", map_size),
    )


def sides(channel_dim: Any, skip_tokens: Any, map_size: Any) -> tuple[Side, Side]:
    """The student's and the teacher's, from one value for both or a pair of them."""
    if map_size is None and plain(channel_dim, skip_tokens):
        return _PLAIN, _PLAIN
    channel_dim, skip_tokens, map_size = plain_sides(channel_dim, skip_tokens, map_size)
    dims, skips = both("channel_dim", channel_dim), both("skip_tokens", skip_tokens)
    maps = both_maps(map_size)
    found = [_check_side(*options) for options in zip(dims, skips, maps, strict=True)]
    last = [side.channel_dim != 1 for side in found]
    for name, value, each in (("skip_tokens", skip_tokens, skips), ("map_size", map_size, maps)):
        check_for_tokens(name, value, each, last, f"take channel_dim=-1 (here {channel_dim!r})")
    return found[0] if last[0] else _PLAIN, found[1] if last[1] else _PLAIN


def both_maps(map_size: Any) -> tuple[Any, Any]:
    """A map size for both sides, or one for each, of which either may be None."""
    sized = isinstance(map_size, (tuple, list))
    if sized and any(n is None or isinstance(n, (tuple, list)) for n in map_size):
        return both("map_size", map_size)
    return map_size, map_size


def check_tokens(
    given: Sequence[tuple[str, object, Side]], skip_tokens: Any, map_size: Any
) -> None:
    """Raises where an option of tokens is for a side whose features are no tokens."""
    skips, maps = both("skip_tokens", skip_tokens), both_maps(map_size)
    if not any((*skips, *maps)):
        return
    tokens = [
        side.channel_dim != 1 and any(x.dim() == 3 for x in named(name, x).values())
        for name, x, side in given
    ]
    lacking = dict.fromkeys(g[0] for g, has in zip(given, tokens, strict=True) if not has)
    rule = " and ".join(lacking)
    for name, value, each in (("skip_tokens", skip_tokens, skips), ("map_size", map_size, maps)):
        check_for_tokens(name, value, each, tokens, f"{rule} has not")


def check_for_tokens(
    name: str, value: Any, each: Sequence[Any], tokens: Sequence[bool], rule: str
) -> None:
    """Raises where an option of tokens is for a side without any; one for both may be for one."""
    lost = [bool(own) and not has for own, has in zip(each, tokens, strict=True)]
    if all(lost) or (any(lost) and each[0] is not value):
        raise ValueError(
            f"{name} is for token features (B, N, C), which {rule}, got {name}={value!r}"
        )


def one(
    x: object, channel_dim: int, skip_tokens: int, map_size: MapSize | None
) -> tuple[Tensor, Side]:
    """A feature alone, as (B, C, *spatial), and where its channels were."""
    if not is_feature(x):  # nor a list
        refuse_feature("x", x)
    channel_dim, skip_tokens, map_size = plain_sides(channel_dim, skip_tokens, map_size)
    side, _ = sides(channel_dim, skip_tokens, map_size)
    several = isinstance(channel_dim, (tuple, list)) or isinstance(skip_tokens, (tuple, list))
    if several or both_maps(map_size)[0] is not map_size:
        raise ValueError(
            "channel_dim, skip_tokens and map_size must be one value each for one feature, got "
            f"{channel_dim!r}, {skip_tokens!r} and {map_size!r}"
        )
    check_tokens([("x", x, side)] * 2, skip_tokens, map_size)
    return place("x", cast(Tensor, x), side), side


# ---- pairs ---------------------------------------------------------------------------------------


def size(x: Tensor) -> str:
    """The spatial size, for messages."""
    return "x".join(str(int(n)) for n in x.shape[2:])


def channels_as_positions(x: Tensor) -> Tensor:
    """The view (B, H*W, C) whose spatial attention is the channel attention of (B, C, H, W)."""
    return x.flatten(2).transpose(1, 2)


def _refuse_pair(i: int, student: Tensor, teacher: Tensor, device: torch.device) -> None:
    """Raises what does not match in a pair."""
    for name, x in (("student", student), ("teacher", teacher)):
        if x.device != device:
            raise ValueError(
                f"{name} of pair {i} is on {x.device}, the first student on {device}: "
                "all features must be on one device"
            )
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"student and teacher of pair {i} must have the same batch size, "
            f"got {student.shape[0]} and {teacher.shape[0]}"
        )


def pairs(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    student_side: Side = _PLAIN,
    teacher_side: Side = _PLAIN,
) -> tuple[list[Tensor], list[Tensor]]:
    """Both sides as lists of (B, C, *spatial), pair by pair of one batch size and device."""
    if isinstance(student, Tensor) != isinstance(teacher, Tensor):
        raise TypeError(
            "student and teacher must both be tensors or both be sequences, "
            f"got {kind(student)} and {kind(teacher)}"
        )
    students = _features("student", student, student_side)
    teachers = _features("teacher", teacher, teacher_side)
    if len(students) != len(teachers):
        raise ValueError(
            "student and teacher must have the same number of features, "
            f"got {len(students)} and {len(teachers)}"
        )
    device = students[0].device
    for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
        if not (s.device == t.device == device and s.shape[0] == t.shape[0]):
            _refuse_pair(i, s, t, device)
    return students, teachers


def _maps(name: str, given: object) -> list[Tensor]:
    """Maps (B, *spatial) as features of one channel."""
    return [_map(own, each) for own, each in named(name, given).items()]


def _map(name: str, given: object) -> Tensor:
    q = check_tensor(name, given)
    if q.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, as attention maps are, got {q.dtype}")
    if not 2 <= q.dim() <= 4:
        raise ValueError(
            f"{name} must be a map (B, H, W), or have one to three spatial dimensions, "
            f"got shape {tuple(q.shape)}"
        )
    return q.unsqueeze(1)


def map_pairs(
    student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Both sides' maps as lists of (B, 1, *spatial), pair by pair of one batch size and device."""
    if isinstance(student, Tensor) != isinstance(teacher, Tensor):
        raise TypeError(
            "student and teacher must both be maps or both be sequences of maps, "
            f"got {kind(student)} and {kind(teacher)}"
        )
    return pairs(_maps("student", student), _maps("teacher", teacher))


def check_sizes(
    students: list[Tensor], teachers: list[Tensor], resize: str | None, of_maps: bool = False
) -> bool:
    """Whether the maps of all pairs have one size; raises where they may not differ.

    ``of_maps``: these are maps, whose features are out of reach.
    """
    same = True
    for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
        positions = s.shape[2:]
        if positions != t.shape[2:]:
            same = False
            if resize is None or s.dim() != t.dim():
                raise ValueError(
                    f"student and teacher of pair {i} must have the same map size (H x W), got "
                    f"{size(s)} and {size(t)}; {_to_one_size(s, t, of_maps)}"
                )
        if positions.numel() == 1:
            _warn_single_position(i)
    return same


def _to_one_size(student: Tensor, teacher: Tensor, of_maps: bool) -> str:
    """The advice for a pair of different map sizes, which says whose options it names."""
    if student.dim() == teacher.dim() and of_maps:
        advice = "with map_loss and AttentionTransfer resize='maps' interpolates the teacher's map"
    elif student.dim() == teacher.dim():
        advice = (
            "with at_loss resize='maps' interpolates the teacher's map, and resize='features' "
            "pools the larger features"
        )
    elif 3 in (student.dim(), teacher.dim()) and not of_maps:
        advice = "with at_loss tokens (B, N, C) take channel_dim=-1 and map_size=(H, W)"
    else:
        return "choose layers whose maps have as many dimensions"
    return f"choose layers of one map size; {advice}"


def check_channels(students: list[Tensor], teachers: list[Tensor]) -> None:
    """Raises where channel attention finds other channels on the other side."""
    for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
        if s.shape[1] != t.shape[1]:
            raise ValueError(
                f"student and teacher of pair {i} must have the same number of channels for "
                f"channel attention, got {s.shape[1]} and {t.shape[1]}; choose layers of equal "
                "channels, or spatial attention, for which they may differ"
            )


_single_position_warned = False


def _warn_single_position(i: int) -> None:
    global _single_position_warned
    if not _single_position_warned and not torch.compiler.is_compiling():
        _single_position_warned = True
        warnings.warn(
            f"pair {i} has maps of a single position: normalised they are all 1, and the loss of "
            "this pair is 0 whatever the features",
            AtFusedWarning,
            stacklevel=6,
        )


# ---- factors -------------------------------------------------------------------------------------


def gradient_scale(
    scale: float | Tensor, device: torch.device, dtype: torch.dtype
) -> tuple[float, Tensor | None]:
    """A scale as a number, and as what the device has to read."""
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


def check_one_batch(students: list[Tensor], rule: str) -> None:
    """Raises where pairs have different batch sizes; ``rule`` begins the message."""
    for i, x in enumerate(students):
        if x.shape[0] != students[0].shape[0]:
            raise ValueError(f"{rule}, got {students[0].shape[0]} and, in pair {i}, {x.shape[0]}")


def check_sample_weights(factor: object, students: list[Tensor]) -> Tensor:
    """A tensor (B,), in which B is that of every pair."""
    factor = _check_factor("sample_weights", factor, students[0])
    for i, x in enumerate(students):
        if factor.shape != (x.shape[0],):
            raise ValueError(
                f"sample_weights must be ({x.shape[0]},), one for each sample of pair {i}, "
                f"got shape {tuple(factor.shape)}"
            )
    return factor


def check_masks(
    mask: Tensor | Sequence[Tensor], students: list[Tensor], skip_tokens: int = 0
) -> list[Tensor]:
    """A mask (B, *spatial), of any size, for each pair."""
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
