"""How the weight beta of a distillation term changes over training: functions of the step.

    beta = schedules.linear_decay(1000.0, steps=epochs * len(loader))
    loss = cross_entropy + beta(step) * at_fused.at_loss(student, teacher)

A step is whatever the caller counts: batches, epochs, samples, also in fractions. Before step 0 the
value is that of step 0, and from ``steps`` on that of ``steps``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from at_fused._numbers import check_finite

Schedule = Callable[[float], float]


def _steps(steps: object) -> float:
    number = check_finite("steps", steps)
    if number <= 0:
        raise ValueError(f"steps must be > 0, got {steps!r}")
    return number


def _progress(step: float, steps: float) -> float:
    return min(max(check_finite("step", step) / steps, 0.0), 1.0)


def constant(beta: float) -> Schedule:
    """Beta at every step, as the paper and the authors' program have it.

    Args:
        beta: a finite number.

    Returns:
        A function of the step, a number, that returns a float.

    Raises:
        TypeError: ``beta`` or the step is not a number.
        ValueError: it is not finite.
    """
    value = float(check_finite("beta", beta))

    def schedule(step: float) -> float:
        check_finite("step", step)
        return value

    return schedule


def linear_decay(beta: float, steps: float, end: float = 0.0) -> Schedule:
    """From beta to ``end`` along a line: beta + (end - beta) * step / steps.

    Args:
        beta, end: finite numbers, the values at step 0 and from ``steps`` on.
        steps: > 0.

    Returns:
        A function of the step, a number, that returns a float.

    Raises:
        TypeError: an argument or the step is not a number.
        ValueError: it is not finite, or ``steps`` is not positive.
    """
    first, last, length = check_finite("beta", beta), check_finite("end", end), _steps(steps)

    def schedule(step: float) -> float:
        done = _progress(step, length)
        return first * (1 - done) + last * done

    return schedule


def cosine(beta: float, steps: float, end: float = 0.0) -> Schedule:
    """From beta to ``end`` along half a cosine: end + (beta - end) (1 + cos(pi step / steps)) / 2.

    Args:
        beta, end: finite numbers, the values at step 0 and from ``steps`` on.
        steps: > 0.

    Returns:
        A function of the step, a number, that returns a float.

    Raises:
        TypeError: an argument or the step is not a number.
        ValueError: it is not finite, or ``steps`` is not positive.
    """
    first, last, length = check_finite("beta", beta), check_finite("end", end), _steps(steps)

    def schedule(step: float) -> float:
        left = (1 + math.cos(math.pi * _progress(step, length))) / 2
        return first * left + last * (1 - left)

    return schedule
