"""The parts of the report, a test for each setting: -k cases, -k "sizes and cpu".

The closing tables are made of interleaved rounds; pytest-benchmark then times at_fused alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import results, tables
from benchmarks.cases import DEVICES
from benchmarks.measure import PARTS

SETTINGS = [
    pytest.param(device, part, setting, id="-".join(map(str, (device, part, *setting))))
    for device in DEVICES
    for part in ("cases", "sizes", "calls", "steps")
    for setting in PARTS[part][1]
]


@pytest.fixture(scope="session")
def found(request: pytest.FixtureRequest) -> Iterator[dict[tuple[str, str], list[Any]]]:
    """(device, part) -> the rows that the tests have found, shown at the end as in the report."""
    every: dict[tuple[str, str], list[Any]] = defaultdict(list)
    yield every
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        for (device, part), rows in every.items():
            title, table = tables.PARTS[part]
            print(f"\n{title}: {results.describe(results.begin(device))}\n")
            print(*table(rows), sep="\n")


@pytest.mark.parametrize(("device", "part", "setting"), SETTINGS)
def test_time(
    benchmark: BenchmarkFixture, found: Any, device: str, part: str, setting: tuple[Any]
) -> None:
    comparison = PARTS[part][0](device, *setting)
    rows = comparison.rows()
    found[device, part] += rows
    benchmark.group = part
    benchmark.extra_info["rows"] = rows
    run = comparison.ours["tap" if part == "steps" else "at_fused"]
    benchmark.pedantic(lambda: (run(), device == "cpu" or torch.cuda.synchronize()), rounds=8)
