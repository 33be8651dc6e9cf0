"""The rest of the method against the eager lines and torch.compile of them, forward and backward.

Timed as in test_at_loss.py: every round all of them, in random order. On the CPU.
"""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES
from conftest import METHOD_ROWS
from methods import VARIANTS, differentiable
from pytest_benchmark.fixture import BenchmarkFixture
from timing import CpuTimer, medians

SECONDS = 1.5  # of measuring for each test, about
SETTINGS = [
    (name, case, dtype, layout)
    for name, variant in VARIANTS.items()
    for case in variant.cases
    for dtype in DTYPES
    for layout in variant.layouts
]


@pytest.mark.parametrize("setting", SETTINGS, ids="-".join)
def test_method(benchmark: BenchmarkFixture, setting: tuple[str, str, str, str]) -> None:
    name, case, dtype, layout = setting
    torch._dynamo.reset()
    torch.manual_seed(0)
    variant = VARIANTS[name]
    inputs = variant.make(case, dtype, layout)
    wanted = differentiable(inputs)
    losses = {
        "at_fused": variant.ours,
        "eager": variant.eager,
        "compile": torch.compile(variant.eager, dynamic=False),
    }
    programs = {
        program: lambda loss=loss: torch.autograd.grad(loss(*inputs), wanted)
        for program, loss in losses.items()
    }
    ms, rounds = medians(programs, CpuTimer(), SECONDS)
    METHOD_ROWS[setting] = ms
    benchmark.group = f"{name}: {case}, {dtype}, {layout}"
    benchmark.extra_info.update({f"{program}_ms": value for program, value in ms.items()})
    benchmark.pedantic(programs["at_fused"], rounds=rounds)
