"""Large test matrices: a few cases run by default, the rest with ``pytest -m exhaustive``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest


def crossed(**values_of_axes: Iterable[Any]) -> Callable[..., Any]:
    """Parametrize a test over all combinations of the axes' values.

    The default run has as many combinations as the longest axis, covering every value. The i-th
    takes the i-th value of each axis. A shorter axis repeats, shifted by one value each time, so
    that two short axes do not always pair the same values. The others are marked exhaustive.
    """
    axes = {name: list(values) for name, values in values_of_axes.items()}
    lengths = [len(values) for values in axes.values()]
    default = {tuple((i + i // n) % n for n in lengths) for i in range(max(lengths))}
    return pytest.mark.parametrize(
        tuple(axes),
        [
            pytest.param(
                *(values[i] for values, i in zip(axes.values(), chosen, strict=True)),
                marks=[] if chosen in default else pytest.mark.exhaustive,
            )
            for chosen in itertools.product(*map(range, lengths))
        ],
        # Ids must not contain addresses, which differ between pytest-xdist workers.
        ids=lambda value: None if len(text := str(value)) > 50 or " at 0x" in text else text,
    )
