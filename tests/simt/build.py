"""Builds the package's CUDA code as C++ for the CPU: the very kernels, in the harness (simt.h).

    callbacks   every access of a kernel is watched: races, uninitialised or misaligned accesses
    sanitizers  AddressSanitizer and UndefinedBehaviorSanitizer over kernels and operators

The library registers the operators under ``at_fused_simt``. Builds are kept in a folder by the hash
of what they are made of.
"""

from __future__ import annotations

from pathlib import Path

import torch
from native import built
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]
SIMT = Path(__file__).parent
CUDA = ROOT / "csrc/cuda"

COMMON = ["-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-DAT_FUSED_SIMT"]
WARNINGS = ["-Wno-unknown-pragmas", "-Wno-attributes"]
# Splitting of 16-byte accesses would hide them from the alignment check and the counters.
WATCHED = [
    "-O1",
    "-fno-tree-sra",
    "-fno-tree-fre",
    "-fsanitize=thread",
    "--param=tsan-instrument-func-entry-exit=0",
]
# Checks of addresses are calls, which are compiled in a third of the time.
SANITIZED = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
SANITIZED += ["--param=asan-instrumentation-with-call-threshold=0"]


def sources(mode: str) -> list[tuple[Path, list[str]]]:
    """Source files with the options that are theirs."""
    kernels = [(file, ["-x", "c++"]) for file in sorted(CUDA.glob("*.cu"))]
    host = [(file, []) for file in (*sorted(CUDA.glob("*.cpp")), SIMT / "all.cpp")]
    if mode == "callbacks":
        return [(f, WATCHED + o) for f, o in kernels] + [(f, ["-O2", *o]) for f, o in host]
    return [(f, SANITIZED + o) for f, o in kernels + host]


def build(mode: str = "callbacks") -> Path:
    """The library of a mode, built if need be."""
    include = ["-I", str(SIMT / "include"), "-I", str(SIMT)]
    for path in cpp_extension.include_paths():
        include += ["-isystem", path]
    options = [*COMMON, *WARNINGS, "-DTORCH_TARGET_VERSION=0x020a000000000000", *include]
    flags = ["-fsanitize=address,undefined"] if mode == "sanitizers" else []
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10", "-ldl"]
    files = [*ROOT.glob("csrc/*.h"), *CUDA.iterdir(), *SIMT.rglob("*.[hc]*")]
    return built(
        f"simt_{mode}",
        [(file, [*options, *own]) for file, own in sources(mode)],
        ["-shared", *flags, *libraries],
        [file for file in files if file.is_file()],
        torch.__version__,
    )
