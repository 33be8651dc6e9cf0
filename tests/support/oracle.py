"""What a generated call must give: the formulas of ``reference.py``, and how far rounding may lead.

With every result come bounds for its elements, by the same formulas on absolute values: where a
sum cancels (a map that is the same on both sides, a signed power, a mean of unlike numbers) the
error is that of what was added up, elsewhere that of the result. NaN is the bound where the
documents promise NaN: in a sample with NaN, with infinity, or with a map beyond its dtype's range.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from layouts import DTYPES
from reference import (
    Options,
    attended,
    attended_pairs,
    compare,
    divisor,
    first_of_largest,
    interpolated,
    masked,
    normalized,
    raw_map,
    reduced,
)
from torch import Tensor

# Rounding of a map, of its elements' sum and power, as a share of it: fp32 and fp64.
MAP_ROUNDING = {False: 5e-6, True: 1e-13}
# Half a unit in the last place of what is given back, and of the smallest numbers.
UNIT = {dtype: torch.finfo(dtype).eps / 2 for dtype in DTYPES}
SMALLEST = {
    torch.float64: 0.0,
    torch.float32: 1e-44,
    torch.float16: 2.0**-24,
    torch.bfloat16: 5e-41,
}
LARGEST = torch.finfo(torch.float32).max


class Sided(NamedTuple):
    """A feature's values in float64, their absolute values, and whether it is float64 itself."""

    value: Tensor
    size: Tensor
    exact: bool


class Map(NamedTuple):
    """A map (B, N) and the same of absolute values; ``exact`` as in ``Sided``."""

    raw: Tensor
    size: Tensor
    exact: bool


class Value(NamedTuple):
    """A result, and how far it may be off."""

    value: Tensor
    error: Tensor


# ---- maps ----------------------------------------------------------------------------------------


def map_of(x: Sided, o: Options, target: Sequence[int] | None = None) -> Map:
    """The map of (B, C, *spatial), interpolated to ``target``."""
    raw = raw_map(x.value, o.p, o.collapse, o.absolute)
    size, collapse = x.size, o.collapse
    if o.collapse == "max":
        size, collapse = size.gather(1, first_of_largest(x.value)), "sum"
    # Sizes are not negative; |x| would have a slope of 0 at 0.
    size = raw_map(size, o.p, collapse, absolute=False)
    if not x.exact:
        added_up = size * (x.value.shape[1] if o.collapse == "mean" else 1)
        beyond = torch.where(added_up > LARGEST, math.inf, 0.0)
        raw, size = raw + beyond, size + beyond
    if target is None or target == raw.shape[1:]:
        return Map(raw, size, x.exact)
    raw, wide = interpolated(raw, target), interpolated(size, target)
    if not x.exact:
        # The weights are rounded too, those of a neighbour that is much larger.
        everywhere = size.flatten(1).sum(1).view(-1, *[1] * len(target))
        wide = wide + 0.05 * everywhere
    return Map(raw, wide, x.exact)


class Normal(NamedTuple):
    """A normalised map q, and what the errors of it and its gradient are made of."""

    q: Tensor
    size: Tensor  # q's error is this times the rounding of a map
    unit: Tensor  # and that of Q / ||Q||, 0 where a norm has no part in q
    divisor: Tensor
    steep: Tensor  # 1 and the error of the divisor, over the rounding of a map

    def back(self, gradient: Tensor) -> Tensor:
        """The error of dL/dQ over that of dL/dq."""
        projected = self.unit * (self.size * gradient).sum(1, keepdim=True)
        return (gradient + projected) / self.divisor.detach() * self.steep


def normalize(q: Map, o: Options) -> Normal:
    by = divisor(q.raw, o.eps, o.eps_mode)
    with torch.no_grad():
        norm = torch.linalg.vector_norm(q.raw, dim=1, keepdim=True)
        constant = norm <= o.eps if o.eps_mode == "max" else norm == 0
        unit = torch.where(constant, 0.0, q.size / norm)
        off = (unit * q.size).sum(1, keepdim=True) / by
        size, unit = q.size / by * (1 + off), unit * (1 + off)
    return Normal(normalized(q.raw, o.eps, o.eps_mode), size, unit, by, 1 + off)


