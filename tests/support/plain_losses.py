"""Losses in plain PyTorch against the same in float64."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
ROUNDING = {torch.float64: 1e-12, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def rounding_of(dtype: torch.dtype, in_fp32: float) -> float:
    """The relative error that a gradient of this type may have."""
    return ROUNDING.get(dtype, in_fp32)


def leaves_and_doubles(*tensors: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Leaves of the values, as they are and in float64."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    return leaves, [x.detach().double().requires_grad_() for x in tensors]
