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
    decode_int,
    encode_int,
    has_program,
    positions_of,
    power,
    program_of,
    store_map,
)


class Map(NamedTuple):
    """Record of a feature and its map; for "max" also of the channels of the maxima."""

    feature: Feature
    out: Tensor
    argmax_channels: Any
    pieces: int  # per sample; this and the next with ``encode_int``
    tiles: int  # per piece, along the positions


@triton.jit
def _rank(x):
    """Return an integer that orders by |x|: every NaN has the same one, above infinity."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
        rank = tl.minimum(bits, 0x7FF0000000000001)
    else:
        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        rank = tl.minimum(bits, 0x7F800001)
    return rank


@triton.jit
def _store_max_map(feature, out, argmax_channels, b, begin, span, P: tl.constexpr):
    """Store the largest |x|^p of each position, and its channel in ``argmax_channels``."""
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
            # Masked elements are 0: they never rank above channel 0, which comes first.
            rank = _rank(x.to(ACC))
            tile = tl.where(rank > largest, first, tile)
            largest = tl.maximum(rank, largest)
        maximum = tl.max(largest, 0)
        c = tile + tl.arange(0, feature.BLOCK_C)[:, None]
        first_channel = tl.min(tl.where(largest == maximum[None, :], c, channels), 0)
        tl.store(argmax_channels + row + n, first_channel, mask=inside)
        tl.store(out + row + n, power(maximum.to(ACC, bitcast=True), P), mask=inside)


@triton.jit
def _map_of_feature(entry, program, P: tl.constexpr, MEAN: tl.constexpr):
    pieces = decode_int(entry.pieces)
    span = decode_int(entry.tiles) * entry.feature.BLOCK_N
    b = program // pieces
    begin = program % pieces * span
    if entry.argmax_channels is None:
        store_map(entry.feature, entry.out, b, begin, span, P, MEAN)
    else:
        _store_max_map(entry.feature, entry.out, entry.argmax_channels, b, begin, span, P)


@triton.jit
def map_kernel(entries, P: tl.constexpr, MEAN: tl.constexpr):
    """Compute the raw maps of a list of features (``Map``)."""
    for i in tl.static_range(len(entries)):
        if has_program(entries[i]):
            _map_of_feature(entries[i].record, program_of(entries[i]), P, MEAN)


def new_map(x: Tensor) -> Tensor:
    """Allocate the map of a feature."""
    return x.new_empty((x.shape[0], math.prod(x.shape[2:])), dtype=accumulate_dtype(x))


def attention_map(
    features: list[Tensor], p: float, collapse: str, skip_tokens: Sequence[int] = ()
) -> list[Tensor]:
    """Return Q[b, n] = scale * sum_c |A[b, c, n]|^p, (B, N), for each feature (B, C, *spatial).

    With "max", return the largest |A|^p, and after all maps the channel (int32) of each maximum.
    """
    check_attention_map(features, p, collapse, skip_tokens)
    if not features:
        return []
    features = eager.without_skipped(features, skip_tokens)
    is_max = collapse == "max"
    maps = [new_map(x) for x in features]
    channels = [torch.empty_like(q, dtype=torch.int32) for q in maps] if is_max else []
    with launch.on_device(features[0]):
        work = []
        for i, (x, q) in enumerate(zip(features, maps, strict=True)):
            # The channels need as many registers as the values.
            feature = launch.feature_of(x, p, int(is_max))
            batch, positions = q.shape
            size = x.nbytes // batch
            pieces, tiles = launch.split_sample(positions, size, feature.BLOCK_N.value)
            numbers = encode_int(pieces), encode_int(tiles)
            entry = Map(feature, q, channels[i] if is_max else None, *numbers)
            work.append((entry, batch * pieces))
        launch.start_list(map_kernel, work, P=p, MEAN=collapse == "mean")
    return maps + channels
