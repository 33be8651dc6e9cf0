"""Values and gradients of every back end must match the float64 reference up to rounding."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from back_ends import is_slow
from layouts import DTYPES, LAYOUTS, SHAPES, features, strided_views
from matrix import crossed
from reference import (
    assert_matches_reference,
    eager_at,
    eager_at_loss,
    reference_loss,
)
from torch import Tensor

import at_fused


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes_and_layouts(backend: str, layout: str) -> None:
    for b, c, *spatial in SHAPES:
        if len(spatial) <= 3:
            x = features(b, c, *spatial, layout=layout)
            assert_matches_reference([x], [features(b, c + 2, *spatial)])


@crossed(
    p=[1.0, 2.0, 4.0, 3.0, 1.5, 2.7, 6.0],
    dtype=DTYPES,
    form=["code", "paper"],
    layout=LAYOUTS[::-1],
)
def test_exponents_forms_dtypes(
    backend: str, p: float, form: str, dtype: torch.dtype, layout: str
) -> None:
    s = features(3, 20, 5, 7, layout=layout, dtype=dtype)
    t = features(3, 11, 5, 7, layout=layout, dtype=dtype)
    for collapse in ("mean", "sum"):
        assert_matches_reference([s], [t], p=p, form=form, collapse=collapse, scale=2.0**10)


@crossed(reduction=["sum", "none"], weights=[[1.0, 0.25, -3.0, 0.0], None])
def test_lists_of_unequal_pairs(backend: str, reduction: str, weights: list[float] | None) -> None:
    students = [
        features(4, 8, 16, 16),
        features(4, 16, 8, 8, layout="interleaved"),
        features(4, 32, 4, 4, dtype=torch.bfloat16),
        features(2, 70, 7, 7),
    ]
    teachers = [features(x.shape[0], 9, *x.shape[2:]) for x in students]
    for form in ("code", "paper"):
        assert_matches_reference(
            students, teachers, reduction=reduction, weights=weights, form=form, scale=2.0**8
        )


def test_more_pairs_than_one_kernel_launch_holds(backend: str) -> None:
    count = 17 if is_slow(backend) else 40
    students, teachers = ([features(2, c, 2 + i % 5, 3) for i in range(count)] for c in (3, 4))
    for reduction in ("sum", "none"):
        assert_matches_reference(students, teachers, reduction=reduction)


def test_every_stride_pattern(backend: str) -> None:
    views = strided_views()
    dense = [features(x.shape[0], 5, *x.shape[2:]) for x in views]
    assert_matches_reference(views, dense, reduction="none")
    assert_matches_reference(dense, views, reduction="none", form="paper", p=1.0)


def test_gradients_only_where_required(backend: str) -> None:
    pair = [features(2, 3, 4, 4)], [features(2, 5, 4, 4)]
    for student_grad in (True, False):
        for teacher_grad in (True, False):
            assert_matches_reference(*pair, student_grad=student_grad, teacher_grad=teacher_grad)
    s = [features(2, 3, 4, 4).requires_grad_(), features(2, 3, 4, 4)]
    at_fused.at_loss(s, [features(2, 5, 4, 4), features(2, 5, 4, 4)]).backward()
    assert s[0].grad is not None
    assert s[1].grad is None


def test_one_tensor_as_student_and_teacher(backend: str) -> None:
    y = features(2, 3, 4, 4).double().requires_grad_()
    loss = at_fused.at_loss([y, y], [y * y, y + 1])
    expected = reference_loss([y, y], [y * y, y + 1])
    torch.testing.assert_close(
        torch.autograd.grad(loss, y), torch.autograd.grad(expected, y), rtol=1e-10, atol=1e-14
    )


# ---- eager PyTorch -------------------------------------------------------------------------------


def test_matches_eager_pytorch(fast_backend: str) -> None:
    for size in ((128, 16, 32, 32), (5, 7, 7, 7), (1, 2, 3, 3)):
        x, y = torch.randn(size, requires_grad=True), torch.randn(size, requires_grad=True)
        loss, expected = at_fused.at_loss(x, y), eager_at_loss(x, y)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        actual, expected = (torch.autograd.grad(value, (x, y)) for value in (loss, expected))
        for g, e in zip(actual, expected, strict=True):
            assert (g - e).norm() <= 1e-5 * e.norm()
        torch.testing.assert_close(at_fused.at(x), eager_at(x), rtol=1e-5, atol=1e-7)


# ---- special values ------------------------------------------------------------------------------


@crossed(size=[0.0, 1e-8], form=["paper", "code"])
def test_maps_below_eps(backend: str, form: str, size: float) -> None:
    s, t = features(2, 3, 4, 4), features(2, 3, 4, 4)
    s[0] *= size  # 1e-8 squared is 1e-16, so the norm is clamped at eps
    for dtype in (torch.float32, torch.float64):
        assert_matches_reference([s.to(dtype)], [t.to(dtype)], form=form)
        for eps_mode in ("max", "add"):
            pair = [s.to(dtype)], [t.to(dtype)]
            assert_matches_reference(*pair, form=form, eps=0.5, eps_mode=eps_mode)


@crossed(p=[1.0, 1.5, 2.0, 4.0], form=["code", "paper"])
def test_zeros_and_equal_maps_have_finite_gradients(backend: str, p: float, form: str) -> None:
    x = features(2, 3, 4, 4)
    x[:, :, :2] = 0
    s, t = x.clone().requires_grad_(), (2 * x).requires_grad_()
    loss = at_fused.at_loss(s, t, p=p, form=form)
    assert loss.item() < 1e-7
    for g in torch.autograd.grad(loss, (s, t)):
        assert torch.isfinite(g).all()
        assert (g[:, :, :2] == 0).all()
    loss = at_fused.at_loss(s, s.detach(), p=p, form=form)
    assert loss.item() == 0
    assert torch.equal(*torch.autograd.grad(loss, s), torch.zeros_like(x))


@crossed(p=[1.0, 2.0, 3.0, 4.0], value=[math.nan, math.inf, -math.inf], layout=LAYOUTS)
def test_nan_and_infinity_give_nan(backend: str, p: float, value: float, layout: str) -> None:
    for dtype, in_teacher in itertools.product(DTYPES, (False, True)):
        s, t = (features(2, 5, 3, 6, layout=layout, dtype=dtype) for _ in range(2))
        (t if in_teacher else s)[1, 2, 1, 3] = value
        s.requires_grad_()
        losses = at_fused.at_loss([s, s], [t, s.detach()], p=p, reduction="none")
        assert torch.isnan(losses[0])
        (gradient,) = torch.autograd.grad(losses[0], s)
        assert torch.isnan(gradient[1]).any()
        assert torch.isfinite(gradient[0]).all()


def test_loss_of_a_single_position_is_zero(backend: str) -> None:
    s, t = features(3, 4, 1, 1).requires_grad_(), features(3, 5, 1, 1)
    loss = at_fused.at_loss(s, t)
    loss.backward()
    assert loss.item() == 0
    assert s.grad.abs().max() < 1e-6


# ---- derivatives ---------------------------------------------------------------------------------


@crossed(p=[1.0, 2.0, 3.0, 4.0, 2.5], form=["code", "paper"], layout=LAYOUTS[::-1])
def test_gradcheck_and_gradgradcheck(fast_backend: str, p: float, form: str, layout: str) -> None:
    s = features(2, 3, 2, 3, layout=layout, dtype=torch.float64).requires_grad_()
    t = features(2, 2, 2, 3, dtype=torch.float64).requires_grad_()

    def loss(s: Tensor, t: Tensor) -> Tensor:
        return at_fused.at_loss([s, t], [t, s], p=p, form=form, weights=[1.0, 0.5])

    # The fast mode checks one random direction: all derivatives are too slow in the emulator.
    assert torch.autograd.gradcheck(loss, (s, t), fast_mode=fast_backend.startswith("emulator"))
    assert torch.autograd.gradgradcheck(loss, (s, t), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: loss(x, t.detach()), (s,), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: at_fused.at(x, p=p), (s,), fast_mode=True)


def test_third_derivative(backend: str) -> None:
    x = features(1, 2, 2, 2, dtype=torch.float64).requires_grad_()
    t = features(1, 2, 2, 2, dtype=torch.float64)

    def differentiate_three_times(loss: Tensor) -> Tensor:
        for _ in range(3):
            (g,) = torch.autograd.grad(loss, x, create_graph=True)
            loss = (g * torch.arange(1.0, 9.0, dtype=g.dtype).view_as(g)).sum()
        return loss

    losses = at_fused.at_loss(x, t), reference_loss([x], [t])
    torch.testing.assert_close(*map(differentiate_three_times, losses), rtol=1e-8, atol=1e-12)
