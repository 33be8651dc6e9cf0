"""Features that are averaged to a smaller size on their way to a map, and back.

Windows are those of adaptive pooling: output o of a dimension is the mean of the inputs from
floor(o in / out) to ceil((o + 1) in / out). One and the next may share an input, never more.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from at_fused.backends.results import split_sizes
from at_fused.backends.triton.launch import constexpr
from at_fused.backends.triton.powers import slope
from at_fused.backends.triton.tiles import (
    Pool,
    channels_of,
    load_coefficients,
    offsets_of,
    positions_of,
    sample_of,
)


def pools_of(features: Sequence[Tensor], sizes: Sequence[int]) -> list[Pool | None]:
    """How each feature is pooled; None where it keeps its size."""
    return [
        _pool_of(tuple(x.shape[2:]), tuple(size))
        for x, size in zip(features, split_sizes(features, sizes), strict=True)
    ]


def _pool_of(given: tuple[int, ...], wanted: tuple[int, ...]) -> Pool | None:
    if given == wanted:
        return None
    ones = (1,) * (3 - len(given))
    given, wanted = ones + given, ones + wanted
    windows, meet = [], []
    for size, out in zip(given, wanted, strict=True):
        rest = size % out
        # A window begins up to 1 - gcd / out after a whole input.
        windows.append(size // out + (rest > 0) + (rest > math.gcd(rest, out)))
        meet.append(constexpr(rest > 0))
    wide = any((size + 1) * out >= 2**31 for size, out in zip(given, wanted, strict=True))
    return Pool._make((*given, *wanted, *windows, *meet, constexpr(wide)))


# ---- windows -------------------------------------------------------------------------------------


@triton.jit
def _begin(o, size, out, WIDE: tl.constexpr):
    if WIDE:
        o = o.to(tl.int64)
    return (o * size // out).to(tl.int32)


@triton.jit
def _length(o, size, out, WIDE: tl.constexpr):
    if WIDE:
        o = o.to(tl.int64)
    return (((o + 1) * size + out - 1) // out - o * size // out).to(tl.int32)


@triton.jit
def _meets(o, size, out, WIDE: tl.constexpr):
    """Whether a window's first input is the last one of the window before."""
    if WIDE:
        o = o.to(tl.int64)
    return o * size % out != 0


@triton.jit
def places_of(pool, n):
    """The place (d, h, w) of a map's positions."""
    w = n % pool.out_width
    h = n // pool.out_width % pool.out_height
    d = n // (pool.out_width * pool.out_height)
    return d, h, w


@triton.jit
def windows_of(pool, d, h, w):
    """The windows of places: where they begin, and their lengths."""
    begin = _begin(d, pool.depth, pool.out_depth, pool.WIDE) * pool.height
    begin = (begin + _begin(h, pool.height, pool.out_height, pool.WIDE)) * pool.width
    begin = begin + _begin(w, pool.width, pool.out_width, pool.WIDE)
    depth = _length(d, pool.depth, pool.out_depth, pool.WIDE)
    height = _length(h, pool.height, pool.out_height, pool.WIDE)
    width = _length(w, pool.width, pool.out_width, pool.WIDE)
    return begin, depth, height, width


@triton.jit
def load_pooled(feature, data, c, begin, depth, height, width, inside, ACC: tl.constexpr):
    """Means over windows; channels and windows broadcast to the shape of ``inside``."""
    total = tl.zeros(inside.shape, ACC)
    for i in range(feature.pool.window_depth):
        for j in range(feature.pool.window_height):
            for k in range(feature.pool.window_width):
                n = begin + (i * feature.pool.height + j) * feature.pool.width + k
                x = tl.load(
                    data + offsets_of(feature, c, n, feature.PLANAR),
                    mask=inside & ((i < depth) & (j < height) & (k < width)),
                    other=0.0,
                )
                total += x.to(ACC)
    return total / (depth * height * width).to(ACC)


# ---- gradients -----------------------------------------------------------------------------------
#
# Output o writes the inputs from the begin of its window to the begin of the next one. The first of
# these may be the last input of the window before, whose share is computed once more, here.


