"""``gradient_ratio`` and ``beta="auto"``."""

from __future__ import annotations

import copy
import math
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import at_fused
from at_fused import AttentionTransfer, gradient_ratio


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 3)
        self.head = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        feature: Tensor = self.second(self.first(x).relu())
        return self.head(feature.mean((2, 3)))


@pytest.fixture
def networks() -> tuple[Student, Student, Tensor, Tensor]:
    torch.manual_seed(0)
    return Student(), Student(), torch.randn(7, 3, 9, 9), torch.arange(7) % 6


def flat_grad(loss: Tensor, parameters: Any) -> Tensor:
    grads = torch.autograd.grad(loss, [*parameters], retain_graph=True)
    return torch.cat([g.flatten() for g in grads]).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_ratio_and_cosine_match_gradients_of_shared_parameters(
    networks: Any, dtype: torch.dtype
) -> None:
    student, teacher, x, y = networks
    student, teacher, x = student.to(dtype), teacher.to(dtype), x.to(dtype)
    at = AttentionTransfer(student, teacher, ["first", "second"], beta=30.0, verbose=False)
    task, transfer = cross_entropy(student(x), y), at(x)
    actual = gradient_ratio(task, transfer, student)
    # Only the task loss depends on the head.
    shared = [*student.first.parameters(), *student.second.parameters()]
    a, b = flat_grad(task, shared), flat_grad(transfer, shared)
    expected = (a.norm(), b.norm(), b.norm() / a.norm(), a @ b / a.norm() / b.norm())
    assert [*actual] == pytest.approx([float(value) for value in expected], rel=1e-5)
    assert gradient_ratio(task, 2 * transfer, student.parameters()).ratio == pytest.approx(
        2 * actual.ratio, rel=1e-6
    )
    # It leaves .grad alone and keeps the graph for a backward pass.
    assert all(p.grad is None for p in student.parameters())
    (task + transfer).backward()
    grads = torch.cat([p.grad.flatten() for p in shared]).double()
    torch.testing.assert_close(grads, a + b, rtol=1e-5, atol=1e-7)


def test_gradients_with_respect_to_features(networks: Any) -> None:
    student, _, x, y = networks
    feature = student.first(x)
    task = cross_entropy(student.head(student.second(feature.relu()).mean((2, 3))), y)
    transfer = at_fused.at_loss([feature], [torch.randn(7, 2, 7, 7)])
    actual = gradient_ratio(task, transfer, [feature])
    assert actual.task == pytest.approx(float(flat_grad(task, [feature]).norm()), rel=1e-5)
    assert actual.transfer == pytest.approx(float(flat_grad(transfer, [feature]).norm()), rel=1e-5)


@pytest.mark.filterwarnings("error")
def test_method_prints_its_result(networks: Any, capsys: pytest.CaptureFixture[str]) -> None:
    student, teacher, x, y = networks
    at = AttentionTransfer(student, teacher, ["second"], beta=1e3, verbose=False)
    task, transfer = cross_entropy(student(x), y), at(x)
    ratio = at.gradient_ratio(task, transfer)
    assert capsys.readouterr().out == f"beta 1000: {ratio}\n"
    assert f"transfer / task {ratio.ratio:.3g} (" in str(ratio)
    assert ratio == at.gradient_ratio(task, transfer, verbose=False)
    assert ratio == gradient_ratio(task, transfer, student)
    assert capsys.readouterr().out == ""


def test_ratio_of_a_compiled_student(networks: Any) -> None:
    student, teacher, x, y = networks
    at = AttentionTransfer(student, teacher, ["second"], beta=1e3, verbose=False)
    expected = at.gradient_ratio(cross_entropy(student(x), y), at(x), verbose=False)
    compiled = torch.compile(student, backend="aot_eager")
    actual = at.gradient_ratio(cross_entropy(compiled(x), y), at(x), verbose=False)
    assert [*actual] == pytest.approx([*expected], rel=1e-4)


# ---- beta="auto" ---------------------------------------------------------------------------------


def reference_training(networks: Any, steps: int) -> tuple[list[float], list[float]]:
    """Train with beta from its formula; return the ratios at beta 1, and the losses."""
    student, teacher, x, y = copy.deepcopy(networks)
    at = AttentionTransfer(student, teacher, ["first", "second"], beta=1.0, verbose=False)
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    ratios, losses, beta = [], [], 0.0
    for step in range(steps):
        task, transfer = cross_entropy(student(x), y), at(x)
        if step < 10:
            ratios.append(at.gradient_ratio(task, transfer, verbose=False).ratio)
            beta = 3 / statistics.geometric_mean(ratios)
        losses.append(beta * transfer.item())
        optimizer.zero_grad()
        (task + beta * transfer).backward()
        optimizer.step()
    return ratios, losses


