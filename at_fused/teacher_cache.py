"""A teacher's maps and logits on disk, computed only once where the same inputs come again.

    cache = TeacherCache("cache", samples=len(dataset))
    identity = teacher_hash(teacher, "p=2")
    maps, logits = cache.fetch(compute, x, index, identity=identity, seed=epoch % 10)

One SQLite database, ``<folder>/<identity[:16]>-seed<seed>``, for each teacher, with the options of
its maps, and each transform of the inputs. Its table ``cache`` has a record for each sample that is
stored: a CRC-32 (4 bytes), a fingerprint of the sample's input (8 bytes), its maps, its logits;
and, as number -1, a CRC-32 and JSON: format, byte order, identity, seed, number of samples, and
the dtype and shape of each array.

A batch is stored whole or not at all, whatever ends the process. Where the machine itself fails
(SQLite is not told to wait for the disk), what is damaged is refused. Any number of processes of
one machine may use a folder at once; several machines may not, since network file systems do not
lock well enough. The hashes are against accidents, not forgery.
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
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakIdRef

from at_fused._arguments import DTYPES, check_dense, check_tensor
from at_fused._models import version_of
from at_fused._numbers import as_python, is_whole, kind

if TYPE_CHECKING:
    import sqlite3

__all__ = ["StaleCacheError", "TeacherCache", "TeacherHash", "teacher_hash"]

_FORMAT = 2
_PATIENCE = 600  # seconds to wait for other processes
_CHUNK = 1 << 22  # numbers hashed at once: an int64 temporary of 32 MiB
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}

# The dtype's name and a sample's shape, [name, *shape], of each array: as JSON has them.
Arrays = dict[str, list[Any]]


class StaleCacheError(RuntimeError):
    """A cache that is damaged, or was made from something else."""


# ---- which teacher, which input ------------------------------------------------------------------


class TeacherHash:
    """:func:`teacher_hash` of one module, computed again only where the module has changed.

    A call looks at each tensor's identity, version, storage, dtype and layout, and at which modules
    there are: it notices in-place updates, ``load_state_dict``, replaced tensors and modules,
    ``.data = ...``, and moves. It cannot notice what torch does not count, in-place updates through
    ``.data`` (``p.data.add_(1)``; ``p.detach().add_(1)`` is counted), nor a module's other
    attributes: make another TeacherHash after these. Keeps no memory of replaced tensors.

    Args:
        module: the teacher.

    Raises:
        TypeError: it is no module.
    """

    def __init__(self, module: nn.Module) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {kind(module)}")
        self._module = module
        self._state: list[tuple[object, ...]] = []
        self._digest = ""

    def __call__(self, *options: object) -> str:
        """Return :func:`teacher_hash` of the module.

        Args:
            options: as in :func:`teacher_hash`.

        Returns:
            A sha256, 64 hexadecimal digits.

        Raises:
            ValueError: an option whose text differs between processes.
        """
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
    for name, part in module.named_modules(remove_duplicate=False):
        # What a convolution's stride is, for one. Lists of parameters name their devices there.
        lists = isinstance(part, (nn.ParameterList, nn.ParameterDict))
        shown = "" if lists else re.sub(r" at 0x[0-9a-f]+", "", part.extra_repr())
        found.update(repr((name, type(part).__qualname__, shown)).encode())
    for named in (module.named_parameters, module.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            if is_traceable_wrapper_subclass(tensor):  # whose bytes are elsewhere
                raise TypeError(
                    f"module: {name!r} must be a tensor with bytes of its own, got "
                    f"{type(tensor).__name__}; hash or cache a teacher that is not sharded (FSDP), "
                    "nor quantised by tensors of another class"
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


def _to_bytes(result: Any, count: int) -> tuple[Arrays, list[bytes]]:
    """Return the arrays that ``compute`` returned, and the bytes of each sample's."""
    pair = isinstance(result, tuple) and len(result) == 2
    if not pair or not isinstance(result[0], (list, tuple)):
        found = f"({', '.join(map(kind, result))})" if isinstance(result, tuple) else kind(result)
        raise TypeError(f"compute must return (list or tuple of maps, logits or None), got {found}")
    maps, logits = result
    named = {f"map{i}": t for i, t in enumerate(maps)}
    if logits is not None:
        named["logits"] = logits
    if not named:
        raise ValueError("compute must return maps or logits, got neither")
    arrays, parts = {}, []
    for name, t in named.items():
        check_tensor(f"compute: {name}", t)
        of_logits = name == "logits"
        if not of_logits and t.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"compute: {name} must be float32 or float64, got {t.dtype}")
        if t.shape[:1] != (count,) or (of_logits and t.dim() != 2):
            shape = f"({count}, {'K' if of_logits else '...'})"
            raise ValueError(f"compute: {name} must be {shape}, got shape {tuple(t.shape)}")
        arrays[name] = [str(t.dtype).removeprefix("torch."), *t.shape[1:]]
        parts.append(t.detach().cpu().contiguous().reshape(count, -1).view(torch.uint8))
    return arrays, [ctypes.string_at(row.data_ptr(), len(row)) for row in torch.cat(parts, 1)]


