"""The loss of a list of pairs, and the students' gradients: ``loss_kernel``."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from at_fused._options import LossOptions
from at_fused.backends import eager
from at_fused.backends.checks import check_at_loss
from at_fused.backends.triton import launch
from at_fused.backends.triton.gradients import sweep
from at_fused.backends.triton.loss_of_maps import (
    MapPair,
    add_up,
    is_last,
    loss_call,
    loss_of_sample,
    map_pairs,
)
from at_fused.backends.triton.maps import new_map
from at_fused.backends.triton.tiles import (
    Feature,
    channels_of,
    double,
    double_of,
    is_mine,
    number,
    number_of,
    positions_of,
    program_of,
    store_gradient,
    store_map,
    times_above,
)

_WHOLE_BYTES = 512 * 1024  # a sample up to this size is not cut where its gradient follows


class Pair(NamedTuple):
    """A student and a teacher; ``gradient`` where this launch writes dL/dS too."""

    maps: MapPair
    student: Feature
    teacher: Feature
    gradient: Feature | None
    pieces: int  # of a sample; this and the next by ``number_of``
    steps: int  # of a piece, each of STEP positions
    STEP: Any


@triton.jit
def _sweep_sample(pair, b, P: tl.constexpr):
    """Write the gradient of one sample, whose coefficients this program has just written."""
    positions = positions_of(pair.student)
    channels = channels_of(pair.student)
    coefficients = pair.maps.student + b.to(tl.int64) * positions
    for start in range(0, positions, pair.student.BLOCK_N):
        n = start + tl.arange(0, pair.student.BLOCK_N)
        k = tl.load(coefficients + n, mask=n < positions, other=0.0, cache_modifier=".cg")
        for first in range(0, channels, pair.student.BLOCK_C):
            c = first + tl.arange(0, pair.student.BLOCK_C)
            store_gradient(pair.student, pair.gradient, k, b, c, n, P)


@triton.jit
def _loss_of_pair(pair, program, call, scale, above, P: tl.constexpr, MEAN: tl.constexpr):
    pieces = number(pair.pieces)
    span = number(pair.steps) * pair.STEP
    b = program // pieces
    begin = program % pieces * span
    store_map(pair.student, pair.maps.student, b, begin, span, P, MEAN)
    store_map(pair.teacher, pair.maps.teacher, b, begin, span, P, MEAN)
    if is_last(call.counters + number(pair.maps.first_sample) + b, pieces):
        factor = times_above(double(scale), above, pair.maps.number, b)
        s_factor = factor * P
        t_factor = factor * P
        if MEAN:
            s_factor = s_factor / channels_of(pair.student)
            t_factor = t_factor / channels_of(pair.teacher)
        value = loss_of_sample(pair.maps, call, b, s_factor, t_factor)
        if pair.gradient is not None:
            tl.debug_barrier()
            _sweep_sample(pair, b, P)
        add_up(pair.maps, call, b, value)


@triton.jit
def loss_kernel(entries, call, scale, above, P: tl.constexpr, MEAN: tl.constexpr):
    """Maps, losses, coefficients, and gradients where an entry (``Pair``) has a place for them.

    A program has a sample, or a piece of one: the last of a sample's programs finishes it.
    """
    for i in tl.static_range(len(entries)):
        if is_mine(entries[i]):
            _loss_of_pair(entries[i].record, program_of(entries[i]), call, scale, above, P, MEAN)


# ---- the host's side -----------------------------------------------------------------------------


def at_loss(
    student: list[Tensor],
    teacher: list[Tensor],
    masks: list[Tensor],
    weights: list[float],
    skip_tokens: list[int],
    *rest: Any,
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss of all pairs, and what the backward pass needs of them (see ``_ops``).

    The rest are ``LossOptions`` and which sides have a gradient.
    """
    *given, student_grad, teacher_grad = rest
    options = LossOptions(*given)
    check_at_loss(student, teacher, masks, weights, skip_tokens, options)
    with launch.on_device(student[0]):
        features = eager.without_first([*student, *teacher], skip_tokens)
        grads = student_grad, teacher_grad
        loss, maps, _ = _forward(features, masks, weights, options, grads)
    return loss, maps if student_grad or teacher_grad else []


def at_value_and_grad(
    student: list[Tensor],
    teacher: list[Tensor],
    masks: list[Tensor],
    weights: list[float],
    skip_tokens: list[int],
    *rest: Any,
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss of all pairs, and the students' gradients times ``scale * loss_gradient``.

    The rest are ``LossOptions``, ``scale`` and ``loss_gradient``. A launch for each MAX_ENTRIES
    pairs; more for pairs of large samples, whose gradients are swept for themselves.
    """
    *given, scale, loss_gradient = rest
    options = LossOptions(*given)
    check_at_loss(student, teacher, masks, weights, skip_tokens, options, loss_gradient)
    with launch.on_device(student[0]):
        features = eager.without_first([*student, *teacher], skip_tokens)
        gradients, targets = launch.new_gradients(student, skip_tokens[: len(student)])
        loss, maps, left = _forward(
            features, masks, weights, options, (True, False), targets, scale, loss_gradient
        )
        xs, ks, outs = ([tensors[i] for i in left] for tensors in (features, maps, targets))
        sweep(xs, ks, outs, None, left, options.p)
    return loss, gradients


def _forward(
    features: list[Tensor],
    masks: list[Tensor],
    weights: list[float],
    options: LossOptions,
    grads: tuple[bool, bool],
    targets: list[Tensor] | None = None,
    scale: float = 1.0,
    loss_gradient: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], list[int]]:
    """Return the loss; maps, students first; and the pairs whose gradient is still to come.

    With ``targets`` dL/dS goes there, times ``scale`` and ``loss_gradient``; where it is still to
    come, the student's map holds its coefficients.
    """
    p, collapse, form, reduction, eps_mode, eps = options
    count = len(features) // 2
    maps = [new_map(x) for x in features]
    coefficients = [q if grads[i // count] else None for i, q in enumerate(maps)]
    work: list[tuple[Pair, int]] = []
    left: list[int] = []
    for i, pair in enumerate(map_pairs(maps, coefficients, masks, weights, reduction)):
        student, teacher = (launch.feature_of(x, p) for x in (features[i], features[count + i]))
        step = max(student.BLOCK_N.value, teacher.BLOCK_N.value)
        batch, positions = maps[i].shape
        size = (features[i].nbytes + features[count + i].nbytes) // batch
        pieces, steps = launch.cut(positions, size, step)
        gradient = None
        if targets and size <= _WHOLE_BYTES:
            pieces, steps = 1, -(-positions // step)
            gradient = launch.gradient_of(targets[i], p)
        elif targets:
            left.append(i)
        numbers = number_of(pieces), number_of(steps)
        entry = Pair(pair, student, teacher, gradient, *numbers, launch.constexpr(step))
        work.append((entry, batch * pieces))
    call = loss_call(features, form, reduction, eps_mode, eps)
    above = launch.above_of(loss_gradient)
    constants = {"P": p, "MEAN": collapse == "mean"}
    launch.start_list(loss_kernel, work, call, double_of(scale), above, **constants)
    for i, (entry, _) in enumerate(work):
        if targets and entry.gradient:
            launch.copy_back(entry.gradient, targets[i])
    return call.loss, maps, left