def test_auto_beta_is_fixed_after_ten_steps(
    networks: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    ratios, losses = reference_training(networks, 13)
    student, teacher, x, y = networks
    at = AttentionTransfer(student, teacher, ["first", "second"], beta="auto")
    assert at.beta == "auto"
    assert "beta='auto'" in repr(at)
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    for step, expected in enumerate(losses):
        task = cross_entropy(student(x), y)
        loss = at(x, task_loss=task) if step < 11 else at(x)
        assert loss.item() == pytest.approx(expected, rel=1e-3)
        beta = 3 / statistics.geometric_mean(ratios[: step + 1])
        assert at.beta == pytest.approx(beta, rel=1e-3)
        optimizer.zero_grad()
        (task + loss).backward()
        optimizer.step()
    line = f"beta {at.beta:.3g}, from the gradients of the first 10 calls\n"
    assert capsys.readouterr().out == line
    # Assigning "auto" starts a new measurement.
    at.beta = 5.0
    assert (at.beta, "beta=5.0" in repr(at)) == (5.0, True)
    at.beta = "auto"
    assert at.beta == "auto"


def test_auto_beta_requires_the_task_loss(networks: Any) -> None:
    student, teacher, x, y = networks
    at = AttentionTransfer(student, teacher, ["second"], beta="auto", verbose=False)
    task = cross_entropy(student(x), y)
    with pytest.raises(ValueError, match="task_loss must be given in the first 10 calls"):
        at(x)
    assert at(x, task_loss=task).requires_grad  # the error left the recorded features in place
    with pytest.raises(ValueError, match="task_loss must be a scalar that requires a gradient"):
        student(x), at(x, task_loss=cross_entropy(student(x), y).detach())
    assert at(x, task_loss=cross_entropy(student(x), y)).requires_grad
    fixed = AttentionTransfer(student, teacher, ["second"], beta=2, verbose=False)
    for beta in ("Auto", "1"):
        with pytest.raises(ValueError, match=f"beta must be a number or 'auto', got '{beta}'"):
            fixed.beta = beta  # type: ignore[assignment]
    with pytest.raises(ValueError, match="task_loss is for beta='auto', got beta=2"):
        student(x), fixed(x, task_loss=task)
    student.requires_grad_(False).head.requires_grad_(True)
    at.beta = "auto"
    with pytest.raises(ValueError, match="beta: 'auto' needs a tapped layer that is trained"):
        at(x, task_loss=cross_entropy(student(x), y))


def test_auto_beta_skips_steps_with_a_zero_gradient(networks: Any) -> None:
    student, teacher, x, y = networks
    at = AttentionTransfer(student, teacher, ["second"], beta="auto", verbose=False)
    head = copy.deepcopy(student.head)
    nn.init.zeros_(student.head.weight)  # so the other layers have no gradient
    assert at(x, task_loss=cross_entropy(student(x), y)).item() == 0
    student.head = head
    task = cross_entropy(student(x), y)
    at(x, task_loss=task)
    first = at.beta
    assert isinstance(first, float)
    at(x, task_loss=0 * cross_entropy(student(x), y))
    assert at.beta == first
    for _ in range(7):
        at(x, task_loss=0 * cross_entropy(student(x), y))
    for skipped in (10, 11):
        message = rf"'auto' needs steps .* got {skipped} other steps, .* ratio of inf"
        with pytest.raises(ValueError, match=message):
            at(x, task_loss=0 * cross_entropy(student(x), y))


def test_auto_beta_without_gradients_uses_the_measured_value(networks: Any) -> None:
    student, teacher, x, y = networks
    at = AttentionTransfer(student, teacher, ["second"], beta="auto", verbose=False)
    with torch.no_grad(), pytest.raises(ValueError, match="beta: 'auto' is not measured yet"):
        student(x), at(x)
    loss = at(x, task_loss=cross_entropy(student(x), y))
    with torch.no_grad():
        student(x)
        assert at(x).item() == pytest.approx(loss.item())
    # A resumed run assigns the measured beta and may still pass task_loss.
    resumed = AttentionTransfer(student, teacher, ["second"], beta="auto", verbose=False)
    resumed.beta = at.beta
    assert resumed(x, task_loss=cross_entropy(student(x), y)).item() == pytest.approx(loss.item())


def test_task_loss_may_use_the_teachers_logits(networks: Any) -> None:
    student, teacher, x, y = networks
    at = AttentionTransfer(student, teacher, ["second"], beta="auto", verbose=False)
    at.prepare(x)
    assert at.teacher_output is not None
    task = at_fused.kd_loss(student(x), at.teacher_output, y)
    assert at(x, task_loss=task).requires_grad


def test_small_gradients_under_autocast(networks: Any) -> None:
    """Without a scale the float16 gradients underflow."""
    student, teacher, x, y = networks
    at = AttentionTransfer(student, teacher, ["second"], beta=1e-5, verbose=False)
    expected = at.gradient_ratio(cross_entropy(student(x), y), at(x), verbose=False)
    with torch.autocast("cpu", torch.float16):
        task, transfer = cross_entropy(student(x), y), at(x)
    actual = at.gradient_ratio(task, transfer, verbose=False)
    assert [*actual] == pytest.approx([*expected], rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_gradients_in_16_bits(dtype: torch.dtype) -> None:
    w = torch.ones(10_000, dtype=dtype, requires_grad=True)
    actual = gradient_ratio((w * 1000).sum(), (w * -2000).sum(), [w])
    assert [*actual] == pytest.approx([1e5, 2e5, 2.0, -1.0], rel=1e-2)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_gradients_with_squares_beyond_float32(size: float) -> None:
    w = torch.randn(5, requires_grad=True)
    a, b = torch.randn(5), torch.randn(5)
    actual = gradient_ratio((w * a * size).sum(), (w * b).sum(), [w])
    a, b = a.double(), b.double()
    expected = (size * a.norm(), b.norm(), b.norm() / a.norm() / size, a @ b / a.norm() / b.norm())
    assert [*actual] == pytest.approx([float(value) for value in expected], rel=1e-5)


def test_sparse_gradients() -> None:
    table = nn.Embedding(5, 3, sparse=True)
    actual = gradient_ratio(table(torch.tensor([1, 1])).sum(), 2 * table.weight.sum(), table)
    assert [*actual] == pytest.approx([12**0.5, 60**0.5, 5**0.5, 12 / 720**0.5])


def test_zero_gradients() -> None:
    w = torch.ones(3, requires_grad=True)
    one, zero = w.sum(), (0 * w).sum()
    assert gradient_ratio(one, zero, [w])[:3] == pytest.approx((math.sqrt(3), 0, 0))
    assert gradient_ratio(zero, one, [w]).ratio == math.inf
    assert math.isnan(gradient_ratio(one, zero, [w]).cosine)
    assert math.isnan(gradient_ratio(zero, zero, [w]).ratio)


def test_a_shared_parameter_counts_once() -> None:
    w = torch.ones(4, requires_grad=True)
    frozen = torch.ones(4)
    assert gradient_ratio(w.sum(), w.sum(), iter([w, w, frozen])).task == 2


W = torch.ones(2, requires_grad=True)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1.0, W.sum(), [W]), TypeError, "task_loss must be a"),
        ((W.sum(), W, [W]), ValueError, r"transfer_loss must be a scalar .*, got shape \(2,\)"),
        ((torch.ones(()), W.sum(), [W]), ValueError, "task_loss .*, got one without a graph"),
        ((W.sum(), W.sum(), [1.0]), TypeError, "parameters must be tensors, got float"),
        ((W.sum(), W.sum(), [torch.ones(2)]), ValueError, "requires a gradient, got none"),
        ((W.sum(), W.sum(), []), ValueError, "requires a gradient, got none"),
        ((W.sum(), W.sum(), W), TypeError, "must be an iterable of tensors or a module, got a t"),
        ((W.sum(), W.sum(), None), TypeError, "iterable of tensors or a module, got NoneType"),
        ((W.sum(), W.sum(), [W + 0j]), TypeError, "parameters must be real, got torch.complex64"),
        ((W.sum(), mse_loss(torch.ones(2, requires_grad=True), W.detach()), [W]), ValueError,
         "both losses depend on, got none; pass the student's"),
    ],
)  # fmt: skip
def test_invalid_arguments(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gradient_ratio(*arguments)
