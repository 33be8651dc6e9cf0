"""The teacher's cache: what is stored is given back bit for bit, or refused, whatever happens."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from at_fused import TeacherCache, _store, teacher_cache
from at_fused.teacher_cache import StaleCacheError, TeacherHash, teacher_hash

SAMPLES = 12
NAME = "0123456789abcdef-more"
FORK = multiprocessing.get_context("fork")
Result = tuple[list[Tensor], Tensor | None]


def inputs(samples: int = SAMPLES) -> Tensor:
    return torch.randn(samples, 3, 4, 4, generator=torch.Generator().manual_seed(1))


class Teacher:
    """Maps and logits of each row alone, so that a batch's are the same in any batch."""

    def __init__(self, factor: float = 1.0) -> None:
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
    assert len(maps) == len(right_maps)
    assert (logits is None) == (right_logits is None)
    pairs = list(zip(maps, right_maps, strict=True))
    if logits is not None and right_logits is not None:
        pairs.append((logits, right_logits))
    for a, b in pairs:
        assert (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device)
        assert not a.requires_grad
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.fixture
def cache(tmp_path: Path) -> TeacherCache:
    return TeacherCache(tmp_path / "cache", SAMPLES)


def filled(cache: TeacherCache, seed: int = 0) -> Path:
    """All samples stored; their sub-folder."""
    x = inputs()
    cache.fetch(Teacher(), x, range(SAMPLES), identity=NAME, seed=seed)
    return Path(cache._folder) / f"{NAME[:16]}-seed{seed}"


def again(cache: TeacherCache) -> list[TeacherCache]:
    """The cache with its files open, and one that has yet to open them."""
    return [cache, pickle.loads(pickle.dumps(cache))]


def in_child(run: Callable[[], Any]) -> int:
    """Runs it in a fork; its exit status, negative for a signal."""
    child = FORK.Process(target=run)
    child.start()
    child.join(60)
    child.kill()
    child.join()
    assert child.exitcode is not None
    return child.exitcode


FILES = ["map0.bin", "map1.bin", "logits.bin", "fingerprint.bin", "checksum.bin", "meta.json"]
ROW = {"map0.bin": 192, "map1.bin": 64, "logits.bin": 10, "fingerprint.bin": 8, "checksum.bin": 8}


# ---- what comes back -----------------------------------------------------------------------------


def test_miss_partial_and_hit(cache: TeacherCache) -> None:
    x, teacher = inputs(), Teacher()
    first, y = torch.tensor([7, 2, 9]), x[[7, 2, 9]]
    check(cache.fetch(teacher, y, first, identity=NAME), Teacher()(y))
    assert teacher.given[0] is y
    assert cache.stored(NAME) == 3
    index = [4, 9, 0, 7, 5]
    check(cache.fetch(teacher, x[index], index, identity=NAME), Teacher()(x[index]))
    assert torch.equal(teacher.given[1], x[[4, 0, 5]])
    assert cache.stored(NAME) == 6
    index = [5, 7, 2, 0, 9, 4]
    for one in again(cache):
        check(one.fetch(never, x[index], index, identity=NAME), Teacher()(x[index]))


def test_of_a_repeated_sample_the_first_row_is_stored(cache: TeacherCache) -> None:
    x, index = inputs(), [3, 1, 3, 3, 1]
    rows = torch.arange(5.0)[:, None]  # a teacher whose rows depend on the batch
    for _ in range(2):
        found = cache.fetch(lambda x: ([rows], rows), x[index], index, identity=NAME)
        check(found, ([rows[[0, 1, 0, 0, 1]]], rows[[0, 1, 0, 0, 1]]))


def test_any_sequence_of_batches(cache: TeacherCache) -> None:
    """Against a dict: the first value that a sample is given stays."""
    draw, x, right = random.Random(0), inputs(), {}
    teacher = Teacher()
    for call in range(60):
        batch, seed = draw.choices(range(SAMPLES), k=draw.randint(1, 6)), draw.randint(0, 3)
        teacher.factor = 1.0 + call
        maps, logits = cache.fetch(teacher, x[batch], batch, identity=NAME, seed=seed)
        for row, i in enumerate(batch):
            factor = right.setdefault((seed, i), teacher.factor)
            check(([m[row] for m in maps], logits[row]), rows_of(Teacher(factor)(x[i : i + 1])))
    assert len(set(right.values())) > 10
    for seed in range(4):
        assert cache.stored(NAME, seed) == sum(key[0] == seed for key in right)


