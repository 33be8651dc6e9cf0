"""The operators as Triton kernels, for CUDA and ROCm GPUs without a compiled library.

Nothing here imports Triton before the first call, which compiles: a second or so for each new
combination of dtypes, layouts and options. Under ``TRITON_INTERPRET=1``, set before Triton is
imported, the same kernels run on CPU tensors, slowly.

A list of up to ``launch.MAX_ENTRIES`` pairs or features is one launch.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor


def available() -> bool:
    """Whether Triton is installed and has something to run on."""
    return not reason()


def reason() -> str:
    """Why the kernels cannot run here; empty where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available() and not interpreted():
        return "no GPU, and TRITON_INTERPRET=1 is not set"
    return ""


def interpreted() -> bool:
    """Whether Triton's interpreter is asked for, which runs the kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def attention_map(features: list[Tensor], p: float, collapse: str) -> list[Tensor]:
    """Q[b, n] = scale * sum_c |A[b, c, n]|^p, (B, N), for each feature (B, C, *spatial)."""
    from at_fused.backends.triton import launch

    return launch.attention_map(features, p, collapse)


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
    from at_fused.backends.triton import launch

    return launch.at_loss(
        student,
        teacher,
        weights,
        p,
        collapse,
        form,
        reduction,
        eps,
        student_grad,
        teacher_grad,
    )


def attention_map_backward(
    features: list[Tensor],
    coefficients: list[Tensor],
    loss_gradient: Tensor | None,
    pairs: list[int],
    p: float,
) -> list[Tensor]:
    """dL/dA = g * k[b, n] * |A|^(p-1) * sign(A) for each feature, in its dtype and layout."""
    from at_fused.backends.triton import launch

    return launch.attention_map_backward(features, coefficients, loss_gradient, pairs, p)


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
    """The loss of all pairs, and scale * g_i * dL_i/dS_i for each student.

    One launch, in which a program computes the maps, loss and gradient of a sample while its S is
    in the cache; pairs of few, large samples, which one program each would not keep the device
    busy with, take a second one for their gradients.
    """
    from at_fused.backends.triton import launch

    return launch.at_value_and_grad(
        student, teacher, weights, p, collapse, form, reduction, eps, scale, loss_gradient
    )
