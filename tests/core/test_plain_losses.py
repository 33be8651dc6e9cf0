"""Losses in plain PyTorch inside PyTorch: derivatives, transforms, compilation, inference mode."""

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
    """To second order, and in forward mode; and vmap, of the teacher alone as well."""
    loss = LOSSES[name]
    s, t = (torch.randn(2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    call, sides = (lambda s: loss(s, t), (s,)) if "alpha=0.0" in name else (loss, (s, t))
    assert torch.autograd.gradcheck(call, sides, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, sides, check_fwd_over_rev=True)
    each = torch.func.vmap(loss)(torch.stack([s, t]), torch.stack([t, t]))
    torch.testing.assert_close(each, torch.stack([loss(s, t), loss(t, t)]))
    each = torch.func.vmap(lambda t: loss(s, t))(torch.stack([s, t]))
    torch.testing.assert_close(each, torch.stack([loss(s, s), loss(s, t)]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_a_teacher_under_inference_mode(name: str, dtype: torch.dtype) -> None:
    loss, s, t = LOSSES[name], torch.randn(2, 4, requires_grad=True), torch.randn(2, 4).to(dtype)
    with torch.inference_mode():
        teacher = t.clone()
    found, right = loss(s, teacher), loss(s, t)
    assert torch.equal(found, right)
    above = torch.ones_like(found)
    assert torch.equal(*torch.autograd.grad(found, s, above), *torch.autograd.grad(right, s, above))


@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.exhaustive)]
)
def test_compiled_in_one_graph(compiler: str) -> None:
    s, t = torch.randn(2, 4, requires_grad=True), torch.randn(2, 4)

    def step(s: Tensor, t: Tensor) -> Tensor:
        return sum(loss(2 * s, t).sum() for loss in LOSSES.values())

    found, right = torch.compile(step, fullgraph=True, backend=compiler)(s, t), step(s, t)
    torch.testing.assert_close(found, right)
    torch.testing.assert_close(torch.autograd.grad(found, s), torch.autograd.grad(right, s))
