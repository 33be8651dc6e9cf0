"""The bytes that the CUDA kernels move, against the least that must move."""

from __future__ import annotations

import sys
from functools import cache, partial
from pathlib import Path

import pytest
import torch

from at_fused import _ops

sys.path.append(str(Path(__file__).parents[2]))
from benchmarks import roofline
from benchmarks.cases import CANONICAL, Inputs
from benchmarks.roofline import H100, PASSES, SHARE, Row

BAR, BAR_TWICE = 1.025, 1.04  # with a second launch the coefficients go through memory as well
A, B, _ = CANONICAL
exhaustive = pytest.mark.exhaustive
SETTINGS = [
    (A, "fp32", "NCHW"),
    (B, "bf16", "channels_last"),
    pytest.param((A, "fp32", "channels_last"), marks=exhaustive),
    pytest.param((B, "bf16", "NCHW"), marks=exhaustive),
]


@cache
def rows(setting: tuple[str, str, str]) -> dict[str, Row]:
    return {row["direction"]: row for row in roofline.rows_of(*setting)}


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("direction", PASSES)
def test_bytes_are_at_the_floor_and_eager_moves_more(
    setting: tuple[str, str, str], direction: str
) -> None:
    row = rows(setting)[direction]
    ours, eager, floor = row["counted"], row["eager"], row["floor"]
    # What else there is are maps that several blocks make.
    most = BAR * floor
    if direction == PASSES[-1] and ours.launches == 2:  # reads students that do not fit on chip
        students = Inputs.make(*setting, device="meta").students
        most = BAR_TWICE * floor + sum(x.nbytes for x in students)
    else:
        assert ours.launches == 1
    assert floor <= ours.bytes <= most
    assert ours.bytes < eager.bytes / 2
    assert ours.launches < eager.launches / 4


def test_a_share_of_the_device_counts_as_the_whole() -> None:
    setting = SETTINGS[0]
    whole = {row["direction"]: row for row in roofline.rows_of(*setting, share=1)}
    for direction, row in rows(setting).items():
        # The loss, its sum and the counters are there once in each: that much is counted too often.
        assert row["floor"] == whole[direction]["floor"]
        assert 0 <= row["counted"].bytes - whole[direction]["counted"].bytes <= 64 * SHARE


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_tap_in_place_reads_both_and_writes_one(setting: tuple[str, str, str]) -> None:
    with roofline.emulated(multiprocessors=H100.multiprocessors // SHARE) as emulator:
        for student in Inputs.make(*setting, share=SHARE).students:
            x = student.detach()
            g, k = torch.randn_like(x), torch.randn(len(x), x[0, 0].numel())
            run = partial(_ops.attention_tap_backward_, g, x, k, 2.0, "mean")
            assert roofline.count(emulator, run, 1)[1] == (3 * x.nbytes + k.nbytes, 1)


def test_operators_are_counted_as_what_they_touch() -> None:
    x = torch.randn(4, 8, device="meta")
    with roofline.Operators() as operators:
        (x.view(8, 4).t() + torch.randn(1, device="meta").expand(8).view(1, 8)).sum()
    # randn writes 1; the sum reads 32 + 1 and writes 32; the total reads 32 and writes 1.
    assert operators.count == (4 * (1 + 65 + 33), 3)


@pytest.mark.parametrize(
    "name",
    ["mask", "attend", *(pytest.param(n, marks=exhaustive) for n in ("collapse", "eps_mode"))],
)
def test_the_rest_of_the_method(name: str) -> None:
    masks = [torch.rand(32, 32, 32) < 0.7]
    choice = {"mask": masks, "attend": "channel", "collapse": "max", "eps_mode": "add"}[name]
    inputs = Inputs.make((32, [(64, 64, 32)]))
    found = roofline.count_passes(inputs, SHARE, **{name: choice})
    ours = found["forward"] + found["backward"]
    # Maps go through memory between a forward's two launches: a C-th of the features.
    assert ours.bytes <= 1.15 * SHARE * inputs.floors()["forward+backward"]
    assert ours.launches <= 4
