"""Options of a loss, for the public functions and the operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

MapSize = Sequence[int]
Sides = int | tuple[int, int]
MapSizes = MapSize | tuple[MapSize | None, MapSize | None] | None


class LossOptions(NamedTuple):
    """Options of the operators: how maps are computed, normalised and compared."""

    p: float = 2.0
    collapse: str = "mean"
    form: str = "code"
    reduction: str = "sum"
    eps_mode: str = "max"
    eps: float = 1e-12


class LossArguments(NamedTuple):
    """Keyword arguments of ``at_loss``, starting with those of ``LossOptions``."""

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