def attention_map(
    x: Sided, options: Options, is_normalized: bool, upstream: Tensor, bounds: Bounds
) -> Value:
    """``attention_map`` of a feature as it is given."""
    o = options
    bounds.leave_open(x, 0, o)
    layout = o.layouts()[0]
    x = Sided(*(attended(v, layout, o.attend) for v in x[:2]), x.exact)
    q = map_of(x, o)
    shape, q = q.raw.shape, Map(q.raw.flatten(1), q.size.flatten(1), q.exact)
    rounding, above = MAP_ROUNDING[x.exact], upstream.double().flatten(1).abs()
    value, size = q.raw, q.size.detach()
    if is_normalized:
        normal = normalize(q, o)
        # By the formula of a norm that may be infinite.
        value, size = q.raw / normal.divisor, normal.size
        above = normal.back(above)
    bounds.add(q, above, rounding)
    error = rounding * size + 1e-44 * (not x.exact)
    # Beyond fp32 signed powers have any sum.
    beyond = q.size.isinf()
    beyond = beyond.any(1, keepdim=True) if is_normalized else beyond
    value, error = torch.where(beyond, 0.0, value), torch.where(beyond, math.inf, error)
    return Value(value.reshape(shape), error.reshape(shape))


# ---- losses --------------------------------------------------------------------------------------


class Bounds:
    """Sums whose derivatives by the absolute values are bounds of gradients' errors."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.floor = 0.0  # what fp32 loses of slopes that are next to nothing

    def add(self, q: Map, gradient: Tensor, rounding: float) -> None:
        """By dL/dQ, in absolute values and without what cancels."""
        # Slopes are kept by themselves, and times the gradient from above, up to 512, later.
        least = 0.0 if q.exact else 1e-44 * 2048
        self.total = self.total + (q.size * (gradient * rounding + least)).sum()
        self.floor = max(self.floor, float(gradient.nan_to_num(0.0, 0.0).max()) * least)

    def leave_open(self, x: Sided, side: int, options: Options) -> None:
        """Skipped tokens have 0 times a slope, which is anything where powers are not finite."""
        channel_dim, skip, _ = options.layouts()[side]
        if channel_dim == -1 and x.size.dim() == 3:
            skipped = x.size[:, :skip]
            self.total = self.total + (torch.where(skipped < 1e5, 0.0, math.inf) * skipped).sum()


def maps_to_compare(
    s: Sided, t: Sided, mask: Tensor | None, options: Options
) -> Iterator[tuple[Map, Map]]:
    sides = (attended_pairs(*each, options) for each in ((s.value, t.value), (s.size, t.size)))
    for values, sizes in zip(*sides, strict=True):
        x, y = (Sided(*each) for each in zip(values, sizes, (s.exact, t.exact), strict=True))
        maps = map_of(x, options), map_of(y, options, x.value.shape[2:])
        yield tuple(
            Map(masked(q.raw, mask).flatten(1), masked(q.size, mask).flatten(1), q.exact)
            for q in maps
        )


def pair_loss(student: Map, teacher: Map, o: Options, factor: Tensor, bounds: Bounds) -> Value:
    """The loss of each sample, (B,). ``factor``: what it counts in what is differentiated."""
    s, t = normalize(student, o), normalize(teacher, o)
    exact = student.exact and teacher.exact
    rounding = MAP_ROUNDING[exact]
    loss = compare(s.q - t.q, o.form)
    with torch.no_grad():
        positions = s.q.shape[1]
        distance = torch.linalg.vector_norm(s.q - t.q, dim=1)
        size = s.size + t.size
        off = torch.linalg.vector_norm(size, dim=1)
        if o.form == "code":
            error = off * rounding * (2 * distance + off * rounding) / positions
            slope = 2 * size / positions
        else:
            error = off * rounding
            slope = size / torch.maximum(distance, 1e-16 * off + 1e-300).unsqueeze(1)
        error = error + (1e-14 if exact else 3e-7) * loss
        far = factor.abs().unsqueeze(1)
    bounds.add(student, s.back(slope) * far, rounding)
    bounds.add(teacher, t.back(slope) * far, rounding)
    return Value(loss, error)


def at_loss(
    students: Sequence[Sided],
    teachers: Sequence[Sided],
    options: Options,
    upstream: Tensor,
    bounds: Bounds,
) -> Value:
    """The loss of features; ``upstream`` is what its gradient will be."""
    ones = [torch.ones(len(x.value)).double().requires_grad_() for x in students]
    factors = torch.autograd.grad(reduced(ones, options), ones, upstream.double())
    losses, errors = [], []
    for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
        bounds.leave_open(s, 0, options)
        bounds.leave_open(t, 1, options)
        maps = maps_to_compare(s, t, options.mask_of(i), options)
        found = [pair_loss(*pair, options, factors[i], bounds) for pair in maps]
        losses.append(sum(each.value for each in found))
        errors.append(sum(each.error for each in found))
    by_size = options._replace(weights=options.weights and [*map(abs, options.weights)])
    return Value(reduced(losses, options), reduced(errors, by_size))


# ---- comparisons ---------------------------------------------------------------------------------


class Reference:
    """Leaves in float64, and their absolute values, in the place of those of a call.

    ``sides`` finds the students and the teachers in leaves.
    """

    def __init__(self, leaves: Sequence[Tensor], sides: Any) -> None:
        self.doubles = [x.detach().double().requires_grad_() for x in leaves]
        self.sizes = [x.detach().abs().requires_grad_() for x in self.doubles]
        self.bounds = Bounds()
        exact = [[x.dtype == torch.float64 for x in side] for side in sides(leaves)]
        self.students, self.teachers = (
            [Sided(*each) for each in zip(*side, strict=True)]
            for side in zip(sides(self.doubles), sides(self.sizes), exact, strict=True)
        )

    def loss(self, options: Options, upstream: Tensor) -> Value:
        return at_loss(self.students, self.teachers, options, upstream, self.bounds)

    def assert_gradients(
        self, found: dict[int, Tensor], value: Tensor, upstream: Tensor, uses: Sequence[int]
    ) -> None:
        """``found``: gradients by the leaves' numbers; ``uses``: of each leaf in the call."""
        doubles, sizes = ([of[i] for i in found] for of in (self.doubles, self.sizes))
        right = torch.autograd.grad(value, doubles, upstream.double())
        errors = torch.autograd.grad(self.bounds.total, sizes)
        for i, r, e in zip(found, right, errors, strict=True):
            assert_gradient(found[i], r, e + self.bounds.floor, uses[i])


