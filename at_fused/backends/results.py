"""What the operators return, whichever back end runs them: dtypes and sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def accumulate_dtype(*features: Tensor) -> torch.dtype:
    """The dtype of maps, coefficients and losses: fp64 where a feature is, else fp32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in features) else torch.float32


def wide_dtype(x: Tensor) -> torch.dtype:
    """fp64, for what needs it whatever the dtype; fp32 on Apple's GPUs, which have none."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def split_sizes(features: Sequence[Tensor], sizes: Sequence[int]) -> Iterator[list[int]]:
    """The size of each feature's map: its part of ``sizes``, or its own where that is empty."""
    begin = 0
    for x in features:
        rank = x.dim() - 2
        yield list(sizes[begin : begin + rank]) if sizes else list(x.shape[2:])
        begin += rank
