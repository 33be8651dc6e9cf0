"""Generated calls of losses and maps, as data: hypothesis strategies, and what they make."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from layouts import DTYPES
from reference import both
from torch import Tensor

# Sprinkled over random numbers; what a dtype does not hold becomes infinity or zero.
SPECIAL = (0.0, -0.0, 1e-45, 6e-8, 1e-20, 65504.0, 1e18, math.inf, -math.inf, math.nan)


class Leaf(NamedTuple):
    """A tensor with any strides, gaps, offset and expanded dimensions."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    values: Any  # "normal", "integers", "zeros", a power of ten as a factor, or ("special", value)
    seed: int
    grad: bool
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
        x = self.numbers(math.prod(held) + self.offset)[self.offset :].view(held)
        x = x.permute([order.index(d) for d in dims])
        for d in dims:
            x = x[(slice(None),) * d + (slice(pads[d], pads[d] + sizes[d] * steps[d], steps[d]),)]
        return x.expand(self.shape).requires_grad_(self.grad)

    def numbers(self, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(count, generator=generator, dtype=torch.float64)
        if self.values == "integers":
            x = (x * 1.5).round()  # and of both signs' zeros
        elif self.values == "zeros":
            x.zero_()
        elif isinstance(self.values, int):
            x *= 10.0**self.values
        elif isinstance(self.values, tuple):
            x[torch.rand(count, generator=generator) < 0.05] = self.values[1]
        return x.to(self.dtype)


class Feature(NamedTuple):
    """A leaf, or some of its channels: views of one storage where several features share it."""

    leaf: int
    channels: tuple[int, int] | None = None

    def of(self, leaves: Sequence[Tensor], channel_dim: int) -> Tensor:
        x = leaves[self.leaf]
        if self.channels is None:
            return x
        return x.narrow(channel_dim, self.channels[0], self.channels[1])


class Call(NamedTuple):
    """A call of a function with features of two sides."""

    leaves: tuple[Leaf, ...]
    student: tuple[Feature, ...]
    teacher: tuple[Feature, ...]
    options: dict[str, Any]  # a Leaf stands for a tensor
    listed: bool = True  # else tensors in the place of lists of one

    def sides(self, leaves: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        dims = both(self.options.get("channel_dim", 1))
        students = [f.of(leaves, dims[0]) for f in self.student]
        return students, [f.of(leaves, dims[1]) for f in self.teacher]

    def given(self, features: Sequence[Tensor]) -> Any:
        """A side as it is passed."""
        return list(features) if self.listed else features[0]

    def tensor_options(self) -> dict[str, Any]:
        def made(value: Any) -> Any:
            if isinstance(value, Leaf):
                x = value.make()
                # A mask, or weights of samples: not negative.
                return x > 0 if value.dtype == torch.float16 else x.clamp(min=0)
            return [*map(made, value)] if isinstance(value, list) else value

        return {name: made(value) for name, value in self.options.items()}


# ---- tensors -------------------------------------------------------------------------------------

VALUES = st.one_of(
    st.just("normal"),
    st.just("normal"),
    st.sampled_from(["integers", "zeros", -3, 2]),
    st.tuples(st.just("special"), st.sampled_from(SPECIAL)),
)


@st.composite
def leaf(draw: st.DrawFn, shape: Sequence[int], values: Any = VALUES) -> Leaf:
    dims = range(len(shape))
    made = Leaf(
        tuple(shape),
        draw(st.sampled_from(DTYPES)),
        draw(values) if isinstance(values, st.SearchStrategy) else values,
        draw(st.integers(0, 2**31)),
        draw(st.booleans()),
    )
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


class Leaves:
    """The leaves of a call, and the features that are made of them."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.leaves: list[Leaf] = []
        self.made: list[tuple[Feature, tuple[int, ...], int]] = []

    def feature(self, shape: tuple[int, ...], channel_dim: int = 1) -> Feature:
        """A new one of this shape, or some channels of one that is as large otherwise."""
        d = channel_dim % len(shape)
        others = shape[:d] + shape[d + 1 :]
        for one, known, dim in self.made:
            fits = dim == d and known[:d] + known[d + 1 :] == others and known[d] >= shape[d]
            if fits and self.draw(st.integers(0, 3)) == 0:
                if known[d] == shape[d]:
                    return one
                begin = self.draw(st.integers(0, known[d] - shape[d]))
                return Feature(one.leaf, (begin, shape[d]))
        self.leaves.append(self.draw(leaf(shape)))
        self.made.append((Feature(len(self.leaves) - 1), shape, d))
        return self.made[-1][0]


# ---- options -------------------------------------------------------------------------------------

common = {
    "form": st.sampled_from(["code", "paper"]),
    # Not the norm of any map of whole numbers: at eps itself either gradient is right.
    "eps": st.sampled_from([1e-12, 1e-12, 1e-3, 0.77]),
    "eps_mode": st.sampled_from(["max", "max", "add"]),
}


@st.composite
def map_options(draw: st.DrawFn) -> dict[str, Any]:
    """Exponent and collapse."""
    if draw(st.integers(0, 4)) == 0:
        p = draw(st.sampled_from([1.0, 2.0, 3.0, 4.0, 5.0, 8.0]))
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
        masks = []
        for b, size in zip(batches, spatial, strict=True):
            same = draw(st.booleans())
            shape = (b, *(size if same else draw(sizes(len(size)))))
            masks.append(draw(leaf(shape, "normal"))._replace(grad=False, expanded=()))
        found["mask"] = masks if pairs > 1 or draw(st.booleans()) else masks[0]
    if one_batch and draw(st.integers(0, 3)) == 0:
        found["sample_weights"] = draw(leaf((batches[0],), "normal"))._replace(grad=False)
    return found


# ---- calls ---------------------------------------------------------------------------------------


@st.composite
def losses(draw: st.DrawFn, of_maps: bool = False) -> Call:
    """``at_loss`` with all its options, of up to three pairs; ``of_maps``: those of taps alone."""
    options: dict[str, Any] = draw(map_options())
    options |= {name: draw(choice) for name, choice in common.items()}
    both_ways = [] if of_maps else ["both"]
    options["attend"] = attend = draw(st.sampled_from(["spatial"] * 5 + ["channel", *both_ways]))
    last = [draw(st.sampled_from([False, False, False, True])) for _ in range(2)]
    if any(last):
        options["channel_dim"] = tuple(-1 if each else 1 for each in last)
    rank = draw(st.integers(1, 3))
    resize = draw(st.sampled_from([None, None, None, "maps"] + ["features"] * (not of_maps)))
    options["resize"] = resize
    pairs = draw(st.integers(1, 3))
    batch = draw(st.integers(1, 5))
    batches = [batch] * pairs
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
    if any(tokens):
        students, teachers = [students[0]] * pairs, [teachers[0]] * pairs
        skip = [draw(st.integers(0, 2)) * each for each in tokens]
        options["skip_tokens"] = tuple(skip)
        options["map_size"] = tuple(
            side[0] if each else None
            for each, side in zip(tokens, (students, teachers), strict=True)
        )
    if attend == "channel":  # which has no use for the map's size
        options["resize"] = None
        options.pop("map_size", None)
    made = Leaves(draw)
    features: list[list[Feature]] = [[], []]
    for i, b in enumerate(batches):
        channels = [draw(st.integers(1, 40)) for _ in range(2)]
        if attend != "spatial":
            channels[1] = channels[0]
        for side, spatial in enumerate((students[i], teachers[i])):
            c = channels[side]
            if tokens[side]:
                shape: tuple[int, ...] = (b, skip[side] + math.prod(spatial), c)
            else:
                shape = (b, *spatial, c) if last[side] else (b, c, *spatial)
            features[side].append(made.feature(shape, -1 if last[side] else 1))
    given = draw(factors(batches, students))
    if attend != "spatial":
        given.pop("mask", None)
    listed = pairs > 1 or draw(st.booleans())
    sides = (tuple(each) for each in features)
    return Call(tuple(made.leaves), *sides, options | given, listed)


@st.composite
def maps(draw: st.DrawFn) -> Call:
    """``attention_map``."""
    options: dict[str, Any] = draw(map_options())
    options["normalize"] = draw(st.booleans())
    if options["normalize"]:
        options |= {name: draw(common[name]) for name in ("eps", "eps_mode")}
    options["attend"] = draw(st.sampled_from(["spatial", "spatial", "channel"]))
    spatial = draw(sizes(draw(st.integers(1, 3))))
    b, c = draw(st.integers(1, 5)), draw(st.integers(1, 40))
    if draw(st.booleans()):
        options["channel_dim"] = -1
        shape: tuple[int, ...] = (b, *spatial, c)
        if draw(st.booleans()):
            options["skip_tokens"] = draw(st.integers(0, 2))
            options["map_size"] = None if options["attend"] == "channel" else spatial
            shape = (b, options["skip_tokens"] + math.prod(spatial), c)
    else:
        shape = (b, c, *spatial)
    return Call((draw(leaf(shape)),), (Feature(0),), (), options, False)
