"""Whole training steps, a student's and a teacher's, with and without attention transfer.

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
from at_fused._ops import loss, tap
from at_fused.train.networks import WRN
from benchmarks.cases import popular_losses

BETA = 1e3
Loss = Callable[[list[Tensor], list[Tensor]], Tensor]


class Networks(NamedTuple):
    """A student, its teacher, a batch, and the layers that are compared."""

    student: nn.Module
    teacher: nn.Module
    x: Tensor
    y: Tensor
    layers: list[str]

    def attention_transfer(self) -> AttentionTransfer:
        """Hooks in both networks, until it is removed."""
        return AttentionTransfer(self.student, self.teacher, self.layers, beta=BETA)

    def step(self, transfer: Callable[[], Tensor | float] | None = None) -> None:
        """Forward and backward; the optimizer is the same for all."""
        output = self.student(self.x)  # the rest of what it returns is not kept
        output = output[0] if isinstance(output, tuple) else output
        total = F.cross_entropy(output, self.y)
        if transfer:
            total = total + transfer()
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


@torch.no_grad()
def features_of(networks: Networks) -> tuple[list[Tensor], list[Tensor]]:
    """Return the layers' features as leaves of their own; the student's want gradients."""
    student, teacher, x, _, layers = networks
    with kept_features(student, layers) as features, kept_features(teacher, layers) as targets:
        student(x)
        teacher(x)
    return [x.requires_grad_() for x in features], targets


def programs(networks: Networks) -> dict[str, Callable[[], object]]:
    """Steps to compare, on the same networks; hooks are there for the one step."""
    student, teacher, x, _, layers = networks

    def without() -> float:
        with torch.no_grad():
            teacher(x)
        return 0.0

    def of_features(loss: Loss) -> None:
        with kept_features(student, layers) as features, kept_features(teacher, layers) as targets:
            networks.step(lambda: without() + BETA * loss(features, targets))

    def hooked(prepared: bool = False) -> None:
        at = networks.attention_transfer()
        if prepared:
            at.prepare(x)
        networks.step(lambda: at(x))
        at.remove()

    return {
        "alone": networks.step,
        "without": lambda: networks.step(without),
        "eager": lambda: of_features(popular_losses),
        "drop-in": lambda: of_features(at_fused.at_loss),
        "tap": hooked,
        "prepared": lambda: hooked(prepared=True),
    }


def own_seconds(networks: Networks, rounds: int) -> list[tuple[float, float]]:
    """Of each step its time, and that of all which is attention transfer's: hooks, loss, gradients.

    By the clock around each part, so that it needs no difference of two long times.
    """
    spent: list[float] = []

    def timed(function: Callable[..., Any], sign: int = 1) -> Callable[..., Any]:
        def run(*arguments: Any, **keywords: Any) -> Any:
            begin = time.perf_counter()
            result = function(*arguments, **keywords)
            spent.append(sign * (time.perf_counter() - begin))
            return result

        return run

    at, found = networks.attention_transfer(), []
    call = timed(at)
    for network in (networks.student, networks.teacher):
        for name in networks.layers:
            hooks = network.get_submodule(name)._forward_hooks
            hooks.update({key: timed(hook) for key, hook in hooks.items()})
    backward, tapped = loss._MapLoss.backward, tap.attention_tap_backward_
    with (
        mock.patch.object(at, "_run_teacher", timed(at._run_teacher, -1)),
        mock.patch.object(loss._MapLoss, "backward", staticmethod(timed(backward))),
        # Not the tap's own backward: it counts references, and another frame would hold some.
        mock.patch.object(tap, "attention_tap_backward_", timed(tapped)),
    ):
        for _ in range(rounds + 1):
            spent.clear()
            begin = time.perf_counter()
            networks.step(lambda: call(networks.x))
            found.append((time.perf_counter() - begin, sum(spent)))
    at.remove()
    return found[1:]  # the first allocates
