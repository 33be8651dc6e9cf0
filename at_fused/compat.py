"""The losses of published programs under names of their own, so that their betas keep a meaning.

With D_b = qs[b] - qt[b], the difference of the normalised maps of sample b, N = H*W positions and a
batch of B:

    call                              epsilon           loss of a pair           pairs
    authors_at_loss                   max(norm, 1e-12)  1/(B N) sum_b ||D_b||^2  sum
    RepDistillerAttention             max(norm, 1e-12)  1/(B N) sum_b ||D_b||^2  a list
    mdistiller_at_loss                max(norm, 1e-12)  1/(B N) sum_b ||D_b||^2  sum
    torchdistill_at_loss, "code"      max(norm, 1e-12)  1/(B N) sum_b ||D_b||^2  weighted sum
    torchdistill_at_loss, "paper"     max(norm, 1e-12)  1/B sum_b ||D_b||        weighted sum
    aberhu_at_loss                    norm + 1e-6       1/(B N) sum_b ||D_b||^2  one pair
    tensorflow_zoo_at_loss            max(norm, 1e-6)   1/(2 B N) sum_b ||..||^2 sum, times beta
    paper_at_loss                     none              1/2 sum_b ||D_b||        sum, times beta

``convert_beta`` goes between them. All run on the kernels of :func:`at_fused.at_loss`, in its
precision (sums and maps in float32 or better, so that float16 does not overflow where the originals
do), give gradients to both sides, and raise its TypeError or ValueError for what the originals take
without a word: lists of unequal lengths (cut to the shorter by them), a batch of 1 against another
(broadcast), 4x16 against 8x8 (as many positions, in other places).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn

from at_fused._arguments import check_choice, check_one_batch, check_options, paired, size_of
from at_fused._numbers import as_python, check_finite, is_whole, kind
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
        student, teacher: (B, C, H, W), or lists of such features, of any dtype that
            :func:`at_fused.at_loss` takes; C may differ. H x W, square or not, must be the same.

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
    students, teachers = paired(student, teacher)
    for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
        larger = [n - m for n, m in zip(s.shape[2:], t.shape[2:], strict=False)]
        if min(larger) < 0 < max(larger):
            raise ValueError(
                f"student and teacher of pair {i} must be of one size, or one of them the larger "
                f"in every dimension, to be pooled, got {size_of(s)} and {size_of(t)}"
            )
    return at_loss(students, teachers, p=p, absolute=False, resize="features", reduction=reduction)


class RepDistillerAttention(nn.Module):
    """RepDistiller's ``Attention(p)``: a list of losses ``mean((q_s - q_t)^2)``, one per stage.

    ``Q = mean_c A^p``, *not* of absolute values: with odd p negative features cancel positive ones.
    ``q = Q / max(||Q||, 1e-12)``. Features of different sizes are average-pooled (adaptively) to
    the smaller size before the power. The program takes p = 2, and beta = 1000 times the sum.

    The original compares heights and pools to (height, height). Square maps, and others of one
    size, are the same here. A map that is larger in both dimensions is pooled to the other's (H, W)
    here, where the original stops unless that one is square. Where neither is larger (4x16 against
    8x8) this raises; the original stops or, for 16x4 against 8x8, stretches the width.

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
            g_s, g_t: the student's and the teacher's features, lists or tuples of (B, C, H, W) of
                any dtype that :func:`at_fused.at_loss` takes.

        Returns:
            A list of scalars, float32 or float64, one per pair.

        Raises:
            TypeError, ValueError: as :func:`at_fused.at_loss`; a TypeError for tensors in place of
                lists.
        """
        if isinstance(g_s, Tensor):
            raise TypeError("g_s must be a list or tuple of tensors, one per stage, got Tensor")
        return list(_pooled_at_loss(g_s, g_t, self.p, "none").unbind())

    def extra_repr(self) -> str:
        """Return p, as in the call."""
        return f"p={self.p!r}"


def mdistiller_at_loss(
    student: Features, teacher: Features, p: float = 2, feat_weight: float = 1.0
) -> Tensor:
    """The loss of mdistiller: that of :class:`RepDistillerAttention`, added up and weighted.

    ``feat_weight * sum_j mean((q_s - q_t)^2)`` with ``Q = mean_c A^p`` (no absolute value),
    ``q = Q / max(||Q||, 1e-12)``, larger features pooled to the smaller size first.

    Args:
        student, teacher: as in :func:`authors_at_loss`, of any sizes; of ``feats`` all but the
            first.
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
    check_one_batch(paired(student, teacher)[0], _ONE_BATCH)
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
            raise TypeError(f"{name} must be a tensor, of one pair, got {kind(x)}")
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

    The equation is that of one sample. The paper's beta, 1e3 / (N B) for each layer, holds the 1/B
    of a mean: hence the sum over the batch. It holds the 1/N of the authors' program too, in which
    the norm is squared: ``squared=True`` with these betas is half of ``1e3 * authors_at_loss``.

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
    if not isinstance(squared, bool):
        raise TypeError(f"squared must be True or False, got {kind(squared)}")
    students, teachers = paired(student, teacher)
    check_one_batch(students, _ONE_BATCH)
    weights = [b / 2 for b in _per_pair("beta", beta, len(students))]
    if squared:  # a sum over the positions, where at_loss has a mean
        weights = [w * x.shape[2:].numel() for w, x in zip(weights, students, strict=True)]
    # Small enough to be none, large enough that 1 / eps times a gradient of 0 is 0.
    tiny = 1e-150 if all(x.dtype == torch.float64 for x in (*students, *teachers)) else 1e-30
    form = "code" if squared else "paper"
    loss = at_loss(
        students,
        teachers,
        p=p,
        collapse=collapse,
        form=form,
        weights=weights,
        resize="maps",
        eps=tiny,
    )
    return loss * students[0].shape[0] if batch == "sum" else loss


