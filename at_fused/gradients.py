"""Gradient-based attention transfer: distances between input gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from at_fused._arguments import check_choice, check_labels, check_tensor, savable
from at_fused._numbers import type_name
from at_fused.distillation import check_one_pair, cross_entropy, squared_error


def input_gradient(
    model: Callable[[Tensor], Tensor] | Tensor,
    x: Tensor,
    labels: Tensor,
    *,
    create_graph: bool = False,
) -> Tensor:
    """Compute the gradient of each sample's cross-entropy with respect to the input.

    ``J[b] = d CE(model(x)[b], labels[b]) / d x[b]``. The cross-entropy is summed over the batch, so
    that J is not divided by B. For the student, set ``create_graph``: a loss of J then trains the
    parameters through double backward. Without it, as for the teacher, J has no graph:

        j_t = input_gradient(teacher, x, labels)
        x.requires_grad_()
        logits = student(x)
        j_s = input_gradient(logits, x, labels, create_graph=True)
        loss = F.cross_entropy(logits, labels) + beta / 2 * gradient_at_loss(j_s, j_t)

    The function does not change ``x``, its ``requires_grad``, the parameters' ``.grad`` or the
    model's mode. It also works under ``no_grad``.

    In training mode, BatchNorm mixes samples: J[b] is then the gradient of the batch's loss, and
    the running statistics change. Dropout samples another network in each call. Use eval mode for
    a teacher. For a student, set the BatchNorm modules to eval mode during the forward pass for J,
    or accept the mixing, as the authors do.

    Every layer must support double backward. cuDNN's RNNs and CTC loss, ``grid_sample``, the fused
    kernels of ``scaled_dot_product_attention`` (use ``sdpa_kernel(SDPBackend.MATH)``) and functions
    compiled by ``torch.compile`` do not; torch then raises an error.

    Args:
        model: a function of x, usually a module, that returns logits (B, K). Or the logits, if
            they were computed from an ``x`` that requires a gradient; their graph is kept.
        x: (B, ...), floating point.
        labels: (B,) int64. A row with label -100 has J = 0.
        create_graph: True to make J differentiable.

    Returns:
        J, with the shape and dtype of x.

    Raises:
        TypeError: an argument, or the model's output, has the wrong type.
        ValueError: shapes or devices do not match; the logits do not depend on x.
        RuntimeError: called under ``torch.inference_mode``; on the CPU, a label is not a class.

    Source: Zagoruyko & Komodakis, ICLR 2017, section 3.2.
    """
    check_tensor("x", x)
    if torch.is_inference_mode_enabled():
        raise RuntimeError("input_gradient: inference mode has no gradients; use no_grad instead")
    retain_graph = create_graph or isinstance(model, Tensor)
    if isinstance(model, Tensor):
        if not x.requires_grad:
            raise ValueError("x must require a gradient if model is a tensor of logits")
        logits = model
    elif not callable(model):
        raise TypeError(f"model must be a module, a function or logits, got {type_name(model)}")
    else:
        with torch.enable_grad():
            # With create_graph, an x that was itself computed stays in the graph of J.
            has_graph = x.requires_grad and create_graph
            x = x.view_as(x) if has_graph else savable(x).detach().requires_grad_()
            logits = model(x)
    if not isinstance(logits, Tensor):
        raise TypeError(f"model must return logits (B, K), got {type_name(logits)}")
    if logits.dim() != 2 or logits.shape[0] != x.shape[0]:
        expected = f"(B, K) with the B of x, {x.shape[0]}"
        raise ValueError(f"model: logits must be {expected}, got shape {tuple(logits.shape)}")
    check_labels(labels, logits)
    gradient = None
    if logits.requires_grad:
        with torch.enable_grad():
            loss = cross_entropy(logits, savable(labels), reduction="sum")
            (gradient,) = torch.autograd.grad(
                loss, x, create_graph=create_graph, retain_graph=retain_graph, allow_unused=True
            )
    if gradient is None:
        raise ValueError("model: the logits do not depend on x through a graph")
    return gradient


def gradient_at_loss(student: Tensor, teacher: Tensor, *, form: str = "paper") -> Tensor:
    """Compute gradient-based attention transfer: the distance between two input gradients.

    With J from :func:`input_gradient` and M elements per sample:

        form="paper"     1/B     * sum_b ||J_S[b] - J_T[b]||_2
        form="squared"   1/B     * sum_b ||J_S[b] - J_T[b]||_2^2
        form="code"      1/(B M) * sum_b ||J_S[b] - J_T[b]||_2^2     the mean over all elements

    The gradient of the norm at 0 is defined as 0. A norm below 1e-19 in float32 counts as 0. fp16
    and bf16 are computed in fp32. Gradients of any order flow to both sides.

    Args:
        student: J_S, (B, ...), computed with ``create_graph=True`` for training.
        teacher: J_T, of the same shape; the dtype may differ.
        form: "paper", "squared" or "code", as above.

    Returns:
        A scalar: float64 if either side is float64, else float32.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes or devices do not match, a tensor is empty, or ``form`` is not allowed.

    Source: Zagoruyko & Komodakis, ICLR 2017, section 3.2.
    """
    check_choice("form", form, ("paper", "squared", "code"))
    check_one_pair(("student", "teacher"), student, teacher, rank=1)
    if form != "paper":
        count = student.numel() if form == "code" else student.shape[0]
        return squared_error(student, teacher, "sum") / count
    squares = squared_error(student, teacher, "none")
    if squares.dim() > 1:
        squares = squares.sum(tuple(range(1, squares.dim())))
    # The second derivative of torch.linalg.vector_norm is NaN at 0.
    is_zero = squares == 0
    return torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, squares).sqrt()).mean()


def flip_symmetry_loss(
    model: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor, *, form: str = "paper"
) -> Tensor:
    """Compute the change of a network's attention under a horizontal flip; needs no teacher.

    The loss is the :func:`gradient_at_loss` of J(x) and the flipped J(flip(x)), where flip reverses
    the last dimension, W. For "paper" it is ``1/B sum_b ||J(x)[b] - flip(J(flip(x)))[b]||_2``. Add
    ``beta / 2`` times this loss to the task loss. :func:`input_gradient` computes both J: see there
    for supported layers and modes.

    Args:
        model: a function of x that returns logits (B, K).
        x: (B, C, H, W), or any (B, ..., W).
        labels: (B,) int64.
        form: as in :func:`gradient_at_loss`.

    Returns:
        A scalar: float64 for float64 x, else float32.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`input_gradient` and :func:`gradient_at_loss`.

    Source: Zagoruyko & Komodakis, ICLR 2017, section 3.2 (horizontal flip invariance).
    """
    if check_tensor("x", x).dim() < 2:
        raise ValueError(f"x must be (B, ..., W), got shape {tuple(x.shape)}")
    original = input_gradient(model, x, labels, create_graph=True)
    flipped = input_gradient(model, x.flip(-1), labels, create_graph=True)
    return gradient_at_loss(original, flipped.flip(-1), form=form)
