"""The cases, and the programs that are compared on them: popular lines, and at_fused's options."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import at_fused

# name -> batch, [(channels of the student, of the teacher, H = W)]
CASES: dict[str, tuple[int, list[tuple[int, int, int]]]] = {
    "a: WRN on CIFAR, three stages": (128, [(16, 32, 32), (32, 64, 16), (64, 128, 8)]),
    "b: ResNet-34 -> 18, four stages": (
        32,
        [(64, 64, 56), (128, 128, 28), (256, 256, 14), (512, 512, 7)],
    ),
    "c: one pair 256x56x56": (32, [(256, 256, 56)]),
    "ViT-S from B, three blocks": (32, [(384, 768, 14)] * 3),
    "ViT-Ti from S, three blocks": (32, [(192, 384, 14)] * 3),
}
CANONICAL, TRANSFORMERS = tuple(CASES)[:3], tuple(CASES)[3:]
LARGE = "ResNet-34 -> 18, batch 128"  # whose bytes are only counted
CASES[LARGE] = 128, CASES[CANONICAL[1]][1]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PASSES = ("forward", "forward+backward", "value and gradient")
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
LAYOUTS = tuple(FORMATS)
TOKENS = ("tokens",)  # (B, 1 + H*W, C), the first that of the class
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def backends(device: str) -> list[str]:
    """The back ends that run at_fused there."""
    names = ("cpu",) if device == "cpu" else ("cuda", "triton")
    return [name for name in names if at_fused.backends()[name].available]


def popular_at(x: Tensor) -> Tensor:
    """The attention map as people paste it."""
    return F.normalize(x.pow(2).mean(1).view(x.size(0), -1))


def popular_at_loss(x: Tensor, y: Tensor) -> Tensor:
    """The loss as people paste it."""
    return (popular_at(x) - popular_at(y)).pow(2).mean()


def popular_losses(students: list[Tensor], teachers: list[Tensor]) -> Tensor:
    """The loss of all stages, as training loops add it up."""
    return sum(popular_at_loss(s, t) for s, t in zip(students, teachers, strict=True))


def energy(x: Tensor) -> Tensor:
    """The raw map."""
    return x.pow(2).mean(1)


def distance(a: Tensor, b: Tensor) -> Tensor:
    """The squared differences of two raw maps, once normalised."""
    return (F.normalize(a.flatten(1)) - F.normalize(b.flatten(1))).pow(2)


def token_loss(s: Tensor, t: Tensor, mask: Tensor | None = None) -> Tensor:
    """Tokens without that of the class, of which a mask may leave out more."""
    a, b = (x[:, 1:].pow(2).mean(2) for x in (s, t))
    if mask is not None:
        a, b = a * mask.flatten(1), b * mask.flatten(1)
    return distance(a, b).mean()


def added_eps_loss(s: Tensor, t: Tensor) -> Tensor:
    """Maps over their norm + 1e-6."""
    maps = [energy(x).flatten(1) for x in (s, t)]
    a, b = (q / (q.norm(dim=1, keepdim=True) + 1e-6) for q in maps)
    return (a - b).pow(2).mean()


def interpolated_loss(s: Tensor, t: Tensor) -> Tensor:
    """The teacher's map, interpolated to the student's size."""
    a, b = (x.pow(2).mean(1, keepdim=True) for x in (s, t))
    return distance(a, F.interpolate(b, size=a.shape[2:], mode="bilinear")).mean()


def pooled_loss(s: Tensor, t: Tensor) -> Tensor:
    """The larger features, pooled."""
    if s.shape[2] > t.shape[2]:
        s = F.adaptive_avg_pool2d(s, t.shape[2:])
    elif s.shape[2] < t.shape[2]:
        t = F.adaptive_avg_pool2d(t, s.shape[2:])
    return distance(energy(s), energy(t)).mean()


class Variant(NamedTuple):
    """A setting of the method: the popular lines of a pair, and at_loss's options for the same."""

    eager: Callable[..., Tensor]
    options: dict[str, Any]
    extra: str = ""  # "mask", of each stage, or "sample_weights": what both take beside features
    halved: tuple[int, int] = (1, 1)  # divides H and W of the student and of the teacher
    same_channels: bool = False
    cases: tuple[str, ...] = CANONICAL
    layouts: tuple[str, ...] = LAYOUTS

    def popular(self, students: list[Tensor], teachers: list[Tensor], **extra: Any) -> Tensor:
        """The popular lines over all stages; by sample, if they give a loss for each."""
        sides = [students, teachers, *(extra[name] for name in ("mask",) if name in extra)]
        weights = [extra[name] for name in ("sample_weights",) if name in extra]
        return sum(self.eager(*stage, *weights) for stage in zip(*sides, strict=True))

    def ours(self) -> Callable[..., Tensor]:
        """The same by at_fused."""
        return partial(at_fused.at_loss, **self.options)


