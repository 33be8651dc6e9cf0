"""Raw maps for the public options, and torch's resizing and pooling around the operators.

``absolute=False`` means A^p instead of |A|^p, which differs for odd p only. This rare option has no
operator: it runs in plain PyTorch with autograd's gradient.
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

_MAX_FP32_SIZE = 32  # up to this height or width, fp32 weights are exact to 2e-6


def attention_maps(
    features: list[Tensor],
    p: float,
    collapse: str,
    absolute: bool,
    skip_tokens: Sequence[int] = (),
) -> list[Tensor]:
    """Return the raw map (B, N) of each feature (B, C, *spatial), without its skipped tokens."""
    if keeps_sign(p, absolute):
        return [_signed_map(x, p, collapse) for x in eager.without_skipped(features, skip_tokens)]
    return _ops.attention_map(features, p, collapse, skip_tokens)[: len(features)]


def attention_tap(
    x: Tensor, p: float, collapse: str, absolute: bool, layout: FeatureLayout, channelwise: bool
) -> tuple[Tensor, Tensor]:
    """Return the feature for the next layer, and its raw map (B, N)."""
    if keeps_sign(p, absolute):
        return x, _signed_map(layout.view(x, channelwise), p, collapse)
    return _ops.attention_tap(x, p, collapse, layout, channelwise)


def normalized(raw: Tensor, eps: float, eps_mode: str) -> Tensor:
    """Divide raw maps (B, N) by their norms."""
    return eager.normalize(raw, eps, eps_mode)[0].to(raw.dtype)


def keeps_sign(p: float, absolute: bool) -> bool:
    """Return True if the options ask for an A^p that differs from |A|^p."""
    return not absolute and p % 2 == 1


def _signed_map(x: Tensor, p: float, collapse: str) -> Tensor:
    """Return the mean or the sum of A^p over the channels of (B, C, *spatial), as (B, N)."""
    powers = x.flatten(2).to(accumulate_dtype(x)) ** p
    return powers.mean(1) if collapse == "mean" else powers.sum(1)


def pool(x: Tensor, size: list[int]) -> Tensor:
    """Pool a feature adaptively; 16-bit ones in fp32, because torch would round the means."""
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
    # torch computes the weights in the maps' dtype: in fp32 their error grows with the coordinate.
    exact = eager.to_float64(planes) if max(*size, *target) > _MAX_FP32_SIZE else planes
    resized = F.interpolate(exact, size=tuple(target), mode=mode, align_corners=False)
    return resized.flatten(1).to(maps.dtype)


def resized_mask(mask: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Average a mask to the size of a map; return it as (B, N)."""
    resized = mask.to(dtype)
    if list(mask.shape[1:]) != list(size):
        resized = F.interpolate(resized.unsqueeze(1), size=tuple(size), mode="area").squeeze(1)
    return resized.flatten(1)
