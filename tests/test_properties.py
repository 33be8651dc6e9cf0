"""Generated cases: shapes, strides, dtypes, layouts and options against the float64 reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import EVERY, slow, use
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import assert_matches_reference
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@st.composite
def strided(draw: st.DrawFn, b: int, c: int, spatial: list[int], dtype: torch.dtype) -> Tensor:
    """A tensor of the given shape with any order of strides, gaps and offset."""
    shape = [b, c, *spatial]
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 1, 1, 2])) for _ in shape]
    pads = [draw(st.sampled_from([0, 0, 0, 1])) for _ in shape]
    offset = draw(st.integers(0, 3))
    held = [shape[d] * steps[d] + pads[d] for d in order]
    seed = draw(st.integers(0, 2**31))
    noise = torch.randn(math.prod(held) + offset, generator=torch.Generator().manual_seed(seed))
    x = noise.to(dtype)[offset:].view(held).permute([order.index(d) for d in range(len(shape))])
    return x[
        tuple(
            slice(pad, pad + size * step, step)
            for pad, size, step in zip(pads, shape, steps, strict=True)
        )
    ]


@st.composite
def pairs(draw: st.DrawFn) -> tuple[list[Tensor], list[Tensor]]:
    students, teachers = [], []
    for _ in range(draw(st.integers(1, 3))):
        b = draw(st.integers(1, 5))
        rank = draw(st.integers(1, 3))
        spatial = [draw(st.integers(1, (70, 12, 5)[rank - 1])) for _ in range(rank)]
        for side in (students, teachers):
            c = draw(st.integers(1, 40))
            side.append(draw(strided(b, c, spatial, draw(st.sampled_from(DTYPES)))))
    return students, teachers


CASES = given(
    data=pairs(),
    p=st.sampled_from([1.0, 2.0, 4.0, 3.0, 1.3]),
    collapse=st.sampled_from(["mean", "sum"]),
    form=st.sampled_from(["code", "paper"]),
    reduction=st.sampled_from(["sum", "none"]),
    eps=st.sampled_from([1e-12, 1e-3, 1.0]),
    student_grad=st.booleans(),
    teacher_grad=st.booleans(),
)
OPTIONS: dict[str, Any] = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}


@settings(**OPTIONS)
@CASES
def test_generated_cases(fast_backend: str, **case: Any) -> None:
    students, teachers = case.pop("data")
    assert_matches_reference(students, teachers, scale=2.0**8, **case)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in EVERY if slow(name)])
@settings(max_examples=settings.default.max_examples // 3, **OPTIONS)
@CASES
def test_fewer_generated_cases(name: str, **case: Any) -> None:
    students, teachers = case.pop("data")
    with use(name):
        assert_matches_reference(students, teachers, scale=2.0**8, **case)
