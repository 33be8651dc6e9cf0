"""The canonical cases and the programs that are compared on them."""

from __future__ import annotations

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
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PASSES = ("forward", "forward+backward", "value and gradient")
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def popular_at(x: Tensor) -> Tensor:
    """The attention map as people paste it."""
    return F.normalize(x.pow(2).mean(1).view(x.size(0), -1))


def popular_at_loss(x: Tensor, y: Tensor) -> Tensor:
    """The loss as people paste it."""
    return (popular_at(x) - popular_at(y)).pow(2).mean()


def popular_losses(students: list[Tensor], teachers: list[Tensor]) -> Tensor:
    """The loss of all stages, as their training loops add it up."""
    return sum(popular_at_loss(s, t) for s, t in zip(students, teachers, strict=True))


class Inputs(NamedTuple):
    """Features of one dtype and layout; the students require a gradient, as in training."""

    students: list[Tensor]
    teachers: list[Tensor]

    @classmethod
    def make(
        cls, case: str, dtype: str, layout: str, device: str = "cpu", share: int = 1
    ) -> Inputs:
        """Those of a case; ``share`` divides the batch."""
        batch, stages = CASES[case]
        return cls.random(batch // share, stages, dtype, layout, device)

    @classmethod
    def random(
        cls,
        batch: int,
        stages: list[tuple[int, int, int]],
        dtype: str = "fp32",
        layout: str = "NCHW",
        device: str = "cpu",
    ) -> Inputs:
        """Those of stages (channels of the student, of the teacher, H = W)."""
        kind = {"dtype": DTYPES[dtype], "memory_format": LAYOUTS[layout]}

        def feature(channels: int, side: int) -> Tensor:
            return torch.randn(batch, channels, side, side, device=device).to(**kind)

        students = [feature(c, h) for c, _, h in stages]
        teachers = [feature(c, h) for _, c, h in stages]
        return cls([x.requires_grad_() for x in students], teachers)

    def floors(self) -> dict[str, tuple[int, int]]:
        """Bytes that each pass has to read and to write, at the least.

        Forward reads the features and writes the two maps that are kept; backward reads the
        students and their maps and writes the gradients.
        """
        s, t = (sum(x.nbytes for x in side) for side in self)
        maps = sum(4 * x[:, 0].numel() for x in self.students)
        return {
            "forward": (s + t, 2 * maps),
            "backward": (s + maps, s),
            "value and gradient": (s + t, s),
        }

    def read_all(self) -> Callable[[], None]:
        """One pass over all bytes and next to no arithmetic: the floor of the forward pass."""
        flat = [
            x.detach().permute(0, 2, 3, 1) if not x.is_contiguous() else x.detach()
            for x in (*self.students, *self.teachers)
        ]
        words = [x.reshape(-1).view(torch.int32) for x in flat]

        def read() -> None:
            for x in words:
                x.max()

        return read

    def step(
        self, loss: Callable[[list[Tensor], list[Tensor]], Tensor], backward: bool
    ) -> Callable[[], object]:
        """The forward pass, or forward and backward, with ``loss``."""
        if not backward:
            return lambda: loss(self.students, self.teachers)
        return lambda: torch.autograd.grad(loss(self.students, self.teachers), self.students)

    def value_and_gradient(self) -> Callable[[], object]:
        """Both in one call of at_fused, from the same features."""
        return lambda: at_fused.at_value_and_grad(self.students, self.teachers)


def rivals() -> dict[str, Callable[[list[Tensor], list[Tensor]], Tensor]]:
    """What is compared with at_fused; torch.compile anew each time, for the exact shapes."""
    torch._dynamo.reset()
    return {
        "eager": popular_losses,
        "compile": torch.compile(popular_losses, dynamic=False),
    }


ours = at_fused.at_loss


def backends(device: str) -> list[str]:
    """What runs ``ours`` there."""
    names = ("cpu",) if device == "cpu" else ("cuda", "triton")
    return [name for name in names if at_fused.backends()[name].available]


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
