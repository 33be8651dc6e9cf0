"""Gradient-based attention transfer on scikit-learn's digits: a small network learns from a larger.

    python examples/gradient_at.py

A teacher is trained on all training images, and students of half its width on 200 of them. One
student learns from the labels only. The other one's loss also has the distance between its input
gradients and the teacher's (Zagoruyko & Komodakis, ICLR 2017, section 3.2). Activations are smooth:
a ReLU's second derivative is 0, so the distance could only change the student's gradients through
the weights. There is no BatchNorm, which would mix the gradients of different samples.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import at_fused
from at_fused import schedules


def network(width: int) -> nn.Module:
    """Return a small convolutional network for 8x8 images."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.Softplus(beta=4),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.Softplus(beta=4),
        nn.Flatten(),
        nn.Linear(2 * width * 16, 10),
    )


def train(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    epochs: int,
    teacher: nn.Module | None = None,
    beta: float = 0.0,
) -> None:
    """Train ``model``, with ``beta / 2`` times the distance to the teacher's input gradients."""
    images, labels = data
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    weight = schedules.linear_decay(beta, epochs)
    for epoch in range(epochs):
        for rows in torch.randperm(len(images)).split(50):
            x, y = images[rows].requires_grad_(), labels[rows]
            logits = model(x)
            loss = F.cross_entropy(logits, y)
            if teacher is not None:
                gradient = at_fused.input_gradient(logits, x, y, create_graph=True)
                target = at_fused.input_gradient(teacher, x, y)
                loss = loss + weight(epoch) / 2 * at_fused.gradient_at_loss(gradient, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Return the share of images that the model classifies correctly."""
    images, labels = data
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


def main(epochs: int = 40, seeds: int = 3) -> tuple[float, float]:
    """Train, print and return the students' mean accuracies without transfer and with it."""
    digits = load_digits()
    torch.manual_seed(0)
    order = torch.randperm(len(digits.target))
    images = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 16
    labels = torch.tensor(digits.target)[order]
    test = images[1200:], labels[1200:]
    teacher = network(16)
    train(teacher, (images[:1200], labels[:1200]), epochs // 2 + 1)
    print(f"teacher           accuracy {accuracy(teacher, test):.3f}")

    few = images[:200], labels[:200]
    accuracies = {0.0: 0.0, 2.0: 0.0}
    for beta in accuracies:
        for seed in range(seeds):
            torch.manual_seed(seed)
            student = network(8)
            train(student, few, epochs, teacher if beta else None, beta)
            accuracies[beta] += accuracy(student, test) / seeds
    print(f"student           accuracy {accuracies[0.0]:.3f}")
    print(f"with transfer     accuracy {accuracies[2.0]:.3f}")
    return accuracies[0.0], accuracies[2.0]


if __name__ == "__main__":
    torch.set_num_threads(1)  # small networks are slower with more threads
    main()
