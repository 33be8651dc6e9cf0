"""The host's side of the kernels: layouts, tile sizes, how the work is cut, launches."""

from __future__ import annotations

import contextlib
import functools
import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from at_fused.backends import eager
from at_fused.backends.triton import kernels
from at_fused.backends.triton.checks import (
    check_coefficients,
    check_collapse,
    check_exponent,
    check_features,
    check_loss,
    check_loss_gradient,
)
from at_fused.backends.triton.kernels import Feature, Gradient, Map, Pair, Sweep

# A launch compiles the body once per entry; and a kernel's arguments may take 4 KB.
MAX_ENTRIES = 8

_TILE = 4096  # elements of a tile: 32 to a thread
_ROW_BYTES = 512  # of a tile along the contiguous dimension
_PIECE_BYTES = 64 * 1024  # at least this much to a program, where samples are cut
_WHOLE_BYTES = 512 * 1024  # a sample up to this size is not cut where its gradient follows
_FINISH = 512  # elements of a map that are finished at a time


# ---- layouts -------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """Shape and strides as the kernels take them; see ``kernels.Feature``."""

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
    batch = stride[0] if shape[0] > 1 else 0
    extent = (outer - 1) * line + inner
    align = math.gcd(batch, line, inner, 16)
    return Layout(channels, positions, planar, batch, line, align, extent >= 2**31)


def _native(x: Tensor) -> tuple[Tensor, Layout]:
    layout = layout_of(x.shape, x.stride())
    if layout is None:
        x = x.contiguous()
        layout = layout_of(x.shape, x.stride())
        assert layout is not None
    return x, layout


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


