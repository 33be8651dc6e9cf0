"""at_fused against the popular lines, eager and compiled, and against one read of the bytes.

The closing table is made of interleaved rounds; pytest-benchmark then times at_fused alone.

On the CPU, and on a GPU where there is one, there with each back end.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import CASES, DEVICES
from benchmarks.conftest import keep
from benchmarks.measure import KINDS, at_loss, passes_of
from benchmarks.timing import Comparison

SETTINGS = [(device, case, *kind) for device in DEVICES for case in CASES for kind in KINDS]


def name_of(setting: tuple[str, str, str, str]) -> str:
    device, case, dtype, layout = setting
    return f"{'' if device == 'cpu' else device + '-'}{case[0]}-{dtype}-{layout}"


@pytest.fixture(scope="module", params=SETTINGS, ids=name_of)
def comparisons(request: pytest.FixtureRequest) -> dict[str, Comparison]:
    return at_loss(*request.param)


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_at_loss(
    benchmark: BenchmarkFixture, comparisons: dict[str, Comparison], direction: str
) -> None:
    comparison = comparisons[direction]
    rows = comparison.rows()
    keep(comparison.device, "cases", passes_of(rows))
    benchmark.group = " ".join(str(comparison.what[key]) for key in ("case", "dtype", "layout"))
    benchmark.extra_info["rows"] = rows
    fused = comparison.clock.blocking(comparison.ours["at_fused"])
    benchmark.pedantic(fused, rounds=rows[0]["rounds"])
