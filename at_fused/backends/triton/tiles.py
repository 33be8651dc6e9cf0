"""Building blocks of the kernels: records, addresses, powers, maps and gradients of tiles.

A launch takes a list: a tuple of records (``NamedTuple`` classes). Each program finds its entry by
its program id. Fields in lower case are run-time values; fields in upper case are compile-time
constants.

A tile is BLOCK_C channels by BLOCK_N positions of one sample, in both layouts. Only the strides
differ: Triton distributes the threads along the contiguous dimension.

Two rules keep Triton from losing which fields are constants. Never bind a record to a variable:
write ``entries[i].record``, or pass it as an argument. Declare nested records before the constants:
Triton 3.6 loses theirs in a loop.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import triton
import triton.language as tl

# ---- numbers -------------------------------------------------------------------------------------
#
# Triton compiles separate kernels for an integer argument of 1, a multiple of 16, and more than 32
# bits. ``do_not_specialize`` does not apply inside tuples. Records therefore encode integers as odd
# numbers of 34 bits, which all share one kernel.


def encode_int(value: int) -> int:
    """Encode a 32-bit integer for a record or an argument."""
    return 2 * (2**32 + value) + 1


@triton.jit
def decode_int(argument):
    """Decode an integer below 2^31."""
    return (argument >> 1).to(tl.int32)


def encode_double(value: float) -> tuple[int, int]:
    """Encode a double for a record or an argument; Triton would round a float to fp32."""
    low, high = struct.unpack("<II", struct.pack("<d", value))
    return encode_int(high), encode_int(low)


@triton.jit
def decode_double(argument):
    """Decode a double."""
    bits = ((argument[0] >> 1) << 32) | ((argument[1] >> 1) & 0xFFFFFFFF)
    return bits.to(tl.float64, bitcast=True)


# ---- lists ---------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """Record of a list, and the range of its program ids (with ``encode_int``)."""

    record: Any
    first_program: int
    end_program: int


@triton.jit
def has_program(entry):
    """Return True if this program belongs to an entry."""
    program = tl.program_id(0)
    return (program >= decode_int(entry.first_program)) & (program < decode_int(entry.end_program))


@triton.jit
def program_of(entry):
    """Return the index of this program within its entry."""
    return tl.program_id(0) - decode_int(entry.first_program)


# ---- gradients of the losses ---------------------------------------------------------------------


class LossGradient(NamedTuple):
    """Gradient of the loss: one value, or one per pair or sample; strides with ``encode_int``."""

    data: Any
    pair_stride: int
    sample_stride: int


@triton.jit
def times_loss_gradient(k, gradient, pair, b):
    """Multiply k by the gradient of the loss of a pair's sample, if there is one."""
    if gradient is not None:
        offset = decode_int(pair) * decode_int(gradient.pair_stride)
        offset += b * decode_int(gradient.sample_stride)
        k *= tl.load(gradient.data + offset).to(k.dtype)
    return k


# ---- features ------------------------------------------------------------------------------------


class Feature(NamedTuple):
    """Record of a feature, or its gradient, as (B, C, N).

    Of C and N, ``inner`` is the size of the contiguous dimension. ``outer`` and ``line_stride`` are
    size and stride of the other one. Strides and ``inner`` are in units of ALIGN elements: the
    kernel multiplies by the constant ALIGN, which tells the compiler how wide an access may be.
    """

    data: Any
    batch_stride: int
    line_stride: int
    inner: int
    outer: int
    PLANAR: Any
    ALIGN: Any
    WIDE: Any  # offsets within a sample need 64 bits
    BLOCK_C: Any
    BLOCK_N: Any


@triton.jit
def channels_of(feature):
    """Return C of a feature."""
    if feature.PLANAR:
        size = feature.outer
    else:
        size = feature.inner * feature.ALIGN
    return size


@triton.jit
def positions_of(feature):
    """Return N of a feature."""
    if feature.PLANAR:
        size = feature.inner * feature.ALIGN
    else:
        size = feature.outer
    return size


@triton.jit
def addresses(feature, b, c, n):
    """Return the addresses of channels c and positions n, broadcast, in sample b."""
    if feature.WIDE:
        c = c.to(tl.int64)
        n = n.to(tl.int64)
    if feature.PLANAR:
        offsets = c * feature.line_stride * feature.ALIGN + n
    else:
        offsets = c + n * feature.line_stride * feature.ALIGN
    return feature.data + b.to(tl.int64) * feature.batch_stride * feature.ALIGN + offsets


# ---- powers --------------------------------------------------------------------------------------


