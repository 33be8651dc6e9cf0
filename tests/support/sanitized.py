"""Copies of the package with a CPU library that is built under sanitizers.

    address  AddressSanitizer and UndefinedBehaviorSanitizer
    thread   ThreadSanitizer

Only the baseline is built, because sanitizers do not check the masked loads and stores of AVX2 and
AVX-512. guarded.py checks these.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import torch
from native import COMPILER, build_library
from outside import ROOT, TESTS
from torch.utils import cpp_extension

import at_fused

STAND_INS = TESTS / "kernels/sanitizers/stand_ins.cpp"
CSRC = ROOT / "csrc"

# These options save compile time: address checks are calls, and kernels have only those checks of
# "undefined" that apply to them.
CALLS = "--param=asan-instrumentation-with-call-threshold=0"
ARITHMETIC = "shift,integer-divide-by-zero,signed-integer-overflow,bounds,float-cast-overflow"
KERNELS = {"address": f"address,{ARITHMETIC}", "thread": "thread"}
OPERATORS = {"address": "address,undefined", "thread": "thread"}
PRELOADED = {"address": ("asan", "ubsan", "stdc++"), "thread": ("tsan",)}
# The thread exit in the dynamic linker and the locks of torch and Python are not instrumented.
SUPPRESSIONS = "race:_dl_deallocate_tls\ncalled_from_lib:libtorch_cpu.so\n"


def build(mode: str) -> Path:
    """Build the library, or return the cached one."""
    options = ["-std=c++20", "-O1", "-g1", "-w", "-fPIC", "-fvisibility=hidden", "-fno-math-errno"]
    options += ["-ffp-contract=fast", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    options += [word for path in cpp_extension.include_paths() for word in ("-isystem", path)]
    options += ["-fno-sanitize-recover=all", CALLS]
    checked = dict.fromkeys((STAND_INS, CSRC / "cpu/operators.cpp"), OPERATORS[mode])
    checked[CSRC / "cpu/kernels_baseline.cpp"] = KERNELS[mode]
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]
    return build_library(
        f"cpu_{mode}",
        [(file, [*options, f"-fsanitize={checks}"]) for file, checks in checked.items()],
        # -Bsymbolic: functions of stand_ins.cpp take precedence over torch's.
        ["-shared", "-Wl,-Bsymbolic", f"-fsanitize={OPERATORS[mode]}", *libraries],
        [*CSRC.glob("*.h"), *CSRC.glob("cpu/*.h")],
        torch.__version__,
    )


def preloaded(mode: str) -> str:
    """Return the LD_PRELOAD for a Python that was built without sanitizers."""
    commands = [[COMPILER, f"-print-file-name=lib{name}.so"] for name in PRELOADED[mode]]
    return " ".join(subprocess.check_output(each, text=True).strip() for each in commands)


def package(mode: str, folder: Path) -> dict[str, str]:
    """Copy the package to ``folder`` with that library, and return environment variables for it."""
    ignored = shutil.ignore_patterns("__pycache__", "_cpu*.so", "_cuda*.so")
    copy = shutil.copytree(Path(at_fused.__file__).parent, folder / "at_fused", ignore=ignored)
    shutil.copy(build(mode), copy / "_cpu.abi3.so")
    suppressions = folder / "suppressions"
    suppressions.write_text(SUPPRESSIONS)
    return {
        "PYTHONPATH": str(folder),
        "AT_FUSED_CPU_ISA": "baseline",
        "LD_PRELOAD": preloaded(mode),
        # detect_leaks=0: Python and torch do not free everything at exit.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096",
        "TSAN_OPTIONS": f"suppressions={suppressions}:report_mutex_bugs=0",
        "OMP_NUM_THREADS": "1",
    }
