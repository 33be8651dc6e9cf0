"""The bytes that the CUDA kernels move, counted in the harness, against the floor."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from plan_library import H100
from simt_backend import Counters, simt

from at_fused import _ops

sys.path.append(str(Path(__file__).parents[1]))
from benchmarks import roofline
from benchmarks.cases import Inputs
from benchmarks.roofline import METHODS, PASSES, SHARE, Row

BAR = 1.02
QUICK = [s for s in roofline.SETTINGS if (s[0][0], s[1]) in (("a", "fp32"), ("b", "bf16"))]
SETTINGS = [
    pytest.param(setting, direction, id="-".join((setting[0][0], *setting[1:], direction)))
    for setting in QUICK
    for direction in PASSES
]


@cache
def rows(setting: tuple[str, str, str]) -> dict[str, Row]:
    found = roofline.rows_of(*setting, share=SHARE)
    return {row.direction: row for row in found}


@pytest.mark.parametrize(("setting", "direction"), SETTINGS)
def test_bytes_are_at_the_floor(setting: tuple[str, str, str], direction: str) -> None:
    row = rows(setting)[direction]
    assert row.ratio >= 1
    if not row.again:  # every sample fits on chip
        assert row.ratio <= BAR
    else:
        # The second read of a student is counted apart; shared maps cost up to 3 %.
        assert row.ratio <= 1.03
        assert row.again == row.served


@pytest.mark.parametrize("setting", QUICK, ids=str)
def test_one_launch_for_each_pass(setting: tuple[str, str, str]) -> None:
    assert [row.counted.launches for row in rows(setting).values()] == [1, 1, 1]


@pytest.mark.parametrize("setting", QUICK, ids=str)
def test_the_model_is_below_the_others(setting: tuple[str, str, str]) -> None:
    for row in rows(setting).values():
        ours = row.at_fused().model_us()
        assert ours < row.compiled.model_us() < row.eager.model_us()


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


def test_the_plan_says_what_is_read_twice() -> None:
    assert roofline.second_reads(*QUICK[0]) == (0, 0)
    again, served = roofline.second_reads("c: one pair 256x56x56", "fp32", "NCHW")
    assert again == 32 * 256 * 56 * 56 * 4
    assert served in (0, again)


def test_operators_are_counted_as_what_they_touch() -> None:
    x = torch.randn(4, 8, device="meta")
    with roofline.Operators() as counted:
        (x.view(8, 4).t() + torch.randn(1, device="meta").expand(8).view(1, 8)).sum()
    # randn writes 1; the sum reads 32 + 1 and writes 32; the total reads 32 and writes 1.
    assert counted.count == (4 * (1 + 65 + 33), 3)


def test_the_table_says_that_times_are_a_model() -> None:
    text = roofline.text(roofline.Model(list(rows(QUICK[0]).values()), []))
    assert text.splitlines()[0].endswith("times a model, not measured")
    assert text.count("\n| a |") == len(PASSES)


@pytest.mark.parametrize("setting", METHODS, ids="-".join)
def test_the_rest_of_the_method(setting: tuple[str, str, str, str]) -> None:
    row = roofline.method_row(*setting)
    # Maps go through memory between a forward's two launches: a C-th of the features.
    assert 1 <= row.ratio <= 1.15
    assert row.counted.launches <= 4
    assert row.counted.launches < row.eager.launches / 4
    assert row.counted.bytes < row.compiled.bytes
