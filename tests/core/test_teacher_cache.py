"""``TeacherCache`` returns stored values bit for bit or raises, even after damage or a kill."""

from __future__ import annotations

import os
import pickle
import random
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from outside import output_of
from test_train_parallel import run_distributed
from torch import Tensor, nn
from train_runs import fork, kill_before_call, wait_for

from at_fused import TeacherCache, teacher_cache
from at_fused.teacher_cache import StaleCacheError, TeacherHash, teacher_hash

SAMPLES = 12
NAME = "0123456789abcdef-more"
Result = tuple[list[Tensor], Tensor | None]
X = torch.randn(SAMPLES, 3, 4, 4, generator=torch.Generator().manual_seed(1))


class Teacher:
    """A teacher that computes each sample independently of the rest of the batch."""

    def __init__(self, factor: float | Tensor = 1.0) -> None:
        self.factor, self.inputs = factor, []

    def __call__(self, x: Tensor) -> Result:
        self.inputs.append(x)
        rows = x.flatten(1) * self.factor
        return [rows, rows[:, :8].reshape(-1, 2, 4).double()], rows[:, :5].half()


def must_not_run(x: Tensor) -> Result:
    raise AssertionError("all samples are stored")


def check(actual: Result, expected: Result) -> None:
    """Require equal bits, dtypes, shapes and devices."""
    (maps, logits), (expected_maps, expected_logits) = actual, expected
    assert (logits is None) == (expected_logits is None)
    for a, b in zip([*maps, logits], [*expected_maps, expected_logits], strict=True):
        if a is not None:
            assert (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device)
            assert not a.requires_grad
            assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.fixture
def cache(tmp_path: Path) -> TeacherCache:
    return TeacherCache(tmp_path / "cache", SAMPLES)


def fill(cache: TeacherCache) -> Path:
    """Store all samples, and return the cache's file."""
    cache.fetch(Teacher(), X, range(SAMPLES), identity=NAME)
    return Path(cache._folder) / f"{NAME[:16]}-seed0"


# ---- stored values -------------------------------------------------------------------------------


def test_random_batches_match_a_dict(cache: TeacherCache) -> None:
    """For each teacher and seed, the first value stored for a sample stays."""
    draw = random.Random(0)
    factors: dict[tuple[str, int], dict[int, list[float]]] = {}
    for call in range(1, 100):
        batch = draw.choices(range(SAMPLES), k=draw.randint(1, 6))
        if call % 20 == 0:
            batch = [*range(SAMPLES)]
        key = identity, seed = draw.choice("ab") * 64, draw.randint(-1, 2)
        stored = factors.setdefault(key, {})
        absent = [i for i in batch if i not in stored]
        teacher, x = Teacher(call + torch.arange(len(absent))[:, None] / 8), X[batch]
        result = cache.fetch(
            teacher if absent else must_not_run,
            x,
            draw.choice((list, torch.tensor))(batch),
            identity=identity,
            seed=seed,
        )
        if absent:
            assert torch.equal(teacher.inputs[0], X[absent])
            assert (teacher.inputs[0] is x) == (absent == batch)
        for i, factor in zip(absent, teacher.factor.tolist(), strict=True):
            stored.setdefault(i, factor)
        check(result, Teacher(torch.tensor([stored[i] for i in batch]))(x))
        assert cache.stored(identity, seed) == len(stored)
        for tensor in (*result[0], result[1]):
            tensor.zero_()  # must not change the cache
    assert min(map(len, factors.values())) > 6
    assert cache.stored("ab", 99) == 0


DTYPES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("logits", [*DTYPES[1:4], None], ids=str)
@pytest.mark.parametrize("maps", [torch.float32, torch.float64], ids=str)
def test_all_bit_patterns_are_preserved(
    cache: TeacherCache, maps: torch.dtype, logits: torch.dtype | None
) -> None:
    def bits(dtype: torch.dtype, *shape: int) -> Tensor:
        """Return random bits: NaNs with payloads, infinities, subnormal numbers, both zeros."""
        raw = torch.randint(0, 256, (4, *shape, dtype.itemsize), dtype=torch.uint8)
        raw[0], raw[1] = 0xFF, 0
        return raw.view(dtype)[..., 0]

    scores = bits(logits, 9) if logits else None
    for seed, stages in enumerate([[bits(maps, 7), bits(maps, 1, 3, 2), bits(maps)], []]):
        if stages or logits:
            for compute in (lambda x, stages=stages: (stages, scores), must_not_run):
                result = cache.fetch(compute, X[:4], [11, 0, 5, 6], identity=NAME, seed=seed)
                check(result, (stages, scores))
    single = cache.fetch(must_not_run, X[2:3], [5], identity=NAME)
    batch = cache.fetch(must_not_run, X[:4], [11, 0, 5, 6], identity=NAME)
    check((single[0], None), ([x[2:3] for x in batch[0]], None))


