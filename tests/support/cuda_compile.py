"""What the CUDA kernels were compiled to: registers, stack, widths of loads and stores.

Reads the machine code in the built library, or where this installation has none compiles the
kernels with nvcc, which needs no GPU. ``python tests/support/cuda_compile.py`` prints the table.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from native import once

import at_fused

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")


class Kernel(NamedTuple):
    """One instance of a kernel on one architecture."""

    architecture: str
    name: str  # without its namespace
    registers: int
    stack: int  # bytes: spilled registers would be here
    shared: int  # bytes, static; 1 KB of it is the system's own from sm_90 on
    loads: dict[int, int]  # instructions by bits, from global or any memory
    stores: dict[int, int]
    constant: int  # loads of 128 bits that go by the cache for what no thread writes


def tool(name: str) -> str:
    """cuobjdump: the toolkit's, or the one that comes with Triton."""
    found = shutil.which(name)
    if found is None and (triton := importlib.util.find_spec("triton")):
        bundled = Path(str(triton.origin)).parent / "backends/nvidia/bin" / name
        found = str(bundled) if bundled.exists() else None
    if found is None:
        raise FileNotFoundError(f"no {name}: neither a CUDA toolkit's nor Triton's")
    return found


def run(*command: str | Path) -> str:
    return subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, check=True
    ).stdout


def library() -> Path | None:
    """The CUDA library of this installation, if it was built with one."""
    return next(Path(at_fused.__file__).parent.glob("_cuda*.so"), None)


def compiled() -> list[Path]:
    """Files with the kernels' machine code."""
    if built := library():
        return [built]
    options = "-std=c++17", "-O3", "-cubin"

    def make(folder: Path) -> None:
        def compile_one(job: tuple[Path, str]) -> None:
            source, architecture = job
            target = folder / f"{source.stem}.{architecture}.cubin"
            run("nvcc", *options, f"-arch={architecture}", "-o", target, source)

        folder.mkdir()
        jobs = [(s, a) for s in sorted((ROOT / "csrc/cuda").glob("*.cu")) for a in ARCHITECTURES]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, jobs))

    made_of = run("nvcc", "--version"), options, ARCHITECTURES
    files = [*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*")]
    return sorted(once("cubin", made_of, files, make).iterdir())


def short(mangled: str) -> str:
    """``at_loss_kernel<Square, false>`` of a mangled name."""
    pattern = r"at_fused\d+(\w+?_kernel)I(?:N?S_\d+(\w+?)E)?((?:Lb[01]E)+)"
    name, exponent, flags = re.search(pattern, mangled).groups()
    values = ["true" if flag == "1" else "false" for flag in re.findall(r"Lb([01])E", flags)]
    return f"{name}<{', '.join([exponent] * bool(exponent) + values)}>"


def widths(sass: str, instruction: str) -> dict[int, int]:
    found: dict[int, int] = {}
    for suffix in re.findall(rf"\b{instruction}\.E((?:\.\w+)*) ", sass):
        bits = 128 if ".128" in suffix else 64 if ".64" in suffix else 16 if "16" in suffix else 32
        found[bits] = found.get(bits, 0) + 1
    return found


def kernels(files: list[Path]) -> list[Kernel]:
    """Every instance in the files."""
    found = {}
    for file in files:
        usage = run(tool("cuobjdump"), "-res-usage", file)
        sass = run(tool("cuobjdump"), "-sass", file)
        bodies = {}
        alone = file.suffixes[0][1:]  # a single object's output does not say what it is for
        architecture = alone
        for part in re.split(r"(?m)^\s*(?=Function : |arch = )", sass):
            if match := re.match(r"arch = (\w+)", part):
                architecture = match[1]
            elif match := re.match(r"Function : (\w+)", part):
                bodies[architecture, match[1]] = part
        architecture = alone
        for line in re.finditer(
            r"arch = (\w+)|Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage
        ):
            if line[1]:
                architecture = line[1]
                continue
            body = bodies[architecture, line[2]]
            loads, stores = widths(body, "LDG?"), widths(body, "STG?")
            numbers = int(line[3]), int(line[4]), int(line[5])
            constant = len(re.findall(r"\bLDG\.E\.128\.CONSTANT ", body))
            kernel = Kernel(architecture, short(line[2]), *numbers, loads, stores, constant)
            found[architecture, kernel.name] = kernel
    return sorted(found.values(), key=lambda k: (k.name, int(k.architecture[3:])))


def table(rows: list[Kernel]) -> list[str]:
    """The instances as Markdown."""
    lines = [
        "| kernel | target | registers | spilled bytes | 128-bit loads | 128-bit stores |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for k in rows:
        cells = k.registers, k.stack, k.loads.get(128, 0), k.stores.get(128, 0)
        lines.append(f"| `{k.name}` | {k.architecture} | {' | '.join(map(str, cells))} |")
    return lines


if __name__ == "__main__":
    sys.stdout.write("\n".join(table(kernels(compiled()))) + "\n")
