"""Whole training steps, a student's and a teacher's, with and without attention transfer.

    wrn      WRN-16-2 -> WRN-16-1, batch 128, 32x32
    resnet   ResNet-34 -> ResNet-18 (torchvision's), batch 16, 224x224

Programs: the step "without" (the teacher runs, as for any distillation, and nothing comes of it),
with the popular lines ("eager"), with ``at_loss`` ("drop-in") and with ``AttentionTransfer``
("tap"); "prepared" is the last with the teacher before the student, "alone" has no teacher.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import at_fused
from at_fused import AttentionTransfer
from at_fused._hooks import _Hook
from at_fused._ops import loss, tap
from at_fused.train.wrn import WRN
from benchmarks.cases import popular_losses

BETA = 1e3
Loss = Callable[[list[Tensor], list[Tensor]], Tensor]
Program = Callable[[], object]


class Networks(NamedTuple):
    """A student, its teacher, a batch, and the layers that are compared."""

    student: nn.Module
    teacher: nn.Module
    x: Tensor
    y: Tensor
    layers: list[str]


def wrn(batch: int = 128) -> Networks:
    """WRN-16-2 -> WRN-16-1 on CIFAR's sizes."""
    layers = [f"groups.{i}" for i in range(3)]
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    return Networks(WRN(16, 1), WRN(16, 2), x, y, layers)


def resnet(batch: int = 16) -> Networks:
    """ResNet-34 -> ResNet-18 on ImageNet's sizes."""
    from torchvision.models import resnet18, resnet34

    layers = [f"layer{i}" for i in range(1, 5)]
    x, y = torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))
    return Networks(resnet18(), resnet34(), x, y, layers)


NETWORKS = {"wrn": wrn, "resnet": resnet}


def logits_of(output: Any) -> Tensor:
    """The first of what a network returns."""
    return output[0] if isinstance(output, tuple) else output


def backward(networks: Networks, total: Tensor) -> None:
    """The rest of a step; the optimizer is the same for all."""
    networks.student.zero_grad(set_to_none=True)
    total.backward()


@contextmanager
def kept_features(model: nn.Module, layers: list[str]) -> Iterator[list[Tensor]]:
    """The outputs of layers, as programs with hooks keep them."""
    features: list[Tensor] = []
    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, a, out: features.append(out))
        for name in layers
    ]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


def step_with(networks: Networks, of_features: Loss | None) -> Program:
    """A step whose loss is of features, or that has none but the task's."""
    student, teacher, x, y, layers = networks

    def step() -> None:
        names = layers if of_features else []
        with kept_features(student, names) as features, kept_features(teacher, names) as targets:
            total = F.cross_entropy(logits_of(student(x)), y)
            with torch.no_grad():
                teacher.eval()(x)
            if of_features:
                total = total + BETA * of_features(features, targets)
        backward(networks, total)

    return step


def alone(networks: Networks) -> Program:
    """A step of the student, without a teacher."""
    student, _, x, y, _ = networks
    return lambda: backward(networks, F.cross_entropy(logits_of(student(x)), y))


def tapped(networks: Networks, at: AttentionTransfer, prepared: bool = False) -> None:
    """A step with AttentionTransfer, whose hooks are there."""
    student, _, x, y, _ = networks
    if prepared:
        at.prepare(x)
    backward(networks, F.cross_entropy(logits_of(student(x)), y) + at(x))


def hooked(networks: Networks, prepared: bool = False) -> Program:
    """The same, with hooks that are there for the one step."""

    def step() -> None:
        at = AttentionTransfer(networks.student, networks.teacher, networks.layers, beta=BETA)
        tapped(networks, at, prepared)
        at.remove()

    return step


def programs(networks: Networks) -> dict[str, Program]:
    """Steps to compare, on the same networks."""
    return {
        "alone": alone(networks),
        "without": step_with(networks, None),
        "eager": step_with(networks, popular_losses),
        "drop-in": step_with(networks, at_fused.at_loss),
        "tap": hooked(networks),
        "prepared": hooked(networks, prepared=True),
    }


# ---- what of a step's time is attention transfer -------------------------------------------------


class Stopwatch:
    """Seconds within some functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, owner: Any, name: str, sign: int = 1) -> Any:
        """Counts a function's time while the result, a context, is open."""
        function = getattr(owner, name)

        def run(*arguments: Any, **keywords: Any) -> Any:
            begin = time.perf_counter()
            result = function(*arguments, **keywords)
            self.seconds += sign * (time.perf_counter() - begin)
            return result

        static = isinstance(owner.__dict__[name], staticmethod)
        return mock.patch.object(owner, name, staticmethod(run) if static else run)


def own_seconds(networks: Networks, rounds: int) -> list[tuple[float, float]]:
    """Of each step its time, and that of all which is attention transfer's: hooks, loss, gradients.

    By the clock around each part, so that it needs no difference of two long times.
    """
    at = AttentionTransfer(networks.student, networks.teacher, networks.layers, beta=BETA)
    tapped(networks, at)
    watch = Stopwatch()
    found = []
    with (
        watch.around(_Hook, "__call__"),
        watch.around(AttentionTransfer, "__call__"),
        watch.around(AttentionTransfer, "_run_teacher", -1),
        watch.around(loss._MapLoss, "backward"),
        # Not the tap's own backward: it counts references, and another frame would hold some.
        watch.around(tap, "attention_tap_backward_"),
    ):
        for _ in range(rounds):
            watch.seconds = 0.0
            begin = time.perf_counter()
            tapped(networks, at)
            found.append((time.perf_counter() - begin, watch.seconds))
    at.remove()
    return found


def features_of(networks: Networks) -> tuple[list[Tensor], list[Tensor]]:
    """What the layers give, as leaves of their own; the student's want gradients."""
    student, teacher, x, _, layers = networks
    with (
        torch.no_grad(),
        kept_features(student, layers) as features,
        kept_features(teacher, layers) as targets,
    ):
        student(x)
        teacher(x)
    return [x.requires_grad_() for x in features], targets
