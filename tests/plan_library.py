"""csrc/cuda/plan.h, compiled for ctypes (plan/plan.cpp)."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from native import built

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
BYTES = {0: 4, 1: 8, 2: 2, 3: 2}  # fp32, fp64, fp16, bf16: csrc/feature.h, Dtype
PLANAR, INTERLEAVED = 0, 1


class Limits(ctypes.Structure):
    """plan.h: Limits."""

    _fields_ = (
        ("multiprocessors", ctypes.c_int32),
        ("shared_per_block", ctypes.c_int64),
        ("shared_per_multiprocessor", ctypes.c_int64),
    )


H100 = Limits(132, 232448, 233472)


class Feature(NamedTuple):
    """feature.h: Feature, in the order of plan.cpp."""

    B: int
    C: int
    N: int
    batch: int
    line: int
    address: int
    dtype: int
    layout: int

    @property
    def bytes(self) -> int:
        return self.C * self.N * BYTES[self.dtype]


def dense(b: int, c: int, n: int, dtype: int = 0, layout: int = PLANAR) -> Feature:
    return Feature(b, c, n, c * n, n if layout == PLANAR else c, 4096, dtype, layout)


@cache
def _functions() -> ctypes.CDLL:
    source = HERE / "plan/plan.cpp"
    options = ["-std=c++17", "-O1", "-fPIC"]
    headers = [*CSRC.glob("*.h"), *CSRC.glob("cuda/*.h")]
    return ctypes.CDLL(str(built("plan", [(source, options)], ["-shared"], headers)))


def plan(name: str, *arguments: Any) -> list[int]:
    """What ``plan_<name>_c`` of plan.cpp puts out."""
    out = (ctypes.c_int64 * 24)()
    given = [
        (ctypes.c_int64 * 8)(*a)
        if isinstance(a, Feature)
        else ctypes.byref(a)
        if isinstance(a, Limits)
        else ctypes.c_bool(a)
        if isinstance(a, bool)
        else ctypes.c_int64(a)
        for a in arguments
    ]
    getattr(_functions(), f"plan_{name}_c")(*given, out)
    return list(out)
