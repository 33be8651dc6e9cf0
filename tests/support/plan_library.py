"""Python interface to csrc/cuda/plan.h, compiled for ctypes by tests/kernels/plan/plan.cpp."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

from native import build_library
from outside import ROOT, TESTS

CSRC = ROOT / "csrc"
BYTES = {0: 4, 1: 8, 2: 2, 3: 2}  # fp32, fp64, fp16, bf16: csrc/feature.h, Dtype
PLANAR, INTERLEAVED = 0, 1


class Limits(ctypes.Structure):
    """Limits in plan.h."""

    _fields_ = (
        ("multiprocessors", ctypes.c_int32),
        ("shared_per_block", ctypes.c_int64),
        ("shared_per_multiprocessor", ctypes.c_int64),
    )


H100 = Limits(132, 232448, 233472)


class Feature(NamedTuple):
    """Feature in feature.h, in the order of plan.cpp."""

    B: int
    C: int
    N: int
    batch_stride: int
    line_stride: int
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
    source = TESTS / "kernels/plan/plan.cpp"
    options = ["-std=c++17", "-O1", "-fPIC"]
    headers = [*CSRC.glob("*.h"), *CSRC.glob("cuda/*.h")]
    return ctypes.CDLL(str(build_library("plan", [(source, options)], ["-shared"], headers)))


class Access(NamedTuple):
    """Access in params.h."""

    vector: int
    channels_per_row: int
    lanes: int


class Sweep(NamedTuple):
    """The pieces of SweepFeature in params.h."""

    row_pieces: int
    rows_per_piece: int
    column_pieces: int
    columns_per_piece: int


class Member(NamedTuple):
    """A feature or a pair of a launch, in the order of its tasks."""

    index: int  # in the list
    first_task: int
    tasks: int
    bytes_per_task: int  # upper bound of the bytes read
    samples_per_task: int  # 0 if several blocks share a sample
    pieces: int  # of a sample's map
    positions_per_piece: int
    student: Access  # or of the feature
    teacher: Access | None = None
    sweep: Sweep | None = None
    caches_student: bool = False  # in shared memory, to write its gradient in the same launch


class Launch(NamedTuple):
    """The members of a launch, and the bytes of shared memory per block."""

    members: list[Member]
    shared: int = 0
    map_bytes: int = 0
    student_bytes: int = 0


def _array(features: Sequence[Feature] | None) -> Any:
    flat = [number for x in features or () for number in x]
    return (ctypes.c_int64 * len(flat))(*flat) if features else None


def _call(name: str, *arguments: Any, count: int) -> Iterator[int]:
    out = (ctypes.c_int64 * (3 + 24 * count))()
    getattr(_functions(), f"plan_{name}_c")(count, *arguments, out)
    return iter(out)


def _member(numbers: Iterator[int]) -> Member:
    first = list(itertools.islice(numbers, 7))
    return Member(*first, student=Access(*itertools.islice(numbers, 3)))


def plan_sweeps(
    features: Sequence[Feature],
    outs: Sequence[Feature],
    limits: Limits,
    addends: Sequence[Feature] | None = None,
) -> Launch:
    """Plan a launch of attention_map_backward, or of a tap if there are ``addends``."""
    arrays = map(_array, (features, outs, addends))
    numbers = _call("sweeps", *arrays, ctypes.byref(limits), count=len(features))
    return Launch(
        [_member(numbers)._replace(sweep=Sweep(*itertools.islice(numbers, 4))) for _ in features]
    )


def plan_pairs(
    students: Sequence[Feature],
    teachers: Sequence[Feature],
    limits: Limits,
    outs: Sequence[Feature] | None = None,
    fp64: bool = False,
) -> Launch:
    """Plan a launch of at_loss, or of at_value_and_grad if there are ``outs``."""
    arrays = *map(_array, (students, teachers, outs)), ctypes.c_bool(fp64)
    numbers = _call("pairs", *arrays, ctypes.byref(limits), count=len(students))
    shared = list(itertools.islice(numbers, 3))
    members = [
        _member(numbers)._replace(
            teacher=Access(*itertools.islice(numbers, 3)), caches_student=bool(next(numbers))
        )
        for _ in students
    ]
    return Launch(members, *shared)
