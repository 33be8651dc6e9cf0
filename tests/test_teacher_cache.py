"""The teacher's cache: what is stored is given back bit for bit, or refused, whatever happens."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pickle
import random
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from outside import output_of
from test_train_parallel import together
from torch import Tensor, nn
from train_runs import die_before, ended, in_child

from at_fused import TeacherCache, _store, teacher_cache
from at_fused.teacher_cache import StaleCacheError, TeacherHash, teacher_hash

SAMPLES = 12
NAME = "0123456789abcdef-more"
Result = tuple[list[Tensor], Tensor | None]


def inputs(samples: int = SAMPLES) -> Tensor:
    return torch.randn(samples, 3, 4, 4, generator=torch.Generator().manual_seed(1))


class Teacher:
    """Maps and logits of each row alone, so that a batch's are the same in any batch."""

    def __init__(self, factor: float | Tensor = 1.0) -> None:
        self.factor, self.given = factor, []

    def __call__(self, x: Tensor) -> Result:
        self.given.append(x)
        rows = x.flatten(1) * self.factor
        return [rows, rows[:, :8].reshape(-1, 2, 4).double()], rows[:, :5].half()


def never(x: Tensor) -> Result:
    raise AssertionError("all of these are stored")


def check(found: Result, right: Result) -> None:
    """The same bits, dtypes, shapes and devices."""
    (maps, logits), (right_maps, right_logits) = found, right
    assert (logits is None) == (right_logits is None)
    for a, b in zip([*maps, logits], [*right_maps, right_logits], strict=True):
        if a is not None:
            assert (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device)
            assert not a.requires_grad
            assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.fixture
def cache(tmp_path: Path) -> TeacherCache:
    return TeacherCache(tmp_path / "cache", SAMPLES)


def filled(cache: TeacherCache) -> Path:
    """All samples stored; their sub-folder."""
    cache.fetch(Teacher(), inputs(), range(SAMPLES), identity=NAME)
    return Path(cache._folder) / f"{NAME[:16]}-seed0"


def again(cache: TeacherCache) -> list[TeacherCache]:
    """The cache with its files open, and one that has yet to open them."""
    return [cache, pickle.loads(pickle.dumps(cache))]


# ---- what comes back -----------------------------------------------------------------------------


def test_any_sequence_of_batches(cache: TeacherCache) -> None:
    """Against a dict: the first row that a sample is given stays, of each teacher and seed."""
    draw, x = random.Random(0), inputs()
    right: dict[tuple[str, int], dict[int, list[float]]] = {}
    for call in range(1, 150):
        batch = draw.choices(range(SAMPLES), k=draw.randint(1, 6))
        if call % 20 == 0:
            batch = [*range(SAMPLES)]
        # Twelve sub-folders, more than are kept open.
        key = identity, seed = draw.choice("ab") * 64, draw.randint(-1, 4)
        known = right.setdefault(key, {})
        absent = [i for i in batch if i not in known]
        teacher, given = Teacher(call + torch.arange(len(absent))[:, None] / 8), x[batch]
        maps, logits = draw.choice(again(cache)).fetch(
            teacher if absent else never,
            given,
            draw.choice((list, torch.tensor))(batch),
            identity=identity,
            seed=seed,
        )
        if absent:
            assert torch.equal(teacher.given[0], x[absent])
            assert (teacher.given[0] is given) == (absent == batch)
        for i, factor in zip(absent, teacher.factor.tolist(), strict=True):
            known.setdefault(i, factor)
        check((maps, logits), Teacher(torch.tensor([known[i] for i in batch]))(given))
        assert cache.stored(identity, seed) == len(known)
        for mine in (*maps, logits):
            mine.zero_()
    assert min(map(len, right.values())) > 6
    assert cache.stored("ab", 99) == 0
    assert len(cache._open) == teacher_cache._OPEN


