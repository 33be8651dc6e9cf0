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
from at_fused.backends.results import accumulate_dtype
from at_fused.backends.triton import launch
from at_fused.backends.triton.finish import add_up, finish_sample
from at_fused.backends.triton.launch import constexpr, on_device, power_of_2
from at_fused.backends.triton.scalars import double, double_of, number, number_of


class MapPair(NamedTuple):
    """A student's and a teacher's map (B, N), and where their gradients go."""

    student: Tensor
    teacher: Tensor
    student_gradient: Tensor | None
    teacher_gradient: Tensor | None
    positions: int
    share: tuple[int, int]  # of a sample, by ``double_of``
    BLOCK: Any
    number: int  # and the following by ``number_of``
    samples: int
    first_sample: int
    first_program: int
    end_program: int


@triton.jit
def _loss_of_sample(
    pair,
    b,
    loss,
    losses,
    counters,
    samples,
    pairs,
    eps,
    PAPER: tl.constexpr,
    ADD: tl.constexpr,
    SUM: tl.constexpr,
    SAMPLE: tl.constexpr,
):
    begin = b.to(tl.int64) * pair.positions
    student_gradient = pair.student_gradient
    if pair.student_gradient is not None:
        student_gradient += begin
    teacher_gradient = pair.teacher_gradient
    if pair.teacher_gradient is not None:
        teacher_gradient += begin
    value = finish_sample(
        pair.student + begin,
        pair.teacher + begin,
        student_gradient,
        teacher_gradient,
        None,
        pair.positions,
        double(pair.share),
        double(eps),
        1.0,
        1.0,
        pair.BLOCK,
        PAPER,
        ADD,
    )
    add_up(pair, b, value, losses, counters, loss, samples, pairs, SUM, SAMPLE)


@triton.jit(do_not_specialize=["samples", "pairs"])
def map_loss_kernel(
    entries,
    loss,
    losses,
    counters,
    samples,
    pairs,
    eps,
    COUNT: tl.constexpr,
    PAPER: tl.constexpr,
    ADD: tl.constexpr,
    SUM: tl.constexpr,
    SAMPLE: tl.constexpr,
):
    """Losses of a list of pairs (``MapPair``), and dL/dQ where there is a place for it.

    A program has a sample. ``losses`` and ``counters`` as in ``loss_kernel``.
    """
    program = tl.program_id(0)
    for i in tl.static_range(COUNT):
        first = number(entries[i].first_program)
        if (program >= first) & (program < number(entries[i].end_program)):
            _loss_of_sample(
                entries[i],
                program - first,
                loss,
                losses,
                counters,
                samples,
                pairs,
                eps,
                PAPER,
                ADD,
                SUM,
                SAMPLE,
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
    """The loss of all pairs of raw maps (B, N), and dL/dQ of the sides asked for."""
    check_map_loss(student, teacher, weights, form, reduction, eps_mode, eps)
    count, first_map = len(student), student[0]
    samples = sum(q.shape[0] for q in student)
    shape = {"sum": (), "none": (count,), "sample": (count, first_map.shape[0])}[reduction]
    with on_device(first_map):
        loss = first_map.new_empty(shape, dtype=accumulate_dtype(*student, *teacher))
        losses = first_map.new_empty(samples + count, dtype=torch.float64)
        counters = None
        if reduction != "sample":
            counters = first_map.new_zeros(samples + count + 1, dtype=torch.int32)
        student_gradients = [q.new_empty(q.shape) for q in student] if student_grad else []
        teacher_gradients = [q.new_empty(q.shape) for q in teacher] if teacher_grad else []
        first_sample = 0
        for first in range(0, count, launch.MAX_ENTRIES):
            entries: list[MapPair] = []
            programs = 0
            for i in range(first, min(first + launch.MAX_ENTRIES, count)):
                batch, positions = student[i].shape
                entries.append(
                    MapPair(
                        student[i].contiguous(),
                        teacher[i].contiguous(),
                        student_gradients[i] if student_grad else None,
                        teacher_gradients[i] if teacher_grad else None,
                        positions,
                        double_of(eager.sample_weight(weights, i, batch, reduction)),
                        constexpr(min(power_of_2(positions), launch.FINISH)),
                        *map(number_of, (i, batch, first_sample, programs, programs + batch)),
                    )
                )
                first_sample += batch
                programs += batch
            launch.start(
                map_loss_kernel,
                programs,
                tuple(entries),
                loss,
                losses,
                counters,
                samples,
                count,
                double_of(eps),
                COUNT=len(entries),
                PAPER=form == "paper",
                ADD=eps_mode == "add",
                SUM=reduction == "sum",
                SAMPLE=reduction == "sample",
            )
    return loss, student_gradients + teacher_gradients
