"""The compiled code under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer."""

from __future__ import annotations

from pathlib import Path

import cuda_emulator
import pytest
import sanitized
from outside import SUPPORT, TESTS, output_of, run

pytestmark = pytest.mark.exhaustive

# Code that imports the operators of the emulated CUDA kernels and of the CPU library.
IMPORTED = {
    "emulator": "from cuda_emulator import load; _, operators = load()",
    "cpu": "from at_fused import _ops as operators",
}


def environment_of(backend: str, folder: Path) -> dict[str, str]:
    """Build a back end under AddressSanitizer and return environment variables for it."""
    if backend == "cpu":
        return sanitized.package("address", folder)
    cuda_emulator.build_operators("sanitizers")
    preloaded = {"LD_PRELOAD": sanitized.preloaded("address")}
    # detect_leaks=0: Python and torch do not free everything at exit.
    return {"AT_FUSED_EMULATOR": "sanitizers", "ASAN_OPTIONS": "detect_leaks=0", **preloaded}


@pytest.mark.parametrize("backend", IMPORTED)
def test_operator_contract_runs_without_reports(backend: str, tmp_path: Path) -> None:
    names = "contract", "map_operators", "tap_operators", "value_and_grad"
    files = [str(TESTS / f"core/test_{name}.py") for name in names]
    # Second derivatives run the same kernels, and compilers do not run under a sanitizer.
    selection = f"{backend} and not gradcheck and not second and not compile and not opcheck"
    # -s: pytest must not capture the sanitizer's report.
    command = "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-k", selection, *files
    assert " passed" in output_of(tmp_path, *command, **environment_of(backend, tmp_path))


@pytest.mark.parametrize("backend", IMPORTED)
def test_access_to_poisoned_memory_is_reported(backend: str, tmp_path: Path) -> None:
    code = f"""
import ctypes, sys, torch
sys.path.insert(0, {str(SUPPORT)!r})
{IMPORTED[backend]}
x = torch.frombuffer(memoryview(bytearray(1024)), dtype=torch.float32).view(1, 4, 8, 8)
ctypes.CDLL(None).__asan_poison_memory_region(ctypes.c_void_p(x.data_ptr() + 512), 64)
operators.attention_map([x], 2.0, "mean")
"""
    done = run(tmp_path, "-c", code, **environment_of(backend, tmp_path))
    assert done.returncode != 0
    assert "AddressSanitizer: use-after-poison" in done.stderr, done.stderr[-2000:]


def test_invalid_arguments_cause_no_reports(tmp_path: Path) -> None:
    environment = environment_of("cpu", tmp_path)
    output = output_of(tmp_path, str(SUPPORT / "hostile.py"), "4", "3000", **environment)
    assert "3000 calls of cpu, " in output
    assert ", 0 wrong" in output


@pytest.mark.parametrize("argument", ["1", "race"])
def test_only_races_are_reported(argument: str, tmp_path: Path) -> None:
    """Eight threads share inputs without a report. Threads that write one gradient are reported."""
    environment = sanitized.package("thread", tmp_path)
    done = run(tmp_path, str(SUPPORT / "threaded.py"), argument, **environment)
    reported = "ThreadSanitizer: data race" in done.stderr
    assert (reported, done.returncode != 0) == (argument == "race",) * 2, done.stderr[-2000:]
    assert argument == "race" or "done" in done.stdout
