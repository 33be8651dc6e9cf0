"""at_fused against the popular lines, eager and compiled, and against one read of the bytes.

The closing table is made of interleaved rounds; pytest-benchmark then times at_fused alone.

On the CPU, and on a GPU where there is one, there with each back end. ``at_value_and_grad`` takes
part in the rounds of forward and backward, whose results it gives.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from cases import CASES, DEVICES, DTYPES, LAYOUTS, Inputs, backends, ours, programs
from conftest import PASSES, ROWS
from pytest_benchmark.fixture import BenchmarkFixture
from timing import CpuTimer, CudaTimer, medians, timer

import at_fused

SECONDS = 2.5  # of measuring for each test, about
SETTINGS = [(v, c, d, m) for v in DEVICES for c in CASES for d in DTYPES for m in LAYOUTS]


class Setting(NamedTuple):
    """What the tests of one case share."""

    device: str
    case: str
    dtype: str
    layout: str
    inputs: Inputs
    others: dict
    clock: CpuTimer | CudaTimer


def name_of(setting: tuple[str, str, str, str]) -> str:
    device, case, dtype, layout = setting
    return f"{'' if device == 'cpu' else device + '-'}{case[0]}-{dtype}-{layout}"


@pytest.fixture(scope="module", params=SETTINGS, ids=name_of)
def setting(request: pytest.FixtureRequest) -> Setting:
    device, *of_case = request.param
    torch._dynamo.reset()
    torch.manual_seed(0)
    inputs = Inputs.make(*of_case, device=device)
    return Setting(device, *of_case, inputs, programs(), timer(device))


@pytest.mark.parametrize("direction", PASSES)
def test_at_loss(benchmark: BenchmarkFixture, setting: Setting, direction: str) -> None:
    device, case, dtype, layout, inputs, others, clock = setting
    backward = direction == "forward+backward"
    fused = inputs.step(ours, backward)
    timed = {(name, "auto"): inputs.step(loss, backward) for name, loss in others.items()}
    timed |= {(name, "auto"): floor for name, floor in clock.floors().items()}
    timed |= {("floor", "auto"): inputs.read_all()}
    for backend in backends(device):
        timed["at_fused", backend] = fused
        if backward:
            timed["value and gradient", backend] = inputs.value_and_gradient()

    ms, rounds = medians(timed, clock, SECONDS, lambda key: at_fused.use_backend(key[1]))
    row = ROWS.setdefault(device, {}).setdefault((case[0], dtype, layout), ({}, inputs.floors()))
    row[0][direction] = ms

    benchmark.group = f"{device}: {case}, {dtype}, {layout}"
    benchmark.extra_info.update({f"{' '.join(key)}_ms": value for key, value in ms.items()})
    benchmark.pedantic(clock.blocking(fused), rounds=rounds)
