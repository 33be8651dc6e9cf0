"""The operators of maps: sums, maxima, their gradients, and losses of maps.

Against the formulas in float64, written out here, on every back end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import EVERY, opcheck, slow, use
from test_contract import LAYOUTS, features, strided_views
from torch import Tensor

from at_fused import _ops

MAP_LOSS = torch.ops.at_fused.map_loss.default
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# Of each collapse.
EXPONENTS: dict[str, tuple[float, ...]] = {
    "mean": (2.0, 1.0, 3.0, 2.5),
    "sum": (2.0, 4.0),
    "max": (1.0, 2.0, 3.0, 4.0, 2.5),
}
# Rounding of a sum of powers in fp32, as a share of the sum.
ROUNDING = {torch.float64: 1e-13}


# ---- the formulas --------------------------------------------------------------------------------


def reference_map(x: Tensor, p: float, collapse: str) -> tuple[Tensor, Tensor | None]:
    """The map (B, N) and, for a maximum, the first channel that has it."""
    a = x.flatten(2).abs()
    if collapse == "max":
        number = torch.arange(a.shape[1], device=x.device).view(1, -1, 1)
        first = torch.where(a == a.amax(1, keepdim=True), number, a.shape[1]).amin(1)
        return a.gather(1, first.unsqueeze(1)).squeeze(1).pow(p), first
    return a.pow(p).mean(1) if collapse == "mean" else a.pow(p).sum(1), None


def assert_maps_match(
    xs: Sequence[Tensor],
    p: float,
    collapse: str = "mean",
    *,
    gradients: bool = True,
) -> None:
    """Maps, winners and gradients of a list against the formulas in float64."""
    leaves = [x.detach().requires_grad_(gradients) for x in xs]
    doubles = [x.detach().double().requires_grad_(gradients) for x in xs]
    found = _ops.attention_map(leaves, p, collapse)
    maps, channels = found[: len(xs)], found[len(xs) :]
    assert len(channels) == (len(xs) if collapse == "max" else 0)
    for i, (x, double, q) in enumerate(zip(leaves, doubles, maps, strict=True)):
        right, first = reference_map(double, p, collapse)
        assert q.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
        assert q.shape == right.shape
        bound = ROUNDING.get(x.dtype, 3e-6) * right.detach()
        assert ((q.detach().double() - right.detach()).abs() <= bound + 1e-300).all()
        if first is not None:
            assert channels[i].dtype == torch.int32
            assert torch.equal(channels[i].long(), first)
        if not gradients:
            continue
        upstream = torch.linspace(0.5, 1.5, q.numel(), dtype=q.dtype, device=q.device).view_as(q)
        (g,) = torch.autograd.grad(q, x, upstream, retain_graph=True)
        (r,) = torch.autograd.grad(right, double, upstream.double())
        assert_gradient_matches(g, r, x)


def assert_gradient_matches(g: Tensor, r: Tensor, x: Tensor) -> None:
    assert g.dtype == x.dtype
    assert g.stride() == torch.empty_like(x).stride()
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5}
    epsilon = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
    error = (g.double() - r).abs()
    share = epsilon.get(x.dtype, 0) * r.abs()
    smallest = 2.0**-24 if x.dtype == torch.float16 else 0.0
    assert (error <= share + tolerance.get(x.dtype, 2e-5) * r.abs().max() + smallest).all()


# ---- maps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("collapse", EXPONENTS)
def test_maps(backend: str, collapse: str, dtype: torch.dtype, layout: str) -> None:
    x = features(2, 11, 13, 9, layout=layout, dtype=dtype)
    for p in EXPONENTS[collapse]:
        assert_maps_match([x], p, collapse)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape",
    [
        (3, 5, 29),
        (2, 7, 5, 6, 7),
        (2, 3, 2, 3, 2, 2),
        (2, 64, 14, 14),
        (2, 3, 1, 1),
        (1, 1, 9, 8),
        (1, 300, 2, 3),
        (70, 3, 4, 4),
        (1, 2, 9000),
        (1, 64, 40, 64),  # in several turns of a block of the CUDA kernels
    ],
    ids=str,
)
@pytest.mark.parametrize("collapse", ["mean", "max"])
def test_ranks_and_shapes(backend: str, collapse: str, shape: tuple[int, ...], layout: str) -> None:
    x = features(*shape, layout=layout)
    for p in (3.0, 1.0):
        assert_maps_match([x], p, collapse)


@pytest.mark.parametrize("collapse", EXPONENTS)
def test_lists_of_unequal_features(backend: str, collapse: str) -> None:
    xs = [
        features(4, 8, 16, 16),
        features(4, 16, 8, 8, layout="interleaved"),
        features(3, 30, 9, dtype=torch.bfloat16),
        features(2, 70, 7, 7),
        features(2, 3, 4, 5, 6, dtype=torch.float64),
    ]
    assert_maps_match(xs, 2.0, collapse)


def test_lists_longer_than_a_launch_carries(backend: str) -> None:
    count = 17 if slow(backend) else 67
    xs = [features(1, 2 + i % 3, 4 + i % 2, 5) for i in range(count)]
    for collapse in ("mean", "max"):
        assert_maps_match(xs, 2.0, collapse)


@pytest.mark.parametrize("collapse", ["mean", "max"])
@pytest.mark.parametrize("view", strided_views())
def test_strides(backend: str, view: str, collapse: str) -> None:
    for p in (2.0, 1.0):
        assert_maps_match([strided_views()[view]], p, collapse)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 24, 3, 4), (2, 16, 7, 7), (1, 300, 1, 5)], ids=str)
def test_of_equal_channels_the_first_wins(
    backend: str, shape: tuple[int, ...], layout: str
) -> None:
    x = torch.randint(-2, 3, shape).float()
    x[:, :, -1] = 0  # all alike
    if layout == "interleaved":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    for dtype in DTYPES:
        _, channels = _ops.attention_map([x.to(dtype)], 2.0, "max")
        assert torch.equal(channels.long(), reference_map(x, 2.0, "max")[1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_wins_and_infinity_is_a_number(backend: str, dtype: torch.dtype, layout: str) -> None:
    for c, h, w in ((20, 3, 4), (16, 7, 7), (300, 1, 2)):
        x = features(2, c, h, w, layout=layout, dtype=dtype)
        x[0, 7, 0, 1] = float("nan")
        x[0, 9, 0, 1] = float("nan")
        x[0, 2, 0, 1] = float("inf")
        x[1, 5, 0, 0] = -float("inf")
        x[1, 6, 0, 0] = float("inf")
        q, channels = _ops.attention_map([x], 3.0, "max")
        assert torch.isnan(q[0, 1])
        assert channels[0, 1] == 7
        assert q[1, 0] == float("inf")
        assert channels[1, 0] == 5


def test_powers_beyond_the_largest_number_have_one_winner(backend: str) -> None:
    x = torch.tensor([1e30, -2e30, 3e30]).view(1, 3, 1)
    q, channel = _ops.attention_map([x], 4.0, "max")
    assert q.item() == math.inf
    assert channel.item() == 2


@pytest.mark.parametrize("p", [1.1, 1.5, 1.9, 2.7, 3.0, 5.0, 6.0, 7.7, 31.3])
def test_powers_keep_their_digits(backend: str, p: float) -> None:
    """Those of any exponent, over fp32's whole range."""
    largest = math.log10(3e38 ** (1 / p)) - 0.1
    x = torch.cat([torch.logspace(-44, largest, 1000), torch.linspace(0.5, 1.5, 1000)])
    x = torch.cat([x, torch.tensor([0.0, 1.0])]).view(1, 1, -1)
    (q,) = _ops.attention_map([x], p, "sum")
    (g,) = _ops.attention_map_backward([-x], [torch.ones_like(q)], None, [0], p)
    rounding = 5e-7 if backend == "eager" else 2e-7  # torch's power takes the exponent in fp32
    for found, right in ((q, x.double().pow(p)), (-g, x.double().pow(p - 1))):
        found, right = found.flatten(), right.flatten()
        normal = right > 1e-37  # less have fewer digits, or are 0
        assert ((found - right).abs() <= rounding * max(p, 10) * right)[normal].all()
        assert (found[~normal] <= 1.1e-37).all()


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, 4.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_zero_infinity_and_nan(backend: str, dtype: torch.dtype, p: float) -> None:
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0], dtype=dtype)
    x = x.view(1, 1, -1)
    (found,) = _ops.attention_map([x], p, "sum")
    right = x.double().abs().pow(p).to(found.dtype).flatten(1)
    torch.testing.assert_close(found, right, equal_nan=True)
    (found,) = _ops.attention_map_backward([x], [torch.ones_like(found)], None, [0], p)
    right = (x.double().abs().pow(p - 1) * x.double().sign()).to(dtype)
    # The sign of NaN is NaN here or there, and 0 in torch; the map's gradient is NaN in any case.
    known = ~x.isnan()
    torch.testing.assert_close(found[known], right[known])


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gradient", [None, torch.tensor(-2.0), torch.tensor([3.0, 0.5])], ids=str)
@pytest.mark.parametrize("collapse", EXPONENTS)
def test_gradients_times_that_of_the_loss(
    backend: str, collapse: str, gradient: Tensor | None, layout: str
) -> None:
    p = EXPONENTS[collapse][0]
    xs = [features(2, 6, 9, 8, layout=layout), features(3, 5, 4, 7, layout=layout).double()]
    gradient = None if gradient is None else gradient.to(xs[0].device)
    doubles = [x.double().requires_grad_() for x in xs]
    right = [reference_map(x, p, collapse) for x in doubles]
    ks = [torch.randn_like(q).to(x.dtype) for x, (q, _) in zip(xs, right, strict=True)]
    channels = [c.int() for _, c in right] if collapse == "max" else []
    found = _ops.attention_map_backward(xs, ks, gradient, [1, 0], p, [], channels)
    for i, (x, k, g) in enumerate(zip(xs, ks, found, strict=True)):
        above = 1.0 if gradient is None else gradient.expand(2)[1 - i].double()
        scale = xs[i].shape[1] if collapse == "mean" else 1  # k is what stands before the slope
        upstream = k.double() * above * scale / p
        (r,) = torch.autograd.grad(right[i][0], doubles[i], upstream)
        assert_gradient_matches(g, r, x)


