"""How many instructions the CPU kernels take, counted by valgrind (cost/cost.cpp).

A count is the same on a busy machine as on an idle one. ``python tests/instructions.py`` counts the
cases of ``RECORDED`` and writes cost/recorded.json.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from native import COMPILER, built

HERE = Path(__file__).parent
ROOT = HERE.parent
RECORD = HERE / "cost/recorded.json"
FLOAT32, FLOAT64, FLOAT16, BFLOAT16 = range(4)  # csrc/feature.h
PLANAR, INTERLEAVED = range(2)
# As setup.py; valgrind knows no AVX-512, whose kernels are these with wider vectors.
OPTIONS = ["-std=c++20", "-O3", "-fno-math-errno", "-ffp-contract=fast", "-Wno-psabi"]
LEVELS = ("avx2", "baseline")


class Case(NamedTuple):
    """One call of a kernel on one sample."""

    kernel: str  # map, loss, backward, or streaming: backward past the caches
    dtype: int = FLOAT32
    layout: int = PLANAR
    C: int = 64
    N: int = 256
    p: float = 2.0
    offset: int = 0  # elements by which the features miss a cache line
    level: str = "avx2"

    def line(self) -> str:
        """As cost.cpp reads it."""
        return (
            f"{self.level} {self.kernel} {self.dtype} {self.layout} "
            f"{self.C} {self.N} {self.p} {self.offset}"
        )


# What must not become dearer: each kernel in each dtype, layout and kind of exponent, at a usual
# size and at the 7x7 of last stages.
RECORDED = [
    Case(kernel, dtype, layout, 64, n, p, 0, level)
    for kernel in ("map", "backward")
    for dtype in (FLOAT32, FLOAT64, FLOAT16, BFLOAT16)
    for layout in (PLANAR, INTERLEAVED)
    for n in (49, 256)
    for p in (1.0, 2.0, 4.0, 3.0)
    for level in LEVELS
]
RECORDED += [
    Case("loss", dtype, N=n, level=level)
    for dtype in (FLOAT32, FLOAT64)
    for n in (1, 49, 1024)
    for level in LEVELS
]


def compiler() -> str:
    """The compiler in use, and the first part of its version: others count otherwise."""
    version = subprocess.run([COMPILER, "-dumpversion"], capture_output=True, text=True, check=True)
    return f"{Path(COMPILER).name} {version.stdout.split('.')[0].strip()}"


def program() -> Path:
    """cost.cpp with the kernels, compiled if need be."""
    files = [HERE / "cost/cost.cpp", *(ROOT / f"csrc/cpu/kernels_{n}.cpp" for n in LEVELS)]
    headers = [*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cpu/*.h")]
    return built("cost", [(file, OPTIONS) for file in files], [], headers, compiler())


def count(cases: list[Case]) -> dict[Case, int]:
    """Instructions of each case."""
    with tempfile.TemporaryDirectory() as work:
        subprocess.run(
            ["valgrind", "-q", "--tool=callgrind", f"--callgrind-out-file={work}/out", program()],
            input="\n".join(case.line() for case in cases),
            text=True,
            check=True,
        )
        found = {}
        for i, case in enumerate(cases, 1):
            total = re.search(r"(?m)^summary: (\d+)", Path(f"{work}/out.{i}").read_text())
            assert total, f"callgrind counted nothing for {case}"
            found[case] = int(total[1])
    return found


def write_record() -> None:
    """Makes what is counted now the measure."""
    counts = {case.line(): n for case, n in count(RECORDED).items()}
    content = {"compiler": compiler(), "instructions": counts}
    RECORD.write_text(json.dumps(content, indent=0) + "\n")


if __name__ == "__main__":
    write_record()
