"""From raw maps to losses and coefficients: what a sample is finished with, and who adds up."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from at_fused.backends.triton.scalars import number

# ---- one sample ----------------------------------------------------------------------------------


@triton.jit
def _load_map(out, factors, n, positions):
    # Past the first-level cache: another program may have written it.
    q = tl.load(out + n, mask=n < positions, other=0.0, cache_modifier=".cg").to(tl.float64)
    return _masked(q, factors, n, positions)


@triton.jit
def _masked(values, factors, n, positions):
    if factors is not None:
        values *= tl.load(factors + n, mask=n < positions, other=0.0).to(tl.float64)
    return values


@triton.jit
def _divisor(squares, eps, ADD: tl.constexpr):
    """What a map Q is divided by, to q; and (Q / ||Q||) / q, 0 where the norm has no part in q."""
    if ADD:
        norm = tl.sqrt(squares)
        divisor = norm + eps
        unit = tl.where(norm == 0.0, 0.0, divisor / tl.where(norm == 0.0, 1.0, norm))
    else:
        constant = squares <= eps * eps
        divisor = tl.where(constant, eps, tl.sqrt(squares))
        unit = tl.where(constant, 0.0, 1.0)
    return divisor, unit


@triton.jit
def finish_sample(
    s_map,
    t_map,
    s_out,
    t_out,
    factors,
    positions,
    share,
    eps,
    s_factor,
    t_factor,
    BLOCK: tl.constexpr,
    PAPER: tl.constexpr,
    ADD: tl.constexpr,
):
    """Loss of one sample from its raw maps, and where there is a place for it factor * dL/dQ.

    All in fp64. ``share`` is what the sample counts; a place may be the map itself. ``factors`` is
    the sample's mask, which multiplies both maps, or None.
    """
    block = tl.arange(0, BLOCK)
    s_squares = tl.zeros([BLOCK], tl.float64)
    t_squares = tl.zeros([BLOCK], tl.float64)
    for start in range(0, positions, BLOCK):
        s = _load_map(s_map, factors, start + block, positions)
        t = _load_map(t_map, factors, start + block, positions)
        s_squares += s * s
        t_squares += t * t
    s_divisor, s_unit = _divisor(tl.sum(s_squares, 0), eps, ADD)
    t_divisor, t_unit = _divisor(tl.sum(t_squares, 0), eps, ADD)

    squares = tl.zeros([BLOCK], tl.float64)
    s_along = tl.zeros([BLOCK], tl.float64)
    t_along = tl.zeros([BLOCK], tl.float64)
    for start in range(0, positions, BLOCK):
        # Divided, not multiplied by an inverse: a single position is exactly 1 on both sides.
        s = _load_map(s_map, factors, start + block, positions) / s_divisor
        t = _load_map(t_map, factors, start + block, positions) / t_divisor
        squares += (s - t) * (s - t)
        s_along += s * (s - t)
        t_along += t * (s - t)
    square = tl.sum(squares, 0)

    if PAPER:
        distance = tl.sqrt(square)
        loss = share * distance
        slope = tl.where(square == 0.0, 0.0, share / tl.where(square == 0.0, 1.0, distance))
    else:
        loss = share * (square / positions)
        slope = 2.0 * share / positions

    if s_out is not None or t_out is not None:
        s_sum = s_unit * tl.sum(s_along, 0)
        t_sum = t_unit * tl.sum(t_along, 0)
        s_slope = slope * s_factor / s_divisor
        t_slope = slope * t_factor / t_divisor
        for start in range(0, positions, BLOCK):
            n = start + block
            s = _load_map(s_map, factors, n, positions) / s_divisor
            t = _load_map(t_map, factors, n, positions) / t_divisor
            if s_out is not None:
                k = _masked(((s - t) - s * s_sum) * s_slope, factors, n, positions)
                tl.store(s_out + n, k.to(s_out.dtype.element_ty), mask=n < positions)
            if t_out is not None:
                k = _masked((t * t_sum - (s - t)) * t_slope, factors, n, positions)
                tl.store(t_out + n, k.to(t_out.dtype.element_ty), mask=n < positions)
    return loss


@triton.jit
def mask_map(out, factors, positions, BLOCK: tl.constexpr):
    """Multiplies a sample's map by its mask, in place."""
    for start in range(0, positions, BLOCK):
        n = start + tl.arange(0, BLOCK)
        q = _load_map(out, factors, n, positions)
        tl.store(out + n, q.to(out.dtype.element_ty), mask=n < positions)


# ---- the last one --------------------------------------------------------------------------------
#
# Programs that work on one thing count themselves; the last to come finds all of it done, and does
# what is left.


@triton.jit
def is_last(counter, count):
    """Whether this is the last of ``count`` programs to come here."""
    # All threads have written before one of them says so.
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel") == count - 1


@triton.jit
def sum_in_order(values, count):
    """The sum of ``count`` fp64 values, the same bits each time."""
    BLOCK: tl.constexpr = 128
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(values + i, mask=i < count, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0)


@triton.jit
def add_up(
    pair,
    b,
    value,
    losses,
    counters,
    loss,
    samples,
    pairs,
    SUM: tl.constexpr,
    SAMPLE: tl.constexpr,
):
    """Stores or adds a sample's loss: in the order of the samples, whichever program comes last."""
    first = number(pair.first_sample)
    if SAMPLE:
        tl.store(loss + first + b, value.to(loss.dtype.element_ty))
    else:
        tl.store(losses + first + b, value)
        which = number(pair.number)
        count = number(pair.samples)
        if is_last(counters + samples + which, count):
            total = sum_in_order(losses + first, count)
            if SUM:
                tl.store(losses + samples + which, total)
                if is_last(counters + samples + pairs, pairs):
                    everything = sum_in_order(losses + samples, pairs)
                    tl.store(loss, everything.to(loss.dtype.element_ty))
            else:
                tl.store(loss + which, total.to(loss.dtype.element_ty))
