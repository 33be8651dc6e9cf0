"""AttentionTransfer between torchvision's segmentation networks, with padded images.

    python examples/stacks/torchvision_segmentation.py

A mask excludes the padding from the loss.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torchvision.models import segmentation
from toy import format_losses

from at_fused import AttentionTransfer

IGNORED = 255
LAYERS = [("backbone.6", "backbone.layer2"), ("backbone.16", "backbone.layer4")]


def collate(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return a batch padded to the size of the largest image; labels ignore the padding."""
    height, width = (max(x.shape[dim] for x, _ in samples) for dim in (1, 2))
    margins = [(0, width - x.shape[2], 0, height - x.shape[1]) for x, _ in samples]
    images = [pad(x, margin) for (x, _), margin in zip(samples, margins, strict=True)]
    labels = [pad(y, m, value=IGNORED) for (_, y), m in zip(samples, margins, strict=True)]
    return torch.stack(images), torch.stack(labels)


def networks() -> tuple[nn.Module, nn.Module]:
    """Return a student and a teacher for three classes."""
    student = segmentation.lraspp_mobilenet_v3_large(weights_backbone=None, num_classes=3)
    return student, segmentation.fcn_resnet50(weights_backbone=None, num_classes=3)


def batch() -> tuple[Tensor, Tensor]:
    """Return a batch of two random images of different sizes."""
    sizes = (64, 48), (40, 64)
    return collate([(torch.randn(3, *size), torch.randint(3, size)) for size in sizes])


def train(seed: int, steps: int = 2) -> tuple[list[float], nn.Module]:
    """Train, and return the losses and the student."""
    torch.manual_seed(seed)
    student, teacher = networks()
    at = AttentionTransfer(student, teacher, LAYERS, beta=1e3, resize="maps")
    optimizer = torch.optim.SGD(student.parameters(), 0.01)
    losses = []
    for x, y in [batch()] * steps:
        mask = y != IGNORED  # (B, H, W), averaged to each map's size and multiplied into both maps
        loss = cross_entropy(student(x)["out"], y, ignore_index=IGNORED) + at(x, mask=mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    at.remove()
    return losses, student


if __name__ == "__main__":
    print(format_losses(train(seed=0)[0]))
