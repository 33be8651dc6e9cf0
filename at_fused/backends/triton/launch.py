"""The host's side of the kernels: layouts, tile sizes, how the work is cut, launches."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from at_fused.backends.checks import require, without_first
from at_fused.backends.results import accumulate_dtype
from at_fused.backends.triton.tiles import Feature, Gradient

# A launch compiles the body once per entry; and a kernel's arguments may take 4 KB.
MAX_ENTRIES = 8

_TILE = 4096  # elements of a tile: 32 to a thread
_ROW_BYTES = 512  # of a tile along the contiguous dimension
_PIECE_BYTES = 64 * 1024  # at least this much to a program, where samples are cut
FINISH = 512  # elements of a map that are finished at a time


# ---- layouts -------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """Shape and strides as the kernels take them; see ``tiles.Feature``."""

    channels: int
    positions: int
    planar: bool
    batch: int
    line: int
    align: int
    wide: bool


@functools.lru_cache(maxsize=4096)
def layout_of(shape: tuple[int, ...], stride: tuple[int, ...]) -> Layout | None:
    """The native layout of a (B, C, *spatial) tensor; None where it has none."""
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
    extent = (outer - 1) * line + inner
    # A single sample has the stride of several dense ones, so that one kernel serves both.
    batch = stride[0] if shape[0] > 1 else max(outer * line, inner)
    align = math.gcd(batch, line, inner, 16)
    return Layout(channels, positions, planar, batch, line, align, extent >= 2**31)


def native(x: Tensor) -> tuple[Tensor, Layout]:
    """A feature, copied where its strides are no layout."""
    layout = layout_of(x.shape, x.stride())
    if layout is None:
        x = x.contiguous()
        layout = layout_of(x.shape, x.stride())
        assert layout is not None
    return x, layout


def power_of_2(n: int) -> int:
    """The next power of 2."""
    return 1 << (n - 1).bit_length()


@functools.lru_cache(maxsize=4096)
def blocks_of(layout: Layout, itemsize: int, p: float, halvings: int = 0) -> tuple[int, int]:
    """Channels and positions of a tile, which is halved for kernels that take more registers."""
    sizes = layout.channels, layout.positions
    inner, outer = reversed(sizes) if layout.planar else sizes
    elements = _TILE >> halvings
    # What takes more registers per element: fp64, a general power, an address for each element.
    for more in (itemsize == 8, p not in (1, 2, 3, 4), layout.align * itemsize < 16):
        elements = elements // 2 if more else elements
    across = min(power_of_2(inner), _ROW_BYTES // itemsize, elements)
    down = min(power_of_2(outer), elements // across)
    return (down, across) if layout.planar else (across, down)


constexpr = functools.lru_cache(maxsize=4096, typed=True)(tl.constexpr)  # True is not 1


def feature_of(x: Tensor, layout: Layout, maps: Tensor, p: float, halvings: int = 0) -> Feature:
    """The record of a feature."""
    channels, positions = layout.channels, layout.positions
    inner, outer = (positions, channels) if layout.planar else (channels, positions)
    block_c, block_n = blocks_of(layout, x.element_size(), p, halvings)
    return Feature(
        x,
        maps,
        layout.batch // layout.align,
        layout.line // layout.align,
        inner // layout.align,
        outer,
        constexpr(layout.planar),
        constexpr(layout.align),
        constexpr(layout.wide),
        constexpr(block_c),
        constexpr(block_n),
    )


def gradient_of(out: Tensor, layout: Layout) -> Gradient:
    """The record of a gradient."""
    return Gradient(
        out,
        layout.batch // layout.align,
        layout.line // layout.align,
        constexpr(layout.align),
        constexpr(layout.wide),
    )


def new_map(x: Tensor, layout: Layout) -> Tensor:
    """Memory for a feature's map."""
    return x.new_empty((x.shape[0], layout.positions), dtype=accumulate_dtype(x))


def new_gradients(
    features: list[Tensor], skip_tokens: Sequence[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """Make the features' gradients; return them, and the parts that kernels are to write.

    The rest belongs to skipped tokens, and is 0.
    """
    gradients = [torch.empty_like(x) for x in features]
    for gradient, skip in zip(gradients, skip_tokens, strict=False):
        gradient[:, :, :skip].zero_()
    return gradients, without_first(gradients, skip_tokens)


def writable(x: Tensor, layout: Layout, target: Tensor) -> tuple[Tensor, Layout, Tensor, Layout]:
    """Return a feature and a tensor of the same layout for its gradient: the target if it has that.

    What was written goes to the target by ``finish_gradient``.
    """
    out, out_layout = target, layout_of(target.shape, target.stride())
    if out_layout is None or out_layout.planar != layout.planar:
        x, layout = native(x.contiguous())
        out = x.new_empty(x.shape)
        out_layout = layout_of(out.shape, out.stride())
        assert out_layout is not None
    return x, layout, out, out_layout


def finish_gradient(target: Tensor, written: Tensor) -> None:
    """Copy a gradient to its target where it was written elsewhere."""
    if written is not target:
        target.copy_(written)


# ---- cutting -------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def processors(device: torch.device) -> int:
    """Multiprocessors; as many as an H100's in the interpreter."""
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def piece_bytes(total: int, device: torch.device) -> int:
    """How much of a list of ``total`` bytes a program should have."""
    return max(_PIECE_BYTES, total // (8 * processors(device)))


def cut(positions: int, size: int, piece: int, step: int) -> tuple[int, int]:
    """Pieces of a sample of ``size`` bytes, and how many steps along its positions each has."""
    steps = -(-positions // step)
    each = -(-steps // min(-(-size // piece), steps))
    return -(-steps // each), each


# ---- launches ------------------------------------------------------------------------------------


def exponent(p: float) -> tuple[float, float]:
    """P as HIGH + LOW: see ``powers``."""
    high = math.floor(p * 256) / 256
    return high, p - high


def interpreted() -> bool:
    """Whether Triton interprets."""
    return bool(triton.knobs.runtime.interpret)


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one."""
    require(
        x.is_cuda or interpreted(),
        f"Triton runs {x.device.type} tensors under TRITON_INTERPRET=1 only",
    )
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def options(cuda: bool) -> dict[str, Any]:
    """Triton's own options of every launch."""
    found: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}
    if cuda:
        # A bound of its own keeps ptxas from spilling a word or two for the sake of occupancy.
        found["maxnreg"] = 128
    return found


def steps_of(loss_gradient: Tensor | None) -> tuple[int, int]:
    """Return the strides from one pair's and one sample's loss gradient to the next; 0 for none."""
    strides = () if loss_gradient is None else loss_gradient.stride()
    pair, sample = (*strides, 0, 0)[:2]
    return pair, sample


_options = options(cuda=torch.version.cuda is not None)


def start(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Launches."""
    kernel[(programs,)](*arguments, **constants, **_options)
