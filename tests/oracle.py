"""What a generated call must give: the formulas in float64, and how far from it rounding may lead.

Nothing of at_fused is in here. With every result come bounds for its elements, by the same formulas
on absolute values: where a sum cancels (a map that is alike on both sides, a signed power, a mean
of unlike numbers) the error is that of what was added up, elsewhere that of the result. NaN is the
bound where the documents promise NaN: in a sample with NaN, with infinity, or with a map beyond its
dtype's range.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from cases import both
from torch import Tensor

# Rounding of a map, of its elements' sum and power, as a share of it: fp32 and fp64.
MAP_ROUNDING = {False: 5e-6, True: 1e-13}
# Half a unit in the last place of what is given back, and of the smallest numbers.
UNIT = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
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

    def apply(self, f: Any) -> Sided:
        return Sided(f(self.value), f(self.size), self.exact)


class Map(NamedTuple):
    """A map (B, N) and the same of absolute values; ``exact`` as in ``Sided``."""

    raw: Tensor
    size: Tensor
    exact: bool


# ---- maps ----------------------------------------------------------------------------------------


def place(
    x: Sided,
    channel_dim: int,
    skip: int,
    map_size: Sequence[int] | None,
    bounds: Bounds | None = None,
) -> Sided:
    """(B, C, *spatial)."""
    if channel_dim == 1:
        return x
    if x.value.dim() == 3:
        # What is left out has a gradient of 0 times its slope.
        if bounds is not None:
            bounds.leave_open(x.size[:, :skip])
        x = x.apply(lambda v: v[:, skip:])
    x = x.apply(lambda v: v.movedim(-1, 1))
    return x.apply(lambda v: v.unflatten(2, list(map_size))) if map_size else x


def pool(x: Sided, size: Sequence[int]) -> Sided:
    f = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[len(size)]
    return x.apply(lambda v: f(v, list(size)))


def first_of_largest(x: Tensor) -> Tensor:
    """The number of the channel whose |x| is largest, (B, 1, N); the first of several."""
    a = x.detach().abs()
    number = torch.arange(a.shape[1]).view(1, -1, 1)
    winners = (a == a.amax(1, keepdim=True)) | a.isnan()
    return torch.where(winners, number, a.shape[1]).amin(1, keepdim=True)


def map_of(x: Sided, p: float, collapse: str, absolute: bool) -> Map:
    """sum_c |x|^p and its like, over (B, C, *spatial)."""
    value, size = x.value.flatten(2), x.size.flatten(2)
    if collapse == "max":
        channel = first_of_largest(value)
        total = value.gather(1, channel).squeeze(1).abs().pow(p)
        most = size.gather(1, channel).squeeze(1).pow(p)
    else:
        total = (value.abs().pow(p) if absolute else value.pow(p)).sum(1)
        most = size.pow(p).sum(1)
    if not x.exact:
        beyond = torch.where(most > LARGEST, math.inf, 0.0)
        total, most = total + beyond, most + beyond
    share = 1 / value.shape[1] if collapse == "mean" else 1.0
    return Map(total * share, most * share, x.exact)


def change(q: Map, f: Any) -> Map:
    return Map(f(q.raw), f(q.size), q.exact)


def interpolate(q: Map, size: Sequence[int], target: Sequence[int]) -> Map:
    if list(size) == list(target):
        return q
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(size)]

    def resized(v: Tensor) -> Tensor:
        planes = v.reshape(v.shape[0], 1, *size)
        return F.interpolate(planes, size=list(target), mode=mode).flatten(1)

    raw, size = resized(q.raw), resized(q.size)
    if not q.exact:
        # The weights are rounded too, those of a neighbour that is much larger.
        size = size + 0.05 * q.size.sum(1, keepdim=True)
    return Map(raw, size, q.exact)


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


def normalize(q: Map, eps: float, eps_mode: str) -> Normal:
    norm = torch.linalg.vector_norm(q.raw, dim=1, keepdim=True)
    with torch.no_grad():
        lost = ~torch.isfinite(norm)
    if eps_mode == "max":
        divisor, constant = norm.clamp(min=eps), norm.detach() <= eps
    else:
        divisor, constant = norm + eps, norm.detach() == 0
    result = torch.where(lost, math.nan, q.raw / divisor)
    with torch.no_grad():
        unit = torch.where(constant, 0.0, q.size / norm)
        off = (unit * q.size).sum(1, keepdim=True) / divisor
        return Normal(result, q.size / divisor * (1 + off), unit * (1 + off), divisor, 1 + off)


def attention_map(
    x: Sided, options: Options, normalized: bool, upstream: Tensor, bounds: Bounds
) -> Value:
    """``attention_map`` of a placed feature."""
    o, spatial = options, x.value.shape[2:]
    if o.attend == "channel":
        spatial = x.value.shape[1:2]
        x = x.apply(channels_as_positions)
    q = map_of(x, o.p, o.collapse, o.absolute)
    rounding, above = MAP_ROUNDING[x.exact], upstream.double().flatten(1).abs()
    value, size = q.raw, q.size.detach()
    if normalized:
        normal = normalize(q, o.eps, o.eps_mode)
        # By the formula of a norm that may be infinite.
        value, size = q.raw / normal.divisor, normal.size
        above = normal.back(above)
    bounds.add(q, above, rounding)
    shape = value.shape[0], *spatial
    error = rounding * size + 1e-44 * (not x.exact)
    # Beyond fp32 signed powers have any sum.
    beyond = q.size.isinf()
    beyond = beyond.any(1, keepdim=True) if normalized else beyond
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

    def leave_open(self, size: Tensor) -> None:
        """Anything may be the gradient where these, or powers of them, are not finite."""
        self.total = self.total + (torch.where(size < 1e5, 0.0, math.inf) * size).sum()


class Value(NamedTuple):
    """A result, and how far it may be off."""

    value: Tensor
    error: Tensor


def pair_loss(
    student: Map,
    teacher: Map,
    form: str,
    eps: float,
    eps_mode: str,
    factor: Tensor,
    bounds: Bounds | None,
) -> Value:
    """The loss of each sample, (B,). ``factor``: what it counts in what is differentiated."""
    s, t = normalize(student, eps, eps_mode), normalize(teacher, eps, eps_mode)
    exact = student.exact and teacher.exact
    rounding = MAP_ROUNDING[exact]
    difference = s.q - t.q
    positions = difference.shape[1]
    distance = torch.linalg.vector_norm(difference, dim=1)
    with torch.no_grad():
        size = s.size + t.size
        off = torch.linalg.vector_norm(size, dim=1) * rounding
    if form == "code":
        loss = difference.pow(2).mean(1)
        error = (2 * distance.detach() * off + off * off) / positions
        slope = 2 * size / positions
    else:
        loss, error = distance, off
        least = 1e-16 * torch.linalg.vector_norm(size, dim=1) + 1e-300
        slope = size / torch.maximum(distance.detach(), least).unsqueeze(1)
    if bounds is not None:
        with torch.no_grad():
            far = factor.abs().unsqueeze(1)
        bounds.add(student, s.back(slope) * far, rounding)
        bounds.add(teacher, t.back(slope) * far, rounding)
    return Value(loss, error)


def resized_mask(mask: Tensor, size: Sequence[int]) -> Tensor:
    wide = mask.double()
    if list(mask.shape[1:]) != list(size):
        wide = F.interpolate(wide.unsqueeze(1), size=list(size), mode="area").squeeze(1)
    return wide.flatten(1)


class Options(NamedTuple):
    """The options of ``at_loss`` and ``map_loss``, with their documented defaults."""

    p: float = 2.0
    collapse: str = "mean"
    form: str = "code"
    weights: Sequence[float] | None = None
    reduction: str = "sum"
    resize: str | None = None
    attend: str = "spatial"
    channel_dim: Any = 1
    skip_tokens: Any = 0
    map_size: Any = None
    mask: Any = None
    sample_weights: Tensor | None = None
    absolute: bool = True
    eps: float = 1e-12
    eps_mode: str = "max"


def loss_of_maps(
    maps: list[tuple[Map, Map, Sequence[int]]],
    options: Options,
    upstream: Tensor | None,
    bounds: Bounds | None,
) -> Value:
    """The loss of pairs of maps of one size each."""
    o, losses = options, []
    for i, (s, t, size) in enumerate(maps):
        if o.mask is not None:
            mask = resized_mask(o.mask[i] if isinstance(o.mask, list) else o.mask, size)
            s, t = change(s, lambda v, m=mask: v * m), change(t, lambda v, m=mask: v * m)
        batch = s.raw.shape[0]
        factor = torch.full((batch,), o.weights[i] if o.weights else 1.0, dtype=torch.float64)
        if o.sample_weights is not None:
            factor = factor * o.sample_weights.double()
        if o.reduction != "sample":
            factor = factor / batch
        above = torch.ones(()).double() if upstream is None else upstream.double()
        above = above if o.reduction == "sum" else above[i] if above.dim() else above
        found = pair_loss(s, t, o.form, o.eps, o.eps_mode, factor * above, bounds)
        error = found.error + (1e-14 if s.exact and t.exact else 3e-7) * found.value.detach()
        losses.append(Value(found.value * factor, error * factor.abs()))
    if o.reduction == "sample":
        return Value(*(torch.stack(part) for part in zip(*losses, strict=True)))
    values = torch.stack([each.value.sum() for each in losses])
    parts = torch.stack([each.error.sum() for each in losses])
    return Value(values.sum(), parts.sum()) if o.reduction == "sum" else Value(values, parts)


def at_loss(
    students: Sequence[Sided],
    teachers: Sequence[Sided],
    options: Options,
    upstream: Tensor | None = None,
    bounds: Bounds | None = None,
) -> Value:
    """The loss of features; ``upstream`` is what its gradient will be."""
    o = options
    dims, skips = both(o.channel_dim), both(o.skip_tokens)
    nested = o.map_size is not None and not isinstance(o.map_size[0], int)
    sizes = o.map_size if nested or o.map_size is None else (o.map_size, o.map_size)
    sizes = sizes or (None, None)
    s_placed = [place(x, dims[0], skips[0], sizes[0], bounds) for x in students]
    t_placed = [place(x, dims[1], skips[1], sizes[1], bounds) for x in teachers]
    total = None
    for attend in ("spatial", "channel"):
        if o.attend not in (attend, "both"):
            continue
        maps = [pair_maps(s, t, o, attend) for s, t in zip(s_placed, t_placed, strict=True)]
        found = loss_of_maps(maps, o, upstream, bounds)
        total = (
            found if total is None else Value(total.value + found.value, total.error + found.error)
        )
    assert total is not None
    return total


def pair_maps(s: Sided, t: Sided, options: Options, attend: str) -> tuple[Map, Map, Sequence[int]]:
    o = options
    if attend == "channel":
        s, t = s.apply(channels_as_positions), t.apply(channels_as_positions)
    given, target = list(t.value.shape[2:]), list(s.value.shape[2:])
    if o.resize == "features" and attend == "spatial":
        target = given = [min(a, b) for a, b in zip(target, given, strict=True)]
        s, t = pool(s, target), pool(t, target)
    maps = [map_of(x, o.p, o.collapse, o.absolute) for x in (s, t)]
    return maps[0], interpolate(maps[1], given, target), target


def channels_as_positions(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


# ---- distillation --------------------------------------------------------------------------------


class Logits(NamedTuple):
    """Hinton's loss, and the gradients of both sides with their errors."""

    loss: Value
    student: Value
    teacher: Value


