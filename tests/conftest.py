"""Fixtures and hooks of all tests: the back ends at hand, and quiet, repeatable randomness."""

from __future__ import annotations

import os
import random
from collections.abc import Generator, Iterator
from typing import Any

import pytest

# Workers (pytest -n) share the cores: threads that spin while they wait keep others from theirs.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from back_ends import EVERY, slow, use

try:
    from hypothesis import settings
except ImportError:  # the GPU tests do without; the files that need it import it, and then fail
    settings = None

import at_fused
from at_fused.backends import cpu

if not cpu.available():
    raise pytest.UsageError(
        f"the tests need the compiled library: {cpu.reason()}. Install the package, and run "
        "'pytest' rather than 'python -m pytest', which imports the checkout instead."
    )

# The same examples each time, so that a failure is a change. To look for new ones, thousands:
# pytest tests/core/test_properties.py --hypothesis-profile=search; --hypothesis-seed=N repeats it.
if settings:
    settings.register_profile("same", derandomize=True, max_examples=150)
    settings.register_profile("search", max_examples=4000)
    settings.load_profile("same")

# Autograd starts with its first backward, with a thread for each device. torch.compile puts a fake
# one there: after that a process with these threads could not be forked.
torch.ones((), requires_grad=True).backward()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "hypothesis_seed", "") is None:
        config.option.hypothesis_seed = str(random.randrange(2**32))
    # A file's tests in one worker, for what they share, until another has none left.
    if getattr(config.option, "dist", "no") == "load":
        config.option.dist = "worksteal"


def pytest_report_header(config: pytest.Config) -> str:
    return f"hypothesis seed: {getattr(config.option, 'hypothesis_seed', 'no hypothesis')}"


# ---- fixtures ------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def repeatable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Seeds random numbers, and gives the next test the number of threads that this one had."""
    torch.manual_seed(0)
    # Warnings of this package are errors here; the one-time warning has a test of its own.
    monkeypatch.setattr(at_fused._arguments, "single_position_warned", True)
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture(params=[pytest.param(n, marks=[pytest.mark.exhaustive] * slow(n)) for n in EVERY])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on every back end that this machine has, and on CUDA's kernels."""
    with use(request.param) as name:
        yield name


@pytest.fixture(params=[n for n in EVERY if not slow(n)])
def fast_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """As ``backend``, for tests of thousands of calls or large tensors."""
    with use(request.param) as name:
        yield name


# ---- tests that need a GPU: a line at the end says how many are not run --------------------------

RUNS_GPU_TESTS = torch.cuda.is_available() or os.environ.get("AT_FUSED_GPU_DRY_RUN") == "1"
LEFT_OUT = pytest.StashKey[int]()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if output := getattr(session.config, "workeroutput", None):
        output["left_out"] = session.config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    if output := getattr(node, "workeroutput", None):  # a worker that crashed has none
        node.config.stash[LEFT_OUT] = output["left_out"]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if left_out := config.stash.get(LEFT_OUT, 0):
        line = f"{left_out} tests need a CUDA device (torch.cuda.is_available() is False): not run"
        terminalreporter.write_line(line)


# ---- order and shards ----------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "the I-th of N parts of the tests, I from 0: for processes without pytest-xdist"
    parser.addoption("--shard", type=shard, default=(0, 1), metavar="I/N", help=text)


def shard(text: str) -> tuple[int, int]:
    part, parts = map(int, text.split("/"))
    if not 0 <= part < parts:
        raise ValueError
    return part, parts


def pytest_report_teststatus(
    report: pytest.CollectReport | pytest.TestReport, config: pytest.Config
) -> tuple[str, str, str] | None:
    """A shard says why a test fails when it does: what hangs later is killed, and says nothing."""
    if not report.failed or config.option.shard == (0, 1):
        return None
    word = "failed" if report.when == "call" else "error"
    return word, word[0].upper(), f"{word.upper()}\n{report.longreprtext}"


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Generator[None, None, None]:
    """Leave out what this machine cannot run, then divide what -k and -m choose among shards.

    By name, in turn, so that cases of one test, which take as long, go to all shards.
    """
    # A test that takes a minute comes first, for no worker to wait at the end.
    items.sort(key=lambda item: item.path.stem not in ("test_triton_compile", "test_sanitizers"))
    if not RUNS_GPU_TESTS:
        gpu = {item for item in items if item.get_closest_marker("gpu")}
        config.stash[LEFT_OUT] = len(gpu)
        items[:] = [item for item in items if item not in gpu]
    yield
    part, of = config.option.shard
    if of > 1:
        chosen = set(sorted(items, key=lambda item: item.nodeid)[part::of])
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = [item for item in items if item in chosen]
