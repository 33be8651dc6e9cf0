"""Benchmarks of the report in pytest, a test per setting: -k cases, -k "sizes and cpu".

The tables at the end come from rounds of all programs; pytest-benchmark then times at_fused alone.
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
def rows_by_part(request: pytest.FixtureRequest) -> Iterator[dict[tuple[str, str], list[Any]]]:
    """Collect rows by device and part, and print their tables at the end."""
    collected: dict[tuple[str, str], list[Any]] = defaultdict(list)
    yield collected
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        for (device, part), rows in collected.items():
            description = results.describe(results.new_result(device))
            print(f"\n{tables.PARTS[part].title}: {description}\n")
            print(*tables.PARTS[part].table(rows), sep="\n")


@pytest.mark.parametrize(("device", "part", "setting"), SETTINGS)
def test_time(
    benchmark: BenchmarkFixture, rows_by_part: Any, device: str, part: str, setting: tuple[Any]
) -> None:
    comparison = PARTS[part][0](device, *setting)
    rows = comparison.rows()
    rows_by_part[device, part] += rows
    benchmark.group = part
    benchmark.extra_info["rows"] = rows
    run = comparison.ours["tap" if part == "steps" else "at_fused"]
    benchmark.pedantic(lambda: (run(), device == "cpu" or torch.cuda.synchronize()), rounds=8)
