"""The formulas in float64, written without code from at_fused, and comparisons with them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from layouts import features
from torch import Tensor

import at_fused

feature = partial(features, dtype=torch.float64)

# Options without a fused path: at_loss computes maps first.
UNFUSED: dict[str, dict[str, Any]] = {
    "max": {"collapse": "max"},
    "maps": {"resize": "maps", "form": "paper"},
    "features": {"resize": "features", "p": 3.0},
    "signed": {"absolute": False, "p": 3.0},
    "signed features": {"absolute": False, "p": 3.0, "resize": "features"},
    "added": {"eps_mode": "add", "eps": 0.1, "resize": "maps"},
    "sample": {"reduction": "sample", "resize": "features", "collapse": "max"},
}


def eager_at(x: Tensor) -> Tensor:
    return F.normalize(x.pow(2).mean(1).view(x.size(0), -1))


def eager_at_loss(x: Tensor, y: Tensor) -> Tensor:
    """Compute the AT loss in eager PyTorch, as the code that at_fused replaces does."""
    return (eager_at(x) - eager_at(y)).pow(2).mean()


# ---- formulas ------------------------------------------------------------------------------------

POOL = {3: F.adaptive_avg_pool1d, 4: F.adaptive_avg_pool2d, 5: F.adaptive_avg_pool3d}
MODE = {1: "linear", 2: "bilinear", 3: "trilinear"}


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

    def layouts(self) -> list[tuple[int, int, Sequence[int] | None]]:
        """Return channel_dim, skip_tokens and map_size of students and of teachers."""
        size = self.map_size
        sizes = (size, size) if size is None or isinstance(size[0], int) else size
        return [*zip(two_sides(self.channel_dim), two_sides(self.skip_tokens), sizes, strict=True)]

    def pair_mask(self, pair: int) -> Tensor | None:
        return self.mask[pair] if isinstance(self.mask, (list, tuple)) else self.mask


def two_sides(value: Any) -> tuple[Any, Any]:
    return value if isinstance(value, tuple) else (value, value)


def to_channels_first(
    x: Tensor, layout: tuple[int, int, Sequence[int] | None], attend: str
) -> Tensor:
    """Return x as (B, C, *spatial), or for channel attention as (B, positions, C)."""
    channel_dim, skip, map_size = layout
    if channel_dim == -1:
        x = (x[:, skip:] if x.dim() == 3 else x).movedim(-1, 1)
        x = x.unflatten(2, list(map_size)) if map_size else x
    return x.flatten(2).transpose(1, 2) if attend == "channel" else x


def features_of_maps(s: Tensor, t: Tensor, options: Options) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the features of each map: of spatial attention, channel attention or both."""
    for attend in ("spatial", "channel"):
        if options.attend not in (attend, "both"):
            continue
        sides = zip((s, t), options.layouts(), strict=True)
        x, y = (to_channels_first(z, layout, attend) for z, layout in sides)
        if options.resize == "features" and attend == "spatial":
            size = [min(sizes) for sizes in zip(x.shape[2:], y.shape[2:], strict=True)]
            x, y = (z if list(z.shape[2:]) == size else POOL[z.dim()](z, size) for z in (x, y))
        yield x, y


def first_of_largest(x: Tensor) -> Tensor:
    """Return the first channel with the largest |x|, or with NaN: (B, 1, *spatial)."""
    a = x.detach().abs()
    number = torch.arange(a.shape[1], device=a.device).view(1, -1, *[1] * (a.dim() - 2))
    is_largest = (a == a.amax(1, keepdim=True)) | a.isnan()
    return torch.where(is_largest, number, a.shape[1]).amin(1, keepdim=True)


def raw_map(x: Tensor, p: float = 2.0, collapse: str = "mean", absolute: bool = True) -> Tensor:
    if collapse == "max":
        return x.gather(1, first_of_largest(x)).squeeze(1).abs().pow(p)
    powered = x.abs().pow(p) if absolute else x.pow(p)
    return powered.mean(1) if collapse == "mean" else powered.sum(1)


def interpolate(q: Tensor, size: Sequence[int]) -> Tensor:
    if list(q.shape[1:]) == list(size):
        return q
    return F.interpolate(q[:, None], size=list(size), mode=MODE[len(size)])[:, 0]


