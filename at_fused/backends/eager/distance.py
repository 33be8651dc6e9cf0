"""Distances between tensors, sample by sample, and their gradients, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from at_fused.backends.checks import check_distance_loss, check_distance_loss_backward
from at_fused.backends.eager.attention import sample_weight, wide
from at_fused.backends.results import accumulate_dtype


def _root(squares: Tensor) -> tuple[Tensor, Tensor]:
    """The square root and its derivative, both 0 at 0."""
    same = squares == 0
    root = torch.where(same, 1.0, squares).sqrt()
    return torch.where(same, 0.0, root), torch.where(same, 0.0, 0.5 / root)


def squared_distances(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Sum of |a - b|^2 over all but the first dimension, (pairs, B), in fp64."""
    differences = [wide(x) - wide(y) for x, y in zip(a, b, strict=True)]
    return torch.stack([d.square().flatten(1).sum(1) for d in differences])


def distance_loss(
    student: list[Tensor], teacher: list[Tensor], weights: list[float], root: bool, reduction: str
) -> tuple[Tensor, Tensor]:
    """Weighted means over the batch of the distances, or of their squares; and the squares."""
    check_distance_loss(student, teacher, weights, reduction)
    squares = squared_distances(student, teacher)
    distances = _root(squares)[0] if root else squares
    batch = squares.shape[1]
    losses = torch.stack(
        [d.sum() * sample_weight(weights, i, batch, reduction) for i, d in enumerate(distances)]
    )
    loss = losses.sum() if reduction == "sum" else losses
    return loss.to(accumulate_dtype(*student, *teacher)), squares


def distance_loss_backward(
    a: list[Tensor],
    b: list[Tensor],
    squares: Tensor,
    gradient: Tensor,
    pairs: list[int],
    weights: list[float],
    root: bool,
    reduction: str,
) -> list[Tensor]:
    """The gradient for each a, in its dtype and layout; its pair's number is in ``pairs``."""
    check_distance_loss_backward(a, b, squares, gradient, pairs, weights, reduction)
    gradients = []
    for i, x, y in zip(pairs, a, b, strict=True):
        weight = sample_weight(weights, i, x.shape[0], reduction)
        above = wide(gradient if reduction == "sum" else gradient[i])
        slope = _root(squares[i])[1] if root else torch.ones_like(squares[i])
        factor = (2 * weight * above * slope).reshape(-1, *(1,) * (x.dim() - 1))
        found = (factor * (wide(x) - wide(y))).to(x.dtype)
        out = torch.empty_like(x)
        gradients.append(found if found.stride() == out.stride() else out.copy_(found))
    return gradients
