"""Real steps with AttentionTransfer: their curves, their memory, and two processes of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from reference import popular_at_loss
from sklearn.datasets import load_digits
from test_train_parallel import together
from torch import Tensor, nn

import at_fused
from at_fused import AttentionTransfer
from at_fused.train.wrn import WRN

sys.path.append(str(Path(__file__).parents[1]))
from benchmarks.measure import Allocations

BETA = 100.0
GROUPS = ["groups.0", "groups.1", "groups.2"]
Step = Callable[[Tensor, Tensor], Tensor]


def networks(base: int) -> tuple[WRN, WRN]:
    torch.manual_seed(0)
    student, teacher = (WRN(10, k, in_channels=1, base=base) for k in (1, 2))
    return student, teacher.eval()


def with_features(student: WRN, teacher: WRN, loss: Callable[..., Tensor]) -> Step:
    """A step of a program whose networks give their features away."""

    def step(x: Tensor, y: Tensor) -> Tensor:
        logits, features = student(x)
        with torch.no_grad():
            _, targets = teacher(x)
        return F.cross_entropy(logits, y) + BETA * loss(features, targets)

    return step


def eager_loss(features: tuple[Tensor, ...], targets: tuple[Tensor, ...]) -> Tensor:
    return sum(popular_at_loss(s, t) for s, t in zip(features, targets, strict=True))


def tapped(student: WRN, teacher: WRN) -> Step:
    at = AttentionTransfer(student, teacher, GROUPS, beta=BETA)

    def step(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(student(x)[0], y) + at(x)

    return step


PROGRAMS: dict[str, Callable[[WRN, WRN], Step]] = {
    "eager": lambda s, t: with_features(s, t, eager_loss),
    "drop-in": lambda s, t: with_features(s, t, at_fused.at_loss),
    "tap": tapped,
}


# ---- curves --------------------------------------------------------------------------------------


def curve(program: str, dtype: torch.dtype, steps: int, nudge: float = 0.0) -> Tensor:
    """Losses of SGD on the digits; ``nudge`` is a relative change of the first weights."""
    student, teacher = (net.to(dtype) for net in networks(4))
    with torch.no_grad():
        student.stem.weight.mul_(1 + nudge)
    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images).to(dtype).reshape(-1, 1, 8, 8) / 16
    y = torch.from_numpy(labels)
    step = PROGRAMS[program](student, teacher)
    optimizer = torch.optim.SGD(student.parameters(), 0.02, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        batch = torch.randint(len(x), (32,), generator=generator)
        loss = step(x[batch], y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().double())
    return torch.stack(losses)


def test_curves_agree_to_rounding() -> None:
    steps = 100
    curves = {name: curve(name, torch.float32, steps) for name in PROGRAMS}
    assert curves["eager"][-10:].mean() < 0.7 * curves["eager"][:10].mean()  # it does learn
    # What rounding makes of itself in a hundred steps: the program itself, an ulp off at the start.
    rounding = (curve("eager", torch.float32, steps, nudge=2**-23) - curves["eager"]).abs().max()
    for name in ("drop-in", "tap"):
        assert (curves[name] - curves["eager"]).abs().max() <= 4 * rounding
    assert rounding < 1e-2
    exact = {name: curve(name, torch.float64, 10) for name in PROGRAMS}
    for name in ("drop-in", "tap"):
        torch.testing.assert_close(exact[name], exact["eager"], rtol=1e-11, atol=0)


# ---- memory --------------------------------------------------------------------------------------


def test_memory_of_a_step_is_that_of_a_step_without() -> None:
    check_memory("cpu", Allocations().take)


def check_memory(device: str, peak_bytes: Callable[[Callable[[], object]], int]) -> None:
    student, teacher = (WRN(10, k).to(device) for k in (1, 2))
    x, y = torch.randn(16, 3, 32, 32, device=device), torch.randint(10, (16,), device=device)

    def alone() -> None:
        student.zero_grad()
        F.cross_entropy(student(x)[0], y).backward()

    def beside_the_teacher() -> None:
        student.zero_grad()
        logits = student(x)[0]
        with torch.no_grad():
            teacher(x)
        F.cross_entropy(logits, y).backward()

    eager = with_features(student, teacher, eager_loss)
    without = peak_bytes(alone)
    without_but_teacher = peak_bytes(beside_the_teacher)
    popular = peak_bytes(lambda: (student.zero_grad(), eager(x, y).backward()))
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
    student, teacher = (net.double() for net in networks(4))
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
