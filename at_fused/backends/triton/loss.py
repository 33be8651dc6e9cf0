"""The loss of a list of pairs, and the students' gradients: ``loss_kernel``."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from at_fused._options import LossOptions
from at_fused.backends import eager
from at_fused.backends.checks import check_at_loss, without_first
from at_fused.backends.results import accumulate_dtype
from at_fused.backends.triton import launch
from at_fused.backends.triton.finish import add_up, finish_sample, is_last, mask_map
from at_fused.backends.triton.launch import (
    blocks_of,
    constexpr,
    cut,
    exponent,
    feature_of,
    finish_gradient,
    gradient_of,
    native,
    new_gradients,
    new_map,
    on_device,
    piece_bytes,
    power_of_2,
    processors,
    steps_of,
    writable,
)
from at_fused.backends.triton.maps import store_map
from at_fused.backends.triton.scalars import double, double_of, number, number_of
from at_fused.backends.triton.sweep import sweep
from at_fused.backends.triton.tiles import (
    Feature,
    Gradient,
    channels_of,
    positions_of,
    store_gradient,
)

_WHOLE_BYTES = 512 * 1024  # a sample up to this size is not cut where its gradient follows


class Pair(NamedTuple):
    """A student and a teacher; ``gradient`` where this launch writes dL/dS too."""

    student: Feature
    teacher: Feature
    gradient: Gradient | None
    mask: Any  # (B, N), a factor of both raw maps, or None
    share: tuple[int, int]  # of a sample, by ``double_of``
    STEP: Any
    BLOCK: Any  # elements of a map that are finished at a time
    number: int  # and the following by ``number_of``
    samples: int
    first_sample: int
    first_program: int
    end_program: int
    pieces: int  # of a sample
    steps: int  # of a piece, each of STEP positions


@triton.jit
def _sweep_sample(pair, b, HIGH: tl.constexpr, LOW: tl.constexpr):
    """The gradient of one sample, whose coefficients this program has just written."""
    positions = positions_of(pair.student)
    channels = channels_of(pair.student)
    coefficients = pair.student.map + b.to(tl.int64) * positions
    for start in range(0, positions, pair.student.BLOCK_N):
        n = start + tl.arange(0, pair.student.BLOCK_N)
        k = tl.load(coefficients + n, mask=n < positions, other=0.0, cache_modifier=".cg")
        for first in range(0, channels, pair.student.BLOCK_C):
            c = first + tl.arange(0, pair.student.BLOCK_C)
            store_gradient(pair.student, pair.gradient, k, b, c, n, HIGH, LOW)


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
    pair_step,
    sample_step,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
    MEAN: tl.constexpr,
    PAPER: tl.constexpr,
    ADD: tl.constexpr,
    SUM: tl.constexpr,
    SAMPLE: tl.constexpr,
    CUT: tl.constexpr,
    STUDENT_GRAD: tl.constexpr,
    TEACHER_GRAD: tl.constexpr,
):
    """The work of the pair's program number ``local``."""
    pieces = number(pair.pieces)
    span = number(pair.steps) * pair.STEP
    b = local // pieces
    begin = local % pieces * span
    store_map(pair.student, b, begin, span, HIGH, LOW, MEAN)
    store_map(pair.teacher, b, begin, span, HIGH, LOW, MEAN)
    mine = True
    if CUT:
        mine = is_last(counters + number(pair.first_sample) + b, pieces)
    else:
        tl.debug_barrier()
    if mine:
        factor = double(scale)
        if loss_gradient is not None:
            above = loss_gradient + number(pair.number) * pair_step + b * sample_step
            factor *= tl.load(above).to(tl.float64)
        positions = positions_of(pair.student)
        s_map = pair.student.map + b.to(tl.int64) * positions
        t_map = pair.teacher.map + b.to(tl.int64) * positions
        s_factor = factor * (HIGH + LOW)
        t_factor = factor * (HIGH + LOW)
        if MEAN:
            s_factor = s_factor / channels_of(pair.student)
            t_factor = t_factor / channels_of(pair.teacher)
        s_out = None
        t_out = None
        if STUDENT_GRAD:
            s_out = s_map
        if TEACHER_GRAD:
            t_out = t_map
        factors = pair.mask
        if pair.mask is not None:
            factors += b.to(tl.int64) * positions
        value = finish_sample(
            s_map,
            t_map,
            s_out,
            t_out,
            factors,
            positions,
            double(pair.share),
            double(eps),
            s_factor,
            t_factor,
            pair.BLOCK,
            PAPER,
            ADD,
        )
        if pair.mask is not None:
            # A side without a gradient keeps the map that was normalised.
            if not STUDENT_GRAD:
                mask_map(s_map, factors, positions, pair.BLOCK)
            if not TEACHER_GRAD:
                mask_map(t_map, factors, positions, pair.BLOCK)
        if pair.gradient is not None:
            tl.debug_barrier()
            _sweep_sample(pair, b, HIGH, LOW)
        add_up(pair, b, value, losses, counters, loss, samples, pairs, SUM, SAMPLE)


