"""Hinton's loss on Triton: arguments, strides, launches."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from at_fused.backends.checks import check_kd_loss, check_kd_loss_backward
from at_fused.backends.results import STATISTICS, accumulate_dtype
from at_fused.backends.triton import kd_kernels as kernels
from at_fused.backends.triton import launch

_BLOCK = 1024  # classes at a time: 8 to a thread


def _rows(x: Tensor) -> Tensor:
    """With adjacent classes."""
    return x if x.shape[1] == 1 or x.stride(1) == 1 else x.contiguous()


class _Call:
    """What the kernels of both directions are given of the same arguments."""

    def __init__(
        self,
        tensors: list[Tensor | None],
        labels: Tensor | None,
        temperature: float,
        alpha: float,
        label_smoothing: float,
        ignore_index: int,
    ) -> None:
        first = tensors[0]
        assert first is not None
        rows, classes = first.shape
        # In units of `align`: multiplied back, they tell the compiler how wide an access may be.
        strides = [0 if x is None else x.stride(0) for x in tensors]
        align = math.gcd(classes, *strides, 16)
        entropy = labels is not None and alpha < 1
        self.labels = labels if entropy else None
        self.strides = [stride // align for stride in strides]
        self.numbers: tuple[Any, ...] = (
            self.labels.stride(0) if self.labels is not None else 0,
            classes // align,
            rows,
            launch.bits_of(temperature),
            launch.bits_of(alpha),
            launch.bits_of(label_smoothing),
            ignore_index,
        )
        wide = any(x is not None and x.dtype == torch.float64 for x in tensors)
        block = min(_BLOCK // 4 if wide else _BLOCK, launch.power_of_2(classes))
        self.constants = {
            "DIVERGENCE": alpha > 0,
            "ENTROPY": entropy,
            "ALIGN": align,
            "BLOCK": max(block, 16),
            "ACC": tl.float64 if wide else tl.float32,
        }


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
    s, t = _rows(student), _rows(teacher)
    call = _Call([s, t], labels, temperature, alpha, label_smoothing, ignore_index)
    loss = s.new_empty((), dtype=accumulate_dtype(s, t))
    stats = s.new_empty((s.shape[0], STATISTICS), dtype=torch.float64)
    valid = s.new_empty((), dtype=torch.float64)
    with launch.on_device(s):
        launch.start(
            kernels.kd_loss_kernel,
            s.shape[0],
            s,
            t,
            call.labels,
            stats,
            loss,
            valid,
            launch.counters_of(s, 1),
            *call.strides,
            *call.numbers,
            **call.constants,
        )
    return loss, stats, valid


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
    """The gradients of the sides asked for, each in its dtype and layout."""
    check_kd_loss_backward(
        student, teacher, labels, stats, valid, gradient, temperature, alpha, label_smoothing
    )
    if not student_grad and not teacher_grad:
        return []
    s, t = _rows(student), _rows(teacher)
    results = [
        torch.empty_like(x) if wanted else None
        for x, wanted in ((student, student_grad), (teacher, teacher_grad))
    ]
    written = [
        x if x is None or x.shape[1] == 1 or x.stride(1) == 1 else x.new_empty(x.shape)
        for x in results
    ]
    call = _Call([s, t, *written], labels, temperature, alpha, label_smoothing, ignore_index)
    with launch.on_device(s):
        launch.start(
            kernels.kd_loss_backward_kernel,
            s.shape[0],
            s,
            t,
            call.labels,
            stats.contiguous(),
            valid,
            gradient,
            *written,
            *call.strides,
            *call.numbers,
            **call.constants,
        )
    return [
        out if out is result else result.copy_(out)
        for result, out in zip(results, written, strict=True)
        if result is not None and out is not None
    ]
