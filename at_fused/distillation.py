"""Losses to combine or compare with attention transfer: Hinton's distillation and F-ActT."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from at_fused._arguments import (
    as_equal_pairs,
    check_choice,
    check_labels,
    check_tensor,
    named_tensors,
    pair_weights,
    savable,
)
from at_fused._numbers import as_python, check_number, is_int, type_name
from at_fused.backends.outputs import accumulate_dtype

# ---- Hinton's loss -------------------------------------------------------------------------------


def check_kd_options(
    T: float, alpha: float, label_smoothing: float, ignore_index: int
) -> tuple[float, float, float, int]:
    """Return the options as Python numbers; raise an error if one is not allowed."""
    T, alpha = check_number("T", T), check_number("alpha", alpha)
    label_smoothing = check_number("label_smoothing", label_smoothing)
    ignore_index = as_python("ignore_index", ignore_index)
    if not 0 < T < math.inf:
        raise ValueError(f"T must be a finite number > 0, got {T!r}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, got {alpha!r}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be >= 0 and < 1, got {label_smoothing!r}")
    if not is_int(ignore_index):
        raise TypeError(f"ignore_index must be an int, got {type_name(ignore_index)}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit in int64, the labels' dtype, got {ignore_index}")
    return T, alpha, label_smoothing, ignore_index


def check_one_pair(names: tuple[str, str], first: object, second: object, rank: int) -> None:
    """Raise an error unless both are tensors of the same shape on the same device."""
    for name, x in zip(names, (first, second), strict=True):
        check_tensor(name, x)
    as_equal_pairs(names, first, second, rank)


def _divergence(student: Tensor, teacher: Tensor, T: float, alpha: float) -> Tensor:
    """Return the mean over all rows of alpha T^2 KL(softmax(t / T) || softmax(s / T))."""
    T = min(max(T, 1e-15), 1e15)  # T^2 must be in the range of fp32
    log_p, log_q = (F.log_softmax(x / T, 1) for x in (student, teacher))
    q, d = log_q.exp(), log_p - log_q
    with torch.no_grad():
        # A class that the teacher excludes counts 0. A NaN in the logits stays NaN in the excess.
        d.nan_to_num_(nan=0.0, posinf=0.0, neginf=-math.inf)
        # p - q sums to 0 exactly. In floating point it cancels the rounding errors of q d to first
        # order; the error of F.kl_div, without this term, is up to a hundred times larger.
        excess = log_p.exp() - q
    rows = student.numel() // student.shape[1]
    return (q * d - excess).sum() * (-alpha * T * T / rows)


def cross_entropy(
    logits: Tensor, labels: Tensor, *, ignore_index: int = -100, **options: Any
) -> Tensor:
    """Return torch's cross-entropy; an invalid label raises an error that names the argument."""
    target = savable(labels.to(logits.dtype) if labels.is_floating_point() else labels)
    try:
        return F.cross_entropy(logits, target, ignore_index=ignore_index, **options)
    except IndexError as error:
        allowed = f"from 0 to {logits.shape[1] - 1} or ignore_index ({ignore_index})"
        raise RuntimeError(f"labels must be {allowed}: {error}") from None


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    T: float = 4.0,
    alpha: float = 0.9,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """Compute Hinton's distillation loss from soft targets of the teacher and hard labels.

    With ``p = softmax(s / T)`` and ``q = softmax(t / T)`` of student logits s and teacher logits t:

        alpha * T^2 * (1/B) sum_b KL(q[b] || p[b])  +  (1 - alpha) * CE(s, labels)

    CE is ``torch.nn.functional.cross_entropy`` at T = 1. It is the mean over the rows with a label
    other than ``ignore_index``, and NaN if there are no such rows. A term with a factor (alpha or
    1 - alpha) of 0 is not computed, nor is the second term without labels. Logits of images,
    (B, K, H, W), are B * H * W rows: both terms are means over samples and positions.

    The loss runs in plain PyTorch, with fp16 and bf16 computed in fp32. For T up to 20, the
    divergence of a batch is exact to 1e-5; its error grows with T (docs/numerics.md). It is finite
    for logits up to 1e4 at any T, and exactly 0 for equal logits. Gradients of any order flow to
    both logits. If both sides exclude a class (a logit of -inf), it adds nothing.

    Args:
        student_logits: (B, K), or (B, K, *spatial) for segmentation; floating point.
        teacher_logits: the same shape; the dtype may differ. To train the student only, detach it
            or compute it under ``no_grad`` or ``inference_mode``.
        labels: (B,) or (B, *spatial) int64, classes from 0 to K - 1 or ``ignore_index``; or class
            probabilities (mixup, CutMix), floating point, of the shape of the logits; or None.
        T: temperature, a finite number > 0.
        alpha: weight of the first term, from 0 to 1.
        label_smoothing: label smoothing of the second term, >= 0 and < 1.
        ignore_index: the second term skips rows with this label. Not allowed for probabilities.

    Returns:
        A scalar: float64 if either side is float64, else float32 (also under autocast).

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes or devices do not match; a tensor is empty; an option is out of range, or
            is for labels that are missing (or for class numbers and got probabilities).
        RuntimeError: a label is not a class (CPU; on a GPU, torch raises a device-side assertion).

    Source: Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2;
    the weights as in the authors' program of Zagoruyko & Komodakis, ICLR 2017.
    """
    T, alpha, label_smoothing, ignore_index = check_kd_options(
        T, alpha, label_smoothing, ignore_index
    )
    names = "student_logits", "teacher_logits"
    check_one_pair(names, student_logits, teacher_logits, rank=2)
    if labels is not None:
        check_labels(labels, student_logits, probabilities=True)
    elif label_smoothing:
        raise ValueError(f"label_smoothing is for labels, got {label_smoothing} and labels=None")
    if ignore_index != -100 and (labels is None or labels.is_floating_point()):
        got = "labels=None" if labels is None else "class probabilities"
        raise ValueError(f"ignore_index is for int64 labels, got {ignore_index} and {got}")
    dtype = accumulate_dtype(student_logits, teacher_logits)
    student, teacher = student_logits.to(dtype), teacher_logits.to(dtype)
    soft = _divergence(student, teacher, T, alpha) if alpha > 0 else student[:0].sum()
    if labels is None or alpha == 1:
        return soft
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "ignore_index": ignore_index}
    return soft + (1 - alpha) * cross_entropy(student, labels, **options)


