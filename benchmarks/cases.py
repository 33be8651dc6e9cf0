"""Benchmark cases, and the loss in eager PyTorch that at_fused is compared with."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import at_fused

# Name -> batch, [(student channels, teacher channels, H = W)].
CASES: dict[str, tuple[int, list[tuple[int, int, int]]]] = {
    "a: WRN on CIFAR, three stages": (128, [(16, 32, 32), (32, 64, 16), (64, 128, 8)]),
    "b: ResNet-34 -> 18, four stages": (
        32,
        [(64, 64, 56), (128, 128, 28), (256, 256, 14), (512, 512, 7)],
    ),
    "c: one pair 256x56x56": (32, [(256, 256, 56)]),
}
TIMED_CASES = tuple(CASES)
# Not timed: roofline.py counts their bytes.
LARGE, TRANSFORMER = "ResNet-34 -> 18, batch 128", "ViT-S from B, three blocks"
CASES[LARGE] = 128, CASES[TIMED_CASES[1]][1]
CASES[TRANSFORMER] = 32, [(384, 768, 14)] * 3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PASSES = ("forward", "forward+backward", "value and gradient")
MEMORY_FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
LAYOUTS = tuple(MEMORY_FORMATS)
SETTINGS = list(itertools.product(TIMED_CASES, DTYPES, LAYOUTS))
TOKENS = "tokens"  # (B, 1 + H*W, C), the class token first
TOKEN_OPTIONS = {"channel_dim": -1, "skip_tokens": 1, "map_size": (14, 14)}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def backends(device: str) -> list[str]:
    """Return the names of the back ends that run at_fused on a device."""
    names = ("cpu",) if device == "cpu" else ("cuda", "triton")
    return [name for name in names if at_fused.backends()[name].available]


def eager_at(x: Tensor) -> Tensor:
    """Return the attention map as the authors' code computes it."""
    return F.normalize(x.pow(2).mean(1).view(x.size(0), -1))


def eager_at_loss(x: Tensor, y: Tensor) -> Tensor:
    """Return the loss of one pair as the authors' code computes it."""
    return (eager_at(x) - eager_at(y)).pow(2).mean()


def eager_losses(students: list[Tensor], teachers: list[Tensor]) -> Tensor:
    """Return the loss summed over all stages."""
    return sum(eager_at_loss(s, t) for s, t in zip(students, teachers, strict=True))


def eager_token_losses(students: list[Tensor], teachers: list[Tensor]) -> Tensor:
    """Return the loss of tokens summed over all blocks, without the class token."""
    return eager_losses(*([x[:, 1:].mT for x in side] for side in (students, teachers)))


def baselines() -> dict[str, Callable[..., Tensor]]:
    """Return the losses to compare with; each call compiles afresh, for exact shapes."""
    torch._dynamo.reset()
    return {"eager": eager_losses, "compile": torch.compile(eager_losses, dynamic=False)}


class Inputs(NamedTuple):
    """Features of one dtype and layout; the student's require a gradient, as in training."""

    students: list[Tensor]
    teachers: list[Tensor]

    @classmethod
    def make(
        cls,
        case: str | tuple[int, list[tuple[int, int, int]]],
        dtype: str = "fp32",
        layout: str = "NCHW",
        device: str = "cpu",
        divisor: int = 1,
    ) -> Inputs:
        """Make random features of a case, by name or as a value of CASES; divide its batch."""
        torch.manual_seed(0)
        batch, stages = CASES[case] if isinstance(case, str) else case
        batch //= divisor

        def feature(channels: int, side: int) -> Tensor:
            if layout == TOKENS:
                return torch.randn(batch, 1 + side * side, channels).to(DTYPES[dtype])
            x = torch.randn(batch, channels, side, side)
            return x.to(DTYPES[dtype], memory_format=MEMORY_FORMATS[layout])

        with torch.device(device):
            students = [feature(c, h).requires_grad_() for c, _, h in stages]
            return cls(students, [feature(c, h) for _, c, h in stages])

    def minimum_bytes(self) -> dict[str, int]:
        """Return the bytes that each pass must read and write.

        Forward reads the features and writes both maps. Backward reads the student's features and
        maps, and writes the gradients. "read" is one read of all features.
        """
        s, t = (sum(x.nbytes for x in side) for side in (self.students, self.teachers))
        maps = sum(4 * x[:, 0].numel() for x in self.students)
        forward, backward = s + t + 2 * maps, s + maps + s
        both = {"forward": forward, "backward": backward, "forward+backward": forward + backward}
        return {"read": s + t, **both, "value and gradient": s + t + s}

    def reader(self, joined: bool = False) -> Callable[[], None]:
        """Return a function that reads all bytes once with little arithmetic: the memory floor.

        If ``joined``, it reads a copy of them in one tensor, in one launch.
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

    def step(self, loss_of: Callable[..., Tensor], backward: bool = True) -> Callable[[], object]:
        """Return a function that runs the forward pass of a loss, or forward and backward."""

        def run() -> object:
            loss = loss_of(self.students, self.teachers)
            return torch.autograd.grad(loss, self.students) if backward else loss

        return run