def rows_of(result: Result) -> Result:
    maps, logits = result
    assert logits is not None
    return [m[0] for m in maps], logits[0]


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


def test_seeds_and_teachers_are_apart(cache: TeacherCache) -> None:
    """More of them than are kept open."""
    x, index = inputs()[:3], [0, 1, 2]
    cases = [("a" * 64, seed) for seed in range(-1, 2 * teacher_cache._OPEN)] + [("b" * 64, 0)]
    for number, (identity, seed) in enumerate(cases):
        cache.fetch(Teacher(number), x + number, index, identity=identity, seed=seed)
    for number, (identity, seed) in enumerate(cases):
        for one in again(cache):
            found = one.fetch(never, x + number, index, identity=identity, seed=seed)
            check(found, Teacher(number)(x + number))
    assert cache.stored("a" * 64, 99) == 0
    assert len(cache._open) == teacher_cache._OPEN


def test_results_are_the_callers_own(cache: TeacherCache) -> None:
    x = inputs()
    filled(cache)
    maps, logits = cache.fetch(never, x, range(SAMPLES), identity=NAME)
    assert logits is not None
    for t in (*maps, logits):
        t.zero_()
    check(cache.fetch(never, x, range(SAMPLES), identity=NAME), Teacher()(x))


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


def test_repr_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cache = TeacherCache("a/b", samples=3)
    assert repr(cache) == f"TeacherCache('{tmp_path}/a/b', samples=3)"
    monkeypatch.chdir("/")
    cache.fetch(Teacher(), inputs()[:3], [0, 1, 2], identity=NAME)
    assert os.listdir(tmp_path / "a/b") == ["0123456789abcdef-seed0"]
    assert sorted(os.listdir(tmp_path / "a/b/0123456789abcdef-seed0")) == sorted(FILES)
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


@pytest.mark.parametrize("how", ["empty", "cut", "longer", "gone"])
@pytest.mark.parametrize("file", FILES)
def test_files_of_other_sizes_are_refused(cache: TeacherCache, file: str, how: str) -> None:
    x, path = inputs(), filled(cache) / file
    size = path.stat().st_size
    if how == "gone":
        path.unlink()
    else:
        os.truncate(path, {"empty": 0, "cut": size - 1, "longer": size + 1}[how])
    message = "the JSON of a cache, found" if file == "meta.json" else f"{size} bytes, found"
    for one in again(cache):
        for call in (
            lambda one=one: one.fetch(Teacher(), x, range(SAMPLES), identity=NAME),
            lambda one=one: one.stored(NAME),
        ):
            with pytest.raises(StaleCacheError, match=f"{file}: expected {message}"):
                call()
    if how != "gone":
        assert path.stat().st_size != size
    else:
        assert not path.exists()


@pytest.mark.parametrize("where", ["first", "last", "never written"])
@pytest.mark.parametrize("file", FILES[:-1])
def test_damaged_bytes_are_refused(cache: TeacherCache, file: str, where: str) -> None:
    """Also after a power failure: the mark reached the disk, a page of another file did not."""
    x, path, size = inputs(), filled(cache) / file, ROW[file]
    data = bytearray(path.read_bytes())
    if where == "never written" and file != "checksum.bin":
        data[4 * size : 5 * size] = bytes(size)
    else:
        data[4 * size + (0 if where == "first" else size - 1)] ^= 0x40
    path.write_bytes(data)
    for one in again(cache):
        with pytest.raises(StaleCacheError, match=r"checksum.bin: expected .* of sample 4's rows"):
            one.fetch(never, x[3:6], [3, 4, 5], identity=NAME)
        check(one.fetch(never, x[5:], range(5, SAMPLES), identity=NAME), Teacher()(x[5:]))


def test_written_but_not_marked_is_computed_again(cache: TeacherCache) -> None:
    x, path = inputs(), filled(cache) / "checksum.bin"
    with open(path, "r+b") as stream:
        stream.seek(7 * 8)
        stream.write(bytes(8))
    teacher = Teacher(3)
    maps, _ = cache.fetch(teacher, x, range(SAMPLES), identity=NAME)
    assert [given.tolist() for given in teacher.given] == [x[7:8].tolist()]
    assert torch.equal(maps[0][7], x[7].flatten() * 3)
    assert torch.equal(maps[0][6], x[6].flatten())


