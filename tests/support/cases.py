"""Generated calls of losses and taps, as data: hypothesis strategies, and what they make."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from hypothesis import assume
from hypothesis import strategies as st
from layouts import DTYPES
from torch import Tensor


class Leaf(NamedTuple):
    """A tensor of random numbers with any strides, gaps, offset and expanded dimensions."""

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
        held = [sizes[d] * steps[d] + pads[d] for d in order]
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(math.prod(held) + self.offset, generator=generator, dtype=torch.float64)
        x = (x * self.factor).to(self.dtype)[self.offset :].view(held)
        x = x.permute([order.index(d) for d in dims])
        for d in dims:
            x = x[(slice(None),) * d + (slice(pads[d], pads[d] + sizes[d] * steps[d], steps[d]),)]
        return x.expand(self.shape)

    def make_factor(self) -> Tensor:
        """A mask, or weights of samples: bool, or not negative."""
        x = self.make()
        return x > 0 if self.dtype == torch.float16 else x.clamp(min=0)


class Call(NamedTuple):
    """A call of a function with features of two sides."""

    students: list[Leaf]
    teachers: list[Leaf]
    options: dict[str, Any]  # a Leaf stands for a tensor
    grads: tuple[bool, bool]  # the sides that want a gradient

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
def leaf(draw: st.DrawFn, shape: Sequence[int]) -> Leaf:
    dims = range(len(shape))
    made = Leaf(tuple(shape), draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2**31)))
    made = made._replace(factor=draw(st.sampled_from([1.0, 1.0, 0.1, 10.0])))
    if draw(st.booleans()):
        return made
    return made._replace(
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
    """Exponent and collapse."""
    if draw(st.integers(0, 4)) == 0:
        p = draw(st.sampled_from([1.0, 2.0, 3.0, 4.0, 5.0]))
        return {"p": p, "collapse": draw(st.sampled_from(["mean", "sum"])), "absolute": False}
    p = draw(st.sampled_from([2.0, 2.0, 1.0, 4.0, 3.0, 1.3, 7.0]))
    return {"p": p, "collapse": draw(st.sampled_from(["mean", "mean", "sum", "max"]))}


@st.composite
def factors(draw: st.DrawFn, batches: list[int], spatial: list[tuple[int, ...]]) -> dict[str, Any]:
    """Weights of pairs, masks and weights of samples; and the reduction."""
    pairs = len(batches)
    weight = st.sampled_from([1.0, 0.25, -3.0, 0.0])
    weights = draw(st.one_of(st.none(), st.lists(weight, min_size=pairs, max_size=pairs)))
    one_batch = len(set(batches)) == 1
    reduction = draw(st.sampled_from(["sum", "none"] + ["sample"] * one_batch))
    found: dict[str, Any] = {"weights": weights, "reduction": reduction}
    if draw(st.integers(0, 3)) == 0:
        found["mask"] = [
            draw(leaf((b, *(size if draw(st.booleans()) else draw(sizes(len(size)))))))
            for b, size in zip(batches, spatial, strict=True)
        ]
    if one_batch and draw(st.integers(0, 3)) == 0:
        found["sample_weights"] = draw(leaf((batches[0],)))
    return found


@st.composite
def losses(draw: st.DrawFn, of_maps: bool = False) -> Call:
    """``at_loss`` with all its options, of up to three pairs; ``of_maps``: those of taps alone."""
    options: dict[str, Any] = draw(map_options())
    options["form"] = draw(st.sampled_from(["code", "paper"]))
    options["eps"] = draw(st.sampled_from([1e-12, 1e-12, 1e-3, 0.77]))
    options["eps_mode"] = draw(st.sampled_from(["max", "max", "add"]))
    both_ways = [] if of_maps else ["both"]
    options["attend"] = attend = draw(st.sampled_from(["spatial"] * 5 + ["channel", *both_ways]))
    last = [draw(st.sampled_from([False, False, False, True])) for _ in range(2)]
    if any(last):
        options["channel_dim"] = tuple(-1 if each else 1 for each in last)
    rank, pairs = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    resizes = [None, None, None, "maps"] + ["features"] * (not of_maps)
    fixed = attend == "channel" or "absolute" in options
    options["resize"] = resize = None if fixed else draw(st.sampled_from(resizes))
    batches = [draw(st.integers(1, 5))] * pairs
    if draw(st.integers(0, 3)) == 0:
        batches = [draw(st.integers(1, 5)) for _ in range(pairs)]

    # Tokens have their map's size by an option, one for all pairs of a side.
    tokens = [each and draw(st.booleans()) for each in last]
    students = [draw(sizes(rank)) for _ in range(pairs)]
    teachers = list(students)
    if resize:
        teachers = [draw(sizes(rank)) for _ in range(pairs)]
    elif attend == "channel":
        teachers = [draw(sizes(draw(st.integers(1, 3)))) for _ in range(pairs)]
    skip = [draw(st.integers(0, 2)) * each for each in tokens]
    if any(tokens):
        students, teachers = [students[0]] * pairs, [teachers[0]] * pairs
        options["skip_tokens"] = tuple(skip)
        if attend != "channel":
            of_sides = zip(tokens, (students[0], teachers[0]), strict=True)
            options["map_size"] = tuple(size if each else None for each, size in of_sides)
    features: list[list[Leaf]] = [[], []]
    for i, b in enumerate(batches):
        channels = [draw(st.integers(1, 40)) for _ in range(2)]
        if attend != "spatial":
            channels[1] = channels[0]
        # A signed map of one position is -1 or 1, whatever its size: its gradient is rounding.
        positions = channels[0] if attend == "channel" else math.prod(students[i])
        assume("absolute" not in options or min(positions, channels[0]) > 1)
        for side, spatial in enumerate((students[i], teachers[i])):
            c = channels[side]
            if tokens[side]:
                shape: tuple[int, ...] = (b, skip[side] + math.prod(spatial), c)
            else:
                shape = (b, *spatial, c) if last[side] else (b, c, *spatial)
            features[side].append(draw(leaf(shape)))
    given = draw(factors(batches, students))
    if attend != "spatial":
        given.pop("mask", None)
    grads = draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    return Call(*features, options | given, grads)
