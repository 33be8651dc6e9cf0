"""The losses of published programs: each against its formula, as that program computes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from at_fused import compat

Pairs = tuple[list[Tensor], list[Tensor]]

# (B, C of the student, C of the teacher, H, W) of each pair
EQUAL = {
    "square": [(3, 4, 7, 8, 8), (3, 8, 5, 4, 4)],
    "not square": [(2, 3, 3, 5, 9), (2, 6, 1, 7, 2), (2, 4, 4, 1, 6)],
    "one pair": [(4, 2, 3, 6, 6)],
    "batch of one": [(1, 5, 2, 3, 3)],
}


def pairs_of(sizes: Sequence[tuple[int, ...]]) -> Pairs:
    students = [torch.randn(b, c, h, w, dtype=torch.float64) for b, c, _, h, w in sizes]
    teachers = [torch.randn(b, c, h, w, dtype=torch.float64) for b, _, c, h, w in sizes]
    for x in students + teachers:
        x.requires_grad_()
    return students, teachers


def assert_same(found: Tensor, right: Tensor, pairs: Pairs) -> None:
    """Value and both gradients, to rounding."""
    leaves = [*pairs[0], *pairs[1]]
    assert found.shape == right.shape == ()
    torch.testing.assert_close(found, right, rtol=1e-12, atol=0)
    ours = torch.autograd.grad(found, leaves, retain_graph=True)
    theirs = torch.autograd.grad(right, leaves, retain_graph=True)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max() + 1e-18


def powers(x: Tensor, p: float) -> Tensor:
    """x^p averaged over the channels, without an absolute value, flattened and normalised."""
    return F.normalize(x.pow(p).mean(1).reshape(x.shape[0], -1))


def mean_of_squares(s: Tensor, t: Tensor) -> Tensor:
    return (powers(s, 2) - powers(t, 2)).pow(2).mean()


# ---- one formula each ----------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", EQUAL.values(), ids=EQUAL)
def test_authors(fast_backend: str, sizes: list[tuple[int, ...]]) -> None:
    s, t = pairs_of(sizes)
    right = sum(mean_of_squares(a, b) for a, b in zip(s, t, strict=True))
    assert_same(compat.authors_at_loss(s, t), right, (s, t))
    one = mean_of_squares(s[0], t[0])
    assert_same(compat.authors_at_loss(s[0], t[0]), one, ([s[0]], [t[0]]))


def pooled_pair(s: Tensor, t: Tensor, p: int) -> Tensor:
    """Pools to (height, height) of the lower map, as RepDistiller and mdistiller do."""
    height = min(s.shape[2], t.shape[2])
    if s.shape[2] > height:
        s = F.adaptive_avg_pool2d(s, (height, height))
    elif t.shape[2] > height:
        t = F.adaptive_avg_pool2d(t, (height, height))
    return (powers(s, p) - powers(t, p)).pow(2).mean()


# (B, C, H, W) of the student and of the teacher
POOLED = {
    "student larger": ((3, 4, 8, 8), (3, 6, 4, 4)),
    "teacher larger, to a square": ((2, 4, 4, 4), (2, 3, 9, 5)),
    "to one position less": ((2, 4, 3, 3), (2, 2, 2, 2)),
    "equal, not square": ((2, 3, 3, 7), (2, 5, 3, 7)),
}


@pytest.mark.parametrize("p", [1, 2, 3, 4])
@pytest.mark.parametrize("shapes", POOLED.values(), ids=POOLED)
def test_repdistiller_and_mdistiller(
    fast_backend: str, shapes: tuple[tuple[int, ...], tuple[int, ...]], p: int
) -> None:
    s, t = (
        [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in side]
        for side in (shapes, shapes[::-1])
    )
    right = [pooled_pair(a, b, p) for a, b in zip(s, t, strict=True)]
    found = compat.RepDistillerAttention(p)(s, t)
    assert isinstance(found, list)
    assert [x.item() for x in found] == pytest.approx([x.item() for x in right], rel=1e-12)
    assert_same(sum(found), sum(right), (s, t))
    ours = compat.mdistiller_at_loss(s, t, p, feat_weight=1000.0)
    assert_same(ours, 1000 * sum(right), (s, t))


@pytest.mark.parametrize("sizes", EQUAL.values(), ids=EQUAL)
def test_torchdistill(fast_backend: str, sizes: list[tuple[int, ...]]) -> None:
    s, t = pairs_of(sizes)
    weights = [1.0, 0.25, 3.0][: len(s)]

    def norms(a: Tensor, b: Tensor) -> Tensor:
        q_a, q_b = (F.normalize(x.pow(2).sum(1).flatten(1)) for x in (a, b))
        return torch.norm(q_a - q_b, dim=1).sum()

    for mode, pair, divisor in (("code", mean_of_squares, 1), ("paper", norms, len(s[0]))):
        right = sum(w * pair(a, b) for w, a, b in zip(weights, s, t, strict=True)) / divisor
        assert_same(compat.torchdistill_at_loss(s, t, mode, weights), right, (s, t))
        plain = sum(pair(a, b) for a, b in zip(s, t, strict=True)) / divisor
        assert_same(compat.torchdistill_at_loss(s, t, mode), plain, (s, t))


@pytest.mark.parametrize("p", [1.0, 2.0, 2.5])
@pytest.mark.parametrize("scale", [1.0, 1e-4])  # 1e-4: maps in which 1e-6 counts
@pytest.mark.parametrize("sizes", EQUAL.values(), ids=EQUAL)
def test_aberhu(fast_backend: str, sizes: list[tuple[int, ...]], scale: float, p: float) -> None:
    def attention(x: Tensor) -> Tensor:
        q = (x * scale).abs().pow(p).sum(1, keepdim=True)
        return q / (torch.norm(q, dim=(2, 3), keepdim=True) + 1e-6)

    pairs = pairs_of(sizes)
    for s, t in zip(*pairs, strict=True):
        right = F.mse_loss(attention(s), attention(t))
        assert_same(compat.aberhu_at_loss(s * scale, t * scale, p), right, ([s], [t]))


@pytest.mark.parametrize("scale", [1.0, 3e-4])  # 3e-4: maps about the bound of 1e-6
@pytest.mark.parametrize("sizes", EQUAL.values(), ids=EQUAL)
def test_tensorflow_zoo(fast_backend: str, sizes: list[tuple[int, ...]], scale: float) -> None:
    def attention(x: Tensor) -> Tensor:
        q = (x * scale).square().mean(1)
        return q * q.square().sum((1, 2), keepdim=True).clamp(min=1e-12).rsqrt()

    s, t = pairs_of(sizes)
    right = sum(
        (attention(b) - attention(a)).square().mean() * 5.0 / 2 for a, b in zip(s, t, strict=True)
    )
    given = [x * scale for x in s], [x * scale for x in t]
    assert_same(compat.tensorflow_zoo_at_loss(*given, beta=5.0), right, (s, t))
    last = [[x.movedim(1, -1) for x in side] for side in given]
    assert_same(compat.tensorflow_zoo_at_loss(*last, 5.0, channel_dim=-1), right, (s, t))


@pytest.mark.parametrize("collapse", ["sum", "max"])
@pytest.mark.parametrize("p", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("sizes", EQUAL.values(), ids=EQUAL)
def test_paper(fast_backend: str, sizes: list[tuple[int, ...]], p: float, collapse: str) -> None:
    def attention(x: Tensor) -> Tensor:
        q = x.abs().pow(p)
        q = (q.sum(1) if collapse == "sum" else q.amax(1)).flatten(1)
        return q / q.norm(dim=1, keepdim=True)

    s, t = pairs_of(sizes)
    betas = [0.1, 0.3, 2.0][: len(s)]
    differences = [attention(a) - attention(b) for a, b in zip(s, t, strict=True)]
    options = {"p": p, "collapse": collapse}
    for power in (1, 2):
        distances = [d.norm(dim=1).pow(power) for d in differences]
        right = sum(b / 2 * d.sum() for b, d in zip(betas, distances, strict=True))
        options["squared"] = power == 2
        assert_same(compat.paper_at_loss(s, t, betas, **options), right, (s, t))
        mean = compat.paper_at_loss(s, t, betas, batch="mean", **options)
        assert_same(mean, right / len(s[0]), (s, t))
        same = sum(0.35 * d.sum() for d in distances)
        assert_same(compat.paper_at_loss(s, t, 0.7, **options), same, (s, t))


def test_paper_with_maps_of_different_sizes(fast_backend: str) -> None:
    s = torch.randn(2, 3, 6, 4, dtype=torch.float64, requires_grad=True)
    t = torch.randn(2, 5, 3, 7, dtype=torch.float64, requires_grad=True)
    q_s, q_t = s.pow(2).sum(1, keepdim=True), t.pow(2).sum(1, keepdim=True)
    q_t = F.interpolate(q_t, size=(6, 4), mode="bilinear", align_corners=False)
    q_s, q_t = (q.flatten(1) / q.flatten(1).norm(dim=1, keepdim=True) for q in (q_s, q_t))
    right = 0.05 * (q_s - q_t).norm(dim=1).sum()
    assert_same(compat.paper_at_loss(s, t, 0.1), right, ([s], [t]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("p", [1.0, 2.0, 4.0])
def test_paper_is_defined_for_zero_and_equal_maps(
    fast_backend: str, p: float, dtype: torch.dtype
) -> None:
    """It has no epsilon."""
    s, t = torch.randn(3, 4, 5, 5).to(dtype), torch.randn(3, 2, 5, 5).to(dtype)
    s[0] = t[1] = 0
    s[2] = t[2] = 1
    s.requires_grad_()
    t.requires_grad_()
    loss = compat.paper_at_loss(s, t, 2.0, p=p)
    assert loss.item() == pytest.approx(2, abs=1e-5)  # each zero map is at distance 1 of a unit one
    for x in torch.autograd.grad(loss, (s, t)):
        assert torch.isfinite(x).all()
        assert x[2].abs().max() == 0
        assert x[:2].abs().amin(0).max() == 0
    pairs = pairs_of([(2, 3, 4, 5, 5)])
    small = [[x * 1e-30 for x in side] for side in pairs]
    assert_same(compat.paper_at_loss(*small, 1.0), compat.paper_at_loss(*pairs, 1.0), pairs)


# ---- what the originals take ---------------------------------------------------------------------


def random(*shape: int) -> Tensor:
    return torch.randn(shape)


X, Y = random(2, 3, 8, 8), random(2, 5, 8, 8)
PAIR_LOSSES: dict[str, Callable[..., object]] = {
    "authors": compat.authors_at_loss,
    "RepDistiller": lambda s, t: compat.RepDistillerAttention()([s], [t]),
    "mdistiller": compat.mdistiller_at_loss,
    "torchdistill, code": compat.torchdistill_at_loss,
    "torchdistill, paper": lambda s, t: compat.torchdistill_at_loss(s, t, "paper"),
    "AberHu": compat.aberhu_at_loss,
    "TensorFlow": compat.tensorflow_zoo_at_loss,
    "paper": lambda s, t: compat.paper_at_loss(s, t, 0.1),
}
LIST_LOSSES = {
    **{name: PAIR_LOSSES[name] for name in PAIR_LOSSES if name not in ("RepDistiller", "AberHu")},
    "RepDistiller": compat.RepDistillerAttention(),
}


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_nothing_is_broadcast_or_stretched(name: str) -> None:
    with pytest.raises(ValueError, match="same batch size, got 1 and 2"):
        PAIR_LOSSES[name](X[:1], Y)
    other = random(2, 3, 4, 16)  # as many positions are not the same positions
    if name == "paper":  # which interpolates
        assert torch.isfinite(PAIR_LOSSES[name](other, Y))
    else:
        with pytest.raises(ValueError, match="4x16 and 8x8"):
            PAIR_LOSSES[name](other, Y)


@pytest.mark.parametrize("name", LIST_LOSSES)
def test_no_list_is_cut_short(name: str) -> None:
    with pytest.raises(ValueError, match="same number of features, got 2 and 1"):
        LIST_LOSSES[name]([X, X], [Y])


def test_pooling_where_the_original_stops_or_stretches(fast_backend: str) -> None:
    # An original of (height, height) cannot compare these: ours pools to 4x2.
    s, t = random(2, 3, 8, 4).double(), random(2, 3, 4, 2).double()
    with pytest.raises(RuntimeError):
        pooled_pair(s, t, 2)
    right = mean_of_squares(F.adaptive_avg_pool2d(s, (4, 2)), t)
    torch.testing.assert_close(compat.mdistiller_at_loss(s, t), right)
    # It stretches a width of 4 to 8 here.
    narrow = random(2, 3, 16, 4)
    assert torch.isfinite(pooled_pair(narrow, X, 2))
    for shape in ((2, 3, 16, 4), (2, 3, 4, 16)):
        with pytest.raises(
            ValueError, match="pair 0 must be of one size, or one of them the larger"
        ):
            compat.RepDistillerAttention()([random(*shape)], [X])


BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "p not whole": (
        lambda: compat.RepDistillerAttention(1.5),
        ValueError,
        "p must be a whole number with absolute=False, got 1.5",
    ),
    "a tensor for the list": (
        lambda: compat.RepDistillerAttention()(X, Y),
        TypeError,
        "g_s must be a list",
    ),
    "mode": (
        lambda: compat.torchdistill_at_loss(X, Y, "eq2"),
        ValueError,
        "mode must be 'code' or 'paper', got 'eq2'",
    ),
    "batches of torchdistill's paper mode": (
        lambda: compat.torchdistill_at_loss([X, X[:1]], [Y, Y[:1]], "paper"),
        ValueError,
        "one batch size.*got 2 and, in pair 1, 1",
    ),
    "a list for a pair": (
        lambda: compat.aberhu_at_loss([X], [Y]),
        TypeError,
        "student must be a tensor, of one pair, got list",
    ),
    "a beta per pair": (
        lambda: compat.paper_at_loss(X, Y, [0.1, 0.1]),
        ValueError,
        "beta must be one number, or one per pair, got 2 for 1 pairs",
    ),
    "batch": (
        lambda: compat.paper_at_loss(X, Y, 0.1, batch="none"),
        ValueError,
        "batch must be 'sum' or 'mean', got 'none'",
    ),
    "squared": (
        lambda: compat.paper_at_loss(X, Y, 0.1, squared=2),
        TypeError,
        "squared must be True or False, got int",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("dynamic", [False, True])
def test_no_formula_breaks_a_compiled_graph(dynamic: bool) -> None:
    s, t = pairs_of([(3, 4, 7, 8, 8), (3, 8, 5, 8, 8)])

    def every(s: list[Tensor], t: list[Tensor]) -> Tensor:
        return (
            compat.authors_at_loss(s, t)
            + sum(compat.RepDistillerAttention(3)(s, [t[0], t[1][..., :4, :4]]))
            + compat.mdistiller_at_loss(s, t, 2, 1000.0)
            + compat.torchdistill_at_loss(s, t, "paper", [1.0, 0.5])
            + compat.aberhu_at_loss(s[0], t[0])
            + compat.tensorflow_zoo_at_loss(s, t)
            + compat.paper_at_loss(s, t, 0.1, collapse="max")
            + compat.paper_at_loss(s, t, [0.1, 0.2], squared=True)
        )

    compiled = torch.compile(every, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    found, right = compiled(s, t), every(s, t)
    torch.testing.assert_close(found, right)
    torch.testing.assert_close(torch.autograd.grad(found, s + t), torch.autograd.grad(right, s + t))
