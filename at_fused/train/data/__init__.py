"""The data sets of at-fused-train: digits, CIFAR, folders of pictures, and one's own.

data = open_data("cifar10", "~/data", device="cuda")
for x, y, index in data.train.batches(torch.randperm(len(data.train)).split(128), seed=epoch):
    ...
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from at_fused.train.config import SIZES
from at_fused.train.data.cifar import CIFAR, read_cifar
from at_fused.train.data.digits import read_digits
from at_fused.train.data.folder import (
    MEAN,
    STD,
    Pictures,
    check_unreadable,
    inspect,
    open_folder,
)
from at_fused.train.data.own import open_own
from at_fused.train.data.samples import (
    Data,
    InMemory,
    Opened,
    Pixels,
    Samples,
    set_apart,
    stratified,
)
from at_fused.train.rules import ConfigError

__all__ = ["Data", "Pictures", "Samples", "check_unreadable", "inspect", "open_data"]


def open_data(
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    download: bool = False,
    image_size: int | None = None,
    evaluate: str = "test",
    fraction: float = 1.0,
    validation: float = 0.0,
    augment: bool = True,
    device: torch.device | str = "cpu",
    channels_last: bool = False,
    workers: int = 0,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    pictures: Pictures | None = None,
) -> Data:
    """A data set, ready to train with.

    Args:
        name: "digits", "cifar10", "cifar100" or "folder"; or MODULE:FUNCTION, for which see
            :func:`at_fused.train.data.own.open_own`.
        root: the folder that the files are in; the digits need none. A function is given it as is.
        download: fetch CIFAR where it is missing.
        image_size: >= 2; None: 16 for the digits, 224 for a folder. CIFAR's is 32.
        evaluate: the samples to report on, "test"; of the digits also "val".
        fraction: in (0, 1], the part of each class's training samples to keep, at least one.
        validation: in [0, 0.9], the part of each class's samples, of those kept, that is set apart
            for validation: at least one, unless it is 0.
        augment: False: the training samples are the same whatever the seed.
        device, channels_last: of the batches.
        workers: processes that read pictures one by one, at most one for each CPU that this
            process may use; 0: this one does.
        mean, std: of each channel, for pixels in [0, 1]; (): the data set's own.
        pictures: results of :func:`inspect`, to leave the unreadable ones of a folder out; None:
            they are an error when they are read.

    Returns:
        The data set; digits and CIFAR are in memory, on the device.

    Raises:
        ConfigError: the training images are of a single class.
        FileNotFoundError: files are missing; says which, and where they are to be.
        ImportError: scikit-learn (digits) or torchvision (CIFAR, folders) cannot be imported.
        OSError: the download fails.
        ValueError: an argument is not as above, or files are damaged.
    """
    own = ":" in name
    if name not in SIZES and not own:
        known = ", ".join(SIZES)
        raise ValueError(f"data must be one of {known}, or MODULE:FUNCTION, got {name!r}")
    size = SIZES.get(name, 2) if image_size is None else image_size
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
    if not 0 <= validation <= 0.9:
        raise ValueError(f"validation must be in [0, 0.9], got {validation}")
    if workers < 0:
        raise ValueError(f"workers must be >= 0, got {workers}")
    if pictures is not None and name != "folder":
        raise ValueError(f"pictures must be those of data 'folder', not of {name!r}")

    if own:
        theirs = {"image_size": image_size, "mean": mean, "std": std, "augment": augment}
        for option, value in theirs.items():
            if value not in (None, (), True):
                raise ValueError(
                    f"{option} must not be given for {name!r}, whose function makes the images as "
                    f"the networks take them; got {value}"
                )
        opened = open_own(name, root, device, channels_last, workers)
    elif name == "digits":
        raw = read_digits(size, evaluate)
        opened = _in_memory(raw, (), mean, std, device, channels_last)
    elif root is None:
        raise ValueError(f"root must be the folder that the files of {name!r} are in, got None")
    else:
        folder = Path(root).expanduser().absolute()
        if name == "folder":
            mean, std = _constants("mean", mean, MEAN), _constants("std", std, STD)
            opened = open_folder(folder, size, device, channels_last, workers, mean, std, pictures)
        else:
            raw = read_cifar(name, folder, download)
            pixels = [part[0].numpy().tobytes() for part in (raw.train, raw.evaluate)]
            opened = _in_memory(raw, pixels, mean, std, device, channels_last)

    if len(opened.labels.unique()) < 2:
        raise ConfigError(
            f"data {name!r}: the images to train with must be of at least two classes, all are of "
            f"{opened.names[int(opened.labels[0])]!r}"
        )
    rows, apart = stratified(opened.labels, fraction), None
    facts = opened.facts
    if validation:
        kept, held = set_apart(opened.labels[rows], validation)
        rows, apart = rows[kept], opened.part(rows[held], False)
        if own:
            facts = facts | {"validation": "images transformed as those to train with, but once"}
    labels = (opened.labels, opened.evaluate.labels)
    digest = hashlib.sha256(repr(opened.names).encode())
    for content in (*(each.numpy().tobytes() for each in labels), *opened.identity):
        digest.update(hashlib.sha256(content).digest())
    return Data(
        len(opened.names),
        len(opened.mean),
        opened.image_size,
        opened.names,
        opened.part(rows, augment),
        opened.evaluate,
        opened.mean,
        opened.std,
        apart,
        facts,
        digest.hexdigest()[:16],
        own,
    )


def _constants(option: str, given: Sequence[float], own: tuple[float, ...]) -> tuple[float, ...]:
    """The mean or std that is given, checked; or the data set's own."""
    if not given:
        return own
    low = 0 if option == "mean" else sys.float_info.min
    if len(given) != len(own) or not all(low <= value <= 1 for value in given):
        interval = "[0, 1]" if option == "mean" else "(0, 1]"
        raise ValueError(
            f"{option} must be {len(own)} numbers in {interval}, one per channel, for pixels in "
            f"[0, 1]; got {', '.join(map(str, given))}"
        )
    return tuple(map(float, given))


def _in_memory(
    raw: Pixels,
    identity: Sequence[bytes],
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str,
    channels_last: bool,
) -> Opened:
    mean, std = _constants("mean", mean, raw.mean), _constants("std", std, raw.std)
    pixels, labels = raw.train

    def part(rows: Tensor, augment: bool) -> InMemory:
        pad, flip = (raw.pad, raw.flip) if augment else (0, False)
        return InMemory(pixels[rows], labels[rows], mean, std, pad, flip, device, channels_last)

    evaluate = InMemory(*raw.evaluate, mean, std, 0, False, device, channels_last)
    return Opened(
        raw.names, pixels.shape[2], labels, part, evaluate, mean, std, raw.facts, identity
    )
