"""Every instruction-set level of the compiled CPU library that this processor can run."""

from __future__ import annotations

from pathlib import Path

import pytest
from outside import TESTS, run

from at_fused.backends import cpu

REPORT = "import at_fused; print(at_fused.backends()['cpu'].reason)"


@pytest.mark.parametrize("level", cpu.isa_levels())
def test_the_level_asked_for_is_used(level: str, tmp_path: Path) -> None:
    done = run(tmp_path, "-W", "error", "-c", REPORT, AT_FUSED_CPU_ISA=level)
    assert done.stdout.strip() == f"C++ kernels, {level}", done.stderr


def test_an_unknown_level_is_said_and_not_used(tmp_path: Path) -> None:
    done = run(tmp_path, "-c", REPORT, AT_FUSED_CPU_ISA="mmx")
    assert "AT_FUSED_CPU_ISA must be one of baseline" in done.stderr
    assert done.stdout.strip() == f"C++ kernels, {cpu.isa_levels()[-1]}"


@pytest.mark.exhaustive
@pytest.mark.parametrize("level", [level for level in cpu.isa_levels() if level != cpu.isa()])
def test_other_levels_keep_the_contract(level: str, tmp_path: Path) -> None:
    names = "contract", "map_operators", "tap_operators", "reproducible"
    files = [str(TESTS / f"core/test_{name}.py") for name in names]
    files.append(str(TESTS / "kernels/test_cpu.py"))
    chosen = "(cpu or rounding or threads) and not opcheck"
    options = ["-q", "-p", "no:cacheprovider", "-k", chosen]
    done = run(tmp_path, "-m", "pytest", *options, *files, AT_FUSED_CPU_ISA=level)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
