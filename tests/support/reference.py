"""The float64 reference: the formulas as people write them, nothing of at_fused in them."""

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

# Options that take the way through maps, in place of one operator for all.
THROUGH_MAPS: dict[str, dict[str, Any]] = {
    "max": {"collapse": "max"},
    "maps": {"resize": "maps", "form": "paper"},
    "features": {"resize": "features", "p": 3.0},
    "signed": {"absolute": False, "p": 3.0},
    "signed features": {"absolute": False, "p": 3.0, "resize": "features"},
    "added": {"eps_mode": "add", "eps": 0.1, "resize": "maps"},
    "sample": {"reduction": "sample", "resize": "features", "collapse": "max"},
}


def popular_at(x: Tensor) -> Tensor:
    return F.normalize(x.pow(2).mean(1).view(x.size(0), -1))


def popular_at_loss(x: Tensor, y: Tensor) -> Tensor:
    """The lines that this package replaces."""
    return (popular_at(x) - popular_at(y)).pow(2).mean()


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
        """channel_dim, skip_tokens and map_size of the students, and of the teachers."""
        size = self.map_size
        sizes = (size, size) if size is None or isinstance(size[0], int) else size
        return [*zip(both(self.channel_dim), both(self.skip_tokens), sizes, strict=True)]

    def mask_of(self, pair: int) -> Tensor | None:
        return self.mask[pair] if isinstance(self.mask, (list, tuple)) else self.mask


def both(value: Any) -> tuple[Any, Any]:
    return value if isinstance(value, tuple) else (value, value)


def attended(x: Tensor, layout: tuple[int, int, Sequence[int] | None], attend: str) -> Tensor:
    """(B, C, *spatial), or for channel attention (B, positions, C)."""
    channel_dim, skip, map_size = layout
    if channel_dim == -1:
        x = (x[:, skip:] if x.dim() == 3 else x).movedim(-1, 1)
        x = x.unflatten(2, list(map_size)) if map_size else x
    return x.flatten(2).transpose(1, 2) if attend == "channel" else x


def attended_pairs(s: Tensor, t: Tensor, options: Options) -> Iterator[tuple[Tensor, Tensor]]:
    """The features whose maps are compared: of spatial attention, channel attention or both."""
    for attend in ("spatial", "channel"):
        if options.attend not in (attend, "both"):
            continue
        sides = zip((s, t), options.layouts(), strict=True)
        x, y = (attended(z, layout, attend) for z, layout in sides)
        if options.resize == "features" and attend == "spatial":
            least = [min(sizes) for sizes in zip(x.shape[2:], y.shape[2:], strict=True)]
            x, y = (z if list(z.shape[2:]) == least else POOL[z.dim()](z, least) for z in (x, y))
        yield x, y


def first_of_largest(x: Tensor) -> Tensor:
    """The channel whose |x| is largest, the first of several: (B, 1, *spatial)."""
    a = x.detach().abs()
    number = torch.arange(a.shape[1], device=a.device).view(1, -1, *[1] * (a.dim() - 2))
    winners = (a == a.amax(1, keepdim=True)) | a.isnan()
    return torch.where(winners, number, a.shape[1]).amin(1, keepdim=True)


def raw_map(x: Tensor, p: float = 2.0, collapse: str = "mean", absolute: bool = True) -> Tensor:
    if collapse == "max":
        return x.gather(1, first_of_largest(x)).squeeze(1).abs().pow(p)
    powered = x.abs().pow(p) if absolute else x.pow(p)
    return powered.mean(1) if collapse == "mean" else powered.sum(1)


def interpolated(q: Tensor, size: Sequence[int]) -> Tensor:
    if list(q.shape[1:]) == list(size):
        return q
    return F.interpolate(q[:, None], size=list(size), mode=MODE[len(size)])[:, 0]