def test_inference_mode_and_default_device(cache: TeacherCache) -> None:
    x = X[:4].clone().requires_grad_()
    for mode in (torch.inference_mode(), torch.device("meta")):
        with mode:
            result = cache.fetch(Teacher(), x, range(4), identity=NAME)
        check(result, Teacher()(X[:4]))


def test_repr_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cache = TeacherCache("a/b", samples=2**40)
    assert repr(cache) == f"TeacherCache('{tmp_path}/a/b', samples={2**40})"
    monkeypatch.chdir("/")
    cache.fetch(Teacher(), X[:3], [0, 1, 2**40 - 1], identity=NAME)
    assert os.listdir(tmp_path / "a/b") == ["0123456789abcdef-seed0"]
    assert (tmp_path / "a/b/0123456789abcdef-seed0").stat().st_size < 50_000
    assert cache.stored(NAME) == 3


# ---- inputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_are_identified_by_their_bytes_not_their_strides(
    cache: TeacherCache, dtype: torch.dtype
) -> None:
    raw = torch.randint(0, 256, (3, 5, 2, 2 * dtype.itemsize), dtype=torch.uint8)
    x = raw.view(dtype)
    expected = [torch.ones(3, 2)], None
    cache.fetch(lambda x: expected, x, [6, 2, 9], identity=NAME)
    for position in range(raw[0].numel()):
        changed = raw.clone()
        changed[1].view(-1)[position] ^= 1 << position % 8
        message = "sample 2 is not the input that the cache was made from.*random.*seed="
        with pytest.raises(StaleCacheError, match=message):
            cache.fetch(must_not_run, changed.view(dtype), [6, 2, 9], identity=NAME)
    with pytest.raises(StaleCacheError, match="sample 7 is not the input"):
        cache.fetch(lambda x: expected, x, [2, 7, 7], identity=NAME, seed=1)
    channels_last = torch.stack([x, x], 3)[..., 0, :].contiguous(memory_format=torch.channels_last)
    strided = torch.stack([x, x], 4)[..., 1]
    permuted = x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    for y in (channels_last, strided, permuted):
        check(cache.fetch(must_not_run, y, [6, 2, 9], identity=NAME), expected)


