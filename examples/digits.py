"""scikit-learn's digits: 1797 small images, enlarged for networks that take photographs."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset, TensorDataset


def digits(size: int = 64) -> tuple[TensorDataset, TensorDataset]:
    """Return images (3, size, size) and labels of digits: 1297 for training, 500 for testing."""
    raw = load_digits()
    order = torch.randperm(len(raw.target), generator=torch.Generator().manual_seed(0))
    images = (
        torch.tensor(raw.images, dtype=torch.float32)[order, None].expand(-1, 3, -1, -1) / 8 - 1
    )
    images = interpolate(images, size=(size, size), mode="bilinear")
    labels = torch.tensor(raw.target)[order]
    return TensorDataset(images[500:], labels[500:]), TensorDataset(images[:500], labels[:500])


@torch.no_grad()
def accuracy(model: nn.Module, data: Dataset[tuple[Tensor, Tensor]]) -> float:
    """Return the share of images that the model classifies correctly."""
    model.eval()
    correct = [model(x).argmax(1) == y for x, y in DataLoader(data, batch_size=100)]
    return torch.cat(correct).float().mean().item()
