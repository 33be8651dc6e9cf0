"""Options, from the public function to the operators: of a loss, and of how features lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

MapSize = Sequence[int]
Sides = int | tuple[int, int]
MapSizes = MapSize | tuple[MapSize | None, MapSize | None] | None


class LossOptions(NamedTuple):
    """The options that the operators take: how maps are made, normalised and compared."""

    p: float = 2.0
    collapse: str = "mean"
    form: str = "code"
    reduction: str = "sum"
    eps_mode: str = "max"
    eps: float = 1e-12


class LossArguments(NamedTuple):
    """The keyword arguments of ``at_loss``, those of ``LossOptions`` first."""

    p: float = 2.0
    collapse: str = "mean"
    form: str = "code"
    reduction: str = "sum"
    eps_mode: str = "max"
    eps: float = 1e-12
    weights: Sequence[float] | None = None
    resize: str | None = None
    attend: str = "spatial"
    channel_dim: Sides = 1
    skip_tokens: Sides = 0
    map_size: MapSizes = None
    mask: Tensor | Sequence[Tensor] | None = None
    sample_weights: Tensor | None = None
    absolute: bool = True

    def options(self) -> LossOptions:
        """Return those of the operators."""
        return LossOptions(float(self.p), *self[1:5], float(self.eps))


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
