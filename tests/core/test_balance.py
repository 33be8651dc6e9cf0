"""gradient_ratio: the norms that it gives, and what it leaves as it was."""

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


def flat(loss: Tensor, parameters: Any) -> Tensor:
    grads = torch.autograd.grad(loss, [*parameters], retain_graph=True)
    return torch.cat([g.flatten() for g in grads]).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_ratio_and_cosine_are_those_of_the_shared_parameters(
    networks: Any, dtype: torch.dtype
) -> None:
    student, teacher, x, y = networks
    student, teacher, x = student.to(dtype), teacher.to(dtype), x.to(dtype)
    at = AttentionTransfer(student, teacher, ["first", "second"], beta=30.0, verbose=False)
    task, transfer = cross_entropy(student(x), y), at(x)
    found = gradient_ratio(task, transfer, student)
    # The head learns from the task alone.
    shared = [*student.first.parameters(), *student.second.parameters()]
    a, b = flat(task, shared), flat(transfer, shared)
    wanted = (a.norm(), b.norm(), b.norm() / a.norm(), a @ b / a.norm() / b.norm())
    assert [*found] == pytest.approx([float(value) for value in wanted], rel=1e-5)
    assert gradient_ratio(task, 2 * transfer, student.parameters()).ratio == pytest.approx(
        2 * found.ratio, rel=1e-6
    )
    # A backward may follow, and finds what it would have found.
    assert all(p.grad is None for p in student.parameters())
    (task + transfer).backward()
    grads = torch.cat([p.grad.flatten() for p in shared]).double()
    torch.testing.assert_close(grads, a + b, rtol=1e-5, atol=1e-7)


def test_gradients_at_features(networks: Any) -> None:
    student, _, x, y = networks
    feature = student.first(x)
    task = cross_entropy(student.head(student.second(feature.relu()).mean((2, 3))), y)
    transfer = at_fused.at_loss([feature], [torch.randn(7, 2, 7, 7)])
    found = gradient_ratio(task, transfer, [feature])
    assert found.task == pytest.approx(float(flat(task, [feature]).norm()), rel=1e-5)
    assert found.transfer == pytest.approx(float(flat(transfer, [feature]).norm()), rel=1e-5)


@pytest.mark.filterwarnings("error")
def test_a_line_is_printed_on_request(networks: Any, capsys: pytest.CaptureFixture[str]) -> None:
    student, teacher, x, y = networks
    at = AttentionTransfer(student, teacher, ["second"], beta=1e3, verbose=False)
    task, transfer = cross_entropy(student(x), y), at(x)
    found = at.gradient_ratio(task, transfer)
    assert capsys.readouterr().out == f"beta 1000: {found}\n"
    assert f"transfer / task {found.ratio:.3g} (" in str(found)
    assert found == at.gradient_ratio(task, transfer, verbose=False)
    assert found == gradient_ratio(task, transfer, student)
    assert capsys.readouterr().out == ""


def test_a_student_in_torch_compile(networks: Any) -> None:
    student, teacher, x, y = networks
    at = AttentionTransfer(student, teacher, ["second"], beta=1e3, verbose=False)
    expected = at.gradient_ratio(cross_entropy(student(x), y), at(x), verbose=False)
    compiled = torch.compile(student, backend="aot_eager")
    found = at.gradient_ratio(cross_entropy(compiled(x), y), at(x), verbose=False)
    assert [*found] == pytest.approx([*expected], rel=1e-4)


# ---- beta="auto"


def losses_by_hand(networks: Any, steps: int) -> tuple[list[float], list[float]]:
    """The ratios at beta 1, and the losses, of training in which beta is chosen by its formula."""
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