def test_fingerprints_match_stored_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Change ``_FORMAT`` if these numbers change, because files contain them."""
    x = torch.arange(8, dtype=torch.float32).view(2, 4)
    for chunk in (teacher_cache._CHUNK, 1):
        monkeypatch.setattr(teacher_cache, "_CHUNK", chunk)
        fingerprints = [f.hex() for f in teacher_cache._fingerprints(x)]
        assert fingerprints == ["ab6b9cbd706f5765", "650c7b1169c4fbcf"]
    inputs = [x, x.view(2, 2, 2), x.view(torch.int32), x.view(torch.uint8), -x, x.flip(1)]
    assert len({f for y in inputs for f in teacher_cache._fingerprints(y)}) == 12


# ---- damage --------------------------------------------------------------------------------------


def set_record(number: int, value: str) -> Callable[[Path], None]:
    """Return a function that sets a record of the file to an SQL expression."""

    def change(file: Path) -> None:
        with closing(sqlite3.connect(file)) as database, database:
            ((table,),) = database.execute("SELECT name FROM sqlite_master").fetchall()
            sql = value.replace("TABLE", f'"{table}"')
            database.execute(f'UPDATE "{table}" SET record = {sql} WHERE number = {number}')

    return change


# Damage to the file, and the error. A record's checksum covers its number, so "moved" fails.
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another file": (lambda f: f.write_text("mine" * 99), "not a valid database: file is"),
    "truncated": (
        set_record(4, "substr(record, 1, 99) || x'00'"),
        "record 4 does not match its check",
    ),
    "number": (set_record(4, "7"), "record 4 does not match its checksum"),
    "moved": (set_record(4, "(SELECT record FROM TABLE WHERE number = 5)"), "record 4 does not m"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_raises_and_leaves_the_file_unchanged(cache: TeacherCache, case: str) -> None:
    change, message = DAMAGE[case]
    file = fill(cache)
    change(file)
    before = file.read_bytes()
    for batch in (range(SAMPLES), [4, 4]):
        with pytest.raises(StaleCacheError, match=f"{file}: {message}.* delete it, use"):
            cache.fetch(Teacher(2), X[list(batch)], batch, identity=NAME)
    if "record 4" in message:
        check(cache.fetch(must_not_run, X[5:], range(5, SAMPLES), identity=NAME), Teacher()(X[5:]))
    else:
        with pytest.raises(StaleCacheError):
            cache.stored(NAME)
    assert file.read_bytes() == before


def test_random_damage_never_gives_wrong_values(cache: TeacherCache) -> None:
    """After flipped bits or overwritten or lost bytes, fetch raises or computes samples again."""
    file, draw = fill(cache), random.Random(0)
    content, errors = file.read_bytes(), []
    for count in range(120):
        at = draw.randrange(len(content))
        end = content[at + 300 :]
        flipped = bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
        damaged = (flipped, bytes(300) + end, b"", content[:300] + end)[count % 4]
        file.write_bytes(content[:at] + damaged)
        try:
            check(cache.fetch(Teacher(), X, range(SAMPLES), identity=NAME), Teacher()(X))
        except (StaleCacheError, OSError) as error:
            errors.append(str(error))
    assert len(errors) > 30
    assert all(message.startswith(f"{file}: ") for message in errors)


def test_caches_of_other_data_or_formats_are_ignored(
    cache: TeacherCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vary the number of samples, the identity of a file with the same name, and the format."""
    fill(cache)
    larger = TeacherCache(cache._folder, 13)
    check(larger.fetch(Teacher(2), X[:1], [0], identity=NAME), Teacher(2)(X[:1]))
    check(cache.fetch(Teacher(3), X[:1], [0], identity=f"{NAME}x"), Teacher(3)(X[:1]))
    assert (cache.stored(NAME), larger.stored(NAME), cache.stored(f"{NAME}x")) == (12, 1, 1)
    monkeypatch.setattr(teacher_cache, "_FORMAT", 4)
    assert cache.stored(NAME) == 0
    fill(cache).unlink()  # the cache creates the file again
    assert cache.stored(NAME) == 0


def test_samples_with_different_maps_raise(cache: TeacherCache) -> None:
    (a, b), logits = Teacher()(X[:2])
    results = ([a.reshape(-1, 6, 8), b], logits), ([a, b.float()], logits), ([a], logits)
    for seed, result in enumerate((*results, ([a, b], None))):
        cache.fetch(Teacher(), X[2:4], [2, 3], identity=NAME, seed=seed)
        with pytest.raises(StaleCacheError, match="missing, or differ in shape or dtype"):
            cache.fetch(lambda _, result=result: result, X[:4], range(4), identity=NAME, seed=seed)


