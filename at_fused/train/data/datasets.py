"""The digits, CIFAR, and data sets that a function of one's own makes."""

from __future__ import annotations

import hashlib
import multiprocessing
import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset, IterableDataset

from at_fused.train.config import SIZES, Config, ConfigError, imported, in_a_line
from at_fused.train.data.samples import (
    Data,
    InMemory,
    OnDemand,
    as_labels,
    digest_of,
    normalisation,
    sample_seed,
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


def needs_torchvision(name: str, error: Exception) -> ImportError:
    """Return the error where torchvision is absent, or made for another torch."""
    install = 'needs torchvision: pip install "at_fused[train]"'
    return ImportError(f"data {name!r} {install} ({in_a_line(error)})")


def _cifar_part(part: str, read: Any) -> tuple[Tensor, Tensor]:
    """Return pixels (N, 32, 32, 3) uint8 and labels (N,) of files; ValueError for others."""
    pixels, classes = torch.as_tensor(read.data), len(read.classes)
    if pixels.shape[1:] != (32, 32, 3) or pixels.dtype != torch.uint8:
        shape = tuple(pixels.shape)
        raise ValueError(f"{part} has pixels {shape} {pixels.dtype}, not (N, 32, 32, 3) uint8")
    labels = as_labels(read.targets, len(pixels))
    if labels is None:
        raise ValueError(f"{part} has {len(pixels)} images, and not a whole label for each")
    if not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"{part} has labels that are not in [0, {classes})")
    return pixels, labels


def open_cifar(config: Config, device: torch.device | str) -> Data:
    """Open CIFAR-10 or CIFAR-100, augmented as the authors' program does.

    Files of the same form that are not those of the data set's own page are read, and named in
    the facts.
    """
    name, root = config.data, Path(config.root).expanduser().absolute()
    try:
        import torchvision
        from torchvision.datasets.utils import check_integrity
    except (ImportError, RuntimeError, OSError) as error:
        raise needs_torchvision(name, error) from error
    published = getattr(torchvision.datasets, name.upper())
    sums = dict([*published.train_list, *published.test_list])
    sums[published.meta["filename"]] = published.meta["md5"]
    folder = root / published.base_folder
    missing = [file for file in sums if not (folder / file).is_file()]
    if missing and not config.download:
        raise FileNotFoundError(
            f"data {name!r} needs {folder.name}/ with {', '.join(sums)} in the root folder; "
            f"{', '.join(missing)} not found in {folder}. --download fetches them"
        )

    class AnySum(published):  # type: ignore[misc, valid-type]
        """The same, whatever the files' checksums."""

        train_list = tuple((file, None) for file, _ in published.train_list)
        test_list = tuple((file, None) for file, _ in published.test_list)
        meta = published.meta | {"md5": None}

    def unpublished() -> str:
        own = [file for file, md5 in sums.items() if not check_integrity(str(folder / file), md5)]
        return f"not the published files: {', '.join(own)}" if own else ""

    try:
        read = {
            part: AnySum(str(root), train=part == "train", download=config.download)
            for part in ("train", "test")
        }
        parts = [_cifar_part(part, found) for part, found in read.items()]
    except Exception as error:  # a pickle may raise any
        if missing and isinstance(error, OSError):
            raise OSError(f"data {name!r}: the download to {folder} failed ({error})") from error
        raise ConfigError(
            f"data {name!r}: files in {folder} are damaged, or not as CIFAR has them "
            f"({in_a_line(error)}; {unpublished()}): delete it, and --download fetches them anew"
        ) from error
    mean, std = normalisation(config, (CIFAR_MEAN, CIFAR_STD))
    last = config.speed != "exact"
    train = InMemory(*parts[0], mean, std, 4, True, device, last)
    test = InMemory(*parts[1], mean, std, 0, False, device, last)
    names = tuple(map(str, read["train"].classes))
    digest = digest_of(names, train, test, *(pixels.numpy().tobytes() for pixels, _ in parts))
    facts = {name: said} if (said := unpublished()) else {}
    return Data(names, 32, train, test, mean, std, facts=facts, digest=digest)


# ---- what a function of one's own makes

WANTED = (
    "(x, label) with x a float tensor (C, H, W), as ToTensor and Normalize of "
    "torchvision.transforms make it, and label a whole number"
)
READ_TWICE = 8  # items of each part that are read twice, to see that they are repeatable


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    if isinstance(value, (tuple, list)) and len(value) < 5:
        return f"({', '.join(map(_shown, value))})"
    return type(value).__name__