DTYPES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize(
    ("maps", "logits"),
    [(m, t) for m in (torch.float32, torch.float64, None) for t in (*DTYPES[1:4], None) if m or t],
    ids=str,
)
def test_the_bits_come_back(
    cache: TeacherCache, maps: torch.dtype | None, logits: torch.dtype | None
) -> None:
    # Random bits: NaNs with payloads, infinities, subnormal numbers, both zeros.
    def bits(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
        raw[0], raw[1] = 0xFF, 0
        return raw.view(dtype)[..., 0]

    right = (
        [bits(shape, maps) for shape in ((4, 7), (4, 1, 3, 2), (4,)) if maps],
        bits((4, 9), logits) if logits else None,
    )
    x, index = inputs()[:4], [11, 0, 5, 6]
    check(cache.fetch(lambda x: right, x, index, identity=NAME), right)
    for one in again(cache):
        check(one.fetch(never, x, index, identity=NAME), right)


def test_modes_and_the_default_device(cache: TeacherCache) -> None:
    x = inputs().requires_grad_()
    with torch.inference_mode():
        cache.fetch(Teacher(), x[:2], [0, 1], identity=NAME)
    right = Teacher()(x[:4].detach())
    for one in again(cache):
        with torch.device("meta"):
            found = one.fetch(Teacher(), x[:4], range(4), identity=NAME)
        check(found, right)
    with torch.no_grad():
        check(cache.fetch(never, x[:4], range(4), identity=NAME), right)


def test_absent_samples_take_no_room(tmp_path: Path) -> None:
    cache, x = TeacherCache(tmp_path, 10**6), inputs()
    index = [0, 999_999, *range(500_000, 500_010)]
    check(cache.fetch(Teacher(), x, index, identity=NAME), Teacher()(x))
    (folder,) = tmp_path.iterdir()
    assert sum(file.stat().st_size for file in folder.iterdir()) > 250 * 10**6
    taken = {file.name: file.stat().st_blocks * 512 for file in folder.iterdir()}
    assert 8 * 10**6 <= taken.pop("checksum.bin") < 9 * 10**6
    assert sum(taken.values()) < 10**6


# Each file, and its bytes of a sample.
ROW = {"map0.bin": 192, "map1.bin": 64, "logits.bin": 10, "fingerprint.bin": 8, "checksum.bin": 8}


def test_repr_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cache = TeacherCache("a/b", samples=3)
    assert repr(cache) == f"TeacherCache('{tmp_path}/a/b', samples=3)"
    monkeypatch.chdir("/")
    cache.fetch(Teacher(), inputs()[:3], [0, 1, 2], identity=NAME)
    assert os.listdir(tmp_path / "a/b") == ["0123456789abcdef-seed0"]
    assert {*os.listdir(tmp_path / "a/b/0123456789abcdef-seed0")} == {*ROW, "meta.json"}
    for one in again(cache):
        assert repr(one) == repr(cache)
        assert one.stored(NAME) == 3


# ---- inputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_changed_byte_is_another_input_and_other_strides_are_not(
    cache: TeacherCache, dtype: torch.dtype
) -> None:
    raw = torch.randint(0, 256, (3, 5, 2, 2 * dtype.itemsize), dtype=torch.uint8)
    x = raw.view(dtype)
    with pytest.raises(StaleCacheError, match="sample 7 is not the input"):
        cache.fetch(never, x, [2, 7, 7], identity=NAME)
    right = [torch.ones(3, 2)], None
    cache.fetch(lambda x: right, x, [6, 2, 9], identity=NAME)
    for place in range(raw[0].numel()):
        changed = raw.clone()
        changed[1].view(-1)[place] ^= 1 << place % 8
        message = "sample 2 is not the input that the cache was made from .1 of 3.*random.*seed="
        with pytest.raises(StaleCacheError, match=message):
            cache.fetch(never, changed.view(dtype), [6, 2, 9], identity=NAME)
    assert cache.stored(NAME) == 3
    last = torch.stack([x, x], 3)[..., 0, :].contiguous(memory_format=torch.channels_last)
    odd = torch.stack([x, x], 4)[..., 1]
    for same in (last, odd, x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)):
        for one in again(cache):
            check(one.fetch(never, same, [6, 2, 9], identity=NAME), right)


