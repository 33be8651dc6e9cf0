"""The Triton kernels compiled ahead of time: registers, spills, shared memory, 128-bit accesses."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from native import cached
from outside import SUPPORT, output_of

import at_fused

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

SCRIPT = SUPPORT / "triton_compile.py"


def run_script(*options: str, **environment: str) -> Any:
    """Run the script in its own process, because Triton may be the interpreter in this one."""
    environment["TRITON_INTERPRET"] = "0"
    return json.loads(output_of(SUPPORT, str(SCRIPT), *options, **environment))


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    def make(table: Path) -> None:
        figures = run_script(TRITON_CACHE_DIR=str(table.with_name("cache")))
        table.write_text(json.dumps(figures))

    key = [importlib.metadata.version(name) for name in ("torch", "triton")]
    files = [SCRIPT, *Path(at_fused.__file__).parent.rglob("*.py")]
    return list(json.loads(cached("triton", key, files, make).read_text()))


def test_batch_sizes_share_a_kernel() -> None:
    kernels = run_script("--kernels")
    assert len(kernels) >= 18  # six operators, three lists
    # Two, for loss gradients that are aligned to 16 bytes and for others.
    assert {name: n for name, n in kernels.items() if n > 2} == {}


@pytest.mark.exhaustive
def test_resources_are_within_bounds(rows: list[dict[str, Any]]) -> None:
    names = {row["variant"] for row in rows}
    assert len(names) >= 70
    # All variants are compiled for gfx942, and a third of them for each CUDA target.
    targets = Counter(row["target"] for row in rows)
    assert targets.pop("gfx942") == len(names)
    assert sorted(targets) == ["sm_100", "sm_80", "sm_90"]
    assert min(targets.values()) >= len(names) // 3
    for row in rows:
        assert not row["spills"], row
        assert row["registers"] <= 128, row  # four blocks of 128 threads share 65536
        # For reductions, and with "max" to reorder the gradient for its stores.
        assert row["shared"] <= (8192 if "collapse=max" in row["variant"] else 4096), row


@pytest.mark.exhaustive
def test_aligned_features_move_by_128_bits(rows: list[dict[str, Any]]) -> None:
    # These operators load or store only features, others also maps.
    only_features = {"loads": ("map",), "stores": ("backward", "tap")}
    for row in rows:
        for kind, wide in zip(only_features, row["wide"], strict=True):
            if wide:
                assert "128" in row[kind], row
                if row["operator"] in only_features[kind]:
                    assert set(row[kind]) == {"128"}, row
