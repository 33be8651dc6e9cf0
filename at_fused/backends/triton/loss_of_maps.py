"""The loss of a list of pairs of raw maps, and its gradients: ``map_loss_kernel``."""

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
    double,
    double_of,
    is_mine,
    number,
    number_of,
    program_of,
)

_BLOCK = 512  # elements of a map that are taken at a time


class MapPair(NamedTuple):
    """A student's and a teacher's raw map (B, N), and what becomes of them.

    The gradients, where they are wanted, may be written over the maps.
    """

    student: Tensor
    teacher: Tensor
    student_gradient: Tensor | None
    teacher_gradient: Tensor | None
    mask: Tensor | None  # (B, N), a factor of both maps
    positions: int
    share: tuple[int, int]  # of a sample in the loss, by ``double_of``
    number: int  # this and the following by ``number_of``
    samples: int
    first_sample: int
    BLOCK: Any


class LossCall(NamedTuple):
    """The result and the options of a list.

    ``losses`` (fp64) and ``counters`` (int32, all 0 before a list's first launch) hold an element
    per sample, then one per pair, then one more.
    """

    loss: Tensor
    losses: Tensor
    counters: Tensor
    eps: tuple[int, int]  # by ``double_of``
    samples: int  # this and the next by ``number_of``
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
    # Past the first-level cache: another program may have written it.
    values = tl.load(q + row + n, mask=n < positions, other=0.0, cache_modifier=".cg")
    return _masked(values.to(tl.float64), mask, row, n, positions)


@triton.jit
def _divisor(squares, eps, ADD: tl.constexpr):
    """Divisor of a map Q to q; and (Q / ||Q||) / q, 0 where the norm has no part in q."""
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
def loss_of_sample(pair, call, b, s_factor, t_factor):
    """Return a sample's loss; write factor * dL/dQ of the sides that have a place for it.

    All in fp64. Of a masked pair's other side the map is masked in place.
    """
    positions = pair.positions
    row = b.to(tl.int64) * positions
    block = tl.arange(0, pair.BLOCK)
    eps = double(call.eps)
    s_squares = tl.zeros([pair.BLOCK], tl.float64)
    t_squares = tl.zeros([pair.BLOCK], tl.float64)
    for start in range(0, positions, pair.BLOCK):
        s = _load_map(pair.student, pair.mask, row, start + block, positions)
        t = _load_map(pair.teacher, pair.mask, row, start + block, positions)
        s_squares += s * s
        t_squares += t * t
    s_divisor, s_unit = _divisor(tl.sum(s_squares, 0), eps, call.ADD)
    t_divisor, t_unit = _divisor(tl.sum(t_squares, 0), eps, call.ADD)

    squares = tl.zeros([pair.BLOCK], tl.float64)
    s_along = tl.zeros([pair.BLOCK], tl.float64)
    t_along = tl.zeros([pair.BLOCK], tl.float64)
    for start in range(0, positions, pair.BLOCK):
        # Divided, not multiplied by an inverse: a single position is exactly 1 on both sides.
        s = _load_map(pair.student, pair.mask, row, start + block, positions) / s_divisor
        t = _load_map(pair.teacher, pair.mask, row, start + block, positions) / t_divisor
        squares += (s - t) * (s - t)
        s_along += s * (s - t)
        t_along += t * (s - t)
    square = tl.sum(squares, 0)

    share = double(pair.share)
    if call.PAPER:
        distance = tl.sqrt(square)
        loss = share * distance
        slope = tl.where(square == 0.0, 0.0, share / tl.where(square == 0.0, 1.0, distance))
    else:
        loss = share * (square / positions)
        slope = 2.0 * share / positions

    s_sum = s_unit * tl.sum(s_along, 0)
    t_sum = t_unit * tl.sum(t_along, 0)
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


# ---- all samples ---------------------------------------------------------------------------------
#
# Programs that work on one thing count themselves; the last to come finds all of it done, and does
# what is left.


