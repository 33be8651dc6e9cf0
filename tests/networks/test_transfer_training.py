"""Real steps with AttentionTransfer: their memory, and two processes of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from reference import popular_at_loss
from test_train_parallel import together
from torch import Tensor, nn

from at_fused import AttentionTransfer
from at_fused.train.networks import WRN

sys.path.append(str(Path(__file__).parents[2]))
from benchmarks.measure import Allocations

BETA = 100.0
GROUPS = ["groups.0", "groups.1", "groups.2"]


# ---- memory --------------------------------------------------------------------------------------


def test_memory_of_a_step_is_that_of_a_step_without() -> None:
    check_memory("cpu", Allocations().take)


def check_memory(device: str, peak_bytes: Callable[[Callable[[], object]], int]) -> None:
    student, teacher = (WRN(10, k).to(device) for k in (1, 2))
    n = 16 if device == "cuda" else 4
    x, y = torch.randn(n, 3, 32, 32, device=device), torch.randint(10, (n,), device=device)

    def alone() -> None:
        student.zero_grad()
        F.cross_entropy(student(x)[0], y).backward()

    def beside_the_teacher() -> None:
        student.zero_grad()
        logits = student(x)[0]
        with torch.no_grad():
            teacher(x)
        F.cross_entropy(logits, y).backward()

    def eager() -> None:
        student.zero_grad()
        logits, features = student(x)
        with torch.no_grad():
            _, targets = teacher(x)
        losses = [popular_at_loss(s, t) for s, t in zip(features, targets, strict=True)]
        (F.cross_entropy(logits, y) + BETA * sum(losses)).backward()

    without = peak_bytes(alone)
    without_but_teacher = peak_bytes(beside_the_teacher)
    popular = peak_bytes(eager)
    at = AttentionTransfer(student, teacher, GROUPS, beta=BETA)

    def prepared() -> None:
        student.zero_grad()
        at.prepare(x)
        (F.cross_entropy(student(x)[0], y) + at(x)).backward()

    def plain() -> None:
        student.zero_grad()
        (F.cross_entropy(student(x)[0], y) + at(x)).backward()

    assert peak_bytes(prepared) <= 1.01 * without
    assert peak_bytes(plain) <= 1.01 * without_but_teacher
    assert popular > 1.2 * without  # or this test could not fail


# ---- two processes -------------------------------------------------------------------------------


def train_steps(wrap: Callable[[nn.Module], Any], part: slice) -> tuple[Any, Tensor]:
    """Two steps on the whole batch, or on a process's half of it; gradients of the second."""
    torch.manual_seed(0)
    student, teacher = (WRN(10, k, in_channels=1, base=4).double() for k in (1, 2))
    student.eval()  # BatchNorm's statistics of a half are not those of the whole
    x, y = torch.randn(8, 1, 8, 8).double(), torch.arange(8)
    model = wrap(student)
    at = AttentionTransfer(model, teacher, GROUPS, beta=BETA)
    optimizer = torch.optim.SGD(student.parameters(), 0.01)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[part])[0], y[part]) + at(x[part])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [p.grad for p in student.parameters()], torch.stack(losses)


def test_beta_means_the_same_in_two_processes(tmp_path: Path) -> None:
    def member(rank: int) -> None:
        half = train_steps(nn.parallel.DistributedDataParallel, slice(4 * rank, 4 * rank + 4))
        torch.save(half, tmp_path / f"{rank}.pt")

    assert together(2, member) == [0, 0]
    gradients, losses = train_steps(lambda net: net, slice(8))
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for found, _ in halves:
        torch.testing.assert_close(found, gradients)
    torch.testing.assert_close((halves[0][1] + halves[1][1]) / 2, losses)
