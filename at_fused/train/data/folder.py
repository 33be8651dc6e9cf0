"""Image folders with ImageNet's layout: <root>/train/<class>/* and <root>/val/<class>/*.

Images are read on demand, in worker processes if there are any.
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

from at_fused.train.config import DEFAULT_SIZES, Config, ConfigError, error_summary
from at_fused.train.data.datasets import torchvision_datasets
from at_fused.train.data.samples import (
    Data,
    ImageScan,
    OnDemand,
    data_digest,
    limit_workers,
    mean_and_std,
    normaliser,
    seed_generators,
)

if TYPE_CHECKING:
    from PIL.Image import Image

SPLITS = ("train", "val")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
# Pillow's 8-bit modes. Deeper modes do not define white.
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB")


def decode(path: str, draft: bool = False) -> Image:
    """Return the image in a file as RGB, upright according to EXIF, on white if transparent.

    With ``draft`` all bytes are read, but fewer pixels are decoded if that is faster.

    Raises:
        Exception: any error of Pillow; ValueError for pixels in none of MODES.
    """
    from PIL import Image, ImageOps

    # Opened here: Pillow would memory-map a path, and then mistake the sides of a rotated TIFF.
    # Its warnings concern metadata, or sizes that it reads anyway.
    with warnings.catch_warnings(), open(path, "rb") as file:
        warnings.simplefilter("ignore")
        image: Image.Image = Image.open(file)
        if draft:
            image.draft(None, (1, 1))
        image.load()
    if image.mode not in MODES:
        raise ValueError(
            f"got {image.mode} pixels, expected one of {', '.join(MODES)}: convert it to 8 bits"
        )
    with suppress(Exception):  # damaged metadata of an intact image
        image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


class ImageFiles(Dataset[Any]):
    """Images (size, size, 3) uint8 in files, for :class:`OnDemand`.

    Resized and cropped as for ImageNet; to augment, RandomResizedCrop and random flips.
    """

    def __init__(self, paths: Sequence[str], size: int) -> None:
        from torchvision import transforms as tv

        self.paths = paths
        self._crop = tv.Compose([tv.Resize(round(size * 256 / 224)), tv.CenterCrop(size)])
        self._augment = tv.Compose([tv.RandomResizedCrop(size), tv.RandomHorizontalFlip()])

    def __getitem__(self, key: tuple[int, int, int | None]) -> Tensor | str:
        index, number, seed = key
        try:
            image = decode(self.paths[index])
        except Exception as error:
            return f"cannot read image {self.paths[index]}: {error_summary(error)}"
        with seed_generators(seed, number):
            image = self._crop(image) if seed is None else self._augment(image)
        return torch.from_numpy(np.array(image))


def _list_images(root: Path) -> tuple[list[str], dict[str, list[tuple[str, int]]]]:
    """Return the class names, and for each split the images' paths relative to root and labels."""
    datasets = torchvision_datasets("folder")
    try:
        folders = {split: datasets.ImageFolder(str(root / split)) for split in SPLITS}
    except FileNotFoundError as error:
        raise FileNotFoundError(
            "data 'folder' requires train/<class>/<image> and val/<class>/<image> in the root "
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
        split: [(path.removeprefix(start), label) for path, label in folder.samples]
        for split, folder in folders.items()
    }


def _check_images(paths: list[str]) -> list[tuple[str, bytes]]:
    """Return for each file the error that reading it raises, or "", and a digest of its content."""
    results = []
    for path in paths:
        try:
            decode(path, draft=True)
            results.append(("", hashlib.sha256(Path(path).read_bytes()).digest()))
        except Exception as error:
            results.append((error_summary(error), b""))
    return results


def scan_images(
    root: str | os.PathLike[str],
    workers: int = 0,
    *,
    splits: Sequence[str] = SPLITS,
    known: Mapping[str, Any] | None = None,
) -> ImageScan:
    """Read every image of the splits once, to find unreadable ones.

    ``known``, an earlier result as a dict, is returned unless files have changed.
    """
    import PIL

    folder = Path(root).expanduser().absolute()
    by_split = _list_images(folder)[1]
    names = [name for split in splits for name, _ in by_split[split]]
    digest = hashlib.sha256(PIL.__version__.encode())
    for name in names:
        stat = os.stat(folder / name)
        digest.update(os.fsencode(f"{name} {stat.st_size} {stat.st_mtime_ns}\n"))
    key = digest.hexdigest()
    if known and known.get("digest") == key and known.keys() == ImageScan.__annotations__.keys():
        return ImageScan(**known)
    loader: DataLoader[Any] = DataLoader(
        [str(folder / name) for name in names],  # type: ignore[arg-type]
        batch_size=32,
        collate_fn=_check_images,
        num_workers=limit_workers(workers),
        generator=torch.Generator(),
    )
    reasons: list[str] = []
    content = hashlib.sha256()
    from tqdm import tqdm  # other data sets do without it

    batches = tqdm(loader, "reading all images", unit="batch", leave=False, disable=None)
    for results in batches:
        for reason, image_digest in results:
            reasons.append(reason)
            content.update(image_digest)
    bad = {name: reason for name, reason in zip(names, reasons, strict=True) if reason}
    return ImageScan(key, bad, content.hexdigest())


def check_unreadable(scan: ImageScan, root: str | os.PathLike[str], allowed: int) -> None:
    """Raise ConfigError if more images than allowed are unreadable; name three of them."""
    bad, folder = scan.unreadable, Path(root).expanduser().absolute()
    if len(bad) > allowed:
        named = [f"{folder / name} ({reason})" for name, reason in [*bad.items()][:3]]
        raise ConfigError(
            f"data 'folder': got {len(bad)} unreadable image{'s' * (len(bad) > 1)}, expected at "
            f"most {allowed}: {', '.join(named)}{', ...' * (len(bad) > 3)}; --skip-unreadable N "
            "skips up to N"
        )


def open_folder(config: Config, device: torch.device | str, scan: ImageScan | None) -> Data:
    """Open a folder: the training images in train/, the images to report on in val/.

    Raises:
        ConfigError: train/ and val/ have different classes, or a class has no readable image.
        FileNotFoundError: a folder is missing, or a class has no images.
        ImportError: torchvision cannot be imported.
    """
    root = Path(config.root).expanduser().absolute()
    size = config.image_size or DEFAULT_SIZES["folder"]
    mean, std = mean_and_std(config, (MEAN, STD))
    names, by_split = _list_images(root)
    unreadable = scan.unreadable if scan else {}
    finish = normaliser(mean, std, device, config.speed != "exact")
    samples: list[OnDemand] = []
    for split, augment in zip(SPLITS, (True, False), strict=True):
        images = [(name, label) for name, label in by_split[split] if name not in unreadable]
        labels = torch.tensor([label for _, label in images])
        if missing := sorted(set(range(len(names))) - set(labels.tolist())):
            raise ConfigError(
                f"data 'folder': no readable image of "
                f"{', '.join(names[label] for label in missing[:5])} in {root / split}"
            )
        files = ImageFiles([str(root / name) for name, _ in images], size)
        samples.append(OnDemand(files, labels, finish, augment, device, config.workers))
    train, evaluate = samples
    facts: dict[str, Any] = {"left_out": unreadable} if unreadable else {}
    digest = data_digest(names, train, evaluate, (scan.content if scan else "").encode())
    return Data(
        tuple(names), size, train, evaluate, mean, std, facts=facts, digest=digest, scan=scan
    )
