"""Data sets of at-fused-train: digits, Fashion-MNIST, CIFAR, folders and custom data sets.

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
from at_fused.train.config import Config, is_import_path
from at_fused.train.data.datasets import open_cifar, open_custom, open_digits, open_fashion_mnist
from at_fused.train.data.folder import SPLITS, check_unreadable, open_folder, scan_images
from at_fused.train.data.samples import Data, ImageScan, Samples, hold_out, stratified_subset

__all__ = ["SCAN_FILE", "Data", "ImageScan", "Samples", "open_data", "prepare_data", "scan_images"]

# Fraction of the training images that --evaluate val reports on instead of the test images.
TUNING_FRACTION = 1 / 6
SCAN_FILE = "pictures.json"  # in a run's folder


def prepare_data(
    config: Config, device: torch.device, out: Path | None = None, splits: Sequence[str] = SPLITS
) -> Data:
    """Download, check and open the data of a run, which may span several machines.

    Reads all images of a folder's ``splits`` once, so that errors appear before training. On
    --resume in ``out``, reads them only if files have changed.
    """
    downloads = config.download and parallel.process_info().local_rank == 0
    if config.download and not downloads:
        parallel.all_gather(None)  # wait for local rank 0 to download the files
    scan = None
    if config.data == "folder":
        scan = parallel.run_on_rank_0(lambda: _scan_folder(config, out, splits))
    data = open_data(replace(config, download=downloads), device, scan)
    if downloads:
        parallel.all_gather(None)
    return data


def _scan_folder(config: Config, out: Path | None, splits: Sequence[str]) -> ImageScan:
    known = None
    if out and (file := out / SCAN_FILE).is_file():
        with suppress(ValueError):  # a damaged file: read the images again
            known = json.loads(file.read_text(encoding="utf-8"))
    scan = scan_images(config.root, config.workers, splits=splits, known=known)
    check_unreadable(scan, config.root, config.skip_unreadable)
    return scan


def open_data(
    config: Config, device: torch.device | str = "cpu", scan: ImageScan | None = None
) -> Data:
    """Open a data set for training. Digits, Fashion-MNIST and CIFAR stay in device memory.

    Args:
        config: options of the data; at most one of its ``workers`` runs per CPU.
        device: the device of the batches.
        scan: result of :func:`scan_images`, to skip unreadable images of a folder. Without it,
            reading such an image is an error.
    """
    if is_import_path(config.data):
        data = open_custom(config, device)
    elif config.data == "digits":
        data = open_digits(config, device)
    elif config.data == "folder":
        data = open_folder(config, device, scan)
    elif config.data == "fashion-mnist":
        data = open_fashion_mnist(config, device)
    else:
        data = open_cifar(config, device)
    if config.evaluate == "val" and config.data != "digits":
        kept, held_out = hold_out(data.train.labels, TUNING_FRACTION)
        evaluate = data.train.subset(held_out, augment=False)
        data = replace(data, train=data.train.subset(kept), evaluate=evaluate)
    labels = data.train.labels
    rows = stratified_subset(labels, config.fraction)
    if config.validation:
        kept, held_out = hold_out(labels[rows], config.validation)
        data = replace(data, validation=data.train.subset(rows[held_out], augment=False))
        rows = rows[kept]
    return replace(data, train=data.train.subset(rows, config.augment))
