"""at_fused against the popular lines, eager and compiled, and against one read of the bytes.

Every round times all of them in the same way, one after the other in random order: whatever else
the machine does falls on all alike, and so does what the one before left in the caches. The closing
table is made of these times; pytest-benchmark then times at_fused alone.
"""

from __future__ import annotations

import random
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
    timed = {name: inputs.step(loss, backward) for name, loss in others.items()}
    timed |= {"floor": inputs.read_all(), "at_fused": fused}
    for program in timed.values():
        program()  # compiles, and fills the allocator
    once = seconds(fused) + sum(seconds(program) for program in timed.values())
    rounds = max(8, min(200, int(SECONDS / once)))

    times: dict[str, list[float]] = {name: [] for name in timed}
    order, shuffle = list(timed), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            times[name].append(seconds(timed[name]))
    ms = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    ROWS.setdefault((case[0], dtype, layout), {})[direction] = ms

    benchmark.group = f"{case}, {dtype}, {layout}"
    benchmark.extra_info.update({f"{name}_ms": value for name, value in ms.items()})
    benchmark.pedantic(fused, rounds=rounds)
