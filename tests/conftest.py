"""What every test file shares: the back ends at hand, and quiet, repeatable randomness."""

from __future__ import annotations

import os
import random
import zlib
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

# Workers (pytest -n) share the cores: threads that spin while they wait keep others from theirs.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from simt_backend import simt

try:
    from hypothesis import settings
except ImportError:  # the GPU tests do without; the files that need it import it, and then fail
    settings = None

# Without a GPU the Triton kernels run in Triton's interpreter, which has to be known before Triton
# is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import at_fused
from at_fused.backends import cpu, triton

if not cpu.available():
    raise pytest.UsageError(
        f"the tests need the compiled library: {cpu.reason()}. Install the package, and run "
        "'pytest' rather than 'python -m pytest', which imports the checkout instead."
    )

# The same examples each time, so that a failure is a change. To look for new ones, 10,000 of them:
# pytest tests/test_properties.py --hypothesis-profile=search; --hypothesis-seed=N repeats a run.
if settings:
    settings.register_profile("same", derandomize=True, max_examples=150)
    settings.register_profile("search", max_examples=4000)
    settings.load_profile("same")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "hypothesis_seed", "") is None:
        config.option.hypothesis_seed = str(random.randrange(2**32))


def pytest_report_header(config: pytest.Config) -> str:
    return f"hypothesis seed: {getattr(config.option, 'hypothesis_seed', 'no hypothesis')}"


# CUDA's kernels in the harness: on a device so wide that even small samples are cut and several
# blocks meet, and on one so small that samples stay whole, few of them on chip.
SIMT = {
    "simt-wide": {"multiprocessors": 132},
    "simt-small": {"multiprocessors": 1, "shared": 40 << 10},
}
# Autograd starts with its first backward, with a thread for each device. torch.compile puts a fake
# one there: after that a process with these threads could not be forked.
torch.ones((), requires_grad=True).backward()

BACKENDS = [name for name, row in at_fused.backends().items() if row.available]


@contextmanager
def use(name: str) -> Iterator[str]:
    if name in SIMT:
        with simt(**SIMT[name]) as harness:
            yield name
            assert not harness.simt_last_error()
    else:
        with at_fused.use_backend(name):
            yield name


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Gives the next test the number of threads that this one had."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


def slow(name: str) -> bool:
    """Whether a back end is Triton's interpreter, which takes minutes for what others do in one."""
    return name == "triton" and triton.interpreted()


EVERY = [*BACKENDS, *SIMT]


def pytest_report_teststatus(
    report: pytest.CollectReport | pytest.TestReport, config: pytest.Config
) -> tuple[str, str, str] | None:
    """A shard says why a test fails when it does: what hangs later is killed, and says nothing."""
    if not report.failed or config.option.shard == (0, 1):
        return None
    word = "failed" if report.when == "call" else "error"
    return word, word[0].upper(), f"{word.upper()}\n{report.longreprtext}"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests in one worker, for what they share, until another has none left."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "of tests with many cases, each back end runs one in N: 1, 3 (default) or 9"
    parser.addoption("--one-in", type=int, choices=(1, 3, 9), default=3, metavar="N", help=text)
    text = "the I-th of N parts of the tests, I from 0: for processes without pytest-xdist"
    parser.addoption("--shard", type=shard, default=(0, 1), metavar="I/N", help=text)


def shard(text: str) -> tuple[int, int]:
    part, parts = map(int, text.split("/"))
    if not 0 <= part < parts:
        raise ValueError
    return part, parts


# Which third of a test's many cases a back end runs: the compiled libraries have all three.
THIRD = {"cpu": 0, "simt-wide": 1, "simt-small": 2, "eager": 1, "triton": 2}


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Generator[None, None, None]:
    """Divides a test's many cases among the back ends, then what -k and -m choose among shards.

    Each time alike, and in turn by name: cases of one test, which take as long, go to all shards.
    """

    def test(item: pytest.Item) -> Any:
        return getattr(item, "originalname", item.name), item.path

    def left_out(item: pytest.Item) -> bool:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        name = parameters.get("backend") or parameters.get("fast_backend")
        if name not in THIRD or test(item) not in many:
            return False
        parts = config.option.one_in
        if slow(name) and parts > 1:
            parts = 9
        return (zlib.crc32(item.name.replace(name, "").encode()) - THIRD[name]) % parts != 0

    def drop(dropped: set[pytest.Item]) -> None:
        if dropped:
            config.hook.pytest_deselected(items=list(dropped))
            items[:] = [item for item in items if item not in dropped]

    # What takes a minute comes first, for no worker to wait at the end.
    items.sort(key=lambda item: item.path.stem not in ("test_triton_compile", "test_sanitizers"))
    many = {name for name, n in Counter(map(test, items)).items() if n > 30}
    drop({item for item in items if left_out(item)})
    yield
    part, of = config.option.shard
    in_order = sorted(items, key=lambda item: item.nodeid)
    drop({item for i, item in enumerate(in_order) if i % of != part})


@pytest.fixture(params=[pytest.param(n, marks=[pytest.mark.long] * slow(n)) for n in EVERY])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on every back end that this machine has, and on CUDA's kernels."""
    with use(request.param) as name:
        yield name


@pytest.fixture(params=[n for n in EVERY if not slow(n)])
def fast_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """As ``backend``, for tests of thousands of calls or large tensors."""
    with use(request.param) as name:
        yield name


def opcheck(backend: str, operator: Any, arguments: tuple[Any, ...]) -> None:
    """``torch.library.opcheck``: autograd and compilers see the same of every back end."""
    same = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(operator, arguments, **({} if backend in ("cpu", "cuda") else same))


@pytest.fixture(autouse=True)
def repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    # Warnings of this package are errors here; the one-time warning has a test of its own.
    monkeypatch.setattr(at_fused._inputs, "_single_position_warned", True)
