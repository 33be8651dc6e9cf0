"""The bytes that the CUDA kernels move, against the floor; the model of the time, by hand."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from plan_library import H100, plan_pairs
from simt_backend import Counters, simt

from at_fused import _ops

sys.path.append(str(Path(__file__).parents[1]))
from benchmarks import kernels, roofline
from benchmarks.cases import Inputs
from benchmarks.model import Cache, Device, Kernel, Round, Task, ideal, microseconds, slots
from benchmarks.roofline import METHODS, PASSES, SHARE, Row

BAR, BAR_TWICE = 1.025, 1.04  # with a second launch the coefficients go through memory as well
QUICK = [s for s in roofline.SETTINGS if (s[0][0], s[1]) in (("a", "fp32"), ("b", "bf16"))]
SETTINGS = [
    pytest.param(setting, direction, id="-".join((setting[0][0], *setting[1:], direction)))
    for setting in QUICK
    for direction in PASSES
]


@cache
def rows(setting: tuple[str, str, str]) -> dict[str, Row]:
    found = roofline.rows_of(*setting)
    return {row.direction: row for row in found}


@pytest.mark.parametrize(("setting", "direction"), SETTINGS)
def test_bytes_are_at_the_floor(setting: tuple[str, str, str], direction: str) -> None:
    row = rows(setting)[direction]
    # The second read of a student is known. What else there is are maps that several blocks make.
    once = row.counted.bytes - row.again
    assert row.floor <= once <= (BAR_TWICE if row.again else BAR) * row.floor
    assert row.counted.launches == 1 + (row.again > 0)


@pytest.mark.parametrize("setting", QUICK, ids=str)
def test_the_others_move_more(setting: tuple[str, str, str]) -> None:
    for row in rows(setting).values():
        assert row.counted.bytes < row.compiled.bytes < row.eager.bytes
        assert row.counted.launches < row.compiled.launches < row.eager.launches


def test_a_share_of_the_device_counts_as_the_whole() -> None:
    setting = QUICK[0]
    whole = {row.direction: row for row in roofline.rows_of(*setting, share=1)}
    for direction, row in rows(setting).items():
        # The loss, its sum and the counters are there once in each: that much is counted too often.
        assert row.floor == whole[direction].floor
        assert 0 <= row.counted.bytes - whole[direction].counted.bytes <= 64 * SHARE


@pytest.mark.parametrize("setting", QUICK, ids=str)
def test_a_tap_in_place_reads_both_and_writes_one(setting: tuple[str, str, str]) -> None:
    with simt(multiprocessors=H100.multiprocessors // SHARE) as harness:
        for student in Inputs.make(*setting, share=SHARE).students:
            x = student.detach()
            g, k = torch.randn_like(x), torch.randn(len(x), x[0, 0].numel())
            _ops.attention_tap_backward_(g, x, k, 2.0, "mean")
            c = Counters()
            harness.simt_last_counters(ctypes.byref(c))
            assert c.launches == 1
            assert c.distinct_load_bytes + c.distinct_store_bytes == 3 * x.nbytes + k.nbytes


def test_students_that_do_not_fit_are_read_again() -> None:
    assert rows(QUICK[0])["value and gradient"].again == 0
    students, teachers = roofline.features_of("c: one pair 256x56x56", "fp32", "NCHW")
    assert kernels.read_again(students, plan_pairs(students, teachers, H100, students)) == students


def test_operators_are_counted_as_what_they_touch() -> None:
    x = torch.randn(4, 8, device="meta")
    with roofline.Operators() as counted:
        (x.view(8, 4).t() + torch.randn(1, device="meta").expand(8).view(1, 8)).sum()
    # randn writes 1; the sum reads 32 + 1 and writes 32; the total reads 32 and writes 1.
    assert roofline.count_of(counted.touched) == (4 * (1 + 65 + 33), 3)


def test_the_table_says_that_times_are_a_model() -> None:
    text = roofline.text(roofline.Model(list(rows(QUICK[0]).values()), [], []))
    assert text.splitlines()[0].endswith("times a model, not measured")
    assert text.count("\n| a |") == 2 * len(PASSES)  # bytes, microseconds


@pytest.mark.parametrize("setting", METHODS, ids="-".join)
def test_the_rest_of_the_method(setting: tuple[str, str, str, str]) -> None:
    row = roofline.method_row(*setting)
    # Maps go through memory between a forward's two launches: a C-th of the features.
    assert 1 <= row.ratio <= 1.15
    assert row.counted.launches <= 4
    assert row.counted.launches < row.eager.launches / 4
    assert row.counted.bytes < row.compiled.bytes


# ---- the model of the time -----------------------------------------------------------------------

# 100 bytes a us, two multiprocessors, nothing but the latency.
TOY = Device("toy", 100.0, 2, launch=0, start=0, latency=1, cached=0, atomic=0, sum=0)


def us(tasks: list[Task], at_a_time: int, *end: Round, device: Device = TOY) -> float:
    return microseconds(device, Kernel(tasks, at_a_time, end))


def reading(*sizes: float) -> Task:
    return Task([Round(size) for size in sizes])


@pytest.mark.parametrize(
    ("tasks", "at_a_time", "expected"),
    [
        ([], 4, 0),
        ([reading(50)], 4, 1),  # the latency, which is longer than 0.5 us
        ([reading(300)], 4, 3),  # the bytes
        ([reading(50), reading(50)], 1, 2),  # one slot: one after the other
        ([reading(50), reading(50)], 2, 1),  # two: together
        ([reading(50, 50)], 4, 2),  # a round waits for the one before
        ([reading(100)] * 20, 10, 20),  # the memory is never idle
        ([reading(50)] * 4 + [reading(*[50] * 6)], 4, 7.5),  # begun at 1, served at 2.5, alone
        ([Task([Round(50, 450, 0)])], 4, 5),  # writes are waited for at the end alone
        ([Task([Round(50, 0, 3)])], 4, 4),
        ([Task([Round(0, 0, 2)])] * 3, 2, 4),
    ],
)
def test_the_model_by_hand(tasks: list[Task], at_a_time: int, expected: float) -> None:
    assert us(tasks, at_a_time) == pytest.approx(expected)


def test_longest_first_beats_longest_last() -> None:
    short, long = [reading(10)] * 6, [reading(10, 10, 10, 10)]
    assert us(long + short, 2) == 5
    assert us(short + long, 2) == 7


def test_the_last_block_does_what_is_left() -> None:
    last = [Round(wait=5)]
    pieces = [Task([Round(wait=n)], "sample", last) for n in (1, 2, 3)]
    assert us(pieces, 3) == 3 + 5
    assert us(pieces, 3, Round(wait=7)) == 3 + 5 + 7
    others = [Task([Round(wait=1)], n, last) for n in ("this", "that")]
    assert us(others, 1) == 2 * (1 + 5)


def test_a_launch_takes_its_time() -> None:
    assert us([reading(50)], 1, device=TOY._replace(launch=2)) == 3


@pytest.mark.parametrize(("size", "expected"), [(0, 1), (10, 1), (10**6, 10**4)])
def test_an_ideal_kernel_takes_its_bytes(size: float, expected: float) -> None:
    toy = TOY._replace(multiprocessors=1)
    assert microseconds(toy, ideal(toy, size)) == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(
    ("registers", "shared", "of_each"),
    [
        (32, 0, 8),  # 2048 threads
        (80, 0, 3),  # 65536 registers
        (128, 0, 2),
        (32, 227 << 10, 1),  # all of the shared memory
        (32, 75 << 10, 3),  # with 1 KB of the system's, three times 76 KB
        (32, 76 << 10, 2),
        (80, 76 << 10, 2),
    ],
)
def test_blocks_take_slots(registers: int, shared: int, of_each: int) -> None:
    assert slots(TOY, registers, shared) == 2 * of_each


def test_the_cache_has_what_was_used_last() -> None:
    cache = Cache(100)
    assert cache.misses([("a", 40), ("b", 40)]) == 80
    assert cache.misses([("a", 40)]) == 0
    assert cache.misses([("c", 40)]) == 40  # b goes
    assert cache.misses([("a", 40), ("b", 40)]) == 40
    assert cache.misses([("d", 101), ("d", 101)]) == 202  # never fits


@pytest.mark.parametrize("setting", QUICK, ids=str)
def test_the_model_moves_what_the_kernels_do(setting: tuple[str, str, str]) -> None:
    found = kernels.passes(TOY._replace(cache=0), *roofline.features_of(*setting))
    for direction, row in rows(setting).items():
        rounds = [r for kernel in found[direction] for task in kernel.tasks for r in task.rounds]
        moved = sum(r.reads + r.writes for r in rounds)
        assert moved == pytest.approx(row.counted.bytes, rel=0.03)  # shared maps are read back