def test_fingerprints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored caches have these numbers: others need another format."""
    x = torch.arange(8, dtype=torch.float32).view(2, 4)
    right = [-2175622316265835352, -8541282024382568498]
    assert _store.row_hashes(x, "x").tolist() == right
    monkeypatch.setattr(_store, "_CHUNK", 1)
    assert _store.row_hashes(x, "x").tolist() == right
    x = torch.randn(1, 4, 6)
    others = [x, x.view(1, 6, 4), x.view(1, 24), x.view(torch.int32), x.view(torch.uint8)]
    signs = [1.0 - 2.0 * torch.tensor([n >> k & 1 for k in range(24)]) for n in range(1, 300)]
    others += [x * sign.view(1, 4, 6) for sign in signs]
    assert len({int(_store.row_hashes(y, "x")) for y in others}) == len(others)


# ---- damage --------------------------------------------------------------------------------------

Change = Callable[[Path], Any]


def edited(file: str, change: Callable[[bytes], bytes]) -> Change:
    """A file with other bytes in the place of its own."""

    def edit(folder: Path) -> None:
        data = change((folder / file).read_bytes())
        if file == "meta.json":  # a new one: within its clock's tick a change does not show
            (folder / file).unlink()
        (folder / file).write_bytes(data)

    return edit


def of_meta(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Change:
    return edited("meta.json", lambda data: json.dumps(change(json.loads(data))).encode())


def of_arrays(**changes: Any) -> Change:
    return of_meta(lambda meta: meta | {"arrays": meta["arrays"] | changes})


def of_rows(change: Callable[[list[bytes]], list[bytes]], *files: str) -> Change:
    """Files with other rows."""

    def edit(folder: Path) -> None:
        for file in files:
            data, size = (folder / file).read_bytes(), ROW[file]
            rows = [data[i : i + size] for i in range(0, len(data), size)]
            (folder / file).write_bytes(b"".join(change(rows)))

    return edit


def in_row(change: Callable[[bytes], bytes], file: str) -> Change:
    return of_rows(lambda rows: [*rows[:4], change(rows[4]), *rows[5:]], file)


def file_in_its_place(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("mine")


NO_META = "meta.json: expected the JSON of a cache, found "
OTHER_ROWS = "checksum.bin: expected checksum .* of sample {}'s rows"
# What is done to the sub-folder, and the refusal.
DAMAGE: dict[str, tuple[Change, str]] = {
    "a file in its place": (file_in_its_place, f"{NO_META}NotADirectory"),
    "meta gone": (lambda folder: (folder / "meta.json").unlink(), f"{NO_META}FileNotFound"),
    "meta cut": (edited("meta.json", lambda data: data[:-1]), f"{NO_META}JSONDecodeError"),
    "a list": (edited("meta.json", lambda data: b"[]"), f"{NO_META}list"),
    "format": (of_meta(lambda m: m | {"format": 2}), "expected format 1, found 2"),
    "seed": (of_meta(lambda m: m | {"seed": 5}), "expected seed 0, found 5"),
    "no arrays": (of_meta(lambda m: m | {"arrays": {}}), "expected arrays by name, found {}"),
    "name": (of_arrays(**{"../map0": ["float32", 48]}), "found ../map0: "),
    "array": (of_arrays(map0=7), "found map0: 7"),
    "dtype": (of_arrays(map0=["int8", 48]), r"found map0: \['int8', 48\]"),
    "size": (of_arrays(map0=["float32", 49]), "map0.bin: expected 2352 bytes, found 2304"),
    # Of the same size: the checksums have shapes and dtypes in them, and the order of the arrays.
    "shape": (of_arrays(map0=["float32", 6, 8]), OTHER_ROWS.format(0)),
    "width": (of_arrays(map0=["float64", 24]), OTHER_ROWS.format(0)),
    "order": (
        of_meta(lambda m: m | {"arrays": dict(reversed(m["arrays"].items()))}),
        OTHER_ROWS.format(0),
    ),
    # Each sample's number is in its checksum: moved rows are not another sample's.
    "moved": (of_rows(lambda rows: [rows[1], rows[0], *rows[2:]], *ROW), OTHER_ROWS.format(0)),
}
for file, size in ROW.items():
    expected = f"{file}: expected {12 * size} bytes, found "
    DAMAGE |= {
        f"{file} gone": (lambda folder, file=file: (folder / file).unlink(), f"{expected}no file"),
        f"{file} empty": (edited(file, lambda data: b""), f"{expected}0"),
        f"{file} cut": (edited(file, lambda data: data[:-1]), f"{expected}{12 * size - 1}"),
        f"{file} longer": (edited(file, lambda data: data + b"."), f"{expected}{12 * size + 1}"),
        f"{file}, first byte": (
            in_row(lambda row: bytes([row[0] ^ 0x40]) + row[1:], file),
            OTHER_ROWS.format(4),
        ),
        f"{file}, last byte": (
            in_row(lambda row: row[:-1] + bytes([row[-1] ^ 0x40]), file),
            OTHER_ROWS.format(4),
        ),
    }
    # As after a power failure: the mark reached the disk, a page of another file did not.
    if file != "checksum.bin":
        change = in_row(lambda row: bytes(len(row)), file)
        DAMAGE[f"{file}, never written"] = change, OTHER_ROWS.format(4)


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_refused_and_stays(cache: TeacherCache, case: str) -> None:
    change, message = DAMAGE[case]
    x, folder = inputs(), filled(cache)
    change(folder)
    before = {file.name: file.read_bytes() for file in folder.glob("*")}
    for one in again(cache):
        with pytest.raises(StaleCacheError, match=f"{folder}/.*{message}"):
            one.fetch(Teacher(), x, range(SAMPLES), identity=NAME)
        if message.startswith("checksum.bin: expected checksum"):
            assert one.stored(NAME) == SAMPLES
        else:
            with pytest.raises(StaleCacheError, match=f"{folder}/.*{message}"):
                one.stored(NAME)
        if "sample 4" in message:
            check(one.fetch(never, x[5:], range(5, SAMPLES), identity=NAME), Teacher()(x[5:]))
    assert {file.name: file.read_bytes() for file in folder.glob("*")} == before


def test_written_but_not_marked_is_computed_again(cache: TeacherCache) -> None:
    x = inputs()
    of_rows(lambda rows: [*rows[:7], bytes(8), *rows[8:]], "checksum.bin")(filled(cache))
    teacher = Teacher(3)
    found = cache.fetch(teacher, x, range(SAMPLES), identity=NAME)
    assert [given.tolist() for given in teacher.given] == [x[7:8].tolist()]
    factors = torch.tensor([[3.0 if i == 7 else 1.0] for i in range(SAMPLES)])
    check(found, Teacher(factors)(x))


def test_a_cache_of_other_samples_or_another_teacher_is_refused(cache: TeacherCache) -> None:
    x, folder = inputs(), filled(cache)
    for samples in (SAMPLES - 1, SAMPLES + 1):
        other = TeacherCache(cache._folder, samples)
        message = f"meta.json: expected samples {samples}, found 12. .* delete {folder}, give"
        with pytest.raises(StaleCacheError, match=message):
            other.fetch(never, x[:1], [0], identity=NAME)
    with pytest.raises(StaleCacheError, match=f"expected identity '{NAME}x', found '{NAME}'"):
        cache.fetch(never, x[:1], [0], identity=f"{NAME}x")


@pytest.mark.parametrize(
    "change",
    [
        lambda a, b, logits: ([a.reshape(-1, 6, 8), b], logits),
        lambda a, b, logits: ([a, b.float()], logits),
        lambda a, b, logits: ([a], logits),
        lambda a, b, logits: ([a, b], None),
    ],
    ids=["shape", "dtype", "fewer", "no logits"],
)
def test_other_maps_than_stored_ones_are_refused(cache: TeacherCache, change: Any) -> None:
    x = inputs()
    maps, logits = Teacher()(x[:2])
    cache.fetch(Teacher(), x[2:4], [2, 3], identity=NAME)
    for one in again(cache):
        with pytest.raises(StaleCacheError, match=r"meta.json: expected arrays \{'map0'.*found \{"):
            one.fetch(lambda _: change(*maps, logits), x[:4], range(4), identity=NAME)
        assert one.stored(NAME) == 2


def test_a_deleted_folder_is_made_anew_and_a_replaced_file_opened_again(
    cache: TeacherCache,
) -> None:
    x, folder = inputs(), filled(cache)
    shutil.rmtree(folder)
    assert cache.stored(NAME) == 0
    cache.fetch(Teacher(3), x[:2], [0, 1], identity=NAME)
    check(cache.fetch(never, x[:2], [0, 1], identity=NAME), Teacher(3)(x[:2]))
    path = folder / "checksum.bin"
    new = path.with_suffix(".new")
    new.write_bytes(bytes(path.stat().st_size))
    os.replace(new, path)
    assert cache.stored(NAME) == 0
    check(cache.fetch(Teacher(2), x, range(SAMPLES), identity=NAME), Teacher(2)(x))


def test_a_full_disk_is_an_error_and_marks_nothing(
    cache: TeacherCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, calls = inputs(), []

    def full(descriptor: int, offset: int, size: int) -> None:
        calls.append(size)
        if len(calls) > 40:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="No space left"):
            cache.fetch(Teacher(), x, range(SAMPLES), identity=NAME)
    assert cache.stored(NAME) == 0
    check(cache.fetch(Teacher(), x, range(SAMPLES), identity=NAME), Teacher()(x))


@pytest.mark.parametrize(
    ("owner", "call", "at", "file"),
    [
        (os, "mkdir", 0, ""),
        (_store, "open", 0, "/map0.bin"),
        (_store, "open", 2, "/logits.bin"),
        (os, "posix_fallocate", 0, "/checksum.bin"),
        (os, "fsync", 0, "/meta.json"),
        (os, "rename", 0, ""),
        (_store, "open", 6, "/meta.json"),  # to read it
        (_store, "open", 8, "/map1.bin"),  # to map it
        (os, "open", 0, "/checksum.bin"),
        (fcntl, "flock", 0, "/checksum.bin"),
        (os, "posix_fallocate", 1, "/map0.bin"),
    ],
)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_an_error_of_the_disk_names_the_file(
    owner: Any,
    call: str,
    at: int,
    file: str,
    number: int,
    cache: TeacherCache,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original, calls = getattr(owner, call, open), []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == at + 1:
            raise OSError(number, os.strerror(number))
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, call, failing, raising=False)
        with pytest.raises(OSError, match="give another folder, or use no cache") as caught:
            cache.fetch(Teacher(), inputs(), range(SAMPLES), identity=NAME)
    assert caught.value.errno == number
    assert caught.value.filename == f"{cache._folder}/{NAME[:16]}-seed0{file}"
    assert ("free some space" in str(caught.value)) == (number == errno.ENOSPC)
    assert cache.stored(NAME) == 0


# ---- other processes -----------------------------------------------------------------------------


@pytest.mark.parametrize("theirs", [[3, 1], [0, 1, 2, 3]], ids=["some", "all"])
@pytest.mark.parametrize("when", ["computed", "moved to its place"])
def test_what_another_process_stores_meanwhile_stays(
    cache: TeacherCache, theirs: list[int], when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, (_, other), index = inputs(), again(cache), [0, 1, 2, 3]
    rename = os.rename

    def meanwhile() -> None:
        monkeypatch.undo()
        other.fetch(Teacher(2), x[theirs], theirs, identity=NAME)

    def compute(given: Tensor) -> Result:
        if when == "computed":
            meanwhile()
        return Teacher()(given)

    monkeypatch.setattr(os, "rename", lambda *paths: (meanwhile(), rename(*paths)))
    factors = torch.tensor([[2.0 if i in theirs else 1.0] for i in index])
    for one, function in ((cache, compute), (other, never)):
        found = one.fetch(function, x[index], index, identity=NAME)
        check(found, Teacher(factors)(x[index]))
    assert len(os.listdir(cache._folder)) == 1  # nothing half made


def test_another_input_that_another_process_stores_meanwhile_is_refused(
    cache: TeacherCache,
) -> None:
    x, (_, other) = inputs(), again(cache)

    def compute(given: Tensor) -> Result:
        other.fetch(Teacher(), x[1:2], [0], identity=NAME)
        return Teacher()(given)

    with pytest.raises(StaleCacheError, match="sample 0 is not the input"):
        cache.fetch(compute, x[:1], [0], identity=NAME)


@pytest.mark.parametrize(
    ("meanwhile", "samples"),
    [(fcntl.LOCK_EX, 4), (fcntl.LOCK_SH, 8)],
    ids=["reading while one writes", "writing while one reads"],
)
def test_who_comes_meanwhile_waits(cache: TeacherCache, meanwhile: int, samples: int) -> None:
    x, found = inputs(), []
    cache.fetch(Teacher(), x[:4], range(4), identity=NAME)

    def fetch() -> None:
        found.append(cache.fetch(Teacher(), x[:samples], range(samples), identity=NAME))

    with open(Path(cache._folder) / f"{NAME[:16]}-seed0/checksum.bin") as stream:
        fcntl.flock(stream, meanwhile)
        thread = threading.Thread(target=fetch)
        thread.start()
        thread.join(0.3)
        assert found == []
        fcntl.flock(stream, fcntl.LOCK_UN)
        thread.join(60)
    check(found[0], Teacher()(x[:samples]))


def test_pickled_to_a_fresh_process(cache: TeacherCache, tmp_path: Path) -> None:
    """Also: a teacher's hash is the same there, whatever Python's own hashes are seeded with."""
    x, model = inputs(), net().bfloat16()
    cache.fetch(Teacher(), x, range(SAMPLES), identity=teacher_hash(model, "p", 2))
    (tmp_path / "given").write_bytes(pickle.dumps((cache, x, model)))
    code = """
