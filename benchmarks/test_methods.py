"""The rest of the method against the eager lines and torch.compile of them, forward and backward.

Timed as in test_at_loss.py. On the CPU.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.conftest import keep
from benchmarks.measure import METHODS, method


@pytest.mark.parametrize("setting", METHODS, ids="-".join)
def test_method(benchmark: BenchmarkFixture, setting: tuple[str, str, str, str]) -> None:
    comparison = method("cpu", *setting)
    (row,) = comparison.rows()
    keep("cpu", "methods", [row])
    benchmark.group = "{}: {}, {}, {}".format(*setting)
    benchmark.extra_info["row"] = row
    benchmark.pedantic(comparison.ours["at_fused"], rounds=row["rounds"])
