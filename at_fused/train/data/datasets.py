"""Digits, Fashion-MNIST, CIFAR, and custom data sets, which a user's function makes."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.nn.functional import pad as pad_pixels
from torch.utils.data import Dataset, IterableDataset

from at_fused.train.config import DEFAULT_SIZES, Config, ConfigError, error_summary, import_function
from at_fused.train.data.samples import (
    Data,
    InMemory,
    OnDemand,
    data_digest,
    mean_and_std,
    seed_generators,
    to_labels,
)

# ---- digits: 1,797 real 8x8 scans that ship with scikit-learn

DIGITS = {"test": 500, "val": 300}  # number of images; all others are for training
# Not an option: if the split depended on the seed, tuning would see test images.
SPLIT_SEED = 0


def split_digits(labels: Tensor) -> dict[str, Tensor]:
    """Return the indices of the images for "train", "val" and "test", stratified.

    An earlier test split was seen while settings were chosen. It now belongs to "train". No choice
    has ever used the images in "test".
    """
    from sklearn.model_selection import train_test_split

    y, rest, parts = labels.numpy(), np.arange(len(labels)), []
    for count in (DIGITS["test"], DIGITS["val"], DIGITS["test"]):
        rest, held_out = train_test_split(
            rest, test_size=count, stratify=y[rest], random_state=SPLIT_SEED
        )
        parts.append(torch.from_numpy(held_out))
    seen, val, test = parts
    return {"train": torch.cat([torch.from_numpy(rest), seen]), "val": val, "test": test}


def open_digits(config: Config, device: torch.device | str) -> Data:
    """Open the digits, enlarged bilinearly, with mean and std of the training split."""
    from sklearn.datasets import load_digits

    raw, size = load_digits(), config.image_size or DEFAULT_SIZES["digits"]
    labels = torch.from_numpy(raw.target).long()
    split = split_digits(labels)
    scans = torch.from_numpy(raw.images).float()[:, None]  # in [0, 16]
    scans = interpolate(scans, size=(size, size), mode="bilinear", align_corners=False)
    pixels = (scans * 255 / 16).round().to(torch.uint8).permute(0, 2, 3, 1)
    known = pixels[split["train"]].double() / 255
    mean, std = mean_and_std(config, ((known.mean().item(),), (known.std().item(),)))
    channels_last = config.speed != "exact"
    train, evaluate = (
        # No flips: mirrored digits are not digits.
        InMemory(pixels[rows], labels[rows], mean, std, pad, False, device, channels_last)
        for rows, pad in ((split["train"], 1), (split[config.evaluate], 0))
    )
    names = tuple(map(str, raw.target_names))
    digest = data_digest(names, train, evaluate)
    return Data(names, size, train, evaluate, mean, std, digest=digest)


# ---- CIFAR: 50,000 training images and 10,000 test images of 32x32


# The authors normalise CIFAR-100 with these constants of CIFAR-10, too. For pixels up to 255.
CIFAR_MEAN = tuple(m / 255 for m in (125.3, 123.0, 113.9))
CIFAR_STD = tuple(s / 255 for s in (63.0, 62.1, 66.7))


def torchvision_datasets(name: str) -> Any:
    """Return torchvision.datasets; raise ImportError if it is missing or does not fit torch."""
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError, OSError) as error:
        install = 'requires torchvision: pip install "at_fused[train]"'
        raise ImportError(f"data {name!r} {install} ({error_summary(error)})") from error
    return datasets


def _open_published(config: Config, dataset: Any, root: Path, location: str) -> list[Any]:
    """Return training and test part of one of torchvision's data sets.

    Raises:
        ConfigError: files are missing, or differ from the published ones.
    """
    try:
        options = {"root": str(root), "download": config.download}
        return [dataset(train=train, **options) for train in (True, False)]
    except Exception as error:  # damaged files can make torchvision raise anything
        raise ConfigError(
            f"data {config.data!r}: requires the published files in {location} "
            f"({error_summary(error)})" + "; --download fetches them" * (not config.download)
        ) from error


def open_cifar(config: Config, device: torch.device | str) -> Data:
    """Open CIFAR-10 or CIFAR-100, augmented as the authors' program does.

    Raises:
        ConfigError: files are missing, or differ from the published ones.
        ImportError: torchvision cannot be imported.
    """
    name, root = config.data, Path(config.root).expanduser().absolute()
    dataset = getattr(torchvision_datasets(name), name.upper())
    # The files are pickles, which may run code: torchvision verifies their checksums first.
    parts = _open_published(config, dataset, root, str(root / dataset.base_folder))
    mean, std = mean_and_std(config, (CIFAR_MEAN, CIFAR_STD))
    channels_last = config.speed != "exact"
    train, test = (
        InMemory(
            torch.from_numpy(part.data), torch.tensor(part.targets), mean, std, pad, flip, device,
            channels_last,
        )
        for part, pad, flip in zip(parts, (4, 0), (True, False), strict=True)
    )  # fmt: skip
    names = tuple(parts[0].classes)
    digest = data_digest(names, train, test, *(part.data.tobytes() for part in parts))
    return Data(names, 32, train, test, mean, std, digest=digest)


# ---- Fashion-MNIST: 60,000 training images and 10,000 test images of 28x28

# Mean and standard deviation of the 60,000 training images, in [0, 1].
FASHION_MNIST_MEAN, FASHION_MNIST_STD = (0.2860,), (0.3530,)


@contextmanager
def _fashion_mnist_root(root: Path) -> Iterator[Path]:
    """Yield a folder in torchvision's layout; compressed files in root are unpacked to it."""
    files = sorted(root.glob("*-ubyte.gz"))
    if not files:
        yield root
        return
    with TemporaryDirectory() as folder:
        unpacked = Path(folder, "FashionMNIST", "raw")
        unpacked.mkdir(parents=True)
        for file in files:
            try:
                unpacked.joinpath(file.stem).write_bytes(gzip.decompress(file.read_bytes()))
            except (OSError, EOFError) as error:
                raise ConfigError(f"root: cannot read {file}: {error_summary(error)}") from error
        yield Path(folder)