@triton.jit
def _share(
    feature,
    winners,
    loss_gradient,
    b,
    first,
    d,
    h,
    w,
    inside,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
    ABSOLUTE: tl.constexpr,
):
    """What the windows (d, h, w) give to each of their inputs, as a tile."""
    c = first + tl.arange(0, feature.BLOCK_C)
    n = (d * feature.pool.out_height + h) * feature.pool.out_width + w
    begin, depth, height, width = windows_of(feature.pool, d, h, w)
    k = load_coefficients(feature, b, n, inside, loss_gradient)
    k = k / (depth * height * width).to(k.dtype)
    data = sample_of(feature, b)
    channels = channels_of(feature)
    if winners is None:
        x = load_pooled(
            feature,
            data,
            c[:, None],
            begin[None, :],
            depth[None, :],
            height[None, :],
            width[None, :],
            (c < channels)[:, None] & inside[None, :],
            k.dtype,
        )
        share = k[None, :] * slope(x, HIGH, LOW, ABSOLUTE)
    else:
        begin_of_map = winners + b.to(tl.int64) * positions_of(feature)
        winner = tl.load(begin_of_map + n, mask=inside, other=-1)
        here = (winner >= first) & (winner < tl.minimum(first + feature.BLOCK_C, channels))
        x = load_pooled(feature, data, winner, begin, depth, height, width, here, k.dtype)
        only = k * slope(x, HIGH, LOW, ABSOLUTE)
        share = tl.where(c[:, None] == winner[None, :], only[None, :], 0.0)
    return share


@triton.jit
def _shares(
    feature,
    winners,
    loss_gradient,
    b,
    first,
    d,
    h,
    w,
    inside,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
    ABSOLUTE: tl.constexpr,
):
    """The shares of the windows (d, h, w), of those above, on the left, and above on the left."""
    own = _share(feature, winners, loss_gradient, b, first, d, h, w, inside, HIGH, LOW, ABSOLUTE)
    above = own
    left = own
    corner = own
    # Where no window meets them, an index that exists: what is masked gives 0.
    rows = inside & _meets(h, feature.pool.height, feature.pool.out_height, feature.pool.WIDE)
    columns = inside & _meets(w, feature.pool.width, feature.pool.out_width, feature.pool.WIDE)
    up = tl.where(rows, h - 1, h)
    back = tl.where(columns, w - 1, w)
    if feature.pool.ROWS_MEET:
        above = _share(
            feature, winners, loss_gradient, b, first, d, up, w, rows, HIGH, LOW, ABSOLUTE
        )
    if feature.pool.COLUMNS_MEET:
        left = _share(
            feature, winners, loss_gradient, b, first, d, h, back, columns, HIGH, LOW, ABSOLUTE
        )
        if feature.pool.ROWS_MEET:
            both = rows & columns
            corner = _share(
                feature, winners, loss_gradient, b, first, d, up, back, both, HIGH, LOW, ABSOLUTE
            )
    return own, above, left, corner


@triton.jit
def _sum_shares(pool, own, above, left, corner, j, k):
    """What the input in row j and column k of a window gets."""
    total = own
    if pool.ROWS_MEET:
        total += tl.where(j == 0, above, 0.0)
    if pool.COLUMNS_MEET:
        total += tl.where(k == 0, left, 0.0)
        if pool.ROWS_MEET:
            total += tl.where((j == 0) & (k == 0), corner, 0.0)
    return total


@triton.jit
def spread_gradient(
    feature,
    gradient,
    winners,
    loss_gradient,
    b,
    first,
    n,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
    ABSOLUTE: tl.constexpr,
):
    """Writes the gradient of a feature under one tile of its map."""
    inside = n < positions_of(feature)
    d, h, w = places_of(feature.pool, n)
    own, above, left, corner = _shares(
        feature, winners, loss_gradient, b, first, d, h, w, inside, HIGH, LOW, ABSOLUTE
    )
    if feature.pool.PLANES_MEET:
        planes = inside & _meets(d, feature.pool.depth, feature.pool.out_depth, feature.pool.WIDE)
        before = tl.where(planes, d - 1, d)
        far_own, far_above, far_left, far_corner = _shares(
            feature, winners, loss_gradient, b, first, before, h, w, planes, HIGH, LOW, ABSOLUTE
        )
    begin, depth, height, width = windows_of(feature.pool, d, h, w)
    depth -= _meets(d + 1, feature.pool.depth, feature.pool.out_depth, feature.pool.WIDE)
    height -= _meets(h + 1, feature.pool.height, feature.pool.out_height, feature.pool.WIDE)
    width -= _meets(w + 1, feature.pool.width, feature.pool.out_width, feature.pool.WIDE)
    c = first + tl.arange(0, feature.BLOCK_C)
    mask = (c < channels_of(feature))[:, None] & inside[None, :]
    out = sample_of(gradient, b)
    for i in range(feature.pool.window_depth):
        for j in range(feature.pool.window_height):
            for k in range(feature.pool.window_width):
                total = _sum_shares(feature.pool, own, above, left, corner, j, k)
                if feature.pool.PLANES_MEET:
                    far = _sum_shares(feature.pool, far_own, far_above, far_left, far_corner, j, k)
                    total += tl.where(i == 0, far, 0.0)
                at = begin + (i * feature.pool.height + j) * feature.pool.width + k
                there = (i < depth) & (j < height) & (k < width)
                tl.store(
                    out + offsets_of(gradient, c[:, None], at[None, :], feature.PLANAR),
                    total.to(gradient.data.dtype.element_ty),
                    mask=mask & there[None, :],
                )
