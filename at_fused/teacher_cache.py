"""A teacher's maps and logits on disk, computed only once where the same inputs come again.

    cache = TeacherCache("cache", samples=len(dataset))
    identity = teacher_hash(teacher, "p=2")
    maps, logits = cache.fetch(compute, x, index, identity=identity, seed=epoch % 10)

One SQLite database, ``<folder>/<identity[:16]>-seed<seed>``, for each teacher, with the options of
its maps, and each transform of the inputs. It has a table, named by format, byte order, identity,
seed and number of samples, with a record for each sample that is stored: a CRC-32 (4 bytes), a
fingerprint of the sample's input (8 bytes), a line of JSON with the dtype and shape of each array,
and the arrays: maps, then logits.

A batch is stored whole or not at all, whatever ends the process; what is damaged, as where the
machine itself fails, is refused. Any number of processes of one machine may use a folder at once;
several machines may not, since network file systems do not lock well enough. The hashes are against
accidents, not forgery.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakIdRef

from at_fused._arguments import DTYPES, check_dense, check_tensor
from at_fused._models import version_of
from at_fused._numbers import as_python, is_int, type_name

if TYPE_CHECKING:
    import sqlite3

__all__ = ["StaleCacheError", "TeacherCache", "teacher_hash"]

_FORMAT = 3
_PATIENCE = 600  # seconds to wait for other processes
_CHUNK = 1 << 22  # numbers hashed at once: an int64 temporary of 32 MiB
_DTYPES = {str(dtype): dtype for dtype in DTYPES}


class StaleCacheError(RuntimeError):
    """A cache that is damaged, or was made from something else."""


# ---- which teacher, which input ------------------------------------------------------------------


class TeacherHash:
    """:func:`teacher_hash` of one module, computed again only where the module has changed.

    A call notices in-place updates, ``load_state_dict``, replaced tensors and modules,
    ``.data = ...``, and moves. It cannot notice in-place updates through ``.data``
    (``p.data.add_(1)``), which torch does not count, nor a module's other attributes: make another
    TeacherHash after these.
    """

    def __init__(self, module: nn.Module) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {type_name(module)}")
        self._module = module
        self._state: list[tuple[object, ...]] = []
        self._digest = ""

    def __call__(self, *options: object) -> str:
        """Return :func:`teacher_hash` of the module and of ``options``."""
        shown = repr(options)
        if " at 0x" in shown:
            raise ValueError(f"options must be the same in every process, got {shown}")
        # References hold no memory, and a new object never equals one that is gone.
        state: list[tuple[object, ...]] = []
        counted = True
        for path, part in self._module.named_modules(remove_duplicate=False):
            state.append((path, WeakIdRef(part)))
            for name, t in (*part._parameters.items(), *part._buffers.items()):
                if t is not None:
                    version, storage = version_of(t), StorageWeakRef(t.untyped_storage())
                    layout = t.dtype, t.shape, t.storage_offset(), t.stride()
                    state.append((name, WeakIdRef(t), version, storage, *layout))
                    counted &= version >= 0
        if not counted or state != self._state:
            self._digest, self._state = _digest(self._module), state
        return hashlib.sha256(f"{self._digest} {shown}".encode()).hexdigest()

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self._module,)


def _digest(module: nn.Module) -> str:
    found = hashlib.sha256()
    for path, part in module.named_modules(remove_duplicate=False):
        # It has what no tensor shows, such as a convolution's stride.
        shown = re.sub(r" at 0x[0-9a-f]+", "", part.extra_repr())
        found.update(repr((path, type(part).__qualname__, shown)).encode())
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is None:
                continue
            if is_traceable_wrapper_subclass(tensor):  # whose bytes are elsewhere
                raise TypeError(
                    f"module: {name!r} must be a tensor with bytes of its own, got "
                    f"{type_name(tensor)}; hash or cache a teacher that is not sharded (FSDP), nor "
                    "quantised by tensors of another class"
                )
            t = tensor.detach().cpu().contiguous()
            found.update(repr((name, str(t.dtype), tuple(t.shape))).encode())
            if t.numel():
                found.update((ctypes.c_char * t.nbytes).from_address(t.data_ptr()))
    return found.hexdigest()


def teacher_hash(module: nn.Module, *options: object) -> str:
    """A hash of a teacher and of the options that its maps are made with.

    The same in every process, on every device, in training mode and in eval mode, and with any
    hooks. Reads all parameters; :class:`TeacherHash` reads them once.

    Args:
        module: its modules' names, class names and ``extra_repr`` are hashed, and each parameter's
            and buffer's name, dtype, shape and bytes.
        options: hashed by their repr.

    Returns:
        A sha256, 64 hexadecimal digits.

    Raises:
        TypeError: ``module`` is no module, or has tensors of a class that keeps others inside, such
            as the DTensors of a sharded teacher.
        ValueError: an option's repr has an address, which differs between processes.
    """
    return TeacherHash(module)(*options)


def _mix(v: Tensor) -> Tensor:
    """Return a bijection of int64 whose every bit depends on all: the end of MurmurHash3."""
    for factor in (0xFF51AFD7ED558CCD - 2**64, 0xC4CEB9FE1A85EC53 - 2**64):
        v = (v ^ ((v >> 33) & 0x7FFFFFFF)) * factor
    return v ^ ((v >> 33) & 0x7FFFFFFF)


def _fingerprints(x: Tensor) -> list[bytes]:
    """Return 8 bytes for each row's bytes, dtype and shape: from integers, on all devices the same.

    A sum of products mod 2^64 with odd factors, one for each lane of at most 32 bits: a changed
    lane always changes it, several changed lanes but for one case in 2^32.
    """
    start = hashlib.sha256(repr((str(x.dtype), tuple(x.shape[1:]))).encode()).digest()[:8]
    lane = {1: torch.uint8, 2: torch.int16}.get(x.element_size(), torch.int32)
    count = x[:1].numel() * x.element_size() // lane.itemsize
    factors = _mix(torch.arange(1, count + 1, device=x.device)) | 1
    sums = []
    for part in x.detach().split(max(1, _CHUNK // count)):
        # The last dimension of 1 lets any strides be viewed as another dtype.
        lanes = part.reshape(len(part), -1).unsqueeze(-1).view(lane).flatten(1)
        sums.append((lanes * factors).sum(1))
    hashes = _mix(torch.cat(sums) + int.from_bytes(start, "little", signed=True))
    return [each.to_bytes(8, "little", signed=True) for each in hashes.tolist()]


# ---- tensors as records --------------------------------------------------------------------------


def _to_bytes(result: Any, count: int) -> list[bytes]:
    """Return what ``compute`` returned sample by sample: its arrays' description, and theirs."""
    try:
        (*maps,), logits = result
    except (TypeError, ValueError):
        raise TypeError(
            f"compute must return (list or tuple of maps, logits or None), got {type_name(result)}"
        ) from None
    named = {f"map{i}": t for i, t in enumerate(maps)}
    if logits is not None:
        named["logits"] = logits
    if not named:
        raise ValueError("compute must return maps or logits, got neither")
    arrays, parts = {}, []
    for name, t in named.items():
        if check_tensor(f"compute: {name}", t).shape[:1] != (count,):
            raise ValueError(f"compute: {name} must be ({count}, ...), got shape {tuple(t.shape)}")
        arrays[name] = [str(t.dtype), *t.shape[1:]]
        parts.append(t.detach().cpu().contiguous().reshape(count, -1).view(torch.uint8))
    line = json.dumps(arrays).encode() + b"\n"
    return [line + ctypes.string_at(row.data_ptr(), len(row)) for row in torch.cat(parts, 1)]


