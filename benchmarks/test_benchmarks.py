"""The parts of the report, a test for each setting: -k cases, -k "methods and tokens".

The closing tables are made of interleaved rounds; pytest-benchmark then times at_fused alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import DEVICES
from benchmarks.conftest import ROWS
from benchmarks.measure import PARTS

TIMED = ("cases", "sizes", "calls", "methods", "steps", "taps")
SETTINGS = [
    pytest.param(device, part, setting, id="-".join(map(str, (device, part, *setting))))
    for device in DEVICES
    for part in TIMED
    for setting in PARTS[part][1]
]


@pytest.mark.parametrize(("device", "part", "setting"), SETTINGS)
def test_time(benchmark: BenchmarkFixture, device: str, part: str, setting: tuple[Any]) -> None:
    comparison = PARTS[part][0](device, *setting)
    rows = comparison.rows()
    ROWS.setdefault((device, part), []).extend(rows)
    benchmark.group = part
    benchmark.extra_info["rows"] = rows
    run = comparison.ours["tap" if "tap" in comparison.ours else "at_fused"]
    benchmark.pedantic(lambda: (run(), device == "cpu" or torch.cuda.synchronize()), rounds=8)
