"""What nvcc makes of the CUDA kernels, which needs no GPU: registers, stack, widths of accesses."""

from __future__ import annotations

import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from native import once
from outside import ROOT

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")


class Kernel(NamedTuple):
    """One instance of a kernel on one architecture; accesses are instructions of 128 bits."""

    registers: int
    stack: int  # bytes: spilled registers would be here
    constant: int  # loads by the cache for what no thread writes
    loads: int  # others, from global or any memory
    stores: int


def run(*command: str | Path) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def compiled() -> Path:
    """A folder with each source's PTX, and what ptxas says of it, for each architecture."""
    options = "-std=c++17", "-O3"

    def make(folder: Path) -> None:
        def compile_one(job: tuple[Path, str]) -> None:
            source, architecture = job
            ptx = folder / f"{source.stem}.{architecture}.ptx"
            run("nvcc", *options, "-ptx", f"-arch={architecture}", "-o", ptx, source)
            cubin = ptx.with_suffix(".cubin")
            said = run("nvcc", "-cubin", f"-arch={architecture}", "-Xptxas=-v", "-o", cubin, ptx)
            ptx.with_suffix(".txt").write_text(said)

        folder.mkdir()
        jobs = [(s, a) for s in sorted((ROOT / "csrc/cuda").glob("*.cu")) for a in ARCHITECTURES]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, jobs))

    made_of = run("nvcc", "--version"), options, ARCHITECTURES
    return once("ptx", made_of, [*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*")], make)


def short(mangled: str) -> str:
    """``at_loss_kernel<Square, false>`` of a mangled name."""
    pattern = r"at_fused\d+(\w+?_kernel)(?:I(?:N?S_\d+(\w+?)E)?((?:Lb[01]E)+))?"
    name, exponent, flags = re.search(pattern, mangled).groups()
    values = ["true" if flag == "1" else "false" for flag in re.findall(r"Lb([01])E", flags or "")]
    return f"{name}<{', '.join([exponent] * bool(exponent) + values)}>"


def kernels() -> dict[tuple[str, str], Kernel]:
    """Every instance by its architecture and name."""
    found = {}
    wide = r"(?:\.\w+)*\.v(?:4\.\w32|2\.\w64)\s"
    for ptx in sorted(compiled().glob("*.ptx")):
        said, text = ptx.with_suffix(".txt").read_text(), ptx.read_text()
        bodies = dict(re.findall(r"\.entry (\w+)\((.*?)\n}", text, re.S))
        stacks = dict(re.findall(r"properties for (\w+)\s+(\d+) bytes stack frame", said))
        entries = re.findall(
            r"entry function '(\w+)' for '(\w+)'.*?Used (\d+) registers", said, re.S
        )
        for mangled, architecture, registers in entries:
            counts = [
                len(re.findall(pattern + wide, bodies[mangled]))
                for pattern in (r"\bld\.global\.nc", r"\bld(?!\.param|\.global\.nc)", r"\bst\b")
            ]
            kernel = Kernel(int(registers), int(stacks[mangled]), *counts)
            found[architecture, short(mangled)] = kernel
    return found