def _to_tensors(path: str, records: list[bytes | None]) -> dict[str, Tensor]:
    """Return the arrays of samples, from their records after the fingerprints."""
    there = [record for record in records if record is not None]
    line = there[0][: there[0].index(b"\n") + 1] if there else b""
    if len(there) < len(records) or not all(record.startswith(line) for record in there):
        raise _refusal(path, "samples of this batch are lost, or of different shapes or dtypes")
    rows = torch.frombuffer(bytearray().join(there), dtype=torch.uint8)
    rows, start, found = rows.view(len(there), -1), len(line), {}
    for name, (dtype, *shape) in json.loads(line).items():
        stop = start + math.prod(shape) * _DTYPES[dtype].itemsize
        # A copy, whose address is a multiple of any dtype's size.
        part = rows[:, start:stop].clone(memory_format=torch.contiguous_format)
        found[name], start = part.view(_DTYPES[dtype]).view(len(there), *shape), stop
    return found


# ---- the database --------------------------------------------------------------------------------


def _refusal(path: str, problem: str) -> StaleCacheError:
    advice = "delete it, give another folder, or use no cache"
    return StaleCacheError(f"{path}: {problem}. This cache is stale or damaged: {advice}")


def _checksum(table: str, number: int, content: bytes) -> bytes:
    return zlib.crc32(content, zlib.crc32(f"{table} {number}".encode())).to_bytes(4, "little")