class _LossModule(nn.Module):
    """Loss with options in attributes, which are passed to a function as keyword arguments."""

    _names: ClassVar[tuple[str, ...]]

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self) -> str:
        """Return the options as keyword arguments."""
        return ", ".join(f"{name}={value!r}" for name, value in self._options().items())


class KDLoss(_LossModule):
    """Module form of ``kd_loss``: ``KDLoss(T=4)(student_logits, teacher_logits, labels)``.

    Args:
        T, alpha, label_smoothing, ignore_index: as in :func:`at_fused.kd_loss`. The constructor
            checks them and keeps them as attributes.

    Raises:
        TypeError, ValueError: an option is not as in :func:`at_fused.kd_loss`.

    The formula is that of :func:`at_fused.kd_loss`.

    Source: Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2.
    """

    _names = ("T", "alpha", "label_smoothing", "ignore_index")

    def __init__(
        self,
        T: float = 4.0,
        alpha: float = 0.9,
        *,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        self.T, self.alpha, self.label_smoothing, self.ignore_index = check_kd_options(
            T, alpha, label_smoothing, ignore_index
        )

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """Compute the loss of a batch.

        Args:
            student_logits, teacher_logits, labels: as in :func:`at_fused.kd_loss`.

        Returns:
            A scalar, float32, or float64 for float64 logits.

        Raises:
            TypeError, ValueError, RuntimeError: as :func:`at_fused.kd_loss`.
        """
        return kd_loss(student_logits, teacher_logits, labels, **self._options())


# ---- full activations ----------------------------------------------------------------------------


def features_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    form: str = "mean",
    reduction: str = "sum",
) -> Tensor:
    """Compute F-ActT, full-activation transfer: the squared L2 distance between features.

    For a pair with M elements per sample:

        form="mean"   1/(B M) * sum_b ||S[b] - T[b]||_2^2     the mean over all elements
        form="sum"    1/B     * sum_b ||S[b] - T[b]||_2^2

    It runs ``torch.nn.functional.mse_loss`` for each pair, with fp16 and bf16 in fp32. If the sum
    of the squares overflows fp32, the loss is inf, but its gradient is still right. Gradients of
    any order flow to both sides.

    Args:
        student: (B, ...), floating point, or a list or tuple of such features.
        teacher: as many features as ``student``, of the same shapes; dtypes may differ. For
            different numbers of channels use :class:`at_fused.FeaturesLoss`.
        weights: one finite factor per pair. None means 1 for all.
        form: "mean" or "sum", as above.
        reduction: "sum" over the pairs, or "none" for one value per pair.

    Returns:
        A scalar, or with ``reduction="none"`` a vector with one value per pair. float64 if any
        feature is float64, else float32.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes, batch sizes, devices or lengths do not match; a tensor or list is empty;
            an option is not allowed.

    Source: Zagoruyko & Komodakis, ICLR 2017, section 4.1, after Romero et al., "FitNets", 2015.
    """
    _check_form(form, reduction)
    students, teachers = as_equal_pairs(("student", "teacher"), student, teacher)
    dtype, losses = accumulate_dtype(*students, *teachers), []
    factors = pair_weights(weights, len(students)) or [1.0] * len(students)
    for s, t, factor in zip(students, teachers, factors, strict=True):
        count = s.numel() if form == "mean" else s.shape[0]
        losses.append((squared_error(s, t, "sum") * (factor / count)).to(dtype))
    pair_losses = torch.stack(losses)
    return pair_losses.sum() if reduction == "sum" else pair_losses


