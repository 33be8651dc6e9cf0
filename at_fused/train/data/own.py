"""A data set of one's own, by the import path of the function that makes it."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from at_fused.train.data.samples import OnDemand, Opened, as_labels, seed_of
from at_fused.train.rules import ConfigError, imported, in_a_line

WANTED = (
    "(x, label) with x a float tensor (C, H, W), as ToTensor and Normalize of "
    "torchvision.transforms make it, and label a whole number"
)
TWICE = 8  # items of each part that are read twice, to see that they are repeatable


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    if isinstance(value, (tuple, list)) and len(value) < 5:
        return f"({', '.join(map(_shown, value))})"
    return type(value).__name__


@contextmanager
def _drawing(seed: int | None, number: int) -> Iterator[None]:
    """Start the global generators from a hash of both; afterwards they are as before."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    start = seed_of(seed, number)
    random.seed(start)
    np.random.seed(start)
    torch.default_generator.manual_seed(start)  # torch.manual_seed is for the GPUs as well
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _item(where: str, dataset: Any, place: int, *draw: Any) -> tuple[Tensor, int]:
    """One item, its transforms drawing from ``draw``; ConfigError if it is not as wanted."""
    try:
        with _drawing(*draw):
            found = dataset[place]
    except Exception as error:
        raise ConfigError(f"{where}[{place}] raises {in_a_line(error)}") from error
    x, y = found if isinstance(found, (tuple, list)) and len(found) == 2 else (None, None)
    label = as_labels([y], 1)
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() != 3 or label is None:
        raise ConfigError(f"{where}[{place}] must be {WANTED}; got {_shown(found)}")
    x = x.float()
    if not x.isfinite().all():
        raise ConfigError(f"{where}[{place}] has NaN or inf among its values")
    return x, int(label)


@dataclass(frozen=True)
class _Items(Dataset[Any]):
    """Items of a dataset; see :class:`at_fused.train.data.samples.Reader`.

    numbers: of the items that are used, which are numbered from 0 here; with their labels.
    identity: of the values of the first items.
    """

    what: str
    dataset: Any
    shape: torch.Size
    labels: Tensor
    numbers: Tensor
    identity: bytes = b""

    def __getitem__(self, key: tuple[int, int | None]) -> Tensor | str:
        number, seed = key
        place, label = int(self.numbers[number]), int(self.labels[number])
        try:
            x, found = _item(self.what, self.dataset, place, seed, number)
        except ConfigError as error:
            return str(error)
        if (x.shape, found) != (self.shape, label):
            return (
                f"{self.what}[{place}] must be a tensor {tuple(self.shape)}, as train[0] is, with "
                f"the label {label}, as targets have it; got {tuple(x.shape)} and {found}"
            )
        return x

    def subset(self, index: Tensor) -> _Items:
        return replace(self, labels=self.labels[index], numbers=self.numbers[index])


def _items(what: str, dataset: Any, shape: torch.Size | None, workers: int) -> _Items:
    """All items of a dataset; ConfigError for anything but a dataset."""
    sized = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if not sized or isinstance(dataset, IterableDataset) or not len(dataset):
        raise ConfigError(
            f"{what} must be a map-style torch Dataset with items, got {_shown(dataset)}"
        )
    count = len(dataset)
    shape = shape or _item(what, dataset, 0, 0, 0)[0].shape
    labels = as_labels(getattr(dataset, "targets", None), count)
    if labels is None:
        labels = torch.tensor([_item(what, dataset, i, None, i)[1] for i in range(count)])
    items = _Items(what, dataset, shape, labels, torch.arange(count))
    content = hashlib.sha256()
    for number in range(min(TWICE, count)):
        first, again = items[number, 0], items[number, 0]
        if isinstance(first, str) or isinstance(again, str):
            raise ConfigError(str(first if isinstance(first, str) else again))
        if not torch.equal(first, again):
            raise ConfigError(
                f"{what}[{number}] differs from itself, with the same state of torch's, NumPy's "
                "and Python's global generators: its transforms must draw from these alone"
            )
        content.update(first.numpy(force=True).tobytes())
    if workers and multiprocessing.get_start_method() != "fork":
        try:
            pickle.dumps(items)
        except Exception as error:
            raise ConfigError(
                f"{what} cannot be sent to workers ({in_a_line(error)}); with --workers 0 it "
                "need not"
            ) from error
    return replace(items, identity=content.digest())


def open_own(
    name: str,
    root: str | os.PathLike[str] | None,
    device: torch.device | str,
    channels_last: bool,
    workers: int,
) -> Opened:
    """Open what the function ``name``, MODULE:FUNCTION, makes of ``root``.

    It returns two map-style datasets, to train with and to report on, of (x, label): x a float
    tensor (C, H, W) of one shape, as the networks take it, label a whole number. The names of
    the classes are ``train.classes``, or the numbers. Labels are read from ``targets``, where a
    dataset has as many; or from the items, all of which are read for it. Random transforms draw
    from the global generators of torch, NumPy and Python, which start from the seed of the
    augmentation and the sample's number.

    Raises:
        ConfigError: anything is not so.
    """
    make = imported("data", name)
    try:
        # So that a random split is the same in every process, and in a run that goes on.
        with _drawing(None, 0):
            found = make(root)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"data {name}: raises {in_a_line(error)}") from error
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        raise ConfigError(f"data {name}: must return (train, test), got {_shown(found)}")
    train = _items(f"data {name}: train", found[0], None, workers)
    test = _items(f"data {name}: test", found[1], train.shape, workers)
    given = getattr(found[0], "classes", None)
    if not isinstance(given, (tuple, list)) or not all(isinstance(c, str) for c in given):
        given = [str(number) for number in range(int(train.labels.max()) + 1)]
    for items in (train, test):
        low, high = int(items.labels.min()), int(items.labels.max())
        if not 0 <= low <= high < len(given):
            raise ConfigError(
                f"{items.what} must have labels from 0 to {len(given) - 1}, the classes of train; "
                f"got {low} to {high}"
            )
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def samples(items: _Items) -> OnDemand:
        def finish(x: Tensor) -> Tensor:
            return x.contiguous(memory_format=layout)

        return OnDemand(items, items.labels, finish, True, device, workers)

    channels, _, width = train.shape
    return Opened(
        tuple(given),
        width,
        train.labels,
        lambda rows, augment: samples(train.subset(rows)),
        samples(test),
        (0.0,) * channels,
        (1.0,) * channels,
        {},
        [f"{train.shape}".encode(), train.identity, test.identity],
    )
