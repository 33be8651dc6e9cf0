"""Host side of the kernels: records of features, division of the work, launches."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from at_fused.backends import eager
from at_fused.backends.checks import require
from at_fused.backends.triton import interpreted
from at_fused.backends.triton.tiles import Entry, Feature, LossGradient, encode_int

# The kernel's body is compiled once per entry, and its arguments may take at most 4 KB.
MAX_ENTRIES = 8

_TILE = 4096  # elements per tile: 32 per thread
_ROW_BYTES = 512  # bytes of a tile along the contiguous dimension
_PIECE_BYTES = 64 * 1024  # approximate bytes that a program reads of a split sample

constexpr = functools.lru_cache(maxsize=4096, typed=True)(tl.constexpr)  # typed: True is not 1


def next_power_of_2(n: int) -> int:
    """Return the smallest power of 2 that is at least n."""
    return 1 << (n - 1).bit_length()


# ---- features ------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _layout(
    shape: tuple[int, ...], stride: tuple[int, ...], itemsize: int, p: float, halvings: int
) -> Feature | None:
    """Return the record of a (B, C, *spatial) tensor without data; None for other strides."""
    channels, channel = shape[1], stride[1]
    positions, position = 1, 0
    for size, step in zip(reversed(shape[2:]), reversed(stride[2:]), strict=True):
        if size == 1:
            continue
        if positions == 1:
            position = step
        if step != position * positions:
            return None
        positions *= size
    if positions > 1 and position == 1:
        planar = True
    elif channel == 1 or channels == 1:
        planar = False
    elif positions == 1:
        planar = True
    else:
        return None
    inner, outer = (positions, channels) if planar else (channels, positions)
    # The stride of a dimension of size 1 is arbitrary.
    line_stride = (channel if planar else position) if outer > 1 else 0
    # A single sample gets the stride of a dense batch, so that it needs no kernel of its own.
    batch_stride = stride[0] if shape[0] > 1 else max(outer * line_stride, inner)
    align = math.gcd(batch_stride, line_stride, inner, 16)

    elements = _TILE >> halvings
    # fp64, a general power, and an address per element need more registers per element.
    for needs_more in (itemsize == 8, p not in (1, 2, 3, 4), align * itemsize < 16):
        elements = elements // 2 if needs_more else elements
    across = min(next_power_of_2(inner), _ROW_BYTES // itemsize, elements)
    down = min(next_power_of_2(outer), elements // across)
    wide = (outer - 1) * line_stride + inner >= 2**31
    compiled = planar, align, wide, *((down, across) if planar else (across, down))
    numbers = batch_stride // align, line_stride // align, inner // align, outer
    return Feature(None, *numbers, *map(constexpr, compiled))


def layout_of(x: Tensor, p: float, halvings: int = 0) -> Feature | None:
    """Return the record of a tensor without a copy; None if its strides do not allow that.

    ``halvings`` halves the tiles, for kernels that need more registers.
    """
    layout = _layout(x.shape, x.stride(), x.element_size(), p, halvings)
    return layout and layout._replace(data=x)


def feature_of(x: Tensor, p: float, halvings: int = 0) -> Feature:
    """Return the record of a feature, or of a contiguous copy if its strides require one."""
    feature = layout_of(x, p, halvings) or layout_of(x.contiguous(), p, halvings)
    assert feature is not None
    return feature


def gradient_of(target: Tensor, p: float) -> Feature:
    """Return the record of a gradient to write: the target, or a buffer for ``copy_back``."""
    return layout_of(target, p) or feature_of(target.new_empty(target.shape), p)


def copy_back(gradient: Feature, target: Tensor) -> None:
    """Copy a gradient to its target if it was written to a buffer."""
    if gradient.data is not target:
        target.copy_(gradient.data)


def new_gradients(
    features: list[Tensor], skip_tokens: Sequence[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """Allocate the gradients; return them, and views of them without the skipped tokens.

    Kernels write the views. The gradients of skipped tokens are set to 0.
    """
    gradients = [torch.empty_like(x) for x in features]
    for gradient, skip in zip(gradients, skip_tokens, strict=False):
        gradient[:, :, :skip].zero_()
    return gradients, eager.without_skipped(gradients, skip_tokens)


# ---- division of the work ------------------------------------------------------------------------


def split_sample(positions: int, size: int, step: int) -> tuple[int, int]:
    """Return the number of pieces of a sample of ``size`` bytes, and the steps per piece."""
    steps = -(-positions // step)
    steps_per_piece = -(-steps // min(-(-size // _PIECE_BYTES), steps))
    return -(-steps // steps_per_piece), steps_per_piece


# ---- launches ------------------------------------------------------------------------------------


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's GPU the current one."""
    require(
        x.is_cuda or interpreted(),
        f"Triton needs CUDA tensors, got {x.device.type}; set TRITON_INTERPRET=1 for CPU tensors",
    )
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def options(cuda: bool) -> dict[str, Any]:
    """Return Triton's options for every launch."""
    launch_options: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}
    if cuda:
        # Without an explicit bound, ptxas spills a word or two to raise the occupancy.
        launch_options["maxnreg"] = 128
    return launch_options


_options = options(cuda=torch.version.cuda is not None)


def start(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Launch a kernel."""
    kernel[(programs,)](*arguments, **constants, **_options)


def start_list(
    kernel: Any, work: Sequence[tuple[Any, int]], *arguments: Any, **constants: Any
) -> None:
    """Launch a kernel on a list of records, each with its number of programs."""
    for first in range(0, len(work), MAX_ENTRIES):
        entries, programs = [], 0
        for record, count in work[first : first + MAX_ENTRIES]:
            entries.append(Entry(record, encode_int(programs), encode_int(programs + count)))
            programs += count
        start(kernel, programs, tuple(entries), *arguments, **constants)


def loss_gradient_of(loss_gradient: Tensor | None) -> LossGradient | None:
    """Return the record of the gradients of the losses."""
    if loss_gradient is None:
        return None
    pair, sample = (*loss_gradient.stride(), 0, 0)[:2]
    return LossGradient(loss_gradient, encode_int(pair), encode_int(sample))
