"""Features of every dtype and memory layout."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
LAYOUTS = ("planar", "interleaved")
CHANNELS_LAST = torch.channels_last
# (B, C, *spatial)
SHAPES = [
    (3, 5, 29),
    (2, 7, 5, 6, 7),
    (2, 4, 3, 1, 5),
    (2, 3, 2, 3, 2, 2),
    (1, 1, 9, 8),
    (3, 5, 1, 1),
    (4, 8, 1, 2),
    (2, 15, 13, 1),
    (70, 4, 3, 3),  # several samples per task
    (1, 300, 2, 3),
    (2, 70, 7, 7),
    (2, 64, 14, 14),
    (1, 2, 9000),
    (1, 24, 64, 80),  # several tasks per sample
    (1, 64, 40, 64),  # several rounds of a CUDA thread block
    (1, 2048, 7, 7),  # several tasks, each with rows of several channels
]


def features(*shape: int, layout: str = "planar", dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(*shape, dtype=torch.float64).to(dtype)
    return x if layout == "planar" else x.movedim(1, -1).contiguous().movedim(-1, 1)


def embed(x: Tensor, *pads: int, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    """Copy ``x`` into a view of a larger tensor, with ``pads`` before and after C, H and W."""
    sizes = [n + a + b for n, a, b in zip(x.shape[1:], pads[::2], pads[1::2], strict=True)]
    view = x.new_full((len(x), *sizes), 7.0).contiguous(memory_format=layout)
    for d, (n, a) in enumerate(zip(x.shape[1:], pads[::2], strict=True)):
        view = view.narrow(1 + d, a, n)
    return view.copy_(x)


# Each copies (B, C, H, W) into another memory layout.
STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "planar": lambda x: x.contiguous(),
    "interleaved": lambda x: x.contiguous(memory_format=CHANNELS_LAST),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "channel slice": lambda x: embed(x, 2, 1, 0, 0, 0, 0),
    "channels apart": lambda x: embed(x, 0, 0, 0, 1, 0, 0),
    "crop": lambda x: embed(x, 0, 0, 1, 2, 2, 0),
    "interleaved slice": lambda x: embed(x, 1, 3, 0, 0, 0, 0, layout=CHANNELS_LAST),
    "aligned slice": lambda x: embed(x, 8, 8, 0, 0, 0, 0, layout=CHANNELS_LAST),
    "unaligned": lambda x: x.new_zeros(x.numel() + 1)[1:].view(x.shape).copy_(x),
    "batch innermost": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
}


def strided_views() -> list[Tensor]:
    """Return features laid out as in STRIDES, or with steps, slices and expanded dimensions."""
    x = torch.randn(4, 12, 9, 10)
    last = x.contiguous(memory_format=CHANNELS_LAST)
    return [
        *(copy_to(x) for copy_to in STRIDES.values()),
        x[::2],
        x[:, :, ::2, ::3],
        x.transpose(1, 2),
        x[:1].expand_as(x),
        x[:, :1].expand_as(x),
        x[:, :, :1, :1].expand_as(x),
        torch.randn(x.numel() + 3)[3:].view_as(x),
        last[:, :, 2:, :5],
        last[:, 3:4],
        x[:, :, 3:4, :],
        x[:, :, :, 3:4],
    ]
