"""The digits: 1,797 real 8x8 scans that ship with scikit-learn, so nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from at_fused.train.data.samples import Pixels

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


def read_digits(size: int, evaluate: str) -> Pixels:
    """Pictures (N, size, size, 1), enlarged bilinearly; evaluate is "test" or "val".

    Mean and std are those of the training split.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    labels = torch.from_numpy(raw.target).long()
    split = make_split(labels)
    scans = torch.from_numpy(raw.images).float()[:, None]  # in [0, 16]
    scans = interpolate(scans, size=(size, size), mode="bilinear", align_corners=False)
    pixels = (scans * 255 / 16).round().to(torch.uint8).permute(0, 2, 3, 1)
    known = pixels[split.train].double() / 255
    held_out = split.val if evaluate == "val" else split.test
    return Pixels(
        names=tuple(str(name) for name in raw.target_names),
        train=(pixels[split.train], labels[split.train]),
        evaluate=(pixels[held_out], labels[held_out]),
        mean=(known.mean().item(),),
        std=(known.std().item(),),
        pad=1,
        flip=False,  # a mirrored 3 is none
    )
