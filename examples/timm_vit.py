"""Attention transfer and Hinton's distillation between two of timm's vision transformers.

    python examples/timm_vit.py

All blocks of a transformer have the same map size, so the pairs are named: blocks 2 and 4 of the
student's four with blocks 3 and 6 of the teacher's six. The images are scikit-learn's digits; the
teacher is trained on them first.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import islice

import timm
import torch
from digits import accuracy, digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from at_fused import AttentionTransfer, kd_loss

LAYERS = [("blocks.1", "blocks.2"), ("blocks.3", "blocks.5")]


def vit(depth: int, embed_dim: int) -> nn.Module:
    """Return a ViT for 64x64 images, with 8x8 tokens."""
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=64,
        patch_size=8,
        depth=depth,
        embed_dim=embed_dim,
        num_heads=embed_dim // 16,
        num_classes=10,
    )


def fit(model: nn.Module, batches: DataLoader, epochs: int, steps: int | None, at=None) -> None:
    """Train, with both losses if ``at`` is given, and print the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3)
    for epoch in range(epochs):
        model.train()
        for x, y in islice(batches, steps):
            if at is None:
                task, transfer = cross_entropy(model(x), y), torch.zeros(())
            else:
                at.prepare(x)  # before the student's graph exists, which lowers peak memory
                logits = model(x)
                transfer = at(x)
                task = kd_loss(logits, at.teacher_output, y, T=4.0, alpha=0.5)
            optimizer.zero_grad()
            (task + transfer).backward()
            optimizer.step()
        print(f"epoch {epoch}: task {task.item():.3f}  AT {transfer.item():.3f}")


def main(argv: Sequence[str] | None = None) -> float:
    """Train, print and return the student's test accuracy."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--teacher-epochs", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--steps", type=int, help="maximum number of steps per epoch")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--beta", type=float, default=10.0)
    parser.add_argument("--no-at", action="store_true", help="train the student without a teacher")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    data, test = digits()
    batches = DataLoader(data, args.batch, shuffle=True, drop_last=True)
    student, at = vit(depth=4, embed_dim=48), None
    if not args.no_at:
        teacher = vit(depth=6, embed_dim=64)
        fit(teacher, batches, args.teacher_epochs, args.steps)
        print(f"teacher's test accuracy {accuracy(teacher, test):.3f}")
        at = AttentionTransfer(student, teacher, LAYERS, beta=args.beta)
        print(at)
    fit(student, batches, args.epochs, args.steps, at)
    print(f"student's test accuracy {(result := accuracy(student, test)):.3f}")
    return result


if __name__ == "__main__":
    main()
