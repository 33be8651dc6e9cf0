"""The Triton kernels: forward (``loss_kernel``, ``map_kernel``) and backward (``sweep_kernel``).

A launch takes a whole list: a tuple of records (the ``NamedTuple`` classes below), and each program
finds by its number the entry that it works for. Fields in lower case are values of that call, those
in upper case are compiled in.

A tile is BLOCK_C channels by BLOCK_N positions of one sample, in both layouts: only the strides
differ, and Triton deals the threads out along the one that is 1.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


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


class Pair(NamedTuple):
    """A student and a teacher; ``gradient`` where this launch writes dL/dS too."""

    student: Feature
    teacher: Feature
    gradient: Gradient | None
    weight: int  # a double, by its bits: Triton would round a float to fp32
    number: int
    samples: int
    first_sample: int
    first_program: int
    end_program: int
    pieces: int
    SPAN: Any  # positions of a piece; 0 where a program has whole samples
    BLOCK: Any  # elements of a map that are finished at a time


class Map(NamedTuple):
    """A feature whose map is wanted."""

    feature: Feature
    first_program: int
    end_program: int
    pieces: int
    SPAN: Any


class Sweep(NamedTuple):
    """A feature (its ``map`` holds the coefficients) whose gradient is wanted."""

    feature: Feature
    gradient: Gradient
    number: int
    first_program: int
    end_program: int
    tiles_c: int
    tiles_n: int


# ---- powers --------------------------------------------------------------------------------------


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
        powered = _power(x, HIGH - 1.0, LOW)
        y = tl.where(x < 0, -powered, powered)
    return y


# ---- tiles ---------------------------------------------------------------------------------------


@triton.jit
def _double(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _channels(feature):
    if feature.PLANAR:
        size = feature.outer
    else:
        size = feature.inner * feature.ALIGN
    return size


@triton.jit
def _positions(feature):
    if feature.PLANAR:
        size = feature.inner * feature.ALIGN
    else:
        size = feature.outer
    return size


@triton.jit
def _sample(array, b):
    """Where sample ``b`` of a feature or gradient begins."""
    return array.data + b.to(tl.int64) * array.batch * array.ALIGN


@triton.jit
def _offsets(array, c, n, PLANAR: tl.constexpr):
    if array.WIDE:
        c = c.to(tl.int64)
        n = n.to(tl.int64)
    if PLANAR:
        offsets = c[:, None] * array.line * array.ALIGN + n[None, :]
    else:
        offsets = c[:, None] + n[None, :] * array.line * array.ALIGN
    return offsets


@triton.jit
def _store_map(feature, b, begin, SPAN: tl.constexpr, HIGH, LOW, MEAN: tl.constexpr):
    """Writes the raw map of one sample at the positions [begin, begin + SPAN)."""
    ACC: tl.constexpr = feature.map.dtype.element_ty
    channels = _channels(feature)
    positions = _positions(feature)
    end = positions
    if SPAN:
        end = tl.minimum(begin + SPAN, positions)
    data = _sample(feature, b)
    out = feature.map + b.to(tl.int64) * positions
    for start in range(begin, end, feature.BLOCK_N):
        n = start + tl.arange(0, feature.BLOCK_N)
        inside = n < positions
        total = tl.zeros([feature.BLOCK_C, feature.BLOCK_N], ACC)
        for first in range(0, channels, feature.BLOCK_C):
            c = first + tl.arange(0, feature.BLOCK_C)
            x = tl.load(
                data + _offsets(feature, c, n, feature.PLANAR),
                mask=(c < channels)[:, None] & inside[None, :],
                other=0.0,
            )
            total += power(x.to(ACC), HIGH, LOW)
        collapsed = tl.sum(total, 0)
        if MEAN:
            collapsed = collapsed / channels
        tl.store(out + n, collapsed, mask=inside)


@triton.jit
def _store_gradient(feature, gradient, k, b, c, n, HIGH: tl.constexpr, LOW: tl.constexpr):
    """Writes k[n] * |x|^(p-1) * sign(x) for one tile."""
    mask = (c < _channels(feature))[:, None] & (n < _positions(feature))[None, :]
    x = tl.load(_sample(feature, b) + _offsets(feature, c, n, feature.PLANAR), mask=mask, other=0.0)
    result = k[None, :] * slope(x.to(k.dtype), HIGH, LOW)
    tl.store(
        _sample(gradient, b) + _offsets(gradient, c, n, feature.PLANAR),
        result.to(gradient.data.dtype.element_ty),
        mask=mask,
    )


# ---- one sample ----------------------------------------------------------------------------------


@triton.jit
def _load_map(out, n, positions):
    # Past the first-level cache: another program may have written it.
    return tl.load(out + n, mask=n < positions, other=0.0, cache_modifier=".cg").to(tl.float64)


@triton.jit
def _norm(squares, eps):
    return tl.where(squares <= eps * eps, eps, tl.sqrt(squares))


@triton.jit
def _finish_sample(
    pair,
    b,
    eps,
    factor,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
    MEAN: tl.constexpr,
    PAPER: tl.constexpr,
    STUDENT_GRAD: tl.constexpr,
    TEACHER_GRAD: tl.constexpr,
):
    """Loss of one sample from its raw maps, which it replaces by ``factor`` * k; all in fp64."""
    positions = _positions(pair.student)
    s_map = pair.student.map + b.to(tl.int64) * positions
    t_map = pair.teacher.map + b.to(tl.int64) * positions
    block = tl.arange(0, pair.BLOCK)

    s_squares = tl.zeros([pair.BLOCK], tl.float64)
    t_squares = tl.zeros([pair.BLOCK], tl.float64)
    for start in range(0, positions, pair.BLOCK):
        s = _load_map(s_map, start + block, positions)
        t = _load_map(t_map, start + block, positions)
        s_squares += s * s
        t_squares += t * t
    s_norm = _norm(tl.sum(s_squares, 0), eps)
    t_norm = _norm(tl.sum(t_squares, 0), eps)

    squares = tl.zeros([pair.BLOCK], tl.float64)
    s_along = tl.zeros([pair.BLOCK], tl.float64)
    t_along = tl.zeros([pair.BLOCK], tl.float64)
    for start in range(0, positions, pair.BLOCK):
        # Divided, not multiplied by an inverse: a single position is exactly 1 on both sides.
        s = _load_map(s_map, start + block, positions) / s_norm
        t = _load_map(t_map, start + block, positions) / t_norm
        squares += (s - t) * (s - t)
        s_along += s * (s - t)
        t_along += t * (s - t)
    square = tl.sum(squares, 0)

    share = _double(pair.weight) / pair.samples
    if PAPER:
        distance = tl.sqrt(square)
        loss = share * distance
        slope = tl.where(square == 0.0, 0.0, share / tl.where(square == 0.0, 1.0, distance))
    else:
        loss = share * (square / positions)
        slope = 2.0 * share / positions

    if STUDENT_GRAD or TEACHER_GRAD:
        slope *= factor * (HIGH + LOW)
        # Below eps a map is divided by a constant: nothing to project out.
        s_sum = tl.where(s_norm <= eps, 0.0, tl.sum(s_along, 0))
        t_sum = tl.where(t_norm <= eps, 0.0, tl.sum(t_along, 0))
        s_slope = slope / s_norm
        t_slope = slope / t_norm
        if MEAN:
            s_slope = s_slope / _channels(pair.student)
            t_slope = t_slope / _channels(pair.teacher)
        for start in range(0, positions, pair.BLOCK):
            n = start + block
            s = _load_map(s_map, n, positions) / s_norm
            t = _load_map(t_map, n, positions) / t_norm
            if STUDENT_GRAD:
                k = ((s - t) - s * s_sum) * s_slope
                tl.store(s_map + n, k.to(s_map.dtype.element_ty), mask=n < positions)
            if TEACHER_GRAD:
                k = (t * t_sum - (s - t)) * t_slope
                tl.store(t_map + n, k.to(t_map.dtype.element_ty), mask=n < positions)
    return loss


@triton.jit
def _sweep_sample(pair, b, HIGH: tl.constexpr, LOW: tl.constexpr):
    """The gradient of one sample, whose coefficients this program has just written."""
    positions = _positions(pair.student)
    channels = _channels(pair.student)
    coefficients = pair.student.map + b.to(tl.int64) * positions
    for start in range(0, positions, pair.student.BLOCK_N):
        n = start + tl.arange(0, pair.student.BLOCK_N)
        k = tl.load(coefficients + n, mask=n < positions, other=0.0, cache_modifier=".cg")
        for first in range(0, channels, pair.student.BLOCK_C):
            c = first + tl.arange(0, pair.student.BLOCK_C)
            _store_gradient(pair.student, pair.gradient, k, b, c, n, HIGH, LOW)


# ---- the last one --------------------------------------------------------------------------------
#
# Programs that work on one thing count themselves; the last to come finds all of it done, and does
# what is left. The counter is back at 0 then, ready for the next launch.


@triton.jit
def _is_last(counter, count):
    # All threads have written before one of them says so.
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == count - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def _sum_in_order(values, count):
    BLOCK: tl.constexpr = 128
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(values + i, mask=i < count, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0)


@triton.jit
def _add_up(pair, b, value, losses, counters, loss, samples, pairs, SUM: tl.constexpr):
    """Adds the sample's loss: in the order of the samples, whichever program comes last."""
    tl.store(losses + pair.first_sample + b, value)
    if _is_last(counters + samples + pair.number, pair.samples):
        total = _sum_in_order(losses + pair.first_sample, pair.samples)
        if SUM:
            tl.store(losses + samples + pair.number, total)
            if _is_last(counters + samples + pairs, pairs):
                everything = _sum_in_order(losses + samples, pairs)
                tl.store(loss, everything.to(loss.dtype.element_ty))
        else:
            tl.store(loss + pair.number, total.to(loss.dtype.element_ty))


