"""Operators from features to maps and back: schema and autograd.

    attention_map            raw maps of a list of features
    attention_map_backward   gradients of a list of features from their coefficient maps

A feature is (B, C, *spatial) with any strides, a map is (B, N). The operators take lists: all
stages of a network need one call and, on a GPU, one launch. ``skip_tokens`` is empty or has a
number for each feature: that many leading positions of a feature (B, C, N) are left out of its map
and get a zero gradient.

``attention_map`` with ``collapse="max"`` returns n maps, then n int32 maps of argmax channels.

``attention_map_backward`` multiplies the coefficients by ``loss_gradient``: None, a scalar, one
value per pair, or one per pair and sample. ``pairs`` has the pair's index for each feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from operator import not_
from typing import Any

import torch
from torch import Tensor

from at_fused._ops.library import (
    apply,
    call_below_autograd,
    define,
    is_transformed,
    needs_graph,
    operators,
    register_autograd,
)
from at_fused.backends import eager

define("attention_map(Tensor[] features, float p, str collapse, int[] skip_tokens=[]) -> Tensor[]")
define(
    "attention_map_backward(Tensor[] features, Tensor[] coefficients, Tensor? loss_gradient,"
    " int[] pairs, float p, int[] skip_tokens, Tensor[] channels) -> Tensor[]"
)


# ---- autograd ------------------------------------------------------------------------------------


class _AttentionMap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, p: float, collapse: str, skip_tokens: Sequence[int], *features: Tensor
    ) -> tuple[Tensor, ...]:
        operator = operators.attention_map.default
        results = call_below_autograd(operator, features, p, collapse, skip_tokens)
        maps, channels = results[: len(features)], results[len(features) :]
        ctx.set_materialize_grads(False)
        ctx.options = p, collapse, skip_tokens
        # Features that need no gradient, such as a teacher's, are not saved: they can be freed.
        ctx.needed = needed = ctx.needs_input_grad[3:]
        ctx.save_for_backward(*compress(features, needed), *compress(channels, needed))
        ctx.mark_non_differentiable(*compress(maps, map(not_, needed)), *channels)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *map_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        p, collapse, skip_tokens = ctx.options
        saved, indices = ctx.saved_tensors, list(compress(range(len(ctx.needed)), ctx.needed))
        has_gradient = [map_gradients[i] is not None for i in indices]
        used = list(compress(indices, has_gradient))
        results = map_gradients_backward(
            list(compress(saved, has_gradient)),
            [map_gradients[i] for i in used],
            p,
            collapse,
            [skip_tokens[i] for i in used] if skip_tokens else [],
            list(compress(saved[len(indices) :], has_gradient)),
        )
        gradients = dict(zip(used, results, strict=True))
        return None, None, None, *(gradients.get(i) for i in range(len(ctx.needed)))


def map_gradients_backward(
    features: list[Tensor],
    map_gradients: Sequence[Any],
    p: float,
    collapse: str,
    skip_tokens: Sequence[int] = (),
    channels: Sequence[Tensor] = (),
) -> list[Tensor]:
    """Return the gradients of features from the gradients of their maps."""
    pairs = zip(features, map_gradients, strict=True)
    coefficients = [g * (p * eager.collapse_scale(x, collapse)) for x, g in pairs]
    rest = None, list(range(len(features))), p, list(skip_tokens), list(channels)
    return attention_map_backward(features, coefficients, *rest)


def _map_autograd(
    features: list[Tensor], p: float, collapse: str, skip_tokens: Sequence[int] = ()
) -> list[Tensor]:
    if is_transformed():
        return eager.attention_map(features, p, collapse, skip_tokens)
    if needs_graph(features):
        return list(apply(_AttentionMap, p, collapse, skip_tokens, *features))
    return call_below_autograd(operators.attention_map.default, features, p, collapse, skip_tokens)


def _map_backward_autograd(
    features: list[Tensor],
    coefficients: list[Tensor],
    loss_gradient: Tensor | None,
    pairs: list[int],
    p: float,
    skip_tokens: Sequence[int] = (),
    channels: Sequence[Tensor] = (),
) -> list[Tensor]:
    arguments = features, coefficients, loss_gradient, pairs, p, skip_tokens, channels
    if is_transformed() or needs_graph(features, coefficients, [loss_gradient]):
        return eager.attention_map_backward(*arguments)  # for a second derivative
    return call_below_autograd(operators.attention_map_backward.default, *arguments)


attention_map = register_autograd("attention_map", _map_autograd)
attention_map_backward = register_autograd("attention_map_backward", _map_backward_autograd)
