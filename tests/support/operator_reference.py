"""Comparisons of the operators for maps, map losses and taps with their formulas in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from layouts import features
from reference import first_of_largest, raw_map, reference_loss
from torch import Tensor

from at_fused import _ops

MAP_LOSS = torch.ops.at_fused.map_loss.default


def map_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a map of a feature with this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_gradient_matches(g: Tensor, expected: Tensor, x: Tensor) -> None:
    assert g.dtype == x.dtype
    assert g.stride() == torch.empty_like(x).stride()
    tolerance = 1e-11 if x.dtype == torch.float64 else 2e-5
    share = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}.get(x.dtype, 0.0)
    smallest = 2.0**-24 if x.dtype == torch.float16 else 0.0
    bound = share * expected.abs() + tolerance * expected.abs().max() + smallest
    assert ((g.double() - expected).abs() <= bound).all()


# ---- maps ----------------------------------------------------------------------------------------


def reference_map(x: Tensor, p: float, collapse: str) -> tuple[Tensor, Tensor | None]:
    """Return the map (B, N) and, for collapse="max", the first channel with the maximum."""
    x = x.flatten(2)
    channels = first_of_largest(x).squeeze(1) if collapse == "max" else None
    return raw_map(x, p, collapse), channels


def reference_derivative(x: Tensor, k: Tensor, p: float, channels: Tensor | None) -> Tensor:
    """Compute k |A|^(p-1) sign(A), with ``channels`` only at those channels."""
    a = x.double().flatten(2)
    derivative = k.double().unsqueeze(1) * a.abs().pow(p - 1) * a.sign()
    if channels is not None:
        number = torch.arange(x.shape[1], device=x.device).view(1, -1, 1)
        derivative = torch.where(number == channels.unsqueeze(1), derivative, 0.0)
    return derivative.view(x.shape)


def assert_maps_match(xs: Sequence[Tensor], p: float, collapse: str = "mean") -> None:
    """Check maps, channels of the maxima and gradients of a list of features."""
    leaves = [x.detach().requires_grad_() for x in xs]
    doubles = [x.detach().double().requires_grad_() for x in xs]
    outputs = _ops.attention_map(leaves, p, collapse)
    maps, channels = outputs[: len(xs)], outputs[len(xs) :]
    assert len(channels) == (len(xs) if collapse == "max" else 0)
    upstream = [torch.linspace(0.5, 1.5, q.numel()).to(q).view_as(q) for q in maps]
    gradients = torch.autograd.grad(maps, leaves, upstream)
    for i, (x, double, q) in enumerate(zip(leaves, doubles, maps, strict=True)):
        expected, expected_channels = reference_map(double, p, collapse)
        assert (q.dtype, q.shape) == (map_dtype(x.dtype), expected.shape)
        bound = (1e-13 if x.dtype == torch.float64 else 3e-6) * expected + 1e-300
        assert ((q.double() - expected).abs() <= bound).all()
        if expected_channels is not None:
            assert channels[i].dtype == torch.int32
            assert torch.equal(channels[i].long(), expected_channels)
        (gradient,) = torch.autograd.grad(expected, double, upstream[i].double())
        assert_gradient_matches(gradients[i], gradient, x)


# ---- losses of maps ------------------------------------------------------------------------------


def raw_maps(*shapes: tuple[int, int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64).square().to(dtype) for shape in shapes]


def reference_map_loss(
    students: Sequence[Tensor], teachers: Sequence[Tensor], weights: list[float], *options: Any
) -> Tensor:
    sides = ([q.double().unsqueeze(1) for q in side] for side in (students, teachers))
    named = dict(zip(("form", "reduction", "eps_mode", "eps"), options, strict=True))
    return reference_loss(*sides, weights=weights or None, p=1, absolute=False, **named)


def assert_map_loss_matches(
    students: Sequence[Tensor], teachers: Sequence[Tensor], weights: list[float], *options: Any
) -> None:
    leaves = [q.detach().requires_grad_() for q in (*students, *teachers)]
    doubles = [q.detach().double().requires_grad_() for q in leaves]
    n = len(students)
    loss, _ = _ops.map_loss(leaves[:n], leaves[n:], weights, *options)
    detached = [q.detach() for q in leaves]
    operator_loss, coefficients = MAP_LOSS(
        detached[:n], detached[n:], weights, *options, True, True
    )
    assert torch.equal(operator_loss, loss)
    expected = reference_map_loss(doubles[:n], doubles[n:], weights, *options)
    fp64 = any(q.dtype == torch.float64 for q in leaves)
    assert loss.dtype == (torch.float64 if fp64 else torch.float32)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-11 if fp64 else 1e-6, atol=1e-14)
    upstream = torch.linspace(1, 2, loss.numel()).to(loss).view_as(loss)
    for actual, grad_output in (
        (coefficients, torch.ones_like(expected)),
        (torch.autograd.grad(loss, leaves, upstream), upstream.double()),
    ):
        gradients = torch.autograd.grad(expected, doubles, grad_output, retain_graph=True)
        for q, k, g in zip(leaves, actual, gradients, strict=True):
            tolerance = 1e-10 if q.dtype == torch.float64 else 2e-6
            assert k.dtype == q.dtype
            assert (k.double() - g).abs().max() <= tolerance * g.abs().max() + 1e-15


# ---- taps ----------------------------------------------------------------------------------------


def tap_inputs(
    *shape: int, collapse: str, dtype: torch.dtype = torch.float32, layout: str = "planar"
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return a gradient, a feature, its map's gradient and, for "max", channels of the maxima."""
    gradient, x = (features(*shape, dtype=dtype, layout=layout) for _ in range(2))
    k = torch.randn(shape[0], math.prod(shape[2:]), dtype=torch.float64).to(map_dtype(dtype))
    channels = x.flatten(2).abs().max(1).indices.int() if collapse == "max" else None
    return gradient, x, k, channels


def reference_tap(
    gradient: Tensor, x: Tensor, k: Tensor, channels: Tensor | None, p: float, collapse: str
) -> Tensor:
    scale = 1 / x.shape[1] if collapse == "mean" else 1.0
    return gradient.double() + scale * p * reference_derivative(x, k, p, channels)


def assert_tap_matches(
    gradient: Tensor, x: Tensor, k: Tensor, channels: Tensor | None, p: float, collapse: str
) -> None:
    """Check both operators, and that only the in-place operator writes, into its gradient."""
    before = [t.clone() for t in (gradient, x, k)]
    expected = reference_tap(gradient, x, k, channels, p, collapse)
    actual = _ops.attention_tap_backward(gradient, x, k, p, collapse, channels)
    assert_gradient_matches(actual, expected, x)
    assert all(map(torch.equal, before, (gradient, x, k)))
    strides = gradient.stride()
    _ops.attention_tap_backward_(gradient, x, k, p, collapse, channels)
    assert gradient.stride() == strides
    assert torch.equal(gradient, actual)
    assert all(map(torch.equal, before[1:], (x, k)))
