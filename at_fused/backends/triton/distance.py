"""Distances on Triton: arguments, strides, launches."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton.language as tl
from torch import Tensor

from at_fused.backends import eager
from at_fused.backends.checks import check_distance_loss, check_distance_loss_backward
from at_fused.backends.results import accumulate_dtype
from at_fused.backends.triton import distance_kernels as kernels
from at_fused.backends.triton import launch

_BLOCK_BYTES = 4096  # of a side at a time: two accesses of 16 bytes to a thread
_PIECE = 16 * 1024  # elements of a program's piece, at the least


def _order(x: Tensor) -> list[tuple[int, int]]:
    """Stride and size of the dimensions behind the first that are longer than 1."""
    return [(x.stride(d), x.shape[d]) for d in range(1, x.dim()) if x.shape[d] > 1]


def _dense(order: list[tuple[int, int]]) -> bool:
    following = 1
    for stride, size in sorted(order):
        if stride != following:
            return False
        following *= size
    return True


def _native(a: Tensor, b: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The pair, and a place for the gradient, with a sample's elements adjacent in one order."""
    order = _order(a)
    if not (_dense(order) and _order(b) == order and (out is None or _order(out) == order)):
        a, b = a.contiguous(), b.contiguous()
        if out is not None and _order(out) != _order(a):
            out = out.new_empty(out.shape)
    return a, b, out


def _entries(
    pairs: list[tuple[Tensor, Tensor, Tensor | None]],
    numbers: list[int],
    weights: list[float],
    reduction: str,
    gradient: Tensor | None,
) -> Iterator[list[kernels.Pair]]:
    """The pairs, as many at a time as a launch takes; ``numbers`` are those of weights."""
    constant = launch.constexpr
    total = sum(a.numel() for a, _, _ in pairs)
    piece = max(_PIECE, total // (8 * launch.processors(pairs[0][0].device)))
    for first in range(0, len(pairs), launch.MAX_ENTRIES):
        entries: list[kernels.Pair] = []
        programs = 0
        for number, (a, b, out) in zip(
            numbers[first : first + launch.MAX_ENTRIES],
            pairs[first : first + launch.MAX_ENTRIES],
            strict=True,
        ):
            size, batch = a[0].numel(), a.shape[0]
            strides = [0 if x is None else x.stride(0) for x in (a, b, out)]
            align = math.gcd(size, *strides, 16)
            wide = torch.float64 in (a.dtype, b.dtype)
            longest = _BLOCK_BYTES // max(a.element_size(), b.element_size())
            block = min(longest, launch.power_of_2(size))
            # A power of two: a program is compiled for the length of its piece.
            span = max(block, launch.power_of_2(min(size, piece)))
            pieces = -(-size // span)
            end = programs + batch * pieces
            entries.append(
                kernels.Pair(
                    a,
                    b,
                    out,
                    strides[0] // align,
                    strides[1] // align,
                    strides[2] // align,
                    size // align,
                    launch.bits_of(eager.sample_weight(weights, number, batch, reduction)),
                    gradient,
                    number,
                    batch,
                    number * batch,
                    programs,
                    end,
                    pieces,
                    constant(align),
                    constant(span),
                    constant(max(block, 16)),
                    constant(tl.float64 if wide else tl.float32),
                )
            )
            programs = end
        yield entries


def distance_loss(
    student: list[Tensor], teacher: list[Tensor], weights: list[float], root: bool, reduction: str
) -> tuple[Tensor, Tensor]:
    """Weighted means over the batch of the distances, or of their squares; and the squares."""
    check_distance_loss(student, teacher, weights, reduction)
    count, first = len(student), student[0]
    pairs = [_native(x, y, None) for x, y in zip(student, teacher, strict=True)]
    samples = count * first.shape[0]
    with launch.on_device(first):
        loss = first.new_empty(
            () if reduction == "sum" else (count,), dtype=accumulate_dtype(*student, *teacher)
        )
        squares = first.new_empty((count, first.shape[0]), dtype=torch.float64)
        losses = squares.new_empty(samples + count)
        counters = launch.counters_of(first, samples + count + 1)
        for entries in _entries(pairs, list(range(count)), weights, reduction, None):
            programs = entries[-1].end_program
            launch.start(
                kernels.distance_loss_kernel,
                programs,
                tuple(entries),
                squares,
                squares.new_empty(programs),
                loss,
                losses,
                counters,
                samples,
                count,
                COUNT=len(entries),
                ROOT=root,
                SUM=reduction == "sum",
            )
    return loss, squares


def distance_loss_backward(
    a: list[Tensor],
    b: list[Tensor],
    squares: Tensor,
    gradient: Tensor,
    pairs: list[int],
    weights: list[float],
    root: bool,
    reduction: str,
) -> list[Tensor]:
    """The gradient for each a, in its dtype and layout; its pair's number is in ``pairs``."""
    check_distance_loss_backward(a, b, squares, gradient, pairs, weights, reduction)
    results = [torch.empty_like(x) for x in a]
    native = [_native(x, y, out) for x, y, out in zip(a, b, results, strict=True)]
    squares, gradient = squares.contiguous(), gradient.contiguous()
    with launch.on_device(a[0]):
        for entries in _entries(native, pairs, weights, reduction, gradient):
            launch.start(
                kernels.distance_loss_backward_kernel,
                entries[-1].end_program,
                tuple(entries),
                squares,
                COUNT=len(entries),
                ROOT=root,
                SUM=reduction == "sum",
            )
    return [
        result if out is None or out is result else result.copy_(out)
        for result, (_, _, out) in zip(results, native, strict=True)
    ]
