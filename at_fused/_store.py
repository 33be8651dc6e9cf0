"""The files of a teacher's cache: what is in them, whether it is whole, and who may write.

Their layout is that of :mod:`at_fused.teacher_cache`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from at_fused._checks import DTYPES, kind

if sys.platform != "win32":
    import fcntl

_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
_CHUNK = 1 << 22  # numbers hashed at once: an int64 temporary of 32 MiB

_NO_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)

# Of each array of a sub-folder: its dtype's name and a sample's shape, [name, *shape], as in JSON.
Layout = dict[str, list[str | int]]


class StaleCacheError(RuntimeError):
    """What is stored is damaged, or was made from something else."""


def refusal(file: str, expected: object, found: object) -> StaleCacheError:
    return StaleCacheError(
        f"{file}: expected {expected}, found {found}. This cache is stale or damaged: delete "
        f"{os.path.dirname(file)}, give another folder, or use no cache"
    )


# ---- which input, and whether whole --------------------------------------------------------------


def _mix(v: Tensor) -> Tensor:
    """A bijection of int64 whose every bit depends on all: the end of MurmurHash3."""
    for factor in (0xFF51AFD7ED558CCD - 2**64, 0xC4CEB9FE1A85EC53 - 2**64):
        v = (v ^ ((v >> 33) & 0x7FFFFFFF)) * factor
    return v ^ ((v >> 33) & 0x7FFFFFFF)


def row_hashes(rows: Tensor, salt: str) -> Tensor:
    """(B,) int64: of each row's bytes, dtype and shape. Integers only, so alike on all devices.

    A sum of products mod 2^64 with odd factors, one for each lane of at most 32 bits: a changed
    lane always changes it, several changed lanes but for one case in 2^32.
    """
    start = hashlib.sha256(repr((salt, str(rows.dtype), tuple(rows.shape[1:]))).encode()).digest()
    lane = {1: torch.uint8, 2: torch.int16}.get(rows.element_size(), torch.int32)
    count = rows[:1].numel() * rows.element_size() // lane.itemsize
    factors = _mix(torch.arange(1, count + 1, device=rows.device)) | 1
    sums = []
    for part in rows.detach().split(max(1, _CHUNK // count)):
        # The last dimension of 1 lets any strides be viewed as another dtype.
        lanes = part.reshape(len(part), -1).unsqueeze(-1).view(lane).flatten(1)
        sums.append((lanes * factors).sum(1))
    return _mix(torch.cat(sums) + int.from_bytes(start[:8], "little", signed=True))


def _checksums(numbers: Tensor, prints: Tensor, arrays: dict[str, Tensor]) -> Tensor:
    """(B,) int64, never 0, of samples' numbers, fingerprints and rows."""
    total = _mix(numbers + 1) ^ prints
    for name, rows in arrays.items():
        total = _mix(total) + row_hashes(rows, name)
    total = _mix(total)
    return torch.where(total == 0, 1, total)


@contextmanager
def at_file(path: str) -> Iterator[None]:
    """Have an OSError name the file, which those of descriptors do not, and say what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        todo = f"{'free some space, ' if full else ''}give another folder, or use no cache"
        raise OSError(error.errno, f"{error.strerror} ({todo})", path) from error


def check_inputs(path: str, numbers: Tensor, stored: Tensor, given: Tensor) -> None:
    other = numbers[stored != given]
    if len(other):
        raise StaleCacheError(
            f"{path}: sample {int(other[0])} is not the input that the cache was made from "
            f"({len(other)} of {len(numbers)} are not): its transform is random, or the data set "
            "changed. Seed the transform and give each seed as seed=, give another folder, or use "
            "no cache"
        )


# ---- files ---------------------------------------------------------------------------------------


def _files(layout: Layout) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Dtype and shape of each binary file's sample."""
    found = {name: (_NAMES[str(row[0])], [int(n) for n in row[1:]]) for name, row in layout.items()}
    return found | {"fingerprint": (torch.int64, []), "checksum": (torch.int64, [])}


def _file(path: str, name: str) -> str:
    return os.path.join(path, f"{name}.bin")


def read_meta(path: str, header: dict[str, object]) -> Layout:
    file = os.path.join(path, "meta.json")
    try:
        with open(file, encoding="utf-8") as stream:
            meta = json.load(stream)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, OSError) and not isinstance(error, _NO_FILE):
            with at_file(file):
                raise
        raise refusal(file, "the JSON of a cache", f"{kind(error)}: {error}") from error
    if not isinstance(meta, dict):
        raise refusal(file, "the JSON of a cache", kind(meta))
    for key, value in header.items():
        if meta.get(key) != value:
            raise refusal(file, f"{key} {value!r}", repr(meta.get(key)))
    layout = meta.get("arrays")
    if not isinstance(layout, dict) or not layout:
        raise refusal(file, "arrays by name", repr(layout))
    for name, row in layout.items():
        right = re.fullmatch(r"map\d+|logits", name) and isinstance(row, list) and row
        if (
            not right
            or row[0] not in [*_NAMES]
            or any(type(n) is not int or n < 1 for n in row[1:])
        ):
            raise refusal(file, "arrays as [dtype, *shape]", f"{name}: {row!r}")
    return layout