def _to_tensors(records: list[bytes], arrays: Arrays) -> dict[str, Tensor]:
    rows = torch.frombuffer(bytearray().join(records), dtype=torch.uint8)
    rows, start, found = rows.view(len(records), -1), 8, {}
    for name, (dtype, *shape) in arrays.items():
        stop = start + math.prod(shape) * _DTYPES[dtype].itemsize
        # A copy, whose address is a multiple of any dtype's size.
        part = rows[:, start:stop].clone(memory_format=torch.contiguous_format)
        found[name], start = part.view(_DTYPES[dtype]).view(len(records), *shape), stop
    return found


# ---- the database --------------------------------------------------------------------------------


def _refusal(path: str, expected: object, found: object) -> StaleCacheError:
    return StaleCacheError(
        f"{path}: expected {expected}, found {found}. This cache is stale or damaged: delete it, "
        "give another folder, or use no cache"
    )


@contextmanager
def _transaction(path: str, begin: str) -> Iterator[sqlite3.Connection]:
    """Open the database for what is done whole or, after an error, not at all."""
    import sqlite3  # not before it is used: some Pythons lack it

    if os.path.isdir(path):
        raise _refusal(path, "a file", "a folder, as earlier versions made")
    try:
        with closing(sqlite3.connect(path, _PATIENCE, isolation_level=None)) as database:
            database.text_factory = bytes
            database.execute("PRAGMA synchronous = OFF")
            database.execute(f"BEGIN {begin}")
            yield database
            database.execute("COMMIT")
    except sqlite3.OperationalError as error:
        raise OSError(
            f"{path}: {error}; free some space, give another folder, or use no cache"
        ) from error
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # messages may quote the damage
        raise _refusal(path, "a whole database", error) from error


def _checksum(number: int, content: bytes) -> bytes:
    return zlib.crc32(content, zlib.crc32(b"%d" % number)).to_bytes(4, "little")


def _read(path: str, database: sqlite3.Connection, number: int) -> bytes | None:
    """Return what is stored under a number, or None where nothing is."""
    query = "SELECT record FROM cache WHERE number = ?"
    (record,) = database.execute(query, (number,)).fetchone() or (None,)
    if record is None:
        return None
    if isinstance(record, bytes) and record[:4] == _checksum(number, content := record[4:]):
        return content
    raise _refusal(path, f"record {number} as its checksum says", "another")


def _exchange(
    path: str,
    header: dict[str, object],
    prints: Sequence[tuple[int, bytes]] = (),
    new: Sequence[tuple[int, bytes]] | None = None,
) -> tuple[Arrays, list[bytes | None]]:
    """Store new samples, but those that are stored; return the arrays, and the samples' bytes.

    Samples are numbers with their inputs' fingerprints, and after these the bytes of their arrays.
    """
    if new is None and not os.path.lexists(path):
        return {}, [None] * len(prints)
    with _transaction(path, "DEFERRED" if new is None else "IMMEDIATE") as database:
        if new is not None:
            columns = "number INTEGER PRIMARY KEY, record BLOB"
            database.execute(f"CREATE TABLE IF NOT EXISTS cache ({columns})")
            rows = [(i, _checksum(i, x) + x) for i, x in [(-1, json.dumps(header).encode()), *new]]
            database.executemany("INSERT OR IGNORE INTO cache VALUES (?, ?)", rows)
        elif not database.execute("SELECT 1 FROM sqlite_master").fetchone():
            return {}, [None] * len(prints)  # a process was killed before it stored anything
        found = json.loads(_read(path, database, -1) or "{}")
        for key, value in header.items():
            if found.get(key) != value:
                raise _refusal(path, f"{key} {value!r}", repr(found.get(key)))
        records = [_read(path, database, i) for i, _ in prints]
        pairs = zip(prints, records, strict=True)
        other = [i for (i, given), record in pairs if record and record[:8] != given]
        if other:
            raise StaleCacheError(
                f"{path}: sample {other[0]} is not the input that the cache was made from "
                f"({len(other)} of {len(prints)} are not): its transform is random, or the data "
                "set changed. Seed the transform and give each seed as seed=, give another folder, "
                "or use no cache"
            )
        if new is not None and None in records:
            raise _refusal(path, "a record of each sample that was stored", "fewer")
        return found["arrays"], records


