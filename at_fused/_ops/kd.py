"""The operators of Hinton's distillation loss: schema, fake kernel and autograd, in one place.

    kd_loss            the loss of a batch of logits, and statistics of its rows
    kd_loss_backward   the gradients of the logits, from these statistics

Logits are (B, K) with any strides, labels (B,) int64 or None. ``kd_loss`` returns ``(loss, stats,
valid)``: a scalar; (B, STATISTICS) in fp64, described in ``backends.results``; and the number of
labels that count, a scalar in fp64. A term whose weight is 0 is not computed: the divergence with
``alpha`` 0, the cross-entropy without labels or with ``alpha`` 1.

A label that is neither a class nor ``ignore_index`` is an error on the CPU. On a GPU, which nobody
waits for, it makes the loss and the gradient of its row NaN.
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
from at_fused.backends.results import STATISTICS, accumulate_dtype, wide_dtype

define(
    "kd_loss(Tensor student, Tensor teacher, Tensor? labels, float temperature, float alpha,"
    " float label_smoothing, int ignore_index) -> (Tensor, Tensor, Tensor)"
)
define(
    "kd_loss_backward(Tensor student, Tensor teacher, Tensor? labels, Tensor stats, Tensor valid,"
    " Tensor gradient, float temperature, float alpha, float label_smoothing, int ignore_index,"
    " bool student_grad, bool teacher_grad) -> Tensor[]"
)


# ---- fake kernels --------------------------------------------------------------------------------


@torch.library.register_fake("at_fused::kd_loss", lib=library)
def _(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    temperature: float,
    alpha: float,
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    check_one_device([student, teacher, labels])
    wide = wide_dtype(student)
    return (
        student.new_empty((), dtype=accumulate_dtype(student, teacher)),
        student.new_empty((student.shape[0], STATISTICS), dtype=wide),
        student.new_empty((), dtype=wide),
    )


@torch.library.register_fake("at_fused::kd_loss_backward", lib=library)
def _(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    stats: Tensor,
    valid: Tensor,
    gradient: Tensor,
    temperature: float,
    alpha: float,
    label_smoothing: float,
    ignore_index: int,
    student_grad: bool,
    teacher_grad: bool,
) -> list[Tensor]:
    check_one_device([student, teacher, labels, stats, valid, gradient])
    sides = [student] * student_grad + [teacher] * teacher_grad
    return [torch.empty_like(x) for x in sides]


# ---- autograd ------------------------------------------------------------------------------------


class _KDLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        options: tuple[Any, ...], labels: Tensor | None, student: Tensor, teacher: Tensor
    ) -> tuple[Tensor, ...]:
        operator = operators.kd_loss.default
        return tuple(below_autograd(operator, student, teacher, labels, *options))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        options, labels, student, teacher = inputs
        _, stats, valid = output
        ctx.set_materialize_grads(False)
        ctx.options = options
        ctx.save_for_backward(student, teacher, labels, stats, valid)
        ctx.mark_non_differentiable(stats, valid)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return None, None, None, None
        needed = ctx.needs_input_grad[2:]
        found = iter(kd_loss_backward(*ctx.saved_tensors, gradient, *ctx.options, *needed))
        return None, None, *(next(found) if n else None for n in needed)


class _KDLossBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        options: tuple[Any, ...],
        labels: Tensor | None,
        stats: Tensor,
        valid: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        student, teacher, gradient = tensors
        operator = operators.kd_loss_backward.default
        return tuple(
            below_autograd(operator, student, teacher, labels, stats, valid, gradient, *options)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        options, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.options = options
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        labels, stats, valid, *tensors = ctx.saved_tensors
        create_graph = torch.is_grad_enabled()
        needed = ctx.needs_input_grad[4:]
        with torch.enable_grad():
            # By aliases: the gradient from above may itself be a function of the logits.
            student, teacher, gradient = inputs = [x.view_as(x) for x in tensors]
            outputs = eager.kd_loss_backward(
                student, teacher, labels, stats, valid, gradient, *ctx.options
            )
            wanted = [x for x, n in zip(inputs, needed, strict=True) if n]
            products = iter(differentiate(outputs, wanted, gradients, create_graph))
        return None, None, None, None, *(next(products) if n else None for n in needed)


def _kd_loss_autograd(
    student: Tensor, teacher: Tensor, labels: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    if tracks([student, teacher]):
        loss, stats, valid = apply(_KDLoss, options, labels, student, teacher)
        return loss, stats, valid
    return below_autograd(operators.kd_loss.default, student, teacher, labels, *options)


def _kd_loss_backward_autograd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    stats: Tensor,
    valid: Tensor,
    gradient: Tensor,
    *options: Any,
) -> list[Tensor]:
    tensors = student, teacher, gradient
    if tracks(tensors):
        return list(apply(_KDLossBackward, options, labels, stats, valid, *tensors))
    operator = operators.kd_loss_backward.default
    return below_autograd(operator, student, teacher, labels, stats, valid, gradient, *options)


library.impl("kd_loss", _kd_loss_autograd, "Autograd")
library.impl("kd_loss_backward", _kd_loss_backward_autograd, "Autograd")


# ---- calls ---------------------------------------------------------------------------------------


def kd_loss(
    student: Tensor, teacher: Tensor, labels: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.ops.at_fused.kd_loss``."""
    if torch.compiler.is_compiling():
        return operators.kd_loss.default(student, teacher, labels, *options)
    return _kd_loss_autograd(student, teacher, labels, *options)


def kd_loss_backward(*arguments: Any) -> list[Tensor]:
    """``torch.ops.at_fused.kd_loss_backward``."""
    if torch.compiler.is_compiling():
        return operators.kd_loss_backward.default(*arguments)
    return _kd_loss_backward_autograd(*arguments)
