"""A folder of pictures as ImageNet has them, <root>/train/<class>/* and <root>/val/<class>/*.

Read from the disk as they are needed, by worker processes if so asked.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from at_fused.train.config import SIZES, Config, ConfigError, in_a_line
from at_fused.train.data.datasets import torchvision_datasets
from at_fused.train.data.samples import (
    Data,
    OnDemand,
    Pictures,
    digest_of,
    normalisation,
    seeded,
    standardiser,
    usable_workers,
)

if TYPE_CHECKING:
    from PIL.Image import Image

PARTS = ("train", "val")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
# Pillow's modes of 8 bits. Those of more do not say what white is.
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB")


def decode(path: str, draft: bool = False) -> Image:
    """Return the picture of a file in RGB, upright by its EXIF, what is transparent on white.

    A draft has fewer pixels, where that is faster; all bytes are read.

    Raises:
        Exception: Pillow's, and ValueError for pixels that are not in one of MODES.
    """
    from PIL import Image, ImageOps

    # A file, not a path, which Pillow would map into memory, and there mistake a TIFF's turned
    # sides. Its warnings are of metadata, or of sizes that it reads all the same.
    with warnings.catch_warnings(), open(path, "rb") as opened:
        warnings.simplefilter("ignore")
        picture: Image.Image = Image.open(opened)
        if draft:
            picture.draft(None, (1, 1))
        picture.load()
    if picture.mode not in MODES:
        raise ValueError(
            f"its pixels are {picture.mode}, allowed are {', '.join(MODES)}: convert it to 8 bits"
        )
    with suppress(Exception):  # of damaged metadata, where the picture is whole
        picture = ImageOps.exif_transpose(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


class PictureFiles(Dataset[Any]):
    """Pictures (size, size, 3) uint8 of files, as :class:`OnDemand` reads them.

    Cut by torchvision as for ImageNet; augmented ones are random parts, half of them mirrored.
    """

    def __init__(self, paths: Sequence[str], size: int) -> None:
        from torchvision import transforms as tv

        self.paths = paths
        self._cut = tv.Compose([tv.Resize(round(size * 256 / 224)), tv.CenterCrop(size)])
        self._augment = tv.Compose([tv.RandomResizedCrop(size), tv.RandomHorizontalFlip()])

    def __getitem__(self, key: tuple[int, int, int | None]) -> Tensor | str:
        index, number, seed = key
        try:
            picture = decode(self.paths[index])
        except Exception as error:
            return f"cannot read the picture {self.paths[index]}: {in_a_line(error)}"
        with seeded(seed, number):
            part = self._cut(picture) if seed is None else self._augment(picture)
        return torch.from_numpy(np.array(part))


def _listed(root: Path) -> tuple[list[str], dict[str, list[tuple[str, int]]]]:
    """Return the classes, and each part's pictures: their names from the root on, and labels."""
    datasets = torchvision_datasets("folder")
    try:
        folders = {part: datasets.ImageFolder(str(root / part)) for part in PARTS}
    except FileNotFoundError as error:
        raise FileNotFoundError(
            "data 'folder' needs train/<class>/<picture> and val/<class>/<picture> in the root "
            f"folder {root}: {error}"
        ) from error
    names, others = (folder.classes for folder in folders.values())
    if differ := sorted(set(names) ^ set(others)):
        more = ", ..." if len(differ) > 5 else ""
        raise ConfigError(
            f"data 'folder': train/ and val/ in {root} must have the same classes; "
            f"only one of them has {', '.join(differ[:5])}{more}"
        )
    start = f"{root}{os.sep}"
    return names, {
        part: [(path.removeprefix(start), label) for path, label in folder.samples]
        for part, folder in folders.items()
    }


def _inspected(paths: list[str]) -> list[tuple[str, bytes]]:
    """Return the reason why each file cannot be read, or "", and a digest of its content."""
    found = []
    for path in paths:
        try:
            decode(path, draft=True)
            found.append(("", hashlib.sha256(Path(path).read_bytes()).digest()))
        except Exception as error:
            found.append((in_a_line(error), b""))
    return found