def apply_mask(q: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return q
    return q * F.interpolate(mask.double()[:, None], size=q.shape[1:], mode="area")[:, 0]


def divisor(q: Tensor, eps: float, eps_mode: str) -> Tensor:
    norm = torch.linalg.vector_norm(q, dim=1, keepdim=True)
    return norm.clamp(min=eps) if eps_mode == "max" else norm + eps


def normalize(q: Tensor, eps: float = 1e-12, eps_mode: str = "max") -> Tensor:
    """Return maps (B, N) divided by their norms; NaN if a norm is not finite."""
    q = q.flatten(1)
    by = divisor(q, eps, eps_mode)
    return torch.where(by.isfinite(), q / by, math.nan)


def compare(difference: Tensor, form: str) -> Tensor:
    if form == "code":
        return difference.square().mean(1)
    return torch.linalg.vector_norm(difference, dim=1)


def sample_losses(s: Tensor, t: Tensor, options: Options, pair: int = 0) -> Tensor:
    """Compute the loss of each sample of a pair."""
    o, losses = options, []
    for x, y in features_of_maps(s, t, o):
        qs, qt = (raw_map(z, o.p, o.collapse, o.absolute) for z in (x, y))
        qs, qt = (
            normalize(apply_mask(q, o.pair_mask(pair)), o.eps, o.eps_mode)
            for q in (qs, interpolate(qt, qs.shape[1:]))
        )
        losses.append(compare(qs - qt, o.form))
    return sum(losses[1:], losses[0])


def reduce(losses: Sequence[Tensor], options: Options) -> Tensor:
    """Apply the weights and the reduction to the sample losses of all pairs."""
    weights = options.weights or [1.0] * len(losses)
    losses = [loss * weight for loss, weight in zip(losses, weights, strict=True)]
    if options.sample_weights is not None:
        losses = [loss * options.sample_weights.double() for loss in losses]
    if options.reduction == "sample":
        return torch.stack(losses)
    means = torch.stack([loss.mean() for loss in losses])
    return means.sum() if options.reduction == "sum" else means


def pair_losses(
    students: Sequence[Tensor], teachers: Sequence[Tensor], options: Options
) -> list[Tensor]:
    pairs = enumerate(zip(students, teachers, strict=True))
    return [sample_losses(s, t, options, i) for i, (s, t) in pairs]


def expected_loss(s: Tensor, t: Tensor, **options: Any) -> Tensor:
    """Compute the loss of each sample of a pair with options of ``at_loss``."""
    return sample_losses(s, t, Options(**options))


def reference_loss(
    students: Sequence[Tensor], teachers: Sequence[Tensor], **options: Any
) -> Tensor:
    """Compute the differentiable result of ``at_loss``."""
    all_options = Options(**options)
    return reduce(pair_losses(students, teachers, all_options), all_options)


def least_distance(students: Sequence[Tensor], teachers: Sequence[Tensor], **options: Any) -> float:
    """Return the least nonzero ||qs[b] - qt[b]|| over pairs and samples, or 0."""
    paper = Options(**options | {"form": "paper"})
    distances = torch.cat(pair_losses(students, teachers, paper)).detach()
    distances = distances[distances > 0]
    return float(distances.min()) if len(distances) else 0.0


def loss_arguments(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    masks: Sequence[Tensor] = (),
    weights: Sequence[float] = (),
    skip_tokens: Sequence[int] = (),
    p: float = 2.0,
    collapse: str = "mean",
    form: str = "code",
    reduction: str = "sum",
    eps_mode: str = "max",
    eps: float = 1e-12,
) -> tuple[Any, ...]:
    """Return the arguments shared by the operators at_loss and at_value_and_grad."""
    lists = [list(x) for x in (student, teacher, masks, weights, skip_tokens)]
    return *lists, p, collapse, form, reduction, eps_mode, eps


# ---- comparisons ---------------------------------------------------------------------------------

# Largest error allowed in a gradient relative to its largest element: rounding to its dtype, or of
# fp32 sums.
GRADIENT_TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2**-10,
    torch.bfloat16: 2**-7,
}

# Largest relative error allowed in a loss. True: all features are fp64.
VALUE_TOLERANCE = {False: 1e-5, True: 1e-11}
# Rounding error of normalised maps, and so of their difference. If two maps nearly agree, loss and
# gradient have this error divided by the maps' distance.
ROUNDING, EXACT_ROUNDING = 3e-7, 1e-14