def test_full_disk_raises_and_stores_nothing(
    cache: TeacherCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = sqlite3.connect

    def connect_small(*args: Any, **options: Any) -> sqlite3.Connection:
        database = connect(*args, **options)
        database.execute("PRAGMA max_page_count = 2")
        return database

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", connect_small)
        with pytest.raises(OSError, match=f"{cache._folder}/.* is full; free some disk space, use"):
            cache.fetch(lambda x: ([torch.ones(12, 4000)], None), X, range(12), identity=NAME)
    assert cache.stored(NAME) == 0
    check(cache.fetch(Teacher(), X, range(SAMPLES), identity=NAME), Teacher()(X))


# ---- other processes -----------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [[3, 1], [0, 1, 2, 3]], ids=["some", "all"])
def test_samples_stored_during_compute_are_kept(cache: TeacherCache, stored: list[int]) -> None:
    def compute(x: Tensor) -> Result:
        cache.fetch(Teacher(2), X[stored], stored, identity=NAME)  # as another process would
        return Teacher()(x)

    factors = torch.tensor([[2.0 if i in stored else 1.0] for i in range(4)])
    for function in (compute, must_not_run):
        check(cache.fetch(function, X[:4], range(4), identity=NAME), Teacher(factors)(X[:4]))


def test_concurrent_processes_fill_one_cache(cache: TeacherCache) -> None:
    def child(rank: int) -> None:
        draw = random.Random(rank)
        for _ in range(30):
            batch = draw.choices(range(SAMPLES), k=3)
            check(cache.fetch(Teacher(), X[batch], batch, identity=NAME), Teacher()(X[batch]))

    children = [fork(lambda rank=rank: child(rank)) for rank in range(3)]
    assert [wait_for(process) for process in children] == [0, 0, 0]
    assert cache.stored(NAME) == SAMPLES


def test_cache_and_hash_in_another_process(cache: TeacherCache, tmp_path: Path) -> None:
    """Check also that the teacher's hash does not depend on PYTHONHASHSEED."""
    model = net().bfloat16()
    cache.fetch(Teacher(), X, range(SAMPLES), identity=teacher_hash(model, "p", 2))
    (tmp_path / "arguments").write_bytes(pickle.dumps((cache, X, model)))
    code = """
import pickle
from at_fused.teacher_cache import teacher_hash
cache, x, model = pickle.load(open("arguments", "rb"))
result = cache.fetch(None.__eq__, x, range(12), identity=teacher_hash(model, "p", 2))
pickle.dump(result, open("result", "wb"))
"""
    output_of(tmp_path, "-c", code, PYTHONHASHSEED="5")
    check(pickle.loads((tmp_path / "result").read_bytes()), Teacher()(X))


@pytest.mark.parametrize("at", [0, 4, 7, 8, 15, 16])
def test_killed_at_any_step(cache: TeacherCache, at: int) -> None:
    """Kill the process before a checksum: of the 8 records stored, then of the 8 read back."""

    def child() -> None:
        kill_before_call(at, (teacher_cache, "_checksum"))
        cache.fetch(Teacher(), X[:8], range(8), identity=NAME)

    assert wait_for(fork(child)) == (-signal.SIGKILL if at < 16 else 0)
    assert cache.stored(NAME) == (8 if at >= 8 else 0)
    check(cache.fetch(Teacher(), X, range(SAMPLES), identity=NAME), Teacher()(X))


# ---- the teacher's hash --------------------------------------------------------------------------


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))


def test_hash_ignores_modes_hooks_strides_and_addresses() -> None:
    class ReprWithAddress(nn.Module):
        def extra_repr(self) -> str:
            return f"f={object()!r}"

    model = net()
    expected = teacher_hash(model, "p", 2)
    assert len(expected) == 64
    model.eval().requires_grad_(False)
    model[0].register_forward_hook(lambda *_: None)
    assert teacher_hash(model, "p", 2) == TeacherHash(model)("p", 2) == expected
    assert teacher_hash(net().to(memory_format=torch.channels_last), "p", 2) == expected
    assert teacher_hash(ReprWithAddress()) == teacher_hash(ReprWithAddress())
    different = [(), (1,), ("1",), (1.0,), (1, 2), ((1, 2),)]
    assert len({teacher_hash(model, *options) for options in different}) == len(different)
    with pytest.raises(ValueError, match="options must have the same repr in every"):
        teacher_hash(model, object())
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Module, got int"):
        teacher_hash(3)


def test_an_unchanged_teacher_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, digest = [], teacher_cache._digest
    monkeypatch.setattr(teacher_cache, "_digest", lambda m: (calls.append(1), digest(m))[1])
    model = net().eval()
    memo = TeacherHash(model)
    expected = memo("a")
    model(torch.randn(1, 3, 5, 5))
    assert memo("b") != expected
    model.train().requires_grad_(False)
    assert memo("a") == expected
    assert len(calls) == 1
    assert pickle.loads(pickle.dumps(memo))("a") == expected


