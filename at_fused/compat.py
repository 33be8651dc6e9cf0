"""Losses of published programs, each with the original's scale, so that its beta still applies.

The programs differ in epsilons, powers, means and sums. Each docstring gives the formula, and
:func:`convert_beta` relates the formulas to each other. B is the batch size, N = H*W the number of
positions, and D_b = qs[b] - qt[b] the difference of the normalised maps of sample b.

All losses use the kernels and the precision of :func:`at_fused.at_loss`: float16 does not overflow
where the originals do. Gradients flow to both sides. Lists of different lengths, a batch of 1 with
a larger one, and maps of 4x16 and 8x8 raise an error; the originals accept them silently.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from at_fused._arguments import as_pairs, check_choice, check_one_batch, check_options, format_size
from at_fused._numbers import as_python, check_finite, type_name
from at_fused.functional import at_loss

__all__ = [
    "RepDistillerAttention",
    "aberhu_at_loss",
    "authors_at_loss",
    "convert_beta",
    "mdistiller_at_loss",
    "pair_betas",
    "paper_at_loss",
    "tensorflow_zoo_at_loss",
    "torchdistill_at_loss",
]

Features = Tensor | Sequence[Tensor]

_ONE_BATCH = "all pairs must have one batch size, which this formula divides by"


def authors_at_loss(student: Features, teacher: Features) -> Tensor:
    """Compute the loss of the authors' program: ``mean((q_s - q_t)^2)``, summed over pairs.

    ``Q = mean_c A^2`` and ``q = Q / max(||Q||, 1e-12)``. The program multiplies by beta = 1e3. Many
    other programs copy this code.

    Args:
        student, teacher: (B, C, H, W) of any dtype, or lists of such features with equal H x W.

    Returns:
        A scalar, float32 or float64: the sum over the pairs, without beta. On n GPUs the program
        adds the means of the n parts of a batch: a beta of 1 there is a beta of n here.

    Raises:
        TypeError, ValueError: as :func:`at_fused.at_loss`.

    Source: utils.py of szagoruyko/attention-transfer, by the authors of ICLR 2017. (Its first
    version, for Python 2, had the epsilon of :func:`tensorflow_zoo_at_loss`.)
    """
    return at_loss(student, teacher)


def _pooled_at_loss(student: Features, teacher: Features, p: float, reduction: str) -> Tensor:
    students, teachers = as_pairs(student, teacher)
    for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
        differences = [n - m for n, m in zip(s.shape[2:], t.shape[2:], strict=False)]
        if min(differences) < 0 < max(differences):
            raise ValueError(
                f"student and teacher of pair {i} must have the same size, or one must be at least "
                f"as large in each dimension, got {format_size(s)} and {format_size(t)}"
            )
    return at_loss(students, teachers, p=p, absolute=False, resize="features", reduction=reduction)


class RepDistillerAttention(nn.Module):
    """RepDistiller's ``Attention(p)``: a list of losses ``mean((q_s - q_t)^2)``, one per stage.

    ``Q = mean_c A^p`` *without* the absolute value: for odd p, negative features cancel positive
    ones. ``q = Q / max(||Q||, 1e-12)``. The program uses p = 2 and multiplies the sum by 1000.

    The larger features are average-pooled (adaptively) to the other's (H, W) before the power. The
    original pools to (H, H): for maps that are not square, it fails or distorts the width.

    Args:
        p: an integer >= 1 (with other numbers, the original returns NaN for negative features).

    Raises:
        TypeError, ValueError: p is not allowed; calls raise them as :func:`at_fused.at_loss`.

    Source: distiller_zoo/AT.py of HobbitLong/RepDistiller (Tian et al., ICLR 2020).
    """

    def __init__(self, p: float = 2) -> None:
        super().__init__()
        check_options({"p": p, "absolute": False})
        self.p = as_python("p", p)

    def forward(self, g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> list[Tensor]:
        """Compute the loss of each pair of two lists.

        Args:
            g_s, g_t: features, lists or tuples of (B, C, H, W) of any dtype.

        Returns:
            A list of scalars, float32 or float64, one per pair.

        Raises:
            TypeError, ValueError: as :func:`at_fused.at_loss`. Also a ValueError if neither map is
                larger in every dimension (4x16 and 8x8).
        """
        return list(_pooled_at_loss(g_s, g_t, self.p, "none").unbind())

    def extra_repr(self) -> str:
        """Return p as a keyword argument."""
        return f"p={self.p!r}"


def mdistiller_at_loss(
    student: Features, teacher: Features, p: float = 2, feat_weight: float = 1.0
) -> Tensor:
    """Compute the loss of mdistiller: the weighted sum of :class:`RepDistillerAttention`'s losses.

    ``feat_weight * sum_j mean((q_s - q_t)^2)``. Larger features are pooled to the smaller size.

    Args:
        student, teacher: as in :func:`authors_at_loss`, but H x W may differ. mdistiller passes all
            of its ``feats`` except the first.
        p: ``AT.P`` of mdistiller's configuration, where it is 2; an integer >= 1.
        feat_weight: ``AT.LOSS.FEAT_WEIGHT`` of mdistiller's configuration, where it is 1000.

    Returns:
        A scalar, float32 or float64.

    Raises:
        TypeError, ValueError: as :func:`at_fused.at_loss`.

    Source: mdistiller/distillers/AT.py of megvii-research/mdistiller.
    """
    feat_weight = check_finite("feat_weight", feat_weight)
    return _pooled_at_loss(student, teacher, p, "sum") * feat_weight


def torchdistill_at_loss(
    student: Features,
    teacher: Features,
    mode: str = "code",
    weights: Sequence[float] | None = None,
) -> Tensor:
    """Compute torchdistill's ``ATLoss`` in either of its modes.

    "code" is ``sum_j w_j mean((q_s - q_t)^2)`` with ``Q = mean_c A^2``. "paper" is
    ``(1/B) sum_j w_j sum_b ||qs[b] - qt[b]||`` with ``Q = sum_c A^2``: the norm is not squared, and
    the 1/2 of the paper is missing. ``q = Q / max(||Q||, 1e-12)`` in both.

    Args:
        student, teacher: as in :func:`authors_at_loss`. For "paper" all pairs must have the same B
            (the original divides by the B of the first one).
        mode: "code" or "paper".
        weights: the ``weight`` of each entry of torchdistill's ``at_pairs``. None means 1 for all.

    Returns:
        A scalar, float32 or float64.

    Raises:
        TypeError, ValueError: as :func:`at_fused.at_loss`.

    Source: torchdistill/losses/mid_level.py of yoshitomo-matsubara/torchdistill.
    """
    check_choice("mode", mode, ("code", "paper"))
    if mode == "code":
        return at_loss(student, teacher, weights=weights)
    check_one_batch(as_pairs(student, teacher)[0], _ONE_BATCH)
    return at_loss(student, teacher, form="paper", collapse="sum", weights=weights)


def aberhu_at_loss(student: Tensor, teacher: Tensor, p: float = 2.0) -> Tensor:
    """Compute the loss of one pair in AberHu's Knowledge-Distillation-Zoo: ``mean((q_s - q_t)^2)``.

    ``Q = sum_c |A|^p`` and ``q = Q / (||Q|| + 1e-6)``. The program's trainer uses p = 2, averages
    over three stages and multiplies by ``lambda_kd`` = 1000:

        loss = cross_entropy + 1000 * sum(aberhu_at_loss(s, t) for s, t in stages) / 3

    Args:
        student, teacher: as in :func:`authors_at_loss`, but not lists.
        p: a finite number >= 1.

    Returns:
        A scalar, float32 or float64.

    Raises:
        TypeError, ValueError: as :func:`at_fused.at_loss`. Also a TypeError for lists.

    Source: kd_losses/at.py and train_kd.py of AberHu/Knowledge-Distillation-Zoo.
    """
    for name, x in (("student", student), ("teacher", teacher)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor (one pair per call), got {type_name(x)}")
    return at_loss(student, teacher, p=p, collapse="sum", eps=1e-6, eps_mode="add")


def tensorflow_zoo_at_loss(
    student: Features, teacher: Features, beta: float = 1e3, channel_dim: int = 1
) -> Tensor:
    """Compute the loss of sseung0703's TensorFlow code: ``(beta/2) sum_j mean((q_s - q_t)^2)``.

    ``Q = mean_c A^2`` and ``q = Q / sqrt(max(||Q||^2, 1e-12))``, as in ``tf.nn.l2_normalize``: the
    norm has a lower bound of 1e-6. If C differs, that program applies a trained linear layer with
    ReLU to the student's features first. That layer is not part of this loss.

    Args:
        student, teacher: as in :func:`authors_at_loss`.
        beta: the program's argument of the same name.
        channel_dim: 1, or -1 for features (B, H, W, C), which that program uses.

    Returns:
        A scalar, float32 or float64, beta included.

    Raises:
        TypeError, ValueError: as :func:`at_fused.at_loss`.

    Source: nets/Multiple.py of sseung0703/Knowledge_distillation_methods_wtih_Tensorflow.
    """
    beta = check_finite("beta", beta)
    return at_loss(student, teacher, channel_dim=channel_dim, eps=1e-6) * (beta / 2)


def paper_at_loss(
    student: Features,
    teacher: Features,
    beta: float | Sequence[float],
    *,
    p: float = 2.0,
    collapse: str = "sum",
    squared: bool = False,
    batch: str = "sum",
) -> Tensor:
    """Compute equation (2) of the paper as printed: with the norm of the difference, not squared.

    ``sum_j (beta_j/2) sum_b ||qs[b] - qt[b]||`` with ``Q = sum_c |A|^p`` (F_sum^p) and
    ``q = Q / ||Q||``. There is no epsilon. A map with a norm below 1e-30 (float64: 1e-150) is
    zero, with gradient 0. The gradient is also 0 if both maps are equal.

    The paper's beta for each layer is 1e3 / (N B). It includes the 1/B of a mean, so the loss is a
    sum over the batch. It also includes the 1/N of the authors' program, where the norm is squared:
    ``squared=True`` with these betas is half of ``1e3 * authors_at_loss``.

    Args:
        student, teacher: as in :func:`authors_at_loss`, all with the same B. If H x W differs, the
            teacher's map is interpolated (bilinearly) to the student's size.
        beta: a number, or a list with one number per pair.
        p, collapse: F_sum^p, or F_max^p with "max".
        squared: True to square the norm, unlike the printed equation.
        batch: "sum" or "mean" over the samples.

    Returns:
        A scalar, float32 or float64, beta included.

    Raises:
        TypeError, ValueError: as :func:`at_fused.at_loss`.

    Source: Zagoruyko & Komodakis, ICLR 2017, section 3.1, equation (2), and section 4.1.
    """
    check_choice("batch", batch, ("sum", "mean"))
    students, teachers = as_pairs(student, teacher)
    check_one_batch(students, _ONE_BATCH)
    weights = [b / 2 for b in _per_pair("beta", beta, len(students))]
    if squared:  # undoes at_loss's mean over the positions
        weights = [w * x.shape[2:].numel() for w, x in zip(weights, students, strict=True)]
    # Negligible, but large enough that 1 / eps times a gradient of 0 is 0.
    tiny = 1e-150 if all(x.dtype == torch.float64 for x in (*students, *teachers)) else 1e-30
    options: dict[str, Any] = {"form": "code" if squared else "paper", "weights": weights}
    options |= {"p": p, "collapse": collapse, "resize": "maps", "eps": tiny}
    loss = at_loss(students, teachers, **options)
    return loss * students[0].shape[0] if batch == "sum" else loss


def _per_pair(name: str, value: float | Sequence[float], count: int) -> list[float]:
    value = as_python(name, value)
    numbers = value if isinstance(value, (list, tuple)) else [value] * count
    if len(numbers) != count:
        got = f"{len(numbers)} for {count} pairs"
        raise ValueError(f"{name} must be one number, or one per pair, got {got}")
    return [check_finite(name, number) for number in numbers]


# ---- betas ---------------------------------------------------------------------------------------

# e and d of each program: its loss is ``beta * sum_j sum_b ||D_b||^e / d(B, N_j, pairs)``.
_MEAN = 2, lambda b, n, pairs: b * n
_NORM = 1, lambda b, n, pairs: b
_PROGRAMS: dict[str, tuple[int, Callable[[int, int, int], int]]] = {
    "authors": _MEAN,
    "repdistiller": _MEAN,
    "mdistiller": _MEAN,
    "torchdistill-code": _MEAN,
    "at_loss-code": _MEAN,
    "aberhu": (2, lambda b, n, pairs: b * n * pairs),
    "tensorflow-zoo": (2, lambda b, n, pairs: 2 * b * n),
    "paper-squared": (2, lambda b, n, pairs: 2),
    "torchdistill-paper": _NORM,
    "at_loss-paper": _NORM,
    "paper": (1, lambda b, n, pairs: 2),
    "paper-mean": (1, lambda b, n, pairs: 2 * b),
}


def convert_beta(
    beta: float,
    source: str,
    target: str,
    shapes: Sequence[Sequence[int]],
    distance: float | Sequence[float] | None = None,
) -> float:
    """Convert the beta of one program to that of another with the same loss or the same gradient.

    Each formula is ``beta * sum_j sum_b ||D_b||^e / d_j`` over the pairs j. Names, d_j and e:

        "authors", "repdistiller", "mdistiller" (feat_weight),       B N_j         2
            "torchdistill-code", "at_loss-code" (form="code")
        "aberhu" (lambda_kd, mean over the pairs)                    B N_j pairs   2
        "tensorflow-zoo"                                             2 B N_j       2
        "paper-squared" (paper_at_loss with squared=True)            2             2
        "torchdistill-paper", "at_loss-paper" (form="paper")         B             1
        "paper"                                                      2             1
        "paper-mean" (paper_at_loss with batch="mean")               2 B           1

    If e is the same, value and gradient agree exactly. Both programs must use the same p, absolute
    values and maps, and no norm may be so small that their epsilons matter. ("aberhu" also shrinks
    each map by 1e-6 / ||Q||.) Weights of pairs are factors on both sides and cancel. Programs that
    sum over the parts of a batch on several GPUs are not covered.

    If e differs, the gradient of the square is the gradient of the norm times 2 ||D_b||. The
    gradients then agree for samples at the given ``distance``. The square pulls closer samples
    less, others more. ``at_loss(s, t, form="paper")`` is the mean distance of a pair.

    Args:
        beta: beta of the source, a finite number.
        source, target: names from the list above.
        shapes: ``[x.shape for x in students]``: (B, C, H, W), or another rank, for each pair, at
            the size at which the maps are compared. All pairs must have the same B.
        distance: ||qs - qt||, > 0 and at most 2, or a list with one per pair. Only if e differs.

    Returns:
        One number for all pairs.

    Raises:
        TypeError: a beta or a distance is not a number.
        ValueError: a name is unknown, shapes are invalid, the result overflows, or ``distance`` is
            missing or not needed. Also if pairs need different betas, as maps of different sizes
            do between "authors" and "paper-squared": see :func:`pair_betas`.
    """
    betas = pair_betas(beta, source, target, shapes, distance)
    if not all(math.isclose(b, betas[0], rel_tol=1e-12) for b in betas):
        raise ValueError(
            f"no single beta converts {source!r} to {target!r} for these shapes: the pairs need "
            f"{betas}; call pair_betas and pass the result as weights"
        )
    return betas[0]


def pair_betas(
    beta: float,
    source: str,
    target: str,
    shapes: Sequence[Sequence[int]],
    distance: float | Sequence[float] | None = None,
) -> list[float]:
    """Convert beta for each pair, for ``weights`` or ``paper_at_loss``; see :func:`convert_beta`.

    Args:
        beta, source, target, shapes, distance: as in :func:`convert_beta`.

    Returns:
        One beta per pair, which may differ.

    Raises:
        TypeError, ValueError: as :func:`convert_beta`, except if betas differ.
    """
    beta = check_finite("beta", beta)
    check_choice("source", source, tuple(_PROGRAMS))
    check_choice("target", target, tuple(_PROGRAMS))
    if not shapes or any(len(x) < 3 or min(x) < 1 or x[0] != shapes[0][0] for x in shapes):
        raise ValueError(
            "shapes must be a list of one (B, C, H, W), or another rank, per pair, with sizes > 0 "
            f"and the same B, got {shapes!r:.80}"
        )
    (power, old), (new_power, new) = _PROGRAMS[source], _PROGRAMS[target]
    if power != new_power and distance is None:
        raise ValueError(
            f"no beta converts {source!r} to {target!r}: one sums norms ||qs - qt||, the other "
            "their squares, so their gradients differ by twice the norm of each sample; set "
            "distance=... to the norm at which they should agree"
        )
    if power == new_power and distance is not None:
        pair = f"{source!r} and {target!r}"
        raise ValueError(
            f"distance must be None between {pair}, which do not need one, got {distance!r}"
        )
    distances = _per_pair("distance", 0.5 if distance is None else distance, len(shapes))
    if not all(0 < d <= 2 for d in distances):
        raise ValueError(f"distance must be > 0 and at most 2, got {distance!r}")
    sizes = [(shape[0], math.prod(shape[2:]), len(shapes)) for shape in shapes]
    betas = [
        beta * (2 * d) ** (power - new_power) * (new(*each) / old(*each))
        for each, d in zip(sizes, distances, strict=True)
    ]
    if not all(map(math.isfinite, betas)):
        raise ValueError(f"beta must be smaller, to fit in a float for {target!r}, got {beta!r}")
    return betas
