"""Hinton's loss on Triton: arguments, strides, launches."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from at_fused.backends import eager
from at_fused.backends.triton import kd_kernels as kernels
from at_fused.backends.triton import launch
from at_fused.backends.triton.checks import check_dtypes, require

_BLOCK = 1024  # classes at a time: 8 to a thread


def _check(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    temperature: float,
    alpha: float,
    label_smoothing: float,
) -> None:
    require(
        student.dim() == 2 and student.shape == teacher.shape and student.numel() > 0,
        "logits must be (B, K), not empty, and both of the same shape",
    )
    check_dtypes((student, teacher), "logits", launch.interpreted())
    require(0 < temperature < math.inf, f"temperature must be a finite number > 0: {temperature}")
    require(0 <= alpha <= 1, f"alpha must be from 0 to 1, got {alpha}")
    require(0 <= label_smoothing < 1, f"label_smoothing must be >= 0 and < 1: {label_smoothing}")
    require(
        labels is None
        or (
            labels.shape == student.shape[:1]
            and labels.dtype == torch.int64
            and labels.device == student.device
        ),
        "labels must be (B,) of int64, on the logits' device",
    )


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
    _check(student, teacher, labels, temperature, alpha, label_smoothing)
    s, t = _rows(student), _rows(teacher)
    call = _Call([s, t], labels, temperature, alpha, label_smoothing, ignore_index)
    loss = s.new_empty((), dtype=eager.accumulate_dtype(s, t))
    stats = s.new_empty((s.shape[0], eager.STATISTICS), dtype=torch.float64)
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
    _check(student, teacher, labels, temperature, alpha, label_smoothing)
    require(
        stats.shape == (student.shape[0], eager.STATISTICS)
        and stats.dtype == valid.dtype == torch.float64
        and stats.device == valid.device == student.device
        and valid.numel() == 1,
        "stats and valid must be what kd_loss returned",
    )
    require(
        gradient.numel() == 1
        and gradient.dtype in (torch.float32, torch.float64)
        and gradient.device == student.device,
        "the gradient must be a scalar, float32 or float64, on the logits' device",
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
