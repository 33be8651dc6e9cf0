"""Raw maps by the public options, and what torch does with features and maps around the operators.

``absolute=False`` means A^p in place of |A|^p, which is another number for odd p alone. Few people
want that one, so that no operator knows it: it is plain PyTorch, with autograd's own gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from at_fused import _ops
from at_fused._layouts import FeatureLayout
from at_fused.backends import eager
from at_fused.backends.outputs import accumulate_dtype

_FP32_POSITIONS = 32  # in a dimension; up to here weights in fp32 are right to 2e-6


def attention_maps(
    features: list[Tensor],
    p: float,
    collapse: str,
    absolute: bool,
    skip_tokens: Sequence[int] = (),
) -> list[Tensor]:
    """Return the raw map (B, N) of each feature (B, C, *spatial), without its skipped tokens."""
    if keeps_sign(p, absolute):
        return [_signed_map(x, p, collapse) for x in eager.without_first(features, skip_tokens)]
    return _ops.attention_map(features, p, collapse, skip_tokens)[: len(features)]


def attention_tap(
    x: Tensor, p: float, collapse: str, absolute: bool, layout: FeatureLayout, of_channels: bool
) -> tuple[Tensor, Tensor]:
    """Return the feature itself, to be used in its place, and its raw map (B, N)."""
    if keeps_sign(p, absolute):
        return x, _signed_map(layout.view(x, of_channels), p, collapse)
    return _ops.attention_tap(x, p, collapse, layout, of_channels)


def normalized(raw: Tensor, eps: float, eps_mode: str) -> Tensor:
    """Return raw maps (B, N) divided by their norms."""
    return eager.normalize(raw, eps, eps_mode)[0].to(raw.dtype)


def keeps_sign(p: float, absolute: bool) -> bool:
    """Return True where A^p is not |A|^p."""
    return not absolute and p % 2 == 1


def _signed_map(x: Tensor, p: float, collapse: str) -> Tensor:
    """Return the mean or the sum of A^p over the channels of (B, C, *spatial), as (B, N)."""
    powers = x.flatten(2).to(accumulate_dtype(x)) ** p
    return powers.mean(1) if collapse == "mean" else powers.sum(1)


def pool(x: Tensor, size: list[int]) -> Tensor:
    """Pool adaptively, 16 bits in fp32: torch would round the means to 16 bits."""
    if list(x.shape[2:]) == size:
        return x
    pools = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
    return pools[len(size)](x.to(accumulate_dtype(x)), size)  # type: ignore[arg-type]


def interpolate(maps: Tensor, size: Sequence[int], target: Sequence[int]) -> Tensor:
    """Interpolate raw maps (B, N) of ``size`` linearly to ``target``."""
    if size == target:
        return maps
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(size)]
    planes = maps.reshape(maps.shape[0], 1, *size)
    # torch computes a position's weights in the maps' dtype: in fp32 they are off by the rounding
    # of the position's number.
    wide = eager.wide(planes) if max(*size, *target) > _FP32_POSITIONS else planes
    found = F.interpolate(wide, size=tuple(target), mode=mode, align_corners=False)
    return found.flatten(1).to(maps.dtype)


def resized_mask(mask: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return (B, N): the mask's mean over the area of each position of the map."""
    wide = mask.to(dtype)
    if list(mask.shape[1:]) != list(size):
        wide = F.interpolate(wide.unsqueeze(1), size=tuple(size), mode="area").squeeze(1)
    return wide.flatten(1)
