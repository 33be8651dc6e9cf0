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
    """params.h: Sweep, without what it writes to."""

    lanes: int
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
    pieces: int  # of a sample's map, or of both maps of a shared one
    positions: int  # of a piece
    student: Access  # or the feature
    teacher: Access | None = None
    sweep: Sweep | None = None  # of the gradient that this launch writes


class Launch(NamedTuple):
    """A launch's members, and the bytes that each of its blocks has in shared memory."""

    members: list[Member]
    shared: int = 0
    map_bytes: int = 0
    kept_bytes: int = 0


def _given(features: Sequence[Feature]) -> Any:
    flat = [number for x in features for number in x]
    return (ctypes.c_int64 * len(flat))(*flat)


def _called(name: str, count: int, *arguments: Any) -> Iterator[int]:
    out = (ctypes.c_int64 * (3 + 24 * count))()
    getattr(_functions(), f"plan_{name}_c")(count, *arguments, out)
    return iter(out)


def _taken(numbers: Iterator[int], count: int) -> list[int]:
    return list(itertools.islice(numbers, count))


def plan_maps(features: Sequence[Feature], limits: Limits) -> Launch:
    """The launch of attention_map."""
    numbers = _called("maps", len(features), _given(features), ctypes.byref(limits))
    members = [Member(*_taken(numbers, 7), student=Access(*_taken(numbers, 3))) for _ in features]
    return Launch(members, 8192)


def plan_sweeps(
    features: Sequence[Feature],
    outs: Sequence[Feature],
    limits: Limits,
    addends: Sequence[Feature] | None = None,
) -> Launch:
    """The launch of attention_map_backward, or of a tap's with what it is added to."""
    added = _given(addends) if addends else None
    given = _given(features), _given(outs), added, ctypes.byref(limits)
    numbers = _called("sweeps", len(features), *given)
    return Launch(
        [
            Member(
                *_taken(numbers, 7),
                student=Access(*_taken(numbers, 3)),
                sweep=Sweep(*_taken(numbers, 5)),
            )
            for _ in features
        ]
    )


def plan_pairs(
    students: Sequence[Feature],
    teachers: Sequence[Feature],
    limits: Limits,
    outs: Sequence[Feature] | None = None,
    fp64: bool = False,
) -> Launch:
    """The launch of at_loss; with ``outs`` the first of at_value_and_grad."""
    out = _given(outs) if outs else None
    given = _given(students), _given(teachers), out, ctypes.c_bool(fp64), ctypes.byref(limits)
    numbers = _called("pairs", len(students), *given)
    shared = _taken(numbers, 3)
    members = []
    for _ in students:
        member = Member(
            *_taken(numbers, 7),
            student=Access(*_taken(numbers, 3)),
            teacher=Access(*_taken(numbers, 3)),
        )
        (swept,), sweep = _taken(numbers, 1), Sweep(*_taken(numbers, 5))
        members.append(member._replace(sweep=sweep if swept else None))
    return Launch(members, *shared)


def plan_map_loss(student: Feature, teacher: Feature, limits: Limits) -> tuple[int, int]:
    """Tasks of map_loss for a pair of maps, and the samples of each."""
    samples = ctypes.c_int64()
    call = _functions().plan_map_loss_c
    call.restype = ctypes.c_int64
    given = _given([student]), _given([teacher]), ctypes.byref(limits), ctypes.byref(samples)
    return call(*given), samples.value