@functools.lru_cache(maxsize=4096)
def _blocks(layout: Layout, itemsize: int, p: float) -> tuple[int, int]:
    """Channels and positions of a tile."""
    sizes = layout.channels, layout.positions
    inner, outer = reversed(sizes) if layout.planar else sizes
    elements = _TILE
    # What takes more registers per element: fp64, a general power, an address for each element.
    for more in (itemsize == 8, p not in (1, 2, 3, 4), layout.align * itemsize < 16):
        elements = elements // 2 if more else elements
    across = min(_power_of_2(inner), _ROW_BYTES // itemsize)
    down = min(_power_of_2(outer), elements // across)
    return (down, across) if layout.planar else (across, down)


_constexpr = functools.lru_cache(maxsize=4096, typed=True)(tl.constexpr)  # True is not 1


def _feature(x: Tensor, layout: Layout, maps: Tensor, p: float) -> Feature:
    channels, positions = layout.channels, layout.positions
    inner, outer = (positions, channels) if layout.planar else (channels, positions)
    block_c, block_n = _blocks(layout, x.element_size(), p)
    return Feature(
        x,
        maps,
        layout.batch // layout.align,
        layout.line // layout.align,
        inner // layout.align,
        outer,
        _constexpr(layout.planar),
        _constexpr(layout.align),
        _constexpr(layout.wide),
        _constexpr(block_c),
        _constexpr(block_n),
    )


def _gradient(out: Tensor, layout: Layout) -> Gradient:
    return Gradient(
        out,
        layout.batch // layout.align,
        layout.line // layout.align,
        _constexpr(layout.align),
        _constexpr(layout.wide),
    )


def _new_map(x: Tensor, layout: Layout) -> Tensor:
    return x.new_empty((x.shape[0], layout.positions), dtype=eager.accumulate_dtype(x))


def _writable(x: Tensor, layout: Layout, given: Tensor) -> tuple[Tensor, Layout, Tensor, Layout]:
    """A feature (its native form), and a tensor of the same layout for its gradient.

    That tensor has the strides of ``empty_like(given)`` where these are a native layout.
    """
    out = torch.empty_like(given)
    out_layout = layout_of(out.shape, out.stride())
    if out_layout is None or out_layout.planar != layout.planar:
        x, layout = _native(x.contiguous())
        out = x.new_empty(x.shape)
        out_layout = layout_of(out.shape, out.stride())
        assert out_layout is not None
    return x, layout, out, out_layout


def _as_empty_like(given: Tensor, written: Tensor) -> Tensor:
    """The gradient with the strides of ``empty_like(given)``."""
    out = torch.empty_like(given)
    return written if written.stride() == out.stride() else out.copy_(written)


# ---- cutting -------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _piece_bytes(total: int, device: torch.device) -> int:
    """How much of a list of ``total`` bytes a program should have."""
    return max(_PIECE_BYTES, total // (8 * _processors(device)))


def _cut(positions: int, size: int, piece: int, step: int) -> tuple[int, int]:
    """Pieces of a sample of ``size`` bytes, and their positions; those are 0 for a single one."""
    wanted = min(-(-size // piece), -(-positions // step))
    span = -(-positions // (wanted * step)) * step
    pieces = -(-positions // span)
    return (pieces, span) if pieces > 1 else (1, 0)


# ---- launches ------------------------------------------------------------------------------------


def _bits(value: float) -> int:
    (bits,) = struct.unpack("<q", struct.pack("<d", value))
    return 2 if bits == 1 else int(bits)  # Triton takes an argument of 1 for a constant


def _exponent(p: float) -> tuple[float, float]:
    high = math.floor(p * 256) / 256
    return high, p - high


def _interpreted() -> bool:
    return bool(triton.knobs.runtime.interpret)


def _on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


_workspaces: dict[tuple[torch.device, int], Tensor] = {}


def _counters(x: Tensor, count: int) -> Tensor:
    """``count`` zeros (int32) for the current stream; kernels leave them zero."""
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        # Zeroed by the graph itself, and in its own memory.
        return torch.zeros(count, dtype=torch.int32, device=x.device)
    key = x.device, torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    found = _workspaces.get(key)
    if found is None or found.numel() < count:
        size = max(4096, _power_of_2(count))
        found = _workspaces[key] = torch.zeros(size, dtype=torch.int32, device=x.device)
    return found


def options(cuda: bool) -> dict[str, Any]:
    """Triton's own options of every launch."""
    found: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}
    if cuda:
        # A bound of its own keeps ptxas from spilling a word or two for the sake of occupancy.
        found["maxnreg"] = 128
    return found


_options = options(cuda=torch.version.cuda is not None)


def _launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    kernel[(programs,)](*arguments, **constants, **_options)


# ---- operators -----------------------------------------------------------------------------------


map_loss = eager.map_loss


def attention_map(
    features: list[Tensor],
    p: float,
    collapse: str,
    absolute: bool = True,
    sizes: Sequence[int] = (),
) -> list[Tensor]:
    """Q[b, n] = scale * sum_c |A[b, c, n]|^p, (B, N), for each feature (B, C, *spatial)."""
    if not features:
        return []
    check_features(features, _interpreted())
    check_collapse(collapse)
    check_exponent(p)
    native = [_native(x) for x in features]
    maps = [_new_map(x, layout) for x, layout in native]
    high, low = _exponent(p)
    with _on_device(features[0]):
        piece = _piece_bytes(sum(x.nbytes for x in features), features[0].device)
        for first in range(0, len(features), MAX_ENTRIES):
            entries: list[Map] = []
            programs = 0
            chunk = slice(first, first + MAX_ENTRIES)
            for (x, layout), out in zip(native[chunk], maps[chunk], strict=True):
                feature = _feature(x, layout, out, p)
                size = x.nbytes // x.shape[0]
                pieces, span = _cut(layout.positions, size, piece, feature.BLOCK_N.value)
                end = programs + x.shape[0] * pieces
                entries.append(Map(feature, programs, end, pieces, _constexpr(span)))
                programs = end
            _launch(
                kernels.map_kernel,
                programs,
                tuple(entries),
                COUNT=len(entries),
                HIGH=high,
                LOW=low,
                MEAN=collapse == "mean",
            )
    return maps


def at_loss(
    student: list[Tensor],
    teacher: list[Tensor],
    weights: list[float],
    p: float,
    collapse: str,
    form: str,
    reduction: str,
    eps: float,
    student_grad: bool,
    teacher_grad: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The loss of all pairs, and what the backward pass needs of them (see ``_ops.py``)."""
    check_features((*student, *teacher), _interpreted())
    check_loss(student, teacher, weights, p, collapse, form, reduction, eps)
    options = Options(p, collapse, form, reduction, eps, student_grad, teacher_grad)
    with _on_device(student[0]):
        loss, maps, _ = _forward(student, teacher, weights, options, None)
    return loss, maps if student_grad or teacher_grad else []


def at_value_and_grad(
    student: list[Tensor],
    teacher: list[Tensor],
    weights: list[float],
    p: float,
    collapse: str,
    form: str,
    reduction: str,
    eps: float,
    scale: float,
    loss_gradient: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """The loss of all pairs, and the students' gradients times ``scale * loss_gradient``.

    One launch; a second one for pairs whose samples are so large that several programs share one.
    """
    check_features((*student, *teacher), _interpreted())
    check_loss(student, teacher, weights, p, collapse, form, reduction, eps)
    check_loss_gradient(loss_gradient, range(len(student)), student[0].device)
    options = Options(p, collapse, form, reduction, eps, True, False)
    upstream = Upstream(scale, loss_gradient)
    with _on_device(student[0]):
        loss, maps, gradients = _forward(student, teacher, weights, options, upstream)
        left = [i for i, gradient in enumerate(gradients) if gradient is None]
        if left:
            found = attention_map_backward(
                [student[i] for i in left], [maps[i] for i in left], None, left, p
            )
            for i, gradient in zip(left, found, strict=True):
                gradients[i] = gradient
    return loss, [gradient for gradient in gradients if gradient is not None]


class Options(NamedTuple):
    """The options of ``at_loss``."""

    p: float
    collapse: str
    form: str
    reduction: str
    eps: float
    student_grad: bool
    teacher_grad: bool


class Upstream(NamedTuple):
    """What dL/dS is multiplied by: ``scale``, and ``loss_gradient`` (a scalar, or one per pair)."""

    scale: float = 1.0
    loss_gradient: Tensor | None = None


def _step(loss_gradient: Tensor | None) -> int:
    """The stride from one pair's loss gradient to the next; 0 for all alike."""
    return 0 if loss_gradient is None or loss_gradient.dim() == 0 else loss_gradient.stride(0)


def _forward(
    student: list[Tensor],
    teacher: list[Tensor],
    weights: list[float],
    options: Options,
    upstream: Upstream | None,
) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """Loss; maps, students first; and with ``upstream`` dL/dS of the pairs that are not cut."""
    count = len(student)
    device = student[0].device
    students, teachers = [_native(x) for x in student], [_native(x) for x in teacher]
    maps = [_new_map(x, layout) for x, layout in students + teachers]
    gradients: list[Tensor | None] = [None] * count
    shape = () if options.reduction == "sum" else (count,)
    loss = student[0].new_empty(shape, dtype=eager.accumulate_dtype(*student, *teacher))
    samples = sum(x.shape[0] for x in student)
    losses = torch.empty(samples + count, dtype=torch.float64, device=device)
    counters = _counters(student[0], samples + count + 1)
    piece = _piece_bytes(sum(x.nbytes for x in (*student, *teacher)), device)
    high, low = _exponent(options.p)
    scale, loss_gradient = upstream or Upstream()

    first_sample = 0
    for first in range(0, count, MAX_ENTRIES):
        entries: list[Pair] = []
        programs = 0
        for i in range(first, min(first + MAX_ENTRIES, count)):
            (s, s_layout), (t, t_layout) = students[i], teachers[i]
            batch, positions = s.shape[0], s_layout.positions
            size = (s.nbytes + t.nbytes) // batch
            step = max(
                _blocks(layout, x.element_size(), options.p)[1]
                for x, layout in (students[i], teachers[i])
            )
            pieces, span = _cut(positions, size, piece, step)
            gradient = None
            if upstream and (size <= _WHOLE_BYTES or batch >= 2 * _processors(device)):
                pieces, span = 1, 0
            if upstream and not span:
                s, s_layout, out, out_layout = _writable(s, s_layout, student[i])
                gradient, gradients[i] = _gradient(out, out_layout), out
            entries.append(
                Pair(
                    _feature(s, s_layout, maps[i], options.p),
                    _feature(t, t_layout, maps[count + i], options.p),
                    gradient,
                    _bits(weights[i] if weights else 1.0),
                    i,
                    batch,
                    first_sample,
                    programs,
                    programs + batch * pieces,
                    pieces,
                    _constexpr(span),
                    _constexpr(min(_power_of_2(positions), _FINISH)),
                )
            )
            first_sample += batch
            programs += batch * pieces
        _launch(
            kernels.loss_kernel,
            programs,
            tuple(entries),
            loss,
            losses,
            counters,
            samples,
            count,
            _bits(options.eps),
            _bits(scale),
            loss_gradient,
            _step(loss_gradient),
            COUNT=len(entries),
            HIGH=high,
            LOW=low,
            MEAN=options.collapse == "mean",
            PAPER=options.form == "paper",
            SUM=options.reduction == "sum",
            STUDENT_GRAD=options.student_grad,
            TEACHER_GRAD=options.teacher_grad,
        )
    restored = [
        None if out is None else _as_empty_like(x, out)
        for x, out in zip(student, gradients, strict=True)
    ]
    return loss, maps, restored


def attention_map_backward(
    features: list[Tensor],
    coefficients: list[Tensor],
    loss_gradient: Tensor | None,
    pairs: list[int],
    p: float,
    absolute: bool = True,
    sizes: Sequence[int] = (),
    channels: Sequence[Tensor] = (),
) -> list[Tensor]:
    """dL/dA = g * k[b, n] * |A|^(p-1) * sign(A) for each feature, in its dtype and layout."""
    check_features(features, _interpreted())
    check_coefficients(features, coefficients, pairs)
    check_exponent(p)
    if not features:
        return []
    check_loss_gradient(loss_gradient, pairs, features[0].device)
    high, low = _exponent(p)
    written: list[Tensor] = []
    with _on_device(features[0]):
        for first in range(0, len(features), MAX_ENTRIES):
            entries: list[Sweep] = []
            programs = 0
            for i in range(first, min(first + MAX_ENTRIES, len(features))):
                x, layout, out, out_layout = _writable(*_native(features[i]), features[i])
                k = coefficients[i].contiguous()
                written.append(out)
                block_c, block_n = _blocks(layout, x.element_size(), p)
                tiles_c = -(-layout.channels // block_c)
                tiles_n = -(-layout.positions // block_n)
                end = programs + x.shape[0] * tiles_c * tiles_n
                entries.append(
                    Sweep(
                        _feature(x, layout, k, p),
                        _gradient(out, out_layout),
                        pairs[i],
                        programs,
                        end,
                        tiles_c,
                        tiles_n,
                    )
                )
                programs = end
            _launch(
                kernels.sweep_kernel,
                programs,
                tuple(entries),
                loss_gradient,
                _step(loss_gradient),
                COUNT=len(entries),
                HIGH=high,
                LOW=low,
            )
    return [_as_empty_like(x, out) for x, out in zip(features, written, strict=True)]
