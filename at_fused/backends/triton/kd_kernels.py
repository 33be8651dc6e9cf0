"""Hinton's loss in Triton: a program has a row of logits.

d_k = log(q_k / p_k) = (t_k - s_k - c) / T, one c for the row, is made from the difference of the
logits, without its rounding: at high temperatures it is all that is left, and small. Where it is,
whatever is made of it is a series: e^-d - 1 + d = d^2 g(d), e^-d - 1 = d^2 g(d) - d.

Numbers that are not whole come as the bits of a double: Triton would round a float to fp32.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from at_fused.backends.results import STATISTICS
from at_fused.backends.triton.finish import double, is_last

_STATISTICS = tl.constexpr(STATISTICS)
# Not what a kernel is compiled for.
_NUMBERS = ["label_stride", "rows", "temperature", "alpha", "label_smoothing", "ignore_index"]

# ---- functions -----------------------------------------------------------------------------------


@triton.jit
def _g(d):
    """(e^-d - 1 + d) / d^2 for |d| < 1/2."""
    if d.dtype == tl.float64:
        total = -7.647163731819816e-13 + d * 4.779477332387385e-14
        total = -1.6059043836821613e-10 + d * (1.1470745597729725e-11 + d * total)
        total = -2.505210838544172e-08 + d * (2.08767569878681e-09 + d * total)
        total = -2.7557319223985893e-06 + d * (2.755731922398589e-07 + d * total)
        total = -0.0001984126984126984 + d * (2.48015873015873e-05 + d * total)
        total = -0.008333333333333333 + d * (0.001388888888888889 + d * total)
        total = -0.16666666666666666 + d * (0.041666666666666664 + d * total)
        total = 0.5 + d * total
    else:
        total = 0.0013982186 - d * 0.000199448744
        total = 0.0416657912 + d * (-0.00833323613 + d * total)
        total = 0.500000012 + d * (-0.166666668 + d * total)
    return total


@triton.jit
def _log1p(x):
    series = x * (1.0 + x * (-0.5 + x * (1.0 / 3.0 + x * (-0.25 + x * (0.2 - x / 6.0)))))
    return tl.where(tl.abs(x) > 1e-3, tl.log(1.0 + x), series)


@triton.jit
def _log1p_excess(x):
    """log(1 + x) - x."""
    series = x * x * (-0.5 + x * (1.0 / 3.0 + x * (-0.25 + x * (0.2 - x / 6.0))))
    return tl.where(tl.abs(x) > 1e-3, tl.log(1.0 + x) - x, series)


@triton.jit
def _exact(a, b):
    """The sum a + b as its rounding and the rest."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


@triton.jit
def _shift(s_max, t_max, quotient, temperature, ACC: tl.constexpr):
    """Splits c = t_max - s_max - T * quotient in three numbers, which have all its digits."""
    maxima, rest = _exact(t_max, -s_max)
    c, lost = _exact(maxima, -temperature * quotient)
    high = c.to(ACC)
    rests, last = _exact(lost, rest)
    left, least = _exact(c - high.to(tl.float64), rests)
    low = left.to(ACC)
    return high, low, ((left - low.to(tl.float64)) + least + last).to(ACC)


@triton.jit
def _difference(s, t, high, low, least, inverse):
    """(t - s - c) / T, with the digits that t - s has beyond those of its dtype."""
    whole = t - s
    part = whole - t
    rest = (t - (whole - part)) - (s + part)
    small = tl.where(tl.abs(whole) < float("inf"), (rest - low) - least, 0.0)
    return ((whole - high) + small) * inverse


@triton.jit
def _load(row, k, K, ACC: tl.constexpr):
    return tl.load(row + k, mask=k < K, other=float("-inf")).to(ACC)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """``x.to(dtype)``; by way of fp32 from fp64, which the interpreter does not take to bf16."""
    if x.dtype == tl.float64 and dtype != tl.float64:
        x = x.to(tl.float32)
    return x.to(dtype)


@triton.jit
def _class(labels, b, stride, K, ignore_index):
    """The row's label: a class, -1 for one that is ignored, -2 for one that is neither."""
    label = tl.load(labels + b.to(tl.int64) * stride)
    wrong = (label < 0) | (label >= K)
    return tl.where(label == ignore_index, -1, tl.where(wrong, -2, label))


