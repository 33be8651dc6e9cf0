"""Losses of maps and of features: schema and autograd of each operator.

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
from typing import Any

import torch
from torch import Tensor

from at_fused._ops.attention import attention_map, attention_map_backward
from at_fused._ops.library import (
    apply,
    below_autograd,
    define,
    entry,
    operators,
    save,
    tracks,
    transformed,
)
from at_fused.backends import eager

_PAIRS, _OPTIONS = "Tensor[] student, Tensor[] teacher", "str form, str reduction, str eps_mode"
_GRADS = "bool student_grad, bool teacher_grad"
_FEATURES = (
    f"{_PAIRS}, Tensor[] masks, float[] weights, int[] skip_tokens, float p, str collapse,"
    f" {_OPTIONS}, float eps"
)
_RESULT = "(Tensor, Tensor[])"
_ASK_NOTHING = False, False  # autograd asks for the maps that it needs
define(f"map_loss({_PAIRS}, float[] weights, {_OPTIONS}, float eps, {_GRADS}) -> {_RESULT}")
define(f"at_loss({_FEATURES}, {_GRADS}) -> {_RESULT}")
define(f"at_value_and_grad({_FEATURES}, float scale, Tensor? loss_gradient) -> {_RESULT}")


# ---- the loss of features ------------------------------------------------------------------------


def _at_loss_autograd(
    student: list[Tensor], teacher: list[Tensor], masks: list[Tensor], *rest: Any
) -> tuple[Tensor, list[Tensor]]:
    tracked = tracks(student), tracks(teacher)
    followed = tracked[0] or tracked[1]
    *options, student_grad, teacher_grad = rest
    if transformed() or (followed and (student_grad or teacher_grad)):
        # The second: the maps of a traced backward have a gradient, too.
        return eager.at_loss(student, teacher, masks, *rest)
    if tracks(masks):
        raise RuntimeError(
            "at_fused::at_loss has no derivative for masks: multiply the maps for map_loss instead"
        )
    if followed:
        rest = *options, *tracked
        return apply(_ATLoss, len(student), rest, *student, *teacher, *masks), []
    return below_autograd(operators.at_loss.default, student, teacher, masks, *rest)


class _ATLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pairs: int, rest: tuple[Any, ...], *tensors: Tensor) -> Tensor:
        features, masks = tensors[: 2 * pairs], tensors[2 * pairs :]
        loss, maps = below_autograd(
            operators.at_loss.default, features[:pairs], features[pairs:], masks, *rest
        )
        *_, student_grad, teacher_grad = rest
        # A side without a gradient is remembered by its maps alone: its features may die.
        kept = range(0 if student_grad else pairs, 2 * pairs if teacher_grad else pairs)
        ctx.pairs, ctx.rest, ctx.kept = pairs, rest, kept
        save(ctx, *features[kept.start : kept.stop], *maps, *masks)
        return loss

    @staticmethod
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        pairs, kept = ctx.pairs, ctx.kept
        _weights, skips, p, *_ = ctx.rest
        saved = ctx.saved_tensors
        features, maps = saved[: len(kept)], saved[len(kept) : len(kept) + 2 * pairs]
        masks = saved[len(kept) + 2 * pairs :]
        if torch.is_grad_enabled():
            maps = _coefficients(ctx, features, maps, masks)
        wanted = [i for i in kept if ctx.needs_input_grad[2 + i]]
        found = attention_map_backward(
            [features[i - kept.start] for i in wanted],
            [maps[i] for i in wanted],
            loss_gradient,
            [i % pairs for i in wanted],
            p,
            [skips[i] for i in wanted] if skips else [],
            [],
        )
        gradients: list[Tensor | None] = [None] * (2 * pairs + len(masks))
        for i, gradient in zip(wanted, found, strict=True):
            gradients[i] = gradient
        return None, None, *gradients


def _coefficients(
    ctx: Any, features: Sequence[Tensor], maps: Sequence[Tensor], masks: Sequence[Tensor]
) -> list[Tensor]:
    """Compute the coefficient maps of ``at_loss`` with a graph, for a second derivative."""
    pairs, kept = ctx.pairs, ctx.kept
    weights, skips, p, collapse, *rest = ctx.rest
    maps = [*maps]
    maps[kept.start : kept.stop] = attention_map(
        [*features], p, collapse, [skips[i] for i in kept] if skips else []
    )
    for i in kept if masks else ():
        maps[i] = maps[i] * masks[i % pairs].to(maps[i].dtype)
    _, found = eager.map_loss(maps[:pairs], maps[pairs:], weights, *rest)
    for i, x, k in zip(kept, features, found, strict=True):
        k = k * (p * eager.collapse_scale(x, collapse))
        maps[i] = k * masks[i % pairs].to(k.dtype) if masks else k
    return maps


# ---- the loss of maps ----------------------------------------------------------------------------


def _map_loss_autograd(
    student: list[Tensor], teacher: list[Tensor], *rest: Any
) -> tuple[Tensor, list[Tensor]]:
    tracked = tracks(student), tracks(teacher)
    *options, student_grad, teacher_grad = rest
    if transformed() or (any(tracked) and (student_grad or teacher_grad)):
        return eager.map_loss(student, teacher, *rest)
    if any(tracked):
        rest = *options, *tracked
        return apply(_MapLoss, len(student), rest, *student, *teacher), []
    return below_autograd(operators.map_loss.default, student, teacher, *rest)


class _MapLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pairs: int, rest: tuple[Any, ...], *maps: Tensor) -> Tensor:
        operator = operators.map_loss.default
        loss, found = below_autograd(operator, maps[:pairs], maps[pairs:], *rest)
        ctx.pairs, ctx.rest = pairs, rest
        save(ctx, *maps, *found)
        return loss

    @staticmethod
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        pairs = ctx.pairs
        *_, student_grad, teacher_grad = ctx.rest
        saved = ctx.saved_tensors  # once: a checkpoint gives each tensor a single time
        maps, found = saved[: 2 * pairs], saved[2 * pairs :]
        if torch.is_grad_enabled():
            # With a graph, for a second derivative.
            found = eager.map_loss(list(maps[:pairs]), list(maps[pairs:]), *ctx.rest)[1]
        sides = [*range(pairs)] * student_grad + [*range(pairs, 2 * pairs)] * teacher_grad
        gradients: list[Tensor | None] = [None] * (2 * pairs)
        for i, k in zip(sides, found, strict=True):
            gradients[i] = eager.times_loss_gradient(k, loss_gradient.to(k.dtype), i % pairs)
        return None, None, *gradients


# ---- value and gradient --------------------------------------------------------------------------


def _at_value_and_grad_autograd(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
    if transformed():
        with torch.no_grad():
            return eager.at_value_and_grad(*arguments)
    return below_autograd(operators.at_value_and_grad.default, *arguments)


at_loss = entry("at_loss", _at_loss_autograd, *_ASK_NOTHING)
map_loss = entry("map_loss", _map_loss_autograd, *_ASK_NOTHING)
at_value_and_grad = entry("at_value_and_grad", _at_value_and_grad_autograd)
