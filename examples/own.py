"""A data set and a network of one's own, which at-fused-train finds by their import path.

    at-fused-train --data examples.own:data --student examples.own:network --teacher wrn-16-2

Here the images are scikit-learn's digits, moved at random by up to two pixels.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad
from torch.utils.data import Dataset


class Digits(Dataset[tuple[Tensor, int]]):
    """Images (1, 16, 16), normalised; the program reads ``classes`` and ``targets``."""

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
    """Images to train with, and to report on; ``root`` is the text of --root."""
    return Digits(slice(500, None), shift=2), Digits(slice(500), shift=0)


def network(num_classes: int) -> nn.Module:
    """Three convolutions, whose maps are as large as those of a WRN's groups."""

    def block(channels: int, width: int, stride: int) -> nn.Sequential:
        convolution = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU())

    maps = [block(1, 8, 1), block(8, 16, 2), block(16, 32, 2)]
    return nn.Sequential(*maps, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, num_classes))