# ---- forward -------------------------------------------------------------------------------------


@triton.jit
def _divergence(
    s_row,
    t_row,
    K,
    s_max,
    t_max,
    s_sum,
    t_sum,
    quotient,
    temperature,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """The divergence once more, by terms that do not cancel."""
    inverse = (1.0 / temperature).to(ACC)
    high, low, least = _shift(s_max, t_max, quotient, temperature, ACC)
    s_scale = (1.0 / s_sum).to(ACC)
    t_scale = (1.0 / t_sum).to(ACC)
    total = tl.zeros([BLOCK], ACC)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        s = _load(s_row, k, K, ACC)
        t = _load(t_row, k, K, ACC)
        p = tl.exp((s - s_max.to(ACC)) * inverse) * s_scale
        q = tl.exp((t - t_max.to(ACC)) * inverse) * t_scale
        d = _difference(s, t, high, low, least, inverse)
        weighted = tl.where(q == 0.0, q, q * d)
        small = (tl.abs(d) < 0.5) & (q > 0.0)
        total += tl.where(small, weighted * d * _g(d), (p - q) + weighted)
    return tl.sum(total.to(tl.float64), 0)


@triton.jit
def _sum_of_rows(stats, column: tl.constexpr, rows):
    BLOCK: tl.constexpr = 128
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, rows, BLOCK):
        i = start + tl.arange(0, BLOCK)
        at = stats + i.to(tl.int64) * _STATISTICS + column
        total += tl.load(at, mask=i < rows, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0)


@triton.jit
def _labels_that_count(labels, stride, rows, ignore_index):
    BLOCK: tl.constexpr = 128
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, rows, BLOCK):
        i = start + tl.arange(0, BLOCK)
        label = tl.load(labels + i.to(tl.int64) * stride, mask=i < rows, other=0)
        total += tl.where((label != ignore_index) & (i < rows), 1.0, 0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=_NUMBERS)
