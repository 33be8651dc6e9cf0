"""Losses of maps and of features: schema, fake kernel and autograd of each operator.

    map_loss            the loss of a list of pairs of raw maps, and their gradients
    at_loss             the loss of a list of pairs of features, in one pass over them
    at_value_and_grad   at_loss and the students' gradients, in one call

A loss is a scalar, (pairs,) with ``reduction="none"``, or (pairs, B) with "sample", without the
mean over the batch. The maps and gradients that come with it belong to its sum.

``map_loss`` returns ``(loss, maps)``: dL/dQ of the students' maps if ``student_grad``, then of the
teachers' if ``teacher_grad``.

``at_loss`` returns ``(loss, maps)``. ``masks`` holds a factor (B, N) of both raw maps for each
pair, or nothing; ``skip_tokens`` as in ``attention_map``, the students' numbers before the
teachers'. ``maps`` is empty without ``student_grad`` and ``teacher_grad``; otherwise it holds one
(B, N) map per feature, students first: the coefficient map k of a side whose gradient is asked for,
the raw map, masked, of the other. Where autograd follows a side, its graph has the maps it needs.

``at_value_and_grad`` returns ``(loss, gradients)``: those of the students, times ``scale`` and
``loss_gradient`` (a scalar, (pairs,) or (pairs, B)). Neither is part of a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from at_fused._ops.attention import attention_map, attention_map_backward, fake_map
from at_fused._ops.library import (
    apply,
    below_autograd,
    check_one_device,
    define,
    entry,
    library,
    operators,
    save,
    tracks,
    transformed,
)
from at_fused._options import LossOptions
from at_fused.backends import eager
from at_fused.backends.outputs import accumulate_dtype

define(
    "map_loss(Tensor[] student, Tensor[] teacher, float[] weights, str form, str reduction,"
    " str eps_mode, float eps, bool student_grad, bool teacher_grad) -> (Tensor, Tensor[])"
)
_FEATURES = (
    "Tensor[] student, Tensor[] teacher, Tensor[] masks, float[] weights, int[] skip_tokens,"
    " float p, str collapse, str form, str reduction, str eps_mode, float eps"
)
define(f"at_loss({_FEATURES}, bool student_grad, bool teacher_grad) -> (Tensor, Tensor[])")
define(f"at_value_and_grad({_FEATURES}, float scale, Tensor? loss_gradient) -> (Tensor, Tensor[])")


# ---- fake kernels --------------------------------------------------------------------------------


def _fake_loss(
    student: list[Tensor], teacher: list[Tensor], reduction: str, *more: Tensor | None
) -> Tensor:
    check_one_device(student, teacher, more)
    shape = {"sum": (), "none": (len(student),), "sample": (len(student), student[0].shape[0])}
    return student[0].new_empty(shape[reduction], dtype=accumulate_dtype(*student, *teacher))


@torch.library.register_fake("at_fused::map_loss", lib=library)
def _(student: list[Tensor], teacher: list[Tensor], *rest: Any) -> tuple[Tensor, list[Tensor]]:
    _, _, reduction, _, _, student_grad, teacher_grad = rest
    maps = (student if student_grad else []) + (teacher if teacher_grad else [])
    return _fake_loss(student, teacher, reduction), [q.new_empty(q.shape) for q in maps]


@torch.library.register_fake("at_fused::at_loss", lib=library)
def _(
    student: list[Tensor], teacher: list[Tensor], masks: list[Tensor], *rest: Any
) -> tuple[Tensor, list[Tensor]]:
    _, skip_tokens, *options, student_grad, teacher_grad = rest
    loss = _fake_loss(student, teacher, LossOptions(*options).reduction, *masks)
    if not (student_grad or teacher_grad):
        return loss, []
    return loss, [fake_map(x) for x in eager.without_first([*student, *teacher], skip_tokens)]


@torch.library.register_fake("at_fused::at_value_and_grad", lib=library)
def _(
    student: list[Tensor], teacher: list[Tensor], masks: list[Tensor], *rest: Any
) -> tuple[Tensor, list[Tensor]]:
    _, _, *options, _, loss_gradient = rest
    reduction = LossOptions(*options).reduction
    loss = _fake_loss(student, teacher, reduction, *masks, loss_gradient)
    return loss, [torch.empty_like(x) for x in student]


# ---- autograd ------------------------------------------------------------------------------------


class _MapLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pairs: int, options: tuple[Any, ...], *maps: Tensor) -> Tensor:
        operator = operators.map_loss.default
        loss, found = below_autograd(operator, list(maps[:pairs]), list(maps[pairs:]), *options)
        ctx.pairs, ctx.options = pairs, options
        save(ctx, *maps, *found)
        return loss

    @staticmethod
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        pairs = ctx.pairs
        _, _, reduction, _, _, student_grad, teacher_grad = ctx.options
        saved = ctx.saved_tensors  # once: a checkpoint gives each tensor a single time
        maps, found = saved[: 2 * pairs], saved[2 * pairs :]
        if torch.is_grad_enabled():
            # With a graph, for a second derivative.
            found = eager.map_loss(list(maps[:pairs]), list(maps[pairs:]), *ctx.options)[1]
        sides = [*range(pairs)] * student_grad + [*range(pairs, 2 * pairs)] * teacher_grad
        gradients: list[Tensor | None] = [None] * (2 * pairs)
        for i, k in zip(sides, found, strict=True):
            g = loss_gradient if reduction == "sum" else loss_gradient[i % pairs]
            g = g.unsqueeze(1) if reduction == "sample" else g
            gradients[i] = k * g.to(k.dtype)
        return None, None, *gradients


class Call(NamedTuple):
    """A call of ``at_loss`` without its tensors: students, teachers, and perhaps masks."""

    pairs: int
    weights: list[float]
    skip_tokens: list[int]
    options: LossOptions
    student_grad: bool
    teacher_grad: bool

    def kept(self) -> range:
        """Return the numbers of the features of the sides whose gradient is asked for."""
        begin = 0 if self.student_grad else self.pairs
        return range(begin, 2 * self.pairs if self.teacher_grad else self.pairs)

    def skip_of(self, numbers: Sequence[int]) -> list[int]:
        """Return ``skip_tokens`` of some of the features."""
        return [self.skip_tokens[i] for i in numbers] if self.skip_tokens else []


class _ATLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor) -> Tensor:
        pairs, weights, skip_tokens, options, *grads = call
        features, masks = tensors[: 2 * pairs], list(tensors[2 * pairs :])
        sides = list(features[:pairs]), list(features[pairs:])
        loss, maps = below_autograd(
            operators.at_loss.default, *sides, masks, weights, skip_tokens, *options, *grads
        )
        ctx.call = call
        # A side without a gradient is remembered by its maps alone: its features may die.
        kept = call.kept()
        save(ctx, *features[kept.start : kept.stop], *maps, *masks)
        return loss

    @staticmethod
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        kept, count = call.kept(), 2 * call.pairs
        saved = ctx.saved_tensors
        features = saved[: len(kept)]
        maps, masks = saved[len(kept) : len(kept) + count], saved[len(kept) + count :]
        if torch.is_grad_enabled():
            maps = _coefficients(call, features, maps, masks)
        wanted = [i for i in kept if ctx.needs_input_grad[1 + i]]
        found = attention_map_backward(
            [features[i - kept.start] for i in wanted],
            [maps[i] for i in wanted],
            loss_gradient,
            [i % call.pairs for i in wanted],
            call.options.p,
            call.skip_of(wanted),
            [],
        )
        gradients: list[Tensor | None] = [None] * count
        for i, gradient in zip(wanted, found, strict=True):
            gradients[i] = gradient
        return None, *gradients, *(None for _ in masks)


def _coefficients(
    call: Call, features: Sequence[Tensor], maps: Sequence[Tensor], masks: Sequence[Tensor]
) -> list[Tensor]:
    """Compute the coefficient maps of ``at_loss`` with a graph, for a second derivative."""
    options, kept = call.options, call.kept()
    raw = [*maps]
    found = attention_map([*features], options.p, options.collapse, call.skip_of(kept))
    for i, q in zip(kept, found, strict=True):
        raw[i] = q * masks[i % call.pairs].to(q.dtype) if masks else q
    students, teachers = raw[: call.pairs], raw[call.pairs :]
    _, coefficients = eager.map_loss(
        students, teachers, call.weights, *options[2:], call.student_grad, call.teacher_grad
    )
    result = [*maps]
    for i, x, k in zip(kept, features, coefficients, strict=True):
        k = k * (options.p * eager.collapse_scale(x, options.collapse))
        result[i] = k * masks[i % call.pairs].to(k.dtype) if masks else k
    return result


def _map_loss_autograd(
    student: list[Tensor], teacher: list[Tensor], *rest: Any
) -> tuple[Tensor, list[Tensor]]:
    *options, student_grad, teacher_grad = rest
    tracked = tracks(student), tracks(teacher)
    if transformed() or ((student_grad or teacher_grad) and any(tracked)):
        # The second: the maps of a traced backward have a gradient, too.
        return eager.map_loss(student, teacher, *rest)
    if any(tracked):
        options += tracked
        return apply(_MapLoss, len(student), options, *student, *teacher), []
    return below_autograd(operators.map_loss.default, student, teacher, *rest)


def _at_loss_autograd(
    student: list[Tensor], teacher: list[Tensor], masks: list[Tensor], *rest: Any
) -> tuple[Tensor, list[Tensor]]:
    weights, skip_tokens, *options, student_grad, teacher_grad = rest
    tracked = tracks(student), tracks(teacher)
    if transformed() or ((student_grad or teacher_grad) and any(tracked)):
        return eager.at_loss(student, teacher, masks, *rest)
    if tracks(masks):
        raise RuntimeError(
            "at_fused::at_loss has no derivative for masks: multiply the maps for map_loss instead"
        )
    if any(tracked):
        call = Call(len(student), weights, skip_tokens, LossOptions(*options), *tracked)
        return apply(_ATLoss, call, *student, *teacher, *masks), []
    return below_autograd(operators.at_loss.default, student, teacher, masks, *rest)


def _at_value_and_grad_autograd(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
    if transformed():
        with torch.no_grad():
            return eager.at_value_and_grad(*arguments)
    return below_autograd(operators.at_value_and_grad.default, *arguments)


_map_loss = entry("map_loss", _map_loss_autograd)
_at_loss = entry("at_loss", _at_loss_autograd)
at_value_and_grad = entry("at_value_and_grad", _at_value_and_grad_autograd)


def map_loss(*arguments: Any) -> Tensor:
    """Return the loss of ``torch.ops.at_fused.map_loss``; autograd asks for what gradients need."""
    return _map_loss(*arguments, False, False)[0]


def map_value_and_grad(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
    """Return the loss of ``torch.ops.at_fused.map_loss`` and dL/dQ of the students' maps."""
    return _map_loss(*arguments, True, False)


def at_loss(*arguments: Any) -> Tensor:
    """Return the loss of ``torch.ops.at_fused.at_loss``; autograd asks for what gradients need."""
    return _at_loss(*arguments, False, False)[0]
