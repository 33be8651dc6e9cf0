"""The gradients of a list of features: ``sweep_kernel``."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from at_fused.backends.checks import check_attention_map_backward, without_first
from at_fused.backends.triton import launch
from at_fused.backends.triton.launch import (
    exponent,
    feature_of,
    finish_gradient,
    gradient_of,
    native,
    new_gradients,
    on_device,
    steps_of,
    writable,
)
from at_fused.backends.triton.powers import slope
from at_fused.backends.triton.scalars import number, number_of
from at_fused.backends.triton.tiles import (
    Feature,
    Gradient,
    channels_of,
    load_coefficients,
    offsets_of,
    positions_of,
    sample_of,
    store_gradient,
)


class Sweep(NamedTuple):
    """A feature (its ``map`` holds the coefficients) whose gradient is wanted.

    With ``winners`` only the channels named there have one.
    """

    feature: Feature
    gradient: Gradient
    winners: Tensor | None
    number: int  # and the rest by ``number_of``
    first_program: int
    end_program: int
    tiles_c: int
    tiles_n: int


@triton.jit
def _store_winners(
    feature,
    gradient,
    winners,
    k,
    b,
    first,
    n,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
):
    """Writes k[n] * |x|^(p-1) * sign(x) for the winners of one tile, of which alone x is read."""
    c = first + tl.arange(0, feature.BLOCK_C)
    channels = channels_of(feature)
    positions = positions_of(feature)
    inside = n < positions
    winner = tl.load(winners + b.to(tl.int64) * positions + n, mask=inside, other=-1)
    here = (winner >= first) & (winner < tl.minimum(first + feature.BLOCK_C, channels))
    x = tl.load(
        sample_of(feature, b) + offsets_of(feature, winner, n, feature.PLANAR), mask=here, other=0.0
    )
    only = k * slope(x.to(k.dtype), HIGH, LOW)
    result = tl.where(c[:, None] == winner[None, :], only[None, :], 0.0)
    tl.store(
        sample_of(gradient, b) + offsets_of(gradient, c[:, None], n[None, :], feature.PLANAR),
        result.to(gradient.data.dtype.element_ty),
        mask=(c < channels)[:, None] & inside[None, :],
    )


@triton.jit
def _sweep_of_feature(
    feature,
    entry,
    local,
    loss_gradient,
    pair_step,
    sample_step,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
):
    tiles_c = number(entry.tiles_c)
    tiles_n = number(entry.tiles_n)
    tile_n = local % tiles_n
    rest = local // tiles_n
    b = rest // tiles_c
    first = (rest % tiles_c) * feature.BLOCK_C
    n = tile_n * feature.BLOCK_N + tl.arange(0, feature.BLOCK_N)
    if loss_gradient is not None:
        loss_gradient += number(entry.number) * pair_step + b * sample_step
    k = load_coefficients(feature, b, n, n < positions_of(feature), loss_gradient)
    if entry.winners is None:
        c = first + tl.arange(0, feature.BLOCK_C)
        store_gradient(feature, entry.gradient, k, b, c, n, HIGH, LOW)
    else:
        _store_winners(feature, entry.gradient, entry.winners, k, b, first, n, HIGH, LOW)


@triton.jit(do_not_specialize=["loss_gradient", "pair_step", "sample_step"])
def sweep_kernel(
    entries,
    loss_gradient,
    pair_step,
    sample_step,
    COUNT: tl.constexpr,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
):
    """The gradients of a list of features (``Sweep``), a tile to a program."""
    program = tl.program_id(0)
    for i in tl.static_range(COUNT):
        first = number(entries[i].first_program)
        if (program >= first) & (program < number(entries[i].end_program)):
            _sweep_of_feature(
                entries[i].feature,
                entries[i],
                program - first,
                loss_gradient,
                pair_step,
                sample_step,
                HIGH,
                LOW,
            )


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
    with on_device(features[0]):
        gradients, targets = new_gradients(features, skip_tokens)
        mapped = without_first(features, skip_tokens)
        sweep(mapped, coefficients, targets, loss_gradient, pairs, p, channels)
    return gradients


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
    high, low = exponent(p)
    for first in range(0, len(features), launch.MAX_ENTRIES):
        entries: list[Sweep] = []
        written: list[tuple[Tensor, Tensor]] = []
        programs = 0
        for i in range(first, min(first + launch.MAX_ENTRIES, len(features))):
            x, layout, out, out_layout = writable(*native(features[i]), targets[i])
            k = coefficients[i].contiguous()
            written.append((targets[i], out))
            feature = feature_of(x, layout, k, p)
            tiles_c = -(-layout.channels // feature.BLOCK_C.value)
            tiles_n = -(-k.shape[1] // feature.BLOCK_N.value)
            end = programs + x.shape[0] * tiles_c * tiles_n
            entries.append(
                Sweep(
                    feature,
                    gradient_of(out, out_layout),
                    channels[i].contiguous() if channels else None,
                    *map(number_of, (pairs[i], programs, end, tiles_c, tiles_n)),
                )
            )
            programs = end
        launch.start(
            sweep_kernel,
            programs,
            tuple(entries),
            loss_gradient,
            *steps_of(loss_gradient),
            COUNT=len(entries),
            HIGH=high,
            LOW=low,
        )
        for target, out in written:
            finish_gradient(target, out)
