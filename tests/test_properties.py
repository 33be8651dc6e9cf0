"""Generated cases: shapes, strides, dtypes, layouts and options against the float64 reference."""

from __future__ import annotations

import math

import torch
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


@settings(
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    data=pairs(),
    p=st.sampled_from([1.0, 2.0, 4.0, 3.0, 1.3]),
    collapse=st.sampled_from(["mean", "sum"]),
    form=st.sampled_from(["code", "paper"]),
    reduction=st.sampled_from(["sum", "none"]),
    eps=st.sampled_from([1e-12, 1e-3, 1.0]),
    student_grad=st.booleans(),
    teacher_grad=st.booleans(),
)
def test_generated_cases(
    backend: str,
    data: tuple[list[Tensor], list[Tensor]],
    p: float,
    collapse: str,
    form: str,
    reduction: str,
    eps: float,
    student_grad: bool,
    teacher_grad: bool,
) -> None:
    students, teachers = data
    assert_matches_reference(
        students,
        teachers,
        p=p,
        collapse=collapse,
        form=form,
        reduction=reduction,
        eps=eps,
        student_grad=student_grad,
        teacher_grad=teacher_grad,
        scale=2.0**8,
    )
