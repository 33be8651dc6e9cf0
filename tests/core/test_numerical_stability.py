"""Numbers that hold: each trap breaks the popular lines here, and not at_fused.

Both are measured against the same formula in float64, on the very same features.
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


def popular_with_power(s: Tensor, t: Tensor, p: float) -> Tensor:
    """The popular lines with another exponent, in the features' own dtype."""
    q_s, q_t = (F.normalize(x.abs().pow(p).mean(1).flatten(1)) for x in (s, t))
    return (q_s - q_t).pow(2).mean()


def gradient(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss, x)[0]


def right_loss(s: Tensor, t: Tensor, **options: float | str) -> float:
    return reference_loss([s.detach().double()], [t.detach().double()], **options).item()


# ---- float16 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp16_squares_overflow_from_256_on(backend: str, layout: str) -> None:
    s, t = features(2, 8, 4, 6, layout=layout), features(2, 4, 4, 6)
    s, t = (200 + 20 * s.clamp(-2, 2)).half(), t.half()
    assert torch.isfinite(eager_at_loss(s, t))
    s[1, 3, 2, 1] = 256
    assert not torch.isfinite(eager_at_loss(s, t))
    assert_matches_reference([s], [t], scale=2.0**12)
    s[0, 0, 0, 0] = torch.finfo(torch.float16).max
    assert_matches_reference([s], [t], scale=2.0**18)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_fp16_norm_that_overflows_gives_silent_zeros(backend: str, layout: str) -> None:
    # Squares of 3600 fit; the norm over 30 x 36 positions is 1.2e5 and does not.
    s = (60 + features(1, 4, 30, 36, layout=layout)).half()
    t = (60 + 8 * features(1, 3, 30, 36)).half()
    assert eager_at(s).abs().max() == 0
    assert eager_at_loss(s, t) == 0
    assert right_loss(s, t) > 1e-6
    assert_matches_reference([s], [t], scale=2.0**14)


def test_1e_12_is_0_in_fp16(backend: str) -> None:
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
    assert not torch.isfinite(popular_with_power(s, t, p))
    assert_matches_reference([s], [t], p=p, scale=2.0**4 * size)


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_fp16_subnormals(backend: str, p: float) -> None:
    s, t = (features(2, 8, 4, 6) * 2**-20).half(), (features(2, 4, 4, 6) * 2**-20).half()
    assert 0 < s[s != 0].abs().min() < torch.finfo(torch.float16).tiny
    if p == 2:  # squares of less than 2^-12 are 0 in fp16
        assert not torch.isfinite(eager_at_loss(s, t))
    assert_matches_reference([s], [t], p=p, scale=2.0**-4)


# ---- bfloat16 ------------------------------------------------------------------------------------


def test_maps_kept_in_bf16(backend: str) -> None:
    s = features(2, 32, 7, 9)
    s, t = s.bfloat16(), (s + 0.01 * features(2, 32, 7, 9)).bfloat16()
    right = right_loss(s, t)
    assert abs(eager_at_loss(s, t).item() - right) > 0.3 * right
    assert abs(at_fused.at_loss(s, t).item() - right) < 1e-5 * right
    assert_matches_reference([s], [t])


# ---- branches of the backward --------------------------------------------------------------------


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_zero_map(backend: str, dtype: torch.dtype, form: str) -> None:
    s, t = features(2, 3, 4, 6).to(dtype), features(2, 3, 4, 6).to(dtype)
    s[0] = 0
    s.requires_grad_()
    q = s.pow(2).mean(1).flatten(1)
    written_out = q / q.pow(2).sum(1, keepdim=True).sqrt().clamp(min=1e-12)
    assert torch.isnan(gradient((written_out - eager_at(t)).pow(2).mean(), s)).any()
    assert_matches_reference([s], [t], form=form)


