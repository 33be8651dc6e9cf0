"""The public functions: check what is given, bring it to (B, C, *spatial), call one operator."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from at_fused import _ops
from at_fused._warnings import AtFusedWarning
from at_fused.backends import eager

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_COLLAPSES = ("mean", "sum")
_FORMS = ("code", "paper")
_REDUCTIONS = ("sum", "none")

Features = TypeVar("Features", Tensor, Sequence[Tensor])


# ---- checks --------------------------------------------------------------------------------------


def check_options(
    *,
    p: float = 2.0,
    eps: float = 1e-12,
    collapse: str = "mean",
    form: str = "code",
    reduction: str = "sum",
) -> None:
    """Raises the ValueError or TypeError that names the option, what was given, what is allowed."""
    if collapse not in _COLLAPSES:
        raise ValueError(f"collapse must be 'mean' or 'sum', got {collapse!r}")
    if form not in _FORMS:
        raise ValueError(f"form must be 'code' or 'paper', got {form!r}")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be 'sum' or 'none', got {reduction!r}")
    _check_number("p", p)
    if not 1 <= p < math.inf:
        raise ValueError(f"p must be a finite number >= 1, got {p!r}")
    _check_number("eps", eps)
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be a finite number > 0, got {eps!r}")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {_kind(value)}")


def _kind(value: object) -> str:
    return type(value).__name__


def _is_feature(x: object) -> bool:
    return (
        isinstance(x, Tensor)
        and x.dtype in _DTYPES
        and x.layout is torch.strided
        and 3 <= x.dim() <= 5
        and 0 not in x.shape
    )


def _refuse_feature(name: str, x: object) -> None:
    """Raises what is wrong with something that ``_is_feature`` refused."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {_kind(x)}")
    if x.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {x.dtype}")
    if not 3 <= x.dim() <= 5:
        raise ValueError(
            f"{name} must be (B, C, H, W), or have one to three spatial dimensions, "
            f"got shape {tuple(x.shape)}"
        )
    raise ValueError(f"{name} must not be empty, got shape {tuple(x.shape)}")


def _channels_second(x: Tensor, channel_dim: int) -> Tensor:
    """The feature as (B, C, *spatial)."""
    if channel_dim == 1:
        return x
    if channel_dim not in (-1, x.dim() - 1):
        raise ValueError(f"channel_dim must be 1 or -1, got {channel_dim!r}")
    return x.movedim(-1, 1)


def _features(name: str, given: Tensor | Sequence[Tensor], channel_dim: int) -> list[Tensor]:
    if isinstance(given, Tensor):
        if not _is_feature(given):
            _refuse_feature(name, given)
        return [_channels_second(given, channel_dim)]
    if not isinstance(given, (list, tuple)):
        raise TypeError(
            f"{name} must be a tensor or a list or tuple of tensors, got {_kind(given)}"
        )
    if not given:
        raise ValueError(f"{name} must not be an empty {_kind(given)}")
    for i, x in enumerate(given):
        if not _is_feature(x):
            _refuse_feature(f"{name}[{i}]", x)
    return [_channels_second(x, channel_dim) for x in given]


def _refuse_pair(i: int, student: Tensor, teacher: Tensor, device: torch.device) -> None:
    """Raises what does not match in a pair."""
    for name, x in (("student", student), ("teacher", teacher)):
        if x.device != device:
            raise ValueError(
                f"{name} of pair {i} is on {x.device}, the first student on {device}: "
                "all features must be on one device"
            )
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"student and teacher of pair {i} must have the same batch size, "
            f"got {student.shape[0]} and {teacher.shape[0]}"
        )
    raise ValueError(
        f"student and teacher of pair {i} must have the same map size (H x W), "
        f"got {_size(student)} and {_size(teacher)}; a resize= option is planned, until then "
        "interpolate or pool one of them"
    )


