"""The cases, and the popular lines that at_fused is compared with on them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

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
}
CANONICAL = tuple(CASES)
# Whose bytes are only counted.
LARGE, TRANSFORMER = "ResNet-34 -> 18, batch 128", "ViT-S from B, three blocks"
CASES[LARGE] = 128, CASES[CANONICAL[1]][1]
CASES[TRANSFORMER] = 32, [(384, 768, 14)] * 3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PASSES = ("forward", "forward+backward", "value and gradient")
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
LAYOUTS = tuple(FORMATS)
KINDS = list(itertools.product(CANONICAL, DTYPES, LAYOUTS))
TOKENS = "tokens"  # (B, 1 + H*W, C), the first that of the class
TOKEN_OPTIONS = {"channel_dim": -1, "skip_tokens": 1, "map_size": (14, 14)}
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


def popular_token_losses(students: list[Tensor], teachers: list[Tensor]) -> Tensor:
    """The same of tokens, without that of the class."""
    return popular_losses(*([x[:, 1:].mT for x in side] for side in (students, teachers)))


def rivals() -> dict[str, Callable[..., Tensor]]:
    """Return what is compared with at_fused; torch.compile anew each time, for the exact shapes."""
    torch._dynamo.reset()
    return {"eager": popular_losses, "compile": torch.compile(popular_losses, dynamic=False)}


class Inputs(NamedTuple):
    """Features of one dtype and layout; the students require a gradient, as in training."""

    students: list[Tensor]
    teachers: list[Tensor]

    @classmethod
    def make(
        cls,
        case: str | tuple[int, list[tuple[int, int, int]]],
        dtype: str = "fp32",
        layout: str = "NCHW",
        device: str = "cpu",
        share: int = 1,
    ) -> Inputs:
        """Those of a case, by its name or as CASES has it; ``share`` divides the batch."""
        torch.manual_seed(0)
        batch, stages = CASES[case] if isinstance(case, str) else case
        batch //= share

        def feature(channels: int, side: int) -> Tensor:
            if layout == TOKENS:
                return torch.randn(batch, 1 + side * side, channels).to(DTYPES[dtype])
            x = torch.randn(batch, channels, side, side)
            return x.to(DTYPES[dtype], memory_format=FORMATS[layout])

        with torch.device(device):
            students = [feature(c, h).requires_grad_() for c, _, h in stages]
            return cls(students, [feature(c, h) for _, c, h in stages])

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
            found = loss(self.students, self.teachers)
            return torch.autograd.grad(found, self.students) if backward else found

        return run