def test_below_eps_nothing_is_projected_out(backend: str) -> None:
    s, t = features(2, 3, 4, 6) * 1e-7, features(2, 3, 4, 6)
    s.requires_grad_()
    right = gradient(reference_loss([s], [t]), s)
    # dL/dQ = (g - q (q.g)) / ||Q||, the branch of a norm above eps, used for all.
    q = s.pow(2).mean(1).flatten(1).detach()
    difference = q / 1e-12 - eager_at(t)
    unit = q / q.norm(dim=1, keepdim=True)
    g = 2 * difference / difference.numel()
    one_branch = (g - unit * (unit * g).sum(1, keepdim=True)) / 1e-12
    one_branch = one_branch.view(2, 1, 4, 6) * 2 * s.detach() / 3
    assert (one_branch - right).abs().max() > 0.01 * right.abs().max()
    for dtype in (torch.float64, torch.float32):
        assert_matches_reference([s.detach().to(dtype)], [t.to(dtype)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_root_of_a_difference_of_0(backend: str, dtype: torch.dtype) -> None:
    s, t = features(2, 3, 4, 6).to(dtype), features(2, 3, 4, 6).to(dtype)
    t[0] = s[0]
    s.requires_grad_()
    written_out = (eager_at(s) - eager_at(t)).pow(2).sum(1).sqrt().mean()
    assert torch.isnan(gradient(written_out, s)).any()
    found = gradient(at_fused.at_loss(s, t, form="paper"), s)
    assert found[0].abs().max() == 0
    wide = s.detach().double().requires_grad_()
    right = gradient(expected_loss(wide, t.double(), form="paper")[1] / 2, wide)[1]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    assert (found[1].double() - right).abs().max() <= tolerance * right.abs().max()


# ---- cancellation --------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1.0, 3.0])
def test_an_odd_power_without_the_absolute_value(backend: str, p: float) -> None:
    s, t = features(2, 1, 4, 6).float(), features(2, 4, 4, 6).float()
    s = torch.cat([s, -s], 1).requires_grad_()
    # Channels that cancel are a map of zeros where all is active, and 1 / eps times a gradient.
    q_s, q_t = (x.pow(p).mean(1).flatten(1) for x in (s, t))
    assert q_s.abs().max() == 0
    assert q_t.min() < 0
    wrong = gradient((F.normalize(q_s) - F.normalize(q_t)).pow(2).mean(), s)
    assert wrong.abs().max() > 1e9 * gradient(at_fused.at_loss(s, t, p=p), s).abs().max()
    assert_matches_reference([s], [t], p=p)


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("apart", [1e-2, 1e-3, 1e-4])
def test_two_minus_two_cosines_near_convergence(backend: str, apart: float, form: str) -> None:
    s = features(2, 8, 5, 7)
    s, t = s.float(), (s * (1 + apart * features(2, 8, 5, 7))).float()
    right = right_loss(s, t)
    cosines = (eager_at(s) * eager_at(t)).sum(1)
    error = abs(((2 - 2 * cosines).mean() / 35).item() - right)
    assert error > {1e-2: 5e-4, 1e-3: 1e-2, 1e-4: 0.5}[apart] * right
    # Maps are rounded to fp32, 6e-8 of themselves, and are `apart` from each other.
    assert abs(at_fused.at_loss(s, t).item() - right) < 1e-7 / apart * right
    assert_matches_reference([s], [t], form=form)


# ---- the range of float32 ------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "size"), [(1.0, 1e25), (1.0, 1e30), (1.0, 1e36), (2.0, 1e13)])
def test_a_norm_beyond_fp32(backend: str, p: float, size: float) -> None:
    s, t = (features(2, 8, 5, 7) * size).float(), (features(2, 8, 5, 7) * size).float()
    assert popular_with_power(s, t, p) == 0
    assert_matches_reference([s], [t], p=p, scale=size)


def test_a_map_beyond_fp32_is_nan_and_scaled_features_are_the_remedy(backend: str) -> None:
    s, t = (features(2, 8, 5, 7) * 1e30).float(), features(2, 8, 5, 7).float()
    assert torch.isnan(at_fused.at_loss(s, t))  # squares of 1e60: no number, and not zeros
    s.requires_grad_()
    loss = at_fused.at_loss(s * 2.0**-100, t)  # an exact product; a normalised map has no scale
    assert loss.item() == pytest.approx(right_loss(s, t), rel=1e-6)
    found = gradient(loss * 2.0**100, s)
    wide = s.detach().double().requires_grad_()
    right = gradient(reference_loss([wide], [t.double()]) * 2.0**100, wide)
    assert (found - right).abs().max() < 1e-5 * right.abs().max()


def test_fp32_denormals(backend: str) -> None:
    s, t = (features(2, 8, 5, 7) * 1e-39).float(), features(2, 8, 5, 7).float()
    assert 0 < s.abs().max() < torch.finfo(torch.float32).tiny
    # A map below eps is nearly zeros, the loss 1/N; without such an eps all digits count.
    assert_matches_reference([s], [t], p=1.0, scale=1e-6)
    assert_matches_reference([s], [t], p=1.0, eps=1e-44, scale=1e-6)
