"""The launch configuration (csrc/cuda/plan.h): coverage, alignment, shared memory, occupancy."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
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
    dense,
    plan_pairs,
    plan_sweeps,
)

sys.path.append(str(Path(__file__).parents[2]))
from benchmarks.cases import CASES, LARGE, TIMED_CASES

DEVICES = {"A100": Limits(108, 166912, 167936), "sm_86": Limits(20, 101376, 102400), "H100": H100}
THREADS = 256
RESERVED = 1024  # bytes of shared memory that CUDA reserves per block
REGISTERS = 65536  # per multiprocessor; at most 80 per thread (test_cuda_compile.py)


@st.composite
def features(draw: st.DrawFn, b: int, n: int) -> Feature:
    dtype, layout = draw(st.sampled_from(list(BYTES))), draw(st.sampled_from([PLANAR, INTERLEAVED]))
    c = draw(st.one_of(st.integers(1, 80), st.sampled_from([128, 256, 512, 2048])))
    x = dense(b, c, n, dtype, layout)
    return x._replace(
        batch_stride=x.batch_stride + draw(st.sampled_from([0, 0, 1, 8])),
        line_stride=x.line_stride + draw(st.sampled_from([0, 0, 1, 8])),
        address=x.address + draw(st.sampled_from([0, 0, 0, BYTES[dtype]])),
    )


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Feature, Feature]:
    b = draw(st.sampled_from([1, 2, 3, 32, 128, 513]))
    h = draw(st.sampled_from([1, 2, 3, 5, 7, 8, 14, 16, 28, 32, 56, 111, 112, 224]))
    return draw(features(b, h * h)), draw(features(b, h * h))


def outs_of(xs: Sequence[Feature], shift: int = 0) -> list[Feature]:
    return [dense(x.B, x.C, x.N, x.dtype, x.layout)._replace(address=8192 + shift) for x in xs]


def check_order(launch: Launch) -> None:
    """Check that task numbers are contiguous and that members with large tasks come first."""
    assert sorted(m.index for m in launch.members) == list(range(len(launch.members)))
    first = 0
    for member in launch.members:
        assert member.first_task == first
        first += member.tasks
    sizes = [m.bytes_per_task for m in launch.members]
    assert sizes == sorted(sizes, reverse=True)


def check_access(x: Feature, access: Access, whole: bool) -> None:
    vector, per_row, lanes = access
    assert lanes in {2**i for i in range(9)}
    assert x.C % per_row == 0
    if vector == 1:
        assert per_row == 1
        return
    assert vector * BYTES[x.dtype] == 16
    assert x.address % 16 == 0
    assert x.B == 1 or x.batch_stride % vector == 0
    if x.layout == INTERLEAVED:
        assert per_row == 1
        assert x.C % vector == 0
        assert x.N == 1 or x.line_stride % vector == 0
    else:
        assert (x.N * per_row) % vector == 0
        assert per_row == x.C or (x.line_stride * per_row) % vector == 0
    if per_row > 1:
        assert whole  # rows of several channels cannot be split
        assert x.line_stride == x.N


def check_map(x: Feature, access: Access, member: Member) -> None:
    check_access(x, access, whole=member.pieces == 1)
    positions = member.positions_per_piece
    assert (member.pieces - 1) * positions < x.N <= member.pieces * positions
    assert member.pieces == 1 or positions % 32 == 0
    if x.layout == INTERLEAVED:
        assert access.lanes <= 32  # they sum by warp shuffles
    if access.channels_per_row > 1:  # their channels are summed in one pass
        assert access.lanes * access.vector >= x.N * access.channels_per_row


def extent(x: Feature, access: Access) -> tuple[int, int]:
    """Return the rows of a feature and its columns in vectors."""
    if x.layout == INTERLEAVED:
        return x.N, x.C // access.vector
    return x.C // access.channels_per_row, x.N * access.channels_per_row // access.vector


def check_pair(s: Feature, t: Feature, member: Member) -> None:
    assert member.teacher
    check_map(s, member.student, member)
    check_map(t, member.teacher, member)
    whole = member.samples_per_task > 0
    tasks = math.ceil(s.B / member.samples_per_task) if whole else s.B * 2 * member.pieces
    assert member.tasks == tasks
    assert not whole or member.pieces == 1


STRATEGIES = {
    "data": st.lists(pairs(), min_size=1, max_size=4),
    "device": st.sampled_from(list(DEVICES)),
    "shift": st.sampled_from([0, 0, 4]),
}


@settings(deadline=None, max_examples=300)
@given(**STRATEGIES)
def test_loss_plans_are_valid(data: list[tuple[Feature, Feature]], device: str, shift: int) -> None:
    """Plan without gradients, and with gradients of students cached in shared memory."""
    students, teachers = zip(*data, strict=True)
    limits = DEVICES[device]
    fp64 = any(x.dtype == 1 for x in (*students, *teachers))
    for outs in (None, outs_of(students, shift)):
        launch = plan_pairs(students, teachers, limits, outs, fp64)
        check_order(launch)
        # More than 48 KB needs an opt-in.
        assert launch.shared <= (limits.shared_per_block if launch.student_bytes else 48 << 10)
        if launch.student_bytes:  # two blocks fit on a multiprocessor
            assert 2 * (launch.shared + RESERVED) <= limits.shared_per_multiprocessor
        for member in launch.members:
            s, t = data[member.index]
            check_pair(s, t, member)
            if member.samples_per_task:  # maps of whole samples are in shared memory
                assert launch.map_bytes >= 2 * s.N * (8 if fp64 else 4)
            if member.caches_student:
                assert outs
                assert member.samples_per_task
                assert launch.student_bytes >= s.bytes
                check_access(outs[member.index], member.student, whole=True)


@settings(deadline=None, max_examples=300)
@given(**STRATEGIES, gap=st.sampled_from([0, 0, 1, 8]))
def test_plans_of_gradients_are_valid(
    data: list[tuple[Feature, Feature]], device: str, shift: int, gap: int
) -> None:
    students, teachers = zip(*data, strict=True)
    outs = outs_of(students, shift)
    addends = [
        out._replace(address=t.address, line_stride=out.line_stride + gap)
        for out, t in zip(outs, teachers, strict=True)
    ]
    for added in (None, addends):
        launch = plan_sweeps(students, outs, DEVICES[device], added)
        check_order(launch)
        for member in launch.members:
            i, sweep = member.index, member.sweep
            assert sweep
            for x in (students[i], outs[i], *([addends[i]] if added else [])):
                check_access(x, member.student, whole=True)
            rows, columns = extent(students[i], member.student)
            height, width = sweep.rows_per_piece, sweep.columns_per_piece
            assert (sweep.row_pieces - 1) * height < rows <= sweep.row_pieces * height
            assert (sweep.column_pieces - 1) * width < columns <= sweep.column_pieces * width
            pieces = sweep.row_pieces * sweep.column_pieces
            assert member.tasks == math.ceil(students[i].B / member.samples_per_task) * pieces


# ---- occupancy -----------------------------------------------------------------------------------

# (C, height) of stages of ResNets, WRNs and EfficientNets; (C, N) of vision transformers.
SQUARES = [(64, 56), (128, 28), (256, 14), (512, 7), (256, 56), (512, 28), (1024, 14), (2048, 7)]
SQUARES += [
    (16, 32),
    (32, 32),
    (64, 32),
    (32, 16),
    (64, 16),
    (128, 16),
    (64, 8),
    (128, 8),
    (256, 8),
]
SQUARES += [(48, 38), (40, 57), (24, 150)]  # N is not a multiple of a vector
TOKENS = [(192, 196), (384, 197), (768, 197), (1024, 576)]
USUAL = [
    dense(b, c, n, dtype, layout)
    for b in (32, 128)
    for dtype in (0, 3)
    for layout in (PLANAR, INTERLEAVED)
    for c, n in [*((c, h * h) for c, h in SQUARES), *TOKENS * layout]
]


def check_reads(x: Feature, access: Access, rows: int, columns: int) -> None:
    """Check that tasks read 64 adjacent bytes, with three loads in flight, unless too small."""
    lanes = access.lanes
    row_bytes = columns * access.vector * BYTES[x.dtype]
    coalesced = min(lanes, columns) * access.vector * BYTES[x.dtype]
    assert coalesced >= min(64, row_bytes), x
    if rows * columns < 3 * THREADS:
        return
    height = THREADS // lanes
    assert rows / height >= 3, x
    # At most half of the threads idle, past the end of a row or past the last row.
    steps = math.ceil(columns / lanes) * math.ceil(rows / height)
    assert rows * columns >= 0.5 * steps * THREADS, x


@pytest.mark.parametrize("x", USUAL, ids=lambda x: "-".join(map(str, (*x[:3], *x[6:]))))
def test_reads_are_coalesced_and_in_flight(x: Feature) -> None:
    (gradient,) = plan_sweeps([x], [x], H100).members
    sweep = gradient.sweep
    assert sweep
    check_reads(x, gradient.student, sweep.rows_per_piece, sweep.columns_per_piece)
    (loss,) = plan_pairs([x], [x], H100).members
    (both,) = plan_pairs([x], [x], H100, [x]).members
    for member in (loss, both):
        positions = min(member.positions_per_piece, x.N)
        rows, columns = extent(x._replace(N=positions), member.student)
        check_reads(x, member.student, rows, columns)


def blocks(launch: Launch) -> int:
    """Return the number of blocks that fit on a multiprocessor."""
    by_shared_memory = H100.shared_per_multiprocessor // (launch.shared + RESERVED)
    return min(REGISTERS // (80 * THREADS), by_shared_memory)


def tail(launch: Launch) -> float:
    """Return the bytes of the last task, which may run alone, over the average of a slot."""
    total = sum(m.tasks * m.bytes_per_task for m in launch.members)
    return launch.members[-1].bytes_per_task / (total / (H100.multiprocessors * blocks(launch)))


@pytest.mark.parametrize("layout", [PLANAR, INTERLEAVED], ids=["planar", "interleaved"])
@pytest.mark.parametrize("dtype", [0, 3], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", [*TIMED_CASES, LARGE])
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


def test_seven_by_seven_maps_are_read_in_vectors() -> None:
    """Rows of 2, 4 or 8 channels are whole vectors, rows of one channel are not."""
    for dtype, per_row in ((0, 4), (3, 8), (1, 2)):
        s = dense(32, 512, 49, dtype)
        (member,) = plan_pairs([s], [s], H100, fp64=dtype == 1).members
        assert member.student == Access(16 // BYTES[dtype], per_row, 64)
    odd = dense(32, 510, 49)  # samples are not aligned
    assert plan_pairs([odd], [odd], H100).members[0].student[:2] == (1, 1)


def test_students_are_cached_if_two_blocks_fit() -> None:
    """Students in shared memory must leave room for two blocks on a multiprocessor."""
    fits, large = dense(128, 16, 1024), dense(32, 64, 3136)
    assert plan_pairs([fits], [fits], H100, [fits]).student_bytes == fits.bytes
    launch = plan_pairs([large], [large], H100, [large])
    assert launch.student_bytes == 0
    assert not launch.members[0].caches_student
    # A student of 100 KB fits with its own maps, but not with the larger maps of 56x56.
    last = dense(32, 512, 49)
    assert plan_pairs([last], [last], H100, [last]).members[0].caches_student
    mixed = [large, last]
    assert plan_pairs(mixed, mixed, H100, mixed).student_bytes == 0
    # In a list with a large student, a smaller one is still cached.
    small = dense(32, 256, 64)
    launch = plan_pairs([large, small], [large, small], H100, [large, small])
    assert [m.index for m in launch.members if m.caches_student] == [1]
