"""A teacher's maps and logits on disk, computed only once where the same inputs come again.

    cache = TeacherCache("cache", samples=len(dataset))
    identity = teacher_hash(teacher, "p=2")
    maps, logits = cache.fetch(compute, x, index, identity=identity, seed=epoch % 10)

One sub-folder for each teacher, with the options of its maps, and each transform of the inputs:

    <folder>/<identity[:16]>-seed<seed>/
        meta.json         format, byte order, identity, seed, samples; dtype and shape of each array
        map0.bin, ...     each pair's maps, (samples, ...)
        logits.bin        (samples, K), where there are logits
        fingerprint.bin   (samples,) int64: a hash of the input that the sample was made from
        checksum.bin      (samples,) int64: a hash of the sample's rows above; 0 where not stored

The binary files are mapped into memory, and all but the last are sparse: a sample takes room once
it is stored. Its checksum is written last, so a process that is killed before leaves the sample
unstored; where the machine fails before all of it is on the disk, the checksum refuses it.
Sub-folders appear complete, by a rename; ``*.tmp-*`` is what a process left that was killed while
it made one: delete it.

Any number of processes of one machine may use a folder at once (on Windows, which has no ``flock``,
one). Machines may not share it: network file systems do not keep their views of mapped files alike.

What remains: the hashes are against accidents, not forgery; and a file that is truncated in the
moment between the look at its size and its use ends the process (SIGBUS), as does a full disk where
there is no ``posix_fallocate`` (macOS).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import sys
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from at_fused._checks import check_tensor
from at_fused._numbers import as_python, is_whole, kind
from at_fused._store import (
    Layout,
    StaleCacheError,
    Store,
    at_file,
    check_inputs,
    create,
    read_meta,
    refusal,
    row_hashes,
)

__all__ = ["StaleCacheError", "TeacherCache", "TeacherHash", "teacher_hash"]

_FORMAT = 1
_OPEN = 8  # sub-folders kept open: seeds may be many


# ---- which teacher -------------------------------------------------------------------------------


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
        self._state: list[tuple[object, ...]] | None = None
        self._alive: list[weakref.ref[nn.Module] | weakref.ref[Tensor]] = []
        self._storages: list[StorageWeakRef] = []
        self._digest = ""

    def __call__(self, *options: object) -> str:
        """The hash, as :func:`teacher_hash` says.

        Args:
            options: as there.

        Returns:
            64 hexadecimal digits.

        Raises:
            TypeError, ValueError: as there.
        """
        shown = repr(options)
        if " at 0x" in shown:
            raise ValueError(f"options must be the same in every process, got {shown}")
        state, modules, tensors = self._look()
        # An id says nothing once its object is gone. The weak references to storages hold no
        # memory, but keep a new storage from having an old one's address.
        if state is None or state != self._state or any(ref() is None for ref in self._alive):
            self._digest = _digest(self._module)
            self._state = state
            self._alive = [*map(weakref.ref, modules), *map(weakref.ref, tensors)]
            self._storages = [StorageWeakRef(t.untyped_storage()) for t in tensors]
        return hashlib.sha256(f"{self._digest} {shown}".encode()).hexdigest()

    def _look(self) -> tuple[list[tuple[object, ...]] | None, list[nn.Module], list[Tensor]]:
        parts = [(name, part) for name, part in self._module.named_modules(remove_duplicate=False)]
        state: list[tuple[object, ...]] = [(name, id(part)) for name, part in parts]
        tensors = []
        for _, part in parts:
            for held in (part._parameters, part._buffers):
                for name, t in held.items():
                    if t is None:
                        continue
                    if t.is_inference():  # these have no version
                        return None, [], []
                    tensors.append(t)
                    storage, layout = t.untyped_storage()._cdata, (t.storage_offset(), t.stride())
                    state.append((name, id(t), t._version, storage, t.dtype, t.shape, layout))
        return state, [part for _, part in parts], tensors

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


def _computed(result: object, count: int) -> dict[str, Tensor]:
    """What ``compute`` returned, by name, on the CPU."""
    if not isinstance(result, tuple) or len(result) != 2:
        found = f"tuple of {len(result)}" if isinstance(result, tuple) else kind(result)
        raise TypeError(f"compute must return (maps, logits or None), got {found}")
    maps, logits = result
    if not isinstance(maps, (list, tuple)):
        raise TypeError(f"compute: maps must be a list or tuple of tensors, got {kind(maps)}")
    named = {f"map{i}": t for i, t in enumerate(maps)}
    if logits is not None:
        named["logits"] = logits
    if not named:
        raise ValueError("compute must return maps or logits, got neither")
    for name, t in named.items():
        what = f"compute: {name}"
        check_tensor(what, t)
        if name != "logits" and t.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{what} must be float32 or float64, got {t.dtype}")
        if t.dim() == 0 or t.shape[0] != count or (name == "logits" and t.dim() != 2):
            shape = f"({count}, {'K' if name == 'logits' else '...'})"
            raise ValueError(f"{what} must be {shape}, got shape {tuple(t.shape)}")
    return {name: t.detach().cpu() for name, t in named.items()}


# ---- the cache -----------------------------------------------------------------------------------


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
        if samples < 1:
            raise ValueError(f"samples must be an int >= 1, got {samples}")
        if samples >= 2**63:
            raise ValueError(f"samples must be an int below 2^63, got {samples}")
        self._folder, self._samples = os.path.abspath(folder), samples
        self._open: dict[tuple[str, int], Store] = {}
        try:
            with at_file(self._folder):
                os.makedirs(self._folder, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ValueError(f"folder must be a folder, got a file in {self._folder!r}") from None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._folder!r}, samples={self._samples})"

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self._folder, self._samples)

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
            index: (B,) int64, or a sequence of ints, the samples' numbers. Numbers may repeat.
            identity: :func:`at_fused.teacher_cache.teacher_hash` of the teacher and the options
                that decide what ``compute`` returns; letters, digits, "-" and "_". The first 16
                name a sub-folder.
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
            OSError: the disk is full, or the files may not be read and written.
        """
        if not callable(compute):
            raise TypeError(f"compute must be a function, got {kind(compute)}")
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {kind(x)}")
        if x.layout is not torch.strided:
            raise TypeError(f"x must be a dense tensor, got layout {x.layout}")
        if x.dim() == 0 or 0 in x.shape:
            raise ValueError(f"x must be (B, ...) and not empty, got shape {tuple(x.shape)}")
        numbers = torch.tensor(self._numbers(index, x.shape[0]), device="cpu")
        seed = as_python("seed", seed)
        path = self._path(identity, seed)
        prints = row_hashes(x, "x").cpu()
        # Of a number that repeats, the first row is stored.
        first: dict[int, int] = {}
        owners = [first.setdefault(i, row) for row, i in enumerate(numbers.tolist())]
        owner = torch.tensor(owners, device="cpu")
        check_inputs(path, numbers, prints[owner], prints)
        absent = torch.ones_like(numbers, dtype=torch.bool)
        if os.path.lexists(path):
            store = self._store(identity, seed)
            absent = store.marks[numbers] == 0
            if not absent.all():  # refused, if so, before anything is computed
                arrays = store.read(numbers[~absent], prints[~absent])
        if absent.any():
            rows = absent.nonzero()[:, 0]
            given = x if len(rows) == len(x) else x[rows.to(x.device)]
            computed = _computed(compute(given), len(rows))
            layout: Layout = {
                name: [str(t.dtype).removeprefix("torch."), *t.shape[1:]]
                for name, t in computed.items()
            }
            if not os.path.lexists(path):
                create(path, self._header(identity, seed), layout, self._samples)
            store = self._store(identity, seed)
            if store.layout != layout:
                raise refusal(os.path.join(path, "meta.json"), f"arrays {layout}", store.layout)
            once = owner[rows] == rows
            rows = rows[once]
            store.write(numbers[rows], prints[rows], {n: t[once] for n, t in computed.items()})
            arrays = store.read(numbers, prints)
        arrays = {name: t.to(x.device) for name, t in arrays.items()}
        logits = arrays.pop("logits", None)
        return list(arrays.values()), logits

    def stored(self, identity: str, seed: int = 0) -> int:
        """How many samples are stored for a teacher and a seed.

        Args:
            identity, seed: as in :meth:`fetch`.

        Returns:
            Their number, in [0, samples].

        Raises:
            TypeError, ValueError, StaleCacheError: as :meth:`fetch`.
        """
        seed = as_python("seed", seed)
        if not os.path.lexists(self._path(identity, seed)):
            return 0
        return int(self._store(identity, seed).marks.count_nonzero())

    def _numbers(self, index: Tensor | Sequence[int], batch: int) -> list[int]:
        if isinstance(index, Tensor):
            if index.dtype != torch.int64:
                raise TypeError(f"index must be int64 (numbers of samples), got {index.dtype}")
            shape, numbers = tuple(index.shape), index.flatten().tolist()
        else:
            numbers = as_python("index", index)
            if not isinstance(numbers, (list, tuple)):
                raise TypeError(f"index must be a tensor or a sequence of ints, got {kind(index)}")
            shape = (len(numbers),)
        if shape != (batch,):
            raise ValueError(f"index must be (B,), here ({batch},), got shape {shape}")
        for i in numbers:
            if not is_whole(i):
                raise TypeError(f"index must have ints only, got {kind(i)}")
            if not 0 <= i < self._samples:
                raise ValueError(f"index must have numbers in [0, {self._samples}), got {i}")
        return list(numbers)

    def _path(self, identity: str, seed: int) -> str:
        if not isinstance(identity, str):
            raise TypeError(f"identity must be a str, got {kind(identity)}")
        if not re.fullmatch(r"[0-9A-Za-z_-]+", identity):
            raise ValueError(f"identity must be letters, digits, '-' and '_', got {identity!r}")
        if not is_whole(seed):
            raise TypeError(f"seed must be an int, got {kind(seed)}")
        return os.path.join(self._folder, f"{identity[:16]}-seed{seed}")

    def _header(self, identity: str, seed: int) -> dict[str, object]:
        own = {"identity": identity, "seed": seed, "samples": self._samples}
        return {"format": _FORMAT, "byteorder": sys.byteorder} | own

    def _store(self, identity: str, seed: int) -> Store:
        """The open sub-folder: opened again where its files are others, or of other sizes, now."""
        store = self._open.pop((identity, seed), None)
        if store is None or store.signature != store.seen():
            path = self._path(identity, seed)
            store = Store(path, read_meta(path, self._header(identity, seed)), self._samples)
        self._open[identity, seed] = store  # last: the first to go are those not used for longest
        while len(self._open) > _OPEN:
            self._open.pop(next(iter(self._open)), None)
        return store
