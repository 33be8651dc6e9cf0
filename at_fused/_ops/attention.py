"""Maps, and the way back to features: schema, fake kernel and autograd of each operator.

    attention_map            raw maps of a list of features
    attention_map_backward   the gradient of a list of features from their coefficient maps

A feature is (B, C, *spatial) with any strides, a map (B, N). All take lists, so that a network's
stages are one call and, on a GPU, one launch. ``skip_tokens`` holds a number for each feature, or
nothing: so many positions in front of a feature (B, C, N) have no part in its map, and no gradient.

``attention_map`` with ``collapse="max"`` returns the n maps and after them n int32 maps of the
channels that won.

``attention_map_backward`` multiplies the coefficients by ``loss_gradient``: nothing, a scalar, one
value per pair, or one per pair and sample; ``pairs`` holds the number of each feature's pair.
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
    entry,
    library,
    operators,
    save,
    tracks,
    transformed,
)
from at_fused.backends import eager
from at_fused.backends.outputs import accumulate_dtype

define("attention_map(Tensor[] features, float p, str collapse, int[] skip_tokens=[]) -> Tensor[]")
define(
    "attention_map_backward(Tensor[] features, Tensor[] coefficients, Tensor? loss_gradient,"
    " int[] pairs, float p, int[] skip_tokens, Tensor[] channels) -> Tensor[]"
)


# ---- fake kernels: shapes, dtypes and strides without data ---------------------------------------


def fake_map(x: Tensor) -> Tensor:
    """Make a feature's map without data."""
    return x.new_empty((x.shape[0], math.prod(x.shape[2:])), dtype=accumulate_dtype(x))


@torch.library.register_fake("at_fused::attention_map", lib=library)
def _(
    features: list[Tensor], p: float, collapse: str, skip_tokens: Sequence[int] = ()
) -> list[Tensor]:
    check_one_device(features)
    maps = [fake_map(x) for x in eager.without_first(features, skip_tokens)]
    return maps + [q.to(torch.int32) for q in maps] if collapse == "max" else maps


@torch.library.register_fake("at_fused::attention_map_backward", lib=library)
def _(
    features: list[Tensor],
    coefficients: list[Tensor],
    loss_gradient: Tensor | None,
    pairs: list[int],
    p: float,
    skip_tokens: Sequence[int] = (),
    channels: Sequence[Tensor] = (),
) -> list[Tensor]:
    check_one_device(features, coefficients, [loss_gradient], channels)
    return [torch.empty_like(x) for x in features]


# ---- autograd ------------------------------------------------------------------------------------


class _AttentionMap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, p: float, collapse: str, skip_tokens: Sequence[int], *features: Tensor
    ) -> tuple[Tensor, ...]:
        count = len(features)
        found = below_autograd(
            operators.attention_map.default, list(features), p, collapse, skip_tokens
        )
        ctx.set_materialize_grads(False)
        ctx.options = p, collapse, skip_tokens
        ctx.count = count
        # Features without a gradient, a teacher's, may die, and their maps have none either.
        ctx.kept = [i for i in range(count) if ctx.needs_input_grad[3 + i]]
        channels = found[count:]
        ctx.save_for_backward(
            *(features[i] for i in ctx.kept), *(channels[i] for i in ctx.kept if channels)
        )
        dropped = (found[i] for i in range(count) if not ctx.needs_input_grad[3 + i])
        ctx.mark_non_differentiable(*dropped, *channels)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *map_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        p, collapse, skip_tokens = ctx.options
        saved, kept = ctx.saved_tensors, ctx.kept
        gradients: list[Tensor | None] = [None] * ctx.count
        wanted = [(j, i) for j, i in enumerate(kept) if map_gradients[i] is not None]
        if wanted:
            found = map_gradients_backward(
                [saved[j] for j, _ in wanted],
                [map_gradients[i] for _, i in wanted],
                p,
                collapse,
                [skip_tokens[i] for _, i in wanted] if skip_tokens else [],
                [saved[len(kept) + j] for j, _ in wanted] if collapse == "max" else [],
            )
            for (_, i), gradient in zip(wanted, found, strict=True):
                gradients[i] = gradient
        return None, None, None, *gradients