def open_fashion_mnist(config: Config, device: torch.device | str) -> Data:
    """Open Fashion-MNIST, padded with black from 28x28 to 32x32 and augmented like CIFAR.

    Raises:
        ConfigError: files are missing or damaged.
        ImportError: torchvision cannot be imported.
    """
    dataset = torchvision_datasets(config.data).FashionMNIST
    root, size = (
        Path(config.root).expanduser().absolute(),
        config.image_size or DEFAULT_SIZES["fashion-mnist"],
    )
    location = f"{root / 'FashionMNIST' / 'raw'}, or compressed in {root}"
    with _fashion_mnist_root(root) as folder:
        parts = _open_published(config, dataset, folder, location)
    mean, std = mean_and_std(config, (FASHION_MNIST_MEAN, FASHION_MNIST_STD))
    margin, channels_last = (size - 28) // 2, config.speed != "exact"
    margins = (margin, size - 28 - margin) * 2
    for part in parts:
        if part.data.shape != (len(part.targets), 28, 28):
            sizes = f"{len(part.targets)} labels, {tuple(part.data.shape)} pixels"
            raise ConfigError(f"data {config.data!r}: requires 28x28 images, got {sizes}")
    train, test = (
        InMemory(
            pad_pixels(part.data, margins)[..., None], part.targets, mean, std, pad, flip, device,
            channels_last,
        )
        for part, pad, flip in zip(parts, (4, 0), (True, False), strict=True)
    )  # fmt: skip
    names = tuple(parts[0].classes)
    digest = data_digest(names, train, test, *(part.data.numpy().tobytes() for part in parts))
    return Data(names, size, train, test, mean, std, digest=digest)


# ---- custom data sets

ITEM_FORMAT = (
    "(x, label) with x a float tensor (C, H, W), as from ToTensor and Normalize of "
    "torchvision.transforms, and label an integer"
)
DIGEST_ITEMS = 8  # items per part that identify the data set


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    if isinstance(value, (tuple, list)) and len(value) < 5:
        return f"({', '.join(map(_describe, value))})"
    return type(value).__name__


