"""Hypothesis strategies that generate calls of losses and taps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from hypothesis import assume
from hypothesis import strategies as st
from layouts import DTYPES
from torch import Tensor


class Feature(NamedTuple):
    """A recipe for a random tensor with any strides, gaps, offset and expanded dimensions."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    seed: int
    factor: float = 1.0
    order: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    expanded: tuple[int, ...] = ()
    offset: int = 0

    def make(self) -> Tensor:
        dims = range(len(self.shape))
        order = self.order or tuple(dims)
        steps, pads = self.steps or (1,) * len(dims), self.pads or (0,) * len(dims)
        sizes = [1 if d in self.expanded else n for d, n in enumerate(self.shape)]
        stored = [sizes[d] * steps[d] + pads[d] for d in order]
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(math.prod(stored) + self.offset, generator=generator, dtype=torch.float64)
        x = (x * self.factor).to(self.dtype)[self.offset :].view(stored)
        x = x.permute([order.index(d) for d in dims])
        for d in dims:
            x = x[(slice(None),) * d + (slice(pads[d], pads[d] + sizes[d] * steps[d], steps[d]),)]
        return x.expand(self.shape)

    def make_factor(self) -> Tensor:
        """Make a bool or non-negative tensor, for a mask or sample weights."""
        x = self.make()
        return x > 0 if self.dtype == torch.float16 else x.clamp(min=0)


class Call(NamedTuple):
    """A recipe for the arguments of a call with student and teacher features."""

    students: list[Feature]
    teachers: list[Feature]
    options: dict[str, Any]  # a Feature in it becomes a tensor
    grads: tuple[bool, bool]  # requires_grad of students and of teachers

    def make(self) -> tuple[list[Tensor], list[Tensor], dict[str, Any]]:
        options = dict(self.options)
        for name in ("mask", "sample_weights"):
            if isinstance(options.get(name), list):
                options[name] = [x.make_factor() for x in options[name]]
            elif name in options:
                options[name] = options[name].make_factor()
        sides = ([x.make() for x in side] for side in (self.students, self.teachers))
        return *sides, options


@st.composite
def feature(draw: st.DrawFn, shape: Sequence[int]) -> Feature:
    dims = range(len(shape))
    contiguous = Feature(tuple(shape), draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2**31)))
    contiguous = contiguous._replace(factor=draw(st.sampled_from([1.0, 1.0, 0.1, 10.0])))
    if draw(st.booleans()):
        return contiguous
    return contiguous._replace(
        order=tuple(draw(st.permutations(dims))),
        steps=tuple(draw(st.sampled_from([1, 1, 1, 2])) for _ in dims),
        pads=tuple(draw(st.sampled_from([0, 0, 0, 1])) for _ in dims),
        expanded=tuple(d for d in dims if draw(st.sampled_from([False] * 7 + [True]))),
        offset=draw(st.integers(0, 3)),
    )


@st.composite
def sizes(draw: st.DrawFn, rank: int) -> tuple[int, ...]:
    return tuple(draw(st.integers(1, (40, 9, 4)[rank - 1])) for _ in range(rank))


@st.composite
def map_options(draw: st.DrawFn) -> dict[str, Any]:
    if draw(st.integers(0, 4)) == 0:
        p = draw(st.sampled_from([1.0, 2.0, 3.0, 4.0, 5.0]))
        return {"p": p, "collapse": draw(st.sampled_from(["mean", "sum"])), "absolute": False}
    p = draw(st.sampled_from([2.0, 2.0, 1.0, 4.0, 3.0, 1.3, 7.0]))
    return {"p": p, "collapse": draw(st.sampled_from(["mean", "mean", "sum", "max"]))}


