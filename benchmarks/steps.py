"""Whole training steps, a student's and a teacher's, with and without attention transfer.

Programs: the step "without" (the teacher runs, as for any distillation, and nothing comes of it),
with the popular lines ("eager"), with ``at_loss`` ("drop-in") and with ``AttentionTransfer``
("tap"); "prepared" is the last with the teacher before the student, "alone" has no teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import at_fused
from at_fused import AttentionTransfer
from at_fused.train.networks import WRN
from benchmarks.cases import popular_losses

BETA = 1e3


class Networks(NamedTuple):
    """A student, its teacher, a batch, and the layers that are compared."""

    student: nn.Module
    teacher: nn.Module
    x: Tensor
    y: Tensor
    layers: list[str]

    def step(self, transfer: Callable[[], Tensor | float] = lambda: 0.0) -> None:
        """Forward and backward; the optimizer is the same for all."""
        output = self.student(self.x)  # the rest of what it returns is not kept
        output = output[0] if isinstance(output, tuple) else output
        total = F.cross_entropy(output, self.y) + transfer()
        self.student.zero_grad(set_to_none=True)
        total.backward()


def wrn(batch: int = 128) -> Networks:
    """WRN-16-2 -> WRN-16-1 on CIFAR's sizes."""
    layers = [f"groups.{i}" for i in range(3)]
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    return Networks(WRN(16, 1), WRN(16, 2).eval(), x, y, layers)


def resnet(batch: int = 16) -> Networks:
    """ResNet-34 -> ResNet-18 on ImageNet's sizes."""
    from torchvision.models import resnet18, resnet34

    layers = [f"layer{i}" for i in range(1, 5)]
    x, y = torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))
    return Networks(resnet18(), resnet34().eval(), x, y, layers)


NETWORKS = {"wrn": wrn, "resnet": resnet}


@contextmanager
def kept_features(model: nn.Module, layers: list[str]) -> Iterator[list[Tensor]]:
    """The outputs of layers, as programs with hooks keep them."""
    features: list[Tensor] = []
    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, a, out: features.append(out))
        for name in layers
    ]
    yield features
    for handle in handles:
        handle.remove()


def programs(networks: Networks) -> dict[str, Callable[[], object]]:
    """Return the steps to compare, all of the same weights."""
    student, teacher, x, _, layers = networks

    def without() -> float:
        with torch.no_grad():
            teacher(x)
        return 0.0

    def of_features(loss: Callable[[list[Tensor], list[Tensor]], Tensor]) -> None:
        with kept_features(student, layers) as features, kept_features(teacher, layers) as targets:
            networks.step(lambda: without() + BETA * loss(features, targets))

    # Hooks stay, on copies: the first pass of a layer that is named also reads its layout.
    hooked = networks._replace(student=deepcopy(student), teacher=deepcopy(teacher))
    at = AttentionTransfer(hooked.student, hooked.teacher, layers, beta=BETA)
    hooked.step(lambda: at(x))

    def prepared() -> None:
        at.prepare(x)
        hooked.step(lambda: at(x))

    return {
        "alone": networks.step,
        "without": lambda: networks.step(without),
        "eager": lambda: of_features(popular_losses),
        "drop-in": lambda: of_features(at_fused.at_loss),
        "tap": lambda: hooked.step(lambda: at(x)),
        "prepared": prepared,
    }