import pickle
from at_fused.teacher_cache import teacher_hash
cache, x, model = pickle.load(open("given", "rb"))
found = cache.fetch(None.__eq__, x, range(12), identity=teacher_hash(model, "p", 2))
pickle.dump(found, open("found", "wb"))
"""
    output_of(tmp_path, "-c", code, PYTHONHASHSEED="5")
    check(pickle.loads((tmp_path / "found").read_bytes()), Teacher()(x))


# The calls of a first fetch of eight samples, before each of which a process may end.
STEPS = [(os, "mkdir"), (os, "fsync"), (os, "rename"), (os, "posix_fallocate")]
STEPS += [(Tensor, "index_copy_")]
CALLS = 4 + 8 * 5 + 5


@pytest.mark.parametrize("at", [*range(5), CALLS // 2, *range(CALLS - 6, CALLS + 1)])
def test_killed_at_any_step(cache: TeacherCache, at: int) -> None:
    x = inputs()

    def child() -> None:
        die_before(at, *STEPS)
        cache.fetch(Teacher(), x[:8], range(8), identity=NAME)

    assert ended(in_child(child)) == (-signal.SIGKILL if at < CALLS else 0)
    # The last call is that of the marks.
    assert cache.stored(NAME) == (8 if at == CALLS else 0)
    check(cache.fetch(Teacher(), x, range(SAMPLES), identity=NAME), Teacher()(x))


# ---- the teacher's hash --------------------------------------------------------------------------


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))


def test_what_the_hash_leaves_out() -> None:
    model = net()
    right = teacher_hash(model, "p", 2)
    assert len(right) == 64
    assert set(right) <= set("0123456789abcdef")
    model.eval().requires_grad_(False)
    model[0].register_forward_hook(lambda *_: None)
    model[1].register_forward_pre_hook(lambda *_: None)
    assert teacher_hash(model, "p", 2) == right
    assert teacher_hash(net().to(memory_format=torch.channels_last), "p", 2) == right
    assert TeacherHash(model)("p", 2) == right
    shown = [(), (1,), ("1",), (1.0,), (1, 2), ((1, 2),)]
    assert len({teacher_hash(model, *options) for options in shown}) == len(shown)


def test_lists_of_parameters_and_addresses() -> None:
    class Shown(nn.Module):
        def extra_repr(self) -> str:
            return f"f={object()!r}"

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.ParameterList([torch.randn(2), torch.randn(3)]), Shown())

    assert teacher_hash(make()) == teacher_hash(make())
    with pytest.raises(ValueError, match="options must be the same in every process, got"):
        teacher_hash(make(), object())
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Module, got int"):
        teacher_hash(3)


def test_an_unchanged_teacher_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    times, digest = [], teacher_cache._digest
    monkeypatch.setattr(teacher_cache, "_digest", lambda m: (times.append(1), digest(m))[1])
    model = net().eval()
    memo = TeacherHash(model)
    right = memo("a")
    for _ in range(3):
        model(torch.randn(1, 3, 5, 5))
        assert memo("a") == right
    assert memo("b") != right
    model.train().requires_grad_(False)
    assert memo("a") == right
    assert len(times) == 1
    assert pickle.loads(pickle.dumps(memo))("a") == right


def step(model: nn.Sequential) -> None:
    model(torch.randn(2, 3, 5, 5)).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()


NOTICED: dict[str, Callable[[nn.Sequential], Any]] = {
    "in place": lambda m: m[0].weight.detach().view(-1)[7].add_(1e-6),
    "optimiser": step,
    "load_state_dict": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),
    "load by assignment": lambda m: m.load_state_dict(
        {k: v + 1 for k, v in m.state_dict().items()}, assign=True
    ),
    "statistics": lambda m: m.train()(torch.randn(2, 3, 5, 5)),
    "data": lambda m: setattr(m[0].weight, "data", m[0].weight.data + 1),
    "parameter": lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.detach() + 1)),
    "buffer": lambda m: setattr(m[1], "running_mean", m[1].running_mean + 1),
    "new buffer": lambda m: m[2].register_buffer("more", torch.zeros(1), persistent=False),
    "view": lambda m: setattr(m[0].weight, "data", m[0].weight.data.flip(0)),
    "shape": lambda m: setattr(m[0].weight, "data", m[0].weight.data.reshape(4, 27, 1, 1)),
    "strides": lambda m: setattr(m[0].weight, "data", m[0].weight.data.transpose(2, 3)),
    "offset": lambda m: setattr(m[0].bias, "data", m[0].weight.data.view(-1)[4:8]),
    "dtype": lambda m: m.half(),
    "there and back": lambda m: m.half().float(),
    "module": lambda m: m.__setitem__(2, nn.Tanh()),
    "order": lambda m: m.__init__(m[0], m[2], m[1], m[3]),
    "more": lambda m: m.append(nn.ReLU()),
    "again": lambda m: m.append(m[2]),
    "no bias": lambda m: m[0].register_parameter("bias", None),
}
# What torch does not count: another TeacherHash is for these.
UNNOTICED: dict[str, Callable[[nn.Sequential], Any]] = {
    "in place through data": lambda m: m[0].bias.data.view(torch.int32)[3].bitwise_xor_(1),
    "attribute": lambda m: setattr(m[0], "stride", (2, 2)),
}


@pytest.mark.parametrize("case", [*NOTICED, *UNNOTICED])
def test_a_changed_teacher_is_hashed_again(case: str) -> None:
    model = net()
    memo = TeacherHash(model)
    before = memo()
    (NOTICED | UNNOTICED)[case](model)
    right = teacher_hash(model)
    assert right != before
    assert memo() == (right if case in NOTICED else before)


def test_a_new_object_never_passes_for_an_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it has the address or the id of one that is gone, as memory is used again."""
    model = nn.Linear(64, 64)
    memo = TeacherHash(model)
    memo()
    old = model.weight.untyped_storage()._cdata
    model.weight.data = torch.zeros(64, 64)
    later = [torch.zeros(64, 64).untyped_storage() for _ in range(300)]
    assert old not in {storage._cdata for storage in later}
    monkeypatch.setattr(teacher_cache, "id", lambda _: 0, raising=False)
    test_a_changed_teacher_is_hashed_again("module")


