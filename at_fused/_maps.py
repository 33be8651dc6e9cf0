"""Raw maps by the public options: those of the operators, and of odd powers that keep their sign.

``absolute=False`` means A^p in place of |A|^p, which is another number for odd p alone. Few people
want that one, so that no operator knows it: it is plain PyTorch, with autograd's own gradient.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from at_fused import _ops
from at_fused._ops import Place
from at_fused.backends import eager
from at_fused.backends.checks import without_first
from at_fused.backends.results import accumulate_dtype


def keeps_sign(p: float, absolute: bool) -> bool:
    """Return True where A^p is not |A|^p."""
    return not absolute and p % 2 == 1


def _signed_map(x: Tensor, p: float, collapse: str) -> Tensor:
    """The mean or the sum of A^p over the channels of (B, C, *spatial), as (B, N)."""
    powers = x.flatten(2).to(accumulate_dtype(x)) ** p
    return powers.mean(1) if collapse == "mean" else powers.sum(1)


def signed_gradients(
    features: list[Tensor],
    coefficients: list[Tensor],
    loss_gradient: Tensor | None,
    p: float,
    skip_tokens: list[int],
) -> list[Tensor]:
    """Compute what ``attention_map_backward`` does, for odd powers that keep their sign.

    Feature i belongs to pair i.
    """
    gradients = []
    for i, x in enumerate(without_first(features, skip_tokens)):
        k = eager.times_loss_gradient(coefficients[i], loss_gradient, i)
        slope = x.flatten(2).to(k.dtype) ** (p - 1)
        gradient = (k.unsqueeze(1) * slope).to(x.dtype).view(x.shape)
        skip = skip_tokens[i] if skip_tokens else 0
        gradients.append(F.pad(gradient, (skip, 0)) if skip else gradient)
    return gradients


def attention_maps(
    features: list[Tensor], p: float, collapse: str, absolute: bool, skip_tokens: list[int]
) -> list[Tensor]:
    """Return the raw map (B, N) of each feature (B, C, *spatial), without its skipped tokens."""
    if keeps_sign(p, absolute):
        return [_signed_map(x, p, collapse) for x in without_first(features, skip_tokens)]
    return _ops.attention_map(features, p, collapse, skip_tokens)[: len(features)]


def attention_tap(
    x: Tensor, p: float, collapse: str, absolute: bool, place: Place
) -> tuple[Tensor, Tensor]:
    """The feature itself, to be used in its place, and its raw map (B, N)."""
    if keeps_sign(p, absolute):
        return x, _signed_map(place.view(x), p, collapse)
    return _ops.attention_tap(x, p, collapse, place)
