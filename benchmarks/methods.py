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


def popular_kd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Hinton's loss as people paste it."""
    soft = F.kl_div(
        F.log_softmax(student / 4.0, 1), F.softmax(teacher / 4.0, 1), reduction="batchmean"
    )
    return 0.9 * 16.0 * soft + 0.1 * F.cross_entropy(student, labels)


def gradient_norm(a: Tensor, b: Tensor) -> Tensor:
    """The distance of two input gradients."""
    return (a - b).flatten(1).norm(dim=1).mean()


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
LOGITS = {"128x1000": (128, 1000), "256x100": (256, 100), "64x21841": (64, 21841)}
IMAGES = {"128x3x32x32": (128, 3, 32, 32), "32x3x224x224": (32, 3, 224, 224)}


def tokens(case: str, dtype: str, _: str) -> list[Any]:
    """Token features of two transformers."""
    batch, count, student, teacher = TOKENS[case]
    s, t = (torch.randn(batch, count, c).to(DTYPES[dtype]) for c in (student, teacher))
    return [s.requires_grad_(), t]


def logits(case: str, dtype: str, _: str) -> list[Any]:
    """Logits of both, and labels."""
    batch, classes = LOGITS[case]
    s, t = (torch.randn(batch, classes).mul(3).to(DTYPES[dtype]) for _ in range(2))
    return [s.requires_grad_(), t, torch.randint(classes, (batch,))]


def input_gradients(case: str, dtype: str, _: str) -> list[Any]:
    """Two gradients of the input."""
    a, b = (torch.randn(IMAGES[case]).to(DTYPES[dtype]) for _ in range(2))
    return [a.requires_grad_(), b]


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
    "kd_loss": Variant(
        popular_kd,
        lambda s, t, y: at_fused.kd_loss(s, t, y, T=4.0, alpha=0.9),
        logits,
        tuple(LOGITS),
        PLAIN,
    ),
    "gradient norm": Variant(
        gradient_norm, at_fused.gradient_at_loss, input_gradients, tuple(IMAGES), PLAIN
    ),
    "features_loss": Variant(
        over_pairs(F.mse_loss),
        at_fused.features_loss,
        lambda *setting: features(*setting, same=True),
    ),
}


def differentiable(inputs: list[Any]) -> list[Tensor]:
    """The inputs whose gradient is asked for."""
    flat = [y for x in inputs for y in (x if isinstance(x, list) else [x])]
    return [x for x in flat if x.requires_grad]
