"""Files that are there whole or not at all: checkpoints of a training run, and trained networks."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_FORMAT = 1
_NAME = re.compile(r"step-(\d+)\.pt")


class CheckpointError(RuntimeError):
    """A file that cannot be gone on from, or that could not be written."""


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
    write(path, found.getvalue())


def load(path: Path, what: str) -> dict[str, Any]:
    """The state of a file that ``save`` wrote for the same ``what``.

    Raises:
        CheckpointError: it is truncated, of another program, or something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    # Foreign bytes raise a dozen kinds of errors in torch.load.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"{path}: truncated, or no file of at-fused-train ({reason})") from (
            error
        )
    if not isinstance(state, dict) or state.get("format") != _FORMAT or "what" not in state:
        raise CheckpointError(f"{path}: no file of at-fused-train")
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


def newest(folder: Path) -> Path | None:
    """The last checkpoint of a folder."""
    found = _all(folder)
    return found[-1][1] if found else None


def clear(folder: Path) -> None:
    """Takes a folder of checkpoints away, once what they led to is saved."""
    for _, path in _all(folder):
        path.unlink(missing_ok=True)
    for path in folder.glob("*.tmp-*"):  # of a process that was killed
        path.unlink(missing_ok=True)
    for empty in (folder, folder.parent):
        if empty.is_dir() and not any(empty.iterdir()):
            empty.rmdir()
