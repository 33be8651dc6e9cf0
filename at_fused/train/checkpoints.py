"""Files of a run: its folder, its networks and checkpoints (written atomically), and metrics."""

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
SHA256 = 32  # length of the digest at the end of a file, in bytes


class CheckpointError(RuntimeError):
    """A network or checkpoint cannot be read, does not belong to the run or cannot be written."""


def atomic_write(path: Path, content: bytes) -> None:
    """Write a file atomically: to a temporary file, which is renamed once it is on the disk."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # for the rename
        finally:
            os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"cannot write {path}: {error.strerror}; files saved earlier are intact"
        ) from error


def save(path: Path, kind: str, state: Mapping[str, Any]) -> None:
    """Write a state, tensors in plain containers; ``load`` reads it."""
    buffer = io.BytesIO()
    torch.save({"format": _FORMAT, "what": kind, **state}, buffer)
    atomic_write(path, _with_digest(buffer.getvalue()))


def _with_digest(archive: bytes) -> bytes:
    # The digest is the comment of the zip archive, which torch.load ignores.
    digest = hashlib.sha256(archive).digest()
    return archive[:-2] + SHA256.to_bytes(2, "little") + digest


def load(path: Path, kind: str) -> dict[str, Any]:
    """Return the state that ``save`` wrote to a file of this kind.

    Verifies the file's SHA-256. torch verifies no checksum, and the zip archive's CRC-32s do not
    cover its directory: one flipped bit there makes torch.load return wrong weights.
    """
    content = path.read_bytes()
    try:
        if _with_digest(content[: -2 - SHA256] + bytes(2)) != content:
            raise ValueError("SHA-256 mismatch")
        state: dict[str, Any] = torch.load(io.BytesIO(content), "cpu", weights_only=True)
        if state["format"] != _FORMAT:
            raise ValueError("another format")
    except Exception as error:  # torch's message may advise to trust the file
        raise CheckpointError(
            f"{path}: truncated, damaged, or not from this version of at-fused-train; delete it "
            "to continue without it (--resume)"
        ) from error
    if state["what"] != kind:
        raise CheckpointError(f"{path}: is a {state['what']}, expected a {kind}")
    return state


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, by step."""
    return sorted(folder.glob("step-*.pt"))


def save_checkpoint(folder: Path, step: int, kind: str, state: dict[str, Any], keep: int) -> None:
    """Write the checkpoint of a step; keep only the last ``keep`` checkpoints of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save(folder / f"step-{step:08d}.pt", kind, state)
    for path in list_checkpoints(folder)[:-keep]:
        path.unlink(missing_ok=True)


def load_latest(folder: Path, kind: str) -> tuple[Path, dict[str, Any]] | None:
    """Return the path and state of a folder's last checkpoint, or None."""
    steps = list_checkpoints(folder)
    return (steps[-1], load(steps[-1], kind)) if steps else None


def keep_latest(folder: Path) -> None:
    """Delete all files but the last checkpoint, which --resume needs to add epochs."""
    for path in {*folder.iterdir()} - {*list_checkpoints(folder)[-1:]}:  # also temporary files
        path.unlink()


@contextmanager
def lock_folder(folder: Path | None, fresh: bool) -> Iterator[Path]:
    """Create a run's folder (runs/DATE-TIME if None) and lock it against other processes."""
    folder = folder or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{error}; choose another folder (--out)") from error
    with open(folder / ".lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{folder}: another at-fused-train is using this folder; wait for it to finish or "
                "choose another folder (--out)"
            ) from None
        if fresh and [path for path in folder.iterdir() if path.name != ".lock"]:
            raise CheckpointError(
                f"{folder}: not empty; choose a new or empty folder (--out), or continue its run "
                "with --resume"
            )
        yield folder


class Metrics:
    """metrics.jsonl and TensorBoard files of a run, with a record for each evaluation.

    Args:
        out: the run's folder.
        previous: records of an interrupted run. Must not contain steps after its last checkpoint,
            which are run again.
    """

    def __init__(self, out: Path, previous: Iterable[Mapping[str, Any]]) -> None:
        self.out, self.file = out, out / "metrics.jsonl"
        atomic_write(self.file, "".join(map(_to_json_line, previous)).encode())
        self._writer: Any = None
        self._run = ""  # the network of the writer

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a record with the keys "run", "method", "seed" and "step", and quantities."""
        run, step = record["run"], int(record["step"])
        try:
            with open(self.file, "a", encoding="utf-8") as f:
                f.write(_to_json_line(record))
            if self._run != run:
                from torch.utils.tensorboard import SummaryWriter

                self.close()
                self._writer = SummaryWriter(str(self.out / "tensorboard" / run), purge_step=step)
                self._run = run
            for quantity in record.keys() - {"run", "method", "seed", "step"}:
                self._writer.add_scalar(quantity, record[quantity], step)
        except OSError as error:
            raise CheckpointError(f"cannot write to {self.out}: {error}") from error

    def close(self) -> None:
        """Close the TensorBoard writer."""
        if self._writer is not None:
            self._writer.close()


def _to_json_line(record: Mapping[str, Any]) -> str:
    return json.dumps(record) + "\n"
