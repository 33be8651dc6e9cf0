"""Every Triton kernel compiled ahead of time for the shipped targets, and what came out."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from native import once

import at_fused

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)


pytestmark = pytest.mark.long


SCRIPT = Path(__file__).with_name("triton_compile.py")


def printed(option: str, **environment: str) -> Any:
    """Run the script in its own process: in this one Triton may be the interpreter."""
    without = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), option],
        env=without | environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    def make(table: Path) -> None:
        found = printed("--json", TRITON_CACHE_DIR=str(table.with_name("cache")))
        table.write_text(json.dumps(found))

    made_of = [importlib.metadata.version(name) for name in ("torch", "triton")]
    files = [SCRIPT, *Path(at_fused.__file__).parent.rglob("*.py")]
    return list(json.loads(once("triton", made_of, files, make).read_text()))


def test_every_target_is_there(rows: list[dict[str, Any]]) -> None:
    names = {row["variant"] for row in rows}
    assert len(names) >= 70
    assert {row["variant"] for row in rows if row["target"] == "gfx942"} == names
    cuda = [row for row in rows if row["target"] != "gfx942"]
    # Each for one of them, in turn: all of it is in docs/kernels.md.
    assert {row["variant"] for row in cuda} == names
    for target in ("sm_80", "sm_90", "sm_100"):
        assert sum(row["target"] == target for row in cuda) >= len(names) // 3


def test_nothing_spills(rows: list[dict[str, Any]]) -> None:
    assert [row for row in rows if row["spills"]] == []


def test_registers_leave_room_for_four_blocks(rows: list[dict[str, Any]]) -> None:
    # 65536 registers, 128 threads.
    assert [row for row in rows if row["registers"] > 128] == []


def test_shared_memory_is_for_reductions_only(rows: list[dict[str, Any]]) -> None:
    # And where a max's gradient is brought to the order of its stores.
    assert max(row["shared"] for row in rows) <= 8192
    assert max(row["shared"] for row in rows if ", max" not in row["variant"]) <= 4096


def test_aligned_features_move_by_128_bits(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["wide_loads"]:
            assert "128" in row["loads"], row
            if row["operator"] == "map":
                assert set(row["loads"]) == {"128"}, row
        if row["wide_stores"]:
            assert "128" in row["stores"], row
            if row["operator"] in ("backward", "tap"):
                assert set(row["stores"]) == {"128"}, row
