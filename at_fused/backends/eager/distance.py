"""Squared distances between tensors, sample by sample, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.device.type == "mps" else x.double()


def squared_distance(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Sum of |a - b|^2 over all but the first dimension, (pairs, B), in fp64."""
    if not a:  # without a tensor no other back end is asked
        raise RuntimeError("at_fused: as many tensors on both sides, got 0")
    differences = [_wide(x) - _wide(y) for x, y in zip(a, b, strict=True)]
    return torch.stack([d.square().flatten(1).sum(1) for d in differences])


def squared_distance_backward(
    a: list[Tensor], b: list[Tensor], coefficients: Tensor
) -> list[Tensor]:
    """2 * c[i, b] * (a - b) for each pair, in a's dtype and layout."""
    gradients = []
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        c = _wide(coefficients[i]).reshape(-1, *(1,) * (x.dim() - 1))
        gradient = (2 * c * (_wide(x) - _wide(y))).to(x.dtype)
        out = torch.empty_like(x)
        gradients.append(gradient if gradient.stride() == out.stride() else out.copy_(gradient))
    return gradients
