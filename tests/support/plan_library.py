"""csrc/cuda/plan.h, compiled for ctypes (plan/plan.cpp)."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

from native import built
from outside import ROOT, TESTS

CSRC = ROOT / "csrc"
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
    source = TESTS / "kernels/plan/plan.cpp"
    options = ["-std=c++17", "-O1", "-fPIC"]
    headers = [*CSRC.glob("*.h"), *CSRC.glob("cuda/*.h")]
    return ctypes.CDLL(str(built("plan", [(source, options)], ["-shared"], headers)))


class Access(NamedTuple):
    """params.h: Access."""

    vector: int
    channels_per_row: int
    lanes: int


class Sweep(NamedTuple):
    """params.h: the pieces of SweepFeature."""

    row_pieces: int
    rows: int
    column_pieces: int
    columns: int


class Member(NamedTuple):
    """A feature or a pair of a launch, in the order of its tasks."""

    number: int  # in the list
    first_task: int
    tasks: int
    bytes_of_task: int  # read, at the most
    samples: int  # whole ones of a task; of pairs 0: they are shared
    pieces: int  # of a sample's map
    positions: int  # of a piece
    student: Access  # or the feature
    teacher: Access | None = None
    sweep: Sweep | None = None
    kept: bool = False  # on chip, where its gradient is made as well


class Launch(NamedTuple):
    """A launch's members, and the bytes that each of its blocks has in shared memory."""

    members: list[Member]
    shared: int = 0
    map_bytes: int = 0
    kept_bytes: int = 0


def _given(features: Sequence[Feature] | None) -> Any:
    flat = [number for x in features or () for number in x]
    return (ctypes.c_int64 * len(flat))(*flat) if features else None


def _called(name: str, *arguments: Any, count: int) -> Iterator[int]:
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
    """The launch of attention_map_backward, or of a tap's with what it is added to."""
    given = map(_given, (features, outs, addends))
    numbers = _called("sweeps", *given, ctypes.byref(limits), count=len(features))
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
    """The launch of at_loss; with ``outs`` of at_value_and_grad."""
    given = *map(_given, (students, teachers, outs)), ctypes.c_bool(fp64)
    numbers = _called("pairs", *given, ctypes.byref(limits), count=len(students))
    shared = list(itertools.islice(numbers, 3))
    members = [
        _member(numbers)._replace(
            teacher=Access(*itertools.islice(numbers, 3)), kept=bool(next(numbers))
        )
        for _ in students
    ]
    return Launch(members, *shared)
