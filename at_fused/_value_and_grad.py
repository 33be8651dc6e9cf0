"""The loss and the students' gradients in one call, without a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from at_fused import _ops
from at_fused._arguments import check_sizes, gradient_scale
from at_fused._loss import LossInputs, at_loss, call_unchecked, checked_inputs, reduce_samples
from at_fused._ops.library import transformed
from at_fused._options import LossArguments
from at_fused.backends.outputs import accumulate_dtype, laid_out_as

_FP32_MAX = torch.finfo(torch.float32).max


def at_value_and_grad(
    student: Any, teacher: Any, arguments: tuple[Any, ...], scale: float | Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss, and the students' gradients times ``scale``, without a graph."""
    if isinstance(scale, (float, int)) and abs(scale) <= _FP32_MAX and type(scale) is not bool:
        found = call_unchecked(_ops.at_value_and_grad, student, teacher, arguments, scale, None)
        if found:
            return found
    inputs = checked_inputs(student, teacher, LossArguments(*arguments))
    features = inputs.students + inputs.teachers
    factor, above = gradient_scale(scale, features[0].device, accumulate_dtype(*features))
    given = [student] if isinstance(student, Tensor) else list(student)
    one_operator = inputs.attend == "spatial" and inputs.is_fused()
    if one_operator and check_sizes(inputs.students, inputs.teachers, inputs.resize):
        loss, gradients = _fused_value_and_grad(inputs, factor, above)
        pairs = zip(gradients, given, strict=True)
        gradients = [inputs.layout.restore(g, x) for g, x in pairs]
    else:
        loss, gradients = _differentiated(given, teacher, arguments, factor, above)
    return loss, [laid_out_as(x, g) for g, x in zip(gradients, given, strict=True)]


@torch.no_grad()
def _fused_value_and_grad(
    inputs: LossInputs, scale: float, above: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss and its gradient times ``scale`` and ``above``, by one operator."""
    if inputs.sample_weights is not None:
        dtype = accumulate_dtype(*inputs.students, *inputs.teachers)
        weights = inputs.sample_weights.to(dtype).expand(len(inputs.students), -1)
        by_sample = inputs.options.reduction == "sample"
        weights = weights if by_sample else weights / weights.shape[1]
        above = weights if above is None else weights * above
    loss, gradients = _ops.at_value_and_grad(*inputs.operator_arguments(), scale, above)
    return reduce_samples(inputs, loss), gradients


def _differentiated(
    students: list[Tensor],
    teacher: Any,
    arguments: tuple[Any, ...],
    scale: float,
    above: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """Return what ``_fused_value_and_grad`` does, by autograd, with options that it does not take.

    With gradients for the features as they are given.
    """
    if torch.compiler.is_exporting():
        raise RuntimeError(
            "at_value_and_grad cannot be exported with collapse='max', attend='channel' or 'both', "
            "absolute=False of an odd p, maps of different sizes, nor a mask that requires a "
            "gradient: export at_loss in its place"
        )
    teachers = [teacher] if isinstance(teacher, Tensor) else teacher

    def factor(loss: Tensor) -> Tensor:
        return torch.full_like(loss, scale) if above is None else above.expand_as(loss)

    if transformed():  # where a tensor cannot be made to require a gradient
        found = torch.func.vjp(lambda each: at_loss(each, teachers, arguments), students)
        loss, gradients_of = found[0], found[1]
        return loss, list(gradients_of(factor(loss))[0])
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [
            (x.clone() if x.is_inference() else x.detach()).requires_grad_() for x in students
        ]
        loss = at_loss(leaves, teachers, arguments)
        return loss.detach(), [*torch.autograd.grad(loss, leaves, factor(loss))]