class _CustomDataset(Dataset[Any]):
    """A user's dataset that checks shape and label of each item, for :class:`OnDemand`."""

    def __init__(self, name: str, dataset: Any, shape: torch.Size | None = None) -> None:
        is_sized = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        if not is_sized or isinstance(dataset, IterableDataset) or not len(dataset):
            raise ConfigError(
                f"{name} must be a non-empty map-style torch Dataset, got {_describe(dataset)}"
            )
        self.name, self.dataset, count = name, dataset, len(dataset)
        self.shape = shape or self._item(0, 0, 0)[0].shape
        labels = to_labels(getattr(dataset, "targets", None), count)
        if labels is None:
            labels = torch.tensor([self._item(i, i, None)[1] for i in range(count)])
        self.labels = labels
        content = hashlib.sha256()
        for index in range(min(DIGEST_ITEMS, count)):
            content.update(self._image(index, index, 0).numpy(force=True).tobytes())
        self.content = content.digest()

    def _item(self, index: int, number: int, seed: int | None) -> tuple[Tensor, int]:
        """Return an item with transforms seeded; raise ConfigError if it is invalid."""
        name = f"{self.name}[{index}]"
        try:
            with seed_generators(seed, number):
                item = self.dataset[index]
        except Exception as error:
            raise ConfigError(f"{name} raises {error_summary(error)}") from error
        x, y = item if isinstance(item, (tuple, list)) and len(item) == 2 else (None, None)
        label = to_labels([y], 1)
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() != 3 or label is None:
            raise ConfigError(f"{name} must be {ITEM_FORMAT}; got {_describe(item)}")
        x = x.float()
        if not x.isfinite().all():
            raise ConfigError(f"{name} contains NaN or inf")
        return x, int(label)

    def _image(self, index: int, number: int, seed: int | None) -> Tensor:
        x, label = self._item(index, number, seed)
        if (x.shape, label) != (self.shape, expected := int(self.labels[index])):
            raise ConfigError(
                f"{self.name}[{index}] must have the shape of train[0], {tuple(self.shape)}, and "
                f"the label in targets, {expected}; got {tuple(x.shape)} and {label}"
            )
        return x

    def __getitem__(self, key: tuple[int, int, int | None]) -> Tensor | str:
        try:
            return self._image(*key)
        except ConfigError as error:
            return str(error)


def open_custom(config: Config, device: torch.device | str) -> Data:
    """Open the training and evaluation datasets that MODULE:FUNCTION returns for ``root``.

    They are map-style datasets of (x, label): x a float tensor (C, H, W) of one shape, normalised
    for the networks, label an integer. Class names are ``train.classes``, or the labels as text.
    Labels come from ``targets`` if a dataset has one per item; otherwise all items are read.
    Random transforms use the global generators of torch, NumPy and Python, seeded by the
    augmentation's seed and the sample's number.
    """
    name = config.data
    make = import_function("data", name)
    try:
        # Seeded, so that a random split is the same on all ranks and on --resume.
        with seed_generators(None, 0):
            parts = make(config.root)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"data {name}: raises {error_summary(error)}") from error
    if not isinstance(parts, (tuple, list)) or len(parts) != 2:
        raise ConfigError(f"data {name}: must return (train, test), got {_describe(parts)}")
    train = _CustomDataset(f"data {name}: train", parts[0])
    test = _CustomDataset(f"data {name}: test", parts[1], train.shape)
    names = getattr(parts[0], "classes", None)
    if not isinstance(names, (tuple, list)) or not all(isinstance(c, str) for c in names):
        names = [str(number) for number in range(int(train.labels.max()) + 1)]
    for part in (train, test):
        low, high = int(part.labels.min()), int(part.labels.max())
        if not 0 <= low <= high < len(names):
            raise ConfigError(
                f"{part.name} must have labels from 0 to {len(names) - 1}, the classes of train; "
                f"got {low} to {high}"
            )
    memory_format = torch.contiguous_format if config.speed == "exact" else torch.channels_last

    def finish(x: Tensor) -> Tensor:
        return x.contiguous(memory_format=memory_format)

    samples, evaluate = (
        OnDemand(part, part.labels, finish, True, device, config.workers) for part in (train, test)
    )
    content = (f"{train.shape}".encode(), train.content, test.content)
    digest = data_digest(names, samples, evaluate, *content)
    channels, _, width = train.shape
    mean, std = (0.0,) * channels, (1.0,) * channels
    return Data(tuple(names), width, samples, evaluate, mean, std, digest=digest, is_custom=True)
