"""Hinton's distillation loss and its gradients in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from at_fused.backends.checks import check_kd_loss, check_kd_loss_backward
from at_fused.backends.eager.attention import wide
from at_fused.backends.results import accumulate_dtype


class Divergence(NamedTuple):
    """KL(q || p) of each row (B,), and what its gradients are made of, (B, K)."""

    kl: Tensor
    difference: Tensor  # p - q
    pull: Tensor  # q * (log(q / p) - KL)
    # (B, 1): max and sum of the exponentials, student's and teacher's; log of the sums' quotient
    sums: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _exponentials(x: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The largest logit of each row, e^((x - max) / T), and its sum."""
    top = x.amax(1, keepdim=True).detach()  # without a part in the derivatives
    e = ((x - top) / temperature).exp()
    return top, e, e.sum(1, keepdim=True)


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Divergence:
    """KL(q || p) with q = softmax(t / T), p = softmax(s / T).

    As sum_k q (e^-d - 1 + d), d = log(q / p): the terms are positive, where those of sum_k q d
    cancel at high temperatures, whose d are small. And d from t - s, not from two logarithms: what
    the logits have in common would drown it.
    """
    # In fp64 the plain formulas hold for every temperature.
    s, t = wide(student), wide(teacher)
    s_max, s_exp, s_sum = _exponentials(s, temperature)
    t_max, t_exp, t_sum = _exponentials(t, temperature)
    p, q = s_exp / s_sum, t_exp / t_sum
    known = q > 0  # a class that the teacher excludes has no d
    u = torch.where(known, ((t - s) - (t_max - s_max)) / temperature, 0.0)
    # d = u + log(s_sum / t_sum), whose quotient is 1 + excess.
    small = known & (u.abs() < 0.5)
    near = torch.where(small, u, 0.0)
    excess = torch.where(small, q * torch.expm1(-near), s_exp / t_sum - q).sum(1, keepdim=True)
    close = excess > -0.5
    quotient = torch.where(close, torch.where(close, excess, 0.0).log1p(), (s_sum / t_sum).log())
    d = torch.where(known, u + quotient, 0.0)

    small = known & (d.abs() < 0.5)
    near = torch.where(small, d, 0.0)
    difference = torch.where(small, q * torch.expm1(-near), p - q)
    terms = torch.where(small, q * (torch.expm1(-near) + near), p - q + q * d)
    kl = terms.sum(1, keepdim=True)
    # The row sums to 0. What a sure teacher's class has is less than the rounding of d - KL.
    pull, sure = q * (d - kl), q > 0.5
    others = torch.where(sure, 0.0, pull).sum(1, keepdim=True)
    pull = torch.where(sure, -others, pull)
    return Divergence(kl.squeeze(1), difference, pull, (s_max, s_sum, t_max, t_sum, quotient))


def _classes(student: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """The labels as indices, which of them count, and which of those are none."""
    counted = labels != ignore_index
    wrong = counted & ((labels < 0) | (labels >= student.shape[1]))
    return torch.where(counted & ~wrong, labels, 0), counted, wrong


def _check_labels(student: Tensor, labels: Tensor, ignore_index: int) -> None:
    wrong = _classes(student, labels, ignore_index)[2]
    if labels.device.type == "cpu" and bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise RuntimeError(
            f"at_fused: labels must be from 0 to {student.shape[1] - 1} or ignore_index "
            f"({ignore_index}), got {int(labels[row])} in row {row}"
        )


def cross_entropy(
    student: Tensor, labels: Tensor, label_smoothing: float, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each row, 0 where it is ignored, and which rows count."""
    index, counted, wrong = _classes(student, labels, ignore_index)
    log_p = torch.log_softmax(wide(student), 1)
    loss = -log_p.gather(1, index.unsqueeze(1)).squeeze(1)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * log_p.mean(1)
    loss = torch.where(wrong, float("nan"), loss)
    return torch.where(counted, loss, 0.0), counted


def cross_entropy_gradient(
    student: Tensor, labels: Tensor, label_smoothing: float, ignore_index: int
) -> Tensor:
    """The gradient of the sum of ``cross_entropy``, (B, K)."""
    index, counted, wrong = _classes(student, labels, ignore_index)
    p = torch.softmax(wide(student), 1)
    target = torch.zeros_like(p).scatter(1, index.unsqueeze(1), 1 - label_smoothing)
    gradient = p - target - label_smoothing / student.shape[1]
    gradient = torch.where(wrong.unsqueeze(1), float("nan"), gradient)
    return torch.where(counted.unsqueeze(1), gradient, 0.0)


def kd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    temperature: float,
    alpha: float,
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the rows' statistics, and how many rows have a label that counts."""
    check_kd_loss(student, teacher, labels, temperature, alpha, label_smoothing)
    found = divergence(student, teacher, temperature)
    s_max = found.sums[0]
    ce = torch.zeros_like(found.kl)
    loss, valid = found.kl.new_zeros(()), found.kl.new_zeros(())
    if alpha > 0:
        loss = loss + found.kl.sum() * (alpha * temperature * temperature / student.shape[0])
    if labels is not None and alpha < 1:
        _check_labels(student, labels, ignore_index)
        ce, counted = cross_entropy(student, labels, label_smoothing, ignore_index)
        valid = counted.sum().to(loss.dtype)
        loss = loss + ce.sum() * (1 - alpha) / valid
    ce_sum = (wide(student) - s_max).exp().sum(1) + 0 * ce
    sums = (x.squeeze(1) for x in found.sums)
    stats = torch.stack([*sums, found.kl, ce_sum, ce], 1)
    return loss.to(accumulate_dtype(student, teacher)), stats, valid


def kd_loss_backward(
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
    """The gradients of the sides asked for, each in its dtype and layout.

    From the logits alone, so that it can itself be differentiated; ``stats`` is for kernels.
    """
    check_kd_loss_backward(
        student, teacher, labels, stats, valid, gradient, temperature, alpha, label_smoothing
    )
    g = wide(gradient)
    found = divergence(student, teacher, temperature)
    scale = g * (alpha * temperature / student.shape[0])
    gradients = []
    if student_grad:
        total = found.difference * scale if alpha > 0 else torch.zeros_like(found.difference)
        if labels is not None and alpha < 1:
            ce = cross_entropy_gradient(student, labels, label_smoothing, ignore_index)
            # Without a label that counts there is no gradient, whatever 0 / 0 is.
            total = total + ce * (g * (1 - alpha) / valid.clamp(min=1))
        gradients.append(_like(total, student))
    if teacher_grad:
        total = found.pull * scale if alpha > 0 else torch.zeros_like(found.pull)
        gradients.append(_like(total, teacher))
    return gradients


def _like(gradient: Tensor, x: Tensor) -> Tensor:
    """In the dtype and with the strides of ``torch.empty_like(x)``."""
    gradient = gradient.to(x.dtype)
    out = torch.empty_like(x)
    return gradient if gradient.stride() == out.stride() else out.copy_(gradient)