# ---- kernels -------------------------------------------------------------------------------------
#
# A record is always named by its place (``entries[i]``) or passed on: bound to a variable, it would
# lose which of its fields are compiled in.


@triton.jit
def _loss_of_pair(
    pair,
    local,
    loss,
    losses,
    counters,
    samples,
    pairs,
    eps,
    scale,
    loss_gradient,
    gradient_step,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
    MEAN: tl.constexpr,
    PAPER: tl.constexpr,
    SUM: tl.constexpr,
    STUDENT_GRAD: tl.constexpr,
    TEACHER_GRAD: tl.constexpr,
):
    """The work of the pair's program number ``local``."""
    b = local // pair.pieces
    begin = (local % pair.pieces) * pair.SPAN
    _store_map(pair.student, b, begin, pair.SPAN, HIGH, LOW, MEAN)
    _store_map(pair.teacher, b, begin, pair.SPAN, HIGH, LOW, MEAN)
    mine = True
    if pair.SPAN:
        mine = _is_last(counters + pair.first_sample + b, pair.pieces)
    else:
        tl.debug_barrier()
    if mine:
        factor = _double(scale)
        if loss_gradient is not None:
            factor *= tl.load(loss_gradient + pair.number * gradient_step).to(tl.float64)
        value = _finish_sample(
            pair, b, _double(eps), factor, HIGH, LOW, MEAN, PAPER, STUDENT_GRAD, TEACHER_GRAD
        )
        if pair.gradient is not None:
            tl.debug_barrier()
            _sweep_sample(pair, b, HIGH, LOW)
        _add_up(pair, b, value, losses, counters, loss, samples, pairs, SUM)