def test_tied_parameters_count_by_each_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    tied = teacher_hash(model)
    model[1].weight = nn.Parameter(model[0].weight.detach().clone())
    assert teacher_hash(model) == tied
    model[1].weight = None
    assert teacher_hash(model) != tied


def test_a_sharded_teacher_is_refused() -> None:
    """A process has a part of its weights, and would run it alone for what is not stored."""

    def member(rank: int) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        teacher = fully_shard(nn.Linear(2, 3), mesh=init_device_mesh("cpu", (2,)))
        with pytest.raises(TypeError, match=r"'weight' must be .* of its own, got DTensor"):
            teacher_hash(teacher)

    assert together(2, member) == [0, 0]


def test_a_teacher_made_in_inference_mode() -> None:
    """Its tensors have no versions: hashed each time."""
    with torch.inference_mode():
        model = net()
        memo = TeacherHash(model)
        before = memo()
        model[0].weight.add_(1)
        assert memo() != before


# ---- arguments -----------------------------------------------------------------------------------

X = inputs()[:2]


def run(cache: TeacherCache, **changes: Any) -> Any:
    given = {"compute": Teacher(), "x": X, "index": [0, 1], "identity": NAME, "seed": 0} | changes
    return cache.fetch(given.pop("compute"), given.pop("x"), given.pop("index"), **given)


