"""The operators of attention transfer: schema, fake kernel and autograd of each, in one place.

    attention_map            raw maps of a list of features
    attention_map_backward   the gradient of a list of features from their coefficient maps
    map_loss                 the loss of a list of pairs of raw maps, and their gradients
    at_loss                  attention_map and map_loss in one, of the plain options
    at_value_and_grad        at_loss and the students' gradients, in one pass

A feature is (B, C, *spatial) with any strides, a map (B, N). All take lists, so that a network's
stages are one call and, on a GPU, one launch.

``attention_map`` with ``collapse="max"`` returns the n maps and behind them n int32 maps of the
channels that won. Without ``absolute`` the power is x^p, p a whole number. ``sizes`` holds, feature
by feature, the spatial size of its map: a feature of another size is average-pooled to it before
the power (adaptively, as torch does), which is never written to memory. Empty: as they are.

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

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from at_fused._ops.library import (
    apply,
    below_autograd,
    define,
    differentiate,
    library,
    operators,
    tracks,
)
from at_fused.backends import eager

define(
    "attention_map(Tensor[] features, float p, str collapse, bool absolute=True, int[] sizes=[])"
    " -> Tensor[]"
)
define(
    "attention_map_backward(Tensor[] features, Tensor[] coefficients, Tensor? loss_gradient,"
    " int[] pairs, float p, bool absolute, int[] sizes, Tensor[] channels) -> Tensor[]"
)
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


# ---- fake kernels: shapes, dtypes and strides without data ---------------------------------------


def _fake_map(x: Tensor, size: Sequence[int]) -> Tensor:
    return x.new_empty((x.shape[0], math.prod(size)), dtype=eager.accumulate_dtype(x))


@torch.library.register_fake("at_fused::attention_map", lib=library)
def _(
    features: list[Tensor],
    p: float,
    collapse: str,
    absolute: bool = True,
    sizes: Sequence[int] = (),
) -> list[Tensor]:
    maps = [
        _fake_map(x, size)
        for x, size in zip(features, eager.split_sizes(features, sizes), strict=True)
    ]
    return maps + [q.to(torch.int32) for q in maps] if collapse == "max" else maps


def _fake_loss(student: list[Tensor], teacher: list[Tensor], reduction: str) -> Tensor:
    shape = {"sum": (), "none": (len(student),), "sample": (len(student), student[0].shape[0])}
    return student[0].new_empty(shape[reduction], dtype=eager.accumulate_dtype(*student, *teacher))


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
    return loss, [_fake_map(x, x.shape[2:]) for x in (*student, *teacher)] if keep else []


@torch.library.register_fake("at_fused::attention_map_backward", lib=library)
def _(
    features: list[Tensor],
    coefficients: list[Tensor],
    loss_gradient: Tensor | None,
    pairs: list[int],
    p: float,
    absolute: bool = True,
    sizes: Sequence[int] = (),
    channels: Sequence[Tensor] = (),
) -> list[Tensor]:
    return [torch.empty_like(x) for x in features]


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
    return _fake_loss(student, teacher, reduction), [torch.empty_like(x) for x in student]


# ---- autograd ------------------------------------------------------------------------------------


class _AttentionMap(torch.autograd.Function):
    @staticmethod
    def forward(
        p: float, collapse: str, absolute: bool, sizes: Sequence[int], *features: Tensor
    ) -> tuple[Tensor, ...]:
        operator = operators.attention_map.default
        return tuple(below_autograd(operator, list(features), p, collapse, absolute, sizes))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        p, collapse, absolute, sizes, *features = inputs
        maps, channels = output[: len(features)], output[len(features) :]
        ctx.set_materialize_grads(False)
        ctx.options = p, collapse, absolute
        ctx.sizes = list(eager.split_sizes(features, sizes)) if sizes else [[]] * len(features)
        # Features without a gradient, a teacher's, may die.
        ctx.kept = [i for i, x in enumerate(features) if x.requires_grad]
        ctx.count = len(maps)
        ctx.save_for_backward(
            *(features[i] for i in ctx.kept), *(channels[i] for i in ctx.kept if channels)
        )
        ctx.mark_non_differentiable(*channels)

    @staticmethod
    def backward(ctx: Any, *map_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        p, collapse, absolute = ctx.options
        saved, kept = ctx.saved_tensors, ctx.kept
        gradients: list[Tensor | None] = [None] * ctx.count
        wanted = [
            (j, i)
            for j, i in enumerate(kept)
            if map_gradients[i] is not None and ctx.needs_input_grad[4 + i]
        ]
        if wanted:
            chosen = [saved[j] for j, _ in wanted]
            found = attention_map_backward(
                chosen,
                [
                    map_gradients[i] * (p * eager.collapse_scale(x, collapse))
                    for x, (_, i) in zip(chosen, wanted, strict=True)
                ],
                None,
                [i for _, i in wanted],
                p,
                absolute,
                [n for _, i in wanted for n in ctx.sizes[i]],
                [saved[len(kept) + j] for j, _ in wanted] if collapse == "max" else [],
            )
            for (_, i), gradient in zip(wanted, found, strict=True):
                gradients[i] = gradient
        return None, None, None, None, *gradients


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
                first = gradients[i]
                gradients[i] = (
                    first if product is None else product if first is None else first + product
                )
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
            gradients = [
                b if a is None else a if b is None else a + b
                for a, b in zip(gradients, second, strict=True)
            ]
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


class _AttentionMapBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        pairs: list[int],
        options: tuple[Any, ...],
        loss_gradient: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        count = len(pairs)
        operator = operators.attention_map_backward.default
        features, coefficients = list(tensors[:count]), list(tensors[count : 2 * count])
        p, absolute, sizes = options
        channels = list(tensors[2 * count :])
        return tuple(
            below_autograd(
                operator,
                features,
                coefficients,
                loss_gradient,
                pairs,
                p,
                absolute,
                sizes,
                channels,
            )
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pairs, options, loss_gradient, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.options = pairs, options, loss_gradient is None
        ctx.save_for_backward(*(() if loss_gradient is None else (loss_gradient,)), *tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        pairs, (p, absolute, sizes), no_gradient = ctx.options
        saved = ctx.saved_tensors
        create_graph = torch.is_grad_enabled()
        count = len(pairs)
        needed = ctx.needs_input_grad[3:] if no_gradient else ctx.needs_input_grad[2:]
        with torch.enable_grad():
            # By aliases: a coefficient map is itself a function of the features.
            saved = [x.view_as(x) for x in saved]
            loss_gradient, tensors = (None, saved) if no_gradient else (saved[0], saved[1:])
            outputs = eager.attention_map_backward(
                tensors[:count],
                tensors[count : 2 * count],
                loss_gradient,
                pairs,
                p,
                absolute,
                sizes,
                tensors[2 * count :],
            )
            wanted = [x for x, n in zip(saved, needed, strict=True) if n]
            products = iter(differentiate(outputs, wanted, gradients, create_graph))
        found = [next(products) if n else None for n in needed]
        return None, None, *((None,) if no_gradient else ()), *found


def _attention_map_autograd(
    features: list[Tensor],
    p: float,
    collapse: str,
    absolute: bool = True,
    sizes: Sequence[int] = (),
) -> list[Tensor]:
    if tracks(features):
        return list(apply(_AttentionMap, p, collapse, absolute, sizes, *features))
    operator = operators.attention_map.default
    return below_autograd(operator, features, p, collapse, absolute, sizes)


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


def _attention_map_backward_autograd(
    features: list[Tensor],
    coefficients: list[Tensor],
    loss_gradient: Tensor | None,
    pairs: list[int],
    p: float,
    absolute: bool = True,
    sizes: Sequence[int] = (),
    channels: Sequence[Tensor] = (),
) -> list[Tensor]:
    if tracks(features, coefficients, [loss_gradient]):
        tensors = (*features, *coefficients, *channels)
        options = p, absolute, sizes
        return list(apply(_AttentionMapBackward, pairs, options, loss_gradient, *tensors))
    return below_autograd(
        operators.attention_map_backward.default,
        features,
        coefficients,
        loss_gradient,
        pairs,
        p,
        absolute,
        sizes,
        channels,
    )


def _at_value_and_grad_autograd(
    student: list[Tensor], teacher: list[Tensor], *options: Any
) -> tuple[Tensor, list[Tensor]]:
    return below_autograd(operators.at_value_and_grad.default, student, teacher, *options)


library.impl("map_loss", _map_loss_autograd, "Autograd")
library.impl("attention_map", _attention_map_autograd, "Autograd")
library.impl("at_loss", _at_loss_autograd, "Autograd")
library.impl("attention_map_backward", _attention_map_backward_autograd, "Autograd")
library.impl("at_value_and_grad", _at_value_and_grad_autograd, "Autograd")


# ---- calls ---------------------------------------------------------------------------------------


def attention_map(
    features: list[Tensor],
    p: float,
    collapse: str,
    absolute: bool = True,
    sizes: Sequence[int] = (),
) -> list[Tensor]:
    """``torch.ops.at_fused.attention_map``."""
    if torch.compiler.is_compiling():
        return operators.attention_map.default(features, p, collapse, absolute, sizes)
    return _attention_map_autograd(features, p, collapse, absolute, sizes)


def attention_map_backward(
    features: list[Tensor],
    coefficients: list[Tensor],
    loss_gradient: Tensor | None,
    pairs: list[int],
    p: float,
    absolute: bool = True,
    sizes: Sequence[int] = (),
    channels: Sequence[Tensor] = (),
) -> list[Tensor]:
    """``torch.ops.at_fused.attention_map_backward``."""
    call = (
        operators.attention_map_backward.default
        if torch.compiler.is_compiling()
        else _attention_map_backward_autograd
    )
    return call(features, coefficients, loss_gradient, pairs, p, absolute, sizes, channels)


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
