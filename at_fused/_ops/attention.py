"""Maps, and the way back to features: schema and autograd of each operator.

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

from collections.abc import Sequence
from itertools import compress
from operator import not_
from typing import Any

import torch
from torch import Tensor

from at_fused._ops.library import (
    apply,
    below_autograd,
    define,
    entry,
    operators,
    tracks,
    transformed,
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
        found = below_autograd(operators.attention_map.default, features, p, collapse, skip_tokens)
        maps, channels = found[: len(features)], found[len(features) :]
        ctx.set_materialize_grads(False)
        ctx.options = p, collapse, skip_tokens
        # Features without a gradient, a teacher's, may die, and their maps have none either.
        ctx.needed = needed = ctx.needs_input_grad[3:]
        ctx.save_for_backward(*compress(features, needed), *compress(channels, needed))
        ctx.mark_non_differentiable(*compress(maps, map(not_, needed)), *channels)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *map_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        p, collapse, skip_tokens = ctx.options
        saved, kept = ctx.saved_tensors, list(compress(range(len(ctx.needed)), ctx.needed))
        known = [map_gradients[i] is not None for i in kept]
        found = map_gradients_backward(
            list(compress(saved, known)),
            [map_gradients[i] for i in compress(kept, known)],
            p,
            collapse,
            [skip_tokens[i] for i in compress(kept, known)] if skip_tokens else [],
            list(compress(saved[len(kept) :], known)),
        )
        gradients = dict(zip(compress(kept, known), found, strict=True))
        return None, None, None, *(gradients.get(i) for i in range(len(ctx.needed)))


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
    rest = None, list(range(len(features))), p, list(skip_tokens), list(channels)
    return attention_map_backward(features, coefficients, *rest)


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
    if transformed() or tracks(features, coefficients, [loss_gradient]):
        return eager.attention_map_backward(*arguments)  # for a second derivative
    return below_autograd(operators.attention_map_backward.default, *arguments)


attention_map = entry("attention_map", _attention_map_autograd)
attention_map_backward = entry("attention_map_backward", _attention_map_backward_autograd)