STEPS = {
    "dense": lambda g: g,
    "transposed": lambda g: g.t().contiguous().t(),
    "steps": lambda g: torch.stack([g, -g], 2).flatten(1)[:, ::2],
    "expanded pairs": lambda g: g[:1].expand(2, 3),
    "expanded samples": lambda g: g[:, :1].expand(2, 3),
}


@pytest.mark.parametrize("layout", [*LAYOUTS, "tokens"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("steps", STEPS)
def test_a_loss_gradient_of_each_sample(
    backend: str, steps: str, dtype: torch.dtype, layout: str
) -> None:
    """Strides of any kind: autograd expands what it is given."""
    if layout == "tokens":
        xs = [features(3, 40, 12, layout="interleaved"), features(3, 5, 30).bfloat16()]
        skips = [2, 0]
    else:
        xs = [features(3, 6, 9, 8, layout=layout), features(3, 5, 4, 7, layout=layout).bfloat16()]
        skips = []
    above = STEPS[steps](torch.randn(2, 3, dtype=dtype))
    mapped = [x[:, :, n:] for x, n in zip(xs, skips or [0, 0], strict=True)]
    ks = [torch.randn(3, math.prod(x.shape[2:])) for x in mapped]
    for collapse in ("sum", "max"):
        right = [reference_map(x.double(), 3.0, collapse)[1] for x in mapped]
        channels = [c.int() for c in right] if collapse == "max" else []
        found = _ops.attention_map_backward(xs, ks, above, [1, 0], 3.0, skips, channels)
        for i, (x, k, g) in enumerate(zip(xs, ks, found, strict=True)):
            leaf = mapped[i].double().requires_grad_()
            q, _ = reference_map(leaf, 3.0, collapse)
            upstream = k.double() * above[1 - i].double().unsqueeze(1) / 3
            (r,) = torch.autograd.grad(q, leaf, upstream)
            skip = skips[i] if skips else 0
            assert not (g[:, :, :skip].any() if skip else False)
            assert g.stride() == torch.empty_like(x).stride()
            share = 2.0**-7 if x.dtype == torch.bfloat16 else 0.0
            rest = g[:, :, skip:].double()
            bound = share * r.abs() + 2e-5 * r.abs().max()
            assert ((rest - r).abs() <= bound).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_channels_that_did_not_win_have_none_of_a_nan(backend: str, layout: str) -> None:
    x = features(2, 6, 4, 4, layout=layout)
    q, channels = _ops.attention_map([x], 2.0, "max")
    k = torch.full_like(q, math.nan)
    (g,) = _ops.attention_map_backward([x], [k], None, [0], 2.0, [], [channels])
    assert torch.isnan(g).sum() == q.numel()
    assert (g[~torch.isnan(g)] == 0).all()


@pytest.mark.parametrize("collapse", ["mean", "max"])
def test_second_derivatives(fast_backend: str, collapse: str) -> None:
    x = features(1, 3, 3, 4, dtype=torch.float64).requires_grad_()

    def first_map(x: Tensor) -> Tensor:
        return _ops.attention_map([x], 3.0, collapse)[0]

    assert torch.autograd.gradcheck(first_map, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(first_map, (x,), fast_mode=True)


# ---- the loss of maps ----------------------------------------------------------------------------


def reference_map_loss(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    weights: Sequence[float],
    form: str,
    reduction: str,
    eps_mode: str,
    eps: float,
) -> Tensor:
    def normalize(q: Tensor) -> Tensor:
        norm = q.norm(dim=1, keepdim=True)
        return q / (norm.clamp_min(eps) if eps_mode == "max" else norm + eps)

    losses = []
    for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
        d = normalize(s) - normalize(t)
        loss = d.square().mean(1) if form == "code" else d.norm(dim=1)
        losses.append((weights[i] if weights else 1.0) * loss)
    if reduction == "sample":
        return torch.stack(losses)
    means = torch.stack([loss.mean() for loss in losses])
    return means.sum() if reduction == "sum" else means


def raw_maps(*shapes: tuple[int, int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64).square().to(dtype) for shape in shapes]


def assert_map_loss_matches(
    students: Sequence[Tensor], teachers: Sequence[Tensor], weights: list[float], *options: Any
) -> None:
    leaves = [q.detach().requires_grad_() for q in (*students, *teachers)]
    doubles = [q.detach().double().requires_grad_() for q in leaves]
    n = len(students)
    loss = _ops.map_loss(leaves[:n], leaves[n:], weights, *options)
    given = [q.detach() for q in leaves]
    same, maps = MAP_LOSS(given[:n], given[n:], weights, *options, True, True)
    assert torch.equal(same, loss)
    expected = reference_map_loss(doubles[:n], doubles[n:], weights, *options)
    fp64 = any(q.dtype == torch.float64 for q in leaves)
    assert loss.dtype == (torch.float64 if fp64 else torch.float32)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-11 if fp64 else 1e-6, atol=1e-14)
    right = torch.autograd.grad(expected.sum(), doubles, retain_graph=True)
    upstream = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).view_as(loss).to(loss.device)
    found = torch.autograd.grad(loss, leaves, upstream)
    above = torch.autograd.grad(expected, doubles, upstream.double())
    for q, k, r, g, a in zip(leaves, maps, right, found, above, strict=True):
        tolerance = 1e-10 if q.dtype == torch.float64 else 2e-6
        assert k.dtype == g.dtype == q.dtype
        assert (k.double() - r).abs().max() <= tolerance * r.abs().max() + 1e-15
        assert (g.double() - a).abs().max() <= tolerance * a.abs().max() + 1e-15


@pytest.mark.parametrize("reduction", ["sum", "none", "sample"])
@pytest.mark.parametrize("eps_mode", ["max", "add"])
@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("eps", [1e-12, 1e-6, 2.0])
def test_map_loss(backend: str, form: str, eps_mode: str, eps: float, reduction: str) -> None:
    shapes = [(3, 7), (3, 300), (3, 64), (3, 2)]
    options = form, reduction, eps_mode, eps
    for weights in ([], [1.0, 0.25, -3.0, 0.0]):
        for dtypes in ((torch.float32,) * 2, (torch.float32, torch.float64), (torch.float64,) * 2):
            students, teachers = (raw_maps(*shapes, dtype=d) for d in dtypes)
            assert_map_loss_matches(students, teachers, weights, *options)


def test_map_loss_of_many_samples_and_pairs(backend: str) -> None:
    samples, pairs = (70, 17) if slow(backend) else (700, 37)
    many = raw_maps((samples, 5)), raw_maps((samples, 5))
    for reduction in ("sum", "sample"):
        assert_map_loss_matches(*many, [2.0], "code", reduction, "max", 1e-12)
        students = raw_maps(*[(2, 3 + i % 4) for i in range(pairs)])
        teachers = raw_maps(*[(2, 3 + i % 4) for i in range(pairs)])
        weights = [1.0 + i for i in range(pairs)]
        assert_map_loss_matches(students, teachers, weights, "paper", reduction, "add", 1e-6)
    batches = raw_maps((3, 9), (1, 4), (260, 2)), raw_maps((3, 9), (1, 4), (260, 2))
    for reduction in ("sum", "none"):
        assert_map_loss_matches(*batches, [], "paper", reduction, "max", 1e-12)


def test_map_loss_of_strided_maps(backend: str) -> None:
    base = raw_maps((12, 40))[0]
    students, teachers = [base[::2, 3:30], base.t()[:5]], [base[6:, ::2][:, :20], base[:5, :12]]
    students[0], teachers[0] = students[0][:, :20], teachers[0][:6]
    assert_map_loss_matches(students, teachers, [], "code", "none", "max", 1e-12)


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("eps_mode", ["max", "add"])
def test_zero_and_equal_maps(backend: str, form: str, eps_mode: str) -> None:
    eps = 1e-3
    s, t = raw_maps((4, 6))[0], raw_maps((4, 6))[0]
    s[0] = 0
    s[1] = t[1] = 0
    s[2] = t[2]
    t[3] *= 1e-6  # below eps
    loss, (ks, kt) = MAP_LOSS([s], [t], [], form, "sample", eps_mode, eps, True, True)
    assert torch.isfinite(ks).all()
    assert torch.isfinite(kt).all()
    assert (loss[0, 1:3] == 0).all()
    assert (ks[1:3] == 0).all()
    assert (kt[1:3] == 0).all()
    # Without the samples where the formula written out divides 0 by 0.
    assert_map_loss_matches([s[3:]], [t[3:]], [], form, "sample", eps_mode, eps)
    right = reference_map_loss([s.double()], [t.double()], [], form, "sample", eps_mode, eps)
    torch.testing.assert_close(loss.double(), right, rtol=1e-6, atol=0)
    # A zero map is divided by eps, whatever it is.
    g = reference_map_loss
    near = torch.full_like(s[:1], 1e-12).double().requires_grad_()
    (slope,) = torch.autograd.grad(
        g([near], [t[:1].double()], [], form, "sample", eps_mode, eps).sum(), near
    )
    assert (ks[0].double() - slope[0]).abs().max() <= 1e-4 * slope.abs().max()


def test_nan_and_infinite_maps(backend: str) -> None:
    for value in (math.nan, math.inf):
        for eps_mode in ("max", "add"):
            s, t = raw_maps((3, 6), (3, 6))
            s[1, 2] = value
            loss, (k,) = MAP_LOSS([s], [t], [], "code", "sample", eps_mode, 1e-6, True, False)
            assert torch.isnan(loss[0]).tolist() == [False, True, False]
            assert torch.isnan(k[1]).any()
            assert torch.isfinite(k[::2]).all()


def test_map_loss_gradients_only_where_asked_for(backend: str) -> None:
    s, t = raw_maps((3, 6), (2, 4)), raw_maps((3, 6), (2, 4))
    options = [], "code", "sum", "max", 1e-12
    both = MAP_LOSS(s, t, *options, True, True)[1]
    assert MAP_LOSS(s, t, *options, False, False)[1] == []
    for i, flags in enumerate(((True, False), (False, True))):
        found = MAP_LOSS(s, t, *options, *flags)[1]
        assert all(torch.equal(a, b) for a, b in zip(found, both[2 * i :], strict=False))
        assert len(found) == 2


# ---- PyTorch's machinery -------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", [None, 2.0, [2.0, 3.0]], ids=str)
@pytest.mark.parametrize("collapse", ["mean", "max"])
def test_opcheck_maps(backend: str, collapse: str, gradient: float | list[float] | None) -> None:
    p = EXPONENTS[collapse][0]
    xs = [torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)]
    operators = torch.ops.at_fused
    opcheck(backend, operators.attention_map, (xs, p, collapse))
    maps = _ops.attention_map([x.detach() for x in xs], p, collapse)
    ks = [q.requires_grad_() for q in maps[:2]]
    above = None if gradient is None else torch.tensor(gradient)
    arguments = (xs, ks, above, [1, 0], p, [], maps[2:])
    opcheck(backend, operators.attention_map_backward, arguments)


