"""Tiny data sets for the tests of at-fused-train, as their files or as a function has them."""

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
from at_fused.train.config import SIZES, Config
from at_fused.train.data import Data, Pictures

try:
    import torchvision
except (ImportError, OSError, RuntimeError) as error:  # absent, or made for another torch
    torchvision, reason = None, str(error)
else:
    reason = ""
LABELS = {"cifar10": "labels", "cifar100": "fine_labels"}
needs_torchvision = pytest.mark.skipif(bool(reason), reason=f"no torchvision: {reason}")


def open_data(
    name: str, root: object = "", *, pictures: Pictures | None = None, **options: Any
) -> Data:
    """Open a data set by options of the program; ``channels_last`` is that of other speeds."""
    speed = "fp32" if options.pop("channels_last", False) else "exact"
    own = {"workers": 0, "image_size": SIZES.get(name), "speed": speed} | options
    return data.open_data(Config(data=name, root=str(root), **own), pictures=pictures)


def save_network(path: Path, name: str, model: Any, data: Data, **facts: Any) -> None:
    """Save a network as a run does that has these ``images``."""
    images = facts.pop("images", {})
    saved.save_network(path, "student", model, data, Config(student=name, **images), **facts)


@functools.cache
def scans(count: int, size: int, channels: int = 3) -> Tensor:
    """Digits (count, size, size, channels) uint8."""
    raw = torch.from_numpy(load_digits().images[:count]).float()[:, None]
    pixels = (interpolate(raw, size=(size, size)) * 255 / 16).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).repeat(1, 1, 1, channels).contiguous()


def write_pictures(root: Path, part: str, classes: Sequence[str], each: int) -> list[str]:
    """PNG files of unlike sizes, no two the same: their paths."""
    paths = []
    for c, name in enumerate(classes):
        (root / part / name).mkdir(parents=True)
        for i in range(each):
            pixels = scans(50, 20)[c * each + i, : 14 + 3 * (i % 3), : 20 - 2 * c].numpy()
            paths.append(str(root / part / name / f"{i}.png"))
            Image.fromarray(pixels).save(paths[-1])
    return paths


def write_cifar(
    root: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, dict[str, Tensor]]:
    """The files of a tiny CIFAR, whose checksums torchvision takes for right."""
    dataset = getattr(torchvision.datasets, name.upper())
    folder = root / dataset.base_folder
    folder.mkdir(parents=True)
    parts = [file for file, _ in (*dataset.train_list, *dataset.test_list)]
    pixels = scans(4 * len(parts), 32).split(4)
    sums = {}

    def write(file: str, content: object) -> None:
        (folder / file).write_bytes(pickle.dumps(content))
        sums[file] = hashlib.md5((folder / file).read_bytes()).hexdigest()

    for file, part in zip(parts, pixels, strict=True):
        data = part.permute(0, 3, 1, 2).reshape(4, -1).numpy()
        write(file, {"data": data, LABELS[name]: [0, 1, 0, 1]})
    meta = dataset.meta["filename"]
    write(meta, {dataset.meta["key"]: ["apple", "bear"]})
    monkeypatch.setattr(dataset, "train_list", [[file, sums[file]] for file in parts[:-1]])
    monkeypatch.setattr(dataset, "test_list", [[parts[-1], sums[parts[-1]]]])
    monkeypatch.setattr(dataset, "meta", dataset.meta | {"md5": sums[meta]})
    return folder, {"train": torch.cat(pixels[:-1]), "evaluate": pixels[-1]}


def write_fashion_mnist(folder: Path, *, compressed: bool = False) -> dict[str, Tensor]:
    """The files of a tiny Fashion-MNIST."""
    folder.mkdir(parents=True)
    pixels = dict(zip(("train", "evaluate"), scans(50, 28, 1)[..., 0].split(40), strict=True))
    for part, prefix in (("train", "train"), ("evaluate", "t10k")):
        labels = torch.arange(len(pixels[part])).byte() % 10
        for name, content in (("images-idx3", pixels[part]), ("labels-idx1", labels)):
            shape = b"".join(size.to_bytes(4, "big") for size in content.shape)
            # Two bytes of 0, 8 for uint8, the number of dimensions, the sizes.
            file = bytes([0, 0, 8, content.dim()]) + shape + content.numpy().tobytes()
            if compressed:
                (folder / f"{prefix}-{name}-ubyte.gz").write_bytes(gzip.compress(file))
            else:
                (folder / f"{prefix}-{name}-ubyte").write_bytes(file)
    return pixels


class Noise(Dataset[Any]):
    """Images that draw from every global generator; its labels count up."""

    def __init__(self, count: int = 12, classes: Any = None, **more: Any) -> None:
        self.count, self.classes, self.made, self.labels = count, classes, lambda x: x, 3
        vars(self).update(more)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[Tensor, Any]:
        x = torch.full((2, 4, 5), 10.0 * i, dtype=torch.float64)
        x += torch.rand(()) + random.random() + np.random.rand()
        return self.made(x), i % self.labels
