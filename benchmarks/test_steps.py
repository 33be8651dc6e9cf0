"""What attention transfer costs in a whole training step, in time and in memory. On the CPU."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import CASES
from benchmarks.conftest import keep
from benchmarks.measure import KINDS, step, tap
from benchmarks.steps import NETWORKS


@pytest.mark.parametrize("name", NETWORKS)
def test_step(benchmark: BenchmarkFixture, name: str) -> None:
    comparison = step("cpu", name)
    (row,) = comparison.rows()
    keep("cpu", "steps", [row])
    benchmark.group = f"step: {name}"
    benchmark.pedantic(comparison.ours["tap"], rounds=min(row["rounds"], 3))


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
@pytest.mark.parametrize("case", CASES)
def test_tap_backward(benchmark: BenchmarkFixture, case: str, kind: tuple[str, str]) -> None:
    comparison = tap("cpu", case, *kind)
    (row,) = comparison.rows()
    keep("cpu", "taps", [row])
    benchmark.group = f"tap: {case}, {', '.join(kind)}"
    benchmark.pedantic(comparison.ours["tap"], rounds=row["rounds"])
