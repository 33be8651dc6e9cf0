"""Copies of the package whose CPU library is built under sanitizers.

    address  AddressSanitizer and UndefinedBehaviorSanitizer
    thread   ThreadSanitizer

Only the baseline is built: sanitizers do not see what masked loads and stores of the other levels
touch (guarded.py has pages for these).
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import torch
from native import COMPILER, built
from outside import ROOT, TESTS
from torch.utils import cpp_extension

import at_fused

STAND_INS = TESTS / "kernels/sanitizers/stand_ins.cpp"
CSRC = ROOT / "csrc"

# This keeps the compiler short: checks of addresses are calls, and of all of "undefined" kernels
# have what can happen in them.
CALLS = "--param=asan-instrumentation-with-call-threshold=0"
ARITHMETIC = "shift,integer-divide-by-zero,signed-integer-overflow,bounds,float-cast-overflow"
KERNELS = {"address": f"address,{ARITHMETIC}", "thread": "thread"}
OPERATORS = {"address": "address,undefined", "thread": "thread"}
PRELOADED = {"address": ("asan", "ubsan", "stdc++"), "thread": ("tsan",)}
# A thread's end, in the dynamic linker, is not instrumented, nor are locks of torch's and Python's.
SUPPRESSIONS = "race:_dl_deallocate_tls\ncalled_from_lib:libtorch_cpu.so\n"


def build(mode: str) -> Path:
    """The library, built if need be."""
    options = ["-std=c++20", "-O1", "-g1", "-w", "-fPIC", "-fvisibility=hidden", "-fno-math-errno"]
    options += ["-ffp-contract=fast", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    options += [word for path in cpp_extension.include_paths() for word in ("-isystem", path)]
    options += ["-fno-sanitize-recover=all", CALLS]
    checked = dict.fromkeys((STAND_INS, CSRC / "cpu/operators.cpp"), OPERATORS[mode])
    checked[CSRC / "cpu/kernels_baseline.cpp"] = KERNELS[mode]
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]
    return built(
        f"cpu_{mode}",
        [(file, [*options, f"-fsanitize={checks}"]) for file, checks in checked.items()],
        # What it defines itself (stand_ins.cpp) comes before what torch does.
        ["-shared", "-Wl,-Bsymbolic", f"-fsanitize={OPERATORS[mode]}", *libraries],
        [*CSRC.glob("*.h"), *CSRC.glob("cpu/*.h")],
        torch.__version__,
    )


def preloaded(mode: str) -> str:
    """What must be loaded before Python, which was built without them."""
    asked = [[COMPILER, f"-print-file-name=lib{name}.so"] for name in PRELOADED[mode]]
    return " ".join(subprocess.check_output(ask, text=True).strip() for ask in asked)


def package(mode: str, folder: Path) -> dict[str, str]:
    """A copy of the package in ``folder`` with that library, and what its environment adds."""
    ignored = shutil.ignore_patterns("__pycache__", "_cpu*.so", "_cuda*.so")
    copied = shutil.copytree(Path(at_fused.__file__).parent, folder / "at_fused", ignore=ignored)
    shutil.copy(build(mode), copied / "_cpu.abi3.so")
    suppressions = folder / "suppressions"
    suppressions.write_text(SUPPRESSIONS)
    return {
        "PYTHONPATH": str(folder),
        "AT_FUSED_CPU_ISA": "baseline",
        "LD_PRELOAD": preloaded(mode),
        # What Python and torch keep to the end is not a leak of ours.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096",
        "TSAN_OPTIONS": f"suppressions={suppressions}:report_mutex_bugs=0",
        "OMP_NUM_THREADS": "1",
    }