def test_auto_is_measured_in_ten_steps_and_then_fixed(
    networks: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    ratios, expected = losses_by_hand(networks, 13)
    student, teacher, x, y = networks
    at = AttentionTransfer(student, teacher, ["first", "second"], beta="auto")
    assert at.beta == "auto"
    assert "beta='auto'" in repr(at)
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    for step, wanted in enumerate(expected):
        task = cross_entropy(student(x), y)
        loss = at(x, task_loss=task) if step < 11 else at(x)
        assert loss.item() == pytest.approx(wanted, rel=1e-3)
        beta = 3 / statistics.geometric_mean(ratios[: step + 1])
        assert at.beta == pytest.approx(beta, rel=1e-3)
        optimizer.zero_grad()
        (task + loss).backward()
        optimizer.step()
    said = f"beta {at.beta:.3g}, from the gradients of the first 10 calls\n"
    assert capsys.readouterr().out == said
    # A number takes its place, and "auto" begins again.
    at.beta = 5.0
    assert (at.beta, "beta=5.0" in repr(at)) == (5.0, True)
    at.beta = "auto"
    assert at.beta == "auto"


def test_auto_needs_the_task(networks: Any) -> None:
    student, teacher, x, y = networks
    at = AttentionTransfer(student, teacher, ["second"], beta="auto", verbose=False)
    task = cross_entropy(student(x), y)
    with pytest.raises(ValueError, match="task_loss must be given in the first 10 calls"):
        at(x)
    assert at(x, task_loss=task).requires_grad  # the pass is still there
    with pytest.raises(ValueError, match="task_loss must be a scalar that requires a gradient"):
        student(x), at(x, task_loss=cross_entropy(student(x), y).detach())
    assert at(x, task_loss=cross_entropy(student(x), y)).requires_grad
    for wrong in (1.0, "Auto", "1"):
        other = AttentionTransfer(student, teacher, ["second"], beta=2, verbose=False)
        if isinstance(wrong, str):
            with pytest.raises(ValueError, match=f"beta must be a number or 'auto', got '{wrong}'"):
                other.beta = wrong  # type: ignore[assignment]
        with pytest.raises(ValueError, match="task_loss is for beta='auto', got beta=2"):
            student(x), other(x, task_loss=task)
    student.requires_grad_(False).head.requires_grad_(True)
    at.beta = "auto"
    with pytest.raises(ValueError, match="beta: 'auto' needs a tapped layer that is trained"):
        at(x, task_loss=cross_entropy(student(x), y))


def test_auto_leaves_out_steps_without_two_gradients(networks: Any) -> None:
    """A last layer of zeros gives the others no gradient at first."""
    student, teacher, x, y = networks
    at = AttentionTransfer(student, teacher, ["second"], beta="auto", verbose=False)
    head = copy.deepcopy(student.head)
    nn.init.zeros_(student.head.weight)
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
    for missed in (10, 11):
        words = rf"'auto' needs steps .* got {missed} others, .* ratio of inf"
        with pytest.raises(ValueError, match=words):
            at(x, task_loss=0 * cross_entropy(student(x), y))


def test_auto_without_gradients_takes_what_is_measured(networks: Any) -> None:
    student, teacher, x, y = networks
    at = AttentionTransfer(student, teacher, ["second"], beta="auto", verbose=False)
    with torch.no_grad(), pytest.raises(ValueError, match="beta: 'auto' is not measured yet"):
        student(x), at(x)
    loss = at(x, task_loss=cross_entropy(student(x), y))
    with torch.no_grad():
        student(x)
        assert at(x).item() == pytest.approx(loss.item())
    # A measured beta goes on in the same loop.
    again = AttentionTransfer(student, teacher, ["second"], beta="auto", verbose=False)
    again.beta = at.beta
    assert again(x, task_loss=cross_entropy(student(x), y)).item() == pytest.approx(loss.item())


def test_the_teachers_logits_for_a_task_with_distillation(networks: Any) -> None:
    student, teacher, x, y = networks
    at = AttentionTransfer(student, teacher, ["second"], beta="auto", verbose=False)
    at.prepare(x)
    assert at.teacher_output is not None
    task = at_fused.kd_loss(student(x), at.teacher_output, y)
    assert at(x, task_loss=task).requires_grad


def test_small_gradients_of_autocast_are_scaled(networks: Any) -> None:
    """Without a scale the gradient of float16 is far too small."""
    student, teacher, x, y = networks
    at = AttentionTransfer(student, teacher, ["second"], beta=1e-5, verbose=False)
    expected = at.gradient_ratio(cross_entropy(student(x), y), at(x), verbose=False)
    with torch.autocast("cpu", torch.float16):
        task, transfer = cross_entropy(student(x), y), at(x)
    found = at.gradient_ratio(task, transfer, verbose=False)
    assert [*found] == pytest.approx([*expected], rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_gradients_of_16_bits(dtype: torch.dtype) -> None:
    w = torch.ones(10_000, dtype=dtype, requires_grad=True)
    found = gradient_ratio((w * 1000).sum(), (w * -2000).sum(), [w])
    assert [*found] == pytest.approx([1e5, 2e5, 2.0, -1.0], rel=1e-2)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_squares_beyond_float32(size: float) -> None:
    w = torch.randn(5, requires_grad=True)
    a, b = torch.randn(5), torch.randn(5)
    found = gradient_ratio((w * a * size).sum(), (w * b).sum(), [w])
    a, b = a.double(), b.double()
    wanted = (size * a.norm(), b.norm(), b.norm() / a.norm() / size, a @ b / a.norm() / b.norm())
    assert [*found] == pytest.approx([float(value) for value in wanted], rel=1e-5)


def test_sparse_gradients() -> None:
    table = nn.Embedding(5, 3, sparse=True)
    found = gradient_ratio(table(torch.tensor([1, 1])).sum(), 2 * table.weight.sum(), table)
    assert [*found] == pytest.approx([12**0.5, 60**0.5, 5**0.5, 12 / 720**0.5])


def test_zero_gradients() -> None:
    w = torch.ones(3, requires_grad=True)
    one, zero = w.sum(), (0 * w).sum()
    assert gradient_ratio(one, zero, [w])[:3] == pytest.approx((math.sqrt(3), 0, 0))
    assert gradient_ratio(zero, one, [w]).ratio == math.inf
    assert math.isnan(gradient_ratio(one, zero, [w]).cosine)
    assert math.isnan(gradient_ratio(zero, zero, [w]).ratio)


def test_a_weight_that_two_modules_share_counts_once() -> None:
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
         "both losses depend on, got none: give the student's"),
    ],
)  # fmt: skip
def test_wrong_arguments(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gradient_ratio(*arguments)