def map_gradients_backward(
    features: list[Tensor],
    map_gradients: Sequence[Any],
    p: float,
    collapse: str,
    skip_tokens: Sequence[int] = (),
    channels: Sequence[Tensor] = (),
) -> list[Tensor]:
    """Return the gradients of features from those of their maps."""
    pairs = zip(features, map_gradients, strict=True)
    coefficients = [g * (p * eager.collapse_scale(x, collapse)) for x, g in pairs]
    numbers = list(range(len(features)))
    return attention_map_backward(
        features, coefficients, None, numbers, p, list(skip_tokens), list(channels)
    )


class _AttentionMapBackward(torch.autograd.Function):
    """The gradients of features, from kernels; their own derivative is plain PyTorch's."""

    @staticmethod
    def forward(
        ctx: Any,
        pairs: Sequence[int],
        p: float,
        skip_tokens: Sequence[int],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.options = pairs, p, skip_tokens
        save(ctx, *tensors)
        operator = operators.attention_map_backward.default
        return tuple(below_autograd(operator, *_from_flat(tensors, *ctx.options)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[3:]
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # By aliases: a coefficient map is itself a function of the features.
            saved = [None if x is None else x.view_as(x) for x in ctx.saved_tensors]
            outputs = eager.attention_map_backward(*_from_flat(saved, *ctx.options))
            wanted = [x for x, n in zip(saved, needed, strict=True) if n and x is not None]
            known = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None]
            known = [(o, g) for o, g in known if o.requires_grad]
            products: Sequence[Tensor | None] = [None] * len(wanted)
            if known and wanted:
                products = torch.autograd.grad(
                    [o for o, _ in known],
                    wanted,
                    [g for _, g in known],
                    create_graph=create_graph,
                    allow_unused=True,
                )
        remaining = iter(products)
        return None, None, None, *(next(remaining) if n else None for n in needed)


def _from_flat(
    tensors: Sequence[Any], pairs: Sequence[int], p: float, skip_tokens: Sequence[int]
) -> tuple[Any, ...]:
    """Return the arguments of ``attention_map_backward`` from one list of its tensors."""
    n = len(pairs)
    features, coefficients, channels = tensors[:n], tensors[n : 2 * n], tensors[2 * n + 1 :]
    lists = list(features), list(coefficients), tensors[2 * n]
    return *lists, pairs, p, skip_tokens, list(channels)


def _attention_map_autograd(
    features: list[Tensor], p: float, collapse: str, skip_tokens: Sequence[int] = ()
) -> list[Tensor]:
    if transformed():
        return eager.attention_map(features, p, collapse, skip_tokens)
    if tracks(features):
        return list(apply(_AttentionMap, p, collapse, skip_tokens, *features))
    return below_autograd(operators.attention_map.default, features, p, collapse, skip_tokens)


def _attention_map_backward_autograd(
    features: list[Tensor],
    coefficients: list[Tensor],
    loss_gradient: Tensor | None,
    pairs: list[int],
    p: float,
    skip_tokens: Sequence[int] = (),
    channels: Sequence[Tensor] = (),
) -> list[Tensor]:
    arguments = features, coefficients, loss_gradient, pairs, p, skip_tokens, channels
    if transformed():
        return eager.attention_map_backward(*arguments)
    if tracks(features, coefficients, [loss_gradient]):
        tensors = (*features, *coefficients, loss_gradient, *channels)
        return list(apply(_AttentionMapBackward, pairs, p, skip_tokens, *tensors))
    return below_autograd(operators.attention_map_backward.default, *arguments)


attention_map = entry("attention_map", _attention_map_autograd)
attention_map_backward = entry("attention_map_backward", _attention_map_backward_autograd)
