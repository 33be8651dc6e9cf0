"""A folder of pictures as ImageNet has them, <root>/train/<class>/* and <root>/val/<class>/*.

Read from the disk as they are needed, by worker processes if so asked.
"""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from at_fused.train.data.cifar import needs_torchvision
from at_fused.train.data.samples import OnDemand, Opened, Standardise, seed_of, usable
from at_fused.train.rules import ConfigError

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


# ---- a picture


def _white_is_65535(file: Image) -> bool:
    """Tell whether grey pixels of more than 8 bits are of 16, from black to white, by the file."""
    tags = getattr(file, "tag_v2", None)
    if tags is None:
        return file.format in ("PNG", "PPM")
    bits, photometric, sample_format = (tags.get(tag) for tag in (258, 262, 339))
    return (bits, photometric, sample_format or (1,)) == ((16,), 1, (1,))


def decode(path: str, draft: bool = False) -> tuple[Image, list[str]]:
    """The picture of a file, in RGB, and what was converted.

    16-bit grayscale is scaled to 8 bits, what is transparent is laid on white, the EXIF
    orientation is applied; of several frames it is the first. A draft has fewer pixels, where that
    is faster; all bytes are read.

    Raises:
        Exception: Pillow's, and ValueError for pixels whose colours are not known; see
            :func:`reason_of`.
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
        frames = getattr(file, "n_frames", 1)
        done += ["first of several frames"] * (frames > 1)
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
        mode, seen_through = picture.mode, picture.info.get("transparency")
        if mode == "I" or mode.startswith("I;16"):
            if not full_range:
                raise ValueError("grayscale of more than 8 bits that does not say what white is")
            grey = np.asarray(picture).astype(np.int64)
            if seen_through is not None:
                grey[grey == seen_through] = 65535
            picture = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
            done.append("16-bit grayscale")
        elif picture.has_transparency_data:
            if seen_through is not None and mode in ("L", "RGB") and raw != mode:
                raise ValueError(f"a transparent colour among pixels of {raw}, which Pillow misses")
            picture = picture.convert("RGBA")
            if np.asarray(picture)[..., 3].min() < 255:
                white = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(white, picture)
                done.append("transparency")
        elif mode in ("CMYK", "YCbCr", "LAB"):
            done.append(f"{mode} colours")
        elif mode not in ("1", "L", "P", "RGB", "RGBX"):
            raise ValueError(f"pixels of the mode {mode!r}, whose colours are not known")
        return picture.convert("RGB"), done


def reason_of(error: Exception) -> str:
    """The reason why :func:`decode` failed, in a line."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "not a picture, or damaged at its start"  # its own words are of our file object
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    return text or type(error).__name__


class _Pictures(Dataset[Tensor | str]):
    """Pictures (size, size, 3) uint8; see :class:`at_fused.train.data.samples.Reader`."""

    def __init__(self, paths: Sequence[str], size: int) -> None:
        self.paths, self.size = paths, size

    def __getitem__(self, key: tuple[int, int | None]) -> Tensor | str:
        index, seed = key
        try:
            picture, _ = decode(self.paths[index])
        except Exception as error:
            return f"cannot read the picture {self.paths[index]}: {reason_of(error)}"
        picture = self._middle(picture) if seed is None else self._random(picture, index, seed)
        return torch.from_numpy(np.array(picture))

    def subset(self, index: Tensor) -> _Pictures:
        return _Pictures([self.paths[i] for i in index.tolist()], self.size)

    def _random(self, picture: Image, index: int, seed: int) -> Image:
        from PIL.Image import Resampling, Transpose

        draw = torch.Generator().manual_seed(seed_of(seed, index))
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


class InFolder(OnDemand):
    """Pictures on the disk. Augmented ones are random parts, mirrored by half.

    Args:
        paths: N files.
        labels: (N,) int64.
        size: H and W of what batches have.
        augment: False: no augmentation, whatever the seed.
        device, channels_last: of the batches.
        workers: processes that read the files; 0: this one does.
        mean, std: of each channel, for pixels in [0, 1].
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
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ) -> None:
        finish = Standardise(mean, std, device, channels_last)
        super().__init__(_Pictures(paths, size), labels, finish, augment, device, workers)


# ---- the folder


def _class_names(root: Path, part: str) -> list[str]:
    folder = root / part
    entries = folder.iterdir() if folder.is_dir() else ()
    names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    if not names:
        layout = "train/<class>/<picture> and val/<class>/<picture> in the root folder"
        found = "no class folders" if folder.is_dir() else "no folder"
        raise FileNotFoundError(f"data 'folder' needs {layout}; found {found} {folder}")
    return names


def _listed(
    root: Path, parts: Sequence[str] = PARTS
) -> tuple[list[str], list[list[tuple[str, int]]], dict[str, int]]:
    """The classes; of each part the pictures' names from the root on, and labels; what is not read.

    The last are counts of files by suffix, without those that torchvision takes for pictures.
    Hidden files and folders are left out, such as .ipynb_checkpoints.
    """
    names, others = (_class_names(root, part) for part in PARTS)
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
    of = torchvision.datasets.folder
    numbers = {name: number for number, name in enumerate(names)}
    start = len(str(root / "x")) - 1

    not_read: Counter[str] = Counter()

    def shown(path: str) -> bool:
        if f"{os.sep}." in path[start - 1 :]:
            return False
        if not (picture := path.lower().endswith(of.IMG_EXTENSIONS)):
            not_read[Path(path).suffix.lower() or "no suffix"] += 1
        return picture

    def part(name: str) -> list[tuple[str, int]]:
        found = of.make_dataset(root / name, numbers, is_valid_file=shown, allow_empty=True)
        return [(path[start:], label) for path, label in found]

    return names, [part(name) for name in parts], dict(sorted(not_read.items()))


def _stat(path: Path) -> os.stat_result:
    return path.stat() if path.exists() else path.lstat()  # of a link that leads nowhere


@dataclass(frozen=True)
class Pictures:
    """Results of reading every picture of a folder; ``dataclasses.asdict`` makes JSON of them.

    digest: of names, sizes and times of the files, and of Pillow's version: while it is the same,
        the files need not be read again.
    converted: how many pictures were converted, by what was done.
    unreadable: the reason of each that cannot be read, by its name from the root on.
    content: sha256 of the bytes of those that can be, in their order.
    """

    digest: str
    converted: dict[str, int]
    unreadable: dict[str, str]
    content: str = ""


class _Inspected(Dataset[tuple[list[str], str, bytes]]):
    """Conversions of each file's picture; or why it cannot be read; and a digest of its bytes."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[list[str], str, bytes]:
        path = self.paths[index]
        try:
            done = decode(path, draft=True)[1]
            return done, "", hashlib.sha256(Path(path).read_bytes()).digest()
        except Exception as error:
            return [], reason_of(error), b""