@pytest.mark.parametrize("reduction", ["sum", "none", "sample"])
@pytest.mark.parametrize("eps_mode", ["max", "add"])
def test_opcheck_map_loss(backend: str, eps_mode: str, reduction: str) -> None:
    s, t = raw_maps((2, 6), (2, 4)), raw_maps((2, 6), (2, 4))
    for q in (*s, *t):
        q.requires_grad_()
    options = [1.0, 0.5], "code", reduction, eps_mode, 1e-6, True, True
    opcheck(backend, torch.ops.at_fused.map_loss, (s, t, *options))


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_direct_calls_of_maps_are_checked(name: str) -> None:
    message = "collapse must be 'mean', 'sum' or 'max', got 'median'"
    with use(name), pytest.raises(RuntimeError, match=message):
        _ops.attention_map([torch.randn(2, 3, 4, 4)], 2.0, "median")


@pytest.mark.parametrize(
    ("k", "channels", "message"),
    [
        (torch.randn(2, 4), [], r"must be \(B, N\)"),
        (torch.randn(2, 16), [torch.zeros(2, 16)], "of int32"),
        (torch.randn(2, 16), [torch.zeros(2, 15).int()], "of int32"),
        (torch.randn(2, 16), [torch.zeros(2, 16).int()] * 2, "per feature"),
    ],
)
@pytest.mark.parametrize("name", EVERY)
def test_direct_calls_of_gradients_are_checked(
    name: str, k: Tensor, channels: list[Tensor], message: str
) -> None:
    x = torch.randn(2, 3, 4, 4)
    with use(name), pytest.raises(RuntimeError, match=message):
        _ops.attention_map_backward([x], [k], None, [0], 2.0, [], channels)


