"""The losses of published programs under names of their own, so that their betas keep a meaning.

They differ in epsilons, powers, means and sums: each says its formula, ``convert_beta`` what they
have in common, with D_b = qs[b] - qt[b], the difference of the normalised maps of sample b, N = H*W
positions and a batch of B. All run on the kernels of :func:`at_fused.at_loss`, in its precision
(float16 does not overflow where the originals do), give gradients to both sides, and raise its
TypeError or ValueError for what the originals take without a word: lists of unequal lengths (cut to
the shorter by them), a batch of 1 against another (broadcast), 4x16 against 8x8 (as many positions,
in other places).
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
    """The loss of the authors' program, which others paste: ``mean((q_s - q_t)^2)``, added up.

    ``Q = mean_c A^2`` and ``q = Q / max(||Q||, 1e-12)``; the program multiplies by beta = 1e3.

    Args:
        student, teacher: (B, C, H, W) of any dtype, or lists of such; H x W must be the same.

    Returns:
        A scalar, float32 or float64: the sum over the pairs, without beta. On n GPUs the program
        adds the means of the n parts of a batch: its beta is then n times this one's.

    Raises:
        TypeError, ValueError: as :func:`at_fused.at_loss`.

    Source: utils.py of szagoruyko/attention-transfer, by the authors of ICLR 2017. (Its first
    version, for Python 2, had the epsilon of :func:`tensorflow_zoo_at_loss`.)
    """
    return at_loss(student, teacher)


def _pooled_at_loss(student: Features, teacher: Features, p: float, reduction: str) -> Tensor:
    students, teachers = as_pairs(student, teacher)
    for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
        larger = [n - m for n, m in zip(s.shape[2:], t.shape[2:], strict=False)]
        if min(larger) < 0 < max(larger):
            raise ValueError(
                f"student and teacher of pair {i} must be of one size, or one of them the larger "
                f"in every dimension, to be pooled, got {format_size(s)} and {format_size(t)}"
            )
    return at_loss(students, teachers, p=p, absolute=False, resize="features", reduction=reduction)


class RepDistillerAttention(nn.Module):
    """RepDistiller's ``Attention(p)``: a list of losses ``mean((q_s - q_t)^2)``, one per stage.

    ``Q = mean_c A^p``, *not* of absolute values: with odd p negative features cancel positive ones.
    ``q = Q / max(||Q||, 1e-12)``. The program takes p = 2, and beta = 1000 times the sum.

    Larger features are average-pooled (adaptively) to the other's (H, W) before the power. The
    original pools to (H, H): where that is another size it stops, or stretches the width.

    Args:
        p: a whole number >= 1 (the original makes NaN of negative features with any other).

    Raises:
        TypeError, ValueError: for p, and in the call as :func:`at_fused.at_loss`.

    Source: distiller_zoo/AT.py of HobbitLong/RepDistiller (Tian et al., ICLR 2020).
    """

    def __init__(self, p: float = 2) -> None:
        super().__init__()
        check_options({"p": p, "absolute": False})
        self.p = as_python("p", p)

    def forward(self, g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> list[Tensor]:
        """Return the loss of each pair of two lists.

        Args:
            g_s, g_t: features, lists or tuples of (B, C, H, W) of any dtype.

        Returns:
            A list of scalars, float32 or float64, one per pair.

        Raises:
            TypeError, ValueError: as :func:`at_fused.at_loss`; a ValueError where neither map is
                the larger (4x16 against 8x8).
        """
        return list(_pooled_at_loss(g_s, g_t, self.p, "none").unbind())

    def extra_repr(self) -> str:
        """Return p, as in the call."""
        return f"p={self.p!r}"


def mdistiller_at_loss(
    student: Features, teacher: Features, p: float = 2, feat_weight: float = 1.0
) -> Tensor:
    """The loss of mdistiller: that of :class:`RepDistillerAttention`, added up and weighted.

    ``feat_weight * sum_j mean((q_s - q_t)^2)``; larger features are pooled to the smaller size.

    Args:
        student, teacher: as in :func:`authors_at_loss`, of any sizes: all but the first ``feats``.
        p: ``AT.P`` of its configuration, 2 there; a whole number >= 1.
        feat_weight: ``AT.LOSS.FEAT_WEIGHT``, 1000 there.

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
    """The ``ATLoss`` of torchdistill in its two modes.

    "code" is ``sum_j w_j mean((q_s - q_t)^2)`` with ``Q = mean_c A^2``; "paper" is
    ``(1/B) sum_j w_j sum_b ||qs[b] - qt[b]||`` with ``Q = sum_c A^2``: not squared, and without the
    1/2 of the paper. ``q = Q / max(||Q||, 1e-12)`` in both.

    Args:
        student, teacher: as in :func:`authors_at_loss`; with "paper" B must be that of all pairs
            (the original divides by the first one's).
        mode: "code" or "paper".
        weights: the ``weight`` of each of its ``at_pairs``; None is 1 for all.

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
    """The criterion of one pair in AberHu's Knowledge-Distillation-Zoo: ``mean((q_s - q_t)^2)``.

    ``Q = sum_c |A|^p`` and ``q = Q / (||Q|| + 1e-6)``. Its trainer takes the mean of the three
    stages and multiplies by ``lambda_kd`` = 1000 (p = 2):

        loss = cross_entropy + 1000 * sum(aberhu_at_loss(s, t) for s, t in stages) / 3

    Args:
        student, teacher: as in :func:`authors_at_loss`, but no lists.
        p: >= 1.

    Returns:
        A scalar, float32 or float64.

    Raises:
        TypeError, ValueError: as :func:`at_fused.at_loss`; a TypeError for lists.

    Source: kd_losses/at.py and train_kd.py of AberHu/Knowledge-Distillation-Zoo.
    """
    for name, x in (("student", student), ("teacher", teacher)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, of one pair, got {type_name(x)}")
    return at_loss(student, teacher, p=p, collapse="sum", eps=1e-6, eps_mode="add")


def tensorflow_zoo_at_loss(
    student: Features, teacher: Features, beta: float = 1e3, channel_dim: int = 1
) -> Tensor:
    """The loss of sseung0703's TensorFlow collection: ``(beta/2) sum_j mean((q_s - q_t)^2)``.

    ``Q = mean_c A^2`` and ``q = Q / sqrt(max(||Q||^2, 1e-12))``, as ``tf.nn.l2_normalize``: a lower
    bound of 1e-6 for the norm. Where C differs, that program first sends the student's features
    through a trained linear layer with ReLU: a part of the network, not of this loss.

    Args:
        student, teacher: as in :func:`authors_at_loss`.
        beta: its argument of that name.
        channel_dim: -1 for features (B, H, W, C), as that program's are.

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
    """Equation (2) of the paper, as printed: the norm of the difference, not its square.

    ``sum_j (beta_j/2) sum_b ||qs[b] - qt[b]||`` with ``Q = sum_c |A|^p`` (F_sum^p) and
    ``q = Q / ||Q||``. There is no epsilon: a map of norm 0 (below 1e-30, float64 below 1e-150)
    stays zeros, with gradient 0; where both maps are the same, so is the gradient 0.

    The paper's beta, 1e3 / (N B) for each layer, holds the 1/B of a mean: hence the sum over the
    batch. It holds the 1/N of the authors' program too, in which the norm is squared:
    ``squared=True`` with these betas is half of ``1e3 * authors_at_loss``.

    Args:
        student, teacher: as in :func:`authors_at_loss`, of one B. Where H x W differ the teacher's
            map is interpolated (bilinearly) to the student's.
        beta: a number, or a list of one per pair.
        p, collapse: F_sum^p, or with "max" F_max^p.
        squared: whether the norm is squared, against the print.
        batch: "sum" over its samples, or "mean".

    Returns:
        A scalar, float32 or float64, beta included.

    Raises:
        TypeError, ValueError: as :func:`at_fused.at_loss`.

    Source: Zagoruyko & Komodakis, ICLR 2017, section 3.1, equation (2), and section 4.1.
    """
    check_choice("batch", batch, ("sum", "mean"))
    students, teachers = as_pairs(student, teacher)
    check_one_batch(students, _ONE_BATCH)
    weights = [each / 2 for each in _per_pair("beta", beta, len(students))]
    if squared:  # a sum over the positions, where at_loss has a mean
        weights = [w * x.shape[2:].numel() for w, x in zip(weights, students, strict=True)]
    # Small enough to be none, large enough that 1 / eps times a gradient of 0 is 0.
    tiny = 1e-150 if all(x.dtype == torch.float64 for x in (*students, *teachers)) else 1e-30
    options: dict[str, Any] = {"form": "code" if squared else "paper", "weights": weights}
    options |= {"p": p, "collapse": collapse, "resize": "maps", "eps": tiny}
    loss = at_loss(students, teachers, **options)
    return loss * students[0].shape[0] if batch == "sum" else loss


