"""AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer over the compiled code."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import cuda_emulator
import pytest
import sanitized
from outside import SUPPORT, TESTS, output_of, run

pytestmark = pytest.mark.exhaustive


def contract(folder: Path, environment: dict[str, str], backend: str) -> str:
    """Runs the tests of the operators."""
    pytest_executable = shutil.which("pytest", path=str(Path(sys.executable).parent))
    assert pytest_executable, "pytest is installed beside Python"
    names = "contract", "map_operators", "tap_operators", "value_and_grad"
    files = [str(TESTS / f"core/test_{name}.py") for name in names]
    # Derivatives of derivatives add nothing here, and compilers do not run under a sanitizer.
    chosen = f"{backend} and not gradcheck and not second and not compile and not opcheck"
    # -s: a report goes to where it is seen, not where pytest keeps what a test prints.
    words = "-q", "-s", "-p", "no:cacheprovider", "-k", chosen, *files
    return output_of(folder, pytest_executable, *words, **environment)


def assert_found(folder: Path, environment: dict[str, str], imported: str) -> None:
    """A feature with a forbidden piece in its middle."""
    code = f"""
import ctypes, sys, torch
sys.path.insert(0, {str(SUPPORT)!r})
{imported}
x = torch.frombuffer(memoryview(bytearray(1024)), dtype=torch.float32).view(1, 4, 8, 8)
ctypes.CDLL(None).__asan_poison_memory_region(ctypes.c_void_p(x.data_ptr() + 512), 64)
operators.attention_map([x], 2.0, "mean")
"""
    done = run(folder, "-c", code, **environment)
    assert done.returncode != 0
    assert "AddressSanitizer: use-after-poison" in done.stderr, done.stderr[-2000:]


# ---- CUDA's kernels ------------------------------------------------------------------------------

EMULATED = {
    "AT_FUSED_EMULATOR": "sanitizers",
    # What Python and torch keep to the end is not a leak of ours.
    "ASAN_OPTIONS": "detect_leaks=0",
}


def test_the_contract_of_cuda(tmp_path: Path) -> None:
    cuda_emulator.build_operators("sanitizers")
    environment = EMULATED | {"LD_PRELOAD": sanitized.preloaded("address")}
    assert " passed" in contract(tmp_path, environment, "emulator")


def test_an_error_would_be_found(tmp_path: Path) -> None:
    environment = EMULATED | {"LD_PRELOAD": sanitized.preloaded("address")}
    assert_found(tmp_path, environment, "from cuda_emulator import load; _, operators = load()")


# ---- the CPU library -----------------------------------------------------------------------------


def test_the_contract_of_cpu(tmp_path: Path) -> None:
    assert " passed" in contract(tmp_path, sanitized.package("address", tmp_path), "cpu")


def test_hostile_arguments(tmp_path: Path) -> None:
    environment = sanitized.package("address", tmp_path)
    output = output_of(tmp_path, str(SUPPORT / "hostile.py"), "4", "3000", **environment)
    assert "3000 calls of cpu, " in output
    assert ", 0 wrong" in output


def test_an_error_on_the_cpu_would_be_found(tmp_path: Path) -> None:
    environment = sanitized.package("address", tmp_path)
    assert_found(tmp_path, environment, "from at_fused import _ops as operators")


def test_eight_threads(tmp_path: Path) -> None:
    environment = sanitized.package("thread", tmp_path)
    assert "done" in output_of(tmp_path, str(SUPPORT / "threaded.py"), "1", **environment)


def test_a_race_would_be_found(tmp_path: Path) -> None:
    environment = sanitized.package("thread", tmp_path)
    done = run(tmp_path, str(SUPPORT / "threaded.py"), "race", **environment)
    assert done.returncode != 0
    assert "ThreadSanitizer: data race" in done.stderr, done.stderr[-2000:]
