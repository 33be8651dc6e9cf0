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
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from at_fused import _inputs
from at_fused._beta import convert_beta, pair_betas, per_pair
from at_fused._checks import check_choice
from at_fused._numbers import as_python, check_finite, kind
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
    """The loss of the authors' program: what everybody pastes.

    ``mean((q_s - q_t)^2)`` over all elements, with ``Q = mean_c A^2`` and
    ``q = Q / max(||Q||, 1e-12)``; the program adds the stages up and multiplies by beta = 1e3.

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


# ---- pooled features -----------------------------------------------------------------------------


def _pooled_at_loss(student: Features, teacher: Features, p: float, reduction: str) -> Tensor:
    students, teachers = _inputs.pairs(student, teacher)
    for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
        sizes = [n - m for n, m in zip(s.shape[2:], t.shape[2:], strict=False)]
        if min(sizes) < 0 < max(sizes):
            raise ValueError(
                f"student and teacher of pair {i} must be of one size, or one of them the larger "
                "in every dimension, which is pooled to the other, got "
                f"{_inputs.size(s)} and {_inputs.size(t)}"
            )
    return at_loss(students, teachers, p=p, absolute=False, resize="features", reduction=reduction)


class RepDistillerAttention(nn.Module):
    """RepDistiller's ``Attention(p)``: a list of losses, one per stage.

    ``mean((q_s - q_t)^2)`` over all elements, with ``Q = mean_c A^p``, *not* of absolute values:
    with odd p negative features cancel positive ones. ``q = Q / max(||Q||, 1e-12)``. Features of
    different sizes are average-pooled (adaptively) to the smaller size before the power. The
    program takes p = 2, adds the list up and multiplies by beta = 1000.

    The original compares heights and pools to (height, height). Square maps, and non-square ones of
    one size: the same here. Where one map is the larger in both dimensions it is pooled to the
    other's (H, W) here; the original stops with a size mismatch unless the smaller is square. Where
    neither is the larger (4x16 against 8x8) this raises; the original stops or, as with 16x4
    against 8x8, stretches the lesser width.

    Args:
        p: a whole number >= 1 (the original makes NaN of negative features with any other).

    Raises:
        TypeError, ValueError: for p, and in the call as :func:`at_fused.at_loss`.

    Source: distiller_zoo/AT.py of HobbitLong/RepDistiller (Tian et al., ICLR 2020).
    """

    def __init__(self, p: float = 2) -> None:
        super().__init__()
        _inputs.check_options(p=p, absolute=False)
        self.p = as_python("p", p)

    def forward(self, g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> list[Tensor]:
        """The loss of each pair of two lists.

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
        """p, as in the call."""
        return f"p={self.p!r}"


def mdistiller_at_loss(
    student: Features, teacher: Features, p: float = 2, feat_weight: float = 1.0
) -> Tensor:
    """The loss of mdistiller: that of :class:`RepDistillerAttention`, added up and weighted.

    ``feat_weight * sum_j mean((q_s - q_t)^2)`` with ``Q = mean_c A^p`` (no absolute value),
    ``q = Q / max(||Q||, 1e-12)``, larger features pooled to the smaller size first; non-square maps
    as in :class:`RepDistillerAttention`.

    Args:
        student, teacher: (B, C, H, W), or lists of such features (of ``feats`` all but the first),
            of any dtype that :func:`at_fused.at_loss` takes.
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


# ---- others --------------------------------------------------------------------------------------


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
        student, teacher: (B, C, H, W), or lists of such features, of any dtype that
            :func:`at_fused.at_loss` takes. H x W, square or not, must be the same, and with "paper"
            B that of all pairs (the original divides by the first one's).
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
    _inputs.check_one_batch(_inputs.pairs(student, teacher)[0], _ONE_BATCH)
    return at_loss(student, teacher, form="paper", collapse="sum", weights=weights)


def aberhu_at_loss(student: Tensor, teacher: Tensor, p: float = 2.0) -> Tensor:
    """The criterion of one pair in AberHu's Knowledge-Distillation-Zoo.

    ``mean((q_s - q_t)^2)`` over all elements, with ``Q = sum_c |A|^p`` and
    ``q = Q / (||Q|| + 1e-6)``. Its trainer takes the mean of the three stages and multiplies by
    ``lambda_kd`` = 1000 (p = 2):

        loss = cross_entropy + 1000 * sum(aberhu_at_loss(s, t) for s, t in stages) / 3

    Args:
        student, teacher: (B, C, H, W), of any dtype that :func:`at_fused.at_loss` takes. H x W,
            square or not, must be the same.
        p: >= 1.

    Returns:
        A scalar, float32 or float64.

    Raises:
        TypeError, ValueError: as :func:`at_fused.at_loss`; and a TypeError for lists, of which the
            program takes a mean elsewhere.

    Source: kd_losses/at.py and train_kd.py of AberHu/Knowledge-Distillation-Zoo.
    """
    for name, x in (("student", student), ("teacher", teacher)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, of one pair, got {kind(x)}")
    return at_loss(student, teacher, p=p, collapse="sum", eps=1e-6, eps_mode="add")


def tensorflow_zoo_at_loss(
    student: Features, teacher: Features, beta: float = 1e3, channel_dim: int = 1
) -> Tensor:
    """The loss of sseung0703's TensorFlow collection.

    ``(beta/2) sum_j mean((q_s - q_t)^2)`` with ``Q = mean_c A^2`` and ``tf.nn.l2_normalize``, whose
    epsilon stands beside the *squared* norm: ``q = Q / sqrt(max(||Q||^2, 1e-12))``, a lower bound
    of 1e-6 for the norm.

    Where C differs, that program first sends the student's features through a trained linear layer
    with ReLU (which keeps their C): a part of the network, not of this loss.

    Args:
        student, teacher: (B, C, H, W), or lists of such features, of any dtype that
            :func:`at_fused.at_loss` takes. H x W, square or not, must be the same.
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
        student, teacher: (B, C, H, W), or lists of such features, of one B and of any dtype that
            :func:`at_fused.at_loss` takes. Where H x W differ the teacher's map is interpolated
            (bilinearly) to the student's, square or not.
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
    students, teachers = _inputs.pairs(student, teacher)
    _inputs.check_one_batch(students, _ONE_BATCH)
    betas = per_pair("beta", beta, len(students))
    # Small enough to be none, large enough that 1 / eps times a gradient of 0 is 0.
    tiny = 1e-150 if all(x.dtype == torch.float64 for x in (*students, *teachers)) else 1e-30
    losses = at_loss(
        students,
        teachers,
        p=p,
        collapse=collapse,
        form="code" if squared else "paper",
        weights=[b / 2 for b in betas],
        reduction="none",
        resize="maps",
        eps=tiny,
    )
    if squared:
        losses = torch.stack(
            [loss * math.prod(x.shape[2:]) for loss, x in zip(losses, students, strict=True)]
        )
    return losses.sum() * students[0].shape[0] if batch == "sum" else losses.sum()
