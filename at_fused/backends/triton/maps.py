"""Raw maps of a list of features: ``map_kernel``."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from at_fused.backends.checks import check_attention_map, without_first
from at_fused.backends.triton import launch
from at_fused.backends.triton.launch import (
    cut,
    exponent,
    feature_of,
    native,
    new_map,
    on_device,
    piece_bytes,
)
from at_fused.backends.triton.powers import power
from at_fused.backends.triton.scalars import number, number_of
from at_fused.backends.triton.tiles import (
    Feature,
    channels_of,
    offsets_of,
    positions_of,
    sample_of,
)


@triton.jit
def _rank(x):
    """A whole number that orders by |x|: all NaN alike, and above infinity."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
        rank = tl.minimum(bits, 0x7FF0000000000001)
    else:
        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        rank = tl.minimum(bits, 0x7F800001)
    return rank


@triton.jit
def store_map(feature, b, begin, span, HIGH: tl.constexpr, LOW: tl.constexpr, MEAN: tl.constexpr):
    """Writes the raw map of one sample at positions [begin, begin + span)."""
    ACC: tl.constexpr = feature.map.dtype.element_ty
    channels = channels_of(feature)
    positions = positions_of(feature)
    end = tl.minimum(begin + span, positions)
    data = sample_of(feature, b)
    out = feature.map + b.to(tl.int64) * positions
    for start in range(begin, end, feature.BLOCK_N):
        n = start + tl.arange(0, feature.BLOCK_N)
        inside = n < positions
        total = tl.zeros([feature.BLOCK_C, feature.BLOCK_N], ACC)
        for first in range(0, channels, feature.BLOCK_C):
            c = first + tl.arange(0, feature.BLOCK_C)
            x = tl.load(
                data + offsets_of(feature, c[:, None], n[None, :], feature.PLANAR),
                mask=(c < channels)[:, None] & inside[None, :],
                other=0.0,
            )
            total += power(x.to(ACC), HIGH, LOW)
        collapsed = tl.sum(total, 0)
        if MEAN:
            collapsed = collapsed / channels
        tl.store(out + n, collapsed, mask=inside)


@triton.jit
def _store_max(feature, winners, b, begin, span, HIGH: tl.constexpr, LOW: tl.constexpr):
    """As ``store_map``, the largest |x|^p; the channel that has it goes to ``winners``."""
    ACC: tl.constexpr = feature.map.dtype.element_ty
    channels = channels_of(feature)
    positions = positions_of(feature)
    end = tl.minimum(begin + span, positions)
    data = sample_of(feature, b)
    row = b.to(tl.int64) * positions
    for start in range(begin, end, feature.BLOCK_N):
        n = start + tl.arange(0, feature.BLOCK_N)
        inside = n < positions
        largest = _rank(tl.zeros([feature.BLOCK_C, feature.BLOCK_N], ACC))
        tile = tl.zeros([feature.BLOCK_C, feature.BLOCK_N], tl.int32)
        for first in range(0, channels, feature.BLOCK_C):
            c = first + tl.arange(0, feature.BLOCK_C)
            x = tl.load(
                data + offsets_of(feature, c[:, None], n[None, :], feature.PLANAR),
                mask=(c < channels)[:, None] & inside[None, :],
                other=0.0,
            )
            # What is past the last channel ranks with zeros, behind channel 0.
            rank = _rank(x.to(ACC))
            tile = tl.where(rank > largest, first, tile)
            largest = tl.maximum(rank, largest)
        winner = tl.max(largest, 0)
        c = tile + tl.arange(0, feature.BLOCK_C)[:, None]
        found = tl.min(tl.where(largest == winner[None, :], c, channels), 0)
        tl.store(winners + row + n, found, mask=inside)
        tl.store(feature.map + row + n, power(winner.to(ACC, bitcast=True), HIGH, LOW), mask=inside)


class Map(NamedTuple):
    """A feature whose map is wanted; ``winners`` where the channels go that have the maximum."""

    feature: Feature
    winners: Tensor | None
    first_program: int  # and the rest by ``number_of``
    end_program: int
    pieces: int  # of a sample
    tiles: int  # of a piece, along the positions


@triton.jit
def _map_of_feature(entry, local, HIGH: tl.constexpr, LOW: tl.constexpr, MEAN: tl.constexpr):
    pieces = number(entry.pieces)
    span = number(entry.tiles) * entry.feature.BLOCK_N
    b = local // pieces
    begin = local % pieces * span
    if entry.winners is None:
        store_map(entry.feature, b, begin, span, HIGH, LOW, MEAN)
    else:
        _store_max(entry.feature, entry.winners, b, begin, span, HIGH, LOW)


@triton.jit
def map_kernel(
    entries, COUNT: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr, MEAN: tl.constexpr
):
    """The raw maps of a list of features (``Map``)."""
    program = tl.program_id(0)
    for i in tl.static_range(COUNT):
        first = number(entries[i].first_program)
        if (program >= first) & (program < number(entries[i].end_program)):
            _map_of_feature(entries[i], program - first, HIGH, LOW, MEAN)


def attention_map(
    features: list[Tensor], p: float, collapse: str, skip_tokens: Sequence[int] = ()
) -> list[Tensor]:
    """Q[b, n] = scale * sum_c |A[b, c, n]|^p, (B, N), for each feature (B, C, *spatial).

    With "max" the largest |A|^p, and behind the maps the channel (int32) of each.
    """
    check_attention_map(features, p, collapse, skip_tokens)
    if not features:
        return []
    features = without_first(features, skip_tokens)
    largest = collapse == "max"
    natives = [native(x) for x in features]
    maps = [new_map(x, layout) for x, layout in natives]
    winners = [torch.empty_like(q, dtype=torch.int32) for q in maps] if largest else []
    high, low = exponent(p)
    with on_device(features[0]):
        piece = piece_bytes(sum(x.nbytes for x in features), features[0].device)
        for first in range(0, len(features), launch.MAX_ENTRIES):
            entries: list[Map] = []
            programs = 0
            for i in range(first, min(first + launch.MAX_ENTRIES, len(features))):
                x, layout = natives[i]
                # The channels take as many registers again as their values.
                feature = feature_of(x, layout, maps[i], p, int(largest))
                size = x.nbytes // x.shape[0]
                pieces, tiles = cut(maps[i].shape[1], size, piece, feature.BLOCK_N.value)
                end = programs + x.shape[0] * pieces
                numbers = map(number_of, (programs, end, pieces, tiles))
                entries.append(Map(feature, winners[i] if largest else None, *numbers))
                programs = end
            launch.start(
                map_kernel,
                programs,
                tuple(entries),
                COUNT=len(entries),
                HIGH=high,
                LOW=low,
                MEAN=collapse == "mean",
            )
    return maps + winners
