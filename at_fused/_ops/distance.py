"""The operators of squared distances: schema, fake kernel and autograd of each, in one place.

    squared_distance            sum |a - b|^2 of each sample of a list of pairs, (pairs, B) in fp64
    squared_distance_backward   2 * c[i, b] * (a - b), with coefficients c (pairs, B) in fp64

Both tensors of a pair have the same shape (B, ...), any strides, and may differ in dtype; all pairs
have the same B. Lists, so that all pairs are one call and, on a GPU, one launch.
"""

from __future__ import annotations

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

define("squared_distance(Tensor[] a, Tensor[] b) -> Tensor")
define("squared_distance_backward(Tensor[] a, Tensor[] b, Tensor coefficients) -> Tensor[]")


@torch.library.register_fake("at_fused::squared_distance", lib=library)
def _(a: list[Tensor], b: list[Tensor]) -> Tensor:
    wide = torch.float32 if a[0].device.type == "mps" else torch.float64
    return a[0].new_empty((len(a), a[0].shape[0]), dtype=wide)


@torch.library.register_fake("at_fused::squared_distance_backward", lib=library)
def _(a: list[Tensor], b: list[Tensor], coefficients: Tensor) -> list[Tensor]:
    return [torch.empty_like(x) for x in a]


class _SquaredDistance(torch.autograd.Function):
    @staticmethod
    def forward(*tensors: Tensor) -> Tensor:
        pairs = len(tensors) // 2
        operator = operators.squared_distance.default
        return below_autograd(operator, list(tensors[:pairs]), list(tensors[pairs:]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        pairs = len(tensors) // 2
        # The gradient of b is that of a with the sides swapped.
        wanted = [i for i, n in enumerate(ctx.needs_input_grad) if n]
        rows = [i % pairs for i in wanted]
        whole = rows == list(range(pairs))
        coefficients = gradient if whole else torch.stack([gradient[i] for i in rows])
        found = squared_distance_backward(
            [tensors[i] for i in wanted],
            [tensors[(i + pairs) % (2 * pairs)] for i in wanted],
            coefficients,
        )
        gradients: list[Tensor | None] = [None] * len(tensors)
        for i, g in zip(wanted, found, strict=True):
            gradients[i] = g
        return tuple(gradients)


class _SquaredDistanceBackward(torch.autograd.Function):
    @staticmethod
    def forward(coefficients: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        pairs = len(tensors) // 2
        operator = operators.squared_distance_backward.default
        a, b = list(tensors[:pairs]), list(tensors[pairs:])
        return tuple(below_autograd(operator, a, b, coefficients))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            inputs = [x.view_as(x) for x in ctx.saved_tensors]
            coefficients, *tensors = inputs
            pairs = len(tensors) // 2
            outputs = eager.squared_distance_backward(
                tensors[:pairs], tensors[pairs:], coefficients
            )
            wanted = [x for x, n in zip(inputs, ctx.needs_input_grad, strict=True) if n]
            products = iter(differentiate(outputs, wanted, gradients, create_graph))
        return tuple(next(products) if n else None for n in ctx.needs_input_grad)


def _squared_distance_autograd(a: list[Tensor], b: list[Tensor]) -> Tensor:
    if tracks(a, b):
        return apply(_SquaredDistance, *a, *b)
    return below_autograd(operators.squared_distance.default, a, b)


def _squared_distance_backward_autograd(
    a: list[Tensor], b: list[Tensor], coefficients: Tensor
) -> list[Tensor]:
    if tracks(a, b, [coefficients]):
        return list(apply(_SquaredDistanceBackward, coefficients, *a, *b))
    return below_autograd(operators.squared_distance_backward.default, a, b, coefficients)


library.impl("squared_distance", _squared_distance_autograd, "Autograd")
library.impl("squared_distance_backward", _squared_distance_backward_autograd, "Autograd")


def squared_distance(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """``torch.ops.at_fused.squared_distance``."""
    if torch.compiler.is_compiling():
        return operators.squared_distance.default(a, b)
    return _squared_distance_autograd(a, b)


def squared_distance_backward(
    a: list[Tensor], b: list[Tensor], coefficients: Tensor
) -> list[Tensor]:
    """``torch.ops.at_fused.squared_distance_backward``."""
    if torch.compiler.is_compiling():
        return operators.squared_distance_backward.default(a, b, coefficients)
    return _squared_distance_backward_autograd(a, b, coefficients)
