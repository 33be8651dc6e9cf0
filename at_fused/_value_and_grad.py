"""The loss and the students' gradients in one call, without a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from at_fused import _ops
from at_fused._arguments import check_sizes, gradient_scale
from at_fused._loss import LossInputs, at_loss, call_unchecked, checked_inputs, reduce_samples
from at_fused._ops.library import is_transformed
from at_fused._options import LossArguments
from at_fused.backends.outputs import accumulate_dtype, match_strides

_FP32_MAX = torch.finfo(torch.float32).max


def at_value_and_grad(
    student: Any, teacher: Any, arguments: tuple[Any, ...], scale: float | Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss, and the students' gradients times ``scale``, without a graph."""
    if isinstance(scale, (float, int)) and abs(scale) <= _FP32_MAX and type(scale) is not bool:
        result = call_unchecked(_ops.at_value_and_grad, student, teacher, arguments, scale, None)
        if result:
            return result
    inputs = checked_inputs(student, teacher, LossArguments(*arguments))
    features = inputs.students + inputs.teachers
    factor, loss_grad = gradient_scale(scale, features[0].device, accumulate_dtype(*features))
    students = [student] if isinstance(student, Tensor) else list(student)
    is_fused = inputs.attend == "spatial" and inputs.is_fused()
    if is_fused and check_sizes(inputs.students, inputs.teachers, inputs.resize):
        loss, gradients = _fused_value_and_grad(inputs, factor, loss_grad)
        pairs = zip(gradients, students, strict=True)
        gradients = [inputs.layout.restore(g, x) for g, x in pairs]
    else:
        loss, gradients = _unfused_value_and_grad(students, teacher, arguments, factor, loss_grad)
    return loss, [match_strides(x, g) for g, x in zip(gradients, students, strict=True)]


@torch.no_grad()
def _fused_value_and_grad(
    inputs: LossInputs, scale: float, loss_grad: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss and its gradient times ``scale * loss_grad``, with one operator."""
    if inputs.sample_weights is not None:
        dtype = accumulate_dtype(*inputs.students, *inputs.teachers)
        weights = inputs.sample_weights.to(dtype).expand(len(inputs.students), -1)
        by_sample = inputs.options.reduction == "sample"
        weights = weights if by_sample else weights / weights.shape[1]
        loss_grad = weights if loss_grad is None else weights * loss_grad
    loss, gradients = _ops.at_value_and_grad(*inputs.operator_arguments(), scale, loss_grad)
    return reduce_samples(inputs, loss), gradients


def _unfused_value_and_grad(
    students: list[Tensor],
    teacher: Any,
    arguments: tuple[Any, ...],
    scale: float,
    loss_grad: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss and its gradient through autograd, for options without a fused kernel.

    The gradients have the layouts of the original features.
    """
    if torch.compiler.is_exporting():
        raise RuntimeError(
            "at_value_and_grad cannot be exported with collapse='max', attend='channel' or 'both', "
            "absolute=False and an odd p, maps of different sizes, or a mask that requires a "
            "gradient; export at_loss instead"
        )
    teachers = [teacher] if isinstance(teacher, Tensor) else teacher

    def factor(loss: Tensor) -> Tensor:
        return torch.full_like(loss, scale) if loss_grad is None else loss_grad.expand_as(loss)

    if is_transformed():  # requires_grad_ does not work there
        result = torch.func.vjp(lambda features: at_loss(features, teachers, arguments), students)
        loss, vjp = result[0], result[1]
        return loss, list(vjp(factor(loss))[0])
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [
            (x.clone() if x.is_inference() else x.detach()).requires_grad_() for x in students
        ]
        loss = at_loss(leaves, teachers, arguments)
        return loss.detach(), [*torch.autograd.grad(loss, leaves, factor(loss))]