def _reserve(descriptor: int, offset: int, size: int) -> None:
    """Takes room on the disk. Where it is full: an OSError, but SIGBUS in a mapped file.

    On tmpfs even where a hole is read, so the marks, which are read of absent samples, have none.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, offset, size)


def create(path: str, header: dict[str, object], layout: Layout, samples: int) -> None:
    making, meta = f"{path}.tmp-{uuid.uuid4().hex}", os.path.join(path, "meta.json")
    with at_file(path):
        os.mkdir(making)
    try:
        for name, (dtype, shape) in _files(layout).items():
            # Errors name the place that a file is to have.
            with at_file(_file(path, name)), open(_file(making, name), "xb") as stream:
                size = samples * math.prod(shape) * dtype.itemsize
                if size >= 2**63:
                    raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
                stream.truncate(size)
                if name == "checksum":
                    _reserve(stream.fileno(), 0, size)
        with (
            at_file(meta),
            open(os.path.join(making, "meta.json"), "x", encoding="utf-8") as stream,
        ):
            json.dump(header | {"arrays": layout}, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        with at_file(path):
            os.rename(making, path)
    except OSError:
        if not os.path.lexists(path):  # else another process was first, and its files serve
            raise
    finally:
        shutil.rmtree(making, ignore_errors=True)


class Store:
    """One sub-folder, checked and mapped into memory."""

    def __init__(self, path: str, layout: Layout, samples: int) -> None:
        self.path, self.layout, self._files = path, layout, _files(layout)
        self.signature = self.seen()
        self._arrays = {}
        for name, (dtype, shape) in self._files.items():
            file, size = _file(path, name), samples * math.prod(shape)
            # Before it is mapped: from_file lengthens short files, and creates missing ones.
            found = f"{os.stat(file).st_size} bytes" if os.path.isfile(file) else "no file"
            if found != f"{size * dtype.itemsize} bytes":
                raise refusal(file, f"{size * dtype.itemsize} bytes", found)
            with at_file(file), open(file, "r+b"):
                pass  # or torch's error for a file that may not be written is no OSError
            with torch.inference_mode(False):
                flat = torch.from_file(file, True, size, dtype=dtype)
                self._arrays[name] = flat.view(samples, *shape)
        self._prints, self.marks = self._arrays.pop("fingerprint"), self._arrays.pop("checksum")

    def seen(self) -> list[tuple[int, ...]]:
        """What changes when a file is replaced or cut; for meta.json, also when it is written."""
        found: list[tuple[int, ...]] = []
        for file in (
            os.path.join(self.path, "meta.json"),
            *(_file(self.path, name) for name in self._files),
        ):
            try:
                stat = os.stat(file)
            except OSError:
                found.append(())
                continue
            found.append((stat.st_dev, stat.st_ino, stat.st_size, 0 if found else stat.st_mtime_ns))
        return found

    @contextmanager
    def _locked(self, exclusive: bool) -> Iterator[None]:
        """Orders the processes' reads and writes. A killed process's lock ends with it."""
        if sys.platform == "win32":
            yield
            return
        file = _file(self.path, "checksum")
        with at_file(file):
            descriptor = os.open(file, os.O_RDWR)
        try:
            with at_file(file):
                fcntl.flock(descriptor, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
            yield
        finally:
            # Closing alone leaves it locked where a thread has forked meanwhile.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def _reserve(self, numbers: list[int]) -> None:
        for name, (dtype, shape) in self._files.items():
            size = math.prod(shape) * dtype.itemsize
            file = _file(self.path, name)
            with at_file(file), open(file, "r+b") as stream:
                for i in numbers:
                    _reserve(stream.fileno(), i * size, size)

    def write(self, numbers: Tensor, prints: Tensor, arrays: dict[str, Tensor]) -> None:
        """Stores distinct samples, those excepted that another process has stored meanwhile."""
        with self._locked(exclusive=True):
            absent = self.marks[numbers] == 0
            if not absent.any():
                return
            numbers, prints = numbers[absent], prints[absent]
            arrays = {name: rows[absent] for name, rows in arrays.items()}
            self._reserve(numbers.tolist())
            for name, rows in arrays.items():
                self._arrays[name].index_copy_(0, numbers, rows)
            self._prints.index_copy_(0, numbers, prints)
            # Of what was given, not of what the files hold now. Last: it marks them as stored.
            self.marks.index_copy_(0, numbers, _checksums(numbers, prints, arrays))

    def read(self, numbers: Tensor, prints: Tensor) -> dict[str, Tensor]:
        """Stored samples' rows, where whole, and made from inputs of these fingerprints."""
        with self._locked(exclusive=False):
            arrays = {name: rows.index_select(0, numbers) for name, rows in self._arrays.items()}
            stored, marks = self._prints[numbers], self.marks[numbers]
        right = _checksums(numbers, stored, arrays)
        bad = (marks != right).nonzero()
        if len(bad):
            row = int(bad[0])
            what = f"checksum {int(right[row])} of sample {int(numbers[row])}'s rows"
            raise refusal(_file(self.path, "checksum"), what, int(marks[row]))
        check_inputs(self.path, numbers, stored, prints)
        return arrays