@triton.jit(do_not_specialize=["samples", "pairs", "loss_gradient", "pair_step", "sample_step"])
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
    pair_step,
    sample_step,
    COUNT: tl.constexpr,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
    MEAN: tl.constexpr,
    PAPER: tl.constexpr,
    ADD: tl.constexpr,
    SUM: tl.constexpr,
    SAMPLE: tl.constexpr,
    CUT: tl.constexpr,
    STUDENT_GRAD: tl.constexpr,
    TEACHER_GRAD: tl.constexpr,
):
    """Maps, losses, coefficients, and gradients where an entry (``Pair``) has a place for them.

    A program has a whole sample, or with CUT a piece of one: the last of a sample's programs
    finishes it. ``losses`` (fp64) and ``counters`` (int32, all 0 before a list's first launch) hold
    an element per sample, then one per pair, then one more.
    """
    program = tl.program_id(0)
    for i in tl.static_range(COUNT):
        first = number(entries[i].first_program)
        if (program >= first) & (program < number(entries[i].end_program)):
            _loss_of_pair(
                entries[i],
                program - first,
                loss,
                losses,
                counters,
                samples,
                pairs,
                eps,
                scale,
                loss_gradient,
                pair_step,
                sample_step,
                HIGH,
                LOW,
                MEAN,
                PAPER,
                ADD,
                SUM,
                SAMPLE,
                CUT,
                STUDENT_GRAD,
                TEACHER_GRAD,
            )


