"""at_fused against the popular lines, eager and compiled, and against one read of the bytes.

Every round times all of them one after the other, so that whatever else the machine does falls on
all alike; pytest-benchmark times at_fused, the set-up of each of its rounds the others.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from cases import CASES, DTYPES, LAYOUTS, Inputs, ours, programs
from conftest import PASSES, ROWS
from pytest_benchmark.fixture import BenchmarkFixture

SECONDS = 2.5  # of measuring for each test, about


def seconds(program: Callable[[], object]) -> float:
    begin = time.perf_counter()
    program()
    return time.perf_counter() - begin


SETTINGS = [(c, d, m) for c in CASES for d in DTYPES for m in LAYOUTS]


@pytest.fixture(scope="module", params=SETTINGS, ids=lambda s: f"{s[0][0]}-{s[1]}-{s[2]}")
def setting(request: pytest.FixtureRequest) -> tuple[tuple[str, str, str], Inputs, dict]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return request.param, Inputs.make(*request.param), programs()


@pytest.mark.parametrize("direction", PASSES)
def test_at_loss(
    benchmark: BenchmarkFixture,
    setting: tuple[tuple[str, str, str], Inputs, dict],
    direction: str,
) -> None:
    (case, dtype, layout), inputs, others = setting
    backward = direction == "forward+backward"
    fused = inputs.step(ours, backward)
    rivals = {name: inputs.step(loss, backward) for name, loss in others.items()}
    rivals["floor"] = inputs.read_all()
    for program in (fused, *rivals.values()):
        program()  # compiles, and fills the allocator
    once = seconds(fused) + sum(seconds(program) for program in rivals.values())
    rounds = max(7, min(200, int(SECONDS / once)))

    times: dict[str, list[float]] = {name: [] for name in rivals}

    def time_the_others() -> None:
        for name, program in rivals.items():
            times[name].append(seconds(program))

    benchmark.group = f"{case}, {dtype}, {layout}"
    benchmark.pedantic(fused, setup=time_the_others, rounds=rounds)
    ms = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    ms["at_fused"] = statistics.median(benchmark.stats.stats.data) * 1e3
    benchmark.extra_info.update({f"{name}_ms": value for name, value in ms.items()})
    ROWS.setdefault((case[0], dtype, layout), {})[direction] = ms
