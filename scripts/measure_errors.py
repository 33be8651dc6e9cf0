"""Measure the errors of at_loss and its gradients against float64, for docs/numerics.md.

    python scripts/measure_errors.py [BACKEND ...]

Prints two tables with the largest errors over all cases for each back end, and the bounds that the
tests assert. By default measures all back ends of this machine; "emulator" runs the CUDA kernels in
the tests' CUDA emulator. Takes a few minutes.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import at_fused

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))
from reference import (
    EXACT_ROUNDING,
    GRADIENT_TOLERANCE,
    ROUNDING,
    VALUE_TOLERANCE,
    least_distance,
    reference_loss,
)

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# B, channels of the student, channels of the teacher, H, W
SIZES = [(2, 3, 5, 5, 7), (3, 20, 11, 4, 4), (1, 64, 33, 13, 2), (4, 256, 40, 7, 7)]
POWERS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
# Relative differences between a student and a teacher that are nearly the same.
DIFFERENCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)


class Errors(NamedTuple):
    """Errors of a loss (relative) and its gradients (over the largest element), and ||qs - qt||."""

    value: float
    gradient: float
    distance: float


def errors(s: Tensor, t: Tensor, p: float, form: str) -> Errors:
    """Measure one call, with the gradients of student and teacher."""
    leaves = [x.detach().requires_grad_() for x in (s, t)]
    wide = [x.detach().double().requires_grad_() for x in (s, t)]
    loss = at_fused.at_loss(*leaves, p=p, form=form)
    exact = reference_loss(wide[:1], wide[1:], p=p, form=form)
    actual = torch.autograd.grad(loss * 2.0**10, leaves)  # loss scaling, for fp16
    expected = torch.autograd.grad(exact * 2.0**10, wide)
    pairs = zip(actual, expected, strict=True)
    gradient = max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs)
    value = abs(loss.item() - exact.item()) / exact.item()
    return Errors(value, gradient, least_distance(wide[:1], wide[1:], p=p))


def cases(repeats: int) -> Iterator[tuple[Tensor, Tensor, float, str]]:
    """Yield independent features in float64, in NCHW and channels_last, with p and form."""
    for seed in range(repeats):
        random = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
        for (b, *channels, h, w), p in itertools.product(SIZES, POWERS):
            s, t = (random(b, c, h, w, dtype=torch.float64) for c in channels)
            if seed % 2:
                s, t = (x.to(memory_format=torch.channels_last) for x in (s, t))
            for form in ("code", "paper"):
                yield s, t, p, form


def scaled_errors(dtype: torch.dtype) -> Iterator[Errors]:
    """Yield errors times ||qs - qt||, for teachers that nearly equal the student."""
    for (s, _, p, form), difference in itertools.product(cases(1), DIFFERENCES):
        t = (s * (1 + difference * torch.randn(s.shape, dtype=s.dtype))).to(dtype)
        e = errors(s.to(dtype), t, p, form)
        yield Errors(e.value * e.distance, e.gradient * e.distance, e.distance)


def worst(all_errors: Iterable[Errors]) -> Errors:
    """Return the largest errors and the least distance."""
    values, gradients, distances = zip(*all_errors, strict=True)
    return Errors(max(values), max(gradients), min(distances))


def use(name: str) -> AbstractContextManager[object]:
    """Select a back end, or "emulator", within a ``with`` block."""
    if name != "emulator":
        return at_fused.use_backend(name)
    from cuda_emulator import emulated

    return emulated(multiprocessors=4)


def main() -> None:
    """Print the tables."""
    torch.manual_seed(0)
    names = sys.argv[1:] or [name for name, row in at_fused.backends().items() if row.available]
    print("| dtype | back end | value | bound | gradient | bound |\n|---|---|--:|--:|--:|--:|")
    for dtype, name in itertools.product(DTYPES, names):
        repeats = 1 if name in ("emulator", "triton") else 4
        with use(name):
            e = worst(errors(s.to(dtype), t.to(dtype), p, form) for s, t, p, form in cases(repeats))
        bound, unit = VALUE_TOLERANCE[dtype == torch.float64], GRADIENT_TOLERANCE[dtype]
        row = f"{e.value:.1e} | {bound:.0e} | {e.gradient:.1e} | {unit:.1e}"
        print(f"| {str(dtype)[6:]} | {name} | {row} |")
    print("\n| dtype | back end | value times d | bound | gradient times d | bound | least d |")
    print("|---|---|--:|--:|--:|--:|--:|")
    for dtype, name in itertools.product(DTYPES[:2], names):
        with use(name):
            e = worst(scaled_errors(dtype))
        unit = EXACT_ROUNDING if dtype == torch.float64 else ROUNDING
        row = f"{e.value:.1e} | {2 * unit:.0e} | {e.gradient:.1e} | {4 * unit:.0e}"
        print(f"| {str(dtype)[6:]} | {name} | {row} | {e.distance:.0e} |")


if __name__ == "__main__":
    main()
