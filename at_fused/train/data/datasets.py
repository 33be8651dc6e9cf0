"""The digits, Fashion-MNIST, CIFAR, and data sets that a function of one's own makes."""

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

from at_fused.train.config import SIZES, Config, ConfigError, imported, in_a_line
from at_fused.train.data.samples import (
    Data,
    InMemory,
    OnDemand,
    as_labels,
    digest_of,
    normalisation,
    seeded,
)

# ---- the digits: 1,797 real 8x8 scans that ship with scikit-learn, so nothing is downloaded

DIGITS = {"test": 500, "val": 300}  # images of each part; the rest trains
# Fixed for good, and no flag: a split that moves with the seed lets test images leak into tuning.
SPLIT_SEED = 0


def split_digits(labels: Tensor) -> dict[str, Tensor]:
    """Return the numbers of the images of "train", "val" and "test", stratified.

    The first images held out were looked at while the settings were still being chosen. They train
    now, and images that no choice was ever judged by are the test.
    """
    from sklearn.model_selection import train_test_split

    y, rest, parts = labels.numpy(), np.arange(len(labels)), []
    for count in (DIGITS["test"], DIGITS["val"], DIGITS["test"]):
        rest, held_out = train_test_split(
            rest, test_size=count, stratify=y[rest], random_state=SPLIT_SEED
        )
        parts.append(torch.from_numpy(held_out))
    looked_at, val, test = parts
    return {"train": torch.cat([torch.from_numpy(rest), looked_at]), "val": val, "test": test}


def open_digits(config: Config, device: torch.device | str) -> Data:
    """Open the digits, enlarged bilinearly; their mean and std are those of the training split."""
    from sklearn.datasets import load_digits

    raw, size = load_digits(), config.image_size or SIZES["digits"]
    labels = torch.from_numpy(raw.target).long()
    split = split_digits(labels)
    scans = torch.from_numpy(raw.images).float()[:, None]  # in [0, 16]
    scans = interpolate(scans, size=(size, size), mode="bilinear", align_corners=False)
    pixels = (scans * 255 / 16).round().to(torch.uint8).permute(0, 2, 3, 1)
    known = pixels[split["train"]].double() / 255
    mean, std = normalisation(config, ((known.mean().item(),), (known.std().item(),)))
    last = config.speed != "exact"
    train, held_out = (
        # Not flipped: a mirrored 3 is none.
        InMemory(pixels[rows], labels[rows], mean, std, pad, False, device, last)
        for rows, pad in ((split["train"], 1), (split[config.evaluate], 0))
    )
    names = tuple(map(str, raw.target_names))
    digest = digest_of(names, train, held_out)
    return Data(names, size, train, held_out, mean, std, digest=digest)


# ---- CIFAR: 50,000 pictures of 32 x 32 to train with and 10,000 to test


# The authors' program normalises both by those of CIFAR-10; for pixels to 255.
CIFAR_MEAN = tuple(m / 255 for m in (125.3, 123.0, 113.9))
CIFAR_STD = tuple(s / 255 for s in (63.0, 62.1, 66.7))


def torchvision_datasets(name: str) -> Any:
    """Return torchvision.datasets; ImportError where it is absent, or made for another torch."""
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError, OSError) as error:
        install = 'needs torchvision: pip install "at_fused[train]"'
        raise ImportError(f"data {name!r} {install} ({in_a_line(error)})") from error
    return datasets


def _published(config: Config, made: Any, root: Path, files: str) -> list[Any]:
    """Return the training and the test part of a data set that torchvision reads in a folder.

    Raises:
        ConfigError: the files are not there, or not those that were published.
    """
    try:
        return [made(str(root), train=train, download=config.download) for train in (True, False)]
    except Exception as error:  # whatever damaged files do to torchvision
        raise ConfigError(
            f"data {config.data!r}: needs the published files in {files} ({in_a_line(error)})"
            + "; --download fetches them" * (not config.download)
        ) from error