def test_rows_in_anothers_place_are_refused(cache: TeacherCache) -> None:
    """Each sample's number is in its checksum: moved rows are not another sample's."""
    x, folder = inputs(), filled(cache)
    for file, size in ROW.items():
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[size : 2 * size] + data[:size] + data[2 * size :])
    with pytest.raises(StaleCacheError, match="of sample 0's rows"):
        TeacherCache(cache._folder, SAMPLES).fetch(never, x[[1, 0]], [0, 1], identity=NAME)


METAS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "format": (lambda m: m | {"format": 2}, "expected format 1, found 2"),
    "seed": (lambda m: m | {"seed": 5}, "expected seed 0, found 5"),
    "text": (lambda m: "{", "expected the JSON of a cache, found JSONDecodeError"),
    "no arrays": (lambda m: m | {"arrays": {}}, "expected arrays by name, found {}"),
    "name": (lambda m: arrays(m, **{"../map0": ["float32", 48]}), "found ../map0: "),
    "array": (lambda m: arrays(m, map0=7), "found map0: 7"),
    "dtype": (lambda m: arrays(m, map0=["int8", 48]), "found map0: \\['int8', 48\\]"),
    "size": (lambda m: arrays(m, map0=["float32", 49]), "map0.bin: expected 2352 bytes, found 23"),
    # Of the same size: the checksums have shapes and dtypes in them, and the order of the arrays.
    "shape": (lambda m: arrays(m, map0=["float32", 6, 8]), "checksum.bin: expected checksum"),
    "width": (lambda m: arrays(m, map0=["float64", 24]), "checksum.bin: expected checksum"),
    "order": (
        lambda m: m | {"arrays": dict(reversed(m["arrays"].items()))},
        "checksum.bin: expected checksum",
    ),
}


