"""Attention transfer from torchvision's ResNet-34 to its ResNet-18, without edits to either.

    python examples/torchvision_resnet.py
    python examples/torchvision_resnet.py --data FOLDER --teacher weights.pt --epochs 30

FOLDER contains ``train`` and ``test``, each with a folder of images per class. The default images
are scikit-learn's digits. Without ``--teacher`` (a state_dict), the teacher is trained first.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import islice

import torch
from digits import accuracy, digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision import models
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from at_fused import AttentionTransfer


def folders(path: str) -> list[ImageFolder]:
    """Return the training and the test images, 224x224."""
    tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.25])]
    train = v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), *tensor])
    test = v2.Compose([v2.Resize(256), v2.CenterCrop(224), *tensor])
    return [ImageFolder(f"{path}/train", train), ImageFolder(f"{path}/test", test)]


def fit(model: nn.Module, batches: DataLoader, epochs: int, steps: int | None, at=None) -> None:
    """Train, with attention transfer if ``at`` is given, and print both losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for epoch in range(epochs):
        model.train()
        losses = []
        for x, y in islice(batches, steps):
            if at is not None:
                at.prepare(x)  # before the student's graph exists, which lowers peak memory
            task = cross_entropy(model(x), y)
            transfer = task.new_zeros(()) if at is None else at(x)
            optimizer.zero_grad()
            (task + transfer).backward()
            optimizer.step()
            losses.append((task.item(), transfer.item()))
        for part in (losses[:5], losses[-5:]):
            task, transfer = torch.tensor(part).mean(0).tolist()
            print(f"epoch {epoch}: task {task:.3f}  AT {transfer:.3f}")


def main(argv: Sequence[str] | None = None) -> float:
    """Train, print and return the student's test accuracy."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", metavar="FOLDER")
    parser.add_argument("--teacher", metavar="WEIGHTS")
    parser.add_argument("--teacher-epochs", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--steps", type=int, help="maximum number of steps per epoch")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--beta", type=float, default=100.0)
    parser.add_argument("--no-at", action="store_true", help="train the student without a teacher")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    data, test = folders(args.data) if args.data else digits()
    classes = len(data.classes) if isinstance(data, ImageFolder) else 10
    batches = DataLoader(data, args.batch, shuffle=True, drop_last=True)
    student, at = models.resnet18(num_classes=classes), None
    if not args.no_at:
        teacher = models.resnet34(num_classes=classes)
        if args.teacher:
            teacher.load_state_dict(torch.load(args.teacher))
        else:
            fit(teacher, batches, args.teacher_epochs, args.steps)
        print(f"teacher's test accuracy {accuracy(teacher, test):.3f}")
        at = AttentionTransfer(student, teacher, example=data[0][0][None], beta=args.beta)
    fit(student, batches, args.epochs, args.steps, at)
    print(f"student's test accuracy {(result := accuracy(student, test)):.3f}")
    return result


if __name__ == "__main__":
    main()