class TeacherCache:
    """A teacher's maps and logits of a data set, on disk.

    Several processes (DDP's ranks) may share a folder. Can be pickled, and used after a fork. What
    is stale or damaged is refused, never used, and never repaired. Layout and limits:
    :mod:`at_fused.teacher_cache`.

    Args:
        folder: made where it is absent.
        samples: how many samples the data set has.

    Raises:
        TypeError: an argument is not of the kind above.
        ValueError: ``samples`` < 1 or >= 2^63, or ``folder`` is a file.
    """

    def __init__(self, folder: str | os.PathLike[str], samples: int) -> None:
        if not isinstance(folder, (str, os.PathLike)):
            raise TypeError(f"folder must be a str or a path, got {kind(folder)}")
        samples = as_python("samples", samples)
        if not is_whole(samples):
            raise TypeError(f"samples must be an int >= 1, got {kind(samples)}")
        if not 1 <= samples < 2**63:
            raise ValueError(f"samples must be an int >= 1 and below 2^63, got {samples}")
        self._folder, self._samples = os.path.abspath(folder), samples
        try:
            os.makedirs(self._folder, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ValueError(f"folder must be a folder, got a file in {self._folder!r}") from None

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
            compute: a function that returns (maps, logits or None) of the rows of ``x`` that it is
                given: those that are not stored, in their order; ``x`` itself where none is. Not
                called where all are stored. Maps are (b, ...), float32 or float64; logits (b, K).
            x: (B, ...), on any device. A sample's bytes must be those that it was stored with.
            index: (B,), a tensor or a sequence of ints, the samples' numbers. They may repeat.
            identity: :func:`at_fused.teacher_cache.teacher_hash` of the teacher and the options
                that decide what ``compute`` returns; letters, digits, "-" and "_". The first 16
                name a file.
            seed: the seed of the transform that made x.

        Returns:
            The maps, (B, ...), and the logits, (B, K) (None if none were stored), of all rows of x,
            on its device, of the dtypes and bit for bit what ``compute`` returned, without
            gradients.

        Raises:
            TypeError: an argument, or what ``compute`` returns, is not of the kind above.
            ValueError: shapes that do not match; numbers out of range.
            StaleCacheError: what is stored was made from another input, with other shapes, dtypes,
                samples, teacher or format, or is damaged. A RuntimeError.
            OSError: the disk is full, or the file may not be read and written.
        """
        if not callable(compute):
            raise TypeError(f"compute must be a function, got {kind(compute)}")
        if check_dense("x", x).dim() == 0 or 0 in x.shape:
            raise ValueError(f"x must be (B, ...) and not empty, got shape {tuple(x.shape)}")
        numbers = self._numbers(index, x.shape[0])
        path, header = self._file(identity, seed)
        prints = list(zip(numbers, _fingerprints(x), strict=True))
        arrays, records = _exchange(path, header, prints)
        absent = [row for row, record in enumerate(records) if record is None]
        if absent:
            rows = x if len(absent) == len(x) else x[torch.tensor(absent, device=x.device)]
            header["arrays"], samples = _to_bytes(compute(rows), len(absent))
            given = (prints[row] for row in absent)
            new = [(i, mark + data) for (i, mark), data in zip(given, samples, strict=True)]
            # All samples again: other processes may have stored some meanwhile.
            arrays, records = _exchange(path, header, prints, new)
        found = _to_tensors([record for record in records if record], arrays)
        found = {name: t.to(x.device) for name, t in found.items()}
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
        path, header = self._file(identity, seed)
        if not _exchange(path, header)[0]:
            return 0
        with _transaction(path, "DEFERRED") as database:
            query = "SELECT COUNT(*) FROM cache WHERE number >= 0"
            return int(database.execute(query).fetchone()[0])

    def _numbers(self, index: Tensor | Sequence[int], batch: int) -> list[int]:
        numbers = as_python("index", index)
        if not isinstance(numbers, (list, tuple)) or not all(map(is_whole, numbers)):
            raise TypeError(f"index must be a tensor or a sequence of ints, got {index!r:.80}")
        if len(numbers) != batch:
            raise ValueError(f"index must be (B,), here ({batch},), got {len(numbers)} numbers")
        for i in numbers:
            if not 0 <= i < self._samples:
                raise ValueError(f"index must have numbers in [0, {self._samples}), got {i}")
        return list(numbers)

    def _file(self, identity: str, seed: int) -> tuple[str, dict[str, object]]:
        """Return the file of a teacher and a seed, and what its header has to say."""
        seed = as_python("seed", seed)
        if not isinstance(identity, str):
            raise TypeError(f"identity must be a str, got {kind(identity)}")
        if not re.fullmatch(r"[0-9A-Za-z_-]+", identity):
            raise ValueError(f"identity must be letters, digits, '-' and '_', got {identity!r}")
        if not is_whole(seed):
            raise TypeError(f"seed must be an int, got {kind(seed)}")
        header = {"identity": identity, "seed": seed, "samples": self._samples}
        path = os.path.join(self._folder, f"{identity[:16]}-seed{seed}")
        return path, {"format": _FORMAT, "byteorder": sys.byteorder} | header
