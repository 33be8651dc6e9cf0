"""Features as the kernels see them: records, addresses, powers, maps and gradients of tiles.

A launch takes a list: a tuple of records (``NamedTuple`` classes), and each program finds by its
number the entry that it works for. Fields in lower case are values of that call, those in upper
case are compiled in.

A tile is BLOCK_C channels by BLOCK_N positions of one sample, in both layouts: only the strides
differ, and Triton deals the threads out along the one that is 1.

A record is always named in full (``entries[i].record``) or passed on: bound to a variable, it would
lose which of its fields are compiled in. A record's own records stand before what is compiled in:
Triton 3.6 would forget theirs in a loop.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import triton
import triton.language as tl

# ---- numbers -------------------------------------------------------------------------------------
#
# Triton compiles a kernel anew for an integer that is 1, a multiple of 16, or of more than 32 bits.
# ``do_not_specialize`` does not reach into tuples, so records hold what no compilation may depend
# on in a form that is always odd and of 34 bits.


def number_of(value: int) -> int:
    """Encode a number of 32 bits for a record or an argument."""
    return 2 * (2**32 + value) + 1


@triton.jit
def number(argument):
    """Decode a number below 2^31."""
    return (argument >> 1).to(tl.int32)


def double_of(value: float) -> tuple[int, int]:
    """Encode a double for a record or an argument: Triton would round a float to fp32."""
    low, high = struct.unpack("<II", struct.pack("<d", value))
    return number_of(high), number_of(low)


@triton.jit
def double(argument):
    """Decode a double."""
    bits = ((argument[0] >> 1) << 32) | ((argument[1] >> 1) & 0xFFFFFFFF)
    return bits.to(tl.float64, bitcast=True)


# ---- lists ---------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """One record of a list, and the numbers of its programs (by ``number_of``)."""

    record: Any
    first_program: int
    end_program: int


@triton.jit
def is_mine(entry):
    """Return whether this program works for an entry."""
    program = tl.program_id(0)
    return (program >= number(entry.first_program)) & (program < number(entry.end_program))


@triton.jit
def program_of(entry):
    """Return this program's number among the entry's."""
    return tl.program_id(0) - number(entry.first_program)


# ---- the gradient from above ---------------------------------------------------------------------


class Above(NamedTuple):
    """A loss's gradient: one, or one of each pair, or of each sample; steps by ``number_of``."""

    data: Any
    pair_step: int
    sample_step: int


@triton.jit
def times_above(k, above, pair, b):
    """Multiply by the gradient of the loss of a pair's sample, where there is one."""
    if above is not None:
        place = number(pair) * number(above.pair_step) + b * number(above.sample_step)
        k *= tl.load(above.data + place).to(k.dtype)
    return k


# ---- features ------------------------------------------------------------------------------------


class Feature(NamedTuple):
    """One feature tensor, or its gradient, as (B, C, N).

    ``batch``, ``line`` (the stride of whichever of C and N is not contiguous) and ``inner`` (the
    size of the one that is) are given in units of ALIGN elements: multiplied back in the kernel,
    they tell the compiler how wide an access may be.
    """

    data: Any
    batch: int
    line: int
    inner: int
    outer: int
    PLANAR: Any
    ALIGN: Any
    WIDE: Any  # offsets within a sample need 64 bits
    BLOCK_C: Any
    BLOCK_N: Any


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
def addresses(feature, b, c, n):
    """Addresses in sample ``b``; channels and positions broadcast."""
    if feature.WIDE:
        c = c.to(tl.int64)
        n = n.to(tl.int64)
    if feature.PLANAR:
        offsets = c * feature.line * feature.ALIGN + n
    else:
        offsets = c + n * feature.line * feature.ALIGN
    return feature.data + b.to(tl.int64) * feature.batch * feature.ALIGN + offsets


# ---- powers, to fp32's last digits ---------------------------------------------------------------


@triton.jit
def _power_fp32(a, P: tl.constexpr):
    # a = 2^e * m with m about 1, so that a^p = 2^(p e) * 2^(p log2 m). With log2(a) in one number
    # the rounding of p log2(a), which may be 100, would go into the result's fourth digit from the
    # end. HIGH is p to 8 binary places: HIGH * e is exact.
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
    # 2^whole as two factors, as it may be past what one can be.
    n = tl.minimum(tl.maximum(whole, -252.0), 252.0).to(tl.int32)
    half = n >> 1
    first = ((half + 127) << 23).to(tl.float32, bitcast=True)
    second = ((n - half + 127) << 23).to(tl.float32, bitcast=True)
    return fraction * first * second


@triton.jit
def _power(x, P: tl.constexpr):
    a = tl.abs(x)
    regular = (a > 0.0) & (a < float("inf"))  # else 0, inf and NaN as they are
    safe = tl.where(regular, a, 1.0)
    if x.dtype == tl.float64:
        powered = tl.exp2(P * tl.log2(safe))
    else:
        powered = _power_fp32(safe, P)
    return tl.where(regular, powered, a)


@triton.jit
def power(x, P: tl.constexpr):
    """|x|^p."""
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
    """|x|^(p-1) * sign(x)."""
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
    """Write k[n] * |x|^(p-1) * sign(x) for one tile, plus the addend's where there is one."""
    mask = (c < channels_of(feature))[:, None] & (n < positions_of(feature))[None, :]
    x = tl.load(addresses(feature, b, c[:, None], n[None, :]), mask=mask, other=0.0)
    result = k[None, :] * slope(x.to(k.dtype), P)
    if addend is not None:
        before = tl.load(addresses(addend, b, c[:, None], n[None, :]), mask=mask, other=0.0)
        result += before.to(k.dtype)
    place = addresses(gradient, b, c[:, None], n[None, :])
    tl.store(place, result.to(gradient.data.dtype.element_ty), mask=mask)
