"""Large matrices of cases: a small part for every run, the rest for ``pytest -m exhaustive``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest


def crossed(**named: Iterable[Any]) -> Callable[..., Any]:
    """Parametrize a test by all combinations of the axes' values.

    Rows in which each value comes at least once run always: the i-th takes the i-th value of every
    axis. An axis at its end starts again, each time one value later, so that two short axes do not
    always meet in the same values. All others are exhaustive.
    """
    axes = {name: list(values) for name, values in named.items()}
    lengths = [len(values) for values in axes.values()]
    always = {tuple((i + i // n) % n for n in lengths) for i in range(max(lengths))}
    return pytest.mark.parametrize(
        tuple(axes),
        [
            pytest.param(
                *(values[i] for values, i in zip(axes.values(), chosen, strict=True)),
                marks=[] if chosen in always else pytest.mark.exhaustive,
            )
            for chosen in itertools.product(*map(range, lengths))
        ],
        # Addresses in texts would differ between pytest's processes.
        ids=lambda value: None if len(text := str(value)) > 50 or " at 0x" in text else text,
    )
