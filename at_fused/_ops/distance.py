"""The operators of distances: schema, fake kernel and autograd of each, in one place.

    distance_loss            the loss of a list of pairs of tensors
    distance_loss_backward   the gradients of some of them, given the distances

Both tensors of a pair have the same shape (B, ...), any strides, and may differ in dtype; all pairs
have the same B. With d(b) a sample's ``||student[b] - teacher[b]||_2`` where ``root``, else its
square, a pair's loss is ``weight / B * sum_b d(b)``; without weights they are 1.

``distance_loss`` returns ``(loss, squares)``: a scalar, or (pairs,) with ``reduction="none"``; and
the squared distances, (pairs, B) in fp64. ``distance_loss_backward`` takes these, the gradient of
the loss, and any choice of tensors ``a``, each with the other ``b`` of its pair and the pair's
number. The gradient of the norm at 0 is 0.
"""

from __future__ import annotations

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
from at_fused.backends.results import accumulate_dtype, wide_dtype

define(
    "distance_loss(Tensor[] student, Tensor[] teacher, float[] weights, bool root, str reduction)"
    " -> (Tensor, Tensor)"
)
define(
    "distance_loss_backward(Tensor[] a, Tensor[] b, Tensor squares, Tensor gradient, int[] pairs,"
    " float[] weights, bool root, str reduction) -> Tensor[]"
)


# ---- fake kernels --------------------------------------------------------------------------------


@torch.library.register_fake("at_fused::distance_loss", lib=library)
def _(
    student: list[Tensor], teacher: list[Tensor], weights: list[float], root: bool, reduction: str
) -> tuple[Tensor, Tensor]:
    check_one_device(student, teacher)
    first = student[0]
    shape = () if reduction == "sum" else (len(student),)
    return (
        first.new_empty(shape, dtype=accumulate_dtype(*student, *teacher)),
        first.new_empty((len(student), first.shape[0]), dtype=wide_dtype(first)),
    )


@torch.library.register_fake("at_fused::distance_loss_backward", lib=library)
def _(
    a: list[Tensor],
    b: list[Tensor],
    squares: Tensor,
    gradient: Tensor,
    pairs: list[int],
    weights: list[float],
    root: bool,
    reduction: str,
) -> list[Tensor]:
    check_one_device(a, b, [squares, gradient])
    return [torch.empty_like(x) for x in a]


# ---- autograd ------------------------------------------------------------------------------------


class _DistanceLoss(torch.autograd.Function):
    @staticmethod
    def forward(options: tuple[Any, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        pairs = len(tensors) // 2
        operator = operators.distance_loss.default
        return tuple(
            below_autograd(operator, list(tensors[:pairs]), list(tensors[pairs:]), *options)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        options, *tensors = inputs
        _, squares = output
        ctx.set_materialize_grads(False)
        ctx.options = options
        ctx.save_for_backward(squares, *tensors)
        ctx.mark_non_differentiable(squares)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        squares, *tensors = ctx.saved_tensors
        gradients: list[Tensor | None] = [None] * len(tensors)
        if gradient is None:
            return None, *gradients
        pairs = len(tensors) // 2
        # The gradient of a teacher is that of a student with the sides swapped.
        wanted = [i for i, n in enumerate(ctx.needs_input_grad[1:]) if n]
        found = distance_loss_backward(
            [tensors[i] for i in wanted],
            [tensors[(i + pairs) % (2 * pairs)] for i in wanted],
            squares,
            gradient,
            [i % pairs for i in wanted],
            *ctx.options,
        )
        for i, g in zip(wanted, found, strict=True):
            gradients[i] = g
        return None, *gradients


class _DistanceLossBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        options: tuple[Any, ...], squares: Tensor, gradient: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        operator = operators.distance_loss_backward.default
        a, b = list(tensors[: len(tensors) // 2]), list(tensors[len(tensors) // 2 :])
        return tuple(below_autograd(operator, a, b, squares, gradient, *options))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        options, _, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.options = options
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        pairs, weights, root, reduction = ctx.options
        create_graph = torch.is_grad_enabled()
        needed = ctx.needs_input_grad[2:]
        with torch.enable_grad():
            # By aliases: the gradient from above may itself be a function of the tensors.
            inputs = [x.view_as(x) for x in ctx.saved_tensors]
            gradient, *tensors = inputs
            a, b = tensors[: len(pairs)], tensors[len(pairs) :]
            # Anew, as functions of the tensors; one row for each of them, not for each pair.
            squares = eager.squared_distances(a, b)
            if reduction == "none":
                gradient = torch.stack([gradient[i] for i in pairs])
            outputs = eager.distance_loss_backward(
                a,
                b,
                squares,
                gradient,
                list(range(len(pairs))),
                [weights[i] for i in pairs] if weights else [],
                root,
                reduction,
            )
            wanted = [x for x, n in zip(inputs, needed, strict=True) if n]
            products = iter(differentiate(outputs, wanted, gradients, create_graph))
        return None, None, *(next(products) if n else None for n in needed)


def _distance_loss_autograd(
    student: list[Tensor], teacher: list[Tensor], *options: Any
) -> tuple[Tensor, Tensor]:
    if tracks(student, teacher):
        loss, squares = apply(_DistanceLoss, options, *student, *teacher)
        return loss, squares
    return below_autograd(operators.distance_loss.default, student, teacher, *options)


def _distance_loss_backward_autograd(
    a: list[Tensor], b: list[Tensor], squares: Tensor, gradient: Tensor, *options: Any
) -> list[Tensor]:
    if tracks(a, b, [gradient]):
        return list(apply(_DistanceLossBackward, options, squares, gradient, *a, *b))
    operator = operators.distance_loss_backward.default
    return below_autograd(operator, a, b, squares, gradient, *options)


library.impl("distance_loss", _distance_loss_autograd, "Autograd")
library.impl("distance_loss_backward", _distance_loss_backward_autograd, "Autograd")


# ---- calls ---------------------------------------------------------------------------------------


def distance_loss(
    student: list[Tensor], teacher: list[Tensor], *options: Any
) -> tuple[Tensor, Tensor]:
    """``torch.ops.at_fused.distance_loss``."""
    if torch.compiler.is_compiling():
        return operators.distance_loss.default(student, teacher, *options)
    return _distance_loss_autograd(student, teacher, *options)


def distance_loss_backward(
    a: list[Tensor], b: list[Tensor], squares: Tensor, gradient: Tensor, *options: Any
) -> list[Tensor]:
    """``torch.ops.at_fused.distance_loss_backward``."""
    if torch.compiler.is_compiling():
        return operators.distance_loss_backward.default(a, b, squares, gradient, *options)
    return _distance_loss_backward_autograd(a, b, squares, gradient, *options)
