"""``features_loss`` and ``FeaturesLoss`` against the formula in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain_losses import DTYPES, gradient_tolerance, leaves_and_doubles
from torch import Tensor

import at_fused


def reference(
    s: list[Tensor],
    t: list[Tensor],
    weights: list[float] | None = None,
    form: str = "mean",
    reduction: str = "sum",
) -> Tensor:
    parts = []
    for i, (x, y) in enumerate(zip(s, t, strict=True)):
        squares = (x - y).flatten(1).square().sum(1)
        share = x[0].numel() if form == "mean" else 1
        parts.append(squares.mean() / share * (weights[i] if weights else 1.0))
    return sum(parts) if reduction == "sum" else torch.stack(parts)


def assert_matches(s: list[Tensor], t: list[Tensor], **options: Any) -> None:
    """Check the loss and the gradients of both sides."""
    (leaves, doubles), n = leaves_and_doubles(*s, *t), len(s)
    loss = at_fused.features_loss(leaves[:n], leaves[n:], **options)
    expected = reference(doubles[:n], doubles[n:], **options)
    any_fp64 = any(x.dtype == torch.float64 for x in leaves)
    assert loss.dtype == (torch.float64 if any_fp64 else torch.float32)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    upstream = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    actual = torch.autograd.grad(loss, leaves, upstream)
    gradients = torch.autograd.grad(expected, doubles, upstream.double())
    for x, g, e in zip(leaves, actual, gradients, strict=True):
        assert g.dtype == x.dtype
        assert (g.double() - e).abs().max() <= gradient_tolerance(g.dtype, 1e-6) * e.abs().max()


@pytest.mark.parametrize("form", ["mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 1), (4, 3, 8, 8), (2, 3, 2, 3, 2, 2), (1, 70001)], ids=str)
def test_shapes(shape: tuple[int, ...], dtype: torch.dtype, form: str) -> None:
    s, t = torch.randn(shape).to(dtype), torch.randn(shape)
    assert_matches([s], [t], form=form)
    loss = at_fused.features_loss(s, t, form=form, reduction="none")
    assert torch.equal(loss, at_fused.features_loss([s], [t], form=form, reduction="none"))


@pytest.mark.parametrize("form", ["mean", "sum"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("weights", [None, [1.0, 0.25, -3.0, 0.0]], ids=str)
def test_lists_of_features(form: str, reduction: str, weights: list[float] | None) -> None:
    shapes = [(2, 3, 8, 8), (2, 40), (2, 5, 7), (2, 16, 4, 4)]
    s = [torch.randn(shape) for shape in shapes]
    s[3] = s[3].half().to(memory_format=torch.channels_last)
    t = [torch.randn_like(x) for x in s]
    assert_matches(s, t, form=form, reduction=reduction, weights=weights)
    t[1] = t[1].double()
    assert_matches(s, t, form=form, reduction=reduction, weights=weights)


def test_large_differences() -> None:
    """Beyond float32's range, 3e38, the loss is inf but its gradient is still right."""
    within, beyond = torch.full((2, 100), 4e17), torch.full((2, 100), 3e18)
    assert_matches([within], [-within])
    s = beyond.requires_grad_()
    loss = at_fused.features_loss(s, -beyond.detach())
    assert loss.item() == torch.inf
    (g,) = torch.autograd.grad(loss, s)
    torch.testing.assert_close(g, torch.full_like(g, 2 * 6e18 / 200))


def test_module_projects_students_with_other_channels() -> None:
    module = at_fused.FeaturesLoss([4, 8], [6, 8])
    s = [torch.randn(2, 4, 5, 5), torch.randn(2, 8, 3, 3)]
    t = [torch.randn(2, 6, 5, 5), torch.randn(2, 8, 3, 3)]
    (weight,) = module.parameters()
    assert weight.shape == (6, 4, 1, 1)
    expected = F.mse_loss(F.conv2d(s[0], weight), t[0]) + F.mse_loss(s[1], t[1])
    torch.testing.assert_close(module(s, t), expected)
    torch.testing.assert_close(copy.deepcopy(module)(s, t), expected)
    module(s, t).backward()
    assert weight.grad.abs().sum() > 0
    single = at_fused.FeaturesLoss(4, 6, form="sum")
    assert single(s[0], t[0]).ndim == 0
    assert "form='sum'" in repr(single)


X = torch.randn(2, 3, 4)


# test_errors.py checks the other arguments.
def test_errors() -> None:
    with pytest.raises(ValueError, match="same batch size, got 2 for pair 0 and 1 for pair 1"):
        at_fused.features_loss([X, X[:1]], [X, X[:1]])
    with pytest.raises(ValueError, match=r"student must have a batch dimension.*\(4,\)"):
        at_fused.features_loss(X[0, 0], X[0, 0])


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        ((4, [6, 7]), r"ints >= 1, or lists of equal length, got 4 and \[6, 7\]"),
        (([], []), r"ints >= 1, or lists of equal length, got \[\] and \[\]"),
        ((0, 6), "ints >= 1, or lists of equal length, got 0 and 6"),
        ((4, [6.0]), r"ints >= 1, or lists of equal length, got 4 and \[6.0\]"),
    ],
    ids=str,
)
def test_invalid_channels(channels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        at_fused.FeaturesLoss(*channels)


def test_module_errors() -> None:
    with pytest.raises(ValueError, match=r"student must have 1 features.*got 2"):
        at_fused.FeaturesLoss([3], [3])([X[..., None]] * 2, [X[..., None]] * 2)
    with pytest.raises(ValueError, match=r"student must be \(B, C, H, W\), got shape \(2, 3, 4\)"):
        at_fused.FeaturesLoss(2, 5)(X, X)
    with pytest.raises(RuntimeError, match="to have 4 channels, but got 3"):
        at_fused.FeaturesLoss(4, 5)(X[..., None], X[..., None])
    with pytest.raises(TypeError, match=r"student\[0\] must be a tensor, got NoneType"):
        at_fused.FeaturesLoss([3], [3])([None], [X])
    with pytest.raises(ValueError, match="form must be 'mean' or 'sum'"):
        at_fused.FeaturesLoss(3, 3, form=torch.ones(2))
