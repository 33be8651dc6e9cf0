"""Layouts of features: the channel dimension, the skipped tokens and the size of the map."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from at_fused._arguments import CHOICES, check_feature, check_options, pair_weights
from at_fused._numbers import as_python, is_int, type_name
from at_fused._options import MapSize


class FeatureLayout(NamedTuple):
    """Layout of the features of a network: channel dimension, skipped tokens and map size."""

    channel_dim: int = 1
    skip_tokens: int = 0
    map_size: MapSize | None = None

    def has_tokens(self, x: Tensor) -> bool:
        """Return True if x holds tokens (B, N, C)."""
        return self.channel_dim != 1 and x.dim() == 3

    def size(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the map size for a feature of this shape."""
        if self.map_size is not None:
            return tuple(self.map_size)
        size = tuple(shape[2:] if self.channel_dim == 1 else shape[1:-1])
        return (size[0] - self.skip_tokens, *size[1:]) if self.skip_tokens else size

    def all_tokens(self) -> FeatureLayout:
        """Return the layout that skips no tokens and keeps them in one dimension."""
        return FeatureLayout(self.channel_dim)

    def to_channels_first(self, x: Tensor, name: str = "x") -> Tensor:
        """Return the feature as (B, C, *spatial), a view; ``name`` is for messages."""
        if not self.has_tokens(x):
            return x if self.channel_dim == 1 else x.movedim(-1, 1)
        tokens = x[:, self.skip_tokens :] if self.skip_tokens else x
        if not tokens.shape[1]:
            raise ValueError(
                f"skip_tokens must leave at least one token of {name}, which has {x.shape[1]}, "
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

    def view(self, x: Tensor, channelwise: bool) -> Tensor:
        """Return a view of the feature with the channels and positions of its map."""
        x = self.to_channels_first(x)
        return channels_as_positions(x) if channelwise else x

    def restore(self, gradient: Tensor, x: Tensor) -> Tensor:
        """Return the gradient of x from that of ``to_channels_first(x)``; 0 at skipped tokens."""
        if not self.has_tokens(x):
            return gradient if self.channel_dim == 1 else gradient.movedim(1, -1)
        tokens = gradient.flatten(2).transpose(1, 2)
        missing = x.shape[1] - tokens.shape[1]
        return F.pad(tokens, (0, 0, missing, 0)) if missing else tokens


CHANNELS_FIRST = FeatureLayout()


def channels_as_positions(x: Tensor) -> Tensor:
    """Return a view (B, H*W, C): its spatial attention is the channel attention of x."""
    return x.flatten(2).transpose(1, 2)


# ---- options of layouts --------------------------------------------------------------------------


def feature_layouts(
    channel_dim: Any,
    skip_tokens: Any,
    map_size: Any,
    has_tokens: tuple[bool, bool] = (True, True),
) -> tuple[FeatureLayout, FeatureLayout]:
    """Return the layouts of student and teacher, from one value for both sides or one for each.

    ``has_tokens`` is True for a side with features (B, N, C), and while that is unknown. A token
    option for one side needs tokens on that side. A shared one needs them on at least one side.
    """
    options = layout_options(channel_dim, skip_tokens, map_size)
    sides = {name: per_side(name, value) for name, value in options.items()}
    layouts = [_checked_layout(*side) for side in zip(*sides.values(), strict=True)]
    tokens = [y.channel_dim != 1 and has for y, has in zip(layouts, has_tokens, strict=True)]
    lacking = [n for n, has in zip(("student", "teacher"), tokens, strict=True) if not has]

    def rule() -> str:
        who = "neither side has tokens" if len(lacking) == 2 else f"the {''.join(lacking)} has none"
        return f"need channel_dim=-1 (got {options['channel_dim']!r}); {who}"

    for name in ("skip_tokens", "map_size"):
        check_token_option(name, options[name], sides[name], tokens, rule)
    student, teacher = (y if y.channel_dim != 1 else CHANNELS_FIRST for y in layouts)
    return student, teacher


def layout_options(channel_dim: Any, skip_tokens: Any, map_size: Any) -> dict[str, Any]:
    """Return the layout options by name, as Python numbers and lists."""
    options = {"channel_dim": channel_dim, "skip_tokens": skip_tokens, "map_size": map_size}
    return {name: as_python(name, value) for name, value in options.items()}


def check_token_option(
    name: str, value: Any, sides: Sequence[Any], tokens: Sequence[bool], rule: Callable[[], str]
) -> None:
    """Raise a ValueError if a side has no tokens for its option, or neither for a shared value.

    ``rule`` is called for the error only: torch.compile of torch 2.13 cannot format numbers if
    shapes are dynamic.
    """
    unused = [bool(side) and not has for side, has in zip(sides, tokens, strict=True)]
    if all(unused) or (any(unused) and sides[0] is not value):
        raise ValueError(
            f"{name} is for token features (B, N, C), which {rule()}, got {name}={value!r}"
        )


def per_side(name: str, value: Any) -> tuple[Any, Any]:
    """Return the student's and the teacher's value of an option."""
    is_pair = isinstance(value, (tuple, list))
    if name == "map_size" and is_pair:  # a single map size is a sequence, too
        is_pair = any(n is None or isinstance(n, (tuple, list)) for n in value)
    if not is_pair:
        return value, value
    if len(value) != 2:
        raise ValueError(f"{name} must be one value or (student's, teacher's), got {value!r:.80}")
    return value[0], value[1]


def _checked_layout(channel_dim: Any, skip_tokens: Any, map_size: Any) -> FeatureLayout:
    for name, value in (("channel_dim", channel_dim), ("skip_tokens", skip_tokens)):
        if not is_int(value):
            raise TypeError(f"{name} must be an int, got {type_name(value)}")
    if channel_dim not in (1, -1):
        raise ValueError(f"channel_dim must be 1 or -1, got {channel_dim}")
    if skip_tokens < 0:
        raise ValueError(f"skip_tokens must be >= 0, got {skip_tokens}")
    if map_size is not None:
        sizes = map_size if isinstance(map_size, (tuple, list)) else ()
        if not 1 <= len(sizes) <= 3 or not all(is_int(n) and n > 0 for n in sizes):
            raise ValueError(f"map_size must be one to three ints > 0, got {map_size!r}")
    return FeatureLayout(channel_dim, skip_tokens, map_size)


def layout_of_feature(
    x: object, channel_dim: Any, skip_tokens: Any, map_size: Any, options: Mapping[str, Any]
) -> FeatureLayout:
    """Check a feature and the options of its map; return its layout."""
    options = {"map_size": map_size, **options}
    check_options(options, CHOICES | {"attend": ("spatial", "channel")})
    normalize, eps, eps_mode = (options[name] for name in ("normalize", "eps", "eps_mode"))
    if not isinstance(normalize, bool):
        raise TypeError(f"normalize must be True or False, got {type_name(normalize)}")
    if not normalize and (eps, eps_mode) != (1e-12, "max"):
        raise ValueError(
            "eps and eps_mode are for normalize=True, got normalize=False with "
            f"eps={eps!r} and eps_mode={eps_mode!r}"
        )
    has_tokens = check_feature("x", x).dim() == 3
    layout = layout_options(channel_dim, skip_tokens, map_size)
    if any(per_side(name, value)[0] is not value for name, value in layout.items()):
        raise ValueError(
            f"channel_dim, skip_tokens and map_size must be one value each for one feature, got "
            f"{', '.join(map(repr, layout.values()))}"
        )
    return feature_layouts(**layout, has_tokens=(has_tokens, has_tokens))[0]


def check_module_options(
    owner: str,
    options: Mapping[str, Any],
    allowed: Collection[str],
    choices: Mapping[str, tuple[str | None, ...]] = CHOICES,
) -> dict[str, Any]:
    """Return the options that a module keeps, checked as far as possible without features."""
    options = {name: as_python(name, value) for name, value in options.items()}
    for name in options:
        if name not in allowed:
            raise TypeError(f"{owner} has no option {name!r}; it has {', '.join(sorted(allowed))}")
    check_options(options, choices)
    feature_layouts(
        options.get("channel_dim", 1), options.get("skip_tokens", 0), options.get("map_size")
    )
    pair_weights(options.get("weights"), None)
    return options
