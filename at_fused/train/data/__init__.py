"""The data sets of at-fused-train: digits, Fashion-MNIST, CIFAR, folders, and one's own.

data = open_data(config, "cuda")
for x, y, index in data.train.batches(torch.randperm(len(data.train)).split(128), seed=epoch):
    ...
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from at_fused.train import parallel
from at_fused.train.config import Config, is_import
from at_fused.train.data.datasets import open_cifar, open_digits, open_fashion_mnist, open_own
from at_fused.train.data.folder import PARTS, check_unreadable, inspect, open_folder
from at_fused.train.data.samples import Data, Pictures, Samples, set_apart, stratified

__all__ = ["PICTURES", "Data", "Pictures", "Samples", "inspect", "open_data", "read_data"]

# Share of the training images that --evaluate val reports on, in place of the test images.
TUNING_SHARE = 1 / 6
PICTURES = "pictures.json"  # of a run's folder


def read_data(
    config: Config, device: torch.device, out: Path | None = None, parts: Sequence[str] = PARTS
) -> Data:
    """Fetch, look at and open the data of a run, whose processes may be on several machines.

    A folder's pictures in ``parts`` are all read once, before hours are spent; in a run that goes
    on in ``out``, if they have changed.
    """
    fetches = config.download and parallel.process().local_rank == 0
    if config.download and not fetches:
        parallel.gather(None)  # waits for the files that the first process of this machine fetches
    pictures = None
    if config.data == "folder":
        pictures = parallel.from_first(lambda: _look_at_pictures(config, out, parts))
    data = open_data(replace(config, download=fetches), device, pictures)
    if fetches:
        parallel.gather(None)
    return data


def _look_at_pictures(config: Config, out: Path | None, parts: Sequence[str]) -> Pictures:
    known = None
    if out and (file := out / PICTURES).is_file():
        with suppress(ValueError):  # of a damaged file: then they are read again
            known = json.loads(file.read_text(encoding="utf-8"))
    pictures = inspect(config.root, config.workers, parts=parts, known=known)
    check_unreadable(pictures, config.root, config.skip_unreadable)
    return pictures


def open_data(
    config: Config, device: torch.device | str = "cpu", pictures: Pictures | None = None
) -> Data:
    """Open a data set, ready to train with; digits and CIFAR are in memory, on the device.

    Args:
        config: its options of the data; ``workers`` are at most one for each CPU.
        device: of the batches.
        pictures: results of :func:`inspect`, to leave the unreadable ones of a folder out; None:
            they are an error when they are read.
    """
    if is_import(config.data):
        data = open_own(config, device)
    elif config.data == "digits":
        data = open_digits(config, device)
    elif config.data == "folder":
        data = open_folder(config, device, pictures)
    elif config.data == "fashion-mnist":
        data = open_fashion_mnist(config, device)
    else:
        data = open_cifar(config, device)
    if config.evaluate == "val" and config.data != "digits":
        kept, held = set_apart(data.train.labels, TUNING_SHARE)
        reported = data.train.subset(held, augment=False)
        data = replace(data, train=data.train.subset(kept), evaluate=reported)
    labels = data.train.labels
    rows = stratified(labels, config.fraction)
    if config.validation:
        kept, held = set_apart(labels[rows], config.validation)
        data = replace(data, validation=data.train.subset(rows[held], augment=False))
        rows = rows[kept]
    return replace(data, train=data.train.subset(rows, config.augment))
