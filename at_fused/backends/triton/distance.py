"""Squared distances on Triton: arguments, strides, launches."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton.language as tl
from torch import Tensor

from at_fused.backends.triton import distance_kernels as kernels
from at_fused.backends.triton import launch
from at_fused.backends.triton.checks import check_dtypes, require

_BLOCK_BYTES = 4096  # of a side at a time: two accesses of 16 bytes to a thread
_PIECE = 16 * 1024  # elements of a program's piece, at the least


def _check(a: list[Tensor], b: list[Tensor]) -> None:
    require(
        len(a) > 0 and len(a) == len(b),
        f"as many tensors on both sides, got {len(a)} and {len(b)}",
    )
    for x, y in zip(a, b, strict=True):
        require(x.shape == y.shape, "the tensors of a pair must have the same shape")
        require(
            x.dim() > 0 and x.shape[0] == a[0].shape[0],
            "all tensors must have the same batch size",
        )
        require(x.numel() > 0, "tensors must not be empty")
    check_dtypes((*a, *b), "tensors", launch.interpreted())


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


def _entries(pairs: list[tuple[Tensor, Tensor, Tensor | None]]) -> Iterator[list[kernels.Pair]]:
    """The pairs, as many at a time as a launch takes."""
    constant = launch.constexpr
    total = sum(a.numel() for a, _, _ in pairs)
    piece = max(_PIECE, total // (8 * launch.processors(pairs[0][0].device)))
    for first in range(0, len(pairs), launch.MAX_ENTRIES):
        entries: list[kernels.Pair] = []
        programs = 0
        for i, (a, b, out) in enumerate(pairs[first : first + launch.MAX_ENTRIES], first):
            size = a[0].numel()
            strides = [0 if x is None else x.stride(0) for x in (a, b, out)]
            align = math.gcd(size, *strides, 16)
            wide = torch.float64 in (a.dtype, b.dtype)
            longest = _BLOCK_BYTES // max(a.element_size(), b.element_size())
            block = min(longest, launch.power_of_2(size))
            # A power of two: a program is compiled for the length of its piece.
            span = max(block, launch.power_of_2(min(size, piece)))
            pieces = -(-size // span)
            end = programs + a.shape[0] * pieces
            entries.append(
                kernels.Pair(
                    a,
                    b,
                    out,
                    strides[0] // align,
                    strides[1] // align,
                    strides[2] // align,
                    size // align,
                    i,
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


def squared_distance(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Sum of |a - b|^2 over all but the first dimension, (pairs, B), in fp64."""
    _check(a, b)
    pairs = [_native(x, y, None) for x, y in zip(a, b, strict=True)]
    batch = a[0].shape[0]
    result = a[0].new_empty((len(a), batch), dtype=torch.float64)
    with launch.on_device(a[0]):
        for entries in _entries(pairs):
            programs = entries[-1].end_program
            launch.start(
                kernels.distance_kernel,
                programs,
                tuple(entries),
                result,
                result.new_empty(programs),
                launch.counters_of(a[0], len(a) * batch),
                batch,
                COUNT=len(entries),
            )
    return result


def squared_distance_backward(
    a: list[Tensor], b: list[Tensor], coefficients: Tensor
) -> list[Tensor]:
    """2 * c[i, b] * (a - b) for each pair, in a's dtype and layout."""
    _check(a, b)
    require(
        coefficients.shape == (len(a), a[0].shape[0])
        and coefficients.dtype == torch.float64
        and coefficients.device == a[0].device,
        "coefficients must be (pairs, B) of float64",
    )
    results = [torch.empty_like(x) for x in a]
    pairs = [_native(x, y, out) for x, y, out in zip(a, b, results, strict=True)]
    c = coefficients.contiguous()
    with launch.on_device(a[0]):
        for entries in _entries(pairs):
            launch.start(
                kernels.distance_backward_kernel,
                entries[-1].end_program,
                tuple(entries),
                c,
                a[0].shape[0],
                COUNT=len(entries),
            )
    return [
        result if out is None or out is result else result.copy_(out)
        for result, (_, _, out) in zip(results, pairs, strict=True)
    ]
