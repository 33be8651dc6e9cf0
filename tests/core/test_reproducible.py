"""Results have the same bits in every run, thread count and process, under any load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from back_ends import use
from outside import SUPPORT, output_of
from threaded import all_calls, check_same_bits, digest, with_gradients
from torch import Tensor

import at_fused
from at_fused.backends import cpu


# test_emulated_kernels.py varies the schedules of the CUDA kernels. test_gpu.py repeats runs.
@pytest.mark.parametrize("name", ["cpu", "eager"])
def test_same_bits_in_every_run(name: str) -> None:
    """Compare a first run with those of eight concurrent callers."""
    with use(name):
        check_same_bits(rounds=1)


def compute_large(layout: torch.memory_format) -> list[Tensor]:
    """Compute losses, gradients and maps of samples with many tasks, with two, and with one."""
    results = []
    for shape in ((1, 24, 91, 83), (160, 64, 17, 9), (2, 130, 31, 31), (2, 300, 17, 16)):
        # Only an fp64 loss shows its order of summation: the others are rounded to fp32.
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            s = torch.randn(shape).to(dtype, memory_format=layout).requires_grad_()
            t = torch.randn_like(s.detach())
            loss = at_fused.at_loss([s, t], [t, s], reduction="none")
            maps = at_fused.attention_map(s), at_fused.attention_map(t)
            results += [*with_gradients(loss, s), *maps]
    return results


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_same_bits_for_any_number_of_threads(layout: torch.memory_format) -> None:
    def results(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        return compute_large(layout) + [x for call in all_calls() for x in call()]

    with use("cpu"):
        expected = results(1)
        for threads in (2, 3, 7):
            assert all(map(torch.equal, results(threads), expected)), f"{threads} threads"


@pytest.mark.parametrize(
    "isa", [None, *(pytest.param(x, marks=pytest.mark.exhaustive) for x in cpu.instruction_sets())]
)
def test_same_bits_in_another_process(tmp_path: Path, isa: str | None) -> None:
    """Vary the hash seed, the number of threads and addresses."""
    environment = {"AT_FUSED_CPU_ISA": isa} if isa else {}

    def digest_of_process(n: str) -> str:
        environment.update(PYTHONHASHSEED=n, OMP_NUM_THREADS=n)
        return output_of(tmp_path, str(SUPPORT / "threaded.py"), "digest", **environment).strip()

    assert digest_of_process("2") == (digest_of_process("1") if isa else digest())
