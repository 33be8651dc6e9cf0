"""AttentionTransfer with accelerate, in bf16 and with two accumulated batches per step.

    python examples/stacks/accelerate_bf16.py

``accelerate launch`` runs it in several processes.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from toy import BETA, LAYERS, batches, format_losses, networks

from at_fused import AttentionTransfer


def train(seed: int) -> tuple[list[float], nn.Module]:
    """Train, and return the losses and the student."""
    accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2, cpu=True)
    student, teacher = networks(seed)
    images, labels = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    loader = DataLoader(TensorDataset(images, labels), batch_size=8)
    optimizer = torch.optim.SGD(student.parameters(), 0.05, momentum=0.9)
    model, optimizer, loader = accelerator.prepare(student, optimizer, loader)
    # Only the forward of a prepared network runs in autocast, so without this line the teacher
    # would run in fp32. In evaluation mode it is not wrapped in DistributedDataParallel.
    teacher = accelerator.prepare_model(teacher, evaluation_mode=True)
    at = AttentionTransfer(model, teacher, LAYERS, beta=BETA)
    losses = []
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = cross_entropy(model(x), y) + at(x)
            accelerator.backward(loss)  # divides by gradient_accumulation_steps
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    at.remove()
    return losses, accelerator.unwrap_model(model, keep_fp32_wrapper=False)


if __name__ == "__main__":
    print(format_losses(train(seed=0)[0]))
