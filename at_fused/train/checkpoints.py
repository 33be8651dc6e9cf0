"""Files of a run: its folder, networks and checkpoints, which are whole or absent, and metrics."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_FORMAT = 2
SHA256 = 32  # bytes, at the end of a file


class CheckpointError(RuntimeError):
    """A file that cannot be gone on from, or that could not be written."""


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


def load(path: Path, what: str) -> dict[str, Any]:
    """Return the state of a file that ``save`` wrote for the same ``what``.

    Its sha256 is compared: torch looks at no checksum, and the CRC-32s of a zip archive leave out
    its directory, one bit of which makes torch.load return other weights.
    """
    content = path.read_bytes()
    try:
        if _sealed(content[: -2 - SHA256] + bytes(2)) != content:
            raise ValueError("its sha256 is not right")
        state: dict[str, Any] = torch.load(io.BytesIO(content), "cpu", weights_only=True)
        if state["format"] != _FORMAT:
            raise ValueError("another format")
    except Exception as error:  # whose text may be torch's advice to trust the file
        raise CheckpointError(
            f"{path}: truncated, damaged, or no file of this version of at-fused-train; delete it, "
            "and a run goes on without it (--resume)"
        ) from error
    if state["what"] != what:
        raise CheckpointError(f"{path}: is {state['what']}, wanted is {what}")
    return state


def saved_steps(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, the last step's at the end."""
    return sorted(folder.glob("step-*.pt"))


def save_step(folder: Path, step: int, what: str, state: Mapping[str, Any], keep: int) -> None:
    """Write the checkpoint of a step; of those in the folder the last ``keep`` stay."""
    folder.mkdir(parents=True, exist_ok=True)
    save(folder / f"step-{step:08d}.pt", what, state)
    for path in saved_steps(folder)[:-keep]:
        path.unlink(missing_ok=True)


def newest(folder: Path, what: str) -> tuple[Path, dict[str, Any]] | None:
    """Return the last checkpoint of a folder, if there is one, and its state."""
    steps = saved_steps(folder)
    return (steps[-1], load(steps[-1], what)) if steps else None


def tidy(folder: Path) -> None:
    """Leave only the last checkpoint, from which more epochs may go on."""
    for path in {*folder.iterdir()} - {*saved_steps(folder)[-1:]}:  # and what a kill left over
        path.unlink()


@contextmanager
def claimed(folder: Path | None, fresh: bool) -> Iterator[Path]:
    """Make a run's folder, or a new runs/DATE-TIME, and hold it against other programs."""
    folder = folder or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{error}; choose another folder (--out)") from error
    with open(folder / ".lock", "a") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{folder}: another at-fused-train is at work there; wait for its end, or choose "
                "another folder (--out)"
            ) from None
        if fresh and [path for path in folder.iterdir() if path.name != ".lock"]:
            raise CheckpointError(
                f"{folder}: already holds files; choose a new or an empty folder (--out), or "
                "--resume to go on there"
            )
        yield folder


class Metrics:
    """metrics.jsonl and TensorBoard's files of a run: a record of each evaluation, as it goes.

    Args:
        out: the run's folder.
        before: the records that an interrupted run had come to. Those of what was lost since its
            last checkpoint go, so that no step is there twice.
    """

    def __init__(self, out: Path, before: Iterable[Mapping[str, Any]]) -> None:
        self.out, self.file = out, out / "metrics.jsonl"
        write(self.file, "".join(map(_line, before)).encode())
        self._writer: Any = None  # TensorBoard's, of the network of a name
        self._run = ""

    def add(self, record: Mapping[str, Any]) -> None:
        """Add a record: its "run", "method", "seed" and "step", and the quantities."""
        run, step = record["run"], int(record["step"])
        try:
            with open(self.file, "a", encoding="utf-8") as f:
                f.write(_line(record))
            if self._run != run:
                from torch.utils.tensorboard import SummaryWriter

                self.close()
                self._writer = SummaryWriter(str(self.out / "tensorboard" / run), purge_step=step)
                self._run = run
            for quantity in record.keys() - {"run", "method", "seed", "step"}:
                self._writer.add_scalar(quantity, record[quantity], step)
        except OSError as error:
            raise CheckpointError(f"cannot write in {self.out}: {error}") from error

    def close(self) -> None:
        """Close what is open."""
        if self._writer is not None:
            self._writer.close()


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record) + "\n"