def _per_pair(name: str, value: float | Sequence[float], count: int) -> list[float]:
    value = as_python(name, value)
    each = value if isinstance(value, (list, tuple)) else [value] * count
    if len(each) != count:
        found = f"{len(each)} for {count} pairs"
        raise ValueError(f"{name} must be one number, or one per pair, got {found}")
    return [check_finite(name, number) for number in each]


# ---- betas ---------------------------------------------------------------------------------------

# A program's loss is ``beta * sum_j sum_b ||D_b||^e / d(B, N_j, pairs)``: its e and d.
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
    """Return the beta with which ``target``'s training loss is ``source``'s, or has its gradient.

    Every formula is ``beta * sum_j sum_b ||D_b||^e / d_j`` over the pairs j. Names, their d and e:

        "authors", "repdistiller", "mdistiller" (feat_weight),       B N_j         2
            "torchdistill-code", "at_loss-code" (form="code")
        "aberhu" (lambda_kd, mean over the pairs)                    B N_j pairs   2
        "tensorflow-zoo"                                             2 B N_j       2
        "paper-squared" (paper_at_loss with squared=True)            2             2
        "torchdistill-paper", "at_loss-paper" (form="paper")         B             1
        "paper"                                                      2             1
        "paper-mean" (paper_at_loss with batch="mean")               2 B           1

    Between names of one e the result is exact, in value and gradient, with the same p, absolute
    value or not, and the same maps: where no norm is so small that the programs' epsilons count
    (and, for "aberhu", up to the 1e-6 / ||Q|| by which it shrinks a map). Weights of pairs are the
    same factors on both sides. Sums over several GPUs' parts of a batch are not in it.

    Between different e, the gradient of the square is that of the norm times 2 ||D_b||. With
    ``distance`` both gradients agree in samples at that distance; nearer ones are then pulled less
    by the square, farther ones more. ``at_loss(s, t, form="paper")`` is a pair's mean distance.

    Args:
        beta: the source's, a finite number.
        source, target: names from the list above.
        shapes: ``[x.shape for x in students]``: (B, C, H, W), or of other ranks, of each pair, at
            the size at which the maps are compared. B must be that of all pairs.
        distance: ||qs - qt||, > 0 and at most 2, or a list of one per pair; between different e
            only.

    Returns:
        One number for all pairs.

    Raises:
        TypeError: a beta or distance that is no number.
        ValueError: an unknown name, shapes that are none, a result beyond a float's range, a
            missing or needless ``distance``; pairs that need different betas, as maps of different
            sizes do between "authors" and "paper-squared": see :func:`pair_betas`.
    """
    betas = pair_betas(beta, source, target, shapes, distance)
    if not all(math.isclose(b, betas[0], rel_tol=1e-12) for b in betas):
        raise ValueError(
            f"no single beta turns {source!r} into {target!r} for these shapes: the pairs need "
            f"{betas}, which pair_betas returns, for weights"
        )
    return betas[0]


