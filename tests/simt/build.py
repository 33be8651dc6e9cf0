"""Builds the package's CUDA code as C++ for the CPU: the very kernels, in the harness (simt.h).

    callbacks   every access of a kernel is watched: races, uninitialised or misaligned accesses
    sanitizers  AddressSanitizer and UndefinedBehaviorSanitizer over kernels and operators

The library registers the operators under ``at_fused_simt``. Builds are kept in a folder by the hash
of what they are made of.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
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
    "--param=tsan-distinguish-volatile=1",
]
SANITIZED = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def sources(mode: str) -> list[tuple[Path, list[str]]]:
    """Source files with the options that are theirs."""
    kernels = [(file, ["-x", "c++"]) for file in sorted(CUDA.glob("*.cu"))]
    host = [(file, []) for file in (*sorted(CUDA.glob("*.cpp")), SIMT / "all.cpp")]
    if mode == "callbacks":
        return [(f, WATCHED + o) for f, o in kernels] + [(f, ["-O2", *o]) for f, o in host]
    return [(f, SANITIZED + o) for f, o in kernels + host]


def build(mode: str = "callbacks") -> Path:
    """The library of a mode, built if need be."""
    compiler = os.environ.get("CXX", "g++")
    include = ["-I", str(SIMT / "include"), "-I", str(SIMT)]
    for path in cpp_extension.include_paths():
        include += ["-isystem", path]
    options = [*COMMON, *WARNINGS, "-DTORCH_TARGET_VERSION=0x020a000000000000", *include]
    digest = hashlib.sha256(repr((options, sources(mode), torch.__version__)).encode())
    for file in sorted([*ROOT.glob("csrc/*.h"), *CUDA.iterdir(), *SIMT.rglob("*.[hc]*")]):
        if file.is_file():
            digest.update(file.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"at_fused_simt_{os.getuid()}"
    library = folder / f"{mode}_{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder.mkdir(exist_ok=True)

    with tempfile.TemporaryDirectory(dir=folder) as work:

        def compile_one(job: tuple[Path, list[str]]) -> str:
            file, own = job
            target = f"{work}/{file.name}.o"
            command = [compiler, *options, *own, "-c", str(file), "-o", target]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources(mode)))
        torch_library = Path(torch.__file__).parent / "lib"
        flags = ["-fsanitize=address,undefined"] if mode == "sanitizers" else []
        link = [f"-L{torch_library}", "-ltorch_cpu", "-lc10", "-ldl", "-o", f"{work}/library.so"]
        subprocess.run([compiler, "-shared", *flags, *objects, *link], check=True)
        os.replace(f"{work}/library.so", library)
    return library


if __name__ == "__main__":
    sys.stdout.write(f"{build(*sys.argv[1:2])}\n")
