"""The same bits in every run, on any number of threads, in any process, under any load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import use
from outside import output_of
from threaded import differentiated, same_bits, works
from torch import Tensor

import at_fused
from at_fused.backends import cpu

# Of GPU kernels the schedules are changed (test_simt_kernels.py), and runs repeated (test_gpu.py).
HERE = pytest.mark.parametrize("name", ["cpu", "eager"])
THREADED = Path(__file__).with_name("threaded.py")


def assert_same(found: list[Tensor], right: list[Tensor], what: str) -> None:
    assert all(map(torch.equal, found, right)), what


@HERE
def test_same_bits_in_every_run(name: str) -> None:
    with use(name):
        calls = works()
        first = [call() for call in calls]
        for run in range(3):
            for i, call in enumerate(calls):
                assert_same(call(), first[i], f"call {i}, run {run}")


def large(layout: torch.memory_format) -> list[Tensor]:
    """Samples of many tasks, and many samples of one."""
    found = []
    for shape in ((1, 24, 91, 83), (40, 13, 17, 9), (2, 130, 31, 31)):
        for dtype in (torch.float32, torch.bfloat16):
            s = torch.randn(shape).to(dtype, memory_format=layout).requires_grad_()
            t = torch.randn_like(s.detach())
            loss = at_fused.at_loss([s, t], [t, s], reduction="none")
            maps = at_fused.attention_map(s), at_fused.attention_map(t)
            found += [*differentiated(loss, s), *maps]
    return found


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_same_bits_for_any_number_of_threads(layout: torch.memory_format) -> None:
    """Threads share the work."""

    def results(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        return large(layout) + [x for call in works() for x in call()]

    with use("cpu"):
        first = results(1)
        for threads in (1, 2, 3, 7):
            assert_same(results(threads), first, f"{threads} threads")


@HERE
def test_same_bits_for_eight_callers(name: str) -> None:
    with use(name):
        same_bits(rounds=1)


@pytest.mark.parametrize("level", cpu.isa_levels())
def test_same_bits_in_another_process(tmp_path: Path, level: str) -> None:
    """With other hashes, threads and addresses."""

    def digest(seed: str) -> str:
        return output_of(
            tmp_path,
            str(THREADED),
            "digest",
            PYTHONHASHSEED=seed,
            OMP_NUM_THREADS=seed,
            AT_FUSED_CPU_ISA=level,
        )

    first = digest("1")
    assert len(first.strip()) == 64
    assert digest("2") == first