def pair_betas(
    beta: float,
    source: str,
    target: str,
    shapes: Sequence[Sequence[int]],
    distance: float | Sequence[float] | None = None,
) -> list[float]:
    """Return a beta for each pair, for ``weights`` or ``paper_at_loss``: see :func:`convert_beta`.

    Args:
        beta, source, target, shapes, distance: as in :func:`convert_beta`.

    Returns:
        One beta per pair, which may differ.

    Raises:
        TypeError, ValueError: as :func:`convert_beta`, but for betas that differ.
    """
    beta = check_finite("beta", beta)
    check_choice("source", source, tuple(_PROGRAMS))
    check_choice("target", target, tuple(_PROGRAMS))
    if not shapes or any(len(x) < 3 or min(x) < 1 or x[0] != shapes[0][0] for x in shapes):
        raise ValueError(
            "shapes must be a list of a (B, C, H, W), or another rank, for each pair, all > 0 and "
            f"of one batch size, got {shapes!r:.80}"
        )
    (power, old), (new_power, new) = _PROGRAMS[source], _PROGRAMS[target]
    if power != new_power and distance is None:
        raise ValueError(
            f"no beta turns {source!r} into {target!r}: one sums norms ||qs - qt||, the other "
            "their squares, whose gradients differ by twice the norm in each sample; "
            "distance=... is the norm at which they shall agree"
        )
    if power == new_power and distance is not None:
        found = f"between {source!r} and {target!r}, whose conversion is exact, got {distance!r}"
        raise ValueError(f"distance must not be given {found}")
    distances = _per_pair("distance", 0.5 if distance is None else distance, len(shapes))
    if not all(0 < d <= 2 for d in distances):
        raise ValueError(f"distance must be > 0 and at most 2, got {distance!r}")
    sizes = [(shape[0], math.prod(shape[2:]), len(shapes)) for shape in shapes]
    betas = [
        beta * (2 * d) ** (power - new_power) * (new(*each) / old(*each))
        for each, d in zip(sizes, distances, strict=True)
    ]
    if not all(map(math.isfinite, betas)):
        raise ValueError(f"beta must be smaller, as no float is that of {target!r}, got {beta!r}")
    return betas