def open_cifar(config: Config, device: torch.device | str) -> Data:
    """Open CIFAR-10 or CIFAR-100, augmented as the authors' program does.

    Raises:
        ConfigError: the files are not there, or not those that were published.
        ImportError: torchvision cannot be imported.
    """
    name, root = config.data, Path(config.root).expanduser().absolute()
    made = getattr(torchvision_datasets(name), name.upper())
    # It reads nothing, as pickles may run code, before it has found the checksums right.
    read = _published(config, made, root, str(root / made.base_folder))
    mean, std = normalisation(config, (CIFAR_MEAN, CIFAR_STD))
    last = config.speed != "exact"
    train, test = (
        InMemory(
            torch.from_numpy(part.data), torch.tensor(part.targets), mean, std, pad, flip, device,
            last,
        )
        for part, pad, flip in zip(read, (4, 0), (True, False), strict=True)
    )  # fmt: skip
    names = tuple(read[0].classes)
    digest = digest_of(names, train, test, *(part.data.tobytes() for part in read))
    return Data(names, 32, train, test, mean, std, digest=digest)


# ---- Fashion-MNIST: 60,000 pictures of 28 x 28 to train with and 10,000 to test

# Mean and standard deviation of the 60,000 training images, in [0, 1].
FASHION_MNIST_MEAN, FASHION_MNIST_STD = (0.2860,), (0.3530,)


@contextmanager
def _fashion_mnist_root(root: Path) -> Iterator[Path]:
    """Give a folder with the files where torchvision looks, uncompressed if they lie in root."""
    files = sorted(root.glob("*-ubyte.gz"))
    if not files:
        yield root
        return
    with TemporaryDirectory() as made:
        unpacked = Path(made, "FashionMNIST", "raw")
        unpacked.mkdir(parents=True)
        for file in files:
            try:
                unpacked.joinpath(file.stem).write_bytes(gzip.decompress(file.read_bytes()))
            except (OSError, EOFError) as error:
                raise ConfigError(f"root: {file} cannot be read: {in_a_line(error)}") from error
        yield Path(made)


def open_fashion_mnist(config: Config, device: torch.device | str) -> Data:
    """Open Fashion-MNIST in black margins, which make 32 x 32 of 28 x 28; augmented as CIFAR.

    Raises:
        ConfigError: the files are not there, or damaged.
        ImportError: torchvision cannot be imported.
    """
    made = torchvision_datasets(config.data).FashionMNIST
    root, size = (
        Path(config.root).expanduser().absolute(),
        config.image_size or SIZES["fashion-mnist"],
    )
    files = f"{root / 'FashionMNIST' / 'raw'}, or compressed in {root}"
    with _fashion_mnist_root(root) as folder:
        read = _published(config, made, folder, files)
    mean, std = normalisation(config, (FASHION_MNIST_MEAN, FASHION_MNIST_STD))
    margin, last = (size - 28) // 2, config.speed != "exact"
    margins = (margin, size - 28 - margin) * 2
    for part in read:
        if part.data.shape != (len(part.targets), 28, 28):
            found = f"{len(part.targets)} labels, {tuple(part.data.shape)} pixels"
            raise ConfigError(f"data {config.data!r}: needs pictures of 28x28, got {found}")
    train, test = (
        InMemory(
            pad_pixels(part.data, margins)[..., None], part.targets, mean, std, pad, flip, device,
            last,
        )
        for part, pad, flip in zip(read, (4, 0), (True, False), strict=True)
    )  # fmt: skip
    names = tuple(read[0].classes)
    digest = digest_of(names, train, test, *(part.data.numpy().tobytes() for part in read))
    return Data(names, size, train, test, mean, std, digest=digest)


# ---- what a function of one's own makes

WANTED = (
    "(x, label) with x a float tensor (C, H, W), as ToTensor and Normalize of "
    "torchvision.transforms make it, and label a whole number"
)
FEW = 8  # items of each part that are read to know the data again


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    if isinstance(value, (tuple, list)) and len(value) < 5:
        return f"({', '.join(map(_shown, value))})"
    return type(value).__name__


