"""Inputs on which the eager loss loses precision or fails, and at_fused does not.

Both are compared with the formula in float64 on the same features.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from layouts import LAYOUTS
from reference import (
    assert_matches_reference,
    eager_at,
    eager_at_loss,
    expected_loss,
    reference_loss,
)
from reference import feature as features
from torch import Tensor

import at_fused


def eager_loss_with_power(s: Tensor, t: Tensor, p: float) -> Tensor:
    """Compute the eager loss with exponent p in the features' dtype."""
    q_s, q_t = (F.normalize(x.abs().pow(p).mean(1).flatten(1)) for x in (s, t))
    return (q_s - q_t).pow(2).mean()


def gradient(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss, x)[0]


def float64_loss(s: Tensor, t: Tensor, **options: float | str) -> float:
    return reference_loss([s.detach().double()], [t.detach().double()], **options).item()


# ---- float16 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp16_squares_overflow_from_256(backend: str, layout: str) -> None:
    s, t = features(2, 8, 4, 6, layout=layout), features(2, 4, 4, 6)
    s, t = (200 + 20 * s.clamp(-2, 2)).half(), t.half()
    assert torch.isfinite(eager_at_loss(s, t))
    s[1, 3, 2, 1] = 256
    assert not torch.isfinite(eager_at_loss(s, t))
    assert_matches_reference([s], [t], scale=2.0**12)
    s[0, 0, 0, 0] = torch.finfo(torch.float16).max
    assert_matches_reference([s], [t], scale=2.0**18)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp16_norms_that_overflow_give_zero_maps(backend: str, layout: str) -> None:
    # Squares of about 3600 are finite, but the norm over 30 x 36 positions, 1.2e5, overflows.
    s = (60 + features(1, 4, 30, 36, layout=layout)).half()
    t = (60 + 8 * features(1, 3, 30, 36)).half()
    assert eager_at(s).abs().max() == 0
    assert eager_at_loss(s, t) == 0
    assert float64_loss(s, t) > 1e-6
    assert_matches_reference([s], [t], scale=2.0**14)


def test_eps_of_1e_12_is_zero_in_fp16(backend: str) -> None:
    s, t = torch.zeros(2, 3, 4, 4).half(), features(2, 5, 4, 4).half()
    s[1] = features(3, 4, 4).half()
    assert torch.isnan(eager_at(s)[0]).all()
    assert torch.isnan(eager_at_loss(s, t))
    assert_matches_reference([s], [t], scale=2.0**6)
    assert_matches_reference([s], [t], form="paper", scale=2.0**6)


@pytest.mark.parametrize("size", [1.0, 30.0, 3000.0])
@pytest.mark.parametrize("p", [3.0, 4.0, 6.0, 8.0])
def test_fp16_powers_up_to_8(backend: str, p: float, size: float) -> None:
    s = (features(2, 8, 4, 6).clamp(-3, 3) * size).half()
    t = (features(2, 4, 4, 6).clamp(-3, 3) * size).half()
    s[0, 0, 0, 0] = 41.0  # 41^3 > 65504
    assert not torch.isfinite(eager_loss_with_power(s, t, p))
    assert_matches_reference([s], [t], p=p, scale=2.0**4 * size)


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_fp16_subnormals(backend: str, p: float) -> None:
    s, t = (features(2, 8, 4, 6) * 2**-20).half(), (features(2, 4, 4, 6) * 2**-20).half()
    assert 0 < s[s != 0].abs().min() < torch.finfo(torch.float16).tiny
    if p == 2:  # squares of numbers below 2^-12 are 0 in fp16
        assert not torch.isfinite(eager_at_loss(s, t))
    assert_matches_reference([s], [t], p=p, scale=2.0**-4)


# ---- bfloat16 ------------------------------------------------------------------------------------


def test_bf16_maps_lose_precision(backend: str) -> None:
    s = features(2, 32, 7, 9)
    s, t = s.bfloat16(), (s + 0.01 * features(2, 32, 7, 9)).bfloat16()
    expected = float64_loss(s, t)
    assert abs(eager_at_loss(s, t).item() - expected) > 0.3 * expected
    assert abs(at_fused.at_loss(s, t).item() - expected) < 1e-5 * expected
    assert_matches_reference([s], [t])


# ---- branches of the backward pass ---------------------------------------------------------------


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_zero_maps_have_finite_gradients(backend: str, dtype: torch.dtype, form: str) -> None:
    s, t = features(2, 3, 4, 6).to(dtype), features(2, 3, 4, 6).to(dtype)
    s[0] = 0
    s.requires_grad_()
    q = s.pow(2).mean(1).flatten(1)
    normalized = q / q.pow(2).sum(1, keepdim=True).sqrt().clamp(min=1e-12)
    assert torch.isnan(gradient((normalized - eager_at(t)).pow(2).mean(), s)).any()
    assert_matches_reference([s], [t], form=form)


