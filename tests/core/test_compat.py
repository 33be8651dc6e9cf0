"""Losses of published programs against those programs' formulas, and ``convert_beta``.

A converted beta must give both programs the same gradient, or ``convert_beta`` must raise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import at_fused
from at_fused import compat

Side = list[Tensor]
Pairs = tuple[Side, Side]
Loss = Callable[[Side, Side, float], Tensor]


def aberhu_trainer(s: Side, t: Side, beta: float) -> Tensor:
    losses = [compat.aberhu_at_loss(a, b) for a, b in zip(s, t, strict=True)]
    return sum(losses) / len(losses) * beta


# Programs of convert_beta: those that sum squared distances, and those that sum norms.
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
PROGRAMS = SQUARED | NORM

# (B, C of the student, C of the teacher, H, W) of each pair
EQUAL = {
    "square": [(3, 4, 7, 8, 8), (3, 8, 5, 4, 4)],
    "not square": [(2, 3, 3, 5, 9), (2, 6, 1, 7, 2), (2, 4, 4, 1, 6)],
    "batch of one": [(1, 5, 2, 3, 3)],
}


def make_pairs(sizes: Sequence[tuple[int, ...]], scale: float = 1.0) -> Pairs:
    students = [scale * torch.randn(b, c, h, w, dtype=torch.float64) for b, c, _, h, w in sizes]
    teachers = [scale * torch.randn(b, c, h, w, dtype=torch.float64) for b, _, c, h, w in sizes]
    for x in students + teachers:
        x.requires_grad_()
    return students, teachers


def assert_same(actual: Tensor, expected: Tensor, pairs: Pairs, rtol: float = 1e-12) -> None:
    """Compare the losses and their gradients up to rounding."""
    assert actual.shape == expected.shape == ()
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=0)
    assert_same_gradients(actual, expected, pairs, rtol)


def assert_same_gradients(actual: Tensor, expected: Tensor, pairs: Pairs, rtol: float) -> None:
    leaves = [*pairs[0], *pairs[1]]
    gradients = (
        torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (actual, expected)
    )
    for g, e in zip(*gradients, strict=True):
        assert (g - e).abs().max() <= rtol * e.abs().max() + 1e-18
        assert e.abs().max() > 0


# ---- formulas ------------------------------------------------------------------------------------


def signed_map(x: Tensor, p: float) -> Tensor:
    """Compute mean_c x^p without an absolute value, flattened and normalised."""
    return F.normalize(x.pow(p).mean(1).flatten(1))


def mean_of_squares(s: Tensor, t: Tensor, p: float = 2.0) -> Tensor:
    return (signed_map(s, p) - signed_map(t, p)).square().mean()


def sum_of_norms(s: Tensor, t: Tensor) -> Tensor:
    s, t = (F.normalize(x.square().sum(1).flatten(1)) for x in (s, t))
    return (s - t).norm(dim=1).sum()


def aberhu(s: Tensor, t: Tensor, p: float = 2.0) -> Tensor:
    maps = [x.abs().pow(p).sum(1, keepdim=True) for x in (s, t)]
    return F.mse_loss(*(q / (q.norm(dim=(2, 3), keepdim=True) + 1e-6) for q in maps))


def tensorflow_zoo(s: Tensor, t: Tensor) -> Tensor:
    maps = [x.square().mean(1) for x in (s, t)]
    norms = [q.square().sum((1, 2), keepdim=True).clamp(min=1e-12).rsqrt() for q in maps]
    return (maps[0] * norms[0] - maps[1] * norms[1]).square().mean() / 2


def paper(s: Tensor, t: Tensor, p: float = 2.0, collapse: str = "sum", power: int = 1) -> Tensor:
    powers = [x.abs().pow(p) for x in (s, t)]
    maps = [(x.sum(1) if collapse == "sum" else x.amax(1)).flatten(1) for x in powers]
    s, t = (q / q.norm(dim=1, keepdim=True) for q in maps)
    return (s - t).norm(dim=1).pow(power).sum() / 2


# Loss of one pair in each program. The programs not listed use mean_of_squares.
FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "aberhu": aberhu,
    "tensorflow-zoo": tensorflow_zoo,
    "paper-squared": lambda s, t: paper(s, t, power=2),
    "torchdistill-paper": lambda s, t: sum_of_norms(s, t) / len(s),
    "at_loss-paper": lambda s, t: sum_of_norms(s, t) / len(s),
    "paper": paper,
    "paper-mean": lambda s, t: paper(s, t) / len(s),
}


@pytest.mark.parametrize("scale", [1.0, 3e-4])  # 3e-4: small enough for the epsilons to matter
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("sizes", EQUAL.values(), ids=EQUAL)
def test_losses_match_the_programs_formulas(
    sizes: list[tuple[int, ...]], name: str, scale: float
) -> None:
    pairs = make_pairs(sizes)
    s, t = ([x * scale for x in side] for side in pairs)
    losses = [FORMULAS.get(name, mean_of_squares)(a, b) for a, b in zip(s, t, strict=True)]
    count = len(losses) if name == "aberhu" else 1
    assert_same(PROGRAMS[name](s, t, 5.0), 5.0 * sum(losses) / count, pairs)


@pytest.mark.parametrize("p", [1.0, 2.5, 4.0])
def test_powers_and_layouts(p: float) -> None:
    (s,), (t,) = pairs = make_pairs([(3, 4, 7, 5, 9)])
    assert_same(compat.aberhu_at_loss(s, t, p), aberhu(s, t, p), pairs)
    for collapse in ("sum", "max"):
        expected = paper(s, t, p, collapse)
        assert_same(compat.paper_at_loss(s, t, 1.0, p=p, collapse=collapse), expected, pairs)
    channels_last = (x.movedim(1, -1) for x in (s, t))
    actual = compat.tensorflow_zoo_at_loss(*channels_last, 1.0, channel_dim=-1)
    assert_same(actual, tensorflow_zoo(s, t), pairs)


def test_weights_and_betas_per_pair() -> None:
    s, t = make_pairs(EQUAL["not square"])
    numbers = [1.0, 0.25, 3.0]
    for mode, pair, divisor in (("code", mean_of_squares, 1), ("paper", sum_of_norms, len(s[0]))):
        expected = sum(n * pair(a, b) / divisor for n, a, b in zip(numbers, s, t, strict=True))
        assert_same(compat.torchdistill_at_loss(s, t, mode, numbers), expected, (s, t))
    expected = sum(n * paper(a, b) for n, a, b in zip(numbers, s, t, strict=True))
    assert_same(compat.paper_at_loss(s, t, numbers), expected, (s, t))
    assert_same(compat.authors_at_loss(s[0], t[0]), mean_of_squares(s[0], t[0]), (s[:1], t[:1]))


def pooled_loss(s: Tensor, t: Tensor, p: int) -> Tensor:
    """Pool to the smaller height and width, as the programs do for square sizes."""
    size = [min(n, m) for n, m in zip(s.shape[2:], t.shape[2:], strict=True)]
    return mean_of_squares(*(F.adaptive_avg_pool2d(x, size) for x in (s, t)), p)


# (B, C, H, W) of the student and of the teacher
POOLED = {
    "student larger": ((3, 4, 8, 8), (3, 6, 4, 4)),
    "teacher larger, to a square": ((2, 4, 4, 4), (2, 3, 9, 5)),
    "to one position less": ((2, 4, 3, 3), (2, 2, 2, 2)),
    "equal, not square": ((2, 3, 3, 7), (2, 5, 3, 7)),
    "larger, not square, which the originals reject": ((2, 3, 8, 4), (2, 3, 4, 2)),
}


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("shapes", POOLED.values(), ids=POOLED)
def test_repdistiller_and_mdistiller(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], p: int
) -> None:
    s, t = (
        [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in side]
        for side in (shapes, shapes[::-1])
    )
    expected = [pooled_loss(a, b, p) for a, b in zip(s, t, strict=True)]
    actual = compat.RepDistillerAttention(p)(s, t)
    assert isinstance(actual, list)
    assert [x.item() for x in actual] == pytest.approx([x.item() for x in expected], rel=1e-12)
    assert_same(sum(actual), sum(expected), (s, t))
    actual = compat.mdistiller_at_loss(s, t, p, feat_weight=1000.0)
    assert_same(actual, 1000 * sum(expected), (s, t))


def test_paper_interpolates_maps_of_other_sizes() -> None:
    s = torch.randn(2, 3, 6, 4, dtype=torch.float64, requires_grad=True)
    t = torch.randn(2, 5, 3, 7, dtype=torch.float64, requires_grad=True)
    q_t = t.pow(2).sum(1, keepdim=True)
    q_t = F.interpolate(q_t, size=(6, 4), mode="bilinear", align_corners=False)
    expected = 0.1 * paper(s, q_t.sqrt())
    assert_same(compat.paper_at_loss(s, t, 0.1), expected, ([s], [t]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("p", [1.0, 2.0, 4.0])
def test_paper_is_finite_for_zero_and_equal_maps(p: float, dtype: torch.dtype) -> None:
    """The paper's formula has no epsilon."""
    s, t = torch.randn(3, 4, 5, 5).to(dtype), torch.randn(3, 2, 5, 5).to(dtype)
    s[0] = t[1] = 0
    s[2] = t[2] = 1
    s.requires_grad_()
    t.requires_grad_()
    loss = compat.paper_at_loss(s, t, 2.0, p=p)
    assert loss.item() == pytest.approx(2, abs=1e-5)  # a zero map is at distance 1 from a unit map
    for x in torch.autograd.grad(loss, (s, t)):
        assert torch.isfinite(x).all()
        assert x[2].abs().max() == 0
        assert x[:2].abs().amin(0).max() == 0
    pairs = make_pairs([(2, 3, 4, 5, 5)])
    small = [[x * 1e-30 for x in side] for side in pairs]
    assert_same(compat.paper_at_loss(*small, 1.0), compat.paper_at_loss(*pairs, 1.0), pairs)


