"""The same bits in every run, on any number of threads, in any process, under any load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from back_ends import use
from outside import SUPPORT, output_of
from threaded import differentiated, digest, same_bits, works
from torch import Tensor

import at_fused
from at_fused.backends import cpu


# Of GPU kernels the schedules are changed (test_emulated_kernels.py), and runs repeated
# (test_gpu.py).
@pytest.mark.parametrize("name", ["cpu", "eager"])
def test_same_bits_in_every_run(name: str) -> None:
    """A first one alone, and then those of eight callers at once."""
    with use(name):
        same_bits(rounds=1)


def large(layout: torch.memory_format) -> list[Tensor]:
    """Samples of many tasks, and of two; and many samples of one."""
    found = []
    for shape in ((1, 24, 91, 83), (160, 64, 17, 9), (2, 130, 31, 31), (2, 300, 17, 16)):
        # In which order a loss is added up shows in fp64 alone: another is rounded to fp32.
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
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
        for threads in (2, 3, 7):
            assert all(map(torch.equal, results(threads), first)), f"{threads} threads"


@pytest.mark.parametrize(
    "level", [None, *(pytest.param(x, marks=pytest.mark.exhaustive) for x in cpu.isa_levels())]
)
def test_same_bits_in_another_process(tmp_path: Path, level: str | None) -> None:
    """With other hashes, threads and addresses."""
    environment = {"AT_FUSED_CPU_ISA": level} if level else {}

    def another(n: str) -> str:
        environment.update(PYTHONHASHSEED=n, OMP_NUM_THREADS=n)
        return output_of(tmp_path, str(SUPPORT / "threaded.py"), "digest", **environment).strip()

    assert another("2") == (another("1") if level else digest())
