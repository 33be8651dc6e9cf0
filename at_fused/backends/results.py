"""What the operators return, whichever back end runs them: dtypes and strides."""

from __future__ import annotations

import torch
from torch import Tensor

# What is kept of a row of logits (fp64): largest logit and sum_k exp((x_k - max) / T), of student
# and teacher; the logarithm of these sums' quotient; the divergence; and of the cross-entropy
# sum_k exp(s_k - max) and the loss.
STATISTICS = 8


def accumulate_dtype(*features: Tensor) -> torch.dtype:
    """The dtype of maps, coefficients and losses: fp64 where a feature is, else fp32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in features) else torch.float32


def laid_out_as(x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of x with the strides of ``torch.empty_like(x)``."""
    out = torch.empty_like(x)
    return gradient if gradient.stride() == out.stride() else out.copy_(gradient)


def wide_dtype(x: Tensor) -> torch.dtype:
    """fp64, for what needs it whatever the dtype; fp32 on Apple's GPUs, which have none."""
    return torch.float32 if x.device.type == "mps" else torch.float64