@triton.jit(do_not_specialize=["samples", "pairs", "eps", "scale"])
def loss_kernel(
    entries,
    loss,
    losses,
    counters,
    samples,
    pairs,
    eps,
    scale,
    loss_gradient,
    gradient_step,
    COUNT: tl.constexpr,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
    MEAN: tl.constexpr,
    PAPER: tl.constexpr,
    SUM: tl.constexpr,
    STUDENT_GRAD: tl.constexpr,
    TEACHER_GRAD: tl.constexpr,
):
    """Maps, losses, coefficients, and gradients where an entry (``Pair``) has a place for them.

    A program has a whole sample, or a piece of one: the last of a sample's programs finishes it.
    ``losses`` (fp64) and ``counters`` (int32, all 0) hold an element per sample, then one per pair,
    then one more.
    """
    program = tl.program_id(0)
    for i in tl.static_range(COUNT):
        if (program >= entries[i].first_program) & (program < entries[i].end_program):
            _loss_of_pair(
                entries[i],
                program - entries[i].first_program,
                loss,
                losses,
                counters,
                samples,
                pairs,
                eps,
                scale,
                loss_gradient,
                gradient_step,
                HIGH,
                LOW,
                MEAN,
                PAPER,
                SUM,
                STUDENT_GRAD,
                TEACHER_GRAD,
            )


@triton.jit
def _map_of_feature(entry, local, HIGH: tl.constexpr, LOW: tl.constexpr, MEAN: tl.constexpr):
    begin = (local % entry.pieces) * entry.SPAN
    _store_map(entry.feature, local // entry.pieces, begin, entry.SPAN, HIGH, LOW, MEAN)


@triton.jit
def map_kernel(
    entries, COUNT: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr, MEAN: tl.constexpr
):
    """The raw maps of a list of features (``Map``)."""
    program = tl.program_id(0)
    for i in tl.static_range(COUNT):
        if (program >= entries[i].first_program) & (program < entries[i].end_program):
            _map_of_feature(entries[i], program - entries[i].first_program, HIGH, LOW, MEAN)


@triton.jit
def _sweep_of_feature(
    feature,
    entry,
    local,
    loss_gradient,
    gradient_step,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
):
    tile_n = local % entry.tiles_n
    rest = local // entry.tiles_n
    b = rest // entry.tiles_c
    c = (rest % entry.tiles_c) * feature.BLOCK_C + tl.arange(0, feature.BLOCK_C)
    n = tile_n * feature.BLOCK_N + tl.arange(0, feature.BLOCK_N)
    positions = _positions(feature)
    k = tl.load(feature.map + b.to(tl.int64) * positions + n, mask=n < positions, other=0.0)
    if loss_gradient is not None:
        k *= tl.load(loss_gradient + entry.number * gradient_step).to(k.dtype)
    _store_gradient(feature, entry.gradient, k, b, c, n, HIGH, LOW)


@triton.jit
def sweep_kernel(
    entries,
    loss_gradient,
    gradient_step,
    COUNT: tl.constexpr,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
):
    """The gradients of a list of features (``Sweep``), a tile to a program."""
    program = tl.program_id(0)
    for i in tl.static_range(COUNT):
        if (program >= entries[i].first_program) & (program < entries[i].end_program):
            _sweep_of_feature(
                entries[i].feature,
                entries[i],
                program - entries[i].first_program,
                loss_gradient,
                gradient_step,
                HIGH,
                LOW,
            )
