"""Files of a run: its folder, networks and checkpoints, which are whole or absent, and metrics."""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from at_fused.train.loop import Job, Point

try:
    import fcntl
except ImportError:  # Windows, where nothing guards a folder
    fcntl = None  # type: ignore[assignment]

_FORMAT = 2
SHA256 = 32  # bytes, at the end of a file


class CheckpointError(RuntimeError):
    """A file that cannot be gone on from, or that could not be written."""


class DamagedError(CheckpointError):
    """A file that cannot be read."""


def write(path: Path, content: bytes) -> None:
    """Write a file by way of another that takes its name once it is on the disk."""
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
    """Write a state, tensors in plain containers, that ``load`` reads back."""
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
    """Return the state of a file that ``save`` wrote for the same ``what``."""
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


def saved_steps(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, the last step's at the end."""
    return sorted(folder.glob("step-*.pt"), key=lambda path: (len(path.name), path.name))


def save_step(folder: Path, step: int, what: str, state: Mapping[str, Any], keep: int) -> None:
    """Write the checkpoint of a step; of those in the folder the last ``keep`` stay."""
    folder.mkdir(parents=True, exist_ok=True)
    save(folder / f"step-{step:08d}.pt", what, state)
    for path in saved_steps(folder)[:-keep]:
        path.unlink(missing_ok=True)


def newest(
    folder: Path, what: str, log: Callable[[str], object]
) -> tuple[Path, dict[str, Any]] | None:
    """Return the last checkpoint of a folder that can be read, and its state; log the damaged."""
    damaged = []
    for path in reversed(saved_steps(folder)):
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
    """Leave only the last checkpoint, from which more epochs may go on."""
    left_over = folder.glob("*.tmp-*")  # of a process that was killed
    for path in [*saved_steps(folder)[:-1], *left_over]:
        path.unlink(missing_ok=True)


@contextmanager
def claimed(folder: Path | None, fresh: bool) -> Iterator[Path]:
    """Make a run's folder, or a new runs/DATE-TIME, and hold it against other programs."""
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
    for number in count(1):
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
    return folder


class Metrics:
    """metrics.jsonl and TensorBoard's files of a run as it goes.

    Args:
        out: the run's folder.
        before: the points that an interrupted run had come to. Lines of what was lost since its
            last checkpoint go, so that no step is there twice.
    """

    def __init__(self, out: Path, before: Iterable[tuple[Job, list[Point]]]) -> None:
        self.out, self.file = out, out / "metrics.jsonl"
        lines = [_line(job, point) for job, points in before for point in points]
        write(self.file, "".join(lines).encode())
        self._writer: Any = None  # TensorBoard's, of the job of a name
        self._name = ""

    def add(self, job: Job, point: Point) -> None:
        """Add a point of a curve."""
        try:
            with open(self.file, "a", encoding="utf-8") as f:
                f.write(_line(job, point))
            step = int(point["step"])
            if self._name != job.name:
                from torch.utils.tensorboard import SummaryWriter

                self.close()
                folder, self._name = self.out / "tensorboard" / job.name, job.name
                self._writer = SummaryWriter(str(folder), purge_step=step)
            for quantity in point.keys() - {"step"}:
                self._writer.add_scalar(quantity, point[quantity], step)
        except OSError as error:
            raise CheckpointError(f"cannot write in {self.out}: {error}") from error

    def close(self) -> None:
        """Close what is open."""
        if self._writer is not None:
            self._writer.close()


def _line(job: Job, point: Point) -> str:
    return json.dumps({"run": job.name, "method": job.method, "seed": job.seed, **point}) + "\n"
