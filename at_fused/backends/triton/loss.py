"""Loss of a list of pairs, and the students' gradients: ``loss_kernel``."""

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
    add_to_loss,
    arrives_last,
    loss_call,
    map_pairs,
    sample_loss,
)
from at_fused.backends.triton.maps import new_map
from at_fused.backends.triton.tiles import (
    Feature,
    channels_of,
    decode_double,
    decode_int,
    encode_double,
    encode_int,
    has_program,
    positions_of,
    program_of,
    store_gradient,
    store_map,
    times_loss_gradient,
)

_MAX_UNSPLIT_BYTES = 512 * 1024  # larger samples get their gradient from a second launch


class Pair(NamedTuple):
    """Record of a student and a teacher; with a ``gradient`` the launch also writes dL/dS."""

    maps: MapPair
    student: Feature
    teacher: Feature
    gradient: Feature | None
    pieces: int  # per sample; this and the next with ``encode_int``
    steps: int  # per piece, of STEP positions each
    STEP: Any


@triton.jit
def _sweep_sample(pair, b, P: tl.constexpr):
    """Write the gradient of one sample from the coefficients that this program has written."""
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
def _loss_of_pair(pair, program, call, scale, loss_gradient, P: tl.constexpr, MEAN: tl.constexpr):
    pieces = decode_int(pair.pieces)
    span = decode_int(pair.steps) * pair.STEP
    b = program // pieces
    begin = program % pieces * span
    store_map(pair.student, pair.maps.student, b, begin, span, P, MEAN)
    store_map(pair.teacher, pair.maps.teacher, b, begin, span, P, MEAN)
    if arrives_last(call.counters + decode_int(pair.maps.first_sample) + b, pieces):
        factor = times_loss_gradient(decode_double(scale), loss_gradient, pair.maps.pair_index, b)
        s_factor = factor * P
        t_factor = factor * P
        if MEAN:
            s_factor = s_factor / channels_of(pair.student)
            t_factor = t_factor / channels_of(pair.teacher)
        value = sample_loss(pair.maps, call, b, s_factor, t_factor)
        if pair.gradient is not None:
            tl.debug_barrier()
            _sweep_sample(pair, b, P)
        add_to_loss(pair.maps, call, b, value)


@triton.jit
def loss_kernel(entries, call, scale, loss_gradient, P: tl.constexpr, MEAN: tl.constexpr):
    """Compute maps, losses, coefficients and, if an entry (``Pair``) has them, gradients.

    A program works on a sample or a piece of one. The last program of a sample finishes it.
    """
    for i in tl.static_range(len(entries)):
        if has_program(entries[i]):
            _loss_of_pair(
                entries[i].record, program_of(entries[i]), call, scale, loss_gradient, P, MEAN
            )


# ---- host side -----------------------------------------------------------------------------------


def at_loss(
    student: list[Tensor],
    teacher: list[Tensor],
    masks: list[Tensor],
    weights: list[float],
    skip_tokens: list[int],
    *rest: Any,
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss of all pairs, and the maps for the backward pass (see ``_ops.loss``).

    ``rest`` is the ``LossOptions``, ``student_grad`` and ``teacher_grad``.
    """
    *values, student_grad, teacher_grad = rest
    options = LossOptions(*values)
    check_at_loss(student, teacher, masks, weights, skip_tokens, options)
    with launch.on_device(student[0]):
        features = eager.without_skipped([*student, *teacher], skip_tokens)
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

    ``rest`` is the ``LossOptions``, ``scale`` and ``loss_gradient``. MAX_ENTRIES pairs share a
    launch; the gradients of large samples need another one.
    """
    *values, scale, loss_gradient = rest
    options = LossOptions(*values)
    check_at_loss(student, teacher, masks, weights, skip_tokens, options, loss_gradient)
    with launch.on_device(student[0]):
        features = eager.without_skipped([*student, *teacher], skip_tokens)
        gradients, targets = launch.new_gradients(student, skip_tokens[: len(student)])
        loss, maps, remaining = _forward(
            features, masks, weights, options, (True, False), targets, scale, loss_gradient
        )
        xs, ks, outs = ([tensors[i] for i in remaining] for tensors in (features, maps, targets))
        sweep(xs, ks, outs, None, remaining, options.p)
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
    """Return the loss, the maps (students first), and the pairs without a gradient so far.

    With ``targets`` dL/dS times ``scale * loss_gradient`` is written there. For the returned pairs
    the student's map holds the coefficients instead.
    """
    p, collapse, form, reduction, eps_mode, eps = options
    count = len(features) // 2
    maps = [new_map(x) for x in features]
    coefficients = [q if grads[i // count] else None for i, q in enumerate(maps)]
    work: list[tuple[Pair, int]] = []
    remaining: list[int] = []
    for i, pair in enumerate(map_pairs(maps, coefficients, masks, weights, reduction)):
        student, teacher = (launch.feature_of(x, p) for x in (features[i], features[count + i]))
        step = max(student.BLOCK_N.value, teacher.BLOCK_N.value)
        batch, positions = maps[i].shape
        size = (features[i].nbytes + features[count + i].nbytes) // batch
        pieces, steps = launch.split_sample(positions, size, step)
        gradient = None
        if targets and size <= _MAX_UNSPLIT_BYTES:
            pieces, steps = 1, -(-positions // step)
            gradient = launch.gradient_of(targets[i], p)
        elif targets:
            remaining.append(i)
        numbers = encode_int(pieces), encode_int(steps)
        entry = Pair(pair, student, teacher, gradient, *numbers, launch.constexpr(step))
        work.append((entry, batch * pieces))
    call = loss_call(features, form, reduction, eps_mode, eps)
    arguments = call, encode_double(scale), launch.loss_gradient_of(loss_gradient)
    launch.start_list(loss_kernel, work, *arguments, P=p, MEAN=collapse == "mean")
    for i, (entry, _) in enumerate(work):
        if targets and entry.gradient:
            launch.copy_back(entry.gradient, targets[i])
    return call.loss, maps, remaining
