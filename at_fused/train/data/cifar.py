"""CIFAR-10 and CIFAR-100: 50,000 pictures of 32 x 32 to train with and 10,000 to test, read whole.

Augmented as the authors' program does: moved by up to 4 pixels, and mirrored.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from at_fused.train.data.samples import Pixels, as_labels


@dataclass(frozen=True)
class _Cifar:
    """Torchvision's class, and the files it reads."""

    title: str
    folder: str
    files: tuple[str, ...]


# The authors' program normalises both by those of CIFAR-10; for pixels to 255.
MEAN, STD = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)
CIFAR = {
    "cifar10": _Cifar(
        "CIFAR10",
        "cifar-10-batches-py",
        (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"),
    ),
    "cifar100": _Cifar("CIFAR100", "cifar-100-python", ("train", "test", "meta")),
}


def needs_torchvision(name: str, error: Exception) -> ImportError:
    """The error where torchvision cannot be imported: it is absent, or made for another torch."""
    install = 'needs torchvision: pip install "at_fused[train]"'
    return ImportError(f"data {name!r} {install} ({type(error).__name__}: {error})")


def _part(name: str, data: object, given: object, classes: int) -> tuple[Tensor, Tensor]:
    """Pixels (N, 32, 32, 3) uint8 and labels (N,) int64 of what files have, if they have these."""
    pixels = torch.as_tensor(data)
    if pixels.shape[1:] != (32, 32, 3) or pixels.dtype != torch.uint8:
        shape = tuple(pixels.shape)
        raise ValueError(f"{name} has pixels {shape} {pixels.dtype}, not (N, 32, 32, 3) uint8")
    labels = as_labels(given, len(pixels))
    if labels is None:
        raise ValueError(f"{name} has {len(pixels)} images, and not a whole label for each")
    if not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"{name} has labels that are not in [0, {classes})")
    return pixels, labels


def read_cifar(name: str, root: Path, download: bool) -> Pixels:
    """Both parts of "cifar10" or "cifar100".

    Files of the same form that are not those of the data set's own page are read, and named in
    the facts.

    Raises:
        FileNotFoundError: files are missing, and not to be downloaded.
        ImportError: torchvision cannot be imported.
        OSError: the download fails.
        ValueError: files are damaged.
    """
    about = CIFAR[name]
    folder = root / about.folder
    missing = [file for file in about.files if not (folder / file).is_file()]
    if missing and not download:
        raise FileNotFoundError(
            f"data {name!r} needs {about.folder}/ with {', '.join(about.files)} in the root "
            f"folder; {', '.join(missing)} not found in {folder}. --download fetches them"
        )
    try:
        import torchvision
        from torchvision.datasets.utils import check_integrity
    except (ImportError, RuntimeError, OSError) as error:
        raise needs_torchvision(name, error) from error
    published = getattr(torchvision.datasets, about.title)
    sums = dict([*published.train_list, *published.test_list])
    sums[published.meta["filename"]] = published.meta["md5"]

    class AnySum(published):  # type: ignore[misc, valid-type]
        """The same, whatever the files' checksums."""

        train_list = tuple((file, None) for file, _ in published.train_list)
        test_list = tuple((file, None) for file, _ in published.test_list)
        meta = published.meta | {"md5": None}

    def said() -> str:
        own = [file for file, md5 in sums.items() if not check_integrity(str(folder / file), md5)]
        return f"not the published files: {', '.join(own)}" if own else ""

    try:
        train, test = (AnySum(str(root), train=t, download=download) for t in (True, False))
        names = tuple(map(str, train.classes))
        parts = [
            _part(part, read.data, read.targets, len(names))
            for part, read in (("train", train), ("test", test))
        ]
    except Exception as error:  # a pickle may raise any
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if missing and isinstance(error, OSError):
            raise OSError(f"data {name!r}: the download to {folder} failed ({error})") from error
        raise ValueError(
            f"data {name!r}: files in {folder} are damaged, or not as CIFAR has them ({reason}; "
            f"{said()}): delete it, and --download fetches them anew"
        ) from error
    word = said()
    return Pixels(
        names=names,
        train=parts[0],
        evaluate=parts[1],
        mean=tuple(m / 255 for m in MEAN),
        std=tuple(s / 255 for s in STD),
        pad=4,
        flip=True,
        facts={name: word} if word else {},
    )