@st.composite
def loss_options(
    draw: st.DrawFn, batches: list[int], spatial: list[tuple[int, ...]]
) -> dict[str, Any]:
    """Draw weights, reduction, mask and sample_weights."""
    pairs = len(batches)
    weight = st.sampled_from([1.0, 0.25, -3.0, 0.0])
    weights = draw(st.one_of(st.none(), st.lists(weight, min_size=pairs, max_size=pairs)))
    one_batch = len(set(batches)) == 1
    reduction = draw(st.sampled_from(["sum", "none"] + ["sample"] * one_batch))
    options: dict[str, Any] = {"weights": weights, "reduction": reduction}
    if draw(st.integers(0, 3)) == 0:
        options["mask"] = [
            draw(feature((b, *(size if draw(st.booleans()) else draw(sizes(len(size)))))))
            for b, size in zip(batches, spatial, strict=True)
        ]
    if one_batch and draw(st.integers(0, 3)) == 0:
        options["sample_weights"] = draw(feature((batches[0],)))
    return options


@st.composite
def losses(draw: st.DrawFn, for_taps: bool = False) -> Call:
    """Draw a call of ``at_loss`` with up to three pairs; ``for_taps``: with taps' options only."""
    options: dict[str, Any] = draw(map_options())
    options["form"] = draw(st.sampled_from(["code", "paper"]))
    options["eps"] = draw(st.sampled_from([1e-12, 1e-12, 1e-3, 0.77]))
    options["eps_mode"] = draw(st.sampled_from(["max", "max", "add"]))
    attends = ["spatial"] * 5 + ["channel"] + ["both"] * (not for_taps)
    options["attend"] = attend = draw(st.sampled_from(attends))
    channels_last = [draw(st.sampled_from([False, False, False, True])) for _ in range(2)]
    if any(channels_last):
        options["channel_dim"] = tuple(-1 if last else 1 for last in channels_last)
    rank, pairs = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    resizes = [None, None, None, "maps"] + ["features"] * (not for_taps)
    fixed_size = attend == "channel" or "absolute" in options
    options["resize"] = resize = None if fixed_size else draw(st.sampled_from(resizes))
    batches = [draw(st.integers(1, 5))] * pairs
    if draw(st.integers(0, 3)) == 0:
        batches = [draw(st.integers(1, 5)) for _ in range(pairs)]

    # map_size applies to all pairs, so token features of all pairs have one size.
    are_tokens = [last and draw(st.booleans()) for last in channels_last]
    students = [draw(sizes(rank)) for _ in range(pairs)]
    teachers = list(students)
    if resize:
        teachers = [draw(sizes(rank)) for _ in range(pairs)]
    elif attend == "channel":
        teachers = [draw(sizes(draw(st.integers(1, 3)))) for _ in range(pairs)]
    skip = [draw(st.integers(0, 2)) * tokens for tokens in are_tokens]
    if any(are_tokens):
        students, teachers = [students[0]] * pairs, [teachers[0]] * pairs
        options["skip_tokens"] = tuple(skip)
        if attend != "channel":
            map_sizes = zip(are_tokens, (students[0], teachers[0]), strict=True)
            options["map_size"] = tuple(size if tokens else None for tokens, size in map_sizes)
    features: list[list[Feature]] = [[], []]
    for i, b in enumerate(batches):
        channels = [draw(st.integers(1, 40)) for _ in range(2)]
        if attend != "spatial":
            channels[1] = channels[0]
        # A signed map of one position is -1 or 1, so its gradient is only rounding.
        positions = channels[0] if attend == "channel" else math.prod(students[i])
        assume("absolute" not in options or min(positions, channels[0]) > 1)
        for side, spatial in enumerate((students[i], teachers[i])):
            c = channels[side]
            if are_tokens[side]:
                shape: tuple[int, ...] = (b, skip[side] + math.prod(spatial), c)
            else:
                shape = (b, *spatial, c) if channels_last[side] else (b, c, *spatial)
            features[side].append(draw(feature(shape)))
    options |= draw(loss_options(batches, students))
    if attend != "spatial":
        options.pop("mask", None)
    grads = draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    return Call(*features, options, grads)
