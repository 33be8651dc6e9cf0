"""The operators ``torch.ops.at_fused.*``: schema, fake kernel and autograd of each, in one place.

    attention_map            raw maps of a list of features
    at_loss                  the loss of a list of pairs, and their maps for the backward pass
    attention_map_backward   the gradient of a list of features from their coefficient maps
    at_value_and_grad        the loss of a list of pairs and the students' gradients, in one pass

A feature is (B, C, *spatial) with any strides. All take lists, so that a network's stages are one
call and, on a GPU, one launch. What runs them is chosen in ``backends``; ``backends.eager`` is
registered for every device, a compiled library for its own on top of it.

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

from at_fused.backends import OPERATORS, eager

_library = torch.library.Library("at_fused", "DEF")
_tags = (torch.Tag.pt2_compliant_tag,)
_library.define("attention_map(Tensor[] features, float p, str collapse) -> Tensor[]", tags=_tags)
_library.define(
    "at_loss(Tensor[] student, Tensor[] teacher, float[] weights, float p, str collapse, str form,"
    " str reduction, float eps, bool student_grad, bool teacher_grad) -> (Tensor, Tensor[])",
    tags=_tags,
)
_library.define(
    "attention_map_backward(Tensor[] features, Tensor[] coefficients, Tensor? loss_gradient,"
    " int[] pairs, float p) -> Tensor[]",
    tags=_tags,
)
_library.define(
    "at_value_and_grad(Tensor[] student, Tensor[] teacher, float[] weights, float p, str collapse,"
    " str form, str reduction, float eps, float scale, Tensor? loss_gradient)"
    " -> (Tensor, Tensor[])",
    tags=_tags,
)

for _name in OPERATORS:
    _library.impl(_name, getattr(eager, _name), "CompositeExplicitAutograd")

_operators = torch.ops.at_fused


# ---- fake kernels: shapes, dtypes and strides without data ---------------------------------------


def _fake_map(x: Tensor) -> Tensor:
    positions = 1
    for size in x.shape[2:]:
        positions = positions * size
    return x.new_empty((x.shape[0], positions), dtype=eager.accumulate_dtype(x))


@torch.library.register_fake("at_fused::attention_map", lib=_library)
def _(features: list[Tensor], p: float, collapse: str) -> list[Tensor]:
    return [_fake_map(x) for x in features]


def _fake_loss(student: list[Tensor], teacher: list[Tensor], reduction: str) -> Tensor:
    shape = () if reduction == "sum" else (len(student),)
    return student[0].new_empty(shape, dtype=eager.accumulate_dtype(*student, *teacher))


@torch.library.register_fake("at_fused::at_loss", lib=_library)
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
    return loss, [_fake_map(x) for x in (*student, *teacher)] if keep else []


@torch.library.register_fake("at_fused::attention_map_backward", lib=_library)
def _(
    features: list[Tensor],
    coefficients: list[Tensor],
    loss_gradient: Tensor | None,
    pairs: list[int],
    p: float,
) -> list[Tensor]:
    return [torch.empty_like(x) for x in features]


@torch.library.register_fake("at_fused::at_value_and_grad", lib=_library)
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
#
# torch.library.register_autograd would do, at twice the time per call: it walks every argument as a
# tree. These functions take their tensors flat instead.


def _differentiate(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    create_graph: bool,
) -> list[Tensor | None]:
    """Vector-Jacobian products; None where an input has no part in an output with a gradient."""
    known = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None]
    known = [(o, g) for o, g in known if o.requires_grad]
    if not known or not inputs:
        return [None] * len(inputs)
    return list(
        torch.autograd.grad(
            [o for o, _ in known],
            inputs,
            [g for _, g in known],
            create_graph=create_graph,
            allow_unused=True,
        )
    )


def _below_autograd(operator: Any, *arguments: Any) -> Any:
    """Calls an operator's kernel itself, not its autograd again."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