def masked(q: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return q
    return q * F.interpolate(mask.double()[:, None], size=q.shape[1:], mode="area")[:, 0]


def divisor(q: Tensor, eps: float, eps_mode: str) -> Tensor:
    norm = torch.linalg.vector_norm(q, dim=1, keepdim=True)
    return norm.clamp(min=eps) if eps_mode == "max" else norm + eps


def normalized(q: Tensor, eps: float = 1e-12, eps_mode: str = "max") -> Tensor:
    """(B, N); NaN where the norm is no finite number."""
    q = q.flatten(1)
    by = divisor(q, eps, eps_mode)
    return torch.where(by.isfinite(), q / by, math.nan)


def compare(difference: Tensor, form: str) -> Tensor:
    if form == "code":
        return difference.square().mean(1)
    return torch.linalg.vector_norm(difference, dim=1)


def loss_of_samples(s: Tensor, t: Tensor, options: Options, pair: int = 0) -> Tensor:
    """The loss of each sample of a pair."""
    o, losses = options, []
    for x, y in attended_pairs(s, t, o):
        qs, qt = (raw_map(z, o.p, o.collapse, o.absolute) for z in (x, y))
        qs, qt = (
            normalized(masked(q, o.mask_of(pair)), o.eps, o.eps_mode)
            for q in (qs, interpolated(qt, qs.shape[1:]))
        )
        losses.append(compare(qs - qt, o.form))
    return sum(losses[1:], losses[0])


def reduced(losses: Sequence[Tensor], options: Options) -> Tensor:
    """The losses of pairs' samples, weighted and reduced."""
    weights = options.weights or [1.0] * len(losses)
    losses = [loss * weight for loss, weight in zip(losses, weights, strict=True)]
    if options.sample_weights is not None:
        losses = [loss * options.sample_weights.double() for loss in losses]
    if options.reduction == "sample":
        return torch.stack(losses)
    means = torch.stack([loss.mean() for loss in losses])
    return means.sum() if options.reduction == "sum" else means


def losses_of_pairs(
    students: Sequence[Tensor], teachers: Sequence[Tensor], options: Options
) -> list[Tensor]:
    pairs = enumerate(zip(students, teachers, strict=True))
    return [loss_of_samples(s, t, options, i) for i, (s, t) in pairs]


def expected_loss(s: Tensor, t: Tensor, **options: Any) -> Tensor:
    """The loss of each sample of a pair."""
    return loss_of_samples(s, t, Options(**options))


def reference_loss(
    students: Sequence[Tensor], teachers: Sequence[Tensor], **options: Any
) -> Tensor:
    """What ``at_loss`` returns, differentiable."""
    known = Options(**options)
    return reduced(losses_of_pairs(students, teachers, known), known)


def least_distance(students: Sequence[Tensor], teachers: Sequence[Tensor], **options: Any) -> float:
    """The least ||qs[b] - qt[b]|| of all pairs and samples, of those whose maps differ."""
    known = Options(**options | {"form": "paper"})
    distances = torch.cat(losses_of_pairs(students, teachers, known)).detach()
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
    """The arguments that the operators at_loss and at_value_and_grad have in common."""
    lists = [list(each) for each in (student, teacher, masks, weights, skip_tokens)]
    return *lists, p, collapse, form, reduction, eps_mode, eps


# ---- comparisons ---------------------------------------------------------------------------------

# Largest error allowed in a gradient, as a share of its largest element: the rounding of the
# gradient's own dtype, or of fp32 sums.
GRADIENT_TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2**-10,
    torch.bfloat16: 2**-7,
}

# Largest relative error allowed in a loss, of fp32 sums and where all is fp64.
VALUE_TOLERANCE = {False: 1e-5, True: 1e-11}
# What a normalised map is known to, and so the difference of two: where they are nearly the same,
# loss and gradient are known to this over that difference.
ROUNDING, EXACT_ROUNDING = 3e-7, 1e-14