def kd_loss_kernel(
    student,
    teacher,
    labels,
    stats,
    loss,
    valid,
    counter,
    student_stride,
    teacher_stride,
    label_stride,
    classes,
    rows,
    temperature,
    alpha,
    label_smoothing,
    ignore_index,
    DIVERGENCE: tl.constexpr,
    ENTROPY: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """The loss, the statistics of each row (``results.STATISTICS``), and how many labels count."""
    b = tl.program_id(0)
    K = classes * ALIGN
    T = double(temperature)
    smoothing = double(label_smoothing)
    s_row = student + b.to(tl.int64) * student_stride * ALIGN
    t_row = teacher + b.to(tl.int64) * teacher_stride * ALIGN

    s_top = tl.full([BLOCK], float("-inf"), ACC)
    t_top = tl.full([BLOCK], float("-inf"), ACC)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        s_top = tl.maximum(s_top, _load(s_row, k, K, ACC))
        t_top = tl.maximum(t_top, _load(t_row, k, K, ACC))
    s_max = tl.max(s_top, 0)
    t_max = tl.max(t_top, 0)

    # Of e^((s - max) / T), e^((t - max) / T), q (e^-u - 1) and q (e^-u - 1 + u), without the sum
    # under q; u is d but for a constant. Of e^(s - max) below the maximum, how often that is, and
    # of s - max.
    inverse = (1.0 / T).to(ACC)
    s_wide = s_max.to(tl.float64)
    t_wide = t_max.to(tl.float64)
    high, low, least = _shift(s_wide, t_wide, 0.0 * T, T, ACC)
    s_sums = tl.zeros([BLOCK], ACC)
    t_sums = tl.zeros([BLOCK], ACC)
    excess = tl.zeros([BLOCK], ACC)
    curve = tl.zeros([BLOCK], ACC)
    others = tl.zeros([BLOCK], ACC)
    tops = tl.zeros([BLOCK], ACC)
    below = tl.zeros([BLOCK], ACC)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        s = _load(s_row, k, K, ACC)
        under = s - s_max
        if DIVERGENCE:
            t = _load(t_row, k, K, ACC)
            s_exp = tl.exp(under * inverse)
            t_exp = tl.exp((t - t_max) * inverse)
            u = _difference(s, t, high, low, least, inverse)
            small = (tl.abs(u) < 0.5) & (t_exp > 0.0)
            weighted = tl.where(t_exp == 0.0, t_exp, t_exp * u)
            series = weighted * u * _g(u)
            plain = s_exp - t_exp
            s_sums += s_exp
            t_sums += t_exp
            excess += tl.where(small, series - weighted, plain)
            curve += tl.where(small, series, plain + weighted)
        if ENTROPY:
            top = under == 0.0
            others += tl.where(top, 0.0, tl.exp(under))
            tops += tl.where(top, 1.0, 0.0)
            below += tl.where(k < K, under, 0.0)

    s_sum = tl.sum(s_sums.to(tl.float64), 0)
    t_sum = tl.sum(t_sums.to(tl.float64), 0)
    quotient = 0.0 * s_sum
    kl = 0.0 * s_sum
    if DIVERGENCE:
        x = tl.sum(excess.to(tl.float64), 0) / t_sum
        most = tl.sum(curve.to(tl.float64), 0) / t_sum
        near = x > -0.5
        far = tl.log(tl.where(near, 1.0, s_sum / t_sum))
        safe = tl.where(near, x, 0.0)
        quotient = tl.where(near, _log1p(safe), far)
        kl = most + tl.where(near, _log1p_excess(safe), far - x)
        # Where little is left of it, most logits differ by another constant than the largest.
        if not (kl >= most / 8.0):
            kl = _divergence(s_row, t_row, K, s_wide, t_wide, s_sum, t_sum, quotient, T, BLOCK, ACC)

    ce_sum = 0.0 * T
    ce = 0.0 * T
    if ENTROPY:
        rest = tl.sum(others.to(tl.float64), 0) + (tl.sum(tops.to(tl.float64), 0) - 1.0)
        log_sum = _log1p(rest)
        label = _class(labels, b, label_stride, K, ignore_index)
        chosen = tl.load(s_row + label, mask=label >= 0, other=0.0).to(tl.float64)
        even = log_sum - tl.sum(below.to(tl.float64), 0) / K
        # Not 0 * even: that of an excluded class is infinite.
        even = tl.where(smoothing > 0.0, smoothing * even, 0.0)
        ce = (1.0 - smoothing) * (log_sum - (chosen - s_wide)) + even
        ce = tl.where(label >= 0, ce, tl.where(label == -1, 0.0, float("nan")))
        ce_sum = tl.where(label == -2, float("nan"), 1.0 + rest)

    row = stats + b.to(tl.int64) * _STATISTICS
    tl.store(row + 0, s_wide)
    tl.store(row + 1, s_sum)
    tl.store(row + 2, t_wide)
    tl.store(row + 3, t_sum)
    tl.store(row + 4, quotient)
    tl.store(row + 5, kl)
    tl.store(row + 6, ce_sum)
    tl.store(row + 7, ce)
    if is_last(counter, rows):
        total = 0.0 * T
        count = 0.0 * T
        if DIVERGENCE:
            total += _sum_of_rows(stats, 5, rows) * (double(alpha) * T * T / rows)
        if ENTROPY:
            count = _labels_that_count(labels, label_stride, rows, ignore_index)
            total += (1.0 - double(alpha)) * _sum_of_rows(stats, 7, rows) / count
        tl.store(valid, count)
        tl.store(loss, total.to(loss.dtype.element_ty))


# ---- backward ------------------------------------------------------------------------------------


@triton.jit
def _pull(s, t, t_max, t_scale, high, low, least, inverse, kl):
    q = tl.exp((t - t_max) * inverse) * t_scale
    d = _difference(s, t, high, low, least, inverse)
    return tl.where(q == 0.0, q, q * (d - kl))


@triton.jit(do_not_specialize=_NUMBERS)
def kd_loss_backward_kernel(
    student,
    teacher,
    labels,
    stats,
    valid,
    gradient,
    student_gradient,
    teacher_gradient,
    student_stride,
    teacher_stride,
    student_gradient_stride,
    teacher_gradient_stride,
    label_stride,
    classes,
    rows,
    temperature,
    alpha,
    label_smoothing,
    ignore_index,
    DIVERGENCE: tl.constexpr,
    ENTROPY: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """The gradients of the logits, where there is a place for them, from the rows' statistics."""
    b = tl.program_id(0)
    K = classes * ALIGN
    T = double(temperature)
    smoothing = double(label_smoothing)
    s_row = student + b.to(tl.int64) * student_stride * ALIGN
    t_row = teacher + b.to(tl.int64) * teacher_stride * ALIGN
    row = stats + b.to(tl.int64) * _STATISTICS
    s_wide = tl.load(row)
    t_wide = tl.load(row + 2)
    t_sum = tl.load(row + 3)
    s_max = s_wide.to(ACC)
    t_max = t_wide.to(ACC)
    inverse = (1.0 / T).to(ACC)
    s_scale = (1.0 / tl.load(row + 1)).to(ACC)
    t_scale = (1.0 / t_sum).to(ACC)
    kl = tl.load(row + 5).to(ACC)
    high, low, least = _shift(s_wide, t_wide, tl.load(row + 4), T, ACC)
    g = tl.load(gradient).to(tl.float64)
    factor = (g * double(alpha) * T / rows).to(ACC)

    label = tl.full([], -1, tl.int64)
    own = (0.0 * T).to(ACC)
    even = own
    e_scale = own
    if ENTROPY:
        label = _class(labels, b, label_stride, K, ignore_index)
        ce_sum = tl.load(row + 6)
        count = tl.load(valid)
        entropy = g * (1.0 - double(alpha)) / tl.where(count < 1.0, 1.0, count)
        entropy = tl.where(label == -1, 0.0, entropy)
        chosen = tl.load(s_row + label, mask=label >= 0, other=0.0).to(tl.float64)
        e = tl.exp(chosen - s_wide)
        # p - 1 as what the other classes have: fp32 would leave nothing of it for a sure student.
        own = (
            entropy * ((e - ce_sum) / ce_sum + smoothing * (1.0 - 1.0 / tl.cast(K, tl.float64)))
        ).to(ACC)
        even = (entropy * smoothing / K).to(ACC)
        e_scale = (entropy / ce_sum).to(ACC)

    # A class that has more than half: what it has of the teacher's gradient, whose row sums to 0,
    # is less than the rounding of d - KL.
    sure_top = tl.where(t_sum < 2.0, t_max, float("inf"))
    others = own * 0.0
    if teacher_gradient is not None:
        if DIVERGENCE:
            total = tl.zeros([BLOCK], ACC)
            for start in range(0, K, BLOCK):
                k = start + tl.arange(0, BLOCK)
                s = _load(s_row, k, K, ACC)
                t = _load(t_row, k, K, ACC)
                pull = _pull(s, t, t_max, t_scale, high, low, least, inverse, kl)
                total += tl.where(t == t_max, 0.0, pull)
            others = (factor * tl.sum(total.to(tl.float64), 0)).to(ACC)

    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        s = _load(s_row, k, K, ACC)
        t = _load(t_row, k, K, ACC)
        if student_gradient is not None:
            under = s - s_max
            found = tl.zeros([BLOCK], ACC)
            if DIVERGENCE:
                q = tl.exp((t - t_max) * inverse) * t_scale
                d = _difference(s, t, high, low, least, inverse)
                weighted = q * d
                small = (tl.abs(d) < 0.5) & (q > 0.0)
                plain = tl.exp(under * inverse) * s_scale - q
                found += factor * tl.where(small, weighted * d * _g(d) - weighted, plain)
            if ENTROPY:
                found += tl.where(k == label, own, tl.exp(under) * e_scale - even)
            out = student_gradient + b.to(tl.int64) * student_gradient_stride * ALIGN + k
            tl.store(out, narrow(found, student_gradient.dtype.element_ty), mask=k < K)
        if teacher_gradient is not None:
            pulled = tl.zeros([BLOCK], ACC)
            if DIVERGENCE:
                pulled = factor * _pull(s, t, t_max, t_scale, high, low, least, inverse, kl)
                pulled = tl.where(t == sure_top, -others, pulled)
            out = teacher_gradient + b.to(tl.int64) * teacher_gradient_stride * ALIGN + k
            tl.store(out, narrow(pulled, teacher_gradient.dtype.element_ty), mask=k < K)
