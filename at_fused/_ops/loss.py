"""Losses of maps and of features: schema, fake kernel and autograd of each operator.

    map_loss            the loss of a list of pairs of raw maps, and their gradients
    at_loss             attention_map and map_loss in one, of the plain options
    at_value_and_grad   at_loss and the students' gradients, in one pass

``map_loss`` returns ``(loss, maps)``: dL/dQ of the students' maps if ``student_grad``, then of the
teachers' if ``teacher_grad``. The loss is a scalar, (pairs,) with ``reduction="none"`` or
(pairs, B) with "sample", without the mean over the batch; the maps belong to its sum.

``at_loss`` returns ``(loss, maps)``. ``maps`` is empty without ``student_grad`` and
``teacher_grad``; otherwise it holds one (B, N) map per feature, students first: the coefficient map
k of a side whose gradient is asked for, the raw attention map of the other.

``at_value_and_grad`` returns ``(loss, gradients)``: those of the students, times ``scale`` and
``loss_gradient`` (a scalar, or one value per pair). Neither is part of a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from at_fused._ops.attention import attention_map, attention_map_backward, fake_map
from at_fused._ops.library import (
    apply,
    below_autograd,
    check_one_device,
    define,
    differentiate,
    library,
    operators,
    tracks,
)
from at_fused.backends import eager
from at_fused.backends.results import accumulate_dtype

define(
    "map_loss(Tensor[] student, Tensor[] teacher, float[] weights, str form, str reduction,"
    " str eps_mode, float eps, bool student_grad, bool teacher_grad) -> (Tensor, Tensor[])"
)
define(
    "at_loss(Tensor[] student, Tensor[] teacher, float[] weights, float p, str collapse, str form,"
    " str reduction, float eps, bool student_grad, bool teacher_grad) -> (Tensor, Tensor[])"
)
define(
    "at_value_and_grad(Tensor[] student, Tensor[] teacher, float[] weights, float p, str collapse,"
    " str form, str reduction, float eps, float scale, Tensor? loss_gradient)"
    " -> (Tensor, Tensor[])"
)


# ---- fake kernels --------------------------------------------------------------------------------


def _fake_loss(
    student: list[Tensor], teacher: list[Tensor], reduction: str, more: Tensor | None = None
) -> Tensor:
    check_one_device(student, teacher, [more])
    shape = {"sum": (), "none": (len(student),), "sample": (len(student), student[0].shape[0])}
    return student[0].new_empty(shape[reduction], dtype=accumulate_dtype(*student, *teacher))


@torch.library.register_fake("at_fused::map_loss", lib=library)
def _(
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
    maps = (student if student_grad else []) + (teacher if teacher_grad else [])
    return _fake_loss(student, teacher, reduction), [q.new_empty(q.shape) for q in maps]


@torch.library.register_fake("at_fused::at_loss", lib=library)
def _(
    student: list[Tensor],
    teacher: list[Tensor],
    weights: list[float],
    p: float,
    collapse: str,
    form: str,
    reduction: str,
    eps: float,
    student_grad: bool,
    teacher_grad: bool,
) -> tuple[Tensor, list[Tensor]]:
    keep = student_grad or teacher_grad
    loss = _fake_loss(student, teacher, reduction)
    return loss, [fake_map(x) for x in (*student, *teacher)] if keep else []


@torch.library.register_fake("at_fused::at_value_and_grad", lib=library)
def _(
    student: list[Tensor],
    teacher: list[Tensor],
    weights: list[float],
    p: float,
    collapse: str,
    form: str,
    reduction: str,
    eps: float,
    scale: float,
    loss_gradient: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    loss = _fake_loss(student, teacher, reduction, loss_gradient)
    return loss, [torch.empty_like(x) for x in student]


# ---- autograd ------------------------------------------------------------------------------------


def _added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


class _MapLoss(torch.autograd.Function):
    @staticmethod
    def forward(pairs: int, options: tuple[Any, ...], *maps: Tensor) -> tuple[Tensor, ...]:
        operator = operators.map_loss.default
        loss, found = below_autograd(operator, list(maps[:pairs]), list(maps[pairs:]), *options)
        return loss, *found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pairs, options, *maps = inputs
        ctx.set_materialize_grads(False)
        ctx.pairs, ctx.options = pairs, options
        ctx.save_for_backward(*maps, *output[1:])

    @staticmethod
    def backward(
        ctx: Any, loss_gradient: Tensor | None, *second: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        pairs = ctx.pairs
        _, _, reduction, _, _, student_grad, teacher_grad = ctx.options
        saved = ctx.saved_tensors
        maps, found = saved[: 2 * pairs], saved[2 * pairs :]
        sides = [*range(pairs)] * student_grad + [*range(pairs, 2 * pairs)] * teacher_grad
        gradients: list[Tensor | None] = [None] * (2 * pairs)
        for i, k in zip(sides, found, strict=True):
            if loss_gradient is None or not ctx.needs_input_grad[2 + i]:
                continue
            g = loss_gradient if reduction == "sum" else loss_gradient[i % pairs]
            g = g.unsqueeze(1) if reduction == "sample" else g
            gradients[i] = k * g.to(k.dtype)
        if any(g is not None for g in second):
            create_graph = torch.is_grad_enabled()
            with torch.enable_grad():
                inputs = [q.view_as(q) for q in maps]  # aliases: a result is a function of the maps
                student, teacher = inputs[:pairs], inputs[pairs:]
                outputs = eager.map_loss(student, teacher, *ctx.options)[1]
                wanted = [i for i in range(2 * pairs) if ctx.needs_input_grad[2 + i]]
                chosen = [inputs[i] for i in wanted]
                products = differentiate(outputs, chosen, second, create_graph)
            for i, product in zip(wanted, products, strict=True):
                gradients[i] = _added(gradients[i], product)
        return None, None, *gradients


class _ATLoss(torch.autograd.Function):
    @staticmethod
    def forward(pairs: int, options: tuple[Any, ...], *features: Tensor) -> tuple[Tensor, ...]:
        loss, maps = below_autograd(
            operators.at_loss.default, list(features[:pairs]), list(features[pairs:]), *options
        )
        return loss, *maps

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pairs, options, *features = inputs
        _, *maps = output
        ctx.set_materialize_grads(False)
        ctx.pairs, ctx.options = pairs, options
        # A side without a gradient is remembered by its maps alone: its features may die.
        student_grad, teacher_grad = options[-2:]
        kept = features if teacher_grad else features[:pairs]
        raw = maps[pairs:] if not teacher_grad else []
        if not student_grad:
            kept, raw = kept[pairs:], maps[:pairs] + raw
        ctx.save_for_backward(*kept, *maps)
        ctx.mark_non_differentiable(*raw)

    @staticmethod
    def backward(
        ctx: Any, loss_gradient: Tensor | None, *map_gradients: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        pairs = ctx.pairs
        p = ctx.options[1]
        needed = ctx.needs_input_grad[2:]
        student_grad, teacher_grad = ctx.options[-2:]
        kept = range(0 if student_grad else pairs, 2 * pairs if teacher_grad else pairs)
        saved = ctx.saved_tensors
        features, maps = dict(zip(kept, saved, strict=False)), saved[len(kept) :]
        wanted = [i for i in kept if needed[i]]
        if len(wanted) != sum(needed):
            raise RuntimeError(
                "at_fused::at_loss: a gradient is wanted for a side that was called without "
                "student_grad=True or teacher_grad=True"
            )
        gradients: list[Tensor | None] = [None] * (2 * pairs)
        if loss_gradient is not None:
            found = attention_map_backward(
                [features[i] for i in wanted],
                [maps[i] for i in wanted],
                loss_gradient,
                [i % pairs for i in wanted],
                p,
            )
            for i, gradient in zip(wanted, found, strict=True):
                gradients[i] = gradient
        if any(g is not None for g in map_gradients):
            second = _through_coefficients(ctx, features, maps, wanted, map_gradients)
            gradients = [_added(a, b) for a, b in zip(gradients, second, strict=True)]
        return None, None, *gradients


def _through_coefficients(
    ctx: Any,
    features: dict[int, Tensor],
    maps: Sequence[Tensor],
    wanted: list[int],
    map_gradients: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """What a second derivative sends back through the coefficient maps of ``at_loss``."""
    pairs = ctx.pairs
    weights, p, collapse, form, reduction, eps, _, _ = ctx.options
    create_graph = torch.is_grad_enabled()
    # What a side without features would be scaled by does not matter: it has no gradient.
    scales = [
        p * eager.collapse_scale(features[i], collapse) if i in features else 1.0
        for i in range(2 * pairs)
    ]
    outputs: list[Tensor] = []
    gradients: list[Tensor | None] = []
    with torch.enable_grad():
        # By aliases: a coefficient map is itself a function of the features.
        inputs = {i: x.view_as(x) for i, x in features.items()}
        raw = [
            attention_map([inputs[i]], p, collapse)[0] if i in inputs else m
            for i, m in enumerate(maps)
        ]
        for i in range(pairs):
            j = pairs + i
            weight = eager.sample_weight(weights, i, raw[i].shape[0], reduction)
            _, ks, kt = eager.pair_loss(raw[i], raw[j], weight, form, "max", eps)
            outputs += (ks * scales[i]).to(raw[i].dtype), (kt * scales[j]).to(raw[j].dtype)
            gradients += map_gradients[i], map_gradients[j]
        found = differentiate(outputs, [inputs[i] for i in wanted], gradients, create_graph)
    by_index = dict(zip(wanted, found, strict=True))
    return [by_index.get(i) for i in range(2 * pairs)]


def _map_loss_autograd(
    student: list[Tensor], teacher: list[Tensor], *options: Any
) -> tuple[Tensor, list[Tensor]]:
    if tracks(student, teacher):
        loss, *maps = apply(_MapLoss, len(student), options, *student, *teacher)
        return loss, maps
    return below_autograd(operators.map_loss.default, student, teacher, *options)


def _at_loss_autograd(
    student: list[Tensor], teacher: list[Tensor], *options: Any
) -> tuple[Tensor, list[Tensor]]:
    if options[-2] or options[-1] or tracks(student, teacher):
        loss, *maps = apply(_ATLoss, len(student), options, *student, *teacher)
        return loss, maps
    return below_autograd(operators.at_loss.default, student, teacher, *options)


def _at_value_and_grad_autograd(
    student: list[Tensor], teacher: list[Tensor], *options: Any
) -> tuple[Tensor, list[Tensor]]:
    return below_autograd(operators.at_value_and_grad.default, student, teacher, *options)


library.impl("map_loss", _map_loss_autograd, "Autograd")
library.impl("at_loss", _at_loss_autograd, "Autograd")
library.impl("at_value_and_grad", _at_value_and_grad_autograd, "Autograd")


# ---- calls ---------------------------------------------------------------------------------------


def map_loss(
    student: list[Tensor], teacher: list[Tensor], *options: Any
) -> tuple[Tensor, list[Tensor]]:
    """``torch.ops.at_fused.map_loss``."""
    if torch.compiler.is_compiling():
        return operators.map_loss.default(student, teacher, *options)
    return _map_loss_autograd(student, teacher, *options)


def at_loss(
    student: list[Tensor], teacher: list[Tensor], *options: Any
) -> tuple[Tensor, list[Tensor]]:
    """``torch.ops.at_fused.at_loss``."""
    if torch.compiler.is_compiling():
        return operators.at_loss.default(student, teacher, *options)
    return _at_loss_autograd(student, teacher, *options)


def at_value_and_grad(
    student: list[Tensor], teacher: list[Tensor], *options: Any
) -> tuple[Tensor, list[Tensor]]:
    """``torch.ops.at_fused.at_value_and_grad``."""
    return operators.at_value_and_grad.default(student, teacher, *options)
