"""The float64 reference: the formulas as people write them, nothing of at_fused in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import at_fused


def popular_at(x: Tensor) -> Tensor:
    return F.normalize(x.pow(2).mean(1).view(x.size(0), -1))


def popular_at_loss(x: Tensor, y: Tensor) -> Tensor:
    """The lines that this package replaces."""
    return (popular_at(x) - popular_at(y)).pow(2).mean()


def raw_map(x: Tensor, p: float = 2.0, collapse: str = "mean") -> Tensor:
    powered = x.abs().pow(p)
    return powered.mean(1) if collapse == "mean" else powered.sum(1)


def pair_loss(s: Tensor, t: Tensor, p: float, collapse: str, form: str, eps: float) -> Tensor:
    qs, qt = (F.normalize(raw_map(x, p, collapse).flatten(1), eps=eps) for x in (s, t))
    difference = qs - qt
    if form == "code":
        return difference.pow(2).mean()
    return torch.linalg.vector_norm(difference, dim=1).mean()


def reference_loss(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    *,
    p: float = 2.0,
    collapse: str = "mean",
    form: str = "code",
    weights: Sequence[float] | None = None,
    reduction: str = "sum",
    channel_dim: int = 1,
    eps: float = 1e-12,
) -> Tensor:
    if channel_dim == -1:
        students = [x.movedim(-1, 1) for x in students]
        teachers = [x.movedim(-1, 1) for x in teachers]
    losses = [
        pair_loss(s, t, p, collapse, form, eps) * (weights[i] if weights else 1.0)
        for i, (s, t) in enumerate(zip(students, teachers, strict=True))
    ]
    return torch.stack(losses).sum() if reduction == "sum" else torch.stack(losses)


# Largest error allowed in a gradient, as a share of its largest element: the rounding of the
# gradient's own dtype, or of fp32 sums.
GRADIENT_TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2**-10,
    torch.bfloat16: 2**-7,
}


def assert_matches_reference(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    *,
    student_grad: bool = True,
    teacher_grad: bool = True,
    scale: float = 1.0,
    **options: Any,
) -> None:
    """Loss and gradients of at_fused against the reference in float64.

    ``scale`` multiplies the loss before the backward pass, as loss scaling does, so that fp16
    gradients are not lost. The features are used as they are, strides and all.
    """
    leaves = []
    for x, wanted in [(x, student_grad) for x in students] + [(x, teacher_grad) for x in teachers]:
        leaves.append(x.detach().requires_grad_(wanted))
    doubles = [x.detach().double().requires_grad_(x.requires_grad) for x in leaves]
    n = len(students)

    loss = at_fused.at_loss(leaves[:n], leaves[n:], **options)
    expected = reference_loss(doubles[:n], doubles[n:], **options)
    fp64 = any(x.dtype == torch.float64 for x in leaves)
    assert loss.dtype == (torch.float64 if fp64 else torch.float32)
    assert loss.shape == expected.shape
    # Relative to the largest possible distance of two unit vectors where the maps are nearly the
    # same: there the float32 maps themselves differ by rounding.
    exact = all(x.dtype == torch.float64 for x in leaves)
    torch.testing.assert_close(
        loss.double(), expected, rtol=1e-11 if exact else 1e-5, atol=1e-24 if exact else 1e-13
    )

    wanted = [i for i, x in enumerate(leaves) if x.requires_grad]
    if not wanted:
        assert not loss.requires_grad
        return
    upstream = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape) * scale
    found = torch.autograd.grad(loss, [leaves[i] for i in wanted], upstream)
    right = torch.autograd.grad(expected, [doubles[i] for i in wanted], upstream.double())
    for i, g, r in zip(wanted, found, right, strict=True):
        assert g.dtype == leaves[i].dtype
        assert g.shape == leaves[i].shape
        # A loss that is 0 by rounding only has gradients of that size.
        tolerance = max(GRADIENT_TOLERANCE[g.dtype], 0 if exact else 1e-5)
        bound = tolerance * r.abs().max() + 1e-12 * scale
        assert torch.isfinite(g).all()
        error = (g.double() - r).abs().max()
        assert error <= bound, f"feature {i}: error {error:.3g}, allowed {bound:.3g}"