def assert_value(found: Tensor, right: Value) -> None:
    assert found.shape == right.value.shape
    value, error = right.value.detach(), right.error.detach()
    lost, anything = value.isnan(), error.isposinf() & value.isfinite()
    assert torch.equal(found.isnan()[~anything], lost[~anything]), (found, value)
    beyond = (value.abs() > torch.finfo(found.dtype).max) & (found == value.to(found.dtype))
    off = (found.detach().double() - value).abs()
    assert (off <= error)[~(lost | anything | beyond)].all(), (found, value, off, error)


def assert_gradient(found: Tensor, right: Tensor, error: Tensor, uses: int = 1) -> None:
    """``error`` is what rounding does to the maps; ``uses``: gradients that were added up."""
    assert found.dtype in UNIT
    lost = error.isnan()
    assert not lost.any() or found[lost].isnan().any(), "a NaN in a sample leaves no trace"
    unit = UNIT[found.dtype]
    parts = right.abs() + (error / MAP_ROUNDING[False] if uses > 1 else 0)
    allowed = error + uses * (unit * parts * 1.01 + SMALLEST[found.dtype])
    off = (found.double() - right).abs()
    # Beyond a dtype's range it has infinity; near its end either.
    checked = error.isfinite() & (right.abs() < torch.finfo(found.dtype).max * 0.99)
    wrong = ~(off <= allowed) & checked
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} elements: {found[wrong][:3]}, "
        f"right {right[wrong][:3]}, allowed {allowed[wrong][:3]}"
    )
