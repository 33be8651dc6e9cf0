"""Exponential moving average (EMA) and export of a student that trains with AttentionTransfer.

    python examples/stacks/ema_export.py

The exported program needs neither the student's class nor at_fused.
"""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from toy import BETA, LAYERS, batches, format_losses, networks

from at_fused import AttentionTransfer


def train(seed: int) -> tuple[list[float], AveragedModel, torch.export.ExportedProgram]:
    """Train, and return the losses, the average of the student, and its exported program."""
    student, teacher = networks(seed)
    at = AttentionTransfer(student, teacher, LAYERS, beta=BETA)
    # The copy has no hooks: those of AttentionTransfer stay with the student.
    average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.SGD(student.parameters(), 0.05, momentum=0.9)
    losses = []
    for x, y in batches():
        loss = cross_entropy(student(x), y) + at(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(student)
        losses.append(loss.item())
    batch = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(average.module.eval(), (x,), dynamic_shapes=(batch,))
    return losses, average, program


if __name__ == "__main__":
    losses, average, program = train(seed=0)
    print(format_losses(losses))
    ((x, _),) = batches(1)
    print(program.module()(x[:3]).argmax(1), average(x[:3]).argmax(1))