def _pairs(
    student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor], channel_dim: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Both sides as lists of (B, C, *spatial) that match pair by pair."""
    if isinstance(student, Tensor) != isinstance(teacher, Tensor):
        raise TypeError(
            "student and teacher must both be tensors or both be sequences, "
            f"got {_kind(student)} and {_kind(teacher)}"
        )
    students = _features("student", student, channel_dim)
    teachers = _features("teacher", teacher, channel_dim)
    if len(students) != len(teachers):
        raise ValueError(
            "student and teacher must have the same number of features, "
            f"got {len(students)} and {len(teachers)}"
        )
    device = students[0].device
    for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
        positions = s.shape[2:]
        if not (
            s.device == t.device == device and s.shape[0] == t.shape[0] and positions == t.shape[2:]
        ):
            _refuse_pair(i, s, t, device)
        if positions.numel() == 1:
            _warn_single_position(i)
    return students, teachers


def _size(x: Tensor) -> str:
    return "x".join(str(int(size)) for size in x.shape[2:])


def _weights(weights: Sequence[float] | None, pairs: int) -> list[float]:
    if weights is None:
        return []
    if not isinstance(weights, (list, tuple)):
        raise TypeError(f"weights must be a list or tuple of numbers, got {_kind(weights)}")
    if len(weights) != pairs:
        raise ValueError(
            f"weights must have one number per pair, got {len(weights)} for {pairs} pairs"
        )
    for i, weight in enumerate(weights):
        _check_number(f"weights[{i}]", weight)
        if not math.isfinite(weight):
            raise ValueError(f"weights[{i}] must be finite, got {weight!r}")
    return [float(weight) for weight in weights]


def _scale(scale: float | Tensor, students: list[Tensor]) -> tuple[float, Tensor | None]:
    """A scale as a number, and as what the device has to read."""
    if not isinstance(scale, Tensor):
        _check_number("scale", scale)
        if not math.isfinite(scale):
            raise ValueError(f"scale must be finite, got {scale!r}")
        return float(scale), None
    if scale.numel() != 1 or not scale.is_floating_point():
        raise ValueError(
            "scale must be a number or a floating-point tensor of one element, got "
            f"{scale.dtype} of shape {tuple(scale.shape)}"
        )
    if scale.device != students[0].device:
        raise ValueError(
            f"scale must be on the features' device, {students[0].device}, got {scale.device}"
        )
    return 1.0, scale.detach().reshape(()).to(eager.accumulate_dtype(*students))


_single_position_warned = False


def _warn_single_position(i: int) -> None:
    global _single_position_warned
    if not _single_position_warned and not torch.compiler.is_compiling():
        _single_position_warned = True
        warnings.warn(
            f"pair {i} has maps of a single position: normalised they are all 1, and the loss of "
            "this pair is 0 whatever the features",
            AtFusedWarning,
            stacklevel=5,
        )


# ---- the functions -------------------------------------------------------------------------------


def at_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    p: float = 2.0,
    collapse: str = "mean",
    form: str = "code",
    weights: Sequence[float] | None = None,
    reduction: str = "sum",
    channel_dim: int = 1,
    eps: float = 1e-12,
) -> Tensor:
    """Attention-transfer loss between the features of a student and of a teacher.

    With the raw map ``Q[b, n] = (1/C) sum_c |A[b, c, n]|^p`` over the N = H*W positions and the
    normalised map ``q[b] = Q[b] / max(||Q[b]||_2, eps)``, the loss of a pair is::

        form="code"     1/(B N) * sum_b ||qs[b] - qt[b]||_2^2     the authors' program
        form="paper"    1/B     * sum_b ||qs[b] - qt[b]||_2       the paper's equation (2)

    Gradients flow to every feature that requires them, student's or teacher's, to any order.

    Args:
        student: (B, C, H, W), or a list or tuple of such features, one per stage. Also (B, C, L)
            and (B, C, D, H, W). float32, float64, float16 or bfloat16, any strides; NCHW and
            channels_last are read as they lie.
        teacher: as many features as ``student``, each with the B, H and W of its partner; C and
            dtype may differ.
        p: exponent, any finite number >= 1; 1, 2 and 4 are fastest.
        collapse: "mean" divides the sum over channels by C, "sum" does not (the normalised map
            differs by rounding and by what eps means only).
        form: "code" or "paper", as above.
        weights: one finite factor per pair; None is 1 for all.
        reduction: "sum" over the pairs, or "none" for one value per pair.
        channel_dim: 1, or -1 for features of shape (B, H, W, C).
        eps: lower bound of the norm, > 0.

    Returns:
        A scalar, or with ``reduction="none"`` a vector with one value per pair: float64 if any
        feature is, else float32 (also under autocast).

    Raises:
        TypeError: an argument is not of the kind above (not a tensor, an integer, complex or
            sparse one, a number that is none).
        ValueError: shapes, batch sizes, map sizes, devices or lengths that do not match, an empty
            tensor or list, an option out of its range.

    Source: Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR 2017, section 3.1.
    """
    check_options(p=p, eps=eps, collapse=collapse, form=form, reduction=reduction)
    students, teachers = _pairs(student, teacher, channel_dim)
    tracks = torch.is_grad_enabled()
    loss, _ = _ops.at_loss(
        students,
        teachers,
        _weights(weights, len(students)),
        float(p),
        collapse,
        form,
        reduction,
        float(eps),
        tracks and any(x.requires_grad for x in students),
        tracks and any(x.requires_grad for x in teachers),
    )
    return loss


def at_value_and_grad(
    student: Features,
    teacher: Features,
    *,
    p: float = 2.0,
    collapse: str = "mean",
    form: str = "code",
    weights: Sequence[float] | None = None,
    reduction: str = "sum",
    channel_dim: int = 1,
    eps: float = 1e-12,
    scale: float | Tensor = 1.0,
) -> tuple[Tensor, Features]:
    """The loss of :func:`at_loss` and its gradient for the student, in one pass over the data.

    ``(L, scale * dL/dS)``, where forward and backward one after the other would read S twice. For
    loops that put gradients together themselves::

        loss, gradients = at_value_and_grad(features, teacher_features, scale=beta)
        torch.autograd.backward([task_loss, *features], [None, *gradients])

    Neither result is part of a graph: nothing is differentiated through this call. It does not
    matter whether the features require gradients.

    Args:
        student, teacher, p, collapse, form, weights, reduction, channel_dim, eps: as in
            :func:`at_loss`.
        scale: factor of the gradient, not of the loss: beta, a loss scale. A finite number, or a
            tensor of one element on the features' device, which is not waited for.

    Returns:
        The loss, as :func:`at_loss` gives it (with ``reduction="none"`` the gradient is that of the
        sum), and the gradient: a tensor, or a list where ``student`` is a sequence. Gradients have
        the students' dtypes and the strides of ``torch.empty_like``.

    Raises:
        TypeError, ValueError: as :func:`at_loss`, and for a ``scale`` that is not as above.

    Source: Zagoruyko & Komodakis, ICLR 2017, section 3.1; the gradient in closed form.
    """
    check_options(p=p, eps=eps, collapse=collapse, form=form, reduction=reduction)
    students, teachers = _pairs(student, teacher, channel_dim)
    factor, loss_gradient = _scale(scale, students)
    loss, gradients = _ops.at_value_and_grad(
        students,
        teachers,
        _weights(weights, len(students)),
        float(p),
        collapse,
        form,
        reduction,
        float(eps),
        factor,
        loss_gradient,
    )
    if channel_dim != 1:
        gradients = [g.movedim(1, -1) for g in gradients]
    if isinstance(student, Tensor):
        return loss, gradients[0]
    return loss, gradients


def attention_map(
    x: Tensor,
    *,
    p: float = 2.0,
    collapse: str = "mean",
    normalize: bool = False,
    channel_dim: int = 1,
    eps: float = 1e-12,
) -> Tensor:
    """Spatial attention map of a feature: the p-power sum over its channels.

    ``Q[b, n] = (1/C) sum_c |A[b, c, n]|^p`` with ``collapse="mean"``, without 1/C with "sum"; with
    ``normalize`` divided by ``max(||Q[b]||_2, eps)``, the norm over all positions of a sample.

    Args:
        x: (B, C, H, W), (B, C, L) or (B, C, D, H, W); or (B, H, W, C) with ``channel_dim=-1``.
        p, collapse, channel_dim, eps: as in :func:`at_loss`.
        normalize: whether to divide by the norm.

    Returns:
        (B, H, W): float64 for float64 features, else float32. Differentiable to any order.

    Raises:
        TypeError, ValueError: as :func:`at_loss`.

    Source: Zagoruyko & Komodakis, ICLR 2017, section 3.1 (F_sum, F_sum^p).
    """
    check_options(p=p, eps=eps, collapse=collapse)
    if not _is_feature(x):
        _refuse_feature("x", x)
    feature = _channels_second(x, channel_dim)
    raw = _ops.attention_map([feature], float(p), collapse)[0]
    if normalize:
        raw = eager.normalize(raw, float(eps), "max")[0].to(raw.dtype)
    return raw.reshape(feature.shape[0], *feature.shape[2:])


def at(
    x: Tensor,
    *,
    p: float = 2.0,
    collapse: str = "mean",
    channel_dim: int = 1,
    eps: float = 1e-12,
) -> Tensor:
    """Normalised, flattened attention map, the ``at(x)`` of the authors' program.

    ``q[b] = Q[b] / max(||Q[b]||_2, eps)`` with the raw map Q of :func:`attention_map`.

    Args:
        x, p, collapse, channel_dim, eps: as in :func:`attention_map`.

    Returns:
        (B, H*W), rows of norm 1: float64 for float64 features, else float32.

    Raises:
        TypeError, ValueError: as :func:`at_loss`.
    """
    q = attention_map(x, p=p, collapse=collapse, normalize=True, channel_dim=channel_dim, eps=eps)
    return q.flatten(1)
