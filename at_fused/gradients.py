"""Gradient-based attention transfer: the input gradients of two networks, or of two images."""

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
    """The gradient of each sample's cross-entropy for the input: where a network looks.

    ``J[b] = d CE(model(x)[b], labels[b]) / d x[b]``: of the sum over the batch, so that no sample's
    J is divided by B. With ``create_graph`` J is itself a function of the network's parameters,
    which a loss of it trains through double backward: that is for the student. The teacher's J,
    without it, keeps no graph:

        j_t = input_gradient(teacher, x, labels)
        x.requires_grad_()
        logits = student(x)
        j_s = input_gradient(logits, x, labels, create_graph=True)
        loss = F.cross_entropy(logits, labels) + beta / 2 * gradient_at_loss(j_s, j_t)

    ``x`` itself, its ``requires_grad``, the parameters' ``.grad`` and the model's mode are left as
    they are. Runs under ``no_grad`` as well.

    In training mode BatchNorm mixes samples (J[b] then is the gradient of the whole batch's loss
    for x[b], and the running statistics move), and dropout draws another network in each call. For
    a teacher: eval mode. For a student: BatchNorm modules in eval mode during the pass that makes
    J, or the authors' choice, to accept it.

    Every layer needs a double backward. cuDNN's RNNs and CTC loss, ``grid_sample``, the fused
    kernels of ``scaled_dot_product_attention`` (use ``sdpa_kernel(SDPBackend.MATH)``) and functions
    compiled by ``torch.compile`` have none: torch says so.

    Args:
        model: a function of x, usually a module, that returns logits (B, K); or the logits
            themselves, computed from an ``x`` that requires a gradient. Their graph is kept.
        x: (B, ...), floating point.
        labels: (B,) int64. A row with label -100 has J = 0.
        create_graph: whether J can be differentiated.

    Returns:
        J, with the shape and dtype of x.

    Raises:
        TypeError: an argument is not of the kind above, or the model returns something else.
        ValueError: shapes or devices that do not match; logits that do not depend on x.
        RuntimeError: called under ``torch.inference_mode``; a label that is no class, on the CPU.

    Source: Zagoruyko & Komodakis, ICLR 2017, section 3.2.
    """
    check_tensor("x", x)
    if torch.is_inference_mode_enabled():
        raise RuntimeError("input_gradient: inference mode has no gradients; use no_grad instead")
    keep = create_graph or isinstance(model, Tensor)
    if isinstance(model, Tensor):
        if not x.requires_grad:
            raise ValueError("x must require a gradient where model is given as logits")
        logits = model
    elif not callable(model):
        raise TypeError(f"model must be a module, a function or logits, got {type_name(model)}")
    else:
        with torch.enable_grad():
            # A J with a graph depends on the origin of an x that is itself computed.
            computed = x.requires_grad and create_graph
            x = x.view_as(x) if computed else savable(x).detach().requires_grad_()
            logits = model(x)
    if not isinstance(logits, Tensor):
        raise TypeError(f"model must return logits (B, K), got {type_name(logits)}")
    if logits.dim() != 2 or logits.shape[0] != x.shape[0]:
        found = f"{x.shape[0]}, got shape {tuple(logits.shape)}"
        raise ValueError(f"model: logits must be (B, K) with the B of x, {found}")
    check_labels(labels, logits)
    gradient = None
    if logits.requires_grad:
        with torch.enable_grad():
            loss = cross_entropy(logits, savable(labels), reduction="sum")
            (gradient,) = torch.autograd.grad(
                loss, x, create_graph=create_graph, retain_graph=keep, allow_unused=True
            )
    if gradient is None:
        raise ValueError("model: the logits do not depend on x by a graph")
    return gradient


def gradient_at_loss(student: Tensor, teacher: Tensor, *, form: str = "paper") -> Tensor:
    """Gradient-based attention transfer: the distance between two networks' input gradients.

    With J of :func:`input_gradient` and M elements per sample:

        form="paper"     1/B     * sum_b ||J_S[b] - J_T[b]||_2
        form="squared"   1/B     * sum_b ||J_S[b] - J_T[b]||_2^2
        form="code"      1/(B M) * sum_b ||J_S[b] - J_T[b]||_2^2     the mean over all elements

    The gradient of the norm at 0 is taken to be 0; below 1e-19 the difference of two float32
    gradients is 0 here. fp16 and bf16 are computed in fp32. Gradients flow to both sides, to any
    order.

    Args:
        student: J_S, (B, ...), made with ``create_graph=True`` for training.
        teacher: J_T, the same shape; the dtype may differ.
        form: as above.

    Returns:
        A scalar: float64 if either side is, else float32.

    Raises:
        TypeError: an argument is not of the kind above.
        ValueError: shapes or devices that do not match, an empty tensor, another form.

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
    # torch.linalg.vector_norm has NaN for the second derivative at 0.
    same = squares == 0
    return torch.where(same, 0.0, torch.where(same, 1.0, squares).sqrt()).mean()


def flip_symmetry_loss(
    model: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor, *, form: str = "paper"
) -> Tensor:
    """Change of a network's attention when the image is flipped, without a teacher.

    The distance of :func:`gradient_at_loss` between J(x) and the flipped J(flip(x)), where flip
    reverses the last dimension, W: for "paper" ``1/B sum_b ||J(x)[b] - flip(J(flip(x)))[b]||_2``.
    Both J are made by :func:`input_gradient`, which says what layers and modes it takes, and can be
    differentiated: add ``beta / 2`` times this to the loss.

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
    straight = input_gradient(model, x, labels, create_graph=True)
    flipped = input_gradient(model, x.flip(-1), labels, create_graph=True)
    return gradient_at_loss(straight, flipped.flip(-1), form=form)