def kd_loss(
    s: Tensor,
    t: Tensor,
    labels: Tensor | None = None,
    T: float = 4.0,  # noqa: N803
    alpha: float = 0.9,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> Logits:
    wide = torch.float64 in (s.dtype, t.dtype)
    unit = 2.0 ** (-53 if wide else -24)
    s, t = s.double(), t.double()
    batch, classes = s.shape
    zero, zeros = s.new_zeros(batch), torch.zeros_like(s)
    kl, pull, push, far, near, more = zero, zeros, zeros, zeros, zeros, zero
    if alpha > 0:
        log_p, log_q = F.log_softmax(s / T, 1), F.log_softmax(t / T, 1)
        p, q = log_p.exp(), log_q.exp()
        d = torch.where(q == 0, 0.0, log_q - log_p)
        kl = (q * d).sum(1)
        scale = alpha * T / batch
        push, pull = scale * (p - q), scale * q * (d - kl[:, None])
        # Of a class nothing is known beyond the rounding of its logit over T, and of its logarithm.
        lost = 1 + torch.maximum(finite(s), finite(t)) / T
        far = scale * q * (d.abs() + kl.abs()[:, None] + lost * (1 + d.abs()))
        near = scale * (p + q) * lost
        more = alpha * T * T / batch * (1 + (p - q).abs().sum(1) * lost[:, 0])
        kl = alpha * T * T / batch * kl
    ce, lost_rows = zero, zero
    if labels is not None and alpha < 1:
        counted = labels != ignore_index
        valid = counted.double().sum()
        log_p = F.log_softmax(s, 1)
        target = torch.full_like(s, label_smoothing / classes)
        index = torch.where(counted, labels, 0)
        target[torch.arange(batch), index] += 1 - label_smoothing
        share = torch.where(counted, (1 - alpha) / valid, 0.0)
        each = torch.where(target == 0, 0.0, -target * log_p).sum(1)
        ce = torch.where(counted, each, 0.0) * (1 - alpha) / valid
        push = push + torch.where(counted[:, None], log_p.exp() - target, 0.0) * share[:, None]
        known = (log_p.exp() + target) * (1 + finite(s)) * share[:, None]
        near = near + torch.where(counted[:, None], known, 0.0)
        more = more + torch.where(counted, share, 0.0)
        # Torch's cross-entropy has NaN for one that is ignored, too.
        lost_rows = torch.where(log_p.isnan().any(1), math.nan, 0.0)
    loss = kl.sum() + ce.sum()
    error = 16 * unit * (kl.abs() + ce.abs() + more).sum() + 1e-30
    # A row without a finite loss may have any gradient.
    rows = torch.where((kl + ce + lost_rows).isfinite(), 0.0, math.inf)[:, None]

    def bounded(g: Tensor, more: Tensor) -> Value:
        most = torch.maximum(g.abs(), more).amax(1, keepdim=True)
        return Value(g, (16 * unit * most + 1e-30).nan_to_num(0.0).add(rows).expand(g.shape))

    return Logits(Value(loss, error), bounded(push, near), bounded(pull, far))


def finite(x: Tensor) -> Tensor:
    """The largest absolute value of each row that is a number, (B, 1)."""
    return x.abs().nan_to_num(0.0, 0.0).amax(1, keepdim=True)


def distance_loss(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    form: str = "mean",
    weights: Sequence[float] | None = None,
    reduction: str = "sum",
) -> Value:
    """``features_loss`` and ``gradient_at_loss``, differentiable."""
    losses, beyond = [], False
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        square = (x - y).flatten(1).pow(2).sum(1)
        beyond |= bool(square.sum() > torch.finfo(torch.float32).max)
        each = torch.linalg.vector_norm((x - y).flatten(1), dim=1) if form == "paper" else square
        share = x[0].numel() if form in ("mean", "code") else 1
        losses.append(each.mean() / share * (weights[i] if weights else 1.0))
    value = torch.stack(losses)
    error = 1e-6 * value.detach().abs()
    if reduction == "sum":
        value, error = value.sum(), error.sum()
    # A sum of squares that fp32 does not hold may be inf, whatever it is divided by.
    return Value(value, torch.where(value.isfinite(), torch.inf, error) if beyond else error)


# ---- comparisons ---------------------------------------------------------------------------------


class Reference:
    """Leaves in float64, and their absolute values, in the place of those of a call."""

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        self.given = leaves
        self.doubles = [x.detach().double().requires_grad_() for x in leaves]
        self.sizes = [x.detach().abs().requires_grad_() for x in self.doubles]
        self.bounds = Bounds()

    def sided(self, make: Any) -> tuple[list[Sided], list[Sided]]:
        """Both sides' features, as ``make`` finds them in leaves."""
        sides = zip(make(self.given), make(self.doubles), make(self.sizes), strict=True)
        students, teachers = (
            [Sided(v, a, x.dtype == torch.float64) for x, v, a in zip(*each, strict=True)]
            for each in sides
        )
        return students, teachers


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