class Precision(NamedTuple):
    """The error allowed in a call's loss and gradients."""

    exact: bool  # all features are fp64
    roundings: int
    relative: float  # rounding error relative to the least distance of two maps
    absolute: float  # absolute error allowed in a loss

    @classmethod
    def of(
        cls,
        leaves: Sequence[Tensor],
        students: Sequence[Tensor],
        teachers: Sequence[Tensor],
        options: dict[str, Any],
    ) -> Precision:
        """Build it from all features in their dtypes, and students and teachers in fp64."""
        all_options, exact = Options(**options), all(x.dtype == torch.float64 for x in leaves)
        rounding = EXACT_ROUNDING if exact else ROUNDING
        relative = rounding / max(least_distance(students, teachers, **options), rounding)
        absolute = 3 * (rounding if all_options.form == "paper" else rounding**2)
        # at_fused pools features and computes signed powers in PyTorch: an additional rounding.
        fused = all_options.resize != "features" and all_options.absolute
        return cls(exact, 1 if fused else 2, relative, absolute)

    def assert_value(self, loss: Tensor, expected: Tensor) -> None:
        assert loss.shape == expected.shape
        tolerance = max(self.roundings * VALUE_TOLERANCE[self.exact], 2 * self.relative)
        torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=self.absolute)

    def assert_gradient(self, g: Tensor, expected: Tensor, scale: float) -> None:
        assert torch.isfinite(g).all()
        if self.relative > 0.1:
            return  # the maps differ only by rounding, so the gradient's direction is undefined
        tolerance = max(GRADIENT_TOLERANCE[g.dtype], 0 if self.exact else 1e-5, 4 * self.relative)
        # Half of fp16's least positive number, 2^-24.
        smallest = 2**-25 if g.dtype == torch.float16 else 0.0
        bound = tolerance * self.roundings * expected.abs().max() + 1e-12 * scale + smallest
        error = (g.double() - expected).abs().max()
        assert error <= bound, f"error {error:.3g}, allowed {bound:.3g}"


def assert_matches_reference(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    *,
    student_grad: bool = True,
    teacher_grad: bool = True,
    scale: float = 2.0**8,
    any_strides: bool = False,
    **options: Any,
) -> None:
    """Compare loss and gradients of at_fused with the reference in float64.

    The features keep their strides. ``scale`` multiplies the loss before the backward pass, so that
    fp16 gradients do not underflow. ``any_strides``: a gradient may have other strides than
    ``torch.empty_like``.
    """
    n, layouts = len(students), Options(**options).layouts()
    leaves = [x.detach().requires_grad_(student_grad) for x in students]
    leaves += [x.detach().requires_grad_(teacher_grad) for x in teachers]
    doubles = [x.detach().double().requires_grad_(x.requires_grad) for x in leaves]
    any_fp64 = any(x.dtype == torch.float64 for x in leaves)
    precision = Precision.of(leaves, doubles[:n], doubles[n:], options)

    loss = at_fused.at_loss(leaves[:n], leaves[n:], **options)
    expected = reference_loss(doubles[:n], doubles[n:], **options)
    assert loss.dtype == (torch.float64 if any_fp64 else torch.float32)
    precision.assert_value(loss, expected)

    def compare_gradients(
        numbers: Sequence[int], actual: Sequence[Tensor], expected: Sequence[Tensor], strides: bool
    ) -> None:
        for i, g, r in zip(numbers, actual, expected, strict=True):
            x = leaves[i]
            channel_dim, skip, _ = layouts[i >= n]
            assert (g.dtype, g.shape) == (x.dtype, x.shape)
            assert g.stride() == torch.empty_like(x).stride() or not strides
            if channel_dim == -1 and x.dim() == 3:
                assert not g[:, :skip].any()
            precision.assert_gradient(g, r, scale)

    numbers = [i for i, x in enumerate(leaves) if x.requires_grad]
    assert loss.requires_grad == bool(numbers)
    if numbers:
        upstream = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape) * scale
        actual = torch.autograd.grad(loss, [leaves[i] for i in numbers], upstream)
        inputs = [doubles[i] for i in numbers]
        gradients = torch.autograd.grad(expected, inputs, upstream.double(), retain_graph=True)
        compare_gradients(numbers, actual, gradients, precision.roundings == 1 and not any_strides)
    if student_grad:
        value, actual = at_fused.at_value_and_grad(leaves[:n], leaves[n:], scale=scale, **options)
        assert isinstance(actual, list)
        # The order of the sums may differ.
        rtol = max(1e-12 if precision.exact else 1e-6, 2 * precision.relative)
        torch.testing.assert_close(value, loss.detach(), rtol=rtol, atol=precision.absolute)
        gradients = torch.autograd.grad(expected.sum() * scale, doubles[:n])
        compare_gradients(range(n), actual, gradients, True)
