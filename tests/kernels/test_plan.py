"""The launch configuration (csrc/cuda/plan.h): what it covers, aligns, fits and fills."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_library import (
    BYTES,
    H100,
    INTERLEAVED,
    PLANAR,
    Access,
    Feature,
    Launch,
    Limits,
    Member,
    Sweep,
    dense,
    plan_map_loss,
    plan_maps,
    plan_pairs,
    plan_sweeps,
)

sys.path.append(str(Path(__file__).parents[2]))
from benchmarks.cases import CANONICAL, CASES, LARGE

A100 = Limits(108, 166912, 167936)
SMALL = Limits(20, 101376, 102400)
DEVICES = {"H100": H100, "A100": A100, "sm_86": SMALL}
THREADS = 256
RESERVED = 1024  # of shared memory, by the system for each block
REGISTERS = 65536  # of a multiprocessor; a thread has 80 at the most: test_cuda_compile.py


@st.composite
def features(draw: st.DrawFn, b: int, n: int) -> Feature:
    dtype, layout = draw(st.sampled_from(list(BYTES))), draw(st.sampled_from([PLANAR, INTERLEAVED]))
    c = draw(st.one_of(st.integers(1, 80), st.sampled_from([128, 256, 512, 2048])))
    x = dense(b, c, n, dtype, layout)
    return x._replace(
        batch=x.batch + draw(st.sampled_from([0, 0, 1, 8])),
        line=x.line + draw(st.sampled_from([0, 0, 1, 8])),
        address=x.address + draw(st.sampled_from([0, 0, 0, BYTES[dtype]])),
    )


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Feature, Feature]:
    b = draw(st.sampled_from([1, 2, 3, 32, 128, 513]))
    h = draw(st.sampled_from([1, 2, 3, 5, 7, 8, 14, 16, 28, 32, 56, 111, 112, 224]))
    return draw(features(b, h * h)), draw(features(b, h * h))


LISTS = st.lists(pairs(), min_size=1, max_size=4)


def sides(list_of_pairs: list[tuple[Feature, Feature]]) -> tuple[list[Feature], list[Feature]]:
    return [s for s, _ in list_of_pairs], [t for _, t in list_of_pairs]


def outs_of(xs: list[Feature], shift: int = 0) -> list[Feature]:
    return [dense(x.B, x.C, x.N, x.dtype, x.layout)._replace(address=8192 + shift) for x in xs]


def check_order(launch: Launch) -> None:
    """Every member's tasks are there once, those that read most before all others."""
    assert sorted(m.number for m in launch.members) == list(range(len(launch.members)))
    first = 0
    for member in launch.members:
        assert member.first_task == first
        first += member.tasks
    for before, after in itertools.pairwise(launch.members):
        assert before.bytes_of_task >= after.bytes_of_task


def check_access(x: Feature, access: Access, whole: bool) -> None:
    vector, fold, lanes = access
    assert lanes in {2**i for i in range(9)}
    if x.layout == INTERLEAVED:
        assert fold == 1
        assert lanes <= 32  # they meet by shuffles
    assert x.C % fold == 0
    if vector == 1:
        assert fold == 1
        return
    assert vector * BYTES[x.dtype] == 16
    assert x.address % 16 == 0
    assert x.B == 1 or x.batch % vector == 0
    if x.layout == INTERLEAVED:
        assert x.C % vector == 0
        assert x.N == 1 or x.line % vector == 0
    else:
        assert (x.N * fold) % vector == 0
        assert fold == x.C or (x.line * fold) % vector == 0
    if fold > 1:
        assert whole  # a row of several channels is one block's
        assert x.line == x.N
        assert lanes * vector >= x.N * fold


def check_pieces(n: int, pieces: int, positions: int) -> None:
    assert (pieces - 1) * positions < n <= pieces * positions
    assert pieces == 1 or positions % 32 == 0


def extent(x: Feature, access: Access) -> tuple[int, int]:
    """Rows and columns of a feature, in vectors."""
    if x.layout == INTERLEAVED:
        return x.N, x.C // access.vector
    return x.C // access.channels_per_row, x.N * access.channels_per_row // access.vector


def check_sweep(x: Feature, access: Access, sweep: Sweep) -> None:
    rows, columns = extent(x, access)
    assert (sweep.row_pieces - 1) * sweep.rows < rows <= sweep.row_pieces * sweep.rows
    assert (sweep.column_pieces - 1) * sweep.columns < columns
    assert columns <= sweep.column_pieces * sweep.columns
    assert sweep.lanes in {2**i for i in range(9)}


