"""``at_value_and_grad``: ``scale``, graphs and errors. test_contract.py compares its results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import at_fused


def pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    b, c, *spatial = shape
    return torch.randn(shape, dtype=dtype), torch.randn(b, c + 2, *spatial, dtype=dtype)


def loss_and_grad(student: Tensor, teacher: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    x = student.detach().requires_grad_()
    loss = at_fused.at_loss(x, teacher, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]


def test_scale_applies_only_to_the_gradient(backend: str) -> None:
    s, t = pair(2, 3, 5, 4)
    loss, expected = loss_and_grad(s, t)
    for scale in (3.0, -2, torch.tensor(0.5), torch.tensor([2.0]).double()):
        value, gradient = at_fused.at_value_and_grad(s, t, scale=scale)
        torch.testing.assert_close(value, loss)
        torch.testing.assert_close(gradient, expected * float(scale), rtol=1e-5, atol=1e-9)


def test_results_are_detached(backend: str) -> None:
    s, t = pair(2, 3, 4, 4)
    s.requires_grad_(), t.requires_grad_()
    value, gradient = at_fused.at_value_and_grad(s, t)
    assert not value.requires_grad
    assert not gradient.requires_grad
    # As in the docstring: pass the gradient to the features in one backward with the task loss.
    w = torch.randn(2, 3, 4, 4, requires_grad=True)
    features, task = w * 2, w.sum()
    _, gradient = at_fused.at_value_and_grad(features, t.detach(), scale=10.0)
    torch.autograd.backward([task, features], [None, gradient])
    expected = torch.autograd.grad(w.sum() + 10 * at_fused.at_loss(w * 2, t.detach()), w)[0]
    torch.testing.assert_close(w.grad, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        ("2", TypeError, "scale must be a number, got str"),
        (True, TypeError, "scale must be a number, got bool"),
        (float("inf"), ValueError, "scale must be finite, got inf"),
        (-1e39, ValueError, "scale must be finite in the gradient's torch.float32, got -1e"),
        (10**39, ValueError, "scale must be finite in the gradient's torch.float32, got 1000"),
        (torch.ones(1).to_sparse(), TypeError, "scale must be a dense tensor"),
        (
            torch.ones(1).to(torch.float8_e5m2),
            ValueError,
            "tensor of one element, got torch.float8",
        ),
        (torch.ones(2), ValueError, "tensor of one element, got torch.float32 of shape"),
        (torch.ones((), dtype=torch.int64), ValueError, "floating-point tensor"),
        (torch.ones((), device="meta"), ValueError, "scale must be on the features' device, cpu"),
    ],
    ids=str,
)
def test_invalid_scales(scale: Any, error: type[Exception], message: str) -> None:
    s, t = pair(2, 3, 4, 4)
    with pytest.raises(error, match=message):
        at_fused.at_value_and_grad(s, t, scale=scale)


def test_scale_beyond_float32_for_float64_features() -> None:
    s, t = pair(2, 3, 4, 4, dtype=torch.float64)
    _, gradient = at_fused.at_value_and_grad(s, t, scale=1e39)
    torch.testing.assert_close(gradient, loss_and_grad(s, t)[1] * 1e39, rtol=1e-9, atol=0)


def test_unknown_options_raise() -> None:
    s = torch.randn(2, 3, 4, 4)
    with pytest.raises(TypeError, match="at_value_and_grad has no option 'power'; it has a"):
        at_fused.at_value_and_grad(s, s, power=2)
