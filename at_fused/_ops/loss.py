"""Operators for losses of maps and of features: schema and autograd.

    map_loss            loss of a list of pairs of raw maps, and the gradients of the maps
    at_loss             loss of a list of pairs of features, in one pass over them
    at_value_and_grad   at_loss and the students' gradients, in one call

A loss is a scalar, (pairs,) with ``reduction="none"``, or (pairs, B) with "sample", without the
mean over the batch. The maps and gradients returned with it are those of its sum.

``map_loss`` returns ``(loss, maps)``: dL/dQ of the students' maps if ``student_grad``, then of the
teachers' maps if ``teacher_grad``.

``at_loss`` returns ``(loss, maps)``. ``masks`` is empty or has a factor (B, N) of both raw maps for
each pair. ``skip_tokens`` is as in ``attention_map``, students first. ``maps`` is empty without
``student_grad`` and ``teacher_grad``. Otherwise it has one (B, N) map per feature, students first:
the coefficient map k on a side with a gradient, the masked raw map on the other. If a feature
requires a gradient, autograd itself requests and saves the maps.

``at_value_and_grad`` returns ``(loss, gradients)``: the students' gradients times ``scale`` and
``loss_gradient`` (a scalar, (pairs,) or (pairs, B)). Neither result has a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from at_fused._ops.attention import attention_map, attention_map_backward
from at_fused._ops.library import (
    apply,
    call_below_autograd,
    define,
    is_transformed,
    needs_graph,
    operators,
    register_autograd,
    save_for_backward,
)
from at_fused.backends import eager

_PAIRS, _OPTIONS = "Tensor[] student, Tensor[] teacher", "str form, str reduction, str eps_mode"
_GRADS = "bool student_grad, bool teacher_grad"
_FEATURES = (
    f"{_PAIRS}, Tensor[] masks, float[] weights, int[] skip_tokens, float p, str collapse,"
    f" {_OPTIONS}, float eps"
)
_RESULT = "(Tensor, Tensor[])"
_NO_MAPS = False, False  # student_grad, teacher_grad: autograd sets what it needs
define(f"map_loss({_PAIRS}, float[] weights, {_OPTIONS}, float eps, {_GRADS}) -> {_RESULT}")
define(f"at_loss({_FEATURES}, {_GRADS}) -> {_RESULT}")
define(f"at_value_and_grad({_FEATURES}, float scale, Tensor? loss_gradient) -> {_RESULT}")


# ---- the loss of features ------------------------------------------------------------------------


def _at_loss_autograd(
    student: list[Tensor], teacher: list[Tensor], masks: list[Tensor], *rest: Any
) -> tuple[Tensor, list[Tensor]]:
    side_grads = needs_graph(student), needs_graph(teacher)
    has_graph = side_grads[0] or side_grads[1]
    *options, student_grad, teacher_grad = rest
    # In a traced backward the maps need a gradient, too.
    if is_transformed() or (has_graph and (student_grad or teacher_grad)):
        return eager.at_loss(student, teacher, masks, *rest)
    if needs_graph(masks):
        raise RuntimeError(
            "at_fused::at_loss has no derivative for masks; multiply the maps by the mask and call "
            "map_loss instead"
        )
    if has_graph:
        rest = *options, *side_grads
        return apply(_ATLoss, len(student), rest, *student, *teacher, *masks), []
    return call_below_autograd(operators.at_loss.default, student, teacher, masks, *rest)


class _ATLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pairs: int, rest: tuple[Any, ...], *tensors: Tensor) -> Tensor:
        features, masks = tensors[: 2 * pairs], tensors[2 * pairs :]
        loss, maps = call_below_autograd(
            operators.at_loss.default, features[:pairs], features[pairs:], masks, *rest
        )
        *_, student_grad, teacher_grad = rest
        # A side without a gradient saves its maps only, so that its features can be freed.
        saved = range(0 if student_grad else pairs, 2 * pairs if teacher_grad else pairs)
        ctx.pairs, ctx.rest, ctx.saved = pairs, rest, saved
        save_for_backward(ctx, *features[saved.start : saved.stop], *maps, *masks)
        return loss

    @staticmethod
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        pairs, saved, tensors = ctx.pairs, ctx.saved, ctx.saved_tensors
        _weights, skips, p, *_ = ctx.rest
        first_mask = len(saved) + 2 * pairs
        features, maps = tensors[: len(saved)], tensors[len(saved) : first_mask]
        masks = tensors[first_mask:]
        if torch.is_grad_enabled():
            maps = _coefficients(ctx, features, maps, masks)
        needed = [i for i in saved if ctx.needs_input_grad[2 + i]]
        results = attention_map_backward(
            [features[i - saved.start] for i in needed],
            [maps[i] for i in needed],
            loss_gradient,
            [i % pairs for i in needed],
            p,
            [skips[i] for i in needed] if skips else [],
            [],
        )
        gradients: list[Tensor | None] = [None] * (2 * pairs + len(masks))
        for i, gradient in zip(needed, results, strict=True):
            gradients[i] = gradient
        return None, None, *gradients


def _coefficients(
    ctx: Any, features: Sequence[Tensor], maps: Sequence[Tensor], masks: Sequence[Tensor]
) -> list[Tensor]:
    """Compute the coefficient maps of ``at_loss`` with a graph, for a second derivative."""
    pairs, saved = ctx.pairs, ctx.saved
    weights, skips, p, collapse, *rest = ctx.rest
    maps = [*maps]
    maps[saved.start : saved.stop] = attention_map(
        [*features], p, collapse, [skips[i] for i in saved] if skips else []
    )
    for i in saved if masks else ():
        maps[i] = maps[i] * masks[i % pairs].to(maps[i].dtype)
    _, map_gradients = eager.map_loss(maps[:pairs], maps[pairs:], weights, *rest)
    for i, x, k in zip(saved, features, map_gradients, strict=True):
        k = k * (p * eager.collapse_scale(x, collapse))
        maps[i] = k * masks[i % pairs].to(k.dtype) if masks else k
    return maps


# ---- the loss of maps ----------------------------------------------------------------------------


def _map_loss_autograd(
    student: list[Tensor], teacher: list[Tensor], *rest: Any
) -> tuple[Tensor, list[Tensor]]:
    side_grads = needs_graph(student), needs_graph(teacher)
    *options, student_grad, teacher_grad = rest
    if is_transformed() or (any(side_grads) and (student_grad or teacher_grad)):
        return eager.map_loss(student, teacher, *rest)
    if any(side_grads):
        rest = *options, *side_grads
        return apply(_MapLoss, len(student), rest, *student, *teacher), []
    return call_below_autograd(operators.map_loss.default, student, teacher, *rest)


class _MapLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pairs: int, rest: tuple[Any, ...], *maps: Tensor) -> Tensor:
        operator = operators.map_loss.default
        loss, gradients = call_below_autograd(operator, maps[:pairs], maps[pairs:], *rest)
        ctx.pairs, ctx.rest = pairs, rest
        save_for_backward(ctx, *maps, *gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        pairs = ctx.pairs
        *_, student_grad, teacher_grad = ctx.rest
        saved = ctx.saved_tensors  # read once: checkpointing unpacks each tensor a single time
        maps, map_gradients = saved[: 2 * pairs], saved[2 * pairs :]
        if torch.is_grad_enabled():
            # With a graph, for a second derivative.
            map_gradients = eager.map_loss(list(maps[:pairs]), list(maps[pairs:]), *ctx.rest)[1]
        indices = [*range(pairs)] * student_grad + [*range(pairs, 2 * pairs)] * teacher_grad
        gradients: list[Tensor | None] = [None] * (2 * pairs)
        for i, k in zip(indices, map_gradients, strict=True):
            gradients[i] = eager.times_loss_gradient(k, loss_gradient.to(k.dtype), i % pairs)
        return None, None, *gradients


# ---- value and gradient --------------------------------------------------------------------------


def _at_value_and_grad_autograd(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
    if is_transformed():
        with torch.no_grad():
            return eager.at_value_and_grad(*arguments)
    return call_below_autograd(operators.at_value_and_grad.default, *arguments)


at_loss = register_autograd("at_loss", _at_loss_autograd, *_NO_MAPS)
map_loss = register_autograd("map_loss", _map_loss_autograd, *_NO_MAPS)
at_value_and_grad = register_autograd("at_value_and_grad", _at_value_and_grad_autograd)
