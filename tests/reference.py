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


def at(x: Tensor, p: float, collapse: str, eps: float) -> Tensor:
    return F.normalize(raw_map(x, p, collapse).flatten(1), eps=eps)


def pair_loss(s: Tensor, t: Tensor, p: float, collapse: str, form: str, eps: float) -> Tensor:
    difference = at(s, p, collapse, eps) - at(t, p, collapse, eps)
    if form == "code":
        return difference.pow(2).mean()
    return torch.linalg.vector_norm(difference, dim=1).mean()


def channels_second(features: Sequence[Tensor], channel_dim: int = 1) -> list[Tensor]:
    return [x.movedim(-1, 1) if channel_dim == -1 else x for x in features]


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
    pairs = zip(
        channels_second(students, channel_dim), channels_second(teachers, channel_dim), strict=True
    )
    losses = [
        pair_loss(s, t, p, collapse, form, eps) * (weights[i] if weights else 1.0)
        for i, (s, t) in enumerate(pairs)
    ]
    return torch.stack(losses).sum() if reduction == "sum" else torch.stack(losses)


def least_distance(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    *,
    p: float = 2.0,
    collapse: str = "mean",
    channel_dim: int = 1,
    eps: float = 1e-12,
    **_: Any,
) -> float:
    """The least ||qs[b] - qt[b]|| of all pairs and samples; takes the options of the loss."""
    pairs = zip(
        channels_second(students, channel_dim), channels_second(teachers, channel_dim), strict=True
    )
    distances = [
        (at(s, p, collapse, eps) - at(t, p, collapse, eps)).norm(dim=1).detach() for s, t in pairs
    ]
    return float(torch.cat(distances).min())


def loss_arguments(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    masks: Sequence[Tensor] = (),
    weights: Sequence[float] = (),
    skip_tokens: Sequence[int] = (),
    p: float = 2.0,
    collapse: str = "mean",
    form: str = "code",
    reduction: str = "sum",
    eps_mode: str = "max",
    eps: float = 1e-12,
) -> tuple[Any, ...]:
    """The arguments that the operators at_loss and at_value_and_grad have in common."""
    lists = [list(each) for each in (student, teacher, masks, weights, skip_tokens)]
    return *lists, p, collapse, form, reduction, eps_mode, eps


# Largest error allowed in a gradient, as a share of its largest element: the rounding of the
# gradient's own dtype, or of fp32 sums.
GRADIENT_TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2**-10,
    torch.bfloat16: 2**-7,
}

# Largest relative error allowed in a loss, of fp32 sums and where all is fp64.
VALUE_TOLERANCE = {False: 1e-5, True: 1e-11}
# What a normalised map is known to, and so the difference of two: where they are nearly the same,
# loss and gradient are known to this over that difference.
ROUNDING, EXACT_ROUNDING = 3e-7, 1e-14


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
    exact = all(x.dtype == torch.float64 for x in leaves)
    distance = least_distance(doubles[:n], doubles[n:], **options)
    rounding = EXACT_ROUNDING if exact else ROUNDING
    blur = rounding / max(distance, rounding)
    torch.testing.assert_close(
        loss.double(),
        expected,
        rtol=max(VALUE_TOLERANCE[exact], 2 * blur),
        atol=3 * (rounding if options.get("form") == "paper" else rounding**2),
    )

    def compare(which: list[int], found: Sequence[Tensor], right: Sequence[Tensor]) -> None:
        for i, g, r in zip(which, found, right, strict=True):
            assert g.dtype == leaves[i].dtype
            assert g.shape == leaves[i].shape
            assert g.stride() == torch.empty_like(leaves[i]).stride()
            assert torch.isfinite(g).all()
            if blur > 0.1:
                continue  # maps that are the same but for rounding: any direction is right
            tolerance = max(GRADIENT_TOLERANCE[g.dtype], 0 if exact else 1e-5, 4 * blur)
            # fp16 has nothing between 0 and 2^-24.
            smallest = 2**-25 if g.dtype == torch.float16 else 0.0
            bound = tolerance * r.abs().max() + 1e-12 * scale + smallest
            error = (g.double() - r).abs().max()
            assert error <= bound, f"feature {i}: error {error:.3g}, allowed {bound:.3g}"

    wanted = [i for i, x in enumerate(leaves) if x.requires_grad]
    if wanted:
        upstream = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape) * scale
        found = torch.autograd.grad(loss, [leaves[i] for i in wanted], upstream)
        right = torch.autograd.grad(
            expected, [doubles[i] for i in wanted], upstream.double(), retain_graph=True
        )
        compare(wanted, found, right)
    else:
        assert not loss.requires_grad
    if student_grad:
        value, found = at_fused.at_value_and_grad(leaves[:n], leaves[n:], scale=scale, **options)
        # The same sums, perhaps in another order.
        torch.testing.assert_close(
            value,
            loss.detach(),
            rtol=max(1e-12 if exact else 1e-6, 2 * blur),
            atol=3 * (rounding if options.get("form") == "paper" else rounding**2),
        )
        compare(list(range(n)), found, torch.autograd.grad(expected.sum() * scale, doubles[:n]))
