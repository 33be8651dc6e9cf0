"""AttentionTransfer in DistributedDataParallel, two batches to a step.

    python examples/stacks/ddp_no_sync.py

Two processes have half of each batch, and train as one that has all of it.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from toy import BETA, LAYERS, batches, in_two_processes, networks, share

from at_fused import AttentionTransfer


def train(seed: int, accumulate: int = 2) -> tuple[list[float], nn.Module]:
    """Trains on this process's part of each batch; its losses, and the student."""
    student, teacher = networks(seed)
    model = nn.parallel.DistributedDataParallel(student)
    at = AttentionTransfer(model, teacher, LAYERS, beta=BETA)  # of model or of student: the same
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    losses = []
    for x, y in batches():
        x, y = share(x), share(y)
        micro = list(zip(x.chunk(accumulate), y.chunk(accumulate), strict=True))
        optimizer.zero_grad()
        for i, (images, labels) in enumerate(micro):
            with model.no_sync() if i < accumulate - 1 else nullcontext():
                # Each term is a mean over the batch, and so is divided by their number.
                loss = (cross_entropy(model(images), labels) + at(images)) / accumulate
                loss.backward()
            losses.append(loss.item())
        optimizer.step()
    at.remove()
    return losses, student


if __name__ == "__main__":
    in_two_processes(train)
