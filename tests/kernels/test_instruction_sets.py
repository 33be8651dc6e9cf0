"""The instruction sets of the CPU library that this processor supports."""

from __future__ import annotations

from pathlib import Path

import pytest
from outside import TESTS, run

from at_fused.backends import cpu

REPORT = "import at_fused; print(at_fused.backends()['cpu'].reason)"


@pytest.mark.parametrize("isa", cpu.instruction_sets())
def test_requested_instruction_set_is_used(isa: str, tmp_path: Path) -> None:
    done = run(tmp_path, "-W", "error", "-c", REPORT, AT_FUSED_CPU_ISA=isa)
    assert done.stdout.strip() == f"C++ kernels, {isa}", done.stderr


def test_unknown_instruction_set_warns_and_uses_the_best(tmp_path: Path) -> None:
    done = run(tmp_path, "-c", REPORT, AT_FUSED_CPU_ISA="mmx")
    assert "AT_FUSED_CPU_ISA must be one of baseline" in done.stderr
    assert done.stdout.strip() == f"C++ kernels, {cpu.instruction_sets()[-1]}"


@pytest.mark.exhaustive
@pytest.mark.parametrize("isa", [isa for isa in cpu.instruction_sets() if isa != cpu.isa()])
def test_other_instruction_sets_fulfil_the_contract(isa: str, tmp_path: Path) -> None:
    names = "contract", "map_operators", "tap_operators", "reproducible"
    files = [str(TESTS / f"core/test_{name}.py") for name in names]
    files.append(str(TESTS / "kernels/test_cpu.py"))
    selection = "(cpu or rounding or threads) and not opcheck"
    options = ["-q", "-p", "no:cacheprovider", "-k", selection]
    done = run(tmp_path, "-m", "pytest", *options, *files, AT_FUSED_CPU_ISA=isa)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
