"""Peak memory of training steps with AttentionTransfer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from reference import eager_at_loss
from transfer_networks import BETA, GROUPS

from at_fused import AttentionTransfer
from at_fused.train.networks import WRN

sys.path.append(str(Path(__file__).parents[2]))
from benchmarks.measure import PeakMemory


def test_step_needs_no_memory_beyond_that_of_the_networks() -> None:
    check_memory("cpu", PeakMemory().measure)


def check_memory(device: str, peak_bytes: Callable[[Callable[[], object]], int]) -> None:
    student, teacher = (WRN(10, k).to(device) for k in (1, 2))
    n = 16 if device == "cuda" else 4
    x, y = torch.randn(n, 3, 32, 32, device=device), torch.randint(10, (n,), device=device)

    def student_alone() -> None:
        student.zero_grad()
        F.cross_entropy(student(x)[0], y).backward()

    def student_and_teacher() -> None:
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
        losses = [eager_at_loss(s, t) for s, t in zip(features, targets, strict=True)]
        (F.cross_entropy(logits, y) + BETA * sum(losses)).backward()

    student_peak = peak_bytes(student_alone)
    networks_peak = peak_bytes(student_and_teacher)
    eager_peak = peak_bytes(eager)
    at = AttentionTransfer(student, teacher, GROUPS, beta=BETA)

    def step(prepare: bool) -> None:
        student.zero_grad()
        if prepare:
            at.prepare(x)
        (F.cross_entropy(student(x)[0], y) + at(x)).backward()

    assert peak_bytes(lambda: step(True)) <= 1.01 * student_peak
    assert peak_bytes(lambda: step(False)) <= 1.01 * networks_peak
    assert eager_peak > 1.2 * student_peak  # otherwise this test could not fail
