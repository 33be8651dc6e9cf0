"""The rest of the method: each variant as people write it, our call for it, and its inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import at_fused
from benchmarks.cases import CASES, DTYPES, LAYOUTS

Loss = Callable[..., Tensor]


class Variant(NamedTuple):
    """What is compared: ``ours`` and ``eager`` take the inputs of ``make``."""

    eager: Loss
    ours: Loss
    make: Callable[[str, str, str], list[Any]]
    cases: tuple[str, ...] = tuple(CASES)
    layouts: tuple[str, ...] = tuple(LAYOUTS)


def normalized(q: Tensor) -> Tensor:
    """A map, flattened and normalised."""
    return F.normalize(q.flatten(1))


def over_pairs(pair_loss: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """The sum over stages, as training loops write it."""

    def loss(students: list[Tensor], teachers: list[Tensor]) -> Tensor:
        return sum(pair_loss(s, t) for s, t in zip(students, teachers, strict=True))

    return loss


def max_loss(s: Tensor, t: Tensor) -> Tensor:
    """F_max^2."""
    a, b = (normalized(x.pow(2).max(1).values) for x in (s, t))
    return (a - b).pow(2).mean()


def maps_loss(s: Tensor, t: Tensor) -> Tensor:
    """The teacher's map interpolated to the student's size."""
    a, b = (x.pow(2).mean(1, keepdim=True) for x in (s, t))
    b = F.interpolate(b, size=a.shape[2:], mode="bilinear")
    return (normalized(a) - normalized(b)).pow(2).mean()


def features_loss(s: Tensor, t: Tensor) -> Tensor:
    """The larger features pooled."""
    if s.shape[2] > t.shape[2]:
        s = F.adaptive_avg_pool2d(s, t.shape[2:])
    elif s.shape[2] < t.shape[2]:
        t = F.adaptive_avg_pool2d(t, s.shape[2:])
    return (normalized(s.pow(2).mean(1)) - normalized(t.pow(2).mean(1))).pow(2).mean()


def channel_loss(s: Tensor, t: Tensor) -> Tensor:
    """One weight for each channel."""
    return (normalized(s.pow(2).mean((2, 3))) - normalized(t.pow(2).mean((2, 3)))).pow(2).mean()


def token_loss(s: Tensor, t: Tensor) -> Tensor:
    """Tokens without that of the class."""
    return (normalized(s[:, 1:].pow(2).mean(2)) - normalized(t[:, 1:].pow(2).mean(2))).pow(2).mean()


# ---- inputs --------------------------------------------------------------------------------------


def features(
    case: str, dtype: str, layout: str, student: int = 1, teacher: int = 1, same: bool = False
) -> list[Any]:
    """Features of a case; either side's H and W may be divided, the teacher's C may be the same."""
    batch, stages = CASES[case]
    kind = {"dtype": DTYPES[dtype], "memory_format": LAYOUTS[layout]}

    def feature(channels: int, side: int) -> Tensor:
        return torch.randn(batch, channels, side, side).to(**kind)

    students = [feature(c, h // student) for c, _, h in stages]
    teachers = [feature(c if same else d, h // teacher) for c, d, h in stages]
    return [[x.requires_grad_() for x in students], teachers]


def halved(**sides: int) -> Callable[[str, str, str], list[Any]]:
    """Inputs whose student or teacher is half as high and wide."""
    return lambda *setting: features(*setting, **sides)


TOKENS = {"ViT-S from B": (64, 197, 384, 768), "ViT-Ti from S": (128, 197, 192, 384)}


def tokens(case: str, dtype: str, _: str) -> list[Any]:
    """Token features of two transformers."""
    batch, count, student, teacher = TOKENS[case]
    s, t = (torch.randn(batch, count, c).to(DTYPES[dtype]) for c in (student, teacher))
    return [s.requires_grad_(), t]


PLAIN = ("contiguous",)

VARIANTS: dict[str, Variant] = {
    "max": Variant(
        over_pairs(max_loss),
        lambda s, t: at_fused.at_loss(s, t, collapse="max"),
        features,
    ),
    "resize maps": Variant(
        over_pairs(maps_loss),
        lambda s, t: at_fused.at_loss(s, t, resize="maps"),
        halved(teacher=2),
    ),
    "resize features, student larger": Variant(
        over_pairs(features_loss),
        lambda s, t: at_fused.at_loss(s, t, resize="features"),
        halved(teacher=2),
    ),
    "resize features, teacher larger": Variant(
        over_pairs(features_loss),
        lambda s, t: at_fused.at_loss(s, t, resize="features"),
        halved(student=2),
    ),
    "channel": Variant(
        over_pairs(channel_loss),
        lambda s, t: at_fused.at_loss(s, t, attend="channel"),
        lambda *setting: features(*setting, same=True),
    ),
    "tokens": Variant(
        token_loss,
        lambda s, t: at_fused.at_loss(s, t, channel_dim=-1, skip_tokens=1),
        tokens,
        tuple(TOKENS),
        PLAIN,
    ),
}


def differentiable(inputs: list[Any]) -> list[Tensor]:
    """The inputs whose gradient is asked for."""
    flat = [y for x in inputs for y in (x if isinstance(x, list) else [x])]
    return [x for x in flat if x.requires_grad]