CHANGES: dict[str, Callable[[nn.Sequential], Any]] = {
    "in place": lambda m: m[0].weight.detach().view(-1)[7].add_(1e-6),
    "load_state_dict": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),
    "statistics": lambda m: m.train()(torch.randn(2, 3, 5, 5)),
    "data": lambda m: setattr(m[0].weight, "data", m[0].weight.data + 1),
    "parameter": lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.detach() + 1)),
    "new buffer": lambda m: m[2].register_buffer("more", torch.zeros(1), persistent=False),
    "strides": lambda m: setattr(m[0].weight, "data", m[0].weight.data.transpose(2, 3)),
    "offset": lambda m: setattr(m[0].bias, "data", m[0].weight.data.view(-1)[4:8]),
    "there and back": lambda m: m.half().float(),
    "module": lambda m: m.__setitem__(2, nn.Tanh()),
    "order": lambda m: m.__init__(m[0], m[2], m[1], m[3]),
    "another module": lambda m: m.append(nn.ReLU()),
    "no bias": lambda m: m[0].register_parameter("bias", None),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_changed_teacher_is_hashed_again(case: str) -> None:
    model = net()
    memo = TeacherHash(model)
    before = memo()
    CHANGES[case](model)
    assert memo() == teacher_hash(model) != before


def test_hash_of_a_sharded_teacher_raises() -> None:
    """Require an error: a rank holds only a shard, and ranks may need to compute other samples."""

    def run(rank: int) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        teacher = fully_shard(nn.Linear(2, 3), mesh=init_device_mesh("cpu", (2,)))
        with pytest.raises(TypeError, match=r"'weight' must be .* own storage, got DTensor"):
            teacher_hash(teacher)

    assert run_distributed(2, run) == [0, 0]


def test_hash_of_a_teacher_made_in_inference_mode() -> None:
    """Inference tensors have no version counter, so each call must hash them."""
    with torch.inference_mode():
        model = net()
        memo = TeacherHash(model)
        before = memo()
        model[0].weight.add_(1)
        assert memo() != before


# ---- arguments -----------------------------------------------------------------------------------


M = torch.ones(2, 3)
ERRORS: dict[str, dict[str, Any]] = {
    "compute must be a function, got int": {"compute": 3},
    r"compute must return \(list or tuple of maps, .*got list": {"compute": lambda x: [M]},
    "compute must return maps or logits": {"compute": lambda x: ([], None)},
    "map1 must be float32, .*got torch.int64": {"compute": lambda x: ([M, M.long()], None)},
    r"logits must be \(2, ...\).*\(1, 3\)": {"compute": lambda x: ([M], M[:1])},
    "x must be a tensor, got list": {"x": [1]},
    "x must be a dense tensor": {"x": torch.eye(2).to_sparse()},
    r"x must be \(B, ...\) and not empty": {"x": M[:0]},
    r"sequence of 2 ints in \[0, 12\), got \[\[1.0, 1.0": {"index": M},
    r"index must be a tensor .* of 2 ints .*, got \[0\]": {"index": [0]},
    r"index must be a tensor .* of 2 ints .*, got \[0, 12\]": {"index": torch.tensor([0, 12])},
    r"index must be a tensor .* of 2 ints .*, got \[0, -1\]": {"index": torch.tensor([0, -1])},
    "identity must be letters, digits, '-' and '_', got 3": {"identity": 3},
    "identity must be letters, digits, '-' and '_', got '../a'": {"identity": "../a"},
    "seed must be an int, got float": {"seed": 1.0},
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_of_fetch(cache: TeacherCache, message: str) -> None:
    arguments = {"x": X[:2], "index": [0, 1], "identity": NAME} | ERRORS[message]
    with pytest.raises((TypeError, ValueError), match=message):
        cache.fetch(**{"compute": Teacher(), **arguments})
    assert cache.stored(NAME) == 0


def test_errors_of_the_constructor(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for samples in (0, 2**63, 2.0):
        with pytest.raises(ValueError, match=f"samples must be an int >= 1 .*, got {samples}"):
            TeacherCache(tmp_path / "new", samples)
    assert not (tmp_path / "new").exists()
    with pytest.raises(OSError, match=f"{tmp_path}/file"):
        TeacherCache(tmp_path / "file/under", 1)
    assert issubclass(StaleCacheError, RuntimeError)
