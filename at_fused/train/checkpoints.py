"""Files that are there whole or not at all: checkpoints of a training run, and trained networks."""

from __future__ import annotations

import hashlib
import io
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

try:
    import fcntl
except ImportError:  # Windows, where nothing guards a folder
    fcntl = None  # type: ignore[assignment]

_FORMAT = 2
_NAME = re.compile(r"step-(\d+)\.pt")
SHA256 = 32  # bytes, at the end of a file


class CheckpointError(RuntimeError):
    """A file that cannot be gone on from, or that could not be written."""


class DamagedError(CheckpointError):
    """A file that cannot be read."""


def write(path: Path, content: bytes) -> None:
    """Writes a file by way of another that takes its name once it is on the disk.

    Raises:
        CheckpointError: the disk is full, or the folder may not be written; what was there stays.
    """
    other = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(other, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(other, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the name itself
        finally:
            os.close(folder)
    except OSError as error:
        other.unlink(missing_ok=True)
        raise CheckpointError(
            f"cannot write {path}: {error.strerror}; what was saved before is untouched"
        ) from error


def save(path: Path, what: str, state: Mapping[str, Any]) -> None:
    """Writes a state, tensors in plain containers, that ``load`` reads back."""
    found = io.BytesIO()
    torch.save({"format": _FORMAT, "what": what, **state}, found)
    write(path, _sealed(found.getvalue()))


def _sealed(archive: bytes) -> bytes:
    # The digest is the zip archive's comment, which torch.load passes over.
    digest = hashlib.sha256(archive).digest()
    return archive[:-2] + SHA256.to_bytes(2, "little") + digest


def verify(path: Path) -> bytes:
    """Return the content of a file that ``save`` wrote, its sha256 found right.

    Torch looks at no checksum, and the CRC-32s of a zip archive leave out its directory, one bit of
    which makes torch.load return other weights.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or is of another program.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DamagedError(f"{path}: {error.strerror}") from error
    if _sealed(content[: -2 - SHA256] + bytes(2)) != content:
        raise DamagedError(
            f"{path}: truncated, damaged, or no file of at-fused-train (its sha256 is not right)"
        )
    return content


def load(path: Path, what: str) -> dict[str, Any]:
    """The state of a file that ``save`` wrote for the same ``what``.

    Raises:
        CheckpointError: it is truncated, damaged, of another program, or something else.
    """
    content = io.BytesIO(verify(path))
    try:
        state = torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # its text would be torch's advice to trust the file
        raise DamagedError(
            f"{path}: holds other than tensors and plain values ({type(error).__name__})"
        ) from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT or "what" not in state:
        raise DamagedError(f"{path}: no file of this version of at-fused-train")
    if state["what"] != what:
        raise CheckpointError(f"{path}: is {state['what']}, wanted is {what}")
    return state


def _all(folder: Path) -> list[tuple[int, Path]]:
    found = [(_NAME.fullmatch(path.name), path) for path in folder.glob("step-*.pt")]
    return sorted((int(name[1]), path) for name, path in found if name)


def save_step(folder: Path, step: int, what: str, state: Mapping[str, Any], keep: int) -> None:
    """Writes the checkpoint of a step; of those in the folder the last ``keep`` stay."""
    folder.mkdir(parents=True, exist_ok=True)
    save(folder / f"step-{step:08d}.pt", what, state)
    for _, path in _all(folder)[:-keep]:
        path.unlink(missing_ok=True)


def last(folder: Path) -> Path | None:
    """The last checkpoint of a folder."""
    found = _all(folder)
    return found[-1][1] if found else None


def newest(
    folder: Path, what: str, log: Callable[[str], object]
) -> tuple[Path, dict[str, Any]] | None:
    """The last checkpoint of a folder that can be read, and its state; logs those that cannot.

    Raises:
        CheckpointError: none of them can be, or the last is another's.
    """
    damaged = []
    for _, path in reversed(_all(folder)):
        try:
            state = load(path, what)
        except DamagedError as error:
            damaged.append(f"{error}")
            continue
        for line in damaged:
            log(f"{line}; going on from {path.name}")
        return path, state
    if damaged:
        raise CheckpointError(
            f"{damaged[0]}, nor is there another that can be read; delete {folder} to train from "
            "the start"
        )
    return None


def tidy(folder: Path) -> None:
    """Leaves only the last checkpoint, from which more epochs may go on."""
    for _, path in _all(folder)[:-1]:
        path.unlink(missing_ok=True)
    for path in folder.glob("*.tmp-*"):  # of a process that was killed
        path.unlink(missing_ok=True)


@contextmanager
def claimed(folder: Path | None, fresh: bool) -> Iterator[Path]:
    """Makes a run's folder, or a new runs/DATE-TIME, and holds it against other programs.

    Raises:
        CheckpointError: another holds it, or it has files and was to be new.
    """
    if folder is None:
        folder = _dated()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as held:
        if fcntl is not None:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(
                    f"{folder}: another at-fused-train is at work there; wait for its end, or "
                    "choose another folder (--out)"
                ) from None
        if fresh and [path for path in folder.iterdir() if path.name != ".lock"]:
            raise CheckpointError(
                f"{folder}: already holds files; choose a new or an empty folder (--out), or "
                "--resume to go on there"
            )
        yield folder


def _dated() -> Path:
    name = time.strftime("%Y%m%d-%H%M%S")
    number = 1
    while True:
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return folder
