"""Loss of a list of pairs of raw maps, and its gradients: ``map_loss_kernel``."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from at_fused.backends import eager
from at_fused.backends.checks import check_map_loss
from at_fused.backends.outputs import accumulate_dtype
from at_fused.backends.triton import launch
from at_fused.backends.triton.tiles import (
    decode_double,
    decode_int,
    encode_double,
    encode_int,
    has_program,
    program_of,
)

_BLOCK = 512  # elements of a map per step


class MapPair(NamedTuple):
    """Record of the raw maps (B, N) of a student and a teacher, and of their gradients.

    A gradient is None if it is not needed, and may share the memory of its map.
    """

    student: Tensor
    teacher: Tensor
    student_gradient: Tensor | None
    teacher_gradient: Tensor | None
    mask: Tensor | None  # (B, N), a factor of both maps
    positions: int
    sample_weight: tuple[int, int]  # with ``encode_double``
    pair_index: int  # this and the following with ``encode_int``
    samples: int
    first_sample: int
    BLOCK: Any


class LossCall(NamedTuple):
    """Record of the results and the options of a list of pairs.

    ``losses`` (fp64) has an element per sample, then one per pair. ``counters`` (int32) has as
    many, and one for the list. They are 0 before the first launch.
    """

    loss: Tensor
    losses: Tensor
    counters: Tensor
    eps: tuple[int, int]  # with ``encode_double``
    samples: int  # this and the next with ``encode_int``
    pairs: int
    PAPER: Any
    ADD: Any
    SUM: Any
    SAMPLE: Any


# ---- one sample ----------------------------------------------------------------------------------


@triton.jit
def _masked(values, mask, row, n, positions):
    if mask is not None:
        values *= tl.load(mask + row + n, mask=n < positions, other=0.0).to(tl.float64)
    return values


@triton.jit
def _load_map(q, mask, row, n, positions):
    # ".cg" bypasses the L1 cache: another program may have written the map.
    values = tl.load(q + row + n, mask=n < positions, other=0.0, cache_modifier=".cg")
    return _masked(values.to(tl.float64), mask, row, n, positions)


@triton.jit
def _divisor(squares, eps, ADD: tl.constexpr):
    """Return the divisor of Q in q = Q / divisor, and (Q / ||Q||) / q, or 0 if it is constant."""
    if ADD:
        norm = tl.sqrt(squares)
        divisor = norm + eps
        to_unit = tl.where(norm == 0.0, 0.0, divisor / tl.where(norm == 0.0, 1.0, norm))
    else:
        constant = squares <= eps * eps
        divisor = tl.where(constant, eps, tl.sqrt(squares))
        to_unit = tl.where(constant, 0.0, 1.0)
    return divisor, to_unit


@triton.jit
def sample_loss(pair, call, b, s_factor, t_factor):
    """Return a sample's loss; write factor * dL/dQ for each side that has a gradient.

    Computes in fp64. If the pair has a mask, a side without a gradient is masked in place.
    """
    positions = pair.positions
    row = b.to(tl.int64) * positions
    block = tl.arange(0, pair.BLOCK)
    eps = decode_double(call.eps)
    s_squares = tl.zeros([pair.BLOCK], tl.float64)
    t_squares = tl.zeros([pair.BLOCK], tl.float64)
    for start in range(0, positions, pair.BLOCK):
        s = _load_map(pair.student, pair.mask, row, start + block, positions)
        t = _load_map(pair.teacher, pair.mask, row, start + block, positions)
        s_squares += s * s
        t_squares += t * t
    s_divisor, s_to_unit = _divisor(tl.sum(s_squares, 0), eps, call.ADD)
    t_divisor, t_to_unit = _divisor(tl.sum(t_squares, 0), eps, call.ADD)

    squares = tl.zeros([pair.BLOCK], tl.float64)
    s_products = tl.zeros([pair.BLOCK], tl.float64)
    t_products = tl.zeros([pair.BLOCK], tl.float64)
    for start in range(0, positions, pair.BLOCK):
        # A division, not a product with the inverse: a single position must give exactly 1.
        s = _load_map(pair.student, pair.mask, row, start + block, positions) / s_divisor
        t = _load_map(pair.teacher, pair.mask, row, start + block, positions) / t_divisor
        squares += (s - t) * (s - t)
        s_products += s * (s - t)
        t_products += t * (s - t)
    square = tl.sum(squares, 0)

    weight = decode_double(pair.sample_weight)
    if call.PAPER:
        distance = tl.sqrt(square)
        loss = weight * distance
        slope = tl.where(square == 0.0, 0.0, weight / tl.where(square == 0.0, 1.0, distance))
    else:
        loss = weight * (square / positions)
        slope = 2.0 * weight / positions

    s_sum = s_to_unit * tl.sum(s_products, 0)
    t_sum = t_to_unit * tl.sum(t_products, 0)
    s_slope = slope * s_factor / s_divisor
    t_slope = slope * t_factor / t_divisor
    for start in range(0, positions, pair.BLOCK):
        n = start + block
        s_map = _load_map(pair.student, pair.mask, row, n, positions)
        t_map = _load_map(pair.teacher, pair.mask, row, n, positions)
        s, t = s_map / s_divisor, t_map / t_divisor
        if pair.student_gradient is not None:
            k = _masked(((s - t) - s * s_sum) * s_slope, pair.mask, row, n, positions)
            _store(pair.student_gradient, k, row, n, positions)
        elif pair.mask is not None:
            _store(pair.student, s_map, row, n, positions)
        if pair.teacher_gradient is not None:
            k = _masked((t * t_sum - (s - t)) * t_slope, pair.mask, row, n, positions)
            _store(pair.teacher_gradient, k, row, n, positions)
        elif pair.mask is not None:
            _store(pair.teacher, t_map, row, n, positions)
    return loss


@triton.jit
def _store(out, values, row, n, positions):
    tl.store(out + row + n, values.to(out.dtype.element_ty), mask=n < positions)


# ---- sums over samples ---------------------------------------------------------------------------
#
# Programs that share a sample, a pair or a list increment a counter. The last one sees the results
# of all others and finishes the work.


@triton.jit
def arrives_last(counter, count):
    """Increment a counter; return True in the last of ``count`` programs."""
    # All threads must have written their results before one thread increments the counter.
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel") == count - 1


@triton.jit
def _sum_in_order(values, count):
    """Return the sum of ``count`` fp64 values, in a fixed order."""
    BLOCK: tl.constexpr = 128
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(values + i, mask=i < count, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0)


@triton.jit
def add_to_loss(pair, call, b, value):
    """Add a sample's loss to the result, in the order of the samples, not of the programs."""
    first = decode_int(pair.first_sample)
    if call.SAMPLE:
        tl.store(call.loss + first + b, value.to(call.loss.dtype.element_ty))
    else:
        tl.store(call.losses + first + b, value)
        index = decode_int(pair.pair_index)
        count = decode_int(pair.samples)
        samples = decode_int(call.samples)
        if arrives_last(call.counters + samples + index, count):
            total = _sum_in_order(call.losses + first, count)
            if call.SUM:
                tl.store(call.losses + samples + index, total)
                pairs = decode_int(call.pairs)
                if arrives_last(call.counters + samples + pairs, pairs):
                    total = _sum_in_order(call.losses + samples, pairs)
                    tl.store(call.loss, total.to(call.loss.dtype.element_ty))
            else:
                tl.store(call.loss + index, total.to(call.loss.dtype.element_ty))


