"""AttentionTransfer in DistributedDataParallel, with two accumulated batches per step.

    python examples/stacks/ddp_no_sync.py

Two processes with half of each batch train like one process with the whole batch.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from toy import BETA, LAYERS, batches, local_part, networks, run_in_two_processes

from at_fused import AttentionTransfer


def train(seed: int, accumulate: int = 2) -> tuple[list[float], nn.Module]:
    """Train on this process's part of each batch, and return its losses and the student."""
    student, teacher = networks(seed)
    model = nn.parallel.DistributedDataParallel(student)
    at = AttentionTransfer(model, teacher, LAYERS, beta=BETA)  # model or student: the same
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    losses = []
    for x, y in batches():
        x, y = local_part(x), local_part(y)
        micro = list(zip(x.chunk(accumulate), y.chunk(accumulate), strict=True))
        optimizer.zero_grad()
        for i, (images, labels) in enumerate(micro):
            with model.no_sync() if i < accumulate - 1 else nullcontext():
                # Each term is a mean over its batch, so divide by the number of batches.
                loss = (cross_entropy(model(images), labels) + at(images)) / accumulate
                loss.backward()
            losses.append(loss.item())
        optimizer.step()
    at.remove()
    return losses, student


if __name__ == "__main__":
    run_in_two_processes(train)