class _OwnPictures(Dataset[Any]):
    """Items of a dataset, of one shape and with known labels, as :class:`OnDemand` reads them."""

    def __init__(self, where: str, dataset: Any, shape: torch.Size | None = None) -> None:
        sized = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        if not sized or isinstance(dataset, IterableDataset) or not len(dataset):
            raise ConfigError(
                f"{where} must be a map-style torch Dataset with items, got {_shown(dataset)}"
            )
        self.where, self.dataset, count = where, dataset, len(dataset)
        self.shape = shape or self._item(0, 0, 0)[0].shape
        labels = as_labels(getattr(dataset, "targets", None), count)
        if labels is None:
            labels = torch.tensor([self._item(i, i, None)[1] for i in range(count)])
        self.labels = labels
        content = hashlib.sha256()
        for number in range(min(FEW, count)):
            content.update(self._picture(number, number, 0).numpy(force=True).tobytes())
        self.content = content.digest()

    def _item(self, index: int, number: int, seed: int | None) -> tuple[Tensor, int]:
        """Return an item, its transforms drawing from the seed; ConfigError for a wrong one."""
        where = f"{self.where}[{index}]"
        try:
            with seeded(seed, number):
                found = self.dataset[index]
        except Exception as error:
            raise ConfigError(f"{where} raises {in_a_line(error)}") from error
        x, y = found if isinstance(found, (tuple, list)) and len(found) == 2 else (None, None)
        label = as_labels([y], 1)
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() != 3 or label is None:
            raise ConfigError(f"{where} must be {WANTED}; got {_shown(found)}")
        x = x.float()
        if not x.isfinite().all():
            raise ConfigError(f"{where} has NaN or inf among its values")
        return x, int(label)

    def _picture(self, index: int, number: int, seed: int | None) -> Tensor:
        x, found = self._item(index, number, seed)
        if (x.shape, found) != (self.shape, label := int(self.labels[index])):
            raise ConfigError(
                f"{self.where}[{index}] must be a tensor {tuple(self.shape)}, as train[0] is, with "
                f"the label {label}, as targets have it; got {tuple(x.shape)} and {found}"
            )
        return x

    def __getitem__(self, key: tuple[int, int, int | None]) -> Tensor | str:
        try:
            return self._picture(*key)
        except ConfigError as error:
            return str(error)


def open_own(config: Config, device: torch.device | str) -> Data:
    """Open the two datasets that the function MODULE:FUNCTION makes of ``root``.

    They are map-style, to train with and to report on, of (x, label): x a float tensor (C, H, W)
    of one shape, as the networks take it, label a whole number. The names of the classes are
    ``train.classes``, or the numbers. Labels are read from ``targets``, where a dataset has as
    many; or from the items, all of which are read for it. Random transforms draw from the global
    generators of torch, NumPy and Python, which start from the seed of the augmentation and the
    sample's number.
    """
    name = config.data
    make = imported("data", name)
    try:
        # So that a random split is the same in every process, and in a run that goes on.
        with seeded(None, 0):
            found = make(config.root)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"data {name}: raises {in_a_line(error)}") from error
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        raise ConfigError(f"data {name}: must return (train, test), got {_shown(found)}")
    train = _OwnPictures(f"data {name}: train", found[0])
    test = _OwnPictures(f"data {name}: test", found[1], train.shape)
    names = getattr(found[0], "classes", None)
    if not isinstance(names, (tuple, list)) or not all(isinstance(c, str) for c in names):
        names = [str(number) for number in range(int(train.labels.max()) + 1)]
    for part in (train, test):
        low, high = int(part.labels.min()), int(part.labels.max())
        if not 0 <= low <= high < len(names):
            raise ConfigError(
                f"{part.where} must have labels from 0 to {len(names) - 1}, the classes of train; "
                f"got {low} to {high}"
            )
    layout = torch.contiguous_format if config.speed == "exact" else torch.channels_last

    def finish(x: Tensor) -> Tensor:
        return x.contiguous(memory_format=layout)

    samples, evaluate = (
        OnDemand(part, part.labels, finish, True, device, config.workers) for part in (train, test)
    )
    content = (f"{train.shape}".encode(), train.content, test.content)
    digest = digest_of(names, samples, evaluate, *content)
    channels, _, width = train.shape
    mean, std = (0.0,) * channels, (1.0,) * channels
    return Data(tuple(names), width, samples, evaluate, mean, std, digest=digest, own=True)