# ---- arguments -----------------------------------------------------------------------------------


X, Y = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 8, 8)


@pytest.mark.parametrize("name", PROGRAMS)
def test_features_that_do_not_match_raise(name: str) -> None:
    loss = PROGRAMS[name]
    with pytest.raises(ValueError, match="same batch size, got 1 and 2"):
        loss([X[:1]], [Y], 1.0)
    other = torch.randn(2, 3, 4, 16)  # as many positions, in another shape
    if name.startswith("paper"):  # it interpolates
        assert torch.isfinite(loss([other], [Y], 1.0))
    else:
        with pytest.raises(ValueError, match="4x16 and 8x8"):
            loss([other], [Y], 1.0)
    if name != "aberhu":  # its function takes one pair
        with pytest.raises(ValueError, match="same number of tensors, got 2 and 1"):
            loss([X, X], [Y], 1.0)


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_losses_compile_without_graph_breaks(dynamic: bool) -> None:
    s, t = make_pairs([(3, 4, 7, 8, 8), (3, 8, 5, 8, 8)])

    def total(s: list[Tensor], t: list[Tensor]) -> Tensor:
        pooled = compat.RepDistillerAttention(3)(s, [t[0], t[1][..., :4, :4]])
        names = ("authors", "torchdistill-paper", "aberhu", "tensorflow-zoo", "paper")
        return sum(pooled) + sum(PROGRAMS[name](s, t, 0.5) for name in names)

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    losses = compiled(s, t), total(s, t)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, s + t) for loss in losses))


