"""Two small networks that return their features, and the loss computed from these features."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from reference import expected_loss
from torch import Tensor, nn

from at_fused import AttentionTransfer
from at_fused.train.networks import WRN

BETA = 1e3
GROUPS = ["groups.0", "groups.1", "groups.2"]


def networks(dtype: torch.dtype = torch.float64) -> tuple[WRN, WRN, Tensor, Tensor]:
    student, teacher = WRN(10, 1, base=4).to(dtype), WRN(10, 2, base=4).to(dtype)
    return student, teacher, torch.randn(4, 3, 8, 8, dtype=dtype), torch.tensor([0, 1, 2, 3])


def task_loss(output: tuple[Tensor, Any], y: Tensor) -> Tensor:
    return F.cross_entropy(output[0], y)


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor | None]:
    parameters = list(model.parameters())
    return list(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))


def total_loss(
    student: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor, **options: Any
) -> Tensor:
    """Return task loss plus attention transfer, computed from the returned features."""
    output = student(x)
    teacher.eval()
    with torch.no_grad():
        targets = teacher(x)[1]
    teacher.train()
    weights = options.pop("weights", [1.0] * 3)
    losses = [expected_loss(s, t, **options) for s, t in zip(output[1], targets, strict=True)]
    at = sum(w * loss.mean() for w, loss in zip(weights, losses, strict=True))
    return task_loss(output, y) + BETA * at


def call(network: nn.Module, batch: Any) -> Any:
    """Call a network with a dict of keyword arguments, a tuple of arguments, or one argument."""
    if isinstance(batch, dict):
        return network(**batch)
    return network(*batch) if isinstance(batch, tuple) else network(batch)


def transfer_loss(
    student: nn.Module, teacher: nn.Module, batch: Any, layers: Any = None, **options: Any
) -> Tensor:
    """Return AttentionTransfer's loss for one batch, and remove its hooks."""
    factors = {name: options.pop(name) for name in ("mask", "sample_weights") if name in options}
    at = AttentionTransfer(student, teacher, layers, **{"beta": BETA, **options})
    try:
        call(student, batch)
        return at(batch, **factors)
    finally:
        at.remove()
