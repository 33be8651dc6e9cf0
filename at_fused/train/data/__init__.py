"""The data sets of at-fused-train, by name: digits, CIFAR-10 and -100, and folders of pictures.

data = open_data("cifar10", "~/data", device="cuda")
for x, y, index in data.train.batches(torch.randperm(len(data.train)).split(128), seed=epoch):
    ...
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from at_fused.train.config import SIZES
from at_fused.train.data.cifar import CIFAR, read_cifar
from at_fused.train.data.digits import read_digits
from at_fused.train.data.folder import open_folder
from at_fused.train.data.samples import Data, InMemory, Samples, stratified

__all__ = ["Data", "Samples", "open_data"]


def open_data(
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    download: bool = False,
    image_size: int | None = None,
    evaluate: str = "test",
    fraction: float = 1.0,
    augment: bool = True,
    device: torch.device | str = "cpu",
    channels_last: bool = False,
    workers: int = 0,
) -> Data:
    """A data set, ready to train with.

    Args:
        name: "digits", "cifar10", "cifar100" or "folder".
        root: the folder that the files are in; the digits need none.
        download: fetch CIFAR where it is missing.
        image_size: >= 2; None: 16 for the digits, 224 for a folder. CIFAR's is 32.
        evaluate: the samples to report on, "test"; of the digits also "val".
        fraction: in (0, 1], the part of each class's training samples to keep, at least one.
        augment: False: the training samples are the same whatever the seed.
        device, channels_last: of the batches.
        workers: processes that read a folder's files; 0: this one does.

    Returns:
        The data set; all but a folder's is in memory, on the device.

    Raises:
        FileNotFoundError: files are missing; says which, and where they are to be.
        ImportError: scikit-learn (digits) or torchvision (all others) cannot be imported.
        OSError: the download fails.
        ValueError: an argument is not as above, or files are damaged.
    """
    if name not in SIZES:
        raise ValueError(f"data must be one of {', '.join(SIZES)}, got {name!r}")
    size = SIZES[name] if image_size is None else image_size
    if size < 2:
        raise ValueError(f"image_size must be >= 2, got {size}")
    if name in CIFAR and size != SIZES[name]:
        raise ValueError(f"image_size must be {SIZES[name]} for {name!r}, got {size}")
    allowed = ("test", "val") if name == "digits" else ("test",)
    if evaluate not in allowed:
        either = " or ".join(map(repr, allowed))
        raise ValueError(f"evaluate must be {either} for {name!r}, got {evaluate!r}")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}")
    if workers < 0:
        raise ValueError(f"workers must be >= 0, got {workers}")
    if name == "digits":
        raw = read_digits(size, evaluate)
    elif root is None:
        raise ValueError(f"root must be the folder that the files of {name!r} are in, got None")
    else:
        folder = Path(root).expanduser().absolute()
        if name == "folder":
            return open_folder(
                folder,
                size,
                fraction=fraction,
                augment=augment,
                device=device,
                channels_last=channels_last,
                workers=workers,
            )
        raw = read_cifar(name, folder, download)

    pixels, labels = raw.train
    if fraction < 1:
        kept = stratified(labels, fraction)
        pixels, labels = pixels[kept], labels[kept]
    pad, flip = (raw.pad, raw.flip) if augment else (0, False)
    train = InMemory(pixels, labels, raw.mean, raw.std, pad, flip, device, channels_last)
    held_out = InMemory(
        *raw.evaluate, raw.mean, raw.std, device=device, channels_last=channels_last
    )
    channels = pixels.shape[3]
    return Data(len(raw.names), channels, size, raw.names, train, held_out, raw.mean, raw.std)
