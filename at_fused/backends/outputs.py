"""Dtypes and strides of the operators' results, on every back end."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate_dtype(*features: Tensor) -> torch.dtype:
    """The dtype of maps, coefficients and losses: fp64 where a feature is, else fp32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in features) else torch.float32


def laid_out_as(x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of x with the strides of ``torch.empty_like(x)``."""
    # A gradient is dense, and so are strides that it shares with x.
    stride = gradient.stride()
    if stride == x.stride() or stride == torch.empty_like(x, device="meta").stride():
        return gradient
    return torch.empty_like(x).copy_(gradient)