def test_gradient_below_eps_has_no_projection(backend: str) -> None:
    s, t = features(2, 3, 4, 6) * 1e-7, features(2, 3, 4, 6)
    s.requires_grad_()
    expected = gradient(reference_loss([s], [t]), s)
    # dL/dQ = (g - q (q.g)) / ||Q|| is right only for norms above eps.
    q = s.pow(2).mean(1).flatten(1).detach()
    difference = q / 1e-12 - eager_at(t)
    unit = q / q.norm(dim=1, keepdim=True)
    g = 2 * difference / difference.numel()
    projected = (g - unit * (unit * g).sum(1, keepdim=True)) / 1e-12
    projected = projected.view(2, 1, 4, 6) * 2 * s.detach() / 3
    assert (projected - expected).abs().max() > 0.01 * expected.abs().max()
    for dtype in (torch.float64, torch.float32):
        assert_matches_reference([s.detach().to(dtype)], [t.to(dtype)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_distance_of_equal_maps_has_zero_gradient(backend: str, dtype: torch.dtype) -> None:
    s, t = features(2, 3, 4, 6).to(dtype), features(2, 3, 4, 6).to(dtype)
    t[0] = s[0]
    s.requires_grad_()
    eager_loss = (eager_at(s) - eager_at(t)).pow(2).sum(1).sqrt().mean()
    assert torch.isnan(gradient(eager_loss, s)).any()
    actual = gradient(at_fused.at_loss(s, t, form="paper"), s)
    assert actual[0].abs().max() == 0
    double = s.detach().double().requires_grad_()
    expected = gradient(expected_loss(double, t.double(), form="paper")[1] / 2, double)[1]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    assert (actual[1].double() - expected).abs().max() <= tolerance * expected.abs().max()


# ---- cancellation --------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1.0, 3.0])
def test_odd_powers_without_absolute_values_cancel(backend: str, p: float) -> None:
    s, t = features(2, 1, 4, 6).float(), features(2, 4, 4, 6).float()
    s = torch.cat([s, -s], 1).requires_grad_()
    # The channels cancel, so the eager map is zero and its gradient is scaled by 1 / eps.
    q_s, q_t = (x.pow(p).mean(1).flatten(1) for x in (s, t))
    assert q_s.abs().max() == 0
    assert q_t.min() < 0
    eager = gradient((F.normalize(q_s) - F.normalize(q_t)).pow(2).mean(), s)
    assert eager.abs().max() > 1e9 * gradient(at_fused.at_loss(s, t, p=p), s).abs().max()
    assert_matches_reference([s], [t], p=p)


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("distance", [1e-2, 1e-3, 1e-4])
def test_two_minus_two_cosines_cancels_near_convergence(
    backend: str, distance: float, form: str
) -> None:
    s = features(2, 8, 5, 7)
    s, t = s.float(), (s * (1 + distance * features(2, 8, 5, 7))).float()
    expected = float64_loss(s, t)
    cosines = (eager_at(s) * eager_at(t)).sum(1)
    error = abs(((2 - 2 * cosines).mean() / 35).item() - expected)
    assert error > {1e-2: 5e-4, 1e-3: 1e-2, 1e-4: 0.5}[distance] * expected
    # Rounding maps to fp32 has a relative error of 6e-8, over their relative distance.
    assert abs(at_fused.at_loss(s, t).item() - expected) < 1e-7 / distance * expected
    assert_matches_reference([s], [t], form=form)


# ---- the range of float32 ------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "size"), [(1.0, 1e25), (1.0, 1e30), (1.0, 1e36), (2.0, 1e13)])
def test_norms_with_squares_beyond_fp32(backend: str, p: float, size: float) -> None:
    s, t = (features(2, 8, 5, 7) * size).float(), (features(2, 8, 5, 7) * size).float()
    assert eager_loss_with_power(s, t, p) == 0
    assert_matches_reference([s], [t], p=p, scale=size)


def test_maps_beyond_fp32_give_nan_unless_features_are_scaled(backend: str) -> None:
    s, t = (features(2, 8, 5, 7) * 1e30).float(), features(2, 8, 5, 7).float()
    assert torch.isnan(at_fused.at_loss(s, t))  # squares of 1e60 overflow
    s.requires_grad_()
    loss = at_fused.at_loss(s * 2.0**-100, t)  # exact, and normalisation removes the scale
    assert loss.item() == pytest.approx(float64_loss(s, t), rel=1e-6)
    actual = gradient(loss * 2.0**100, s)
    double = s.detach().double().requires_grad_()
    expected = gradient(reference_loss([double], [t.double()]) * 2.0**100, double)
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()


def test_fp32_subnormals(backend: str) -> None:
    s, t = (features(2, 8, 5, 7) * 1e-39).float(), features(2, 8, 5, 7).float()
    assert 0 < s.abs().max() < torch.finfo(torch.float32).tiny
    # With the default eps these maps are nearly zero. A smaller eps normalises them.
    assert_matches_reference([s], [t], p=1.0, scale=1e-6)
    assert_matches_reference([s], [t], p=1.0, eps=1e-44, scale=1e-6)
