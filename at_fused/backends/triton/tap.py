"""A gradient that passes, and the one of its feature's map added to it: ``tap_kernel``."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from at_fused.backends import eager
from at_fused.backends.checks import check_apart, check_tap
from at_fused.backends.triton import launch
from at_fused.backends.triton.launch import (
    Layout,
    constexpr,
    exponent,
    feature_of,
    finish_gradient,
    gradient_of,
    layout_of,
    native,
    on_device,
    power_of_2,
    writable,
)
from at_fused.backends.triton.powers import slope
from at_fused.backends.triton.scalars import double, double_of
from at_fused.backends.triton.tiles import (
    channels_of,
    load_coefficients,
    offsets_of,
    positions_of,
    sample_of,
    store_gradient,
)

_Native = tuple[Tensor, Layout]

_WINNERS = 128  # of a program: scattered as they are, one to a thread


@triton.jit
def _add_to_winners(
    feature,
    gradient,
    winners,
    k,
    b,
    n,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
):
    """Adds k[n] * |x|^(p-1) * sign(x) where a position's winner is; no more is read or written."""
    positions = positions_of(feature)
    winner = tl.load(winners + b.to(tl.int64) * positions + n, mask=n < positions, other=-1)
    here = (winner >= 0) & (winner < channels_of(feature))
    x = tl.load(
        sample_of(feature, b) + offsets_of(feature, winner, n, feature.PLANAR), mask=here, other=0.0
    )
    place = sample_of(gradient, b) + offsets_of(gradient, winner, n, feature.PLANAR)
    before = tl.load(place, mask=here, other=0.0)
    result = k * slope(x.to(k.dtype), HIGH, LOW) + before.to(k.dtype)
    tl.store(place, result.to(gradient.data.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["tiles_c", "tiles_n"])
def tap_kernel(
    feature,
    gradient,
    addend,
    winners,
    factor,
    tiles_c,
    tiles_n,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
):
    """``addend`` (a ``Gradient``) and the map's gradient into ``gradient``, a tile to a program.

    The two may be one: an element is written where it was read. With ``winners`` they are, and
    ``addend`` is None.
    """
    program = tl.program_id(0)
    n = program % tiles_n * feature.BLOCK_N + tl.arange(0, feature.BLOCK_N)
    rest = program // tiles_n
    b = rest // tiles_c
    k = load_coefficients(feature, b, n, n < positions_of(feature), None)
    k *= double(factor).to(k.dtype)
    if winners is None:
        c = rest % tiles_c * feature.BLOCK_C + tl.arange(0, feature.BLOCK_C)
        store_gradient(feature, gradient, k, b, c, n, HIGH, LOW, addend)
    else:
        _add_to_winners(feature, gradient, winners, k, b, n, HIGH, LOW)


def _launch(
    x: _Native,
    out: _Native,
    given: _Native,
    map_gradient: Tensor,
    p: float,
    collapse: str,
    channels: Tensor | None,
) -> None:
    """``given`` and the map's gradient into ``out``; with ``channels`` the two are one tensor."""
    data, layout = x
    feature = feature_of(data, layout, map_gradient.contiguous(), p)
    tiles_c = 1
    if channels is None:
        tiles_c = -(-layout.channels // feature.BLOCK_C.value)
    else:
        channels = channels.contiguous()
        feature = feature._replace(BLOCK_N=constexpr(min(power_of_2(layout.positions), _WINNERS)))
    tiles_n = -(-layout.positions // feature.BLOCK_N.value)
    high, low = exponent(p)
    launch.start(
        tap_kernel,
        data.shape[0] * tiles_c * tiles_n,
        feature,
        gradient_of(*out),
        gradient_of(*given) if channels is None else None,
        channels,
        double_of(p * eager.collapse_scale(data, collapse)),
        tiles_c,
        tiles_n,
        HIGH=high,
        LOW=low,
    )


def attention_tap_backward(
    gradient: Tensor,
    feature: Tensor,
    map_gradient: Tensor,
    p: float,
    collapse: str,
    channels: Tensor | None = None,
) -> Tensor:
    """G + scale * p * dL/dQ[b, n] * |A|^(p-1) * sign(A), in the feature's dtype and layout."""
    check_tap(gradient, feature, map_gradient, p, collapse, channels)
    with on_device(feature):
        result = torch.empty_like(feature)
        x, layout, out, out_layout = writable(*native(feature), result)
        given, given_layout = gradient, layout_of(gradient.shape, gradient.stride())
        # Of a copy only the winners are left to change.
        if channels is not None or given_layout is None or given_layout.planar != layout.planar:
            given, given_layout = out.copy_(gradient), out_layout
        _launch(
            (x, layout),
            (out, out_layout),
            (given, given_layout),
            map_gradient,
            p,
            collapse,
            channels,
        )
        finish_gradient(result, out)
    return result


def _bytes(x: Tensor) -> tuple[int, int]:
    """From a tensor's first to its last element."""
    last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def _apart(x: Tensor, written: Tensor) -> Tensor:
    """The tensor, or a copy where it shares memory with what is written."""
    (begin, end), (first, last) = _bytes(x), _bytes(written)
    return x.clone() if begin < last and first < end else x


def attention_tap_backward_(
    gradient: Tensor,
    feature: Tensor,
    map_gradient: Tensor,
    p: float,
    collapse: str,
    channels: Tensor | None = None,
) -> None:
    """``attention_tap_backward``, written into ``gradient``."""
    check_tap(gradient, feature, map_gradient, p, collapse, channels)
    check_apart(gradient)
    # What may lie where the gradient is written is read from a copy.
    feature, map_gradient = _apart(feature, gradient), _apart(map_gradient, gradient)
    channels = None if channels is None else _apart(channels, gradient)
    with on_device(feature):
        x, out = native(feature), native(gradient)
        if out[1].planar != x[1].planar:
            x, out = native(x[0].contiguous()), native(out[0].contiguous())
        _launch(x, out, out, map_gradient, p, collapse, channels)
        if out[0] is not gradient:
            gradient.copy_(out[0])