@triton.jit
def _power_fp32(a, P: tl.constexpr):
    # a = 2^e * m with m near 1, so that a^p = 2^(p e) * 2^(p log2 m). p log2(a) itself may be 100,
    # and rounding it to fp32 would cost the result two decimal digits. HIGH is p rounded down to 8
    # binary places, so that HIGH * e is exact.
    LOW: tl.constexpr = P % 0.00390625
    HIGH: tl.constexpr = P - LOW
    small = a < 1.1754943508222875e-38
    bits = tl.where(small, a * 16777216.0, a).to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23  # m in [sqrt(1/2), sqrt(2))
    m = (bits - (e << 23)).to(tl.float32, bitcast=True)
    exponent = tl.where(small, e - 24, e).to(tl.float32)
    high = HIGH * exponent
    low = P * tl.log2(m) + LOW * exponent
    whole = tl.floor(high + low + 0.5)
    fraction = tl.exp2((high - whole) + low)
    # 2^whole may overflow fp32: multiply by two factors instead.
    n = tl.minimum(tl.maximum(whole, -252.0), 252.0).to(tl.int32)
    half = n >> 1
    first = ((half + 127) << 23).to(tl.float32, bitcast=True)
    second = ((n - half + 127) << 23).to(tl.float32, bitcast=True)
    return fraction * first * second


@triton.jit
def _power(x, P: tl.constexpr):
    a = tl.abs(x)
    is_regular = (a > 0.0) & (a < float("inf"))  # 0, inf and NaN are returned unchanged
    safe = tl.where(is_regular, a, 1.0)
    if x.dtype == tl.float64:
        powered = tl.exp2(P * tl.log2(safe))
    else:
        powered = _power_fp32(safe, P)
    return tl.where(is_regular, powered, a)


@triton.jit
def power(x, P: tl.constexpr):
    """Return |x|^p."""
    if P == 2.0:
        y = x * x
    elif P == 1.0:
        y = tl.abs(x)
    elif P == 4.0:
        y = (x * x) * (x * x)
    elif P == 3.0:
        y = x * x * tl.abs(x)
    else:
        y = _power(x, P)
    return y


@triton.jit
def slope(x, P: tl.constexpr):
    """Return |x|^(p-1) * sign(x)."""
    if P == 2.0:
        y = x
    elif P == 1.0:
        y = tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))
    elif P == 4.0:
        y = x * x * x
    elif P == 3.0:
        y = x * tl.abs(x)
    else:
        y = _power(x, P - 1.0)
        y = tl.where(x < 0, -y, y)
    return y


# ---- maps and gradients --------------------------------------------------------------------------


@triton.jit
def store_map(feature, out, b, begin, span, P: tl.constexpr, MEAN: tl.constexpr):
    """Write the raw map (B, N) of one sample at positions [begin, begin + span)."""
    ACC: tl.constexpr = out.dtype.element_ty
    channels = channels_of(feature)
    positions = positions_of(feature)
    row = out + b.to(tl.int64) * positions
    for start in range(begin, tl.minimum(begin + span, positions), feature.BLOCK_N):
        n = start + tl.arange(0, feature.BLOCK_N)
        total = tl.zeros([feature.BLOCK_C, feature.BLOCK_N], ACC)
        for first in range(0, channels, feature.BLOCK_C):
            c = first + tl.arange(0, feature.BLOCK_C)
            x = tl.load(
                addresses(feature, b, c[:, None], n[None, :]),
                mask=(c < channels)[:, None] & (n < positions)[None, :],
                other=0.0,
            )
            total += power(x.to(ACC), P)
        collapsed = tl.sum(total, 0)
        if MEAN:
            collapsed = collapsed / channels
        tl.store(row + n, collapsed, mask=n < positions)


@triton.jit
def store_gradient(feature, gradient, k, b, c, n, P: tl.constexpr, addend=None):
    """Write k[n] * |x|^(p-1) * sign(x) for one tile, plus the addend if there is one."""
    mask = (c < channels_of(feature))[:, None] & (n < positions_of(feature))[None, :]
    x = tl.load(addresses(feature, b, c[:, None], n[None, :]), mask=mask, other=0.0)
    result = k[None, :] * slope(x.to(k.dtype), P)
    if addend is not None:
        added = tl.load(addresses(addend, b, c[:, None], n[None, :]), mask=mask, other=0.0)
        result += added.to(k.dtype)
    target = addresses(gradient, b, c[:, None], n[None, :])
    tl.store(target, result.to(gradient.data.dtype.element_ty), mask=mask)