@triton.jit
def _loss_of_maps(pair, b, call):
    value = sample_loss(pair, call, b, 1.0, 1.0)
    add_to_loss(pair, call, b, value)


@triton.jit
def map_loss_kernel(entries, call):
    """Compute the losses and gradients of a list of pairs (``MapPair``), one program per sample."""
    for i in tl.static_range(len(entries)):
        if has_program(entries[i]):
            _loss_of_maps(entries[i].record, program_of(entries[i]), call)


# ---- host side -----------------------------------------------------------------------------------


def map_pairs(
    maps: list[Tensor],
    gradients: list[Tensor | None],
    masks: list[Tensor],
    weights: list[float],
    reduction: str,
) -> list[MapPair]:
    """Return the records of pairs of maps; in each list the students come first."""
    count, first_sample = len(maps) // 2, 0
    pairs = []
    for i in range(count):
        batch, positions = maps[i].shape
        pairs.append(
            MapPair(
                maps[i].contiguous(),
                maps[count + i].contiguous(),
                gradients[i],
                gradients[count + i],
                masks[i].contiguous() if masks else None,
                positions,
                encode_double(eager.sample_weight(weights, i, batch, reduction)),
                encode_int(i),
                encode_int(batch),
                encode_int(first_sample),
                launch.constexpr(min(launch.next_power_of_2(positions), _BLOCK)),
            )
        )
        first_sample += batch
    return pairs


def loss_call(
    tensors: list[Tensor], form: str, reduction: str, eps_mode: str, eps: float
) -> LossCall:
    """Return the record of a list of pairs, from features or maps, students first."""
    count = len(tensors) // 2
    samples = sum(x.shape[0] for x in tensors[:count])
    shape = {"sum": (), "none": (count,), "sample": (count, tensors[0].shape[0])}
    losses = tensors[0].new_empty(samples + count, dtype=torch.float64)
    flags = form == "paper", eps_mode == "add", reduction == "sum", reduction == "sample"
    return LossCall(
        losses.new_empty(shape[reduction], dtype=accumulate_dtype(*tensors)),
        losses,
        losses.new_zeros(samples + count + 1, dtype=torch.int32),
        encode_double(eps),
        encode_int(samples),
        encode_int(count),
        *map(launch.constexpr, flags),
    )


def map_loss(
    student: list[Tensor],
    teacher: list[Tensor],
    weights: list[float],
    form: str,
    reduction: str,
    eps_mode: str,
    eps: float,
    student_grad: bool,
    teacher_grad: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss of all pairs of raw maps (B, N), and dL/dQ of the requested sides."""
    check_map_loss(student, teacher, weights, form, reduction, eps_mode, eps)
    maps = [*student, *teacher]
    needed = [student_grad] * len(student) + [teacher_grad] * len(teacher)
    with launch.on_device(maps[0]):
        gradients = [q.new_empty(q.shape) if g else None for q, g in zip(maps, needed, strict=True)]
        call = loss_call(maps, form, reduction, eps_mode, eps)
        pairs = map_pairs(maps, gradients, [], weights, reduction)
        work = [(pair, q.shape[0]) for pair, q in zip(pairs, student, strict=True)]
        launch.start_list(map_loss_kernel, work, call)
    return call.loss, [g for g in gradients if g is not None]