def inspect(
    root: str | os.PathLike[str],
    workers: int = 0,
    *,
    parts: Sequence[str] = PARTS,
    known: Mapping[str, Any] | None = None,
    tick: Callable[[int], object] = lambda count: None,
) -> Pictures:
    """Read every picture of train/ and val/ once, to find those that cannot be read.

    Args:
        root: the folder.
        workers: processes that read, at most one for each CPU; 0: this one does.
        parts: ("val",) reads no others.
        known: what an earlier inspection came to, as a dict: returned, if no file has changed.
        tick: told of every few pictures that are read, how many.

    Raises:
        FileNotFoundError, ImportError, ValueError: as :func:`at_fused.train.data.open_data`.
    """
    import PIL

    folder = Path(root).expanduser().absolute()
    names = [name for part in _listed(folder, parts)[1] for name, _ in part]
    digest = hashlib.sha256(PIL.__version__.encode())
    for name in names:
        stat = _stat(folder / name)
        digest.update(os.fsencode(f"{name} {stat.st_size} {stat.st_mtime_ns}\n"))
    key = digest.hexdigest()
    same = known is not None and known.get("digest") == key
    if known is not None and same and known.keys() == {each.name for each in fields(Pictures)}:
        return Pictures(**known)
    loader: DataLoader[Any] = DataLoader(
        _Inspected([str(folder / name) for name in names]),
        batch_size=32,
        collate_fn=list,
        num_workers=usable(workers),
        generator=torch.Generator(),
    )
    converted: Counter[str] = Counter()
    reasons: list[str] = []
    content = hashlib.sha256()
    for found in loader:
        for done, reason, own in found:
            converted.update(done)
            reasons.append(reason)
            content.update(own)
        tick(len(found))
    bad = {name: reason for name, reason in zip(names, reasons, strict=True) if reason}
    return Pictures(key, dict(sorted(converted.items())), bad, content.hexdigest())


def check_unreadable(pictures: Pictures, root: str | os.PathLike[str], allowed: int) -> None:
    """Raise ConfigError if more pictures than allowed cannot be read; it names three."""
    bad = pictures.unreadable
    if len(bad) > allowed:
        folder = Path(root).expanduser().absolute()
        named = [f"{folder / name} ({reason})" for name, reason in bad.items()]
        more = ", ..." if len(named) > 3 else ""
        raise ConfigError(
            f"data 'folder': {len(bad)} picture{'s' * (len(bad) > 1)} cannot be read, allowed is "
            f"{allowed}: "
            f"{', '.join(named[:3])}{more}; --skip-unreadable N leaves up to N of them out"
        )


def open_folder(
    root: Path,
    size: int,
    device: torch.device | str,
    channels_last: bool,
    workers: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    pictures: Pictures | None,
) -> Opened:
    """Both parts: those to train with from train/, those to report on from val/.

    Raises:
        FileNotFoundError: a folder is missing, or a class has no pictures.
        ImportError: torchvision cannot be imported.
        ValueError: train/ and val/ differ in their classes.
    """
    names, parts, not_read = _listed(root)
    found: dict[str, Any] = {"not_read": not_read}
    if pictures is not None:
        found |= {"converted": pictures.converted, "left_out": pictures.unreadable}
        parts = [[each for each in part if each[0] not in pictures.unreadable] for part in parts]
    for name, part in zip(PARTS, parts, strict=True):
        if empty := sorted(set(range(len(names))) - {label for _, label in part}):
            shown = ", ".join(names[label] for label in empty[:5])
            others = ", ".join(f"{count} {suffix}" for suffix, count in not_read.items())
            raise FileNotFoundError(
                f"data 'folder': no pictures that can be read in {root / name} of {shown}"
                + f"; files that are not read: {others}" * bool(others)
            )

    def samples(part: list[tuple[str, int]], augment: bool) -> InFolder:
        paths = [str(root / path) for path, _ in part]
        labels = torch.tensor([label for _, label in part], dtype=torch.int64)
        return InFolder(paths, labels, size, augment, device, channels_last, workers, mean, std)

    train, evaluate = parts
    return Opened(
        tuple(names),
        size,
        torch.tensor([label for _, label in train], dtype=torch.int64),
        lambda rows, augment: samples([train[i] for i in rows.tolist()], augment),
        samples(evaluate, False),
        mean,
        std,
        {key: value for key, value in found.items() if value},
        [
            (pictures.content if pictures else "").encode(),
            # Sizes are what machines may compare of their files: one of them reads the content.
            *(
                os.fsencode(f"{name} {_stat(root / name).st_size}\n")
                for part in parts
                for name, _ in part
            ),
        ],
    )