def at_loss(
    student: list[Tensor],
    teacher: list[Tensor],
    masks: list[Tensor],
    weights: list[float],
    skip_tokens: list[int],
    p: float,
    collapse: str,
    form: str,
    reduction: str,
    eps_mode: str,
    eps: float,
    student_grad: bool,
    teacher_grad: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The loss of all pairs, and what the backward pass needs of them (see ``_ops``)."""
    options = LossOptions(p, collapse, form, reduction, eps_mode, eps)
    check_at_loss(student, teacher, masks, weights, skip_tokens, options)
    with on_device(student[0]):
        features = without_first([*student, *teacher], skip_tokens)
        loss, maps, _ = _forward(
            features, masks, weights, options, (student_grad, teacher_grad), None
        )
    return loss, maps if student_grad or teacher_grad else []


def at_value_and_grad(
    student: list[Tensor],
    teacher: list[Tensor],
    masks: list[Tensor],
    weights: list[float],
    skip_tokens: list[int],
    p: float,
    collapse: str,
    form: str,
    reduction: str,
    eps_mode: str,
    eps: float,
    scale: float,
    loss_gradient: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """The loss of all pairs, and the students' gradients times ``scale * loss_gradient``.

    A launch for each MAX_ENTRIES pairs; more for pairs of few and large samples, whose gradients
    are swept for themselves.
    """
    options = LossOptions(p, collapse, form, reduction, eps_mode, eps)
    check_at_loss(student, teacher, masks, weights, skip_tokens, options, loss_gradient)
    with on_device(student[0]):
        features = without_first([*student, *teacher], skip_tokens)
        gradients, targets = new_gradients(student, skip_tokens[: len(student)])
        upstream = Upstream(targets, scale, loss_gradient)
        loss, maps, left = _forward(features, masks, weights, options, (True, False), upstream)
        sweep(
            [features[i] for i in left],
            [maps[i] for i in left],
            [targets[i] for i in left],
            None,
            left,
            p,
        )
    return loss, gradients


class Upstream(NamedTuple):
    """Where dL/dS goes, times ``scale`` and ``loss_gradient`` (none, scalar, (pairs,), (pairs, B)).

    A target has the shape of its student's feature, any strides.
    """

    targets: list[Tensor]
    scale: float
    loss_gradient: Tensor | None


def _forward(
    features: list[Tensor],
    masks: list[Tensor],
    weights: list[float],
    options: LossOptions,
    grads: tuple[bool, bool],
    upstream: Upstream | None,
) -> tuple[Tensor, list[Tensor], list[int]]:
    """Loss; maps, students first; and the pairs of ``upstream`` whose gradient is still to come.

    Of these the maps are the coefficients of that gradient.
    """
    count = len(features) // 2
    device = features[0].device
    placed = [native(x) for x in features]
    maps = [new_map(x, layout) for x, layout in placed]
    written: list[tuple[Tensor, Tensor]] = []
    left: list[int] = []
    shape = {"sum": (), "none": (count,), "sample": (count, features[0].shape[0])}
    loss = features[0].new_empty(shape[options.reduction], dtype=accumulate_dtype(*features))
    samples = sum(x.shape[0] for x in features[:count])
    losses = torch.empty(samples + count, dtype=torch.float64, device=device)
    high, low = exponent(options.p)
    scale, loss_gradient = (upstream.scale, upstream.loss_gradient) if upstream else (1.0, None)

    piece = piece_bytes(sum(x.nbytes for x in features), device)
    cuts: list[tuple[int, int, int]] = []
    for i in range(count):
        pair = placed[i], placed[count + i]
        step = max(blocks_of(layout, x.element_size(), options.p)[1] for x, layout in pair)
        batch = features[i].shape[0]
        size = (features[i].nbytes + features[count + i].nbytes) // batch
        whole = size <= _WHOLE_BYTES or batch >= 2 * processors(device)
        if upstream and not whole:
            left.append(i)
        wanted = size if upstream and whole else piece
        cuts.append((*cut(pair[0][1].positions, size, wanted, step), step))
    # One kernel for all of a list: with the number of its samples some pairs are cut, or are not.
    some_cut = any(pieces > 1 for pieces, _, _ in cuts)
    counters = None
    if some_cut or options.reduction != "sample":
        counters = losses.new_zeros(samples + count + 1, dtype=torch.int32)

    first_sample = 0
    for first in range(0, count, launch.MAX_ENTRIES):
        entries: list[Pair] = []
        programs = 0
        for i in range(first, min(first + launch.MAX_ENTRIES, count)):
            (s, s_layout), (t, t_layout) = placed[i], placed[count + i]
            batch, positions = s.shape[0], s_layout.positions
            gradient = None
            if upstream and i not in left:
                s, s_layout, out, out_layout = writable(s, s_layout, upstream.targets[i])
                gradient = gradient_of(out, out_layout)
                written.append((upstream.targets[i], out))
            pieces, steps, step = cuts[i]
            end = programs + batch * pieces
            entries.append(
                Pair(
                    feature_of(s, s_layout, maps[i], options.p),
                    feature_of(t, t_layout, maps[count + i], options.p),
                    gradient,
                    masks[i].contiguous() if masks else None,
                    double_of(eager.sample_weight(weights, i, batch, options.reduction)),
                    constexpr(step),
                    constexpr(min(power_of_2(positions), launch.FINISH)),
                    *map(number_of, (i, batch, first_sample, programs, end, pieces, steps)),
                )
            )
            first_sample += batch
            programs = end
        launch.start(
            loss_kernel,
            programs,
            tuple(entries),
            loss,
            losses,
            counters,
            samples,
            count,
            double_of(options.eps),
            double_of(scale),
            loss_gradient,
            *steps_of(loss_gradient),
            COUNT=len(entries),
            HIGH=high,
            LOW=low,
            MEAN=options.collapse == "mean",
            PAPER=options.form == "paper",
            ADD=options.eps_mode == "add",
            SUM=options.reduction == "sum",
            SAMPLE=options.reduction == "sample",
            CUT=some_cut,
            STUDENT_GRAD=grads[0],
            TEACHER_GRAD=grads[1],
        )
    for target, out in written:
        finish_gradient(target, out)
    return loss, maps, left