@dataclass
class _Table:
    """The records of one teacher and seed: an input's fingerprint, then the arrays' bytes."""

    path: str
    name: str

    @contextmanager
    def transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        """Open the database for what is done whole or, after an error, not at all."""
        import sqlite3  # not before it is used: some Pythons lack it

        try:
            with closing(sqlite3.connect(self.path, _PATIENCE, isolation_level=None)) as database:
                database.text_factory = bytes
                database.execute("PRAGMA synchronous = OFF")
                database.execute(f"BEGIN {begin}")
                columns = "number INTEGER PRIMARY KEY, record BLOB"
                database.execute(f'CREATE TABLE IF NOT EXISTS "{self.name}" ({columns})')
                yield database
                database.execute("COMMIT")
        except sqlite3.OperationalError as error:
            advice = "free some space, give another folder, or use no cache"
            if os.path.isdir(self.path):
                advice = "it is a folder, as an earlier version made: delete it"
            raise OSError(f"{self.path}: {error}; {advice}") from error
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # messages may quote damage
            raise _refusal(self.path, f"no whole database: {error}") from error

    def read(self, prints: Sequence[tuple[int, bytes]]) -> list[bytes | None]:
        """Return the arrays' bytes of samples, numbers with fingerprints; None is not stored."""
        with self.transaction("DEFERRED") as database:
            return [self._record(database, *each) for each in prints]

    def write(self, new: Sequence[tuple[int, bytes]]) -> None:
        """Store records under numbers, but where another process has stored some meanwhile."""
        rows = [(i, _checksum(self.name, i, content) + content) for i, content in new]
        with self.transaction("IMMEDIATE") as database:
            database.executemany(f'INSERT OR IGNORE INTO "{self.name}" VALUES (?, ?)', rows)

    def _record(self, database: sqlite3.Connection, number: int, mark: bytes) -> bytes | None:
        query = f'SELECT record FROM "{self.name}" WHERE number = ?'
        found = database.execute(query, (number,)).fetchone()
        if found is None:
            return None
        record = found[0] if isinstance(found[0], bytes) else b""
        if record[:4] != _checksum(self.name, number, record[4:]):
            raise _refusal(self.path, f"record {number} is not as its checksum says")
        if record[4:12] != mark:
            raise _refusal(
                self.path,
                f"sample {number} is not the input that the cache was made from: the data set "
                "changed, or its transform is random (seed it, and give each seed as seed=)",
            )
        return record[12:]


