"""A folder of pictures as ImageNet has them, <root>/train/<class>/* and <root>/val/<class>/*.

Read from the disk as they are needed, by worker processes if so asked.
"""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from at_fused.train.config import SIZES, Config, ConfigError
from at_fused.train.data.datasets import needs_torchvision
from at_fused.train.data.samples import (
    Data,
    OnDemand,
    Pictures,
    digest_of,
    normalisation,
    sample_seed,
    standardiser,
    usable_workers,
)

if TYPE_CHECKING:
    from PIL.Image import Image

PARTS = ("train", "val")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
TRIES = 10
TURNED = range(2, 9)  # EXIF's orientations but the upright one


def crop_box(
    width: int, height: int, draw: torch.Generator
) -> tuple[tuple[int, int, int, int], bool]:
    """Draw a part (left, top, right, bottom) of a picture, and tell if it is to be mirrored.

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


# ---- a picture


def _white_is_65535(file: Image) -> bool:
    """Tell whether grey pixels of more than 8 bits are of 16, from black to white, by the file."""
    tags = getattr(file, "tag_v2", None)
    if tags is None:
        return file.format in ("PNG", "PPM")
    bits, photometric, sample_format = (tags.get(tag) for tag in (258, 262, 339))
    return (bits, photometric, sample_format or (1,)) == ((16,), 1, (1,))


def decode(path: str, draft: bool = False) -> tuple[Image, list[str]]:
    """Return the picture of a file, in RGB, and what was converted.

    16-bit grayscale is scaled to 8 bits, what is transparent is laid on white, the EXIF
    orientation is applied; of several frames it is the first. A draft has fewer pixels, where that
    is faster; all bytes are read.

    Raises:
        Exception: Pillow's, and ValueError for pixels whose colours are not known.
    """
    from PIL import Image, ImageOps

    done = []
    # A file, not a path, which Pillow would map into memory, and there mistake a TIFF's turned
    # sides. Its warnings are of metadata, or of sizes that it reads all the same.
    with warnings.catch_warnings(), open(path, "rb") as opened:
        warnings.simplefilter("ignore")
        file = Image.open(opened)
        if draft:
            file.draft(None, (1, 1))
        done += ["first of several frames"] * (getattr(file, "n_frames", 1) > 1)
        raw = file.tile[0][3] if file.tile else ""
        full_range = _white_is_65535(file)
        # Pillow turns a TIFF when it loads it, and forgets that it was not upright.
        turned = getattr(file, "tag_v2", {}).get(0x0112) in TURNED
        file.load()
        try:
            turned = turned or file.getexif().get(0x0112) in TURNED
        except Exception:  # damaged metadata of a picture that is whole
            done.append("unreadable EXIF data")
        picture = ImageOps.exif_transpose(file) if turned else file
        done += ["EXIF orientation"] * turned
        mode, transparent = picture.mode, picture.info.get("transparency")
        if mode == "I" or mode.startswith("I;16"):
            if not full_range:
                raise ValueError("grayscale of more than 8 bits that does not say what white is")
            grey = np.asarray(picture).astype(np.int64)
            if transparent is not None:
                grey[grey == transparent] = 65535
            picture = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
            done.append("16-bit grayscale")
        elif picture.has_transparency_data:
            if transparent is not None and mode in ("L", "RGB") and raw != mode:
                raise ValueError(f"a transparent colour among pixels of {raw}, which Pillow misses")
            picture = picture.convert("RGBA")
            if np.asarray(picture)[..., 3].min() < 255:
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
                done.append("transparency")
        elif mode in ("CMYK", "YCbCr", "LAB"):
            done.append(f"{mode} colours")
        elif mode not in ("1", "L", "P", "RGB", "RGBX"):
            raise ValueError(f"pixels of the mode {mode!r}, whose colours are not known")
        return picture.convert("RGB"), done


def reason_of(error: Exception) -> str:
    """Return the reason why :func:`decode` failed, in a line."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "not a picture, or damaged at its start"  # its own words are of our file object
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    return text or type(error).__name__


class PictureFiles(Dataset[Any]):
    """Pictures (size, size, 3) uint8 of files, as :class:`OnDemand` reads them.

    Augmented ones are random parts, half of them mirrored.
    """

    def __init__(self, paths: Sequence[str], size: int) -> None:
        self.paths, self.size = paths, size

    def __getitem__(self, key: tuple[int, int, int | None]) -> Tensor | str:
        from torchvision.transforms import functional as tv

        index, number, seed = key
        try:
            picture: Any = decode(self.paths[index])[0]
        except Exception as error:
            return f"cannot read the picture {self.paths[index]}: {reason_of(error)}"
        size = [self.size, self.size]
        if seed is None:
            picture = tv.resize(picture, [round(self.size * 256 / 224)])
            picture = tv.center_crop(picture, size)
        else:
            draw = torch.Generator().manual_seed(sample_seed(seed, number))
            width, height = picture.size
            (left, top, right, bottom), flip = crop_box(width, height, draw)
            picture = tv.resized_crop(picture, top, left, bottom - top, right - left, size)
            picture = tv.hflip(picture) if flip else picture
        return torch.from_numpy(np.array(picture))


