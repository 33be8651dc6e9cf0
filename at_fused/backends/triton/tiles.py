"""Features as the kernels see them: records, addresses, and the tiles that maps and gradients take.

A launch takes a whole list: a tuple of records (``NamedTuple`` classes), and each program finds by
its number the entry that it works for. Fields in lower case are values of that call, those in upper
case are compiled in.

A tile is BLOCK_C channels by BLOCK_N positions of one sample, in both layouts: only the strides
differ, and Triton deals the threads out along the one that is 1.

A record is always named by its place (``entries[i]``) or passed on: bound to a variable, it would
lose which of its fields are compiled in.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from at_fused.backends.triton.powers import power, slope


class Feature(NamedTuple):
    """One feature tensor as (B, C, N), and its map (B, N).

    ``batch``, ``line`` (the stride of whichever of C and N is not contiguous) and ``inner`` (the
    size of the one that is) are given in units of ALIGN elements: multiplied back in the kernel,
    they tell the compiler how wide an access may be.
    """

    data: Any
    map: Any
    batch: int
    line: int
    inner: int
    outer: int
    PLANAR: Any
    ALIGN: Any
    WIDE: Any  # offsets within a sample need 64 bits
    BLOCK_C: Any
    BLOCK_N: Any


class Gradient(NamedTuple):
    """Where the gradient of a feature goes: the same layout, its own strides."""

    data: Any
    batch: int
    line: int
    ALIGN: Any
    WIDE: Any


@triton.jit
def channels_of(feature):
    """C of a feature."""
    if feature.PLANAR:
        size = feature.outer
    else:
        size = feature.inner * feature.ALIGN
    return size


@triton.jit
def positions_of(feature):
    """N of a feature."""
    if feature.PLANAR:
        size = feature.inner * feature.ALIGN
    else:
        size = feature.outer
    return size


@triton.jit
def sample_of(array, b):
    """Where sample ``b`` of a feature or gradient begins."""
    return array.data + b.to(tl.int64) * array.batch * array.ALIGN


@triton.jit
def offsets_of(array, c, n, PLANAR: tl.constexpr):
    """Of elements from their sample's begin; channels and positions broadcast."""
    if array.WIDE:
        c = c.to(tl.int64)
        n = n.to(tl.int64)
    if PLANAR:
        offsets = c * array.line * array.ALIGN + n
    else:
        offsets = c + n * array.line * array.ALIGN
    return offsets


# ---- maps ----------------------------------------------------------------------------------------


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
def store_map(
    feature,
    winners,
    b,
    begin,
    SPAN: tl.constexpr,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
    SIGNED: tl.constexpr,
    MEAN: tl.constexpr,
):
    """Writes the raw map of one sample at the positions [begin, begin + SPAN).

    With ``winners`` that is the largest |x|^p, and the channel that has it goes there.
    """
    ACC: tl.constexpr = feature.map.dtype.element_ty
    channels = channels_of(feature)
    positions = positions_of(feature)
    end = positions
    if SPAN:
        end = tl.minimum(begin + SPAN, positions)
    data = sample_of(feature, b)
    out = feature.map + b.to(tl.int64) * positions
    for start in range(begin, end, feature.BLOCK_N):
        n = start + tl.arange(0, feature.BLOCK_N)
        inside = n < positions
        total = tl.zeros([feature.BLOCK_C, feature.BLOCK_N], ACC)
        if winners is not None:
            largest = _rank(total)
            tile = tl.zeros([feature.BLOCK_C, feature.BLOCK_N], tl.int32)
        for first in range(0, channels, feature.BLOCK_C):
            c = first + tl.arange(0, feature.BLOCK_C)
            x = tl.load(
                data + offsets_of(feature, c[:, None], n[None, :], feature.PLANAR),
                mask=(c < channels)[:, None] & inside[None, :],
                other=0.0,
            ).to(ACC)
            if winners is None:
                total += power(x, HIGH, LOW, SIGNED)
            else:
                # What is past the last channel ranks with zeros, behind channel 0.
                rank = _rank(x)
                tile = tl.where(rank > largest, first, tile)
                largest = tl.maximum(rank, largest)
        if winners is None:
            collapsed = tl.sum(total, 0)
            if MEAN:
                collapsed = collapsed / channels
        else:
            winner = tl.max(largest, 0)
            c = tile + tl.arange(0, feature.BLOCK_C)[:, None]
            found = tl.min(tl.where(largest == winner[None, :], c, channels), 0)
            tl.store(winners + b.to(tl.int64) * positions + n, found, mask=inside)
            collapsed = power(winner.to(ACC, bitcast=True), HIGH, LOW, False)
        tl.store(out + n, collapsed, mask=inside)


# ---- gradients -----------------------------------------------------------------------------------


@triton.jit
def store_gradient(
    feature,
    gradient,
    k,
    b,
    c,
    n,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
    SIGNED: tl.constexpr,
):
    """Writes k[n] * |x|^(p-1) * sign(x) for one tile."""
    mask = (c < channels_of(feature))[:, None] & (n < positions_of(feature))[None, :]
    x = tl.load(
        sample_of(feature, b) + offsets_of(feature, c[:, None], n[None, :], feature.PLANAR),
        mask=mask,
        other=0.0,
    )
    result = k[None, :] * slope(x.to(k.dtype), HIGH, LOW, SIGNED)
    tl.store(
        sample_of(gradient, b) + offsets_of(gradient, c[:, None], n[None, :], feature.PLANAR),
        result.to(gradient.data.dtype.element_ty),
        mask=mask,
    )
