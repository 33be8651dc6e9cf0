"""What a beta of one program is in another: ``at_fused.compat.convert_beta``."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

from at_fused._numbers import as_python, check_finite, is_whole, kind


class _Formula(NamedTuple):
    """``beta * sum_j factor(B, N_j, pairs) * sum_b ||D_b||^2``, or of the norm, not squared."""

    squared: bool
    factor: Callable[[int, int, int], Fraction]


_MEAN = _Formula(True, lambda b, n, pairs: Fraction(1, b * n))
_NORM = _Formula(False, lambda b, n, pairs: Fraction(1, b))
_FORMULAS = {
    "authors": _MEAN,
    "repdistiller": _MEAN,
    "mdistiller": _MEAN,
    "torchdistill-code": _MEAN,
    "at_loss-code": _MEAN,
    "aberhu": _Formula(True, lambda b, n, pairs: Fraction(1, b * n * pairs)),
    "tensorflow-zoo": _Formula(True, lambda b, n, pairs: Fraction(1, 2 * b * n)),
    "paper-squared": _Formula(True, lambda b, n, pairs: Fraction(1, 2)),
    "torchdistill-paper": _NORM,
    "at_loss-paper": _NORM,
    "paper": _Formula(False, lambda b, n, pairs: Fraction(1, 2)),
    "paper-mean": _Formula(False, lambda b, n, pairs: Fraction(1, 2 * b)),
}


def per_pair(name: str, value: float | Sequence[float], count: int) -> list[float]:
    """A finite number for each pair, from one for all or a list."""
    value = as_python(name, value)
    if not isinstance(value, (list, tuple)):
        return [float(check_finite(name, value))] * count
    if len(value) != count:
        raise ValueError(
            f"{name} must be one number, or one per pair, got {len(value)} for {count} pairs"
        )
    return [float(check_finite(f"{name}[{i}]", number)) for i, number in enumerate(value)]


def convert_beta(
    beta: float,
    source: str,
    target: str,
    shapes: Sequence[Sequence[int]],
    distance: float | Sequence[float] | None = None,
) -> float:
    """The beta with which ``target``'s training loss is ``source``'s, or has its gradient.

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
    """As :func:`convert_beta`, a number for each pair: for ``weights``, or ``paper_at_loss``.

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
        if not isinstance(value, str) or value not in _FORMULAS:
            raise ValueError(f"{name} must be one of {', '.join(_FORMULAS)}, got {value!r}")
    batch, positions = _check_shapes(shapes)
    old, new = _FORMULAS[source], _FORMULAS[target]
    distances = _check_distance(distance, source, target, len(positions))
    betas = []
    for n, d in zip(positions, distances, strict=True):
        factor = old.factor(batch, n, len(positions)) / new.factor(batch, n, len(positions))
        if old.squared != new.squared:
            factor *= 2 * d if old.squared else 1 / (2 * d)
        most = Fraction(sys.float_info.max) / factor
        if abs(beta) > most:
            raise ValueError(
                f"beta must be at most {float(most):.6g} either way, beyond which {target!r} has "
                f"no float for it, got {beta!r}"
            )
        betas.append(float(Fraction(beta) * factor))
    return betas


def _check_shapes(shapes: Sequence[Sequence[int]]) -> tuple[int, list[int]]:
    """B, and the N of each pair."""
    if not isinstance(shapes, (list, tuple)) or not shapes:
        raise ValueError(
            "shapes must be a list with the shape (B, C, H, W) of each pair, "
            f"got {shapes if isinstance(shapes, (list, tuple)) else kind(shapes)!r}"
        )
    for i, shape in enumerate(shapes):
        if not (
            isinstance(shape, (list, tuple))
            and 3 <= len(shape) <= 5
            and all(is_whole(n) and n > 0 for n in shape)
        ):
            raise ValueError(
                f"shapes[{i}] must be (B, C, H, W), or have one to three spatial dimensions, all "
                f"> 0, got {tuple(shape) if isinstance(shape, (list, tuple)) else shape!r}"
            )
        if shape[0] != shapes[0][0]:
            raise ValueError(
                f"shapes must have one batch size, got {shapes[0][0]} and, in pair {i}, {shape[0]}"
            )
    return shapes[0][0], [math.prod(shape[2:]) for shape in shapes]


def _check_distance(
    distance: float | Sequence[float] | None, source: str, target: str, count: int
) -> list[Fraction]:
    differ = _FORMULAS[source].squared != _FORMULAS[target].squared
    if distance is None:
        if differ:
            squared, norm = (source, target) if _FORMULAS[source].squared else (target, source)
            raise ValueError(
                f"no exact conversion exists between {source!r} and {target!r}: {squared!r} sums "
                f"squared norms and {norm!r} norms, whose gradients differ by the factor 2 "
                "||qs - qt||, another one for each sample; distance=... is the ||qs - qt|| at "
                "which they shall agree"
            )
        return [Fraction(1)] * count
    if not differ:
        raise ValueError(
            f"distance must not be given between {source!r} and {target!r}, whose conversion is "
            f"exact, got {distance!r}"
        )
    distances = per_pair("distance", distance, count)
    for d in distances:
        if not 0 < d <= 2:
            raise ValueError(f"distance must be > 0 and at most 2, got {d!r}")
    return [Fraction(d) for d in distances]
