"""The operators in plain PyTorch: the readable reference, and the path of last resort.

Runs on every device and dtype that torch has. Each function has the signature of its operator in
``_ops.py``. Everything here is differentiable, to any order: ``_ops.py`` leans on that for second
derivatives. fp16, bf16 and fp32 are computed in fp32, fp64 in fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate_dtype(*features: Tensor) -> torch.dtype:
    """The dtype of maps, coefficients and losses: fp64 where a feature is, else fp32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in features) else torch.float32


def collapse_scale(x: Tensor, collapse: str) -> float:
    """The factor before the channel sum: 1/C for "mean", 1 for "sum"."""
    return 1.0 / x.shape[1] if collapse == "mean" else 1.0


def power(x: Tensor, p: float) -> Tensor:
    """|x|^p."""
    return x * x if p == 2 else x.abs() if p == 1 else x.abs().pow(p)


def slope(x: Tensor, p: float) -> Tensor:
    """|x|^(p-1) * sign(x), the derivative of |x|^p / p."""
    return x if p == 2 else x.sign() if p == 1 else x.abs().pow(p - 1) * x.sign()


def attention_map(features: list[Tensor], p: float, collapse: str) -> list[Tensor]:
    """Q[b, n] = scale * sum_c |A[b, c, n]|^p for each feature (B, C, *spatial)."""
    maps = []
    for x in features:
        wide = x.to(accumulate_dtype(x)).flatten(2)
        maps.append(power(wide, p).sum(1) * collapse_scale(x, collapse))
    return maps


def normalize(raw: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Q / max(||Q||, eps) along the positions, and max(||Q||, eps), both in fp64."""
    # Squares of a map overflow fp32 from features of 1e10 on. Apple's GPUs have no fp64.
    raw = raw if raw.device.type == "mps" else raw.double()
    # The norm's own derivative is 0/0 at a zero map, where the clamp stands anyway.
    squares = (raw * raw).sum(1, keepdim=True)
    clamped = squares <= eps * eps
    norm = torch.where(clamped, eps, torch.where(clamped, 1.0, squares).sqrt())
    return raw / norm, norm


def pair_loss(
    student: Tensor,
    teacher: Tensor,
    weight: float,
    form: str,
    eps: float,
    student_scale: float,
    teacher_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and coefficient maps (k_S, k_T) of one pair, from its raw maps (B, N), in fp64."""
    batch, positions = student.shape
    qs, student_norm = normalize(student, eps)
    qt, teacher_norm = normalize(teacher, eps)
    difference = qs - qt
    squares = (difference * difference).sum(1, keepdim=True)
    if form == "code":
        loss = squares.sum() * (weight / (batch * positions))
        gradient = difference * (2 * weight / (batch * positions))
    else:
        same = squares == 0
        distance = torch.where(same, 1.0, squares).sqrt()
        loss = torch.where(same, 0.0, distance).sum() * (weight / batch)
        gradient = torch.where(same, 0.0, difference / distance) * (weight / batch)

    def coefficients(q: Tensor, norm: Tensor, g: Tensor, scale: float) -> Tensor:
        # Below eps the map is divided by a constant: nothing to project out.
        along = torch.where(norm <= eps, 0.0, (q * g).sum(1, keepdim=True))
        return (g - q * along) / norm * scale

    return (
        loss,
        coefficients(qs, student_norm, gradient, student_scale),
        coefficients(qt, teacher_norm, -gradient, teacher_scale),
    )


def at_loss(
    student: list[Tensor],
    teacher: list[Tensor],
    weights: list[float],
    p: float,
    collapse: str,
    form: str,
    reduction: str,
    eps: float,
    student_grad: bool,
    teacher_grad: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The loss of all pairs, and what the backward pass needs of them (see ``_ops.py``)."""
    losses = []
    student_maps = attention_map(student, p, collapse)
    teacher_maps = attention_map(teacher, p, collapse)
    for i, (qs, qt) in enumerate(zip(student_maps, teacher_maps, strict=True)):
        loss, ks, kt = pair_loss(
            qs,
            qt,
            weights[i] if weights else 1.0,
            form,
            eps,
            p * collapse_scale(student[i], collapse),
            p * collapse_scale(teacher[i], collapse),
        )
        losses.append(loss)
        if student_grad:
            student_maps[i] = ks.to(qs.dtype)
        if teacher_grad:
            teacher_maps[i] = kt.to(qt.dtype)
    total = torch.stack(losses).to(accumulate_dtype(*student, *teacher))
    if reduction == "sum":
        total = total.sum()
    return total, student_maps + teacher_maps if student_grad or teacher_grad else []


def attention_map_backward(
    features: list[Tensor],
    coefficients: list[Tensor],
    loss_gradient: Tensor | None,
    pairs: list[int],
    p: float,
) -> list[Tensor]:
    """dL/dA = g * k[b, n] * |A|^(p-1) * sign(A) for each feature, in its dtype and layout."""
    gradients = []
    for x, k, pair in zip(features, coefficients, pairs, strict=True):
        if loss_gradient is not None:
            k = k * (loss_gradient if loss_gradient.dim() == 0 else loss_gradient[pair])
        k = k.reshape(x.shape[0], 1, *x.shape[2:])
        gradient = (k * slope(x.to(k.dtype), p)).to(x.dtype)
        out = torch.empty_like(x)
        gradients.append(gradient if gradient.stride() == out.stride() else out.copy_(gradient))
    return gradients


def at_value_and_grad(
    student: list[Tensor],
    teacher: list[Tensor],
    weights: list[float],
    p: float,
    collapse: str,
    form: str,
    reduction: str,
    eps: float,
    scale: float,
    loss_gradient: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """The loss of all pairs, and the students' gradients times ``scale * loss_gradient``."""
    loss, maps = at_loss(student, teacher, weights, p, collapse, form, reduction, eps, True, False)
    coefficients = [k * scale for k in maps[: len(student)]]
    pairs = list(range(len(student)))
    return loss, attention_map_backward(student, coefficients, loss_gradient, pairs, p)