# ---- convert_beta --------------------------------------------------------------------------------


@pytest.mark.parametrize("source", PROGRAMS)
def test_converted_betas_give_equal_losses(source: str) -> None:
    family = SQUARED if source in SQUARED else NORM
    for sizes in ([(6, 6)], [(4, 7), (4, 7)], [(8, 8), (3, 5), (2, 2)]):
        # Large enough for epsilons not to matter: AberHu adds 1e-6 to norms of about 1e4.
        s, t = make_pairs([(3, 3, 5, *size) for size in sizes], scale=40.0)
        shapes = [x.shape for x in s]
        for target in family:
            betas = compat.pair_betas(1e3, source, target, shapes)
            losses = [family[target]([a], [b], c) for a, b, c in zip(s, t, betas, strict=True)]
            count = len(s) if target == "aberhu" else 1
            assert_same(sum(losses) / count, family[source](s, t, 1e3), (s, t), 1e-9)
            # paper-squared is the only squared loss that sums over positions, so sizes matter.
            if len(set(sizes)) > 1 and source != target and "paper-squared" in (source, target):
                with pytest.raises(ValueError, match=r"no single beta.*pair_betas"):
                    compat.convert_beta(1e3, source, target, shapes)
                continue
            beta = compat.convert_beta(1e3, source, target, shapes)
            assert beta == betas[0]
            back = compat.convert_beta(beta, target, source, shapes)
            assert back == pytest.approx(1e3, rel=1e-15)