def returning(result: Any) -> dict[str, Any]:
    return {"compute": lambda x: result}


M = torch.ones(2, 3)
ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "an error of compute": ({"compute": never}, AssertionError, "all of these are stored"),
    "compute": ({"compute": 3}, TypeError, "compute must be a function, got int"),
    "x": ({"x": [1]}, TypeError, "x must be a tensor, got list"),
    "x sparse": ({"x": torch.eye(2).to_sparse()}, TypeError, "x must be a dense tensor"),
    "index dtype": ({"index": M[:, 0]}, TypeError, "index must be int64 .* got torch.float32"),
    "index rank": (
        {"index": torch.ones(2, 1, dtype=torch.int64)},
        ValueError,
        r"index must be \(B,\), here \(2,\), got shape \(2, 1\)",
    ),
    "index large": ({"index": torch.tensor([0, 12])}, ValueError, r"in \[0, 12\), got 12"),
    "identity": ({"identity": 3}, TypeError, "identity must be a str, got int"),
    "seed": ({"seed": 1.0}, TypeError, "seed must be an int, got float"),
    "no tuple": (returning([M]), TypeError, r"compute must return \(maps, .*got list"),
    "maps": (returning((M, None)), TypeError, "compute: maps must be a list or tuple .*got Tensor"),
    "nothing": (returning(([], None)), ValueError, "compute must return maps or logits"),
    "map dtype": (returning(([M, M.half()], None)), TypeError, "map1 must be float32 or float64"),
    "map rows": (returning(([M[:1]], None)), ValueError, r"map0 must be \(2, ...\).*\(1, 3\)"),
    "logits dtype": (returning(([M], M.long())), TypeError, "logits must be float32, float16"),
    "logits rank": (returning(([M], M[:, 0])), ValueError, r"logits must be \(2, K\)"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(cache: TeacherCache, case: str) -> None:
    changes, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        run(cache, **changes)
    assert cache.stored(NAME) == 0
    assert os.listdir(cache._folder) == []


def test_errors_of_the_constructor(tmp_path: Path) -> None:
    for samples, error, message in [
        (0, ValueError, "samples must be an int >= 1, got 0"),
        (-3, ValueError, "samples must be an int >= 1, got -3"),
        (2**63, ValueError, "samples must be an int below 2.63, got 9223372036854775808"),
        (2.0, TypeError, "samples must be an int >= 1, got float"),
        (True, TypeError, "samples must be an int >= 1, got bool"),
    ]:
        with pytest.raises(error, match=message):
            TeacherCache(tmp_path / "new", samples)
    assert not (tmp_path / "new").exists()
    with pytest.raises(TypeError, match="folder must be a str or a path, got int"):
        TeacherCache(3, 1)
    assert issubclass(StaleCacheError, RuntimeError)
    (tmp_path / "file").write_text("mine")
    for folder in ("file", "file/under"):
        with pytest.raises(ValueError, match="folder must be a folder, got a file in"):
            TeacherCache(tmp_path / folder, 1)


def test_more_samples_than_a_file_holds(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path, 2**62)
    with pytest.raises(OSError, match=rf"File too large .*{tmp_path}/t-seed0/map0.bin"):
        cache.fetch(lambda x: ([x], None), torch.ones(2, 3), [0, 1], identity="t")
    assert not any(tmp_path.iterdir())
