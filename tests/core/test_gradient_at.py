"""Gradient-based attention transfer: input gradients, losses and double backward."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import at_fused


def net(activation: type[nn.Module] = nn.ReLU, dtype: torch.dtype = torch.float32) -> nn.Module:
    layers = nn.Conv2d(3, 8, 3, padding=1), activation(), nn.Conv2d(8, 6, 3, stride=2), activation()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)).to(dtype)


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(4, 3, 9, 9, dtype=dtype), torch.tensor([0, 3, 4, 1])


def reference_gradient(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Compute the gradient of each sample in a batch of size 1."""
    rows = []
    for sample, label in zip(x.detach(), labels, strict=True):
        image = sample[None].requires_grad_()
        F.cross_entropy(model(image), label[None]).backward(inputs=[image])
        rows.append(image.grad[0])
    return torch.stack(rows)


# ---- input gradients -----------------------------------------------------------------------------


def test_input_gradient_of_each_sample() -> None:
    """Check also that the model, its parameters and ``x`` stay unchanged."""
    model, (x, labels) = net().train(), batch()
    expected = reference_gradient(model, x, labels)
    with torch.no_grad():
        torch.testing.assert_close(at_fused.input_gradient(model, x, labels), expected)
    gradient = at_fused.input_gradient(model, x, labels, create_graph=True)
    torch.testing.assert_close(gradient, expected)
    assert gradient.requires_grad
    assert not x.requires_grad
    assert x.grad is None
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert model.training
    model.requires_grad_(False)
    torch.testing.assert_close(at_fused.input_gradient(model, x, labels), expected)
    labels[1] = -100
    gradient = at_fused.input_gradient(model, x, labels)
    assert not gradient[1].any()
    torch.testing.assert_close(gradient[0], expected[0])


def test_graph_of_logits_is_retained() -> None:
    model, (x, labels) = net(), batch()
    x.requires_grad_()
    logits = model(x)
    gradient = at_fused.input_gradient(logits, x, labels)
    torch.testing.assert_close(gradient, reference_gradient(model, x, labels))
    assert not gradient.requires_grad
    F.cross_entropy(logits, labels).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_gradient_flows_through_a_computed_input() -> None:
    model, (x, labels) = net(nn.Tanh, torch.float64), batch(torch.float64)
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)

    def square(scale: Tensor) -> Tensor:
        return at_fused.input_gradient(model, x * scale, labels, create_graph=True).square().sum()

    assert torch.autograd.gradcheck(square, scale)


# ---- losses --------------------------------------------------------------------------------------


def reference(a: Tensor, b: Tensor, form: str) -> Tensor:
    d = (a - b).reshape(len(a), -1)
    if form == "paper":
        return torch.linalg.vector_norm(d, dim=1).mean()
    return d.square().sum(1).mean() if form == "squared" else d.square().mean()


FORMS = pytest.mark.parametrize("form", ["paper", "squared", "code"])
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11, torch.float16: 1e-3, torch.bfloat16: 1e-2}


