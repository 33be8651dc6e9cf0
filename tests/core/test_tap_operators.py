"""The tap's backward operators, out of place and in place, against the formula in float64.

The gradient is G + scale * p * dL/dQ * |A|^(p-1) * sign(A).
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from layouts import DTYPES, LAYOUTS, SHAPES, STRIDES
from matrix import crossed
from operator_reference import (
    assert_gradient_matches,
    assert_tap_matches,
    reference_tap,
    tap_inputs,
)

from at_fused import _ops

OPERATORS = torch.ops.at_fused
# (p, collapse)
Options = tuple[float, str]
SOME_OPTIONS: list[Options] = [(2.0, "mean"), (3.5, "sum"), (2.0, "max")]
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
    for shape, options in itertools.product(SHAPES, SOME_OPTIONS):
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
    for options, size in itertools.product(SOME_OPTIONS, ((4, 6), (7, 7))):
        gradient, x, *rest = tap_inputs(2, 16, *size, collapse=options[1], dtype=dtype)
        g = STRIDES[gradient_strides](gradient)
        base = g if g._base is None else g._base
        is_outside = torch.ones_like(base, dtype=torch.bool)
        is_outside.as_strided(g.shape, g.stride(), g.storage_offset()).fill_(False)
        before = base[is_outside]
        assert_tap_matches(g, STRIDES[strides](x), *rest, *options)
        assert torch.equal(base[is_outside], before)


def test_strided_maps_and_channels(backend: str) -> None:
    gradient, x, k, channels = tap_inputs(3, 8, 5, 4, collapse="max")
    k, channels = k.t().contiguous().t(), channels.repeat(1, 2)[:, :20]
    assert_tap_matches(gradient, x, k, channels, 2.0, "max")
    assert_tap_matches(gradient, x, k, None, 2.0, "mean")
    # A stride of 0 in a dimension of size 1 is not an expanded gradient.
    gradient, x, k, _ = tap_inputs(2, 1, 1, 3, collapse="mean")
    assert_tap_matches(gradient.as_strided(x.shape, (3, 0, 0, 1)), x, k, None, 2.0, "mean")


def test_expanded_gradients_out_of_place(backend: str) -> None:
    for options in SOME_OPTIONS:
        _, x, *rest, channels = tap_inputs(2, 8, 4, 4, collapse=options[1])
        for gradient in (torch.randn(8, 4, 4).expand(2, 8, 4, 4), torch.ones(()).expand(x.shape)):
            actual = _ops.attention_tap_backward(gradient, x, *rest, *options, channels)
            expected = reference_tap(gradient, x, *rest, channels, *options)
            assert_gradient_matches(actual, expected, x)


@crossed(strides=SOME_STRIDES, dtype=DTYPES)
def test_channels_without_the_maximum_keep_their_bits(
    backend: str, strides: str, dtype: torch.dtype
) -> None:
    gradient, x, k, channels = tap_inputs(2, 16, 4, 6, collapse="max", dtype=dtype)
    gradient[:, ::3] = math.nan
    gradient[:, 1::3] = -0.0
    k[0] = math.nan
    channels[:, ::2] = torch.tensor([-1, -16, 16, 2**31 - 1]).repeat(6)[:12].int()
    is_maximum = torch.arange(16).view(16, 1) == channels.unsqueeze(1)
    g, y = STRIDES[strides](gradient), STRIDES[strides](x)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    actual = _ops.attention_tap_backward(g, y, k, 2.0, "max", channels)
    _ops.attention_tap_backward_(g, y, k, 2.0, "max", channels)
    before = gradient.flatten(2)[~is_maximum]
    for result in (actual.flatten(2), g.flatten(2)):
        if backend == "eager":  # it adds zeros, which turns -0.0 into 0.0
            torch.testing.assert_close(result[~is_maximum], before, rtol=0, atol=0, equal_nan=True)
        else:
            assert torch.equal(result[~is_maximum].view(bits), before.view(bits))
        assert torch.isnan(result[0][is_maximum[0]]).all()


# ---- in place ------------------------------------------------------------------------------------


def test_in_place_operator_changes_the_version_and_has_no_derivative(backend: str) -> None:
    gradient, x, k, _ = tap_inputs(2, 3, 4, 4, collapse="mean")
    version = gradient._version
    OPERATORS.attention_tap_backward_(gradient, x, k, 2.0, "mean")
    assert gradient._version > version
    with pytest.raises(RuntimeError, match="attention_tap_backward_ has no derivative"):
        _ops.attention_tap_backward_(gradient, x.requires_grad_(), k, 2.0, "mean")


@crossed(shift=[0, 1, 40], collapse=["mean", "max"])
def test_inputs_that_overlap_the_gradient(backend: str, collapse: str, shift: int) -> None:
    """Require the result of inputs in memory of their own."""
    memory = torch.randn(140)
    x, gradient = memory[:96].view(2, 3, 4, 4), memory[shift : shift + 96].view(2, 3, 4, 4)
    k = memory[shift + 60 : shift + 92].view(2, 16)
    channels = None
    if collapse == "max":
        channels = memory.view(torch.int32)[shift + 20 : shift + 52].view(2, 16)
        channels.copy_(torch.randint(3, (2, 16)))
    *copies, channels_copy = (None if y is None else y.clone() for y in (gradient, x, k, channels))
    expected = _ops.attention_tap_backward(*copies, 2.0, collapse, channels_copy)
    _ops.attention_tap_backward_(gradient, x, k, 2.0, collapse, channels)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6)
