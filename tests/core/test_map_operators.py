"""Operators for maps and map losses on every back end."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from back_ends import is_slow
from layouts import DTYPES, LAYOUTS, SHAPES, STRIDES, features, strided_views
from matrix import crossed
from operator_reference import (
    MAP_LOSS,
    assert_gradient_matches,
    assert_map_loss_matches,
    assert_maps_match,
    raw_maps,
    reference_derivative,
    reference_map,
)
from torch import Tensor

from at_fused import _ops

COLLAPSES = ["mean", "sum", "max"]
EXPONENTS = [2.0, 1.0, 3.0, 4.0, 2.5]


# ---- maps ----------------------------------------------------------------------------------------


@crossed(p=EXPONENTS, collapse=COLLAPSES, dtype=DTYPES, layout=LAYOUTS)
def test_maps(backend: str, p: float, collapse: str, dtype: torch.dtype, layout: str) -> None:
    assert_maps_match([features(2, 11, 13, 9, layout=layout, dtype=dtype)], p, collapse)


def lists_of_maps(kind: str) -> list[Tensor]:
    if kind in LAYOUTS:
        return [features(*shape, layout=kind) for shape in SHAPES]
    if kind == "strides":
        return strided_views()
    if kind == "longer than one launch":
        return [features(1, 2 + i % 3, 4 + i % 2, 5) for i in range(67)]
    tokens, volumes = features(3, 30, 9, dtype=torch.bfloat16), features(2, 3, 4, 5, 6).double()
    return [features(4, 16, 8, 8, layout="interleaved"), tokens, features(2, 70, 7, 7), volumes]


@crossed(
    kind=[*LAYOUTS, "strides", "longer than one launch", "mixed"],
    collapse=["mean", "max"],
    p=[3.0, 1.0, 2.0],
)
def test_lists_of_maps(backend: str, kind: str, collapse: str, p: float) -> None:
    xs = lists_of_maps(kind)
    assert_maps_match(xs[:17] if is_slow(backend) else xs, p, collapse)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_first_of_equal_maxima_is_chosen(backend: str, layout: str) -> None:
    for shape in ((2, 24, 3, 4), (2, 16, 7, 7), (1, 300, 1, 5)):
        x = STRIDES[layout](torch.randint(-2, 3, shape).float())
        x[:, :, -1] = 0  # all channels are equal
        for dtype in DTYPES:
            _, channels = _ops.attention_map([x.to(dtype)], 2.0, "max")
            assert torch.equal(channels.long(), reference_map(x, 2.0, "max")[1])


@crossed(dtype=DTYPES, layout=LAYOUTS)
def test_maximum_of_nan_and_infinity(backend: str, dtype: torch.dtype, layout: str) -> None:
    for c, h, w in ((20, 3, 4), (16, 7, 7), (300, 1, 2)):
        x = features(2, c, h, w, layout=layout, dtype=dtype)
        x[0, 7, 0, 1] = x[0, 9, 0, 1] = math.nan
        x[0, 2, 0, 1] = x[1, 6, 0, 0] = math.inf
        x[1, 5, 0, 0] = -math.inf
        q, channels = _ops.attention_map([x], 3.0, "max")
        assert torch.isnan(q[0, 1])
        assert channels[0, 1] == 7
        assert q[1, 0] == math.inf
        assert channels[1, 0] == 5
    # Powers overflow to infinity, but the channel with the largest |x| is still chosen.
    x = torch.tensor([1e30, -2e30, 3e30]).view(1, 3, 1)
    q, channel = _ops.attention_map([x], 4.0, "max")
    assert (q.item(), channel.item()) == (math.inf, 2)


def test_powers_are_accurate_over_the_range_of_float32(backend: str) -> None:
    for p in (1.1, 1.5, 1.9, 2.7, 3.0, 5.0, 6.0, 7.7, 31.3):
        largest = math.log10(3e38 ** (1 / p)) - 0.1
        x = torch.cat([torch.logspace(-44, largest, 1000), torch.linspace(0.5, 1.5, 1000)])
        x = torch.cat([x, torch.tensor([0.0, 1.0])]).view(1, 1, -1)
        (q,) = _ops.attention_map([x], p, "sum")
        (g,) = _ops.attention_map_backward([-x], [torch.ones_like(q)], None, [0], p)
        # torch and CUDA round the exponent to fp32.
        in_fp32 = backend in ("eager", "cuda") or backend.startswith("emulator")
        rounding = 5e-7 if in_fp32 else 2e-7
        for actual, expected in ((q, x.double().pow(p)), (-g, x.double().pow(p - 1))):
            actual, expected = actual.flatten(), expected.flatten()
            normal = expected > 1e-37  # subnormal numbers have fewer digits
            assert ((actual - expected).abs() <= rounding * max(p, 10) * expected)[normal].all()
            assert (actual[~normal] <= 1.1e-37).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_powers_of_zero_infinity_and_nan(backend: str, dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0], dtype=dtype)
    x = x.view(1, 1, -1)
    for p in EXPONENTS:
        (q,) = _ops.attention_map([x], p, "sum")
        expected = x.double().abs().pow(p).to(q.dtype).flatten(1)
        torch.testing.assert_close(q, expected, equal_nan=True)
        (g,) = _ops.attention_map_backward([x], [torch.ones_like(q)], None, [0], p)
        expected = (x.double().abs().pow(p - 1) * x.double().sign()).to(dtype)
        # sign(NaN) is 0 in torch and NaN in some back ends. The map is NaN in all of them.
        numbers = ~x.isnan()
        torch.testing.assert_close(g[numbers], expected[numbers])


# ---- gradients -----------------------------------------------------------------------------------

# Gradients of the loss of two pairs with three samples, with strides that autograd may produce.
LOSS_GRADIENTS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "none": lambda g: None,
    "one": lambda g: g[0, 0],
    "of pairs": lambda g: g[0, :2],
    "of samples": lambda g: g[:2, :3].contiguous(),
    "transposed": lambda g: g[:3, :2].t(),
    "expanded samples": lambda g: g[:2, :1].expand(2, 3),
}


@crossed(
    kind=list(LOSS_GRADIENTS),
    layout=[*LAYOUTS, "tokens"],
    collapse=["sum", "max"],
    dtype=[torch.float64, torch.float32, torch.bfloat16],
)
def test_gradients_are_scaled_by_the_loss_gradient(
    backend: str, kind: str, layout: str, collapse: str, dtype: torch.dtype
) -> None:
    if layout == "tokens":
        xs = [features(3, 40, 12, layout="interleaved"), features(3, 5, 30, dtype=dtype)]
        skips = [2, 0]
    else:
        xs = [features(3, 6, 9, 8, layout=layout), features(3, 5, 4, 7, layout=layout, dtype=dtype)]
        skips = []
    parts = [x[:, :, n:] for x, n in zip(xs, skips or [0, 0], strict=True)]
    ks = [torch.randn_like(q) for q in _ops.attention_map(xs, 3.0, "sum", skips)]
    largest = [reference_map(x, 3.0, collapse)[1] for x in parts]
    channels = [c.int() for c in largest] if collapse == "max" else []
    for loss_dtype in (torch.float32, torch.float64):
        loss_gradient = LOSS_GRADIENTS[kind](torch.randn(6, 6, dtype=loss_dtype))
        factors = torch.ones(()) if loss_gradient is None else loss_gradient
        factors = (factors if factors.dim() == 2 else factors.view(-1, 1)).expand(2, 3)
        actual = _ops.attention_map_backward(xs, ks, loss_gradient, [1, 0], 3.0, skips, channels)
        for i, (x, k, g) in enumerate(zip(xs, ks, actual, strict=True)):
            expected = torch.zeros_like(x, dtype=torch.float64)
            scaled = k.double() * factors[1 - i].unsqueeze(1)
            derivative = reference_derivative(parts[i], scaled, 3.0, largest[i])
            expected[:, :, x.shape[2] - parts[i].shape[2] :] = derivative
            assert_gradient_matches(g, expected, x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_reaches_only_the_channels_of_the_maxima(backend: str, layout: str) -> None:
    x = features(2, 6, 4, 4, layout=layout)
    q, channels = _ops.attention_map([x], 2.0, "max")
    k = torch.full_like(q, math.nan)
    (g,) = _ops.attention_map_backward([x], [k], None, [0], 2.0, [], [channels])
    assert torch.isnan(g).sum() == q.numel()
    assert (g[~torch.isnan(g)] == 0).all()
    # Channels out of range must not be written.
    channels = torch.tensor([-1, 6, -6, 2**31 - 1]).repeat(2, 4).int()
    (g,) = _ops.attention_map_backward([x], [k], None, [0], 2.0, [], [channels])
    assert (g == 0).all()


# ---- the loss of maps ----------------------------------------------------------------------------


@crossed(
    reduction=["sum", "none", "sample"],
    form=["code", "paper"],
    eps_mode=["add", "max"],
    eps=[1e-6, 1e-12, 2.0],
)
def test_map_loss(backend: str, form: str, eps_mode: str, eps: float, reduction: str) -> None:
    shapes = [(3, 7), (3, 300), (3, 64), (3, 2)]
    for weights in ([], [1.0, 0.25, -3.0, 0.0]):
        for dtypes in ((torch.float32,) * 2, (torch.float32, torch.float64), (torch.float64,) * 2):
            maps = (raw_maps(*shapes, dtype=dtype) for dtype in dtypes)
            assert_map_loss_matches(*maps, weights, form, reduction, eps_mode, eps)


def test_map_loss_of_many_samples_and_pairs(backend: str) -> None:
    samples, pairs = (70, 17) if is_slow(backend) else (300, 37)
    many = raw_maps((samples, 5)), raw_maps((samples, 5))
    for reduction in ("sum", "sample"):
        assert_map_loss_matches(*many, [2.0], "code", reduction, "max", 1e-12)
        students, teachers = (raw_maps(*[(2, 3 + i % 4) for i in range(pairs)]) for _ in range(2))
        weights = [1.0 + i for i in range(pairs)]
        assert_map_loss_matches(students, teachers, weights, "paper", reduction, "add", 1e-6)
    batches = raw_maps((3, 9), (1, 4), (260, 2)), raw_maps((3, 9), (1, 4), (260, 2))
    for reduction in ("sum", "none"):
        assert_map_loss_matches(*batches, [], "paper", reduction, "max", 1e-12)


def test_map_loss_of_strided_maps(backend: str) -> None:
    base = raw_maps((12, 40))[0]
    students, teachers = [base[::2, 3:23], base.t()[:5]], [base[6:, ::2], base[:5, :12]]
    assert_map_loss_matches(students, teachers, [], "code", "none", "max", 1e-12)


def test_map_loss_gradients_only_where_requested(backend: str) -> None:
    s, t = raw_maps((3, 6), (2, 4)), raw_maps((3, 6), (2, 4))
    options = [], "code", "sum", "max", 1e-12
    both = MAP_LOSS(s, t, *options, True, True)[1]
    assert MAP_LOSS(s, t, *options, False, False)[1] == []
    for i, flags in enumerate(((True, False), (False, True))):
        gradients = MAP_LOSS(s, t, *options, *flags)[1]
        assert all(map(torch.equal, gradients, both[2 * i : 2 * i + 2]))
        assert len(gradients) == 2
