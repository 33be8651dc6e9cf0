"""CIFAR-10 and CIFAR-100: 50,000 pictures of 32 x 32 to train with and 10,000 to test, read whole.

Augmented as the authors' program does: moved by up to 4 pixels, and mirrored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from at_fused.train.data.samples import Pixels


@dataclass(frozen=True)
class _Cifar:
    """Torchvision's class, the files it reads, and the authors' mean and std, for pixels to 255."""

    title: str
    folder: str
    files: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


CIFAR = {
    "cifar10": _Cifar(
        "CIFAR10",
        "cifar-10-batches-py",
        (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"),
        (125.3, 123.0, 113.9),
        (63.0, 62.1, 66.7),
    ),
    "cifar100": _Cifar(
        "CIFAR100",
        "cifar-100-python",
        ("train", "test", "meta"),
        (129.3, 124.1, 112.4),
        (68.2, 65.4, 70.4),
    ),
}


def needs_torchvision(name: str, error: Exception) -> ImportError:
    """The error where torchvision cannot be imported: it is absent, or made for another torch."""
    install = 'needs torchvision: pip install "at_fused[train]"'
    return ImportError(f"data {name!r} {install} ({type(error).__name__}: {error})")


def _tensors(data: object, labels: Sequence[int]) -> tuple[Tensor, Tensor]:
    return torch.as_tensor(data), torch.tensor(labels, dtype=torch.int64)


def read_cifar(name: str, root: Path, download: bool) -> Pixels:
    """Both parts of "cifar10" or "cifar100", from the files that the data set's own page offers.

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
    except (ImportError, RuntimeError, OSError) as error:
        raise needs_torchvision(name, error) from error
    try:
        dataset = getattr(torchvision.datasets, about.title)
        train, test = (dataset(str(root), train=t, download=download) for t in (True, False))
    except RuntimeError as error:  # a checksum that does not match
        raise ValueError(
            f"data {name!r}: files in {folder} are damaged: delete it, and --download fetches "
            f"them anew ({error})"
        ) from error
    except OSError as error:
        if not download:
            raise
        raise OSError(f"data {name!r}: the download to {folder} failed ({error})") from error
    return Pixels(
        names=tuple(train.classes),
        train=_tensors(train.data, train.targets),
        evaluate=_tensors(test.data, test.targets),
        mean=tuple(m / 255 for m in about.mean),
        std=tuple(s / 255 for s in about.std),
        pad=4,
        flip=True,
    )
