"""Every Triton kernel compiled ahead of time for the shipped targets, and what came out."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from native import once
from outside import SUPPORT, output_of

import at_fused

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

SCRIPT = SUPPORT / "triton_compile.py"


def printed(*options: str, **environment: str) -> Any:
    """Run the script in its own process: in this one Triton may be the interpreter."""
    environment["TRITON_INTERPRET"] = "0"
    return json.loads(output_of(SUPPORT, str(SCRIPT), *options, **environment))


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    def make(table: Path) -> None:
        found = printed(TRITON_CACHE_DIR=str(table.with_name("cache")))
        table.write_text(json.dumps(found))

    made_of = [importlib.metadata.version(name) for name in ("torch", "triton")]
    files = [SCRIPT, *Path(at_fused.__file__).parent.rglob("*.py")]
    return list(json.loads(once("triton", made_of, files, make).read_text()))


def test_one_kernel_serves_all_batch_sizes() -> None:
    kernels = printed("--kernels")
    assert len(kernels) >= 18  # six operators, three lists
    # One for a loss's gradient that lies on 16 bytes, and one for any other.
    assert {name: n for name, n in kernels.items() if n > 2} == {}


@pytest.mark.exhaustive
def test_the_compiled_kernels_stay_within_their_bounds(rows: list[dict[str, Any]]) -> None:
    names = {row["variant"] for row in rows}
    assert len(names) >= 70
    # AMD's target has all of them, each of the others one in three.
    targets = Counter(row["target"] for row in rows)
    assert targets.pop("gfx942") == len(names)
    assert sorted(targets) == ["sm_100", "sm_80", "sm_90"]
    assert min(targets.values()) >= len(names) // 3
    for row in rows:
        assert not row["spills"], row
        assert row["registers"] <= 128, row  # four blocks of 128 threads share 65536
        # For reductions, and where a maximum's gradient is brought to the order of its stores.
        assert row["shared"] <= (8192 if "collapse=max" in row["variant"] else 4096), row


@pytest.mark.exhaustive
def test_aligned_features_move_by_128_bits(rows: list[dict[str, Any]]) -> None:
    # Other accesses are of maps; these operators have no others.
    alone = {"loads": ("map",), "stores": ("backward", "tap")}
    for row in rows:
        for kind, wide in zip(alone, row["wide"], strict=True):
            if wide:
                assert "128" in row[kind], row
                assert row["operator"] not in alone[kind] or set(row[kind]) == {"128"}, row