@FORMS
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(3, 3, 5, 7), (4,), (2, 70001)], ids=str)
def test_gradient_at_loss(form: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Confident networks have tiny gradients, networks without normalisation have large ones."""
    for size in (1.0, 1e-15, 1e15) if form == "paper" and dtype.itemsize > 2 else (1.0,):
        a = (size * torch.randn(shape)).to(dtype).requires_grad_()
        b = (size * torch.randn(shape)).to(dtype)
        loss = at_fused.gradient_at_loss(a, b, form=form)
        double = a.detach().double().requires_grad_()
        expected = reference(double, b.double(), form)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        rtol = 1e-11 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(loss.double(), expected, rtol=rtol, atol=0)
        (g,), (e,) = torch.autograd.grad(loss, a), torch.autograd.grad(expected, double)
        assert (g.double() - e).abs().max() <= TOLERANCE[dtype] * e.abs().max()


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2,)], ids=str)
def test_norm_of_zero_has_zero_gradient(shape: tuple[int, ...]) -> None:
    a = torch.randn(shape).requires_grad_()
    b = a.detach().clone()
    b[1] += 1
    weight = torch.ones((), requires_grad=True)
    loss = weight * at_fused.gradient_at_loss(a, b)
    g, weight_gradient = torch.autograd.grad(loss, (a, weight), create_graph=True)
    assert not g[0].any()
    torch.testing.assert_close(g[1], torch.full_like(g[1], -0.5 / a[0].numel() ** 0.5))
    second = torch.autograd.grad(g.square().sum() + weight_gradient, (a, weight))
    assert all(h.isfinite().all() for h in second)
    _, tangent = torch.func.jvp(
        torch.func.grad(lambda x: at_fused.gradient_at_loss(x, b)), (a.detach(),), (b,)
    )
    assert not tangent[0].any()
    assert tangent.isfinite().all()


def test_images_and_labels_made_in_inference_mode() -> None:
    model, (x, labels) = net(), batch()
    expected = at_fused.input_gradient(model, x, labels)
    with torch.inference_mode():
        images, classes = x.clone(), labels.clone()
    for create_graph in (False, True):
        gradient = at_fused.input_gradient(model, images, classes, create_graph=create_graph)
        torch.testing.assert_close(gradient, expected)
    gradient.sum().backward()
    leaf = x.requires_grad_()
    torch.testing.assert_close(at_fused.input_gradient(model(leaf), leaf, classes), expected)


@FORMS
def test_double_backward_through_a_network(form: str) -> None:
    """Compare the parameters' gradients with plain PyTorch's."""
    student, teacher = net(nn.Softplus, torch.float64), net(nn.ReLU, torch.float64)
    x, labels = batch(torch.float64)
    j_t = at_fused.input_gradient(teacher, x, labels)
    x.requires_grad_()

    def gradients(distance: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        logits = student(x)
        j = at_fused.input_gradient(logits, x, labels, create_graph=True)
        loss = F.cross_entropy(logits, labels) + distance(j, j_t, form=form)
        return torch.autograd.grad(loss, list(student.parameters()))

    for g, e in zip(gradients(at_fused.gradient_at_loss), gradients(reference), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-9)


def test_flip_symmetry_loss() -> None:
    model, (x, labels) = net(), batch()
    j = reference_gradient(model, x, labels)
    flipped = reference_gradient(model, x.flip(3), labels).flip(3)
    for form in ("paper", "squared", "code"):
        loss = at_fused.flip_symmetry_loss(model, x, labels, form=form)
        torch.testing.assert_close(loss, reference(j, flipped, form), rtol=1e-4, atol=1e-8)
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    assert any(g is not None and g.any() for g in gradients)
    symmetric = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5))
    assert at_fused.flip_symmetry_loss(symmetric, x, labels).item() < 1e-6


# ---- errors --------------------------------------------------------------------------------------

X, Y = torch.randn(2, 3, 4, 4), torch.tensor([0, 1])
LINEAR = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))

ERRORS: dict[str, tuple[Any, Any, Any]] = {
    "x must be a tensor, got list": (LINEAR, [1], Y),
    "x must be float32.*torch.int64": (LINEAR, X.long(), Y),
    "model must be a module, a function or logits, got int": (3, X, Y),
    "x must require a gradient": (LINEAR(X), X, Y),
    "model: the logits do not depend on x": (lambda x: torch.ones(2, 5), X, Y),
    "logits do not depend on x": (LINEAR(X), X + X.new_zeros((), requires_grad=True), Y),
    r"return logits \(B, K\), got tuple": (lambda x: (x, x), X, Y),
    r"logits must be \(B, K\) with the B of x, 2": (lambda x: x, X, Y),
    "labels must be int64": (LINEAR, X, Y.float()),
    "labels must be from 0 to 4.*Target 5": (LINEAR, X, Y + 4),
    r"labels must be \(B,\), here \(2,\)": (LINEAR, X, Y[:1]),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_of_input_gradient(message: str) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        at_fused.input_gradient(*ERRORS[message])


def test_other_errors() -> None:
    with pytest.raises(ValueError, match="form must be 'paper', 'squared' or 'code', got 'mean'"):
        at_fused.gradient_at_loss(X, X, form="mean")
    with pytest.raises(ValueError, match="same batch size, got 2 and 1"):
        at_fused.gradient_at_loss(X, X[:1])
    with pytest.raises(TypeError, match="student must be a tensor, got list"):
        at_fused.gradient_at_loss([X], [X])
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference mode has no grad"):
        at_fused.input_gradient(LINEAR, X, Y)


def test_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[2] / "examples/gradient_at.py"
    torch.set_num_threads(1)
    accuracies = runpy.run_path(str(path))["main"](epochs=12, seeds=1)
    assert all(0.3 < accuracy <= 1 for accuracy in accuracies)
    assert len(accuracies) == 2
    assert "accuracy" in capsys.readouterr().out
