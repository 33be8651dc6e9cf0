"""Schedules of beta, the weight of a distillation term: functions of the step.

    beta = schedules.linear_decay(1000.0, steps=epochs * len(loader))
    loss = cross_entropy + beta(step) * at_fused.at_loss(student, teacher)

A step, a number, is whatever the caller counts: batches, epochs, samples. Before step 0 the value
is that of step 0, and from ``steps`` on that of ``steps``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from at_fused._numbers import check_finite

Schedule = Callable[[float], float]


def constant(beta: float) -> Schedule:
    """Beta at every step, as the paper and the authors' program have it.

    Args:
        beta: a finite number.

    Returns:
        A function of the step that returns a float.

    Raises:
        TypeError, ValueError: ``beta`` or the step is no finite number.
    """
    return _between(beta, 1.0, beta, lambda done: (1.0, 0.0))


def linear_decay(beta: float, steps: float, end: float = 0.0) -> Schedule:
    """Lead beta to ``end`` along a line: beta + (end - beta) * step / steps.

    Args:
        beta, end: finite numbers, the values at step 0 and from ``steps`` on.
        steps: > 0.

    Returns:
        A function of the step that returns a float.

    Raises:
        TypeError, ValueError: an argument or the step is no finite number; ``steps`` is not > 0.
    """
    return _between(beta, steps, end, lambda done: (1 - done, done))


def cosine(beta: float, steps: float, end: float = 0.0) -> Schedule:
    """Lead beta to ``end`` by half a cosine: end + (beta - end) (1 + cos(pi step / steps)) / 2.

    Args:
        beta, steps, end: as in :func:`linear_decay`.

    Returns:
        A function of the step that returns a float.

    Raises:
        TypeError, ValueError: as :func:`linear_decay`.
    """

    def shares(done: float) -> tuple[float, float]:
        left = (1 + math.cos(math.pi * done)) / 2
        return left, 1 - left

    return _between(beta, steps, end, shares)


def _between(
    beta: float, steps: float, end: float, shares: Callable[[float], tuple[float, float]]
) -> Schedule:
    """Return a schedule from the shares that beta and ``end`` have when so much of it is done."""
    first, last = float(check_finite("beta", beta)), float(check_finite("end", end))
    length = check_finite("steps", steps)
    if length <= 0:
        raise ValueError(f"steps must be > 0, got {steps!r}")

    def schedule(step: float) -> float:
        done = min(max(check_finite("step", step) / length, 0.0), 1.0)
        of_first, of_last = shares(done)
        return first * of_first + last * of_last

    return schedule
