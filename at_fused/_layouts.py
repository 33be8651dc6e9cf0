"""Layouts of features: where channels are, and which tokens make a map of what size."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from at_fused._arguments import CHOICES, check_feature, check_options, pair_weights
from at_fused._numbers import as_python, is_whole, kind
from at_fused._options import MapSize


class FeatureLayout(NamedTuple):
    """Layout of a side's features: where channels are, and which tokens make a map of what size."""

    channel_dim: int = 1
    skip_tokens: int = 0
    map_size: MapSize | None = None

    def has_tokens(self, x: Tensor) -> bool:
        """Return True for tokens (B, N, C)."""
        return self.channel_dim != 1 and x.dim() == 3

    def size(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the size of the map of a feature of this shape."""
        if self.map_size is not None:
            return tuple(self.map_size)
        size = tuple(shape[2:] if self.channel_dim == 1 else shape[1:-1])
        return (size[0] - self.skip_tokens, *size[1:]) if self.skip_tokens else size

    def all_tokens(self) -> FeatureLayout:
        """Return the layout that skips no token, and leaves them in a row."""
        return FeatureLayout(self.channel_dim)

    def to_channels_first(self, x: Tensor, name: str = "x") -> Tensor:
        """Return the feature as (B, C, *spatial), a view; ``name`` is for messages."""
        if not self.has_tokens(x):
            return x if self.channel_dim == 1 else x.movedim(-1, 1)
        tokens = x[:, self.skip_tokens :] if self.skip_tokens else x
        if not tokens.shape[1]:
            raise ValueError(
                f"skip_tokens must leave a token of {name}, which has {x.shape[1]}, "
                f"got {self.skip_tokens}"
            )
        if self.map_size is None:
            return tokens.transpose(1, 2)
        if math.prod(self.map_size) != tokens.shape[1]:
            raise ValueError(
                f"map_size must have as many positions as {name} has tokens after skip_tokens, "
                f"{tokens.shape[1]}, got {tuple(self.map_size)}"
            )
        return tokens.transpose(1, 2).unflatten(2, tuple(self.map_size))

    def view(self, x: Tensor, of_channels: bool) -> Tensor:
        """Return the feature as its map reads it: channel attention has channels as positions."""
        x = self.to_channels_first(x)
        return channels_as_positions(x) if of_channels else x

    def restore(self, gradient: Tensor, x: Tensor) -> Tensor:
        """Return the gradient of ``to_channels_first(x)`` as that of x: 0 for skipped tokens."""
        if not self.has_tokens(x):
            return gradient if self.channel_dim == 1 else gradient.movedim(1, -1)
        tokens = gradient.flatten(2).transpose(1, 2)
        missing = x.shape[1] - tokens.shape[1]
        return F.pad(tokens, (0, 0, missing, 0)) if missing else tokens


CHANNELS_FIRST = FeatureLayout()


def channels_as_positions(x: Tensor) -> Tensor:
    """Return the view (B, H*W, C) whose spatial attention is x's channel attention."""
    return x.flatten(2).transpose(1, 2)


# ---- options of layouts --------------------------------------------------------------------------


def feature_layouts(
    channel_dim: Any,
    skip_tokens: Any,
    map_size: Any,
    has_tokens: tuple[bool, bool] = (True, True),
) -> tuple[FeatureLayout, FeatureLayout]:
    """Return the student's and the teacher's layout, from one value for both or a pair of them.

    ``has_tokens``: which side has features (B, N, C), as far as that is known. An option of tokens
    that no side can use is an error; one given for both may serve one alone.
    """
    given = layout_options(channel_dim, skip_tokens, map_size)
    each = {name: both(name, value) for name, value in given.items()}
    found = [_layout(*side) for side in zip(*each.values(), strict=True)]
    tokens = [n.channel_dim != 1 and has for n, has in zip(found, has_tokens, strict=True)]
    lacking = [n for n, has in zip(("student", "teacher"), tokens, strict=True) if not has]
    none = "there are none here" if len(lacking) == 2 else f"the {'.'.join(lacking)} has none"
    rule = f"take channel_dim=-1 (here {given['channel_dim']!r}); {none}"
    for name in ("skip_tokens", "map_size"):
        check_for_tokens(name, given[name], each[name], tokens, rule)
    student, teacher = (layout if layout.channel_dim != 1 else CHANNELS_FIRST for layout in found)
    return student, teacher


def layout_options(channel_dim: Any, skip_tokens: Any, map_size: Any) -> dict[str, Any]:
    """Return the options of layouts by their names, as Python's own numbers and lists."""
    given = {"channel_dim": channel_dim, "skip_tokens": skip_tokens, "map_size": map_size}
    return {name: as_python(name, value) for name, value in given.items()}


def check_for_tokens(
    name: str, value: Any, each: Sequence[Any], tokens: Sequence[bool], rule: str
) -> None:
    """Raise where an option of tokens is for a side without any; one for both may be for one."""
    lost = [bool(own) and not has for own, has in zip(each, tokens, strict=True)]
    if all(lost) or (any(lost) and each[0] is not value):
        raise ValueError(
            f"{name} is for token features (B, N, C), which {rule}, got {name}={value!r}"
        )


def both(name: str, value: Any) -> tuple[Any, Any]:
    """Return a value for both sides, or one for each: a map size is itself a sequence."""
    several = isinstance(value, (tuple, list))
    if name == "map_size" and several:
        several = any(n is None or isinstance(n, (tuple, list)) for n in value)
    if not several:
        return value, value
    if len(value) != 2:
        raise ValueError(f"{name} must be one value or (student's, teacher's), got {value!r:.80}")
    return value[0], value[1]


def _layout(channel_dim: Any, skip_tokens: Any, map_size: Any) -> FeatureLayout:
    for name, value in (("channel_dim", channel_dim), ("skip_tokens", skip_tokens)):
        if not is_whole(value):
            raise TypeError(f"{name} must be a whole number, got {kind(value)}")
    if channel_dim not in (1, -1):
        raise ValueError(f"channel_dim must be 1 or -1, got {channel_dim}")
    if skip_tokens < 0:
        raise ValueError(f"skip_tokens must be >= 0, got {skip_tokens}")
    if map_size is not None:
        several = map_size if isinstance(map_size, (tuple, list)) else ()
        if not 1 <= len(several) <= 3 or not all(is_whole(n) and n > 0 for n in several):
            raise ValueError(f"map_size must be one to three whole numbers > 0, got {map_size!r}")
    return FeatureLayout(channel_dim, skip_tokens, map_size)


def layout_of_one(
    x: object, channel_dim: Any, skip_tokens: Any, map_size: Any, options: Mapping[str, Any]
) -> FeatureLayout:
    """Return one feature's layout; all that makes its map is checked."""
    options = {"map_size": map_size, **options}
    check_options(options, CHOICES | {"attend": ("spatial", "channel")})
    normalize, eps, eps_mode = (options[name] for name in ("normalize", "eps", "eps_mode"))
    if not isinstance(normalize, bool):
        raise TypeError(f"normalize must be True or False, got {kind(normalize)}")
    if not normalize and (eps, eps_mode) != (1e-12, "max"):
        raise ValueError(
            f"eps and eps_mode are for normalize=True, got {eps!r} and {eps_mode!r} without it"
        )
    has_tokens = check_feature("x", x).dim() == 3
    given = layout_options(channel_dim, skip_tokens, map_size)
    if any(both(name, value)[0] is not value for name, value in given.items()):
        raise ValueError(
            f"channel_dim, skip_tokens and map_size must be one value each for one feature, got "
            f"{', '.join(map(repr, given.values()))}"
        )
    return feature_layouts(**given, has_tokens=(has_tokens, has_tokens))[0]


def check_kept(
    owner: str,
    options: Mapping[str, Any],
    allowed: Collection[str],
    choices: Mapping[str, tuple[str | None, ...]] = CHOICES,
) -> dict[str, Any]:
    """Return options kept for later calls, checked as far as that goes without features."""
    options = {name: as_python(name, value) for name, value in options.items()}
    for name in options:
        if name not in allowed:
            raise TypeError(f"{owner} takes no option {name!r}")
    check_options(options, choices)
    feature_layouts(
        options.get("channel_dim", 1), options.get("skip_tokens", 0), options.get("map_size")
    )
    pair_weights(options.get("weights"), None)
    return options