def _per_pair(name: str, value: float | Sequence[float], count: int) -> list[float]:
    """Return a finite number for each pair, from one for all or a list."""
    value = as_python(name, value)
    if not isinstance(value, (list, tuple)):
        return [float(check_finite(name, value))] * count
    if len(value) != count:
        found = f"{len(value)} for {count} pairs"
        raise ValueError(f"{name} must be one number, or one per pair, got {found}")
    return [float(check_finite(f"{name}[{i}]", number)) for i, number in enumerate(value)]


# ---- betas ---------------------------------------------------------------------------------------

# A program's loss is ``beta * sum_j f(B, N_j, pairs) * sum_b ||D_b||^e``: its 1/f and e.
_MEAN = (lambda b, n, pairs: b * n), 2
_NORM = (lambda b, n, pairs: b), 1
_PROGRAMS: dict[str, tuple[Callable[[int, int, int], int], int]] = {
    "authors": _MEAN,
    "repdistiller": _MEAN,
    "mdistiller": _MEAN,
    "torchdistill-code": _MEAN,
    "at_loss-code": _MEAN,
    "aberhu": ((lambda b, n, pairs: b * n * pairs), 2),
    "tensorflow-zoo": ((lambda b, n, pairs: 2 * b * n), 2),
    "paper-squared": ((lambda b, n, pairs: 2), 2),
    "torchdistill-paper": _NORM,
    "at_loss-paper": _NORM,
    "paper": ((lambda b, n, pairs: 2), 1),
    "paper-mean": ((lambda b, n, pairs: 2 * b), 1),
}