def arrays(meta: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return meta | {"arrays": meta["arrays"] | changes}


@pytest.mark.parametrize("case", METAS)
def test_another_meta_is_refused(cache: TeacherCache, case: str) -> None:
    x, path = inputs(), filled(cache) / "meta.json"
    change, message = METAS[case]
    made = change(json.loads(path.read_text()))
    if not isinstance(made, (str, bytes)):
        made = json.dumps(made)
    new = path.with_suffix(".new")
    new.write_bytes(made.encode() if isinstance(made, str) else made)
    os.replace(new, path)
    for one in again(cache):
        with pytest.raises(StaleCacheError, match=message) as caught:
            one.fetch(never, x, range(SAMPLES), identity=NAME)
        assert str(path.parent) in str(caught.value)


def test_a_cache_of_other_samples_or_another_teacher_is_refused(cache: TeacherCache) -> None:
    x, folder = inputs(), filled(cache)
    for samples in (SAMPLES - 1, SAMPLES + 1):
        other = TeacherCache(cache._folder, samples)
        message = f"meta.json: expected samples {samples}, found 12. .* delete {folder}, give"
        for call in (
            lambda other=other: other.fetch(never, x[:1], [0], identity=NAME),
            lambda other=other: other.stored(NAME),
        ):
            with pytest.raises(StaleCacheError, match=message):
                call()
    with pytest.raises(StaleCacheError, match=f"expected identity '{NAME}x', found '{NAME}'"):
        cache.fetch(never, x[:1], [0], identity=f"{NAME}x")


@pytest.mark.parametrize("change", ["shape", "dtype", "fewer", "no logits"])
def test_other_maps_than_stored_ones_are_refused(cache: TeacherCache, change: str) -> None:
    x = inputs()
    cache.fetch(Teacher(), x[:3], range(3), identity=NAME)

    def compute(x: Tensor) -> Result:
        maps, logits = Teacher()(x)
        if change == "shape":
            maps[0] = maps[0].reshape(-1, 6, 8)
        if change == "dtype":
            maps[1] = maps[1].float()
        return maps[: 1 if change == "fewer" else 2], None if change == "no logits" else logits

    for one in again(cache):
        with pytest.raises(StaleCacheError, match=r"meta.json: expected arrays \{'map0'.*found \{"):
            one.fetch(compute, x[:5], range(5), identity=NAME)
        assert one.stored(NAME) == 3


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


def test_a_file_in_the_sub_folders_place_is_refused(cache: TeacherCache) -> None:
    Path(cache._folder, f"{NAME[:16]}-seed0").write_text("mine")
    with pytest.raises(StaleCacheError, match="expected the JSON of a cache, found NotADirectory"):
        cache.fetch(never, inputs(), range(SAMPLES), identity=NAME)


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


# ---- other processes -----------------------------------------------------------------------------


@pytest.mark.parametrize("theirs", [[3, 1], [0, 1, 2, 3]], ids=["some", "all"])
def test_what_another_process_stores_meanwhile_stays(
    cache: TeacherCache, theirs: list[int]
) -> None:
    x, (_, other), index = inputs(), again(cache), [0, 1, 2, 3]

    def compute(given: Tensor) -> Result:
        other.fetch(Teacher(2), x[theirs], theirs, identity=NAME)
        return Teacher()(given)

    factors = torch.ones(4)
    factors[theirs] = 2.0
    for one, function in ((cache, compute), (other, never)):
        maps, _ = one.fetch(function, x[index], index, identity=NAME)
        assert torch.equal(maps[0], x[index].flatten(1) * factors[:, None])


def test_another_input_that_another_process_stores_meanwhile_is_refused(
    cache: TeacherCache,
) -> None:
    x, (_, other) = inputs(), again(cache)

    def compute(given: Tensor) -> Result:
        other.fetch(Teacher(), x[1:2], [0], identity=NAME)
        return Teacher()(given)

    with pytest.raises(StaleCacheError, match="sample 0 is not the input"):
        cache.fetch(compute, x[:1], [0], identity=NAME)


@pytest.mark.parametrize("other", ["reads", "writes"])
def test_who_comes_while_one_writes_waits(cache: TeacherCache, other: str) -> None:
    x = inputs()
    cache.fetch(Teacher(), x[:4], range(4), identity=NAME)
    inside, calls = FORK.Event(), FORK.RawValue("i", 0)

    def child() -> None:
        whole = Tensor.index_copy_

        def slow(self: Tensor, *args: Any) -> Tensor:
            inside.set()
            time.sleep(0.05)
            calls.value += 1
            return whole(self, *args)

        Tensor.index_copy_ = slow
        cache.fetch(Teacher(2), x[4:8], range(4, 8), identity=NAME)

    process = FORK.Process(target=child)
    process.start()
    assert inside.wait(30)
    if other == "reads":
        check(cache.fetch(never, x[:4], range(4), identity=NAME), Teacher()(x[:4]))
    else:
        # Not stored yet when looked for, but before its own are: the first ones stay.
        found = cache.fetch(Teacher(3), x[4:8], range(4, 8), identity=NAME)
        check(found, Teacher(2)(x[4:8]))
    assert calls.value == 5
    process.join(60)
    assert process.exitcode == 0
    check(cache.fetch(never, x[4:8], range(4, 8), identity=NAME), Teacher(2)(x[4:8]))


def test_pickled_to_a_fresh_process(cache: TeacherCache) -> None:
    """Also: a teacher's hash is the same there, whatever Python's own hashes are seeded with."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).bfloat16()
    x, identity = inputs(), teacher_hash(net, "p", 2)
    cache.fetch(Teacher(), x, range(SAMPLES), identity=identity)
    right = Teacher()(x)
    code = """
import pickle, sys, torch
from torch import nn
cache, x = pickle.load(sys.stdin.buffer)
from at_fused.teacher_cache import teacher_hash
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).bfloat16()
found = cache.fetch(None.__eq__, x, list(range(12)), identity=teacher_hash(net, "p", 2))
sys.stdout.buffer.write(pickle.dumps(found))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=pickle.dumps((cache, x)),
        capture_output=True,
        check=False,
        env=os.environ | {"PYTHONHASHSEED": "5"},
        cwd=Path(teacher_cache.__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr.decode()
    check(pickle.loads(done.stdout), right)


def test_processes_at_once(cache: TeacherCache) -> None:
    """Each makes its own values: what is stored has whole rows of one, and all see the same."""
    count, x = 4, inputs(64)
    cache = TeacherCache(cache._folder, 64)
    barrier, seen = FORK.Barrier(count), FORK.SimpleQueue()

    def child(number: int) -> None:
        draw, own = random.Random(number), {}
        for seed in range(5):
            barrier.wait(30)
            order = draw.sample(range(64), 64)
            for start in range(0, 64, 16):
                batch = order[start : start + 16]
                teacher = Teacher(1.0 + number)
                maps, logits = cache.fetch(teacher, x[batch], batch, identity=NAME, seed=seed)
                for row, i in enumerate(batch):
                    own[seed, i] = float(maps[0][row, 0] / x[i].view(-1)[0])
                    factor = round(own[seed, i])
                    right = rows_of(Teacher(factor)(x[i : i + 1]))
                    check(([m[row] for m in maps], logits[row]), right)
        seen.put({key: round(factor) for key, factor in own.items()})

    children = [FORK.Process(target=child, args=(number,)) for number in range(count)]
    for process in children:
        process.start()
    for process in children:
        process.join(60)
    assert [process.exitcode for process in children] == [0] * count
    found = [seen.get() for _ in range(count)]
    assert all(one == found[0] for one in found)
    assert len(found[0]) == 5 * 64
    assert not list(Path(cache._folder).glob("*.tmp-*"))


# The steps of a first fetch, at each of which a process may end: the functions, and which call.
STEPS: list[tuple[Any, str, int]] = [
    (os, "mkdir", 1),
    (os, "fsync", 1),
    (os, "rename", 1),
    (os, "posix_fallocate", 1),
    (os, "posix_fallocate", 20),
    *[(Tensor, "index_copy_", call) for call in range(1, 6)],
]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", STEPS, ids=lambda s: f"{s[1]}-{s[2]}")
def test_killed_at_any_step(cache: TeacherCache, step: tuple[Any, str, int], after: bool) -> None:
    owner, name, at = step
    original, x = getattr(owner, name), inputs()

    def child() -> None:
        calls = []

        def dying(*args: Any, **kwargs: Any) -> Any:
            calls.append(0)
            if len(calls) == at and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            done = original(*args, **kwargs)
            if len(calls) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return done

        setattr(owner, name, dying)
        cache.fetch(Teacher(), x[:8], range(8), identity=NAME)

    assert in_child(child) == -signal.SIGKILL
    # The last index_copy_ is that of the marks.
    assert cache.stored(NAME) == (8 if step == STEPS[-1] and after else 0)
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


@pytest.fixture
def rehashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that all parameters were read."""
    times, digest = [], teacher_cache._digest

    def counted(module: nn.Module) -> str:
        times.append(1)
        return digest(module)

    monkeypatch.setattr(teacher_cache, "_digest", counted)
    return times


def test_an_unchanged_teacher_is_hashed_once(rehashed: list[int]) -> None:
    model = net().eval()
    memo = TeacherHash(model)
    right = memo("a")
    for _ in range(3):
        model(torch.randn(1, 3, 5, 5))
        assert memo("a") == right
    assert memo("b") != right
    model.train().requires_grad_(False)
    assert memo("a") == right
    assert len(rehashed) == 1
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


def test_a_new_storage_never_passes_for_an_old_one() -> None:
    """Memory is used again: an address says nothing, unless what was there is kept track of."""
    model = nn.Linear(64, 64)
    memo = TeacherHash(model)
    memo()
    old = model.weight.untyped_storage()._cdata
    for _ in range(300):
        model.weight.data = torch.zeros(64, 64)
        assert model.weight.untyped_storage()._cdata != old
    model.weight.data = torch.ones(64, 64)
    assert memo() == teacher_hash(model)


def test_a_new_module_or_tensor_never_passes_for_an_old_one(
    monkeypatch: pytest.MonkeyPatch, rehashed: list[int]
) -> None:
    """As where it has the id of one that is gone."""
    monkeypatch.setattr(teacher_cache, "id", lambda _: 0, raising=False)
    model = net()
    memo = TeacherHash(model)
    memo()
    model[2] = nn.ReLU()
    memo()
    model[0].weight = nn.Parameter(model[0].weight.data)
    memo()
    memo()
    assert len(rehashed) == 3


def test_a_move_is_hashed_again_to_the_same(rehashed: list[int]) -> None:
    model = net()
    memo = TeacherHash(model)
    before = memo()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()  # as a move to another device does
    assert memo() == before
    assert len(rehashed) == 2


def test_tied_parameters_count_by_each_name() -> None:
    def make() -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        model[1].weight.data.copy_(model[0].weight.data)
        return model

    tied, less = make(), make()
    tied[1].weight = tied[0].weight
    assert teacher_hash(tied) == teacher_hash(make())
    less[1].weight = None
    assert teacher_hash(tied) != teacher_hash(less)


def test_a_teacher_made_in_inference_mode(rehashed: list[int]) -> None:
    """Its tensors have no versions: hashed each time."""
    with torch.inference_mode():
        model = net()
    memo = TeacherHash(model)
    before = memo()
    with torch.inference_mode():
        model[0].weight.add_(1)
    assert memo() != before
    assert len(rehashed) == 2


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
    with pytest.raises(OSError, match="File too large"):
        cache.fetch(lambda x: ([x], None), torch.ones(2, 3), [0, 1], identity="t")
    assert not any(tmp_path.iterdir())
