"""The float64 reference: the formulas as people write them, nothing of at_fused in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import at_fused


def popular_at(x: Tensor) -> Tensor:
    return F.normalize(x.pow(2).mean(1).view(x.size(0), -1))


def popular_at_loss(x: Tensor, y: Tensor) -> Tensor:
    """The lines that this package replaces."""
    return (popular_at(x) - popular_at(y)).pow(2).mean()


POOL = {3: F.adaptive_avg_pool1d, 4: F.adaptive_avg_pool2d, 5: F.adaptive_avg_pool3d}
MODE = {3: "linear", 4: "bilinear", 5: "trilinear"}


def raw_map(x: Tensor, p: float = 2.0, collapse: str = "mean", absolute: bool = True) -> Tensor:
    powered = x.abs().pow(p) if absolute else x.pow(int(p))
    if collapse == "max":
        return powered.max(1).values  # its gradient goes to one of several, that of amax to all
    return powered.mean(1) if collapse == "mean" else powered.sum(1)


def normalized(q: Tensor, eps: float = 1e-12, eps_mode: str = "max") -> Tensor:
    q = q.flatten(1)
    norm = q.norm(dim=1, keepdim=True)
    return q / (norm.clamp(min=eps) if eps_mode == "max" else norm + eps)


def spatial_loss(
    s: Tensor,
    t: Tensor,
    *,
    p: float = 2.0,
    collapse: str = "mean",
    form: str = "code",
    resize: str | None = None,
    mask: Tensor | None = None,
    absolute: bool = True,
    eps: float = 1e-12,
    eps_mode: str = "max",
) -> Tensor:
    """The loss of each sample of a pair."""
    if resize == "features":
        least = [min(sizes) for sizes in zip(s.shape[2:], t.shape[2:], strict=True)]
        s, t = (x if list(x.shape[2:]) == least else POOL[x.dim()](x, least) for x in (s, t))
    qs, qt = (raw_map(x, p, collapse, absolute) for x in (s, t))
    if resize == "maps" and qs.shape != qt.shape:
        qt = F.interpolate(qt[:, None], size=qs.shape[1:], mode=MODE[s.dim()])[:, 0]
    if mask is not None:
        factor = F.interpolate(mask.double()[:, None], size=qs.shape[1:], mode="area")[:, 0]
        qs, qt = qs * factor, qt * factor
    d = normalized(qs, eps, eps_mode) - normalized(qt, eps, eps_mode)
    return d.square().mean(1) if form == "code" else torch.linalg.vector_norm(d, dim=1)


def expected_loss(s: Tensor, t: Tensor, *, attend: str = "spatial", **options: Any) -> Tensor:
    loss = spatial_loss(s, t, **options) if attend != "channel" else torch.zeros(len(s)).double()
    if attend != "spatial":
        options.pop("resize", None)
        views = (x.flatten(2).transpose(1, 2) for x in (s, t))
        loss = loss + spatial_loss(*views, **options)
    return loss


def losses_of_pairs(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    *,
    channel_dim: int = 1,
    skip_tokens: tuple[int, int] = (0, 0),
    mask: Sequence[Tensor] | None = None,
    **options: Any,
) -> list[Tensor]:
    """The loss of each sample of each pair."""

    def placed(x: Tensor, skip: int) -> Tensor:
        return (x[:, skip:] if skip else x).movedim(-1, 1) if channel_dim == -1 else x

    return [
        expected_loss(
            placed(s, skip_tokens[0]),
            placed(t, skip_tokens[1]),
            mask=mask[i] if mask else None,
            **options,
        )
        for i, (s, t) in enumerate(zip(students, teachers, strict=True))
    ]


def reference_loss(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    sample_weights: Tensor | None = None,
    reduction: str = "sum",
    **options: Any,
) -> Tensor:
    losses = losses_of_pairs(students, teachers, **options)
    losses = [loss * (weights[i] if weights else 1.0) for i, loss in enumerate(losses)]
    if sample_weights is not None:
        losses = [loss * sample_weights.double() for loss in losses]
    if reduction == "sample":
        return torch.stack(losses)
    means = torch.stack([loss.mean() for loss in losses])
    return means.sum() if reduction == "sum" else means


def least_distance(students: Sequence[Tensor], teachers: Sequence[Tensor], **options: Any) -> float:
    """The least ||qs[b] - qt[b]|| of all pairs and samples, of those whose maps differ.

    Takes the options of the loss.
    """
    of_loss = ("weights", "sample_weights", "reduction")
    options = {name: value for name, value in options.items() if name not in of_loss}
    losses = losses_of_pairs(students, teachers, **options | {"form": "paper"})
    distances = torch.cat(losses).detach()
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


def assert_matches_reference(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    *,
    student_grad: bool = True,
    teacher_grad: bool = True,
    scale: float = 2.0**8,
    **options: Any,
) -> None:
    """Loss and gradients of at_fused against the reference in float64.

    ``scale`` multiplies the loss before the backward pass, as loss scaling does, so that fp16
    gradients are not lost. The features are used as they are, strides and all.
    """
    leaves = []
    for x, wanted in [(x, student_grad) for x in students] + [(x, teacher_grad) for x in teachers]:
        leaves.append(x.detach().requires_grad_(wanted))
    doubles = [x.detach().double().requires_grad_(x.requires_grad) for x in leaves]
    n = len(students)

    loss = at_fused.at_loss(leaves[:n], leaves[n:], **options)
    expected = reference_loss(doubles[:n], doubles[n:], **options)
    fp64 = any(x.dtype == torch.float64 for x in leaves)
    assert loss.dtype == (torch.float64 if fp64 else torch.float32)
    assert loss.shape == expected.shape
    exact = all(x.dtype == torch.float64 for x in leaves)
    # Plain PyTorch pools features and takes signed powers: its gradients lie as it pleases, and
    # each step is rounded.
    ours = options.get("resize") != "features" and options.get("absolute", True)
    steps = 1 if ours else 2
    distance = least_distance(doubles[:n], doubles[n:], **options)
    rounding = EXACT_ROUNDING if exact else ROUNDING
    blur = rounding / max(distance, rounding)
    torch.testing.assert_close(
        loss.double(),
        expected,
        rtol=max(steps * VALUE_TOLERANCE[exact], 2 * blur),
        atol=3 * (rounding if options.get("form") == "paper" else rounding**2),
    )

    def compare(
        which: list[int], found: Sequence[Tensor], right: Sequence[Tensor], laid_out: bool
    ) -> None:
        for i, g, r in zip(which, found, right, strict=True):
            assert g.dtype == leaves[i].dtype
            assert g.shape == leaves[i].shape
            assert g.stride() == torch.empty_like(leaves[i]).stride() or not laid_out
            assert torch.isfinite(g).all()
            if skips := options.get("skip_tokens"):
                assert not g[:, : skips[i >= n]].any()
            if blur > 0.1:
                continue  # maps that are the same but for rounding: any direction is right
            tolerance = max(GRADIENT_TOLERANCE[g.dtype], 0 if exact else 1e-5, 4 * blur) * steps
            # fp16 has nothing between 0 and 2^-24.
            smallest = 2**-25 if g.dtype == torch.float16 else 0.0
            bound = tolerance * r.abs().max() + 1e-12 * scale + smallest
            error = (g.double() - r).abs().max()
            assert error <= bound, f"feature {i}: error {error:.3g}, allowed {bound:.3g}"

    wanted = [i for i, x in enumerate(leaves) if x.requires_grad]
    if wanted:
        upstream = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape) * scale
        found = torch.autograd.grad(loss, [leaves[i] for i in wanted], upstream)
        right = torch.autograd.grad(
            expected, [doubles[i] for i in wanted], upstream.double(), retain_graph=True
        )
        compare(wanted, found, right, ours)
    else:
        assert not loss.requires_grad
    if student_grad:
        value, found = at_fused.at_value_and_grad(leaves[:n], leaves[n:], scale=scale, **options)
        assert isinstance(found, list)
        # The same sums, perhaps in another order.
        torch.testing.assert_close(
            value,
            loss.detach(),
            rtol=max(1e-12 if exact else 1e-6, 2 * blur),
            atol=3 * (rounding if options.get("form") == "paper" else rounding**2),
        )
        right = torch.autograd.grad(expected.sum() * scale, doubles[:n])
        compare(list(range(n)), found, right, True)
