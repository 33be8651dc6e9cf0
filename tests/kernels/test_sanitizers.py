"""AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer over the compiled code."""

from __future__ import annotations

from pathlib import Path

import cuda_emulator
import pytest
import sanitized
from outside import SUPPORT, TESTS, output_of, run

pytestmark = pytest.mark.exhaustive

# CUDA's kernels, and the CPU library: how each imports its operators.
IMPORTED = {
    "emulator": "from cuda_emulator import load; _, operators = load()",
    "cpu": "from at_fused import _ops as operators",
}


def environment_of(backend: str, folder: Path) -> dict[str, str]:
    """Builds what a back end needs under AddressSanitizer; returns its environment."""
    if backend == "cpu":
        return sanitized.package("address", folder)
    cuda_emulator.build_operators("sanitizers")
    preloaded = {"LD_PRELOAD": sanitized.preloaded("address")}
    # What Python and torch keep to the end is not a leak of ours.
    return {"AT_FUSED_EMULATOR": "sanitizers", "ASAN_OPTIONS": "detect_leaks=0", **preloaded}


@pytest.mark.parametrize("backend", IMPORTED)
def test_the_contract_of_the_operators(backend: str, tmp_path: Path) -> None:
    names = "contract", "map_operators", "tap_operators", "value_and_grad"
    files = [str(TESTS / f"core/test_{name}.py") for name in names]
    # Derivatives of derivatives add nothing here, and compilers do not run under a sanitizer.
    chosen = f"{backend} and not gradcheck and not second and not compile and not opcheck"
    # -s: a report goes to where it is seen, not where pytest keeps what a test prints.
    words = "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-k", chosen, *files
    assert " passed" in output_of(tmp_path, *words, **environment_of(backend, tmp_path))


@pytest.mark.parametrize("backend", IMPORTED)
def test_a_forbidden_address_is_found(backend: str, tmp_path: Path) -> None:
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


def test_hostile_arguments(tmp_path: Path) -> None:
    environment = environment_of("cpu", tmp_path)
    output = output_of(tmp_path, str(SUPPORT / "hostile.py"), "4", "3000", **environment)
    assert "3000 calls of cpu, " in output
    assert ", 0 wrong" in output


@pytest.mark.parametrize("way", ["1", "race"])
def test_eight_threads(way: str, tmp_path: Path) -> None:
    """Without a report where they share what they read, with one where they race."""
    environment = sanitized.package("thread", tmp_path)
    done = run(tmp_path, str(SUPPORT / "threaded.py"), way, **environment)
    raced = "ThreadSanitizer: data race" in done.stderr
    assert (raced, done.returncode != 0) == (way == "race",) * 2, done.stderr[-2000:]
    assert way == "race" or "done" in done.stdout