def convert_beta(
    beta: float,
    source: str,
    target: str,
    shapes: Sequence[Sequence[int]],
    distance: float | Sequence[float] | None = None,
) -> float:
    """Return the beta with which ``target``'s training loss is ``source``'s, or has its gradient.

    Every formula is ``beta * sum_j f_j * sum_b ||D_b||^e`` over the pairs j; the beta is multiplied
    by the quotient of the factors f, computed in fractions and rounded once. Names, their f and e:

        "authors", "repdistiller", "mdistiller" (feat_weight),       1 / (B N_j)         2
            "torchdistill-code", "at_loss-code" (form="code")
        "aberhu" (lambda_kd, mean over the pairs)                    1 / (B N_j pairs)   2
        "tensorflow-zoo"                                             1 / (2 B N_j)       2
        "paper-squared" (paper_at_loss with squared=True)            1 / 2               2
        "torchdistill-paper", "at_loss-paper" (form="paper")         1 / B               1
        "paper"                                                      1 / 2               1
        "paper-mean" (paper_at_loss with batch="mean")               1 / (2 B)           1

    *Exact*, in value and gradient, between two names of the same e, with the same p, absolute value
    or not, and the same maps: that is where no norm is so small that the programs' epsilons count
    (and, for "aberhu", up to the 1e-6 / ||Q|| by which it shrinks a map). Weights of pairs are the
    same factors on both sides. Sums over several GPUs' parts of a batch are not in it.

    *Not proportional* where e differs: the gradient of the square is that of the norm times twice
    the distance ||D_b||. With ``distance`` the result is the beta for which both gradients agree in
    samples at that distance; nearer ones are then pulled less by the square than by the norm,
    farther ones more. ``at_loss(s, t, form="paper")`` is the mean distance of a pair.

    Args:
        beta: the source's, a finite number.
        source, target: names from the list above.
        shapes: ``[x.shape for x in students]``: (B, C, H, W), or of other ranks, of each pair, at
            the size at which the maps are compared. B must be that of all pairs.
        distance: ||qs - qt||, > 0 and at most 2, or a list of one per pair. For source and target
            of which only one is squared; must not be given otherwise.

    Returns:
        One number for all pairs.

    Raises:
        TypeError: an argument of another kind.
        ValueError: an unknown name, a shape or batch size that cannot be; a result beyond a
            float's range; a missing or needless ``distance``; pairs that need different betas, as
            maps of different sizes do between "authors" (a mean over N_j) and "paper-squared" (a
            sum): see :func:`pair_betas`.
    """
    betas = pair_betas(beta, source, target, shapes, distance)
    if not all(math.isclose(b, betas[0], rel_tol=1e-12) for b in betas):
        raise ValueError(
            f"no single beta turns {source!r} into {target!r} for these shapes: the pairs need "
            f"{', '.join(f'{b:.6g}' for b in betas)}; pair_betas gives them as a list, for weights"
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
        beta, source, target, shapes, distance: as in :func:`convert_beta`, which has the formulas
            and says when the result is exact.

    Returns:
        One beta per pair, which may differ.

    Raises:
        TypeError, ValueError: as :func:`convert_beta`, but for betas that differ.
    """
    beta = check_finite("beta", beta)
    for name, value in (("source", source), ("target", target)):
        if not isinstance(value, str) or value not in _PROGRAMS:
            raise ValueError(f"{name} must be one of {', '.join(_PROGRAMS)}, got {value!r}")
    _check_shapes(shapes)
    batch, count = shapes[0][0], len(shapes)
    (old, _), (new, _) = _PROGRAMS[source], _PROGRAMS[target]
    factors, betas = _distance_factors(distance, source, target, count), []
    for shape, factor in zip(shapes, factors, strict=True):
        n = math.prod(shape[2:])
        factor *= Fraction(new(batch, n, count), old(batch, n, count))
        most = Fraction(sys.float_info.max) / factor
        if abs(beta) > most:
            raise ValueError(
                f"beta must be at most {float(most):.6g} either way, beyond which {target!r} has "
                f"no float for it, got {beta!r}"
            )
        betas.append(float(Fraction(beta) * factor))
    return betas


def _check_shapes(shapes: object) -> None:
    if not isinstance(shapes, (list, tuple)) or not shapes:
        raise ValueError(f"shapes must be a list of a shape for each pair, got {shapes!r:.40}")
    for i, shape in enumerate(shapes):
        listed = isinstance(shape, (list, tuple)) and 3 <= len(shape) <= 5
        if not listed or not all(is_whole(n) and n > 0 for n in shape):
            raise ValueError(
                f"shapes[{i}] must be (B, C, H, W), or have one to three spatial dimensions, all "
                f"> 0, got {tuple(shape) if listed else shape!r}"
            )
        if shape[0] != shapes[0][0]:
            found = f"{shapes[0][0]} and, in pair {i}, {shape[0]}"
            raise ValueError(f"shapes must have one batch size, got {found}")


def _distance_factors(
    distance: float | Sequence[float] | None, source: str, target: str, count: int
) -> list[Fraction]:
    """Return, for each pair, the quotient of two powers' gradients at a distance."""
    differ = _PROGRAMS[source][1] - _PROGRAMS[target][1]
    if distance is None and differ:
        squared, norm = (source, target) if differ > 0 else (target, source)
        raise ValueError(
            f"no exact conversion exists between {source!r} and {target!r}: {squared!r} sums "
            f"squared norms and {norm!r} norms, whose gradients differ by 2 ||qs - qt|| of each "
            "sample; distance=... is the ||qs - qt|| at which they shall agree"
        )
    if distance is None:
        return [Fraction(1)] * count
    if not differ:
        raise ValueError(
            f"distance must not be given between {source!r} and {target!r}, whose conversion is "
            f"exact, got {distance!r}"
        )
    distances = _per_pair("distance", distance, count)
    for d in distances:
        if not 0 < d <= 2:
            raise ValueError(f"distance must be > 0 and at most 2, got {d!r}")
    return [(2 * Fraction(d)) ** differ for d in distances]
