"""The operators in plain PyTorch: a readable reference, and the fallback on every device.

Each function has the signature of its operator in ``_ops``. All are differentiable to any order:
``_ops`` uses them for second derivatives. fp16, bf16 and fp32 are computed in fp32, fp64 in fp64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from at_fused._options import LossOptions
from at_fused.backends.checks import (
    check_at_loss,
    check_attention_map,
    check_attention_map_backward,
    check_map_loss,
    check_no_overlap,
    check_tap,
    without_skipped,
)
from at_fused.backends.outputs import accumulate_dtype, match_strides


def loaded() -> bool:
    """Return True: this back end is always registered."""
    return True


available = loaded


def reason() -> str:
    """Return a description of the back end."""
    return "plain PyTorch"


def to_float64(x: Tensor) -> Tensor:
    """Return x in fp64; in fp32 on Apple's GPUs, which have no fp64."""
    return x.float() if x.device.type == "mps" else x.double()


def collapse_scale(x: Tensor, collapse: str) -> float:
    """Return the factor of the sum over channels: 1/C for "mean", 1 for "sum" and "max"."""
    return 1.0 / x.shape[1] if collapse == "mean" else 1.0


def power(x: Tensor, p: float) -> Tensor:
    """Return |x|^p."""
    return x * x if p == 2 else x.abs() if p == 1 else x.abs().pow(p)


def slope(x: Tensor, p: float) -> Tensor:
    """Return the derivative of ``power`` divided by p: |x|^(p-1) * sign(x)."""
    return x if p == 2 else x.sign() if p == 1 else x.abs().pow(p - 1) * x.sign()


# ---- maps ----------------------------------------------------------------------------------------


def attention_map(
    features: list[Tensor], p: float, collapse: str, skip_tokens: Sequence[int] = ()
) -> list[Tensor]:
    """Return Q[b, n] = scale * sum_c |A[b, c, n]|^p for each feature (B, C, *spatial).

    With "max", return the largest |A|^p, and after all maps the channel (int32) of each maximum.
    The first of equal channels wins, and NaN counts as the largest value.
    """
    check_attention_map(features, p, collapse, skip_tokens)
    maps, channels = [], []
    for x in without_skipped(features, skip_tokens):
        exact = x.to(accumulate_dtype(x)).flatten(2)
        if collapse == "max":
            # Compare |A| itself: powers of different values may round to the same number.
            channel = exact.abs().max(1).indices
            maps.append(power(exact.gather(1, channel.unsqueeze(1)).squeeze(1), p))
            channels.append(channel.to(torch.int32))
        else:
            maps.append(power(exact, p).sum(1) * collapse_scale(x, collapse))
    return maps + channels


def attention_map_backward(
    features: list[Tensor],
    coefficients: list[Tensor],
    loss_gradient: Tensor | None,
    pairs: list[int],
    p: float,
    skip_tokens: Sequence[int] = (),
    channels: Sequence[Tensor] = (),
) -> list[Tensor]:
    """Return dL/dA = g * k[b, n] * |A|^(p-1) * sign(A) for each feature, in its dtype and layout.

    With ``channels``, only that channel of each position gets a gradient.
    """
    check_attention_map_backward(
        features, coefficients, loss_gradient, pairs, p, skip_tokens, channels
    )
    gradients = []
    mapped = without_skipped(features, skip_tokens)
    for i, (x, k) in enumerate(zip(mapped, coefficients, strict=True)):
        k = times_loss_gradient(k, loss_gradient, pairs[i])
        channel = channels[i] if channels else None
        gradient = _sweep(x.to(k.dtype), k, p, channel).to(x.dtype)
        if skip_tokens and skip_tokens[i]:
            gradient = F.pad(gradient, (skip_tokens[i], 0))
        gradients.append(match_strides(features[i], gradient))
    return gradients


def times_loss_gradient(k: Tensor, loss_gradient: Tensor | None, pair: int) -> Tensor:
    """Multiply the coefficients of a pair by the gradient of its loss (see ``_ops.attention``)."""
    if loss_gradient is None:
        return k
    g = loss_gradient if loss_gradient.dim() == 0 else loss_gradient[pair]
    return k * (g.unsqueeze(1) if g.dim() == 1 else g)


def _sweep(x: Tensor, k: Tensor, p: float, channels: Tensor | None) -> Tensor:
    """Return k[b, n] * |x|^(p-1) * sign(x); 0 outside ``channels`` unless that is None."""
    k = k.reshape(x.shape[0], 1, *x.shape[2:])
    if channels is None:
        return k * slope(x, p)
    channel = channels.reshape(k.shape).long()
    is_valid = (channel >= 0) & (channel < x.shape[1])
    channel = torch.where(is_valid, channel, 0)
    values = torch.where(is_valid, k * slope(x.gather(1, channel), p), 0.0)
    return torch.zeros_like(x).scatter(1, channel, values)


# ---- taps ----------------------------------------------------------------------------------------


def attention_tap_backward(gradient: Tensor, feature: Tensor, *rest: Any) -> Tensor:
    """Return G + scale * p * dL/dQ[b, n] * |A|^(p-1) * sign(A), in A's dtype and layout."""
    return torch.empty_like(feature).copy_(_tap_gradient(gradient, feature, *rest))


def attention_tap_backward_(gradient: Tensor, *rest: Any) -> None:
    """Write the result of ``attention_tap_backward`` into ``gradient``."""
    result = _tap_gradient(gradient, *rest)
    check_no_overlap(gradient)
    gradient.copy_(result)


