"""convert_beta: the losses of two programs have one gradient, or it says why they cannot."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import at_fused
from at_fused import compat

Side = list[Tensor]
Loss = Callable[[Side, Side, float], Tensor]


def aberhu_trainer(s: Side, t: Side, beta: float) -> Tensor:
    losses = [compat.aberhu_at_loss(a, b) for a, b in zip(s, t, strict=True)]
    return sum(losses) / len(losses) * beta


SQUARED: dict[str, Loss] = {
    "authors": lambda s, t, beta: beta * compat.authors_at_loss(s, t),
    "repdistiller": lambda s, t, beta: beta * sum(compat.RepDistillerAttention()(s, t)),
    "mdistiller": lambda s, t, beta: compat.mdistiller_at_loss(s, t, feat_weight=beta),
    "torchdistill-code": lambda s, t, beta: beta * compat.torchdistill_at_loss(s, t),
    "at_loss-code": lambda s, t, beta: beta * at_fused.at_loss(s, t),
    "aberhu": aberhu_trainer,
    "tensorflow-zoo": compat.tensorflow_zoo_at_loss,
    "paper-squared": lambda s, t, beta: compat.paper_at_loss(s, t, beta, squared=True),
}
NORM: dict[str, Loss] = {
    "torchdistill-paper": lambda s, t, beta: beta * compat.torchdistill_at_loss(s, t, "paper"),
    "at_loss-paper": lambda s, t, beta: beta * at_fused.at_loss(s, t, form="paper"),
    "paper": lambda s, t, beta: compat.paper_at_loss(s, t, beta),
    "paper-mean": lambda s, t, beta: compat.paper_at_loss(s, t, beta, batch="mean"),
}
# What its epsilon shrinks AberHu's maps by: 1e-6 of a norm of 1e4 here. See `features`.
TOLERANCE = 1e-9


def features(batch: int, sizes: Sequence[tuple[int, int]]) -> tuple[Side, Side]:
    """Large ones, next to which no epsilon counts."""
    s = [40 * torch.randn(batch, 3, h, w, dtype=torch.float64) for h, w in sizes]
    t = [40 * torch.randn(batch, 5, h, w, dtype=torch.float64) for h, w in sizes]
    for x in s + t:
        x.requires_grad_()
    return s, t


def assert_same_gradient(found: Tensor, right: Tensor, leaves: Side) -> None:
    for a, b in zip(
        torch.autograd.grad(found, leaves), torch.autograd.grad(right, leaves), strict=True
    ):
        assert (a - b).abs().max() <= TOLERANCE * b.abs().max()
        assert b.abs().max() > 0


@pytest.mark.parametrize("source", [*SQUARED, *NORM])
def test_exact_conversions(source: str) -> None:
    alike = SQUARED if source in SQUARED else NORM
    # Of the squared ones only a sum over positions tells sizes apart.
    for sizes in ([(6, 6)], [(4, 7), (4, 7)], [(8, 8), (3, 5), (2, 2)]):
        s, t = features(3, sizes)
        shapes = [x.shape for x in s]
        for target in alike:
            single = len(set(sizes)) == 1 or "paper-squared" not in (source, target)
            if not single and source != target:
                with pytest.raises(ValueError, match=r"no single beta.*pair_betas"):
                    compat.convert_beta(1e3, source, target, shapes)
                continue
            beta = compat.convert_beta(1e3, source, target, shapes)
            assert beta > 0
            right = alike[source](s, t, 1e3)
            found = alike[target](s, t, beta)
            assert found.item() == pytest.approx(right.item(), rel=TOLERANCE)
            assert_same_gradient(found, right, s + t)
            back = compat.convert_beta(beta, target, source, shapes)
            assert back == pytest.approx(1e3, rel=3e-16)


def test_numbers_by_hand() -> None:
    shapes = [(128, 16, 32, 32), (128, 32, 16, 16), (128, 64, 8, 8)]
    convert = compat.convert_beta
    assert convert(1000, "authors", "repdistiller", shapes) == 1000
    assert convert(1000, "authors", "tensorflow-zoo", shapes) == 2000
    assert convert(1000, "authors", "aberhu", shapes) == 3000
    assert convert(1000, "aberhu", "authors", shapes) == 1000 / 3
    assert convert(0.1, "paper", "torchdistill-paper", shapes) == 0.1 * 64
    assert convert(0.1, "paper-mean", "at_loss-paper", shapes) == 0.05
    assert convert(-1000, "authors", "mdistiller", shapes) == -1000
    assert convert(0, "paper", "at_loss-paper", shapes) == 0
    largest = sys.float_info.max
    assert convert(-largest / 2, "authors", "aberhu", shapes[:2]) == -largest
    # The paper's rule of 1e3 / (N B) for each layer, without the half.
    assert compat.pair_betas(500, "authors", "paper-squared", shapes) == [
        1e3 / (n * 128) for n in (1024, 256, 64)
    ]


def test_a_beta_for_each_pair() -> None:
    s, t = features(2, [(8, 8), (3, 5)])
    shapes = [x.shape for x in s]
    betas = compat.pair_betas(1e3, "authors", "paper-squared", shapes)
    found = compat.paper_at_loss(s, t, betas, squared=True)
    assert_same_gradient(found, 1e3 * compat.authors_at_loss(s, t), s + t)
    weights = compat.pair_betas(0.1, "paper-squared", "at_loss-code", shapes)
    found = at_fused.at_loss(s, t, weights=weights)
    assert_same_gradient(found, compat.paper_at_loss(s, t, 0.1, squared=True), s + t)


# ---- squares and norms ---------------------------------------------------------------------------


@pytest.mark.parametrize("source", SQUARED)
@pytest.mark.parametrize("target", NORM)
def test_squares_and_norms_agree_at_one_distance(source: str, target: str) -> None:
    s, t = features(1, [(4, 6)])
    # Three samples at one distance.
    distance = at_fused.at_loss(s, t, form="paper").item()
    s, t = ([x.detach().repeat(3, 1, 1, 1).requires_grad_() for x in side] for side in (s, t))
    shapes = [x.shape for x in s]
    beta = compat.convert_beta(1e3, source, target, shapes, distance=distance)
    assert_same_gradient(NORM[target](s, t, beta), SQUARED[source](s, t, 1e3), s + t)
    back = compat.convert_beta(beta, target, source, shapes, distance=distance)
    assert back == pytest.approx(1e3, rel=1e-15)
    assert_same_gradient(SQUARED[source](s, t, back), NORM[target](s, t, beta), s + t)
    with pytest.raises(ValueError, match=r"no exact conversion exists.*distance="):
        compat.convert_beta(1e3, source, target, shapes)
    with pytest.raises(ValueError, match=r"no exact conversion exists.*distance="):
        compat.convert_beta(1e3, target, source, shapes)


def test_a_distance_for_each_pair() -> None:
    s, t = features(1, [(4, 6), (3, 3)])
    shapes = [x.shape for x in s]
    distances = at_fused.at_loss(s, t, form="paper", reduction="none").tolist()
    weights = compat.pair_betas(1e3, "authors", "at_loss-paper", shapes, distances)
    found = at_fused.at_loss(s, t, form="paper", weights=weights)
    assert_same_gradient(found, 1e3 * compat.authors_at_loss(s, t), s + t)
    with pytest.raises(ValueError, match="no single beta"):
        compat.convert_beta(1e3, "authors", "at_loss-paper", shapes, distances)


# ---- errors --------------------------------------------------------------------------------------

SHAPES = [(8, 4, 6, 6)]
BAD: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "source": ((1.0, "author", "paper", SHAPES), ValueError, "source must be one of authors, .*"),
    "target": ((1.0, "paper", None, SHAPES), ValueError, "target must be one of.*got None"),
    "beta large": (
        (1e308, "authors", "aberhu", SHAPES * 2),
        ValueError,
        r"beta must be at most 8.98847e\+307 either way.*'aberhu'.*got 1e\+308",
    ),
    "beta for a distance": (
        (-1.0, "paper", "authors", SHAPES, 5e-324),
        ValueError,
        r"beta must be at most 1.23358e-17 either way.*got -1.0",
    ),
    "shapes bool": ((1.0, "paper", "paper", [(8, 4, True, 6)]), ValueError, r"shapes\[0\].*True"),
    "a tensor": ((1.0, "paper", "paper", torch.ones(3)), ValueError, "shapes.*got 'Tensor'"),
    "no batch": ((1.0, "paper", "paper", [(6, 6)]), ValueError, r"shapes\[0\].*got \(6, 6\)"),
    "batches": (
        (1.0, "paper", "paper", [(8, 4, 6, 6), (4, 4, 6, 6)]),
        ValueError,
        "one batch size, got 8 and, in pair 1, 4",
    ),
    "needless": (
        (1.0, "authors", "aberhu", SHAPES, 0.5),
        ValueError,
        "distance must not be given between 'authors' and 'aberhu'.*exact, got 0.5",
    ),
    "too far": ((1.0, "authors", "paper", SHAPES, 2.1), ValueError, "at most 2, got 2.1"),
    "distances": (
        (1.0, "authors", "paper", SHAPES, [0.5, 0.5]),
        ValueError,
        "distance must be one number, or one per pair, got 2 for 1 pairs",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    arguments, error, message = BAD[case]
    with pytest.raises(error, match=message):
        compat.convert_beta(*arguments)


def test_the_docstring_names_every_formula() -> None:
    for name in itertools.chain(SQUARED, NORM):
        assert f'"{name}"' in compat.convert_beta.__doc__
