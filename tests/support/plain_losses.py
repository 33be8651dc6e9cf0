"""Helpers for tests of the losses that are written in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
ROUNDING = {torch.float64: 1e-12, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def gradient_tolerance(dtype: torch.dtype, float32: float) -> float:
    """Return the relative error allowed in a gradient of this dtype."""
    return ROUNDING.get(dtype, float32)


def leaves_and_doubles(*tensors: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return leaves with the tensors' values, in their dtypes and in float64."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    return leaves, [x.detach().double().requires_grad_() for x in tensors]