class TeacherCache:
    """A teacher's maps and logits of a data set, on disk.

    Several processes (DDP's ranks) may share a folder. Can be pickled, and used after a fork. What
    is stale or damaged is refused, never used, and never repaired. Layout and limits:
    :mod:`at_fused.teacher_cache`.

    Args:
        folder: made where it is absent.
        samples: how many samples the data set has.

    Raises:
        TypeError, ValueError: ``folder`` is no path, ``samples`` no int from 1 to 2^63.
        OSError: ``folder`` cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str], samples: int) -> None:
        self._samples = as_python("samples", samples)
        if not is_int(self._samples) or not 1 <= self._samples < 2**63:
            raise ValueError(f"samples must be an int >= 1 and below 2^63, got {samples!r}")
        self._folder = os.path.abspath(folder)
        os.makedirs(self._folder, exist_ok=True)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._folder!r}, samples={self._samples})"

    def fetch(
        self,
        compute: Callable[[Tensor], tuple[Sequence[Tensor], Tensor | None]],
        x: Tensor,
        index: Tensor | Sequence[int],
        *,
        identity: str,
        seed: int = 0,
    ) -> tuple[list[Tensor], Tensor | None]:
        """The maps and logits of a batch: stored ones, and those of ``compute``, which it stores.

        Args:
            compute: a function of the rows of ``x`` that are not stored, in their order (``x``
                itself where none is), that returns (maps, logits or None), each (b, ...) and
                floating point. Not called where all are stored.
            x: (B, ...), any dtype and device. A sample's bytes must be those it was stored with.
            index: (B,), a tensor or a sequence of ints, the samples' numbers. They may repeat.
            identity: :func:`at_fused.teacher_cache.teacher_hash` of the teacher and the options
                that decide what ``compute`` returns; letters, digits, "-" and "_". The first 16
                name a file.
            seed: the seed of the transform that made x.

        Returns:
            The maps and the logits (None if none were stored) of all rows of x, (B, ...), on its
            device, in the dtypes and bit for bit what ``compute`` returned, without gradients.

        Raises:
            TypeError: an argument, or what ``compute`` returns, is not of the kind above.
            ValueError: shapes that do not match; numbers out of range.
            StaleCacheError: what is stored was made from another input, or with other shapes or
                dtypes, or is damaged. A RuntimeError.
            OSError: the disk is full, or the file may not be read and written.
        """
        if not callable(compute):
            raise TypeError(f"compute must be a function, got {type_name(compute)}")
        if check_dense("x", x).dim() == 0 or 0 in x.shape:
            raise ValueError(f"x must be (B, ...) and not empty, got shape {tuple(x.shape)}")
        numbers = self._numbers(index, x.shape[0])
        table = self._table(identity, seed)
        prints = list(zip(numbers, _fingerprints(x), strict=True))
        records = table.read(prints)
        absent = [row for row, record in enumerate(records) if record is None]
        if absent:
            rows = x if len(absent) == len(x) else x[torch.tensor(absent, device=x.device)]
            given = zip(absent, _to_bytes(compute(rows), len(absent)), strict=True)
            table.write([(prints[row][0], prints[row][1] + sample) for row, sample in given])
            # All samples again: other processes may have stored some meanwhile.
            records = table.read(prints)
        found = {name: t.to(x.device) for name, t in _to_tensors(table.path, records).items()}
        logits = found.pop("logits", None)
        return list(found.values()), logits

    def stored(self, identity: str, seed: int = 0) -> int:
        """Count the samples that are stored for a teacher and a seed.

        Args:
            identity, seed: as in :meth:`fetch`.

        Returns:
            Their number, in [0, samples].

        Raises:
            TypeError, ValueError, StaleCacheError: as :meth:`fetch`.
        """
        table = self._table(identity, seed)
        if not os.path.exists(table.path):
            return 0
        with table.transaction("DEFERRED") as database:
            return int(database.execute(f'SELECT COUNT(*) FROM "{table.name}"').fetchone()[0])

    def _numbers(self, index: Tensor | Sequence[int], batch: int) -> list[int]:
        numbers = as_python("index", index)
        each = numbers if isinstance(numbers, (list, tuple)) else ()
        if len(each) != batch or not all(is_int(i) and 0 <= i < self._samples for i in each):
            allowed = f"{batch} ints in [0, {self._samples}), a tensor or a sequence"
            raise ValueError(f"index must be {allowed}, got {numbers!r:.80}")
        return list(each)

    def _table(self, identity: str, seed: int) -> _Table:
        seed = as_python("seed", seed)
        if not isinstance(identity, str) or not re.fullmatch(r"[0-9A-Za-z_-]+", identity):
            raise ValueError(f"identity must be letters, digits, '-' and '_', got {identity!r}")
        if not is_int(seed):
            raise TypeError(f"seed must be an int, got {type_name(seed)}")
        path = os.path.join(self._folder, f"{identity[:16]}-seed{seed}")
        return _Table(path, f"{_FORMAT} {sys.byteorder} {identity} {seed} {self._samples}")
