"""Compile the CUDA kernels with nvcc and read their registers, stack and 128-bit accesses."""

from __future__ import annotations

import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from native import cached
from outside import ROOT

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")


class Kernel(NamedTuple):
    """An instance of a kernel on one architecture. Accesses count instructions of 128 bits."""

    registers: int
    stack: int  # bytes, with spilled registers
    constant: int  # loads through the read-only cache
    loads: int  # other loads
    stores: int


def run(*command: str | Path) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def compiled() -> Path:
    """Return a folder with the PTX and the output of ptxas for each source and architecture."""
    options = "-std=c++17", "-O3"

    def make(folder: Path) -> None:
        def compile_one(job: tuple[Path, str]) -> None:
            source, architecture = job
            ptx = folder / f"{source.stem}.{architecture}.ptx"
            run("nvcc", *options, "-ptx", f"-arch={architecture}", "-o", ptx, source)
            cubin = ptx.with_suffix(".cubin")
            log = run("nvcc", "-cubin", f"-arch={architecture}", "-Xptxas=-v", "-o", cubin, ptx)
            ptx.with_suffix(".txt").write_text(log)

        folder.mkdir()
        jobs = [(s, a) for s in sorted((ROOT / "csrc/cuda").glob("*.cu")) for a in ARCHITECTURES]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, jobs))

    key = run("nvcc", "--version"), options, ARCHITECTURES
    return cached("ptx", key, [*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*")], make)


def demangled(mangled: str) -> str:
    """Return a kernel's name and template arguments, such as ``at_loss_kernel<Square, false>``."""
    pattern = r"at_fused\d+(\w+?_kernel)(?:I(?:N?S_\d+(\w+?)E)?((?:Lb[01]E)+))?"
    name, exponent, flags = re.search(pattern, mangled).groups()
    values = ["true" if flag == "1" else "false" for flag in re.findall(r"Lb([01])E", flags or "")]
    return f"{name}<{', '.join([exponent] * bool(exponent) + values)}>"


def kernels() -> dict[tuple[str, str], Kernel]:
    """Return all kernel instances by architecture and name."""
    instances = {}
    wide = r"(?:\.\w+)*\.v(?:4\.\w32|2\.\w64)\s"
    for ptx in sorted(compiled().glob("*.ptx")):
        log, text = ptx.with_suffix(".txt").read_text(), ptx.read_text()
        bodies = dict(re.findall(r"\.entry (\w+)\((.*?)\n}", text, re.S))
        stacks = dict(re.findall(r"properties for (\w+)\s+(\d+) bytes stack frame", log))
        entries = re.findall(
            r"entry function '(\w+)' for '(\w+)'.*?Used (\d+) registers", log, re.S
        )
        for mangled, architecture, registers in entries:
            counts = [
                len(re.findall(pattern + wide, bodies[mangled]))
                for pattern in (r"\bld\.global\.nc", r"\bld(?!\.param|\.global\.nc)", r"\bst\b")
            ]
            kernel = Kernel(int(registers), int(stacks[mangled]), *counts)
            instances[architecture, demangled(mangled)] = kernel
    return instances
