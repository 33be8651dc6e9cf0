"""Dtypes and strides of the operators' results, for every back end."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate_dtype(*features: Tensor) -> torch.dtype:
    """Return the dtype of maps, coefficients and losses: fp64 if a feature is fp64, else fp32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in features) else torch.float32


def match_strides(x: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient of x with the strides of ``torch.empty_like(x)``."""
    # The gradient is dense: if it has the strides of x, empty_like(x) has them too.
    stride = gradient.stride()
    if stride == x.stride() or stride == torch.empty_like(x, device="meta").stride():
        return gradient
    return torch.empty_like(x).copy_(gradient)
