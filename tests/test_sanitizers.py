"""The contract on the CUDA kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from simt_backend import build

HERE = Path(__file__).parent
pytestmark = pytest.mark.long


def sanitizer_libraries() -> str:
    """What must be loaded before Python, which was built without them."""
    compiler = os.environ.get("CXX", "g++")
    names = ("libasan.so", "libubsan.so", "libstdc++.so")
    found = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in names
    ]
    return " ".join(found)


def run_sanitized(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "AT_FUSED_SIMT": "sanitizers",
        "LD_PRELOAD": sanitizer_libraries(),
        # What Python and torch keep to the end is not a leak of ours.
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=environment,
    )


def test_the_contract(tmp_path: Path) -> None:
    build.build("sanitizers")
    pytest_executable = shutil.which("pytest", path=str(Path(sys.executable).parent))
    assert pytest_executable, "pytest is installed beside Python"
    names = "contract", "general_maps", "tap_operators", "value_and_grad", "kd", "distance"
    files = [str(HERE / f"test_{name}.py") for name in names]
    # Derivatives of derivatives add nothing here, and compilers do not run under a sanitizer.
    chosen = "simt and not gradcheck and not second and not compile and not opcheck"
    done = run_sanitized(
        tmp_path, pytest_executable, "-q", "-p", "no:cacheprovider", "-k", chosen, *files
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert " passed" in done.stdout


def test_an_error_would_be_found(tmp_path: Path) -> None:
    """A feature with a forbidden piece in its middle."""
    code = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import ctypes, torch
from simt_backend import load
harness, functions = load()
asan = ctypes.CDLL(None)
x = torch.frombuffer(memoryview(bytearray(1024)), dtype=torch.float32).view(1, 4, 8, 8)
asan.__asan_poison_memory_region(ctypes.c_void_p(x.data_ptr() + 512), 64)
functions.attention_map([x], 2.0, "mean")
"""
    done = run_sanitized(tmp_path, "-c", code)
    assert done.returncode != 0
    assert "AddressSanitizer: use-after-poison" in done.stderr, done.stderr[-2000:]