def squared_error(student: Tensor, teacher: Tensor, reduction: str) -> Tensor:
    """Return ``F.mse_loss`` in fp32 or fp64. Not for "mean": torch lacks the jvp of its vjp."""
    dtype = accumulate_dtype(student, teacher)
    s, t = (savable(x.to(dtype)) for x in (student, teacher))
    return F.mse_loss(s, t, reduction=reduction)


def _check_form(form: str, reduction: str) -> None:
    check_choice("form", form, ("mean", "sum"))
    check_choice("reduction", reduction, ("sum", "none"))


class FeaturesLoss(_LossModule):
    """F-ActT with 1x1 convolutions that map the student's channels to the teacher's.

    ``FeaturesLoss([16, 32], [32, 64])(student_features, teacher_features)``. The loss of a pair is
    ``1/(B M) * sum_b ||W S[b] - T[b]||_2^2`` with its convolution W; ``form="sum"`` omits 1/M. W
    has no bias and is trained with the student: pass this module's parameters to the optimizer.
    Pairs with equal numbers of channels have no convolution.

    Args:
        student_channels, teacher_channels: C of each side: an int, or a list of ints for lists of
            features.
        weights, form, reduction: as in :func:`at_fused.features_loss`.

    Raises:
        TypeError, ValueError: channels are not ints >= 1, or the lists differ in length; an option
            is not allowed.

    Source: Romero et al., "FitNets", 2015; Zagoruyko & Komodakis, ICLR 2017, section 4.1.
    """

    _names = ("weights", "form", "reduction")

    def __init__(
        self,
        student_channels: int | Sequence[int],
        teacher_channels: int | Sequence[int],
        *,
        weights: Sequence[float] | None = None,
        form: str = "mean",
        reduction: str = "sum",
    ) -> None:
        super().__init__()
        _check_form(form, reduction)
        pairs = _channels(student_channels, teacher_channels)
        self.weights = None if weights is None else pair_weights(weights, len(pairs))
        self.form, self.reduction = form, reduction
        self.projections = nn.ModuleList(
            nn.Identity() if s == t else nn.Conv2d(s, t, 1, bias=False) for s, t in pairs
        )

    def forward(
        self, student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor]
    ) -> Tensor:
        """Compute :func:`at_fused.features_loss` after the convolutions.

        Args:
            student: (B, C, H, W) with C from ``student_channels``, or a list of such features. The
                dtype must be that of the convolutions (float32), unless autocast converts it.
            teacher: (B, C, H, W) with C from ``teacher_channels``, or a list of such features.

        Returns:
            As :func:`at_fused.features_loss`: a scalar or (pairs,), float32 or float64.

        Raises:
            TypeError, ValueError: as :func:`at_fused.features_loss`.
            RuntimeError: C differs from the convolution's.
        """
        students = named_tensors("student", student)
        if len(students) != len(self.projections):
            expected = f"{len(self.projections)} features, one for each of student_channels"
            raise ValueError(f"student must have {expected}, got {len(students)}")
        projected = []
        for (name, x), projection in zip(students.items(), self.projections, strict=True):
            if check_tensor(name, x).dim() != 4:  # a convolution would also accept (C, H, W)
                raise ValueError(f"{name} must be (B, C, H, W), got shape {tuple(x.shape)}")
            projected.append(projection(x))
        features = projected[0] if isinstance(student, Tensor) else projected
        return features_loss(features, teacher, **self._options())


def _channels(student: Any, teacher: Any) -> list[tuple[int, int]]:
    """Return the checked numbers of channels of each pair."""
    values = as_python("student_channels", student), as_python("teacher_channels", teacher)
    sides = [tuple(value) if isinstance(value, (list, tuple)) else (value,) for value in values]
    are_valid = all(is_int(c) and c >= 1 for c in sides[0] + sides[1])
    if not are_valid or not 0 < len(sides[0]) == len(sides[1]):
        raise ValueError(
            "student_channels and teacher_channels must be ints >= 1, or lists of equal length, "
            f"got {values[0]!r} and {values[1]!r}"
        )
    return list(zip(*sides, strict=True))