def _tap_gradient(
    gradient: Tensor,
    feature: Tensor,
    map_gradient: Tensor,
    p: float,
    collapse: str,
    channels: Tensor | None = None,
) -> Tensor:
    check_tap(gradient, feature, map_gradient, p, collapse, channels)
    k = map_gradient * (p * collapse_scale(feature, collapse))
    return gradient.to(k.dtype) + _sweep(feature.to(k.dtype), k, p, channels)


# ---- losses --------------------------------------------------------------------------------------


def normalize(raw: Tensor, eps: float, eps_mode: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return Q / max(||Q||, eps) or Q / (||Q|| + eps), and the two inputs of its derivative.

    These are the unit map Q / ||Q|| (zeros where the result does not depend on the norm) and the
    divisor. All three are in fp64.
    """
    # For features above about 1e10, the squares of a map overflow fp32.
    raw = to_float64(raw)
    # The derivative of a norm is 0/0 at a zero map; ``constant`` excludes it.
    squares = (raw * raw).sum(1, keepdim=True)
    constant = squares <= (eps * eps if eps_mode == "max" else 0.0)
    norm = torch.where(constant, 1.0, squares).sqrt()
    if eps_mode == "max":
        divisor = torch.where(constant, eps, norm)
    else:
        divisor = torch.where(constant, 0.0, norm) + eps
    return raw / divisor, torch.where(constant, 0.0, raw / norm), divisor


def pair_loss(
    student: Tensor, teacher: Tensor, weight: float, form: str, eps_mode: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of each sample (B,), and the gradients of their sum for both raw maps (B, N).

    The results are in fp64.
    """
    qs, student_unit, student_divisor = normalize(student, eps, eps_mode)
    qt, teacher_unit, teacher_divisor = normalize(teacher, eps, eps_mode)
    difference = qs - qt
    squares = (difference * difference).sum(1, keepdim=True)
    if form == "code":
        weight = weight / student.shape[1]
        loss = squares * weight
        gradient = difference * (2 * weight)
    else:
        is_zero = squares == 0
        distance = torch.where(is_zero, 1.0, squares).sqrt()
        loss = torch.where(is_zero, 0.0, distance) * weight
        gradient = torch.where(is_zero, 0.0, difference / distance) * weight

    def coefficients(q: Tensor, unit: Tensor, divisor: Tensor, g: Tensor) -> Tensor:
        return (g - unit * (q * g).sum(1, keepdim=True)) / divisor

    return (
        loss.squeeze(1),
        coefficients(qs, student_unit, student_divisor, gradient),
        coefficients(qt, teacher_unit, teacher_divisor, -gradient),
    )


def sample_weight(weights: list[float], i: int, batch: int, reduction: str) -> float:
    """Return the factor of the loss of each sample of pair i."""
    weight = weights[i] if weights else 1.0
    return weight if reduction == "sample" else weight / batch


def map_loss(
    student: list[Tensor], teacher: list[Tensor], weights: list[float], *rest: Any
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss of all pairs of raw maps (B, N), and dL/dQ of the requested sides."""
    form, reduction, eps_mode, eps, student_grad, teacher_grad = rest
    check_map_loss(student, teacher, weights, form, reduction, eps_mode, eps)
    losses, student_maps, teacher_maps = [], [], []
    for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
        weight = sample_weight(weights, i, s.shape[0], reduction)
        loss, ks, kt = pair_loss(s, t, weight, form, eps_mode, eps)
        losses.append(loss if reduction == "sample" else loss.sum())
        student_maps.append(ks.to(s.dtype))
        teacher_maps.append(kt.to(t.dtype))
    total = torch.stack(losses).to(accumulate_dtype(*student, *teacher))
    if reduction == "sum":
        total = total.sum()
    return total, (student_maps if student_grad else []) + (teacher_maps if teacher_grad else [])


def at_loss(
    student: list[Tensor],
    teacher: list[Tensor],
    masks: list[Tensor],
    weights: list[float],
    skip_tokens: list[int],
    *rest: Any,
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss of all pairs, and the maps for the backward pass (see ``_ops.loss``)."""
    *values, student_grad, teacher_grad = rest
    options = LossOptions(*values)
    check_at_loss(student, teacher, masks, weights, skip_tokens, options)
    count = len(student)
    features, factors = [*student, *teacher], [*masks, *masks]
    maps = attention_map(features, *options[:2], skip_tokens)
    if masks:
        maps = [q * m.to(q.dtype) for q, m in zip(maps, factors, strict=True)]
    loss, coefficients = map_loss(
        maps[:count], maps[count:], weights, *options[2:], student_grad, teacher_grad
    )
    if not (student_grad or teacher_grad):
        return loss, []
    for i, k in enumerate(coefficients, 0 if student_grad else count):
        k = k * (options.p * collapse_scale(features[i], options.collapse))
        maps[i] = k * factors[i].to(k.dtype) if masks else k
    return loss, maps


def at_value_and_grad(
    student: list[Tensor],
    teacher: list[Tensor],
    masks: list[Tensor],
    weights: list[float],
    skip_tokens: list[int],
    *rest: Any,
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss of all pairs, and the students' gradients times ``scale * loss_gradient``."""
    *options, scale, loss_gradient = rest
    loss, maps = at_loss(student, teacher, masks, weights, skip_tokens, *options, True, False)
    count = len(student)
    coefficients = [k * scale for k in maps[:count]]
    pairs, skips = list(range(count)), skip_tokens[:count]
    p = options[0]
    return loss, attention_map_backward(student, coefficients, loss_gradient, pairs, p, skips)