# ---- the folder


def _class_names(folder: Path) -> list[str]:
    entries = folder.iterdir() if folder.is_dir() else ()
    names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    if not names:
        found = "no class folders" if folder.is_dir() else "no folder"
        raise FileNotFoundError(
            "data 'folder' needs train/<class>/<picture> and val/<class>/<picture> in the root "
            f"folder; found {found} {folder}"
        )
    return names


def _listed(
    root: Path, parts: Sequence[str] = PARTS
) -> tuple[list[str], list[list[tuple[str, int]]], dict[str, int]]:
    """Return the classes; each part's pictures, from the root on, with labels; what is not read.

    The last are counts of files by suffix, without those that torchvision takes for pictures.
    Hidden files and folders are left out, such as .ipynb_checkpoints.
    """
    names, others = (_class_names(root / part) for part in PARTS)
    if names != others:
        differ = sorted(set(names) ^ set(others))
        more = ", ..." if len(differ) > 5 else ""
        raise ConfigError(
            f"data 'folder': train/ and val/ in {root} must have the same classes; "
            f"only one of them has {', '.join(differ[:5])}{more}"
        )
    try:
        from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
    except (ImportError, RuntimeError, OSError) as error:
        raise needs_torchvision("folder", error) from error
    numbers = {name: number for number, name in enumerate(names)}
    start = len(str(root / "x")) - 1
    not_read: Counter[str] = Counter()

    def is_picture(path: str) -> bool:
        if f"{os.sep}." in path[start - 1 :]:
            return False
        if not (picture := path.lower().endswith(IMG_EXTENSIONS)):
            not_read[Path(path).suffix.lower() or "no suffix"] += 1
        return picture

    found = [
        make_dataset(str(root / part), numbers, is_valid_file=is_picture, allow_empty=True)
        for part in parts
    ]
    listed = [[(path[start:], label) for path, label in part] for part in found]
    return names, listed, dict(sorted(not_read.items()))


def _stat(path: Path) -> os.stat_result:
    return path.stat() if path.exists() else path.lstat()  # of a link that leads nowhere


def _inspected(paths: list[str]) -> list[tuple[list[str], str, bytes]]:
    """Return each file's conversions, the reason why it cannot be read or "", and a digest."""
    found: list[tuple[list[str], str, bytes]] = []
    for path in paths:
        try:
            done = decode(path, draft=True)[1]
            found.append((done, "", hashlib.sha256(Path(path).read_bytes()).digest()))
        except Exception as error:
            found.append(([], reason_of(error), b""))
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
    names = [name for part in _listed(folder, parts)[1] for name, _ in part]
    digest = hashlib.sha256(PIL.__version__.encode())
    for name in names:
        stat = _stat(folder / name)
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
    converted: Counter[str] = Counter()
    reasons: list[str] = []
    content = hashlib.sha256()
    batches = tqdm(loader, "reading all pictures", unit="batch", leave=False, disable=None)
    for found in batches:
        for done, reason, own in found:
            converted.update(done)
            reasons.append(reason)
            content.update(own)
    bad = {name: reason for name, reason in zip(names, reasons, strict=True) if reason}
    return Pictures(key, dict(sorted(converted.items())), bad, content.hexdigest())


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
        ConfigError: train/ and val/ differ in their classes.
        FileNotFoundError: a folder is missing, or a class has no pictures.
        ImportError: torchvision cannot be imported.
    """
    root, size = Path(config.root).expanduser().absolute(), config.image_size or SIZES["folder"]
    mean, std = normalisation(config, (MEAN, STD))
    names, parts, not_read = _listed(root)
    facts: dict[str, Any] = {"not_read": not_read}
    if pictures is not None:
        facts |= {"converted": pictures.converted, "left_out": pictures.unreadable}
        parts = [[each for each in part if each[0] not in pictures.unreadable] for part in parts]
    for name, part in zip(PARTS, parts, strict=True):
        if empty := sorted(set(range(len(names))) - {label for _, label in part}):
            shown = ", ".join(names[label] for label in empty[:5])
            others = ", ".join(f"{count} {suffix}" for suffix, count in not_read.items())
            raise FileNotFoundError(
                f"data 'folder': no pictures that can be read in {root / name} of {shown}"
                + f"; files that are not read: {others}" * bool(others)
            )

    finish = standardiser(mean, std, device, config.speed != "exact")
    train, evaluate = (
        OnDemand(
            PictureFiles([str(root / path) for path, _ in part], size),
            torch.tensor([label for _, label in part]),
            finish,
            augment,
            device,
            config.workers,
        )
        for part, augment in zip(parts, (True, False), strict=True)
    )
    # Sizes are what machines may compare of their files: one of them reads the content.
    sizes = [
        os.fsencode(f"{path} {_stat(root / path).st_size}\n") for part in parts for path, _ in part
    ]
    content = (pictures.content if pictures else "").encode()
    digest = digest_of(names, train, evaluate, content, *sizes)
    facts = {key: value for key, value in facts.items() if value}
    return Data(
        tuple(names), size, train, evaluate, mean, std, facts=facts, digest=digest,
        pictures=pictures,
    )  # fmt: skip
