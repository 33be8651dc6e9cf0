"""Losses written in plain PyTorch with torch.func, torch.compile and inference mode."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from plain_losses import DTYPES
from torch import Tensor

from at_fused import features_loss, gradient_at_loss, kd_loss

Loss = Callable[[Tensor, Tensor], Tensor]
LABELS = torch.tensor([2, -100])


def kd(alpha: float) -> Loss:
    return lambda s, t: kd_loss(s, t, LABELS, T=2.0, alpha=alpha, label_smoothing=0.1)


def two_pairs(form: str, reduction: str) -> Loss:
    options = {"weights": [2.0, 0.5], "form": form, "reduction": reduction}
    return lambda s, t: features_loss([s, 3 * s[:, 1:]], [t, t[:, 1:]], **options)


LOSSES: dict[str, Loss] = {
    **{f"kd_loss, alpha={alpha}": kd(alpha) for alpha in (0.6, 0.0, 1.0)},
    "kd_loss of images": lambda s, t: kd_loss(s[..., None], t[..., None], LABELS[:, None]),
    **{
        f"features_loss, {form}, {reduction}": two_pairs(form, reduction)
        for form in ("mean", "sum")
        for reduction in ("sum", "none")
    },
    **{
        f"gradient_at_loss, {form}": lambda s, t, form=form: gradient_at_loss(s, t, form=form)
        for form in ("paper", "squared", "code")
    },
}


@pytest.mark.parametrize("name", LOSSES)
def test_derivatives_and_transforms(name: str) -> None:
    """Check derivatives to second order, forward mode, and vmap over both or only the teacher."""
    loss = LOSSES[name]
    s, t = (torch.randn(2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    call, sides = (lambda s: loss(s, t), (s,)) if "alpha=0.0" in name else (loss, (s, t))
    assert torch.autograd.gradcheck(call, sides, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, sides, check_fwd_over_rev=True)
    losses = torch.func.vmap(loss)(torch.stack([s, t]), torch.stack([t, t]))
    torch.testing.assert_close(losses, torch.stack([loss(s, t), loss(t, t)]))
    losses = torch.func.vmap(lambda t: loss(s, t))(torch.stack([s, t]))
    torch.testing.assert_close(losses, torch.stack([loss(s, s), loss(s, t)]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_teacher_made_in_inference_mode(name: str, dtype: torch.dtype) -> None:
    loss, s, t = LOSSES[name], torch.randn(2, 4, requires_grad=True), torch.randn(2, 4).to(dtype)
    with torch.inference_mode():
        teacher = t.clone()
    losses = loss(s, teacher), loss(s, t)
    assert torch.equal(*losses)
    upstream = torch.ones_like(losses[0])
    assert torch.equal(*(torch.autograd.grad(x, s, upstream)[0] for x in losses))


@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.exhaustive)]
)
def test_compile_fullgraph(compiler: str) -> None:
    s, t = torch.randn(2, 4, requires_grad=True), torch.randn(2, 4)

    def step(s: Tensor, t: Tensor) -> Tensor:
        return sum(loss(2 * s, t).sum() for loss in LOSSES.values())

    losses = torch.compile(step, fullgraph=True, backend=compiler)(s, t), step(s, t)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, s) for loss in losses))