@pytest.mark.parametrize("name", EVERY)
def test_channels_that_are_none_have_no_gradient(name: str) -> None:
    x = torch.randn(2, 8, 4, 4)
    channels = torch.tensor([-1, 8, -8, 2**31 - 1]).repeat(2, 4).int()
    for y in (x, x.to(memory_format=torch.channels_last)):
        with use(name):
            (g,) = _ops.attention_map_backward(
                [y], [torch.ones(2, 16)], None, [0], 2.0, [], [channels]
            )
        assert (g == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": []}, "as many teachers"),
        ({"teacher": [torch.ones(2, 5)]}, "both of a pair of one size"),
        ({"student": [torch.ones(2, 6).half()]}, "float32 or float64"),
        ({"student": [torch.ones(2, 6, 1)]}, r"maps must be \(B, N\)"),
        ({"student": [torch.ones(0, 6)], "teacher": [torch.ones(0, 6)]}, "not empty"),
        ({"weights": [1.0, 2.0]}, "a weight per pair"),
        ({"form": "book"}, "form must be"),
        ({"reduction": "mean"}, "reduction must be 'sum', 'none' or 'sample'"),
        ({"eps_mode": "min"}, "eps_mode must be 'max' or 'add'"),
        ({"eps": 0.0}, "eps must be"),
        (
            {
                "student": [torch.ones(2, 6), torch.ones(3, 6)],
                "teacher": [torch.ones(2, 6), torch.ones(3, 6)],
                "reduction": "sample",
            },
            "one batch size",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", EVERY)
def test_direct_calls_of_map_loss_are_checked(
    name: str, change: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {
        "student": [torch.ones(2, 6)],
        "teacher": [torch.ones(2, 6)],
        "weights": [],
        "form": "code",
        "reduction": "sum",
        "eps_mode": "max",
        "eps": 1e-12,
        "student_grad": False,
        "teacher_grad": False,
    }
    with use(name), pytest.raises(RuntimeError, match=message):
        MAP_LOSS(*(arguments | change).values())
