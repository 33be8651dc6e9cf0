"""The gradients of a list of features, added to what passes or not: ``sweep_kernel``."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from at_fused.backends import eager
from at_fused.backends.checks import check_apart, check_attention_map_backward, check_tap
from at_fused.backends.triton import launch
from at_fused.backends.triton.launch import constexpr, feature_of, gradient_of, layout_of
from at_fused.backends.triton.tiles import (
    Feature,
    addresses,
    channels_of,
    double,
    double_of,
    is_mine,
    number,
    number_of,
    positions_of,
    program_of,
    slope,
    store_gradient,
    times_above,
)

_WINNERS = 128  # of a program: scattered as they are, one to a thread


class Sweep(NamedTuple):
    """A feature whose gradient is wanted, plus ``addend`` where there is one.

    The two may be one: an element is written where it was read. With ``winners`` only the channels
    named there are written; an addend is the gradient's own memory then.
    """

    feature: Feature
    gradient: Feature
    addend: Feature | None
    coefficients: Tensor  # (B, N)
    winners: Tensor | None  # (B, N)
    pair: int  # this and the following by ``number_of``
    tiles_c: int
    tiles_n: int


@triton.jit
def _store_winners(feature, gradient, addend, winners, k, b, n, P: tl.constexpr):
    """Store the gradient at the winners of positions n, and read and write nothing else."""
    inside = n < positions_of(feature)
    c = tl.load(winners + b.to(tl.int64) * positions_of(feature) + n, mask=inside, other=-1)
    here = (c >= 0) & (c < channels_of(feature))
    x = tl.load(addresses(feature, b, c, n), mask=here, other=0.0)
    result = k * slope(x.to(k.dtype), P)
    place = addresses(gradient, b, c, n)
    if addend is not None:
        result += tl.load(place, mask=here, other=0.0).to(k.dtype)
    tl.store(place, result.to(gradient.data.dtype.element_ty), mask=here)


@triton.jit
def _sweep_tile(entry, program, factor, above, P: tl.constexpr):
    rest = program // number(entry.tiles_n)
    b = rest // number(entry.tiles_c)
    first = rest % number(entry.tiles_c) * entry.feature.BLOCK_C
    n = program % number(entry.tiles_n) * entry.feature.BLOCK_N
    n += tl.arange(0, entry.feature.BLOCK_N)
    positions = positions_of(entry.feature)
    k = tl.load(entry.coefficients + b.to(tl.int64) * positions + n, mask=n < positions, other=0.0)
    k *= double(factor).to(k.dtype)
    k = times_above(k, above, entry.pair, b)
    if entry.winners is None:
        c = first + tl.arange(0, entry.feature.BLOCK_C)
        store_gradient(entry.feature, entry.gradient, k, b, c, n, P, entry.addend)
    else:
        _store_winners(entry.feature, entry.gradient, entry.addend, entry.winners, k, b, n, P)


@triton.jit
def sweep_kernel(entries, factor, above, P: tl.constexpr):
    """The gradients of a list of features (``Sweep``), a tile to a program.

    Coefficients are multiplied by ``factor``, and by the gradients of their losses if given.
    """
    for i in tl.static_range(len(entries)):
        if is_mine(entries[i]):
            _sweep_tile(entries[i].record, program_of(entries[i]), factor, above, P)


def _work(
    feature: Feature,
    gradient: Feature,
    addend: Feature | None,
    coefficients: Tensor,
    winners: Tensor | None,
    pair: int = 0,
) -> tuple[Sweep, int]:
    """Make the record of a feature's sweep, and count its programs."""
    batch, positions = coefficients.shape
    tiles_c = -(-feature.data.shape[1] // feature.BLOCK_C.value)
    if winners is not None:
        winners = winners.contiguous()
        tiles_c = 1
        block = min(launch.power_of_2(positions), _WINNERS)
        feature = feature._replace(BLOCK_N=constexpr(block))
    tiles_n = -(-positions // feature.BLOCK_N.value)
    numbers = map(number_of, (pair, tiles_c, tiles_n))
    entry = Sweep(feature, gradient, addend, coefficients.contiguous(), winners, *numbers)
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
    """Write the gradients of features to targets of their shapes."""
    work = []
    for i, (x, target) in enumerate(zip(features, targets, strict=True)):
        gradient = gradient_of(target, p)
        if channels:
            gradient.data.zero_()
        winners = channels[i] if channels else None
        work.append(_work(feature_of(x, p), gradient, None, coefficients[i], winners, pairs[i]))
    launch.start_list(sweep_kernel, work, double_of(1.0), launch.above_of(loss_gradient), P=p)
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
    """dL/dA = g * k[b, n] * |A|^(p-1) * sign(A) for each feature, in its dtype and layout.

    With ``channels`` only the named channel of each position has a gradient.
    """
    check_attention_map_backward(
        features, coefficients, loss_gradient, pairs, p, skip_tokens, channels
    )
    if not features:
        return []
    with launch.on_device(features[0]):
        gradients, targets = launch.new_gradients(features, skip_tokens)
        mapped = eager.without_first(features, skip_tokens)
        sweep(mapped, coefficients, targets, loss_gradient, pairs, p, channels)
    return gradients


# ---- a gradient that passes, and the one of its feature's map added to it ------------------------


def attention_tap_backward(gradient: Tensor, feature: Tensor, *arguments: Any) -> Tensor:
    """G + scale * p * dL/dQ[b, n] * |A|^(p-1) * sign(A), in the feature's dtype and layout."""
    result = torch.empty_like(feature)
    _tap(result, gradient, feature, *arguments)
    return result


def attention_tap_backward_(gradient: Tensor, *arguments: Any) -> None:
    """``attention_tap_backward``, written into ``gradient``."""
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
        check_apart(gradient)
        # Read a copy of anything that may lie where the gradient is written.
        feature, map_gradient = _apart(feature, gradient), _apart(map_gradient, gradient)
        channels = None if channels is None else _apart(channels, gradient)
    with launch.on_device(feature):
        out, addend = gradient_of(target, p), layout_of(gradient, p)
        # In a copy only the winners are left to change.
        if channels is not None or addend is None:
            addend = out
            if out.data is not gradient:
                out.data.copy_(gradient)
        work = _work(feature_of(feature, p), out, addend, map_gradient, channels)
        factor = double_of(p * eager.collapse_scale(feature, collapse))
        launch.start_list(sweep_kernel, [work], factor, None, P=p)
        launch.copy_back(out, target)


def _apart(x: Tensor, written: Tensor) -> Tensor:
    """Return the tensor, or a copy where it shares memory with what is written."""
    mine, its = x.untyped_storage(), written.untyped_storage()
    begin, first = mine.data_ptr(), its.data_ptr()
    return x.clone() if begin < first + its.nbytes() and first < begin + mine.nbytes() else x
