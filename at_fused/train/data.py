"""The digits: 1,797 real 8x8 scans that ship with scikit-learn, so nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

TEST_IMAGES = 500
VAL_IMAGES = 300
# Fixed for good, and no flag: a split that moves with the seed lets test images leak into tuning.
SPLIT_SEED = 0


@dataclass(frozen=True)
class Split:
    """Disjoint, stratified index vectors into the data set."""

    train: Tensor
    val: Tensor
    test: Tensor


def make_split(labels: Tensor) -> Split:
    """The one split, stratified.

    The first images held out were looked at while the settings were still being chosen. They train
    now, and images that no choice was ever judged by are the test.
    """
    from sklearn.model_selection import train_test_split

    y = labels.numpy()

    def take(indices: NDArray[np.int64], count: int) -> list[NDArray[np.int64]]:
        return train_test_split(
            indices, test_size=count, stratify=y[indices], random_state=SPLIT_SEED
        )

    pool, looked_at = take(np.arange(len(y)), TEST_IMAGES)
    pool, val = take(pool, VAL_IMAGES)
    pool, test = take(pool, TEST_IMAGES)
    train = np.concatenate([pool, looked_at])
    return Split(*(torch.from_numpy(part) for part in (train, val, test)))


def load_digits(size: int) -> tuple[Tensor, Tensor, Split]:
    """Images (1797, 1, size, size) standardised by the training split, labels (1797,), split."""
    from sklearn.datasets import load_digits as load

    raw = load()
    labels = torch.from_numpy(raw.target).long()
    split = make_split(labels)
    images = torch.from_numpy(raw.images).float()[:, None]
    images = interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    known = images[split.train]
    return (images - known.mean()) / known.std(), labels, split


def few_labels(labels: Tensor, candidates: Tensor, count: int, seed: int) -> Tensor:
    """`count` indices out of `candidates`, each class equally often (to one image)."""
    g = torch.Generator().manual_seed(seed)
    shuffled = candidates[torch.randperm(len(candidates), generator=g)]
    classes = torch.unique(labels[candidates])
    quota, left_over = divmod(count, len(classes))
    lucky = set(torch.randperm(len(classes), generator=g)[:left_over].tolist())
    picked = [
        shuffled[labels[shuffled] == c][: quota + (i in lucky)] for i, c in enumerate(classes)
    ]
    return torch.cat(picked)


def random_shift(images: Tensor, pixels: int, g: torch.Generator) -> Tensor:
    """Each image of (B, C, H, W) moved by up to `pixels` in both directions, edges repeated."""
    b, _, h, w = images.shape
    # Drawn on the CPU, so that a seed means the same shifts on every device.
    dy, dx = torch.randint(-pixels, pixels + 1, (2, b, 1), generator=g).to(images.device)
    rows = (torch.arange(h, device=images.device) + dy).clamp(0, h - 1)
    cols = (torch.arange(w, device=images.device) + dx).clamp(0, w - 1)
    n = torch.arange(b, device=images.device)[:, None, None]
    # Indices around a kept channel axis put it last; move it back.
    return images[n, :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2).contiguous()
