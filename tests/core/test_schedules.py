"""Schedules of beta."""

from __future__ import annotations

import math
from typing import Any

import pytest

from at_fused import schedules


def test_constant() -> None:
    beta = schedules.constant(0.1)
    assert [beta(step) for step in (-1, 0, 0.3, 5, 1e9)] == [0.1] * 5


@pytest.mark.parametrize("schedule", [schedules.linear_decay, schedules.cosine])
def test_schedules_decrease_and_are_clamped_at_their_ends(schedule: Any) -> None:
    beta = schedule(2.0, 10, end=0.5)
    assert beta(0) == beta(-3) == 2.0
    assert beta(10) == beta(11) == beta(10**9) == 0.5
    values = [beta(step) for step in range(11)]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == 11
    assert beta(5) == pytest.approx(1.25)
    assert schedule(1.0, 4)(4) == 0.0


def test_values_between_the_ends() -> None:
    assert schedules.linear_decay(8.0, 4)(1) == 6.0
    assert schedules.linear_decay(8.0, 4)(2.5) == 3.0
    assert schedules.cosine(8.0, 4)(1) == pytest.approx(4 + 4 * math.cos(math.pi / 4))


ERRORS = {
    "beta must be a number, got bool": (True, 10),
    "beta must be finite, got nan": (math.nan, 10),
    "beta must be in a float's range, got an int of 1329 bits": (10**400, 10),
    "steps must be > 0, got -5": (1.0, -5),
    "end must be a number, got str": (1.0, 10, "0"),
}


@pytest.mark.parametrize("message", ERRORS)
def test_invalid_arguments(message: str) -> None:
    for schedule in (schedules.linear_decay, schedules.cosine):
        with pytest.raises((TypeError, ValueError), match=message):
            schedule(*ERRORS[message])


def test_invalid_steps() -> None:
    for schedule in (schedules.constant(1), schedules.linear_decay(1, 2), schedules.cosine(1, 2)):
        with pytest.raises(TypeError, match="step must be a number, got NoneType"):
            schedule(None)
        with pytest.raises(ValueError, match="step must be in a float's range"):
            schedule(10**400)
    with pytest.raises(TypeError, match="beta must be a number"):
        schedules.constant(None)