class Precision(NamedTuple):
    """What rounding leaves of a call's loss and gradients."""

    exact: bool  # all features are fp64
    steps: int  # of rounding
    blur: float  # the share that is known of the least difference of two maps
    near: float  # a loss that is next to nothing

    @classmethod
    def of(
        cls,
        given: Sequence[Tensor],
        students: Sequence[Tensor],
        teachers: Sequence[Tensor],
        options: dict[str, Any],
    ) -> Precision:
        """``given``: the features as they are; students and teachers are in fp64."""
        known, exact = Options(**options), all(x.dtype == torch.float64 for x in given)
        rounding = EXACT_ROUNDING if exact else ROUNDING
        blur = rounding / max(least_distance(students, teachers, **options), rounding)
        near = 3 * (rounding if known.form == "paper" else rounding**2)
        # Plain PyTorch pools features and takes signed powers: each step is rounded.
        ours = known.resize != "features" and known.absolute
        return cls(exact, 1 if ours else 2, blur, near)

    def assert_value(self, loss: Tensor, expected: Tensor) -> None:
        assert loss.shape == expected.shape
        tolerance = max(self.steps * VALUE_TOLERANCE[self.exact], 2 * self.blur)
        torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=self.near)

    def assert_gradient(self, g: Tensor, right: Tensor, scale: float) -> None:
        assert torch.isfinite(g).all()
        if self.blur > 0.1:
            return  # maps that are the same but for rounding: any direction is right
        tolerance = max(GRADIENT_TOLERANCE[g.dtype], 0 if self.exact else 1e-5, 4 * self.blur)
        # fp16 has nothing between 0 and 2^-24.
        smallest = 2**-25 if g.dtype == torch.float16 else 0.0
        bound = tolerance * self.steps * right.abs().max() + 1e-12 * scale + smallest
        error = (g.double() - right).abs().max()
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
    """Loss and gradients of at_fused against the reference in float64.

    ``scale`` multiplies the loss before the backward pass, as loss scaling does, so that fp16
    gradients are not lost. The features are used as they are, strides and all; ``any_strides``:
    a gradient may have its own.
    """
    n, known = len(students), Options(**options)
    leaves = [x.detach().requires_grad_(student_grad) for x in students]
    leaves += [x.detach().requires_grad_(teacher_grad) for x in teachers]
    doubles = [x.detach().double().requires_grad_(x.requires_grad) for x in leaves]
    wide = any(x.dtype == torch.float64 for x in leaves)
    precision = Precision.of(leaves, doubles[:n], doubles[n:], options)

    loss = at_fused.at_loss(leaves[:n], leaves[n:], **options)
    expected = reference_loss(doubles[:n], doubles[n:], **options)
    assert loss.dtype == (torch.float64 if wide else torch.float32)
    precision.assert_value(loss, expected)

    def compare_gradients(
        which: Sequence[int], found: Sequence[Tensor], right: Sequence[Tensor], laid_out: bool
    ) -> None:
        for i, g, r in zip(which, found, right, strict=True):
            x = leaves[i]
            channel_dim, skip, _ = known.layouts()[i >= n]
            assert (g.dtype, g.shape) == (x.dtype, x.shape)
            assert g.stride() == torch.empty_like(x).stride() or not laid_out
            if channel_dim == -1 and x.dim() == 3:
                assert not g[:, :skip].any()
            precision.assert_gradient(g, r, scale)

    wanted = [i for i, x in enumerate(leaves) if x.requires_grad]
    assert loss.requires_grad == bool(wanted)
    if wanted:
        upstream = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape) * scale
        found = torch.autograd.grad(loss, [leaves[i] for i in wanted], upstream)
        asked = [doubles[i] for i in wanted]
        right = torch.autograd.grad(expected, asked, upstream.double(), retain_graph=True)
        compare_gradients(wanted, found, right, precision.steps == 1 and not any_strides)
    if student_grad:
        value, found = at_fused.at_value_and_grad(leaves[:n], leaves[n:], scale=scale, **options)
        assert isinstance(found, list)
        # The same sums, perhaps in another order.
        again = max(1e-12 if precision.exact else 1e-6, 2 * precision.blur)
        torch.testing.assert_close(value, loss.detach(), rtol=again, atol=precision.near)
        right = torch.autograd.grad(expected.sum() * scale, doubles[:n])
        compare_gradients(range(n), found, right, True)
