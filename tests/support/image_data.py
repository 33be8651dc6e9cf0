"""Tiny data sets for the tests of at-fused-train, as files and as a function's datasets."""

from __future__ import annotations

import functools
import gzip
import hashlib
import pickle
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from at_fused.train import data, saved
from at_fused.train.config import DEFAULT_SIZES, Config
from at_fused.train.data import Data, ImageScan

try:
    import torchvision
except (ImportError, OSError, RuntimeError) as error:  # missing, or built for another torch
    torchvision, reason = None, str(error)
else:
    reason = ""
LABELS = {"cifar10": "labels", "cifar100": "fine_labels"}
needs_torchvision = pytest.mark.skipif(bool(reason), reason=f"no torchvision: {reason}")


def open_data(
    name: str, root: object = "", *, scan: ImageScan | None = None, **options: Any
) -> Data:
    """Open a data set with the program's options; ``channels_last`` sets a speed that has it."""
    speed = "fp32" if options.pop("channels_last", False) else "exact"
    own = {"workers": 0, "image_size": DEFAULT_SIZES.get(name), "speed": speed} | options
    return data.open_data(Config(data=name, root=str(root), **own), scan=scan)


def save_network(path: Path, name: str, model: Any, data: Data, **facts: Any) -> None:
    """Save a network like a run with the data options ``images``."""
    images = facts.pop("images", {})
    saved.save_network(path, "student", model, data, Config(student=name, **images), **facts)


@functools.cache
def digit_images(count: int, size: int, channels: int = 3) -> Tensor:
    """Return digits, (count, size, size, channels) uint8."""
    raw = torch.from_numpy(load_digits().images[:count]).float()[:, None]
    pixels = (interpolate(raw, size=(size, size)) * 255 / 16).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).repeat(1, 1, 1, channels).contiguous()


def write_images(root: Path, split: str, classes: Sequence[str], count: int) -> list[str]:
    """Write ``count`` PNG files per class, all of them different; return their paths."""
    paths = []
    for c, name in enumerate(classes):
        (root / split / name).mkdir(parents=True)
        for i in range(count):
            pixels = digit_images(50, 20)[c * count + i, : 14 + 3 * (i % 3), : 20 - 2 * c].numpy()
            paths.append(str(root / split / name / f"{i}.png"))
            Image.fromarray(pixels).save(paths[-1])
    return paths


def write_cifar(
    root: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, dict[str, Tensor]]:
    """Write a tiny CIFAR, and make torchvision expect its checksums."""
    dataset = getattr(torchvision.datasets, name.upper())
    folder = root / dataset.base_folder
    folder.mkdir(parents=True)
    parts = [file for file, _ in (*dataset.train_list, *dataset.test_list)]
    pixels = digit_images(4 * len(parts), 32).split(4)
    checksums = {}

    def write(file: str, content: object) -> None:
        (folder / file).write_bytes(pickle.dumps(content))
        checksums[file] = hashlib.md5((folder / file).read_bytes()).hexdigest()

    for file, part in zip(parts, pixels, strict=True):
        data = part.permute(0, 3, 1, 2).reshape(4, -1).numpy()
        write(file, {"data": data, LABELS[name]: [0, 1, 0, 1]})
    meta = dataset.meta["filename"]
    write(meta, {dataset.meta["key"]: ["apple", "bear"]})
    monkeypatch.setattr(dataset, "train_list", [[file, checksums[file]] for file in parts[:-1]])
    monkeypatch.setattr(dataset, "test_list", [[parts[-1], checksums[parts[-1]]]])
    monkeypatch.setattr(dataset, "meta", dataset.meta | {"md5": checksums[meta]})
    return folder, {"train": torch.cat(pixels[:-1]), "evaluate": pixels[-1]}


def write_fashion_mnist(folder: Path, *, compressed: bool = False) -> dict[str, Tensor]:
    """Write a tiny Fashion-MNIST, as plain or compressed files."""
    folder.mkdir(parents=True)
    images = digit_images(50, 28, 1)[..., 0].split(40)
    pixels = dict(zip(("train", "evaluate"), images, strict=True))
    for part, prefix in (("train", "train"), ("evaluate", "t10k")):
        labels = torch.arange(len(pixels[part])).byte() % 10
        for name, content in (("images-idx3", pixels[part]), ("labels-idx1", labels)):
            shape = b"".join(size.to_bytes(4, "big") for size in content.shape)
            # The IDX header: two zero bytes, 8 for uint8, the number of dimensions, the sizes.
            file = bytes([0, 0, 8, content.dim()]) + shape + content.numpy().tobytes()
            if compressed:
                (folder / f"{prefix}-{name}-ubyte.gz").write_bytes(gzip.compress(file))
            else:
                (folder / f"{prefix}-{name}-ubyte").write_bytes(file)
    return pixels


class Noise(Dataset[Any]):
    """Images with noise from all global generators, and labels 0, 1, 2, 0, ..."""

    def __init__(self, count: int = 12, classes: Any = None, **attributes: Any) -> None:
        self.count, self.classes, self.transform, self.labels = count, classes, lambda x: x, 3
        vars(self).update(attributes)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[Tensor, Any]:
        x = torch.full((2, 4, 5), 10.0 * i, dtype=torch.float64)
        x += torch.rand(()) + random.random() + np.random.rand()
        return self.transform(x), i % self.labels
