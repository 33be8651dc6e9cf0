"""A disk cache for a teacher's maps and logits: each input is computed once.

    cache = TeacherCache("cache", samples=len(dataset))
    identity = teacher_hash(teacher, "p=2")
    maps, logits = cache.fetch(compute, x, index, identity=identity, seed=epoch % 10)

Each teacher (with the options of its maps) and each seed of the input transform have a SQLite
database of their own, ``<folder>/<identity[:16]>-seed<seed>``. Its only table is named after the
format, byte order, identity, seed and number of samples, and has one record per stored sample. A
record holds a CRC-32 (4 bytes), a fingerprint of the input (8 bytes), a line of JSON with the dtype
and shape of each array, and the arrays: maps, then logits.

A batch is stored completely or not at all, even if the process is killed. Damaged records, as after
a crash of the machine, are refused. Any number of processes on one machine may use a folder at the
same time. Several machines may not, because network file systems do not lock reliably. The hashes
protect against accidents, not against forgery.
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
_TIMEOUT = 600  # seconds to wait for other processes
_CHUNK = 1 << 22  # numbers hashed at a time: an int64 temporary of 32 MiB
_DTYPES = {str(dtype): dtype for dtype in DTYPES}


class StaleCacheError(RuntimeError):
    """The error for a cache that is damaged, or was made from other inputs."""


# ---- hashes of teachers and inputs ---------------------------------------------------------------


class TeacherHash:
    """A memoised :func:`teacher_hash` of one module, recomputed only after a change.

    A call notices in-place updates, ``load_state_dict``, replaced tensors and modules,
    ``.data = ...``, and moves. It cannot notice in-place updates through ``.data``
    (``p.data.add_(1)``), which torch does not count, or changes of a module's other attributes.
    Make a new TeacherHash after these.
    """

    def __init__(self, module: nn.Module) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {type_name(module)}")
        self._module = module
        self._state: list[tuple[object, ...]] = []
        self._digest = ""

    def __call__(self, *options: object) -> str:
        """Return :func:`teacher_hash` of the module and ``options``."""
        text = repr(options)
        if " at 0x" in text:
            raise ValueError(f"options must have the same repr in every process, got {text}")
        # Weak references hold no memory, and never equal a new object at the same address.
        state: list[tuple[object, ...]] = []
        has_versions = True
        for path, part in self._module.named_modules(remove_duplicate=False):
            state.append((path, WeakIdRef(part)))
            for name, t in (*part._parameters.items(), *part._buffers.items()):
                if t is not None:
                    version, storage = version_of(t), StorageWeakRef(t.untyped_storage())
                    layout = t.dtype, t.shape, t.storage_offset(), t.stride()
                    state.append((name, WeakIdRef(t), version, storage, *layout))
                    has_versions &= version >= 0
        if not has_versions or state != self._state:
            self._digest, self._state = _digest(self._module), state
        return hashlib.sha256(f"{self._digest} {text}".encode()).hexdigest()

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self._module,)


def _digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for path, part in module.named_modules(remove_duplicate=False):
        # extra_repr has options that no tensor depends on, such as a convolution's stride.
        options = re.sub(r" at 0x[0-9a-f]+", "", part.extra_repr())
        digest.update(repr((path, type(part).__qualname__, options)).encode())
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is None:
                continue
            if is_traceable_wrapper_subclass(tensor):  # its data is in other tensors
                raise TypeError(
                    f"module: {name!r} must be a tensor with its own storage, got "
                    f"{type_name(tensor)}; hash or cache a teacher that is neither sharded by FSDP "
                    "nor quantised with a tensor subclass"
                )
            t = tensor.detach().cpu().contiguous()
            digest.update(repr((name, str(t.dtype), tuple(t.shape))).encode())
            if t.numel():
                digest.update((ctypes.c_char * t.nbytes).from_address(t.data_ptr()))
    return digest.hexdigest()


def teacher_hash(module: nn.Module, *options: object) -> str:
    """Return a hash of a teacher and of the options for its maps.

    It is the same in every process, on every device, in training and eval mode, and with any hooks.
    Reads all parameters in each call; :class:`TeacherHash` reads them once.

    Args:
        module: the teacher. The hash covers its modules' names, class names and ``extra_repr``, and
            the name, dtype, shape and bytes of each parameter and buffer.
        options: hashed by their repr.

    Returns:
        A SHA-256, as 64 hexadecimal digits.

    Raises:
        TypeError: ``module`` is not a module, or has tensors that wrap others, such as the DTensors
            of a sharded teacher.
        ValueError: an option's repr contains an address, which differs between processes.
    """
    return TeacherHash(module)(*options)


def _mix(v: Tensor) -> Tensor:
    """Return the finaliser of MurmurHash3: a bijection of int64 that mixes all bits."""
    for factor in (0xFF51AFD7ED558CCD - 2**64, 0xC4CEB9FE1A85EC53 - 2**64):
        v = (v ^ ((v >> 33) & 0x7FFFFFFF)) * factor
    return v ^ ((v >> 33) & 0x7FFFFFFF)


def _fingerprints(x: Tensor) -> list[bytes]:
    """Return 8 bytes per row for its bytes, dtype and shape, the same on all devices.

    Sums the products mod 2^64 of integer lanes of at most 32 bits with odd factors. The sum always
    changes if one lane does. If several do, it stays the same with probability 2^-32.
    """
    start = hashlib.sha256(repr((str(x.dtype), tuple(x.shape[1:]))).encode()).digest()[:8]
    lane = {1: torch.uint8, 2: torch.int16}.get(x.element_size(), torch.int32)
    count = x[:1].numel() * x.element_size() // lane.itemsize
    factors = _mix(torch.arange(1, count + 1, device=x.device)) | 1
    sums = []
    for part in x.detach().split(max(1, _CHUNK // count)):
        # With a last dimension of size 1, any strides can be viewed as another dtype.
        lanes = part.reshape(len(part), -1).unsqueeze(-1).view(lane).flatten(1)
        sums.append((lanes * factors).sum(1))
    hashes = _mix(torch.cat(sums) + int.from_bytes(start, "little", signed=True))
    return [number.to_bytes(8, "little", signed=True) for number in hashes.tolist()]


# ---- tensors as records --------------------------------------------------------------------------


def _to_records(result: Any, count: int) -> list[bytes]:
    """Return the result of ``compute`` as one record per sample: JSON header, then arrays."""
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


def _from_records(path: str, records: list[bytes | None]) -> dict[str, Tensor]:
    """Return the arrays of a batch from its records without fingerprints."""
    stored = [record for record in records if record is not None]
    line = stored[0][: stored[0].index(b"\n") + 1] if stored else b""
    if len(stored) < len(records) or not all(record.startswith(line) for record in stored):
        raise _stale_error(path, "samples of this batch are missing, or differ in shape or dtype")
    rows = torch.frombuffer(bytearray().join(stored), dtype=torch.uint8)
    rows, start, arrays = rows.view(len(stored), -1), len(line), {}
    for name, (dtype, *shape) in json.loads(line).items():
        stop = start + math.prod(shape) * _DTYPES[dtype].itemsize
        # The copy is aligned for any dtype.
        part = rows[:, start:stop].clone(memory_format=torch.contiguous_format)
        arrays[name], start = part.view(_DTYPES[dtype]).view(len(stored), *shape), stop
    return arrays


# ---- the database --------------------------------------------------------------------------------


def _stale_error(path: str, problem: str) -> StaleCacheError:
    advice = "delete it, use another folder, or use no cache"
    return StaleCacheError(f"{path}: {problem}. This cache is stale or damaged: {advice}")


def _checksum(table: str, number: int, content: bytes) -> bytes:
    return zlib.crc32(content, zlib.crc32(f"{table} {number}".encode())).to_bytes(4, "little")


@dataclass
class _Table:
    """The records of one teacher and seed, each a fingerprint and the bytes of the arrays."""

    path: str
    name: str

    @contextmanager
    def transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        """Open the database for one transaction, which an error undoes."""
        import sqlite3  # here, because some builds of Python lack it

        try:
            with closing(sqlite3.connect(self.path, _TIMEOUT, isolation_level=None)) as database:
                database.text_factory = bytes
                database.execute("PRAGMA synchronous = OFF")
                database.execute(f"BEGIN {begin}")
                columns = "number INTEGER PRIMARY KEY, record BLOB"
                database.execute(f'CREATE TABLE IF NOT EXISTS "{self.name}" ({columns})')
                yield database
                database.execute("COMMIT")
        except sqlite3.OperationalError as error:
            advice = "free some disk space, use another folder, or use no cache"
            if os.path.isdir(self.path):
                advice = "it is a folder from an earlier version: delete it"
            raise OSError(f"{self.path}: {error}; {advice}") from error
        # A UnicodeDecodeError comes from a message that quotes damaged bytes.
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            raise _stale_error(self.path, f"not a valid database: {error}") from error

    def read(self, keys: Sequence[tuple[int, bytes]]) -> list[bytes | None]:
        """Return the bytes of the arrays by (sample number, fingerprint), None if not stored."""
        with self.transaction("DEFERRED") as database:
            return [self._record(database, *key) for key in keys]

    def write(self, records: Sequence[tuple[int, bytes]]) -> None:
        """Store records by sample number; keep those that another process has stored."""
        rows = [(i, _checksum(self.name, i, content) + content) for i, content in records]
        with self.transaction("IMMEDIATE") as database:
            database.executemany(f'INSERT OR IGNORE INTO "{self.name}" VALUES (?, ?)', rows)

    def _record(
        self, database: sqlite3.Connection, number: int, fingerprint: bytes
    ) -> bytes | None:
        query = f'SELECT record FROM "{self.name}" WHERE number = ?'
        row = database.execute(query, (number,)).fetchone()
        if row is None:
            return None
        record = row[0] if isinstance(row[0], bytes) else b""
        if record[:4] != _checksum(self.name, number, record[4:]):
            raise _stale_error(self.path, f"record {number} does not match its checksum")
        if record[4:12] != fingerprint:
            raise _stale_error(
                self.path,
                f"sample {number} is not the input that the cache was made from: the data set "
                "changed, or its transform is random (seed it; in Python, pass seed= as well)",
            )
        return record[12:]


class TeacherCache:
    """A disk cache for a teacher's maps and logits of one data set.

    Several processes, such as the ranks of DDP, may share a folder. The object can be pickled, and
    used after a fork. Stale or damaged data is refused, and never used or repaired. See
    :mod:`at_fused.teacher_cache` for file format and limits.

    Args:
        folder: the folder of the databases; created if it does not exist.
        samples: the number of samples in the data set.

    Raises:
        TypeError, ValueError: ``folder`` is not a path, or ``samples`` not an int in [1, 2^63).
        OSError: ``folder`` cannot be created.
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
        """Return the maps and logits of a batch; missing ones are computed and stored.

        Args:
            compute: a function that takes the rows of ``x`` that are not stored, in order (``x``
                itself if no row is stored), and returns (maps, logits or None), each (b, ...) and
                floating point. Not called if all rows are stored.
            x: (B, ...), any dtype and device. A sample's bytes must be those it was stored with.
            index: (B,), a tensor or a sequence of ints: the samples' numbers. They may repeat.
            identity: :func:`at_fused.teacher_cache.teacher_hash` of the teacher and of the options
                of ``compute``; letters, digits, "-" and "_". The first 16 are in the file name.
            seed: the seed of the transform that made x.

        Returns:
            The maps and the logits (None if none were stored) of all rows of x, (B, ...), on its
            device, bit for bit and in the dtype that ``compute`` returned, without gradients.

        Raises:
            TypeError: an argument, or a result of ``compute``, has the wrong type.
            ValueError: shapes do not match, or numbers are out of range.
            StaleCacheError: the stored data is from another input, has other shapes or dtypes, or
                is damaged. A RuntimeError.
            OSError: the disk is full, or the file cannot be read and written.
        """
        if not callable(compute):
            raise TypeError(f"compute must be a function, got {type_name(compute)}")
        if check_dense("x", x).dim() == 0 or 0 in x.shape:
            raise ValueError(f"x must be (B, ...) and not empty, got shape {tuple(x.shape)}")
        numbers = self._numbers(index, x.shape[0])
        table = self._table(identity, seed)
        keys = list(zip(numbers, _fingerprints(x), strict=True))
        records = table.read(keys)
        missing = [row for row, record in enumerate(records) if record is None]
        if missing:
            rows = x if len(missing) == len(x) else x[torch.tensor(missing, device=x.device)]
            new = zip(missing, _to_records(compute(rows), len(missing)), strict=True)
            table.write([(keys[row][0], keys[row][1] + sample) for row, sample in new])
            # Read all samples, since another process may have stored some of them first.
            records = table.read(keys)
        arrays = {name: t.to(x.device) for name, t in _from_records(table.path, records).items()}
        logits = arrays.pop("logits", None)
        return list(arrays.values()), logits

    def stored(self, identity: str, seed: int = 0) -> int:
        """Return the number of samples stored for a teacher and a seed.

        Args:
            identity, seed: as in :meth:`fetch`.

        Returns:
            An int in [0, samples].

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
        items = numbers if isinstance(numbers, (list, tuple)) else ()
        if len(items) != batch or not all(is_int(i) and 0 <= i < self._samples for i in items):
            allowed = f"a tensor or sequence of {batch} ints in [0, {self._samples})"
            raise ValueError(f"index must be {allowed}, got {numbers!r:.80}")
        return list(items)

    def _table(self, identity: str, seed: int) -> _Table:
        seed = as_python("seed", seed)
        if not isinstance(identity, str) or not re.fullmatch(r"[0-9A-Za-z_-]+", identity):
            raise ValueError(f"identity must be letters, digits, '-' and '_', got {identity!r}")
        if not is_int(seed):
            raise TypeError(f"seed must be an int, got {type_name(seed)}")
        path = os.path.join(self._folder, f"{identity[:16]}-seed{seed}")
        return _Table(path, f"{_FORMAT} {sys.byteorder} {identity} {seed} {self._samples}")
