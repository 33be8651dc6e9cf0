"""A custom data set and a custom network for at-fused-train, named by their import paths.

    at-fused-train --data examples.own:data --student examples.own:network --teacher wrn-16-2

The images are scikit-learn's digits, shifted at random by up to two pixels.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad
from torch.utils.data import Dataset


class Digits(Dataset[tuple[Tensor, int]]):
    """Normalised images (1, 16, 16); at-fused-train reads ``classes`` and ``targets``."""

    classes = tuple("0123456789")

    def __init__(self, rows: slice, shift: int) -> None:
        raw = load_digits()
        images = torch.tensor(raw.images[rows, None] / 8 - 1, dtype=torch.float32)
        self.images = interpolate(images, size=(16, 16), mode="bilinear")
        self.targets, self.shift = raw.target[rows].tolist(), shift

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        top, left = torch.randint(2 * self.shift + 1, (2,)).tolist()
        image = pad(self.images[i], (self.shift,) * 4, value=-1.0)
        return image[:, top : top + 16, left : left + 16], self.targets[i]


def data(root: str) -> tuple[Digits, Digits]:
    """Return the training set and the test set; ``root`` is the value of --root."""
    return Digits(slice(500, None), shift=2), Digits(slice(500), shift=0)


def network(num_classes: int) -> nn.Module:
    """Return three convolutions; their maps have the sizes of a WRN's groups."""

    def block(channels: int, width: int, stride: int) -> nn.Sequential:
        convolution = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU())

    maps = [block(1, 8, 1), block(8, 16, 2), block(16, 32, 2)]
    return nn.Sequential(*maps, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, num_classes))
