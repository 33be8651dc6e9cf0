"""Bytes that the CUDA kernels move, compared with the minimum."""

from __future__ import annotations

import sys
from functools import cache, partial
from pathlib import Path

import pytest
import torch

from at_fused import _ops

sys.path.append(str(Path(__file__).parents[2]))
from benchmarks import roofline
from benchmarks.cases import TIMED_CASES, Inputs
from benchmarks.roofline import DIVISOR, H100, PASSES, Row

# A second launch reads the coefficients from memory.
TOLERANCE, TOLERANCE_TWO_LAUNCHES = 1.025, 1.04
A, B, _ = TIMED_CASES
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
@pytest.mark.parametrize("pass_name", PASSES)
def test_bytes_are_near_the_minimum_and_below_eager(
    setting: tuple[str, str, str], pass_name: str
) -> None:
    row = rows(setting)[pass_name]
    ours, eager, minimum = row["counted"], row["eager"], row["floor"]
    # Beyond the minimum, maps that several thread blocks compute go through memory.
    limit = TOLERANCE * minimum
    if pass_name == PASSES[-1] and ours.launches == 2:  # rereads students too large for the chip
        students = Inputs.make(*setting, device="meta").students
        limit = TOLERANCE_TWO_LAUNCHES * minimum + sum(x.nbytes for x in students)
    else:
        assert ours.launches == 1
    assert minimum <= ours.bytes <= limit
    assert ours.bytes < eager.bytes / 2
    assert ours.launches < eager.launches / 4


def test_counts_of_a_share_scale_to_the_device() -> None:
    setting = SETTINGS[0]
    whole = {row["direction"]: row for row in roofline.rows_of(*setting, divisor=1)}
    for pass_name, row in rows(setting).items():
        # Each share has its own loss, sum and counters, so scaling overestimates these.
        assert row["floor"] == whole[pass_name]["floor"]
        assert 0 <= row["counted"].bytes - whole[pass_name]["counted"].bytes <= 64 * DIVISOR


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_tap_in_place_reads_twice_and_writes_once(setting: tuple[str, str, str]) -> None:
    with roofline.emulated(multiprocessors=H100.multiprocessors // DIVISOR) as emulator:
        for student in Inputs.make(*setting, divisor=DIVISOR).students:
            x = student.detach()
            g, k = torch.randn_like(x), torch.randn(len(x), x[0, 0].numel())
            run = partial(_ops.attention_tap_backward_, g, x, k, 2.0, "mean")
            assert roofline.count(emulator, run, 1)[1] == (3 * x.nbytes + k.nbytes, 1)


def test_operators_count_the_bytes_they_access() -> None:
    x = torch.randn(4, 8, device="meta")
    with roofline.OperatorCounter() as operators:
        (x.view(8, 4).t() + torch.randn(1, device="meta").expand(8).view(1, 8)).sum()
    # randn writes 1, the addition reads 32 + 1 and writes 32, and sum reads 32 and writes 1.
    assert operators.count == (4 * (1 + 65 + 33), 3)


@pytest.mark.parametrize(
    "name",
    ["mask", "attend", *(pytest.param(n, marks=exhaustive) for n in ("collapse", "eps_mode"))],
)
def test_options_stay_near_the_minimum(name: str) -> None:
    masks = [torch.rand(32, 32, 32) < 0.7]
    value = {"mask": masks, "attend": "channel", "collapse": "max", "eps_mode": "add"}[name]
    inputs = Inputs.make((32, [(64, 64, 32)]))
    counts = roofline.count_passes(inputs, DIVISOR, **{name: value})
    ours = counts["forward"] + counts["backward"]
    # Between the two launches of a forward, maps go through memory: 1/C of the features.
    assert ours.bytes <= 1.15 * DIVISOR * inputs.minimum_bytes()["forward+backward"]
    assert ours.launches <= 4
