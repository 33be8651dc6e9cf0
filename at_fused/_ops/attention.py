"""Maps, and the way back to features: schema, fake kernel and autograd of each operator.

    attention_map            raw maps of a list of features
    attention_map_backward   the gradient of a list of features from their coefficient maps

A feature is (B, C, *spatial) with any strides, a map (B, N). All take lists, so that a network's
stages are one call and, on a GPU, one launch.

``attention_map`` with ``collapse="max"`` returns the n maps and behind them n int32 maps of the
channels that won.
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
    check_one_device,
    define,
    differentiate,
    library,
    operators,
    tracks,
)
from at_fused.backends import eager
from at_fused.backends.results import accumulate_dtype

define("attention_map(Tensor[] features, float p, str collapse) -> Tensor[]")
define(
    "attention_map_backward(Tensor[] features, Tensor[] coefficients, Tensor? loss_gradient,"
    " int[] pairs, float p, Tensor[] channels) -> Tensor[]"
)


# ---- fake kernels: shapes, dtypes and strides without data ---------------------------------------


def fake_map(x: Tensor) -> Tensor:
    """A map without data."""
    return x.new_empty((x.shape[0], math.prod(x.shape[2:])), dtype=accumulate_dtype(x))


@torch.library.register_fake("at_fused::attention_map", lib=library)
def _(features: list[Tensor], p: float, collapse: str) -> list[Tensor]:
    check_one_device(features)
    maps = [fake_map(x) for x in features]
    return maps + [q.to(torch.int32) for q in maps] if collapse == "max" else maps


@torch.library.register_fake("at_fused::attention_map_backward", lib=library)
def _(
    features: list[Tensor],
    coefficients: list[Tensor],
    loss_gradient: Tensor | None,
    pairs: list[int],
    p: float,
    channels: Sequence[Tensor] = (),
) -> list[Tensor]:
    check_one_device(features, coefficients, [loss_gradient], channels)
    return [torch.empty_like(x) for x in features]


# ---- autograd ------------------------------------------------------------------------------------


class _AttentionMap(torch.autograd.Function):
    @staticmethod
    def forward(p: float, collapse: str, *features: Tensor) -> tuple[Tensor, ...]:
        operator = operators.attention_map.default
        return tuple(below_autograd(operator, list(features), p, collapse))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        p, collapse, *features = inputs
        maps, channels = output[: len(features)], output[len(features) :]
        ctx.set_materialize_grads(False)
        ctx.options = p, collapse
        # Features without a gradient, a teacher's, may die.
        ctx.kept = [i for i, x in enumerate(features) if x.requires_grad]
        ctx.count = len(maps)
        ctx.save_for_backward(
            *(features[i] for i in ctx.kept), *(channels[i] for i in ctx.kept if channels)
        )
        ctx.mark_non_differentiable(*channels)

    @staticmethod
    def backward(ctx: Any, *map_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        p, collapse = ctx.options
        saved, kept = ctx.saved_tensors, ctx.kept
        gradients: list[Tensor | None] = [None] * ctx.count
        wanted = [
            (j, i)
            for j, i in enumerate(kept)
            if map_gradients[i] is not None and ctx.needs_input_grad[2 + i]
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
                [saved[len(kept) + j] for j, _ in wanted] if collapse == "max" else [],
            )
            for (_, i), gradient in zip(wanted, found, strict=True):
                gradients[i] = gradient
        return None, None, *gradients


class _AttentionMapBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        pairs: list[int], p: float, loss_gradient: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        count = len(pairs)
        operator = operators.attention_map_backward.default
        features, coefficients = list(tensors[:count]), list(tensors[count : 2 * count])
        channels = list(tensors[2 * count :])
        return tuple(
            below_autograd(operator, features, coefficients, loss_gradient, pairs, p, channels)
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
                tensors[:count],
                tensors[count : 2 * count],
                loss_gradient,
                pairs,
                p,
                tensors[2 * count :],
            )
            wanted = [x for x, n in zip(saved, needed, strict=True) if n]
            products = iter(differentiate(outputs, wanted, gradients, create_graph))
        found = [next(products) if n else None for n in needed]
        return None, None, *((None,) if no_gradient else ()), *found


def _attention_map_autograd(features: list[Tensor], p: float, collapse: str) -> list[Tensor]:
    if tracks(features):
        return list(apply(_AttentionMap, p, collapse, *features))
    return below_autograd(operators.attention_map.default, features, p, collapse)


def _attention_map_backward_autograd(
    features: list[Tensor],
    coefficients: list[Tensor],
    loss_gradient: Tensor | None,
    pairs: list[int],
    p: float,
    channels: Sequence[Tensor] = (),
) -> list[Tensor]:
    if tracks(features, coefficients, [loss_gradient]):
        tensors = (*features, *coefficients, *channels)
        return list(apply(_AttentionMapBackward, pairs, p, loss_gradient, *tensors))
    operator = operators.attention_map_backward.default
    return below_autograd(operator, features, coefficients, loss_gradient, pairs, p, channels)


library.impl("attention_map", _attention_map_autograd, "Autograd")
library.impl("attention_map_backward", _attention_map_backward_autograd, "Autograd")


# ---- calls ---------------------------------------------------------------------------------------


def attention_map(features: list[Tensor], p: float, collapse: str) -> list[Tensor]:
    """``torch.ops.at_fused.attention_map``."""
    if torch.compiler.is_compiling():
        return operators.attention_map.default(features, p, collapse)
    return _attention_map_autograd(features, p, collapse)


def attention_map_backward(
    features: list[Tensor],
    coefficients: list[Tensor],
    loss_gradient: Tensor | None,
    pairs: list[int],
    p: float,
    channels: Sequence[Tensor] = (),
) -> list[Tensor]:
    """``torch.ops.at_fused.attention_map_backward``."""
    call = (
        operators.attention_map_backward.default
        if torch.compiler.is_compiling()
        else _attention_map_backward_autograd
    )
    return call(features, coefficients, loss_gradient, pairs, p, channels)
