"""Schedules of beta, the weight of a distillation loss, as functions of the training step.

    beta = schedules.linear_decay(1000.0, steps=epochs * len(loader))
    loss = cross_entropy + beta(step) * at_fused.at_loss(student, teacher)

A step is a number in any unit: batches, epochs or samples. Steps below 0 count as 0, and steps
above ``steps`` as ``steps``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from at_fused._numbers import check_finite

Schedule = Callable[[float], float]


def constant(beta: float) -> Schedule:
    """Return a constant schedule, as in the paper and the authors' program.

    Args:
        beta: a finite number.

    Returns:
        A function of the step that returns a float.

    Raises:
        TypeError, ValueError: ``beta`` or the step is not a finite number.
    """
    return _interpolate(beta, 1.0, beta, lambda progress: (1.0, 0.0))


def linear_decay(beta: float, steps: float, end: float = 0.0) -> Schedule:
    """Return a linear schedule from beta to ``end``: beta + (end - beta) * step / steps.

    Args:
        beta, end: finite numbers, the values at step 0 and at ``steps``.
        steps: a finite number > 0.

    Returns:
        A function of the step that returns a float.

    Raises:
        TypeError, ValueError: an argument or the step is not a finite number; ``steps`` is not > 0.
    """
    return _interpolate(beta, steps, end, lambda progress: (1 - progress, progress))


def cosine(beta: float, steps: float, end: float = 0.0) -> Schedule:
    """Return a cosine schedule: end + (beta - end) * (1 + cos(pi * step / steps)) / 2.

    Args:
        beta, steps, end: as in :func:`linear_decay`.

    Returns:
        A function of the step that returns a float.

    Raises:
        TypeError, ValueError: as :func:`linear_decay`.
    """

    def weights(progress: float) -> tuple[float, float]:
        first = (1 + math.cos(math.pi * progress)) / 2
        return first, 1 - first

    return _interpolate(beta, steps, end, weights)


def _interpolate(
    beta: float, steps: float, end: float, weights: Callable[[float], tuple[float, float]]
) -> Schedule:
    """Return a schedule; ``weights`` maps the progress (0 to 1) to factors of beta and ``end``."""
    first, last = float(check_finite("beta", beta)), float(check_finite("end", end))
    length = check_finite("steps", steps)
    if length <= 0:
        raise ValueError(f"steps must be > 0, got {steps!r}")

    def schedule(step: float) -> float:
        progress = min(max(check_finite("step", step) / length, 0.0), 1.0)
        first_weight, last_weight = weights(progress)
        return first * first_weight + last * last_weight

    return schedule