@contextmanager
def _seeded(seed: int | None, number: int) -> Iterator[None]:
    """Start the global generators from a hash of both; afterwards they are as before."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    start = sample_seed(seed, number)
    random.seed(start)
    np.random.seed(start)
    torch.default_generator.manual_seed(start)  # torch.manual_seed is for the GPUs as well
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _item(
    where: str, dataset: Any, index: int, seed: int | None, number: int
) -> tuple[Tensor, int]:
    """Return an item, its transforms drawing from the seed; ConfigError if it is not as wanted."""
    try:
        with _seeded(seed, number):
            found = dataset[index]
    except Exception as error:
        raise ConfigError(f"{where}[{index}] raises {in_a_line(error)}") from error
    x, y = found if isinstance(found, (tuple, list)) and len(found) == 2 else (None, None)
    label = as_labels([y], 1)
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() != 3 or label is None:
        raise ConfigError(f"{where}[{index}] must be {WANTED}; got {_shown(found)}")
    x = x.float()
    if not x.isfinite().all():
        raise ConfigError(f"{where}[{index}] has NaN or inf among its values")
    return x, int(label)


@dataclass(frozen=True)
class _OwnPictures(Dataset[Any]):
    """Items of a dataset, as :class:`OnDemand` reads them; with all labels and the one shape."""

    where: str
    dataset: Any
    labels: Tensor
    shape: torch.Size

    def __getitem__(self, key: tuple[int, int, int | None]) -> Tensor | str:
        index, number, seed = key
        label = int(self.labels[index])
        try:
            x, found = _item(self.where, self.dataset, index, seed, number)
        except ConfigError as error:
            return str(error)
        if (x.shape, found) != (self.shape, label):
            return (
                f"{self.where}[{index}] must be a tensor {tuple(self.shape)}, as train[0] is, with "
                f"the label {label}, as targets have it; got {tuple(x.shape)} and {found}"
            )
        return x


def _read(pictures: _OwnPictures, number: int) -> Tensor:
    found = pictures[number, number, 0]
    if isinstance(found, str):
        raise ConfigError(found)
    return found


def _own_pictures(
    where: str, dataset: Any, shape: torch.Size | None, workers: int
) -> tuple[_OwnPictures, bytes]:
    """Return a dataset's items, and a digest of the first; ConfigError if they are not usable."""
    sized = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if not sized or isinstance(dataset, IterableDataset) or not len(dataset):
        raise ConfigError(
            f"{where} must be a map-style torch Dataset with items, got {_shown(dataset)}"
        )
    count = len(dataset)
    shape = shape or _item(where, dataset, 0, 0, 0)[0].shape
    labels = as_labels(getattr(dataset, "targets", None), count)
    if labels is None:
        labels = torch.tensor([_item(where, dataset, i, None, i)[1] for i in range(count)])
    pictures = _OwnPictures(where, dataset, labels, shape)
    content = hashlib.sha256()
    for number in range(min(READ_TWICE, count)):
        first, again = _read(pictures, number), _read(pictures, number)
        if not torch.equal(first, again):
            raise ConfigError(
                f"{where}[{number}] differs from itself, with the same state of torch's, NumPy's "
                "and Python's global generators: its transforms must draw from these alone"
            )
        content.update(first.numpy(force=True).tobytes())
    if workers and multiprocessing.get_start_method() != "fork":
        try:
            pickle.dumps(pictures)
        except Exception as error:
            why = f"({in_a_line(error)}); with --workers 0 it need not"
            raise ConfigError(f"{where} cannot be sent to workers {why}") from error
    return pictures, content.digest()


def open_own(config: Config, device: torch.device | str) -> Data:
    """Open the two datasets that the function MODULE:FUNCTION makes of ``root``.

    They are map-style, to train with and to report on, of (x, label): x a float tensor (C, H, W)
    of one shape, as the networks take it, label a whole number. The names of the classes are
    ``train.classes``, or the numbers. Labels are read from ``targets``, where a dataset has as
    many; or from the items, all of which are read for it. Random transforms draw from the global
    generators of torch, NumPy and Python, which start from the seed of the augmentation and the
    sample's number.
    """
    name, workers = config.data, config.workers
    make = imported("data", name)
    try:
        # So that a random split is the same in every process, and in a run that goes on.
        with _seeded(None, 0):
            found = make(config.root)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"data {name}: raises {in_a_line(error)}") from error
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        raise ConfigError(f"data {name}: must return (train, test), got {_shown(found)}")
    train, train_content = _own_pictures(f"data {name}: train", found[0], None, workers)
    test, test_content = _own_pictures(f"data {name}: test", found[1], train.shape, workers)
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
    last = config.speed != "exact"
    layout = torch.channels_last if last else torch.contiguous_format

    def finish(x: Tensor) -> Tensor:
        return x.contiguous(memory_format=layout)

    samples, evaluate = (
        OnDemand(part, part.labels, finish, True, device, workers) for part in (train, test)
    )
    content = (f"{train.shape}".encode(), train_content, test_content)
    digest = digest_of(names, samples, evaluate, *content)
    channels, _, width = train.shape
    mean, std = (0.0,) * channels, (1.0,) * channels
    return Data(tuple(names), width, samples, evaluate, mean, std, digest=digest, own=True)
