"""The operators of maps, of their losses and of taps, against their formulas in float64."""

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


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a map of such a feature."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_gradient_matches(g: Tensor, right: Tensor, x: Tensor) -> None:
    assert g.dtype == x.dtype
    assert g.stride() == torch.empty_like(x).stride()
    tolerance = 1e-11 if x.dtype == torch.float64 else 2e-5
    share = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}.get(x.dtype, 0.0)
    smallest = 2.0**-24 if x.dtype == torch.float16 else 0.0
    bound = share * right.abs() + tolerance * right.abs().max() + smallest
    assert ((g.double() - right).abs() <= bound).all()


# ---- maps ----------------------------------------------------------------------------------------


def reference_map(x: Tensor, p: float, collapse: str) -> tuple[Tensor, Tensor | None]:
    """The map (B, N) and, for a maximum, the first channel that has it."""
    x = x.flatten(2)
    first = first_of_largest(x).squeeze(1) if collapse == "max" else None
    return raw_map(x, p, collapse), first


def reference_slope(x: Tensor, k: Tensor, p: float, channels: Tensor | None) -> Tensor:
    """k |A|^(p-1) sign(A), with ``channels`` only where those are."""
    a = x.double().flatten(2)
    slope = k.double().unsqueeze(1) * a.abs().pow(p - 1) * a.sign()
    if channels is not None:
        number = torch.arange(x.shape[1], device=x.device).view(1, -1, 1)
        slope = torch.where(number == channels.unsqueeze(1), slope, 0.0)
    return slope.view(x.shape)


def assert_maps_match(xs: Sequence[Tensor], p: float, collapse: str = "mean") -> None:
    """Maps, winners and gradients of a list."""
    leaves = [x.detach().requires_grad_() for x in xs]
    doubles = [x.detach().double().requires_grad_() for x in xs]
    found = _ops.attention_map(leaves, p, collapse)
    maps, channels = found[: len(xs)], found[len(xs) :]
    assert len(channels) == (len(xs) if collapse == "max" else 0)
    upstream = [torch.linspace(0.5, 1.5, q.numel()).to(q).view_as(q) for q in maps]
    gradients = torch.autograd.grad(maps, leaves, upstream)
    for i, (x, double, q) in enumerate(zip(leaves, doubles, maps, strict=True)):
        right, first = reference_map(double, p, collapse)
        assert (q.dtype, q.shape) == (wide(x.dtype), right.shape)
        bound = (1e-13 if x.dtype == torch.float64 else 3e-6) * right + 1e-300
        assert ((q.double() - right).abs() <= bound).all()
        if first is not None:
            assert channels[i].dtype == torch.int32
            assert torch.equal(channels[i].long(), first)
        (r,) = torch.autograd.grad(right, double, upstream[i].double())
        assert_gradient_matches(gradients[i], r, x)


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
    given = [q.detach() for q in leaves]
    same, maps = MAP_LOSS(given[:n], given[n:], weights, *options, True, True)
    assert torch.equal(same, loss)
    expected = reference_map_loss(doubles[:n], doubles[n:], weights, *options)
    fp64 = any(q.dtype == torch.float64 for q in leaves)
    assert loss.dtype == (torch.float64 if fp64 else torch.float32)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-11 if fp64 else 1e-6, atol=1e-14)
    upstream = torch.linspace(1, 2, loss.numel()).to(loss).view_as(loss)
    for found, above in (
        (maps, torch.ones_like(expected)),
        (torch.autograd.grad(loss, leaves, upstream), upstream.double()),
    ):
        right = torch.autograd.grad(expected, doubles, above, retain_graph=True)
        for q, k, r in zip(leaves, found, right, strict=True):
            tolerance = 1e-10 if q.dtype == torch.float64 else 2e-6
            assert k.dtype == q.dtype
            assert (k.double() - r).abs().max() <= tolerance * r.abs().max() + 1e-15


# ---- taps ----------------------------------------------------------------------------------------


def tap_inputs(
    *shape: int, collapse: str, dtype: torch.dtype = torch.float32, layout: str = "planar"
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """A gradient, a feature, its map's gradient and, for a maximum, the channels that have it."""
    gradient, x = (features(*shape, dtype=dtype, layout=layout) for _ in range(2))
    k = torch.randn(shape[0], math.prod(shape[2:]), dtype=torch.float64).to(wide(dtype))
    channels = x.flatten(2).abs().max(1).indices.int() if collapse == "max" else None
    return gradient, x, k, channels


def reference_tap(
    gradient: Tensor, x: Tensor, k: Tensor, channels: Tensor | None, p: float, collapse: str
) -> Tensor:
    scale = 1 / x.shape[1] if collapse == "mean" else 1.0
    return gradient.double() + scale * p * reference_slope(x, k, p, channels)


def assert_tap_matches(
    gradient: Tensor, x: Tensor, k: Tensor, channels: Tensor | None, p: float, collapse: str
) -> None:
    """Both operators; and nothing but the gradient in place is written."""
    before = [t.clone() for t in (gradient, x, k)]
    expected = reference_tap(gradient, x, k, channels, p, collapse)
    found = _ops.attention_tap_backward(gradient, x, k, p, collapse, channels)
    assert_gradient_matches(found, expected, x)
    assert all(map(torch.equal, before, (gradient, x, k)))
    strides = gradient.stride()
    _ops.attention_tap_backward_(gradient, x, k, p, collapse, channels)
    assert gradient.stride() == strides
    assert torch.equal(gradient, found)
    assert all(map(torch.equal, before[1:], (x, k)))
