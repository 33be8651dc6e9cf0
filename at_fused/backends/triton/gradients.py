"""Gradients of a list of features, optionally added to an incoming gradient: ``sweep_kernel``."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from at_fused.backends import eager
from at_fused.backends.checks import check_attention_map_backward, check_no_overlap, check_tap
from at_fused.backends.triton import launch
from at_fused.backends.triton.launch import constexpr, feature_of, gradient_of, layout_of
from at_fused.backends.triton.tiles import (
    Feature,
    addresses,
    channels_of,
    decode_double,
    decode_int,
    encode_double,
    encode_int,
    has_program,
    positions_of,
    program_of,
    slope,
    store_gradient,
    times_loss_gradient,
)

_ARGMAX_BLOCK = 128  # positions per program, one per thread: the channels are scattered


class Sweep(NamedTuple):
    """Record of a feature and its gradient, to which ``addend`` is added if there is one.

    The addend may share the gradient's memory: each element is read before it is written. With
    ``argmax_channels`` only those channels are written. An addend must then be the gradient's
    memory.
    """

    feature: Feature
    gradient: Feature
    addend: Feature | None
    coefficients: Tensor  # (B, N)
    argmax_channels: Tensor | None  # (B, N)
    pair: int  # this and the following with ``encode_int``
    tiles_c: int
    tiles_n: int


@triton.jit
def _store_at_argmax(feature, gradient, addend, argmax_channels, k, b, n, P: tl.constexpr):
    """Store the gradient at the argmax channel of positions n; leave other elements untouched."""
    inside = n < positions_of(feature)
    c = tl.load(argmax_channels + b.to(tl.int64) * positions_of(feature) + n, mask=inside, other=-1)
    is_valid = (c >= 0) & (c < channels_of(feature))
    x = tl.load(addresses(feature, b, c, n), mask=is_valid, other=0.0)
    result = k * slope(x.to(k.dtype), P)
    target = addresses(gradient, b, c, n)
    if addend is not None:
        result += tl.load(target, mask=is_valid, other=0.0).to(k.dtype)
    tl.store(target, result.to(gradient.data.dtype.element_ty), mask=is_valid)


@triton.jit
def _sweep_tile(entry, program, factor, loss_gradient, P: tl.constexpr):
    rest = program // decode_int(entry.tiles_n)
    b = rest // decode_int(entry.tiles_c)
    first = rest % decode_int(entry.tiles_c) * entry.feature.BLOCK_C
    n = program % decode_int(entry.tiles_n) * entry.feature.BLOCK_N
    n += tl.arange(0, entry.feature.BLOCK_N)
    positions = positions_of(entry.feature)
    k = tl.load(entry.coefficients + b.to(tl.int64) * positions + n, mask=n < positions, other=0.0)
    k *= decode_double(factor).to(k.dtype)
    k = times_loss_gradient(k, loss_gradient, entry.pair, b)
    if entry.argmax_channels is None:
        c = first + tl.arange(0, entry.feature.BLOCK_C)
        store_gradient(entry.feature, entry.gradient, k, b, c, n, P, entry.addend)
    else:
        _store_at_argmax(
            entry.feature, entry.gradient, entry.addend, entry.argmax_channels, k, b, n, P
        )


@triton.jit
def sweep_kernel(entries, factor, loss_gradient, P: tl.constexpr):
    """Write the gradients of a list of features (``Sweep``), one tile per program.

    Coefficients are multiplied by ``factor``, and by the gradients of the losses if there are any.
    """
    for i in tl.static_range(len(entries)):
        if has_program(entries[i]):
            _sweep_tile(entries[i].record, program_of(entries[i]), factor, loss_gradient, P)


def _sweep_and_programs(
    feature: Feature,
    gradient: Feature,
    addend: Feature | None,
    coefficients: Tensor,
    argmax_channels: Tensor | None,
    pair: int = 0,
) -> tuple[Sweep, int]:
    """Return the record of a feature's sweep, and its number of programs."""
    batch, positions = coefficients.shape
    tiles_c = -(-feature.data.shape[1] // feature.BLOCK_C.value)
    if argmax_channels is not None:
        argmax_channels = argmax_channels.contiguous()
        tiles_c = 1
        block = min(launch.next_power_of_2(positions), _ARGMAX_BLOCK)
        feature = feature._replace(BLOCK_N=constexpr(block))
    tiles_n = -(-positions // feature.BLOCK_N.value)
    numbers = map(encode_int, (pair, tiles_c, tiles_n))
    entry = Sweep(feature, gradient, addend, coefficients.contiguous(), argmax_channels, *numbers)
    return entry, batch * tiles_c * tiles_n


def sweep(
    features: list[Tensor],
    coefficients: list[Tensor],
    targets: list[Tensor],
    loss_gradient: Tensor | None,
    pairs: list[int],
    p: float,
    channels: Sequence[Tensor] = (),
) -> None:
    """Write the gradients of features to ``targets``, which have their shapes."""
    work = []
    for i, (x, target) in enumerate(zip(features, targets, strict=True)):
        gradient = gradient_of(target, p)
        if channels:
            gradient.data.zero_()
        maximum = channels[i] if channels else None
        arguments = gradient, None, coefficients[i], maximum, pairs[i]
        work.append(_sweep_and_programs(feature_of(x, p), *arguments))
    factor = encode_double(1.0)
    launch.start_list(sweep_kernel, work, factor, launch.loss_gradient_of(loss_gradient), P=p)
    for (entry, _), target in zip(work, targets, strict=True):
        launch.copy_back(entry.gradient, target)


def attention_map_backward(
    features: list[Tensor],
    coefficients: list[Tensor],
    loss_gradient: Tensor | None,
    pairs: list[int],
    p: float,
    skip_tokens: Sequence[int] = (),
    channels: Sequence[Tensor] = (),
) -> list[Tensor]:
    """Return dL/dA = g * k[b, n] * |A|^(p-1) * sign(A) for each feature, in its dtype and layout.

    With ``channels``, only that channel of each position gets a gradient.
    """
    check_attention_map_backward(
        features, coefficients, loss_gradient, pairs, p, skip_tokens, channels
    )
    if not features:
        return []
    with launch.on_device(features[0]):
        gradients, targets = launch.new_gradients(features, skip_tokens)
        mapped = eager.without_skipped(features, skip_tokens)
        sweep(mapped, coefficients, targets, loss_gradient, pairs, p, channels)
    return gradients


# ---- taps ----------------------------------------------------------------------------------------


def attention_tap_backward(gradient: Tensor, feature: Tensor, *arguments: Any) -> Tensor:
    """Return G + scale * p * dL/dQ[b, n] * |A|^(p-1) * sign(A), in A's dtype and layout."""
    result = torch.empty_like(feature)
    _tap(result, gradient, feature, *arguments)
    return result


def attention_tap_backward_(gradient: Tensor, *arguments: Any) -> None:
    """Write the result of ``attention_tap_backward`` into ``gradient``."""
    _tap(gradient, gradient, *arguments)


def _tap(
    target: Tensor,
    gradient: Tensor,
    feature: Tensor,
    map_gradient: Tensor,
    p: float,
    collapse: str,
    channels: Tensor | None = None,
) -> None:
    check_tap(gradient, feature, map_gradient, p, collapse, channels)
    if target is gradient:
        check_no_overlap(gradient)
        # Inputs that share memory with the gradient are copied before it is overwritten.
        feature, map_gradient = _unshared(feature, gradient), _unshared(map_gradient, gradient)
        channels = None if channels is None else _unshared(channels, gradient)
    with launch.on_device(feature):
        out, addend = gradient_of(target, p), layout_of(gradient, p)
        # With channels, only the maxima change: everything else is a copy of the gradient.
        if channels is not None or addend is None:
            addend = out
            if out.data is not gradient:
                out.data.copy_(gradient)
        work = _sweep_and_programs(feature_of(feature, p), out, addend, map_gradient, channels)
        factor = encode_double(p * eager.collapse_scale(feature, collapse))
        launch.start_list(sweep_kernel, [work], factor, None, P=p)
        launch.copy_back(out, target)


def _unshared(x: Tensor, target: Tensor) -> Tensor:
    """Return x, or a copy if it shares memory with ``target``."""
    source, written = x.untyped_storage(), target.untyped_storage()
    begin, first = source.data_ptr(), written.data_ptr()
    return x.clone() if begin < first + written.nbytes() and first < begin + source.nbytes() else x
