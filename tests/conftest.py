"""Fixtures and hooks shared by all tests."""

from __future__ import annotations

import os
import random
from collections.abc import Generator, Iterator
from typing import Any

import pytest

# pytest-xdist workers share the cores, so waiting threads must not spin.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from back_ends import ALL_BACKENDS, is_slow, use

try:
    from hypothesis import settings
except ImportError:  # GPU machines may lack it; only the files that import it fail
    settings = None

import at_fused
from at_fused.backends import cpu

if not cpu.available():
    raise pytest.UsageError(
        f"the tests need the compiled library: {cpu.reason()}. Install the package, and run "
        "'pytest' rather than 'python -m pytest', which imports the checkout instead."
    )

# Runs use the same examples, so that only a code change can cause a new failure. To search more:
# pytest tests/core/test_properties.py --hypothesis-profile=search; --hypothesis-seed=N repeats it.
if settings:
    settings.register_profile("same", derandomize=True, max_examples=150)
    settings.register_profile("search", max_examples=4000)
    settings.load_profile("same")

# The first backward starts one autograd thread per device. torch.compile adds a fake device, and a
# process with a thread for that one cannot fork, so start the threads first.
torch.ones((), requires_grad=True).backward()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "hypothesis_seed", "") is None:
        config.option.hypothesis_seed = str(random.randrange(2**32))
    # Keep a file's tests in one worker, because they share caches, until another worker is idle.
    if getattr(config.option, "dist", "no") == "load":
        config.option.dist = "worksteal"


def pytest_report_header(config: pytest.Config) -> str:
    return f"hypothesis seed: {getattr(config.option, 'hypothesis_seed', 'no hypothesis')}"


# ---- fixtures ------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def seed_and_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Seed random numbers, and restore the number of threads after the test."""
    torch.manual_seed(0)
    # pytest turns warnings into errors; test_errors.py covers this one-time warning.
    monkeypatch.setattr(at_fused._arguments, "single_position_warned", True)
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture(
    params=[pytest.param(n, marks=[pytest.mark.exhaustive] * is_slow(n)) for n in ALL_BACKENDS]
)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on every available back end and on the emulated CUDA kernels."""
    with use(request.param) as name:
        yield name


@pytest.fixture(params=[n for n in ALL_BACKENDS if not is_slow(n)])
def fast_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test as ``backend`` does, without slow back ends: for many calls or large tensors."""
    with use(request.param) as name:
        yield name


# ---- tests that need a GPU: the summary counts those that were not run ---------------------------

RUNS_GPU_TESTS = torch.cuda.is_available() or os.environ.get("AT_FUSED_GPU_DRY_RUN") == "1"
SKIPPED = pytest.StashKey[int]()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if output := getattr(session.config, "workeroutput", None):
        output["skipped"] = session.config.stash.get(SKIPPED, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    if output := getattr(node, "workeroutput", None):  # absent if the worker crashed
        node.config.stash[SKIPPED] = output["skipped"]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if skipped := config.stash.get(SKIPPED, 0):
        line = f"{skipped} tests need a CUDA device (torch.cuda.is_available() is False): not run"
        terminalreporter.write_line(line)


# ---- order and shards ----------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "run only shard I (from 0) of N, for processes without pytest-xdist"
    parser.addoption("--shard", type=shard, default=(0, 1), metavar="I/N", help=text)


def shard(text: str) -> tuple[int, int]:
    part, parts = map(int, text.split("/"))
    if not 0 <= part < parts:
        raise ValueError
    return part, parts


def pytest_report_teststatus(
    report: pytest.CollectReport | pytest.TestReport, config: pytest.Config
) -> tuple[str, str, str] | None:
    """Print a shard's failure at once: a shard that hangs later is killed without a report."""
    if not report.failed or config.option.shard == (0, 1):
        return None
    word = "failed" if report.when == "call" else "error"
    return word, word[0].upper(), f"{word.upper()}\n{report.longreprtext}"


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Generator[None, None, None]:
    """Remove tests that need an absent GPU, then divide those that -k and -m select among shards.

    Shards take tests round-robin by name, so that each gets some of the cases of a slow test.
    """
    # The slowest tests run first, so that no worker waits for them at the end.
    items.sort(key=lambda item: item.path.stem not in ("test_triton_compile", "test_sanitizers"))
    if not RUNS_GPU_TESTS:
        gpu = {item for item in items if item.get_closest_marker("gpu")}
        config.stash[SKIPPED] = len(gpu)
        items[:] = [item for item in items if item not in gpu]
    yield
    part, parts = config.option.shard
    if parts > 1:
        chosen = set(sorted(items, key=lambda item: item.nodeid)[part::parts])
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = [item for item in items if item in chosen]