def inspect(
    root: str | os.PathLike[str],
    workers: int = 0,
    *,
    parts: Sequence[str] = PARTS,
    known: Mapping[str, Any] | None = None,
) -> Pictures:
    """Read every picture of these parts once, to find those that cannot be read.

    ``known``, what an earlier inspection came to as a dict, is returned if no file has changed.
    """
    import PIL

    folder = Path(root).expanduser().absolute()
    listed = _listed(folder)[1]
    names = [name for part in parts for name, _ in listed[part]]
    digest = hashlib.sha256(PIL.__version__.encode())
    for name in names:
        stat = os.stat(folder / name)
        digest.update(os.fsencode(f"{name} {stat.st_size} {stat.st_mtime_ns}\n"))
    key = digest.hexdigest()
    if known and known.get("digest") == key and known.keys() == Pictures.__annotations__.keys():
        return Pictures(**known)
    loader: DataLoader[Any] = DataLoader(
        [str(folder / name) for name in names],  # type: ignore[arg-type]
        batch_size=32,
        collate_fn=_inspected,
        num_workers=usable_workers(workers),
        generator=torch.Generator(),
    )
    reasons: list[str] = []
    content = hashlib.sha256()
    from tqdm import tqdm  # here, as data of other kinds do without it

    batches = tqdm(loader, "reading all pictures", unit="batch", leave=False, disable=None)
    for found in batches:
        for reason, own in found:
            reasons.append(reason)
            content.update(own)
    bad = {name: reason for name, reason in zip(names, reasons, strict=True) if reason}
    return Pictures(key, bad, content.hexdigest())


def check_unreadable(pictures: Pictures, root: str | os.PathLike[str], allowed: int) -> None:
    """Raise ConfigError if more pictures than allowed cannot be read; it names three."""
    bad, folder = pictures.unreadable, Path(root).expanduser().absolute()
    if len(bad) > allowed:
        named = [f"{folder / name} ({reason})" for name, reason in [*bad.items()][:3]]
        raise ConfigError(
            f"data 'folder': {len(bad)} picture{'s' * (len(bad) > 1)} cannot be read, allowed is "
            f"{allowed}: {', '.join(named)}{', ...' * (len(bad) > 3)}; --skip-unreadable N leaves "
            "up to N of them out"
        )


def open_folder(config: Config, device: torch.device | str, pictures: Pictures | None) -> Data:
    """Open both parts: those to train with from train/, those to report on from val/.

    Raises:
        ConfigError: train/ and val/ differ in their classes, or of one no picture can be read.
        FileNotFoundError: a folder is missing, or a class has no pictures.
        ImportError: torchvision cannot be imported.
    """
    root, size = Path(config.root).expanduser().absolute(), config.image_size or SIZES["folder"]
    mean, std = normalisation(config, (MEAN, STD))
    names, listed = _listed(root)
    left_out = pictures.unreadable if pictures else {}
    finish = standardiser(mean, std, device, config.speed != "exact")
    samples: list[OnDemand] = []
    for part, augment in zip(PARTS, (True, False), strict=True):
        kept = [(name, label) for name, label in listed[part] if name not in left_out]
        labels = torch.tensor([label for _, label in kept])
        if lost := sorted(set(range(len(names))) - set(labels.tolist())):
            raise ConfigError(
                f"data 'folder': no picture of {', '.join(names[label] for label in lost[:5])} in "
                f"{root / part} can be read"
            )
        files = PictureFiles([str(root / name) for name, _ in kept], size)
        samples.append(OnDemand(files, labels, finish, augment, device, config.workers))
    train, evaluate = samples
    facts: dict[str, Any] = {"left_out": left_out} if left_out else {}
    digest = digest_of(names, train, evaluate, (pictures.content if pictures else "").encode())
    return Data(
        tuple(names), size, train, evaluate, mean, std,
        facts=facts, digest=digest, pictures=pictures,
    )  # fmt: skip
