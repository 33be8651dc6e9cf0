"""Raw maps of a list of features: ``map_kernel``."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from at_fused.backends import eager
from at_fused.backends.checks import check_attention_map
from at_fused.backends.outputs import accumulate_dtype
from at_fused.backends.triton import launch
from at_fused.backends.triton.tiles import (
    Feature,
    addresses,
    channels_of,
    is_mine,
    number,
    number_of,
    positions_of,
    power,
    program_of,
    store_map,
)


class Map(NamedTuple):
    """A feature whose map is wanted; ``winners`` where the channels go that have the maximum."""

    feature: Feature
    out: Tensor
    winners: Any
    pieces: int  # of a sample; this and the next by ``number_of``
    tiles: int  # of a piece, along the positions


@triton.jit
def _rank(x):
    """Return a whole number that orders by |x|: all NaN alike, and above infinity."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
        rank = tl.minimum(bits, 0x7FF0000000000001)
    else:
        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        rank = tl.minimum(bits, 0x7F800001)
    return rank


@triton.jit
def _store_max(feature, out, winners, b, begin, span, P: tl.constexpr):
    """Store the largest |x|^p of each position, and in ``winners`` the channel that has it."""
    ACC: tl.constexpr = out.dtype.element_ty
    channels = channels_of(feature)
    positions = positions_of(feature)
    row = b.to(tl.int64) * positions
    for start in range(begin, tl.minimum(begin + span, positions), feature.BLOCK_N):
        n = start + tl.arange(0, feature.BLOCK_N)
        inside = n < positions
        largest = _rank(tl.zeros([feature.BLOCK_C, feature.BLOCK_N], ACC))
        tile = tl.zeros([feature.BLOCK_C, feature.BLOCK_N], tl.int32)
        for first in range(0, channels, feature.BLOCK_C):
            c = first + tl.arange(0, feature.BLOCK_C)
            mask = (c < channels)[:, None] & inside[None, :]
            x = tl.load(addresses(feature, b, c[:, None], n[None, :]), mask=mask, other=0.0)
            # Elements past the last channel rank with zeros, after channel 0.
            rank = _rank(x.to(ACC))
            tile = tl.where(rank > largest, first, tile)
            largest = tl.maximum(rank, largest)
        winner = tl.max(largest, 0)
        c = tile + tl.arange(0, feature.BLOCK_C)[:, None]
        found = tl.min(tl.where(largest == winner[None, :], c, channels), 0)
        tl.store(winners + row + n, found, mask=inside)
        tl.store(out + row + n, power(winner.to(ACC, bitcast=True), P), mask=inside)


@triton.jit
def _map_of_feature(entry, program, P: tl.constexpr, MEAN: tl.constexpr):
    pieces = number(entry.pieces)
    span = number(entry.tiles) * entry.feature.BLOCK_N
    b = program // pieces
    begin = program % pieces * span
    if entry.winners is None:
        store_map(entry.feature, entry.out, b, begin, span, P, MEAN)
    else:
        _store_max(entry.feature, entry.out, entry.winners, b, begin, span, P)


@triton.jit
def map_kernel(entries, P: tl.constexpr, MEAN: tl.constexpr):
    """The raw maps of a list of features (``Map``)."""
    for i in tl.static_range(len(entries)):
        if is_mine(entries[i]):
            _map_of_feature(entries[i].record, program_of(entries[i]), P, MEAN)


def new_map(x: Tensor) -> Tensor:
    """Make memory for a feature's map."""
    return x.new_empty((x.shape[0], math.prod(x.shape[2:])), dtype=accumulate_dtype(x))


def attention_map(
    features: list[Tensor], p: float, collapse: str, skip_tokens: Sequence[int] = ()
) -> list[Tensor]:
    """Q[b, n] = scale * sum_c |A[b, c, n]|^p, (B, N), for each feature (B, C, *spatial).

    With "max" the largest |A|^p, and after the maps the channel (int32) of each.
    """
    check_attention_map(features, p, collapse, skip_tokens)
    if not features:
        return []
    features = eager.without_first(features, skip_tokens)
    largest = collapse == "max"
    maps = [new_map(x) for x in features]
    winners = [torch.empty_like(q, dtype=torch.int32) for q in maps] if largest else []
    with launch.on_device(features[0]):
        work = []
        for i, (x, q) in enumerate(zip(features, maps, strict=True)):
            # The channels take as many registers again as their values.
            feature = launch.feature_of(x, p, int(largest))
            batch, positions = q.shape
            size = x.nbytes // batch
            pieces, tiles = launch.cut(positions, size, feature.BLOCK_N.value)
            numbers = number_of(pieces), number_of(tiles)
            entry = Map(feature, q, winners[i] if largest else None, *numbers)
            work.append((entry, batch * pieces))
        launch.start_list(map_kernel, work, P=p, MEAN=collapse == "mean")
    return maps + winners