def check_pair(s: Feature, t: Feature, member: Member) -> None:
    whole = member.samples > 0
    check_pieces(s.N, member.pieces // 2, member.positions)
    for x, access in ((s, member.student), (t, member.teacher)):
        assert access
        check_access(x, access, whole=member.pieces == 2)
    assert member.tasks == (math.ceil(s.B / member.samples) if whole else s.B * member.pieces)
    assert not whole or member.pieces == 2


EVERY = settings(deadline=None, max_examples=300)


@EVERY
@given(data=LISTS, device=st.sampled_from(list(DEVICES)))
def test_maps_and_losses(data: list[tuple[Feature, Feature]], device: str) -> None:
    students, teachers = sides(data)
    limits = DEVICES[device]
    maps = plan_maps(students, limits)
    check_order(maps)
    for member in maps.members:
        x = students[member.number]
        check_pieces(x.N, member.pieces, member.positions)
        check_access(x, member.student, whole=member.pieces == 1)
        assert member.tasks == x.B * member.pieces

    fp64 = any(x.dtype == 1 for x in (*students, *teachers))
    losses = plan_pairs(students, teachers, limits, fp64=fp64)
    check_order(losses)
    assert losses.shared <= 48 << 10  # more must be asked for
    assert losses.kept_bytes == 0
    for member in losses.members:
        s, t = data[member.number]
        check_pair(s, t, member)
        assert member.sweep is None
        if member.samples:  # the maps of whole samples are on chip
            assert losses.map_bytes >= 2 * s.N * (8 if fp64 else 4)


@EVERY
@given(
    data=LISTS,
    device=st.sampled_from(list(DEVICES)),
    shift=st.sampled_from([0, 0, 4]),
    apart=st.sampled_from([0, 0, 1, 8]),
)
def test_gradients(
    data: list[tuple[Feature, Feature]], device: str, shift: int, apart: int
) -> None:
    students, teachers = sides(data)
    limits = DEVICES[device]
    outs = outs_of(students, shift)
    # What the gradient is added to moves in the same vectors, or none of the three does.
    addends = [
        out._replace(address=t.address, line=out.line + apart)
        for out, t in zip(outs, teachers, strict=True)
    ]
    for added in (None, addends):
        launch = plan_sweeps(students, outs, limits, added)
        check_order(launch)
        for member in launch.members:
            i, sweep = member.number, member.sweep
            assert sweep
            for x in (students[i], outs[i], *([addends[i]] if added else [])):
                check_access(x, member.student, whole=True)
            check_sweep(students[i], member.student, sweep)
            pieces = sweep.row_pieces * sweep.column_pieces
            assert member.tasks == math.ceil(students[i].B / member.samples) * pieces

    fp64 = any(x.dtype == 1 for x in (*students, *teachers))
    both = plan_pairs(students, teachers, limits, outs, fp64)
    check_order(both)
    assert both.shared <= limits.shared_per_block
    if both.kept_bytes:  # two blocks side by side
        assert 2 * (both.shared + RESERVED) <= limits.shared_per_multiprocessor
    for member in both.members:
        s, t = data[member.number]
        check_pair(s, t, member)
        if member.samples:
            assert both.map_bytes >= 2 * s.N * (8 if fp64 else 4)
        if member.sweep:
            assert member.samples
            assert both.kept_bytes >= s.bytes
            check_access(outs[member.number], member.student, whole=True)
            check_sweep(s, member.student, member.sweep)
            assert member.sweep.row_pieces == member.sweep.column_pieces == 1


@EVERY
@given(data=pairs(), device=st.sampled_from(list(DEVICES)))
def test_losses_of_maps(data: tuple[Feature, Feature], device: str) -> None:
    b, n = data[0].B, data[0].N
    s, t = dense(b, 1, n, data[0].dtype % 2), dense(b, 1, n, data[1].dtype % 2)
    tasks, samples = plan_map_loss(s, t, DEVICES[device])
    assert 1 <= samples <= b
    assert tasks == math.ceil(b / samples)


# ---- what fills a device -------------------------------------------------------------------------

# Stages of ResNets, WRNs and EfficientNets, and the blocks of vision transformers: (C, N).
STAGES = [
    *((c, h * h) for c, h in ((64, 56), (128, 28), (256, 14), (512, 7))),
    *((c, h * h) for c, h in ((256, 56), (512, 28), (1024, 14), (2048, 7))),
    *((c, h * h) for c, h in ((16, 32), (32, 32), (64, 32), (32, 16), (64, 16), (128, 16))),
    *((c, h * h) for c, h in ((64, 8), (128, 8), (256, 8))),
    # Planes of which no row of channels is whole vectors.
    *((c, h * h) for c, h in ((48, 38), (40, 57), (24, 150))),
]
TOKENS = [(192, 196), (384, 197), (768, 197), (1024, 576)]
USUAL = [
    dense(b, c, n, dtype, layout)
    for b in (32, 128)
    for dtype in (0, 3)
    for layout in (PLANAR, INTERLEAVED)
    for c, n in STAGES + TOKENS * layout
]


def check_reads(x: Feature, access: Access, lanes: int, rows: int, columns: int) -> None:
    """At least 64 bytes side by side, and three loads of a thread under way: if there are as many.

    ``rows`` and ``columns`` are those of a task, in vectors.
    """
    of_a_row = columns * access.vector * BYTES[x.dtype]
    side_by_side = min(lanes, columns) * access.vector * BYTES[x.dtype]
    assert side_by_side >= min(64, of_a_row), x
    if rows * columns < 3 * THREADS:
        return
    height = THREADS // lanes
    assert rows / height >= 3, x
    # Lanes past the end of a row and rows past the last one idle: no more than half of them.
    turns = math.ceil(columns / lanes) * math.ceil(rows / height)
    assert rows * columns >= 0.5 * turns * THREADS, x


@pytest.mark.parametrize("x", USUAL, ids=lambda x: "-".join(map(str, (*x[:3], *x[6:]))))
def test_reads_are_wide_and_many(x: Feature) -> None:
    (swept,) = plan_sweeps([x], [x], H100).members
    assert swept.sweep
    check_reads(x, swept.student, swept.sweep.lanes, swept.sweep.rows, swept.sweep.columns)
    (mapped,) = plan_maps([x], H100).members
    (lost,) = plan_pairs([x], [x], H100).members
    (both,) = plan_pairs([x], [x], H100, [x]).members
    for member in (mapped, lost, both):
        positions = min(member.positions, x.N)
        rows, columns = extent(x._replace(N=positions), member.student)
        check_reads(x, member.student, member.student.lanes, rows, columns)


def blocks(launch: Launch) -> int:
    """Blocks that a multiprocessor has room for."""
    by_shared_memory = H100.shared_per_multiprocessor // (launch.shared + RESERVED)
    return min(REGISTERS // (80 * THREADS), by_shared_memory)


def tail(launch: Launch) -> float:
    """The last task's bytes over those of the average slot: it may run alone so long."""
    total = sum(m.tasks * m.bytes_of_task for m in launch.members)
    return launch.members[-1].bytes_of_task / (total / (H100.multiprocessors * blocks(launch)))


@pytest.mark.parametrize("layout", [PLANAR, INTERLEAVED], ids=["planar", "interleaved"])
@pytest.mark.parametrize("dtype", [0, 3], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", [*CANONICAL, LARGE])
def test_lists_fill_the_device(case: str, dtype: int, layout: int) -> None:
    batch, stages = CASES[case]
    students, teachers = (
        [dense(batch, stage[side], stage[2] ** 2, dtype, layout) for stage in stages]
        for side in (0, 1)
    )
    loss = plan_pairs(students, teachers, H100)
    both = plan_pairs(students, teachers, H100, students)
    sweep = plan_sweeps(students, students, H100)
    assert blocks(loss) == blocks(sweep) == 3
    assert blocks(both) >= 2
    for launch in (loss, both, sweep):
        slots = H100.multiprocessors * blocks(launch)
        assert sum(m.tasks for m in launch.members) >= 0.8 * slots
        assert tail(launch) <= 0.75


@pytest.mark.parametrize("layout", [PLANAR, INTERLEAVED], ids=["planar", "interleaved"])
@pytest.mark.parametrize("dtype", [0, 3], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(1, 256, 56 * 56), (512, 64, 64), (32, 256, 56 * 56)], ids=str)
def test_large_and_small_samples_fill_the_device(
    shape: tuple[int, int, int], dtype: int, layout: int
) -> None:
    s = dense(*shape, dtype, layout)
    (loss,) = plan_pairs([s], [s], H100).members
    assert loss.tasks >= H100.multiprocessors
    assert loss.student.vector * BYTES[dtype] == 16
    (sweep,) = plan_sweeps([s], [s], H100).members
    assert sweep.tasks >= 0.7 * H100.multiprocessors
    (both,) = plan_pairs([s], [s], H100, [s]).members
    assert both.tasks >= H100.multiprocessors


def test_sevens_are_read_in_vectors() -> None:
    """7x7 maps, where no row of one channel is whole vectors: rows of 4 or 8 channels are."""
    for dtype, fold in ((0, 4), (3, 8), (1, 2)):
        s = dense(32, 512, 49, dtype)
        access = Access(16 // BYTES[dtype], fold, 64)
        assert plan_pairs([s], [s], H100, fp64=dtype == 1).members[0].student == access
        for b in (2, 1000):
            assert plan_maps([s._replace(B=b)], H100).members[0].student == access
    odd = dense(32, 510, 49)  # samples that start anywhere
    assert plan_pairs([odd], [odd], H100).members[0].student[:2] == (1, 1)


def test_on_chip_or_read_again() -> None:
    """A student's sample stays on chip where that and the list's maps leave room for two blocks."""
    fits, large = dense(128, 16, 1024), dense(32, 64, 3136)
    assert plan_pairs([fits], [fits], H100, [fits]).kept_bytes == fits.bytes
    launch = plan_pairs([large], [large], H100, [large])
    assert launch.kept_bytes == 0
    assert launch.members[0].sweep is None
    # 100 KB beside maps of its own; beside those of 56x56 there is room for one block alone.
    last = dense(32, 512, 49)
    assert plan_pairs([last], [last], H100, [last]).members[0].sweep
    mixed = [large, last]
    assert plan_pairs(mixed, mixed, H100, mixed).kept_bytes == 0
    # A smaller one is kept in such a list, and the large one is not.
    small = dense(32, 256, 64)
    launch = plan_pairs([large, small], [large, small], H100, [large, small])
    assert [m.number for m in launch.members if m.sweep] == [1]