class _AttentionMap(torch.autograd.Function):
    @staticmethod
    def forward(p: float, collapse: str, *features: Tensor) -> tuple[Tensor, ...]:
        return tuple(_below_autograd(_operators.attention_map.default, list(features), p, collapse))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        p, collapse, *features = inputs
        ctx.set_materialize_grads(False)
        ctx.options = p, collapse
        ctx.save_for_backward(*features)

    @staticmethod
    def backward(ctx: Any, *map_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        p, collapse = ctx.options
        features = ctx.saved_tensors
        gradients: list[Tensor | None] = [None] * len(features)
        wanted = [
            i for i, g in enumerate(map_gradients) if g is not None and ctx.needs_input_grad[2 + i]
        ]
        coefficients = [
            map_gradients[i] * (p * eager.collapse_scale(features[i], collapse)) for i in wanted
        ]
        if wanted:
            chosen = [features[i] for i in wanted]
            found = attention_map_backward(chosen, coefficients, None, wanted, p)
            for i, gradient in zip(wanted, found, strict=True):
                gradients[i] = gradient
        return None, None, *gradients


class _ATLoss(torch.autograd.Function):
    @staticmethod
    def forward(pairs: int, options: tuple[Any, ...], *features: Tensor) -> tuple[Tensor, ...]:
        loss, maps = _below_autograd(
            _operators.at_loss.default, list(features[:pairs]), list(features[pairs:]), *options
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
    weights, p, collapse, form, _, eps, _, _ = ctx.options
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
            weight = weights[i] if weights else 1.0
            _, ks, kt = eager.pair_loss(raw[i], raw[j], weight, form, eps, scales[i], scales[j])
            outputs += ks.to(raw[i].dtype), kt.to(raw[j].dtype)
            gradients += map_gradients[i], map_gradients[j]
        found = _differentiate(outputs, [inputs[i] for i in wanted], gradients, create_graph)
    by_index = dict(zip(wanted, found, strict=True))
    return [by_index.get(i) for i in range(2 * pairs)]


class _AttentionMapBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        pairs: list[int], p: float, loss_gradient: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        count = len(pairs)
        features, coefficients = list(tensors[:count]), list(tensors[count:])
        return tuple(
            _below_autograd(
                _operators.attention_map_backward.default,
                features,
                coefficients,
                loss_gradient,
                pairs,
                p,
            )
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pairs, p, loss_gradient, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.options = pairs, p, loss_gradient is None
        ctx.save_for_backward(*(() if loss_gradient is None else (loss_gradient,)), *tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        pairs, p, no_gradient = ctx.options
        saved = ctx.saved_tensors
        create_graph = torch.is_grad_enabled()
        count = len(pairs)
        needed = ctx.needs_input_grad[3:] if no_gradient else ctx.needs_input_grad[2:]
        with torch.enable_grad():
            # By aliases: a coefficient map is itself a function of the features.
            saved = [x.view_as(x) for x in saved]
            loss_gradient, tensors = (None, saved) if no_gradient else (saved[0], saved[1:])
            outputs = eager.attention_map_backward(
                tensors[:count], tensors[count:], loss_gradient, pairs, p
            )
            wanted = [x for x, n in zip(saved, needed, strict=True) if n]
            products = iter(_differentiate(outputs, wanted, gradients, create_graph))
        found = [next(products) if n else None for n in needed]
        return None, None, *((None,) if no_gradient else ()), *found


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    if torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    # Function.apply itself first binds the arguments to forward's signature, for default values;
    # there are none here, and that costs more than all the rest of a small call.
    plain: Any = super(torch.autograd.Function, function)
    return plain.apply(*arguments)


def _tracks(*groups: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for group in groups for x in group
    )


def _attention_map_autograd(features: list[Tensor], p: float, collapse: str) -> list[Tensor]:
    if _tracks(features):
        return list(_apply(_AttentionMap, p, collapse, *features))
    return _below_autograd(_operators.attention_map.default, features, p, collapse)


def _at_loss_autograd(
    student: list[Tensor], teacher: list[Tensor], *options: Any
) -> tuple[Tensor, list[Tensor]]:
    if options[-2] or options[-1] or _tracks(student, teacher):
        loss, *maps = _apply(_ATLoss, len(student), options, *student, *teacher)
        return loss, maps
    return _below_autograd(_operators.at_loss.default, student, teacher, *options)


def _attention_map_backward_autograd(
    features: list[Tensor],
    coefficients: list[Tensor],
    loss_gradient: Tensor | None,
    pairs: list[int],
    p: float,
) -> list[Tensor]:
    if _tracks(features, coefficients, [loss_gradient]):
        return list(
            _apply(_AttentionMapBackward, pairs, p, loss_gradient, *features, *coefficients)
        )
    return _below_autograd(
        _operators.attention_map_backward.default, features, coefficients, loss_gradient, pairs, p
    )


def _at_value_and_grad_autograd(
    student: list[Tensor], teacher: list[Tensor], *options: Any
) -> tuple[Tensor, list[Tensor]]:
    return _below_autograd(_operators.at_value_and_grad.default, student, teacher, *options)


_library.impl("attention_map", _attention_map_autograd, "Autograd")
_library.impl("at_loss", _at_loss_autograd, "Autograd")
_library.impl("attention_map_backward", _attention_map_backward_autograd, "Autograd")
_library.impl("at_value_and_grad", _at_value_and_grad_autograd, "Autograd")


# ---- calls ---------------------------------------------------------------------------------------
#
# A graph that is being compiled or exported holds the operators themselves. Elsewhere the autograd
# functions are called directly: it saves a way through the dispatcher, and torch.func sees an
# autograd.Function only where it is applied above the dispatcher.


def attention_map(features: list[Tensor], p: float, collapse: str) -> list[Tensor]:
    """``torch.ops.at_fused.attention_map``."""
    if torch.compiler.is_compiling():
        return _operators.attention_map.default(features, p, collapse)
    return _attention_map_autograd(features, p, collapse)


def at_loss(
    student: list[Tensor], teacher: list[Tensor], *options: Any
) -> tuple[Tensor, list[Tensor]]:
    """``torch.ops.at_fused.at_loss``."""
    if torch.compiler.is_compiling():
        return _operators.at_loss.default(student, teacher, *options)
    return _at_loss_autograd(student, teacher, *options)


def attention_map_backward(
    features: list[Tensor],
    coefficients: list[Tensor],
    loss_gradient: Tensor | None,
    pairs: list[int],
    p: float,
) -> list[Tensor]:
    """``torch.ops.at_fused.attention_map_backward``."""
    if torch.compiler.is_compiling():
        operator = _operators.attention_map_backward.default
        return operator(features, coefficients, loss_gradient, pairs, p)
    return _attention_map_backward_autograd(features, coefficients, loss_gradient, pairs, p)


def at_value_and_grad(
    student: list[Tensor], teacher: list[Tensor], *options: Any
) -> tuple[Tensor, list[Tensor]]:
    """``torch.ops.at_fused.at_value_and_grad``."""
    return _operators.at_value_and_grad.default(student, teacher, *options)
