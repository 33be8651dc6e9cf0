"""Powers of features and their slopes, to fp32's last digits."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _power_fp32(a, HIGH: tl.constexpr, LOW: tl.constexpr):
    # a = 2^e * m with m about 1, so that a^q = 2^(q e) * 2^(q log2 m). With log2(a) in one number
    # the rounding of q log2(a), which may be 100, would go into the result's fourth digit from the
    # end. HIGH is q to 8 binary places: HIGH * e is exact.
    small = a < 1.1754943508222875e-38
    bits = tl.where(small, a * 16777216.0, a).to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23  # m in [sqrt(1/2), sqrt(2))
    m = (bits - (e << 23)).to(tl.float32, bitcast=True)
    exponent = tl.where(small, e - 24, e).to(tl.float32)
    high = HIGH * exponent
    low = (HIGH + LOW) * tl.log2(m) + LOW * exponent
    whole = tl.floor(high + low + 0.5)
    fraction = tl.exp2((high - whole) + low)
    # 2^whole as two factors, as it may be past what one can be.
    n = tl.minimum(tl.maximum(whole, -252.0), 252.0).to(tl.int32)
    half = n >> 1
    first = ((half + 127) << 23).to(tl.float32, bitcast=True)
    second = ((n - half + 127) << 23).to(tl.float32, bitcast=True)
    return fraction * first * second


@triton.jit
def _power(x, HIGH: tl.constexpr, LOW: tl.constexpr):
    a = tl.abs(x)
    plain = (a > 0.0) & (a < float("inf"))  # else 0, inf and NaN as they are
    safe = tl.where(plain, a, 1.0)
    if x.dtype == tl.float64:
        powered = tl.exp2((HIGH + LOW) * tl.log2(safe))
    else:
        powered = _power_fp32(safe, HIGH, LOW)
    return tl.where(plain, powered, a)


@triton.jit
def power(x, HIGH: tl.constexpr, LOW: tl.constexpr):
    """|x|^p, p = HIGH + LOW."""
    if HIGH + LOW == 2.0:
        y = x * x
    elif HIGH + LOW == 1.0:
        y = tl.abs(x)
    elif HIGH + LOW == 4.0:
        y = (x * x) * (x * x)
    elif HIGH + LOW == 3.0:
        y = x * x * tl.abs(x)
    else:
        y = _power(x, HIGH, LOW)
    return y


@triton.jit
def slope(x, HIGH: tl.constexpr, LOW: tl.constexpr):
    """|x|^(p-1) * sign(x)."""
    if HIGH + LOW == 2.0:
        y = x
    elif HIGH + LOW == 1.0:
        y = tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))
    elif HIGH + LOW == 4.0:
        y = x * x * x
    elif HIGH + LOW == 3.0:
        y = x * tl.abs(x)
    else:
        y = _power(x, HIGH - 1.0, LOW)
        y = tl.where(x < 0, -y, y)
    return y
