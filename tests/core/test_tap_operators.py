"""The tap's backward: G + scale * p * dL/dQ * |A|^(p-1) * sign(A), new and in place.

Against the formula in float64, on every back end.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from back_ends import opcheck
from layouts import DTYPES, LAST, LAYOUTS, SHAPES, STRIDES
from matrix import crossed
from operator_reference import (
    assert_gradient_matches,
    assert_tap_matches,
    reference_tap,
    tap_inputs,
)
from torch import Tensor

from at_fused import _ops

OPERATORS = torch.ops.at_fused
# (p, collapse)
Options = tuple[float, str]
FEW: list[Options] = [(2.0, "mean"), (3.5, "sum"), (2.0, "max")]
SOME_STRIDES = ["planar", "interleaved", "transposed", "unaligned"]


@crossed(p=[2.0, 1.0, 3.5, 4.0], collapse=["max", "mean", "sum"], dtype=DTYPES, layout=LAYOUTS)
def test_options_of_taps(
    backend: str, p: float, collapse: str, dtype: torch.dtype, layout: str
) -> None:
    for shape in ((2, 3, 7, 7), (3, 16, 7, 7), (2, 24, 8, 6)):
        tensors = tap_inputs(*shape, collapse=collapse, dtype=dtype, layout=layout)
        assert_tap_matches(*tensors, p, collapse)


@crossed(layout=LAYOUTS, dtype=[torch.float32, torch.bfloat16])
def test_shapes_of_taps(backend: str, layout: str, dtype: torch.dtype) -> None:
    for shape, options in itertools.product(SHAPES, FEW):
        tensors = tap_inputs(*shape, collapse=options[1], dtype=dtype, layout=layout)
        assert_tap_matches(*tensors, *options)


@crossed(
    strides=list(STRIDES),
    gradient_strides=list(STRIDES)[::-1],
    dtype=[torch.float32, torch.float64, torch.bfloat16],
)
def test_strides_of_taps(
    backend: str, strides: str, gradient_strides: str, dtype: torch.dtype
) -> None:
    for options, size in itertools.product(FEW, ((4, 6), (7, 7))):
        gradient, x, *rest = tap_inputs(2, 16, *size, collapse=options[1], dtype=dtype)
        g = STRIDES[gradient_strides](gradient)
        base = g if g._base is None else g._base
        outside = torch.ones_like(base, dtype=torch.bool)
        outside.as_strided(g.shape, g.stride(), g.storage_offset()).fill_(False)
        around = base[outside]
        assert_tap_matches(g, STRIDES[strides](x), *rest, *options)
        assert torch.equal(base[outside], around)


def test_a_strided_map_and_strided_channels(backend: str) -> None:
    gradient, x, k, channels = tap_inputs(3, 8, 5, 4, collapse="max")
    k, channels = k.t().contiguous().t(), channels.repeat(1, 2)[:, :20]
    assert_tap_matches(gradient, x, k, channels, 2.0, "max")
    assert_tap_matches(gradient, x, k, None, 2.0, "mean")


def test_an_expanded_gradient_becomes_a_new_one(backend: str) -> None:
    for options in FEW:
        _, x, *rest, channels = tap_inputs(2, 8, 4, 4, collapse=options[1])
        for gradient in (torch.randn(8, 4, 4).expand(2, 8, 4, 4), torch.ones(()).expand(x.shape)):
            found = _ops.attention_tap_backward(gradient, x, *rest, *options, channels)
            assert_gradient_matches(found, reference_tap(gradient, x, *rest, channels, *options), x)


@crossed(skip=[1, 4], collapse=["mean", "max"])
def test_in_place_on_a_view_of_tokens(backend: str, skip: int, collapse: str) -> None:
    whole, tokens = torch.randn(2, 13, 24), torch.randn(2, 13, 24)
    before = whole.clone()
    view, x = (t[:, skip:].transpose(1, 2) for t in (whole, tokens))
    k = torch.randn(2, 13 - skip)
    channels = x.abs().max(1).indices.int() if collapse == "max" else None
    expected = reference_tap(view, x, k, channels, 2.0, collapse)
    _ops.attention_tap_backward_(view, x, k, 2.0, collapse, channels)
    assert torch.equal(whole[:, :skip], before[:, :skip])
    torch.testing.assert_close(view.double(), expected, rtol=1e-6, atol=1e-6)


def test_special_values_of_a_square(backend: str) -> None:
    x, k = torch.ones(1, 4, 3, 4), torch.ones(1, 12)
    gradient = torch.full_like(x, -0.0)
    x[0, 0, 0] = torch.tensor([math.inf, -math.inf, math.nan, -0.0])
    gradient[0, 1, 0] = torch.tensor([math.inf, -math.inf, math.nan, 0.0])
    k[0, 7] = math.inf
    k[0, 8] = 0
    expected = torch.full_like(x, 0.5)
    expected[0, 0, 0] = torch.tensor([math.inf, -math.inf, math.nan, -0.0])
    expected[0, 1, 0] = torch.tensor([math.inf, -math.inf, math.nan, 0.5])
    expected[0, :, 1, 3] = math.inf
    expected[0, :, 2, 0] = 0
    for move in SOME_STRIDES:
        g, y = STRIDES[move](gradient.clone()), STRIDES[move](x)
        found = _ops.attention_tap_backward(g, y, k, 2.0, "mean")
        _ops.attention_tap_backward_(g, y, k, 2.0, "mean")
        for result in (found, g):
            torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
            assert torch.signbit(result[0, 0, 0, 3])


@crossed(strides=SOME_STRIDES, dtype=DTYPES)
def test_what_a_maximum_leaves_alone_keeps_its_bits(
    backend: str, strides: str, dtype: torch.dtype
) -> None:
    gradient, x, k, channels = tap_inputs(2, 16, 4, 6, collapse="max", dtype=dtype)
    gradient[:, ::3] = math.nan
    gradient[:, 1::3] = -0.0
    k[0] = math.nan
    channels[:, ::2] = torch.tensor([-1, -16, 16, 2**31 - 1]).repeat(6)[:12].int()
    won = torch.zeros(2, 16, 24, dtype=torch.bool)
    named = channels.view(2, 1, 24).long()
    won.scatter_(1, named.clamp(0, 15), (named >= 0) & (named < 16))
    g, y = STRIDES[strides](gradient), STRIDES[strides](x)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    found = _ops.attention_tap_backward(g, y, k, 2.0, "max", channels)
    _ops.attention_tap_backward_(g, y, k, 2.0, "max", channels)
    for result in (found, g):
        flat, before = result.flatten(2), gradient.flatten(2)
        if backend != "eager":  # which adds zeros
            same = flat.contiguous().view(bits) == before.contiguous().view(bits)
            assert same[~won].all()
        torch.testing.assert_close(flat[~won], before[~won], rtol=0, atol=0, equal_nan=True)
        assert torch.isnan(flat[0][won[0]]).all()


@pytest.mark.parametrize("collapse", ["mean", "max"])
def test_where_features_are_zero(backend: str, collapse: str) -> None:
    gradient, x, k, channels = tap_inputs(1, 3, 4, 4, collapse=collapse)
    x.zero_()
    for p in (1.0, 2.0, 3.0, 2.5):
        found = _ops.attention_tap_backward(gradient, x, k, p, collapse, channels)
        assert torch.equal(found, gradient)


# ---- PyTorch's machinery -------------------------------------------------------------------------


@pytest.mark.parametrize("options", FEW, ids=str)
def test_opcheck_taps(backend: str, options: Options) -> None:
    gradient, x, k, channels = tap_inputs(2, 3, 4, 5, collapse=options[1])
    x = x.contiguous(memory_format=LAST)
    for t in (gradient, x, k):
        t.requires_grad_()
    opcheck(backend, OPERATORS.attention_tap_backward, (gradient, x, k, *options, channels))
    plain = gradient.detach(), x.detach(), k.detach(), *options, channels
    checks = "test_schema", "test_faketensor"
    torch.library.opcheck(OPERATORS.attention_tap_backward_, plain, test_utils=checks)


def test_derivatives_of_the_new_gradient(backend: str) -> None:
    for options in FEW:
        *three, channels = tap_inputs(1, 3, 3, 4, collapse=options[1], dtype=torch.float64)
        leaves = [t.requires_grad_() for t in three]

        def tapped(*tensors: Tensor, rest: tuple[Any, ...] = (*options, channels)) -> Tensor:
            return _ops.attention_tap_backward(*tensors, *rest)

        assert torch.autograd.gradcheck(tapped, leaves, fast_mode=True)


# ---- in place ------------------------------------------------------------------------------------


def test_a_stride_that_is_never_taken_may_be_0(backend: str) -> None:
    gradient, x, k, _ = tap_inputs(2, 1, 1, 3, collapse="mean")
    assert_tap_matches(gradient.as_strided(x.shape, (3, 0, 0, 1)), x, k, None, 2.0, "mean")


@crossed(shift=[0, 1, 40], collapse=["mean", "max"])
def test_what_lies_where_the_gradient_is_written(backend: str, collapse: str, shift: int) -> None:
    """As if it lay elsewhere."""
    memory = torch.cat([torch.randn(140), torch.zeros(40)])
    x, gradient = memory[:96].view(2, 3, 4, 4), memory[shift : shift + 96].view(2, 3, 4, 4)
    k = memory[shift + 60 : shift + 92].view(2, 16)
    channels = memory.view(torch.int32)[148:180].view(2, 16) if collapse == "max" else None
    apart = [None if y is None else y.clone() for y in (gradient, x, k, channels)]
    *three, last = apart
    right = _ops.attention_tap_backward(*three, 2.0, collapse, last)
    _ops.attention_tap_backward_(gradient, x, k, 2.0, collapse, channels)
    torch.testing.assert_close(gradient, right, rtol=1e-6, atol=1e-6)


def test_the_operator_in_place_has_no_derivative() -> None:
    gradient, x, k, _ = tap_inputs(2, 3, 4, 4, collapse="mean")
    with pytest.raises(RuntimeError, match="attention_tap_backward_ has no derivative"):
        _ops.attention_tap_backward_(gradient, x.requires_grad_(), k, 2.0, "mean")


def test_a_gradient_written_in_place_is_known_to_have_changed(backend: str) -> None:
    gradient, feature = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    version = gradient._version
    OPERATORS.attention_tap_backward_(gradient, feature, torch.rand(2, 16), 2.0, "mean")
    assert gradient._version > version
