"""A folder of pictures as ImageNet has them, <root>/train/<class>/* and <root>/val/<class>/*.

Read from the disk as they are needed, by worker processes if so asked.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from at_fused.train.data.cifar import needs_torchvision
from at_fused.train.data.samples import Data, Standardise, stratified

if TYPE_CHECKING:
    from PIL.Image import Image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
TRIES = 10


def crop_box(
    width: int, height: int, draw: torch.Generator
) -> tuple[tuple[int, int, int, int], bool]:
    """A random part (left, top, right, bottom) of a picture, and whether to mirror it.

    As torchvision's RandomResizedCrop: a share of the area uniform in SCALE, a ratio of the sides
    log-uniform in RATIO; where none fits in TRIES, the middle of the picture.
    """

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), dtype=torch.float64, generator=draw).item()

    flip = uniform(0, 1) < 0.5
    for _ in range(TRIES):
        area = width * height * uniform(*SCALE)
        ratio = math.exp(uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = int(torch.randint(width - w + 1, (), generator=draw))
            top = int(torch.randint(height - h + 1, (), generator=draw))
            return (left, top, left + w, top + h), flip
    w = min(width, max(1, round(height * RATIO[1])))
    h = min(height, max(1, round(width / RATIO[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return (left, top, left + w, top + h), flip


class _Pictures(Dataset[Tensor]):
    """Pictures (size, size, 3) uint8 by (sample number, seed): without state, for the workers."""

    def __init__(self, paths: list[str], size: int) -> None:
        self.paths, self.size = paths, size

    def __getitem__(self, key: tuple[int, int | None]) -> Tensor:
        index, seed = key
        from PIL import Image

        try:
            with Image.open(self.paths[index]) as file:
                picture = file.convert("RGB")
        except (OSError, SyntaxError) as error:  # SyntaxError is PIL's for some broken PNGs
            raise ValueError(f"cannot read the picture {self.paths[index]}: {error}") from error
        picture = self._middle(picture) if seed is None else self._random(picture, index, seed)
        return torch.from_numpy(np.array(picture))

    def _random(self, picture: Image, index: int, seed: int) -> Image:
        from PIL.Image import Resampling, Transpose

        # A hash, because torch's generator uses 32 bits of its seed: all of both numbers count.
        digest = hashlib.sha256(f"{seed} {index}".encode()).digest()
        draw = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
        box, flip = crop_box(*picture.size, draw)
        picture = picture.crop(box).resize((self.size, self.size), Resampling.BILINEAR)
        return picture.transpose(Transpose.FLIP_LEFT_RIGHT) if flip else picture

    def _middle(self, picture: Image) -> Image:
        """As torchvision's Resize(size * 256 / 224) and CenterCrop(size)."""
        from PIL.Image import Resampling

        short = round(self.size * 256 / 224)
        w, h = (int(short * side / min(picture.size)) for side in picture.size)
        left, top = round((w - self.size) / 2), round((h - self.size) / 2)
        picture = picture.resize((w, h), Resampling.BILINEAR)
        return picture.crop((left, top, left + self.size, top + self.size))


class InFolder:
    """Pictures on the disk. Augmented ones are random parts, mirrored by half.

    Args:
        paths: N files.
        labels: (N,) int64.
        size: H and W of what batches have.
        augment: False: no augmentation, whatever the seed.
        device, channels_last: of the batches.
        workers: processes that read the files; 0: this one does.
    """

    def __init__(
        self,
        paths: Sequence[str],
        labels: Tensor,
        size: int,
        augment: bool = False,
        device: torch.device | str = "cpu",
        channels_last: bool = False,
        workers: int = 0,
    ) -> None:
        self.labels = labels
        self._pictures = _Pictures(list(paths), size)
        self._augment, self._workers = augment, workers
        self._device = torch.device(device)
        self._standardise = Standardise(MEAN, STD, device, channels_last)

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: Tensor) -> InFolder:
        """These samples, numbered anew from 0: their augmentation becomes another."""
        part = copy.copy(self)
        part.labels = self.labels[index]
        paths = [self._pictures.paths[i] for i in index.tolist()]
        part._pictures = _Pictures(paths, self._pictures.size)
        return part

    def batches(
        self, chunks: Sequence[Tensor], seed: int | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """See :class:`at_fused.train.data.Samples`."""
        if not self._augment:
            seed = None
        loader: DataLoader[Tensor] = DataLoader(
            self._pictures,
            batch_sampler=[[(i, seed) for i in chunk.tolist()] for chunk in chunks],
            num_workers=self._workers,
            pin_memory=self._device.type == "cuda",
            # Its own, or it would draw the workers' seeds from the global one.
            generator=torch.Generator(),
        )
        for index, x in zip(chunks, loader, strict=True):
            x = self._standardise(x.to(self._device, non_blocking=True))
            yield x, self.labels[index].to(self._device), index


def _class_names(root: Path, part: str) -> list[str]:
    folder = root / part
    entries = folder.iterdir() if folder.is_dir() else ()
    names = sorted(entry.name for entry in entries if entry.is_dir())
    if not names:
        layout = "train/<class>/<picture> and val/<class>/<picture> in the root folder"
        found = "no class folders" if folder.is_dir() else "no folder"
        raise FileNotFoundError(f"data 'folder' needs {layout}; found {found} {folder}")
    return names


def open_folder(
    root: Path,
    size: int,
    *,
    fraction: float,
    augment: bool,
    device: torch.device | str,
    channels_last: bool,
    workers: int,
) -> Data:
    """Both parts: those to train with from train/, those to report on from val/.

    Raises:
        FileNotFoundError: a folder is missing, or a class has no pictures.
        ImportError: torchvision cannot be imported.
        ValueError: train/ and val/ differ in their classes.
    """
    names, others = _class_names(root, "train"), _class_names(root, "val")
    if names != others:
        differ = sorted(set(names) ^ set(others))
        more = ", ..." if len(differ) > 5 else ""
        raise ValueError(
            f"train/ and val/ in {root} must have the same classes; only one of them has "
            f"{', '.join(differ[:5])}{more}"
        )
    try:
        import torchvision
    except (ImportError, RuntimeError, OSError) as error:
        raise needs_torchvision("folder", error) from error

    def part(name: str, augment: bool) -> InFolder:
        found = torchvision.datasets.ImageFolder(str(root / name)).samples
        labels = torch.tensor([label for _, label in found], dtype=torch.int64)
        paths = [path for path, _ in found]
        return InFolder(paths, labels, size, augment, device, channels_last, workers)

    train, evaluate = part("train", augment), part("val", False)
    if fraction < 1:
        train = train.subset(stratified(train.labels, fraction))
    return Data(len(names), 3, size, tuple(names), train, evaluate, MEAN, STD)
