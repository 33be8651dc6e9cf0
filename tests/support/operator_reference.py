"""The operators of maps, of their losses and of taps, against their formulas in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from layouts import features
from reference import reference_loss
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
    a = x.flatten(2).abs()
    if collapse == "max":
        number = torch.arange(a.shape[1], device=x.device).view(1, -1, 1)
        first = torch.where(a == a.amax(1, keepdim=True), number, a.shape[1]).amin(1)
        return a.gather(1, first.unsqueeze(1)).squeeze(1).pow(p), first
    return a.pow(p).mean(1) if collapse == "mean" else a.pow(p).sum(1), None


def reference_slope(x: Tensor, k: Tensor, p: float, channels: Tensor | None) -> Tensor:
    """k |A|^(p-1) sign(A), with ``channels`` only where those are."""
    a = x.double()
    slope = k.double().view(len(x), 1, *x.shape[2:]) * a.abs().pow(p - 1) * a.sign()
    if channels is None:
        return slope
    number = torch.arange(x.shape[1], device=x.device).view(1, -1, *[1] * (x.dim() - 2))
    return torch.where(number == channels.view(len(x), 1, *x.shape[2:]), slope, 0.0)


def assert_maps_match(xs: Sequence[Tensor], p: float, collapse: str = "mean") -> None:
    """Maps, winners and gradients of a list."""
    leaves = [x.detach().requires_grad_() for x in xs]
    doubles = [x.detach().double().requires_grad_() for x in xs]
    found = _ops.attention_map(leaves, p, collapse)
    maps, channels = found[: len(xs)], found[len(xs) :]
    assert len(channels) == (len(xs) if collapse == "max" else 0)
    for i, (x, double, q) in enumerate(zip(leaves, doubles, maps, strict=True)):
        right, first = reference_map(double, p, collapse)
        assert q.dtype == wide(x.dtype)
        assert q.shape == right.shape
        bound = (1e-13 if x.dtype == torch.float64 else 3e-6) * right + 1e-300
        assert ((q.double() - right).abs() <= bound).all()
        if first is not None:
            assert channels[i].dtype == torch.int32
            assert torch.equal(channels[i].long(), first)
        upstream = torch.linspace(0.5, 1.5, q.numel(), dtype=q.dtype, device=q.device).view_as(q)
        (g,) = torch.autograd.grad(q, x, upstream, retain_graph=True)
        (r,) = torch.autograd.grad(right, double, upstream.double())
        assert_gradient_matches(g, r, x)


# ---- losses of maps ------------------------------------------------------------------------------


def raw_maps(*shapes: tuple[int, int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64).square().to(dtype) for shape in shapes]


def reference_map_loss(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    weights: list[float],
    form: str,
    reduction: str,
    eps_mode: str,
    eps: float,
) -> Tensor:
    sides = ([q.double().unsqueeze(1) for q in side] for side in (students, teachers))
    options = {"form": form, "reduction": reduction, "eps_mode": eps_mode, "eps": eps}
    return reference_loss(*sides, weights=weights or None, p=1, absolute=False, **options)


def assert_map_loss_matches(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    weights: list[float],
    *options: str | float,
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