@pytest.mark.parametrize("source", PROGRAMS)
def test_squares_convert_to_norms_at_a_given_distance(source: str) -> None:
    s, t = make_pairs([(1, 3, 5, 4, 6)], scale=40.0)
    distance = at_fused.at_loss(s, t, form="paper").item()
    s, t = ([x.detach().repeat(3, 1, 1, 1).requires_grad_() for x in side] for side in (s, t))
    shapes, expected = [x.shape for x in s], PROGRAMS[source](s, t, 1e3)
    family = NORM if source in SQUARED else SQUARED
    for target in family:
        beta = compat.convert_beta(1e3, source, target, shapes, distance=distance)
        assert_same_gradients(family[target](s, t, beta), expected, (s, t), 1e-9)
        with pytest.raises(ValueError, match=r"no beta converts.*one sums norms.*distance="):
            compat.convert_beta(1e3, source, target, shapes)


def test_documented_conversions() -> None:
    assert all(f'"{name}"' in compat.convert_beta.__doc__ for name in PROGRAMS)
    shapes = [(128, 16, 32, 32), (128, 32, 16, 16), (128, 64, 8, 8)]
    convert = compat.convert_beta
    assert convert(1000, "authors", "repdistiller", shapes) == 1000
    assert convert(1000, "authors", "tensorflow-zoo", shapes) == 2000
    assert convert(1000, "authors", "aberhu", shapes) == 3000
    assert convert(0.1, "paper", "torchdistill-paper", shapes) == 0.1 * 64
    assert convert(0.1, "paper-mean", "at_loss-paper", shapes) == 0.05
    assert convert(-1000, "authors", "mdistiller", shapes) == -1000
    # The paper's rule for each layer, 1e3 / (N B), without its factor 1/2.
    assert compat.pair_betas(500, "authors", "paper-squared", shapes) == [
        1e3 / (n * 128) for n in (1024, 256, 64)
    ]


# ---- errors --------------------------------------------------------------------------------------

SHAPES = [(8, 4, 6, 6)]
ERRORS: dict[str, tuple[Any, ...]] = {
    "p must be an integer with absolute=False, got 1.5": (compat.RepDistillerAttention, 1.5),
    "mode must be 'code' or 'paper', got 'eq2'": (compat.torchdistill_at_loss, X, Y, "eq2"),
    "one batch size.*got 2 for pair 0 and 1 for pair 1": (
        *(compat.torchdistill_at_loss, [X, X[:1]], [Y, Y[:1]], "paper"),
    ),
    "must be a tensor .one pair per call., got list": (compat.aberhu_at_loss, [X], [Y]),
    "beta must be one number, or one per pair, got 2 for 1": (compat.paper_at_loss, X, Y, [1, 1]),
    "batch must be 'sum' or 'mean', got 'no'": (partial(compat.paper_at_loss, batch="no"), X, Y, 1),
    "between 'authors' and 'aberhu'.*, got 0.5": (
        *(compat.convert_beta, 1.0, "authors", "aberhu", SHAPES, 0.5),
    ),
    "at most 2, got 2.1": (compat.convert_beta, 1.0, "authors", "paper", SHAPES, 2.1),
    "distance must be one .* got 2 for 1 pairs": (
        *(compat.convert_beta, 1.0, "authors", "paper", SHAPES, [0.5, 0.5]),
    ),
    "source must be 'authors', .*got 'author'": (
        *(compat.convert_beta, 1.0, "author", "paper", SHAPES),
    ),
    "target must be 'authors', .*got None": (compat.convert_beta, 1.0, "paper", None, SHAPES),
    r"beta must be smaller, .*'aberhu', got 1e\+308": (
        *(compat.convert_beta, 1e308, "authors", "aberhu", SHAPES * 2),
    ),
} | {
    rf"shapes must be a list of .*, got {re.escape(repr(shapes)[:40])}": (
        *(compat.convert_beta, 1.0, "paper", "paper", shapes),
    )
    for shapes in ([], [(6, 6)], [(8, 4, 0, 6)], [(8, 4, 6, 6), (4, 4, 6, 6)])
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message: str) -> None:
    call, *arguments = ERRORS[message]
    with pytest.raises((TypeError, ValueError), match=message):
        call(*arguments)