AT_LOSS = Variant(popular_at_loss, {})
_TOKENS = {"channel_dim": -1, "skip_tokens": 1, "map_size": (14, 14)}
VARIANTS = {
    "tokens": Variant(token_loss, _TOKENS, cases=TRANSFORMERS, layouts=TOKENS),
    "tokens, mask": Variant(token_loss, _TOKENS, "mask", cases=TRANSFORMERS, layouts=TOKENS),
    "resize maps": Variant(interpolated_loss, {"resize": "maps"}, halved=(1, 2)),
    "mask": Variant(
        lambda s, t, mask: distance(energy(s) * mask, energy(t) * mask).mean(), {}, "mask"
    ),
    "sample weights": Variant(
        lambda s, t, w: (distance(energy(s), energy(t)).mean(1) * w).mean(), {}, "sample_weights"
    ),
    "loss of each sample": Variant(
        lambda s, t: distance(energy(s), energy(t)).mean(1), {"reduction": "sample"}
    ),
    "eps added": Variant(added_eps_loss, {"eps": 1e-6, "eps_mode": "add"}),
    "max": Variant(
        lambda s, t: distance(s.pow(2).max(1).values, t.pow(2).max(1).values).mean(),
        {"collapse": "max"},
    ),
    "channel": Variant(
        lambda s, t: distance(s.pow(2).mean((2, 3)), t.pow(2).mean((2, 3))).mean(),
        {"attend": "channel"},
        same_channels=True,
    ),
    "resize features, student larger": Variant(pooled_loss, {"resize": "features"}, halved=(1, 2)),
    "resize features, teacher larger": Variant(pooled_loss, {"resize": "features"}, halved=(2, 1)),
}


def rivals(variant: Variant = AT_LOSS) -> dict[str, Callable[..., Tensor]]:
    """Return what is compared with at_fused; torch.compile anew each time, for the exact shapes."""
    torch._dynamo.reset()
    return {"eager": variant.popular, "compile": torch.compile(variant.popular, dynamic=False)}


class Inputs(NamedTuple):
    """Features of one dtype and layout; the students require a gradient, as in training."""

    students: list[Tensor]
    teachers: list[Tensor]
    extra: dict[str, Any]  # what else the losses take, by name

    @classmethod
    def make(
        cls,
        case: str | tuple[int, list[tuple[int, int, int]]],
        dtype: str = "fp32",
        layout: str = "NCHW",
        device: str = "cpu",
        share: int = 1,
        variant: Variant = AT_LOSS,
    ) -> Inputs:
        """Those of a case, by its name or as CASES has it; ``share`` divides the batch."""
        torch.manual_seed(0)
        batch, stages = CASES[case] if isinstance(case, str) else case
        batch //= share

        def feature(channels: int, side: int) -> Tensor:
            if layout in TOKENS:
                return torch.randn(batch, 1 + side * side, channels).to(DTYPES[dtype])
            x = torch.randn(batch, channels, side, side)
            return x.to(DTYPES[dtype], memory_format=FORMATS[layout])

        s_part, t_part = variant.halved
        with torch.device(device):
            students = [feature(c, h // s_part).requires_grad_() for c, _, h in stages]
            teachers = [
                feature(c if variant.same_channels else d, h // t_part) for c, d, h in stages
            ]
            masks = [torch.rand(batch, h, h) < 0.7 for *_, h in stages]
            extra = {"mask": masks, "sample_weights": torch.rand(batch)}
        return cls(students, teachers, {k: x for k, x in extra.items() if k == variant.extra})

    def floors(self) -> dict[str, int]:
        """Bytes that each pass has to read and write, at the least.

        Forward reads the features and writes the two maps that are kept; backward reads the
        students and their maps and writes the gradients.
        """
        s, t = (sum(x.nbytes for x in side) for side in (self.students, self.teachers))
        maps = sum(4 * x[:, 0].numel() for x in self.students)
        forward, backward = s + t + 2 * maps, s + maps + s
        both = {"forward": forward, "backward": backward, "forward+backward": forward + backward}
        return {"read": s + t, **both, "value and gradient": s + t + s}

    def read_all(self, joined: bool = False) -> Callable[[], None]:
        """One pass over all bytes and next to no arithmetic: the floor of the forward pass.

        Of a copy of all in one tensor if ``joined``: one launch.
        """
        features = [x.detach() for x in self.students + self.teachers]
        flat = [x if x.is_contiguous() else x.permute(0, 2, 3, 1) for x in features]
        words = [x.reshape(-1).view(torch.int32) for x in flat]
        if joined:
            words = [torch.cat(words)]

        def read() -> None:
            for x in words:
                x.max()

        return read

    def step(self, loss: Callable[..., Tensor], backward: bool = True) -> Callable[[], object]:
        """The forward pass, or forward and backward, with ``loss``."""

        def run() -> object:
            found = loss(self.students, self.teachers, **self.extra)
            if not backward:
                return found
            return torch.autograd.grad(found.sum() if found.dim() else found, self.students)

        return run
