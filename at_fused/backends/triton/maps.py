"""Raw maps of a list of features: ``map_kernel``."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from at_fused.backends.triton import launch
from at_fused.backends.triton.checks import (
    check_collapse,
    check_exponent,
    check_features,
    keeps_sign,
)
from at_fused.backends.triton.launch import (
    constexpr,
    cut,
    exponent,
    feature_of,
    native,
    new_map,
    on_device,
    piece_bytes,
)
from at_fused.backends.triton.tiles import Feature, store_map


class Map(NamedTuple):
    """A feature whose map is wanted; ``winners`` where the channels go that have the maximum."""

    feature: Feature
    winners: Tensor | None
    first_program: int
    end_program: int
    pieces: int
    SPAN: Any


@triton.jit
def _map_of_feature(
    entry,
    local,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
    SIGNED: tl.constexpr,
    MEAN: tl.constexpr,
):
    b = local // entry.pieces
    begin = (local % entry.pieces) * entry.SPAN
    store_map(entry.feature, entry.winners, b, begin, entry.SPAN, HIGH, LOW, SIGNED, MEAN)


@triton.jit
def map_kernel(
    entries,
    COUNT: tl.constexpr,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
    SIGNED: tl.constexpr,
    MEAN: tl.constexpr,
):
    """The raw maps of a list of features (``Map``)."""
    program = tl.program_id(0)
    for i in tl.static_range(COUNT):
        if (program >= entries[i].first_program) & (program < entries[i].end_program):
            _map_of_feature(entries[i], program - entries[i].first_program, HIGH, LOW, SIGNED, MEAN)


def attention_map(
    features: list[Tensor],
    p: float,
    collapse: str,
    absolute: bool = True,
    sizes: Sequence[int] = (),
) -> list[Tensor]:
    """Q[b, n] = scale * sum_c |A[b, c, n]|^p, (B, N), for each feature (B, C, *spatial).

    With "max" the largest |A|^p, and behind the maps the channel (int32) of each.
    """
    if not features:
        return []
    check_features(features, launch.interpreted())
    check_exponent(p)
    signed = keeps_sign(p, absolute)
    check_collapse(collapse, signed)
    largest = collapse == "max"
    natives = [native(x) for x in features]
    maps = [new_map(x, layout) for x, layout in natives]
    winners = [torch.empty_like(q, dtype=torch.int32) for q in maps] if largest else []
    high, low = exponent(p)
    with on_device(features[0]):
        piece = piece_bytes(sum(x.nbytes for x in features), features[0].device)
        for first in range(0, len(features), launch.MAX_ENTRIES):
            entries: list[Map] = []
            programs = 0
            for i in range(first, min(first + launch.MAX_ENTRIES, len(features))):
                x, layout = natives[i]
                # The channels take as many registers again as their values.
                feature = feature_of(x, layout, maps[i], p, halvings=int(largest))
                size = x.nbytes // x.shape[0]
                pieces, span = cut(layout.positions, size, piece, feature.BLOCK_N.value)
                end = programs + x.shape[0] * pieces
                entries.append(
                    Map(
                        feature,
                        winners[i] if largest else None,
                        programs,
                        end,
                        pieces,
                        constexpr(span),
                    )
                )
                programs = end
            launch.start(
                map_kernel,
                programs,
                tuple(entries),
                COUNT=len(entries),
                HIGH=high,
                LOW=low,
                SIGNED=signed,
                MEAN=collapse == "mean",
            )
    return maps + winners