@triton.jit
def is_last(counter, count):
    """Return whether this is the last of ``count`` programs to come here."""
    # All threads have written before one of them says so.
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel") == count - 1


@triton.jit
def _sum_in_order(values, count):
    """The sum of ``count`` fp64 values, the same bits each time."""
    BLOCK: tl.constexpr = 128
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(values + i, mask=i < count, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0)


@triton.jit
def add_up(pair, call, b, value):
    """Store or add a sample's loss: in the order of the samples, whichever program comes last."""
    first = number(pair.first_sample)
    if call.SAMPLE:
        tl.store(call.loss + first + b, value.to(call.loss.dtype.element_ty))
    else:
        tl.store(call.losses + first + b, value)
        which = number(pair.number)
        count = number(pair.samples)
        samples = number(call.samples)
        if is_last(call.counters + samples + which, count):
            total = _sum_in_order(call.losses + first, count)
            if call.SUM:
                tl.store(call.losses + samples + which, total)
                pairs = number(call.pairs)
                if is_last(call.counters + samples + pairs, pairs):
                    total = _sum_in_order(call.losses + samples, pairs)
                    tl.store(call.loss, total.to(call.loss.dtype.element_ty))
            else:
                tl.store(call.loss + which, total.to(call.loss.dtype.element_ty))


@triton.jit
def _loss_of_maps(pair, b, call):
    value = loss_of_sample(pair, call, b, 1.0, 1.0)
    add_up(pair, call, b, value)


@triton.jit
def map_loss_kernel(entries, call):
    """Losses of a list of pairs (``MapPair``), and dL/dQ where it is wanted; a program a sample."""
    for i in tl.static_range(len(entries)):
        if is_mine(entries[i]):
            _loss_of_maps(entries[i].record, program_of(entries[i]), call)


# ---- the host's side -----------------------------------------------------------------------------


def map_pairs(
    maps: list[Tensor],
    gradients: list[Tensor | None],
    masks: list[Tensor],
    weights: list[float],
    reduction: str,
) -> list[MapPair]:
    """Make the records of pairs of maps; maps and gradients of the students come first."""
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
                double_of(eager.sample_weight(weights, i, batch, reduction)),
                number_of(i),
                number_of(batch),
                number_of(first_sample),
                launch.constexpr(min(launch.power_of_2(positions), _BLOCK)),
            )
        )
        first_sample += batch
    return pairs


def loss_call(
    tensors: list[Tensor], form: str, reduction: str, eps_mode: str, eps: float
) -> LossCall:
    """Make the record of a list of pairs, students first."""
    count = len(tensors) // 2
    samples = sum(x.shape[0] for x in tensors[:count])
    shape = {"sum": (), "none": (count,), "sample": (count, tensors[0].shape[0])}
    losses = tensors[0].new_empty(samples + count, dtype=torch.float64)
    flags = form == "paper", eps_mode == "add", reduction == "sum", reduction == "sample"
    return LossCall(
        losses.new_empty(shape[reduction], dtype=accumulate_dtype(*tensors)),
        losses,
        losses.new_zeros(samples + count + 1, dtype=torch.int32),
        double_of(eps),
        number_of(samples),
        number_of(count),
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
    """Return the loss of all pairs of raw maps (B, N), and dL/dQ of the sides asked for."""
    check_map_loss(student, teacher, weights, form, reduction, eps_mode, eps)
    maps = [*student, *teacher]
    wanted = [student_grad] * len(student) + [teacher_grad] * len(teacher)
    with launch.on_device(maps[0]):
        gradients = [q.new_empty(q.shape) if g else None for q, g in zip(maps, wanted, strict=True)]
        call = loss_call(maps, form, reduction, eps_mode, eps)
        pairs = map_pairs(maps, gradients, [], weights, reduction)
        work = [(pair, q.shape[0]) for pair, q in zip(pairs, student, strict=True)]
        launch.start_list(map_loss_kernel, work, call)
    return call.loss, [g for g in gradients if g is not None]
