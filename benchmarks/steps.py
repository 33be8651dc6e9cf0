"""Training steps of whole networks, with and without attention transfer (AT).

alone      the student without a teacher
without    the teacher also runs, but its features are unused
eager      AT in eager PyTorch
drop-in    AT with ``at_loss``
tap        AT with ``AttentionTransfer``
prepared   the same, and the teacher runs before the student
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
from benchmarks.cases import eager_losses

BETA = 1e3


class Networks(NamedTuple):
    """A student, its teacher, a batch, and the layers to compare."""

    student: nn.Module
    teacher: nn.Module
    x: Tensor
    y: Tensor
    layers: list[str]

    def step(self, transfer: Callable[[], Tensor | float] = lambda: 0.0) -> None:
        """Run forward and backward; the optimizer would add the same to all programs."""
        output = self.student(self.x)
        # Rebinding the name frees the features that a WRN returns.
        output = output[0] if isinstance(output, tuple) else output
        total = F.cross_entropy(output, self.y) + transfer()
        self.student.zero_grad(set_to_none=True)
        total.backward()


def wrn(batch: int = 128) -> Networks:
    """Make WRN-16-2 -> WRN-16-1 and images of CIFAR's size."""
    layers = [f"groups.{i}" for i in range(3)]
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    return Networks(WRN(16, 1), WRN(16, 2).eval(), x, y, layers)


def resnet(batch: int = 16) -> Networks:
    """Make ResNet-34 -> ResNet-18 and images of ImageNet's size."""
    from torchvision.models import resnet18, resnet34

    layers = [f"layer{i}" for i in range(1, 5)]
    x, y = torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))
    return Networks(resnet18(), resnet34().eval(), x, y, layers)


NETWORKS = {"wrn": wrn, "resnet": resnet}


@contextmanager
def collect_features(model: nn.Module, layers: list[str]) -> Iterator[list[Tensor]]:
    """Collect the outputs of layers through forward hooks, as training programs do."""
    features: list[Tensor] = []
    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, a, out: features.append(out))
        for name in layers
    ]
    yield features
    for handle in handles:
        handle.remove()


def programs(networks: Networks) -> dict[str, Callable[[], object]]:
    """Return the steps to compare, all with the same initial weights."""
    student, teacher, x, _, layers = networks

    def run_teacher() -> float:
        with torch.no_grad():
            teacher(x)
        return 0.0

    def step_with(loss_of: Callable[[list[Tensor], list[Tensor]], Tensor]) -> None:
        with collect_features(student, layers) as s, collect_features(teacher, layers) as t:
            networks.step(lambda: run_teacher() + BETA * loss_of(s, t))

    # The hooks stay on copies: the first pass of named layers also reads their layouts.
    hooked = networks._replace(student=deepcopy(student), teacher=deepcopy(teacher))
    at = AttentionTransfer(hooked.student, hooked.teacher, layers, beta=BETA)
    hooked.step(lambda: at(x))

    def prepared() -> None:
        at.prepare(x)
        hooked.step(lambda: at(x))

    return {
        "alone": networks.step,
        "without": lambda: networks.step(run_teacher),
        "eager": lambda: step_with(eager_losses),
        "drop-in": lambda: step_with(at_fused.at_loss),
        "tap": lambda: hooked.step(lambda: at(x)),
        "prepared": prepared,
    }
