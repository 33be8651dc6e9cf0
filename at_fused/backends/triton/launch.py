"""The host's side of the kernels: records of features, how the work is cut, launches."""

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
from at_fused.backends.triton.tiles import Above, Entry, Feature, number_of

# A launch compiles the body once per entry; and a kernel's arguments may take 4 KB.
MAX_ENTRIES = 8

_TILE = 4096  # elements of a tile: 32 to a thread
_ROW_BYTES = 512  # of a tile along the contiguous dimension
_PIECE_BYTES = 64 * 1024  # about this much to a program, where samples are cut

constexpr = functools.lru_cache(maxsize=4096, typed=True)(tl.constexpr)  # True is not 1


def power_of_2(n: int) -> int:
    """Return the next power of 2."""
    return 1 << (n - 1).bit_length()


# ---- features ------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _layout(
    shape: tuple[int, ...], stride: tuple[int, ...], itemsize: int, p: float, halvings: int
) -> Feature | None:
    """Make the record of a (B, C, *spatial) tensor, without data; None for other strides."""
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
    # A stride that is never taken may be anything.
    line = (channel if planar else position) if outer > 1 else 0
    # A single sample has the stride of several dense ones, so that one kernel serves both.
    batch = stride[0] if shape[0] > 1 else max(outer * line, inner)
    align = math.gcd(batch, line, inner, 16)

    elements = _TILE >> halvings
    # What takes more registers per element: fp64, a general power, an address for each element.
    for more in (itemsize == 8, p not in (1, 2, 3, 4), align * itemsize < 16):
        elements = elements // 2 if more else elements
    across = min(power_of_2(inner), _ROW_BYTES // itemsize, elements)
    down = min(power_of_2(outer), elements // across)
    wide = (outer - 1) * line + inner >= 2**31
    compiled = planar, align, wide, *((down, across) if planar else (across, down))
    numbers = batch // align, line // align, inner // align, outer
    return Feature(None, *numbers, *map(constexpr, compiled))


def layout_of(x: Tensor, p: float, halvings: int = 0) -> Feature | None:
    """Make the record of a tensor as it lies; None where its strides do not allow that.

    Tiles are halved for kernels that take more registers.
    """
    found = _layout(x.shape, x.stride(), x.element_size(), p, halvings)
    return found and found._replace(data=x)


def feature_of(x: Tensor, p: float, halvings: int = 0) -> Feature:
    """Make the record of a feature, or of a copy where its strides do not allow that."""
    found = layout_of(x, p, halvings) or layout_of(x.contiguous(), p, halvings)
    assert found is not None
    return found


def gradient_of(target: Tensor, p: float) -> Feature:
    """Make the record of a gradient to be written; ``copy_back`` brings it to odd strides."""
    return layout_of(target, p) or feature_of(target.new_empty(target.shape), p)


def copy_back(gradient: Feature, target: Tensor) -> None:
    """Copy a gradient to its target where it was written elsewhere."""
    if gradient.data is not target:
        target.copy_(gradient.data)


def new_gradients(
    features: list[Tensor], skip_tokens: Sequence[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """Make the features' gradients; return them, and the parts that kernels are to write.

    The rest belongs to skipped tokens, and is 0.
    """
    gradients = [torch.empty_like(x) for x in features]
    for gradient, skip in zip(gradients, skip_tokens, strict=False):
        gradient[:, :, :skip].zero_()
    return gradients, eager.without_first(gradients, skip_tokens)


# ---- cutting -------------------------------------------------------------------------------------


def cut(positions: int, size: int, step: int) -> tuple[int, int]:
    """Return the pieces of a sample of ``size`` bytes, and the steps of each along positions."""
    steps = -(-positions // step)
    each = -(-steps // min(-(-size // _PIECE_BYTES), steps))
    return -(-steps // each), each


# ---- launches ------------------------------------------------------------------------------------


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's GPU the current one."""
    require(
        x.is_cuda or interpreted(),
        f"Triton runs {x.device.type} tensors under TRITON_INTERPRET=1 only",
    )
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def options(cuda: bool) -> dict[str, Any]:
    """Return Triton's own options of every launch."""
    found: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}
    if cuda:
        # A bound of its own keeps ptxas from spilling a word or two for the sake of occupancy.
        found["maxnreg"] = 128
    return found


_options = options(cuda=torch.version.cuda is not None)


def start(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Launch a kernel."""
    kernel[(programs,)](*arguments, **constants, **_options)


def start_list(
    kernel: Any, work: Sequence[tuple[Any, int]], *arguments: Any, **constants: Any
) -> None:
    """Launch a kernel on a list of records, each with how many programs it takes."""
    for first in range(0, len(work), MAX_ENTRIES):
        entries, programs = [], 0
        for record, count in work[first : first + MAX_ENTRIES]:
            entries.append(Entry(record, number_of(programs), number_of(programs + count)))
            programs += count
        start(kernel, programs, tuple(entries), *arguments, **constants)


def above_of(loss_gradient: Tensor | None) -> Above | None:
    """Make the record of the gradients that come from above."""
    if loss_gradient is None:
        return None
    pair, sample = (*loss_gradient.stride(), 0, 0)[:2]
    return Above(loss_gradient, number_of(pair), number_of(sample))
