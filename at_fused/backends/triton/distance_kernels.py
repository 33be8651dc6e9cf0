"""Distances in Triton: a program has a sample, or a piece of one."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from at_fused.backends.triton.finish import add_up, double, is_last, sum_in_order
from at_fused.backends.triton.kd_kernels import narrow


class Pair(NamedTuple):
    """Two tensors as samples of adjacent elements; ``out`` for the gradient, like ``a``.

    Strides and ``size`` are given in units of ALIGN elements: multiplied back in the kernel, they
    tell the compiler how wide an access may be.
    """

    a: Any
    b: Any
    out: Any
    a_stride: int
    b_stride: int
    out_stride: int
    size: int  # elements of a sample
    weight: int  # of a sample, a double by its bits
    gradient: Any  # of the loss, or of each pair's
    number: int  # its row of the squares
    samples: int
    first_sample: int
    first_program: int
    end_program: int
    pieces: int
    ALIGN: Any
    SPAN: Any  # elements of a piece
    BLOCK: Any
    ACC: Any


@triton.jit
def _load(data, stride, pair, b, k):
    mask = k < tl.cast(pair.size, tl.int64) * pair.ALIGN
    at = data + b.to(tl.int64) * stride * pair.ALIGN + k
    return tl.load(at, mask=mask, other=0.0).to(pair.ACC)


@triton.jit
def _finish(
    pair,
    b,
    value,
    squares,
    loss,
    losses,
    counters,
    samples,
    pairs,
    ROOT: tl.constexpr,
    SUM: tl.constexpr,
):
    tl.store(squares + pair.first_sample + b, value)
    distance = tl.sqrt(value) if ROOT else value
    share = double(pair.weight) * distance
    add_up(pair, b, share, losses, counters, loss, samples, pairs, SUM)


@triton.jit
def _distance_of_pair(
    pair,
    local,
    squares,
    sums,
    loss,
    losses,
    counters,
    samples,
    pairs,
    ROOT: tl.constexpr,
    SUM: tl.constexpr,
):
    b = local // pair.pieces
    piece = local % pair.pieces
    begin = piece.to(tl.int64) * pair.SPAN
    # In fp64: squares of fp32 overflow from 2e19 on.
    total = tl.zeros([pair.BLOCK], tl.float64)
    for start in range(0, pair.SPAN, pair.BLOCK):
        k = begin + start + tl.arange(0, pair.BLOCK)
        x = _load(pair.a, pair.a_stride, pair, b, k)
        y = _load(pair.b, pair.b_stride, pair, b, k)
        d = (x - y).to(tl.float64)
        total += d * d
    value = tl.sum(total, 0)
    if pair.pieces == 1:
        _finish(pair, b, value, squares, loss, losses, counters, samples, pairs, ROOT, SUM)
    else:
        tl.store(sums + pair.first_program + local, value)
        if is_last(counters + pair.first_sample + b, pair.pieces):
            total = sum_in_order(sums + pair.first_program + b * pair.pieces, pair.pieces)
            _finish(pair, b, total, squares, loss, losses, counters, samples, pairs, ROOT, SUM)


@triton.jit(do_not_specialize=["samples", "pairs"])
def distance_loss_kernel(
    entries,
    squares,
    sums,
    loss,
    losses,
    counters,
    samples,
    pairs,
    COUNT: tl.constexpr,
    ROOT: tl.constexpr,
    SUM: tl.constexpr,
):
    """The weighted distances of a list of pairs, added up, and the square of each.

    ``losses`` and ``counters`` as in ``loss_kernel``.
    """
    program = tl.program_id(0)
    for i in tl.static_range(COUNT):
        if (program >= entries[i].first_program) & (program < entries[i].end_program):
            local = program - entries[i].first_program
            _distance_of_pair(
                entries[i], local, squares, sums, loss, losses, counters, samples, pairs, ROOT, SUM
            )


@triton.jit
def _gradient_of_pair(pair, local, squares, ROOT: tl.constexpr, SUM: tl.constexpr):
    b = local // pair.pieces
    piece = local % pair.pieces
    above = pair.gradient if SUM else pair.gradient + pair.number
    factor = tl.load(above).to(tl.float64) * double(pair.weight)
    if ROOT:
        square = tl.load(squares + pair.number * pair.samples + b)
        same = square == 0.0
        factor = tl.where(same, 0.0, factor / tl.sqrt(tl.where(same, 1.0, square)))
    else:
        factor *= 2.0
    # In two factors: either is within fp32's range where the product with a - b is.
    root = tl.where(factor == 0.0, 1.0, tl.sqrt(tl.abs(factor))).to(pair.ACC)
    rest = (factor / root.to(tl.float64)).to(pair.ACC)
    begin = piece.to(tl.int64) * pair.SPAN
    for start in range(0, pair.SPAN, pair.BLOCK):
        k = begin + start + tl.arange(0, pair.BLOCK)
        x = _load(pair.a, pair.a_stride, pair, b, k)
        y = _load(pair.b, pair.b_stride, pair, b, k)
        found = ((x - y) * root) * rest
        to = pair.out + b.to(tl.int64) * pair.out_stride * pair.ALIGN + k
        mask = k < tl.cast(pair.size, tl.int64) * pair.ALIGN
        tl.store(to, narrow(found, pair.out.dtype.element_ty), mask=mask)


@triton.jit
def distance_loss_backward_kernel(
    entries, squares, COUNT: tl.constexpr, ROOT: tl.constexpr, SUM: tl.constexpr
):
    """The gradients of the a of a list of pairs."""
    program = tl.program_id(0)
    for i in tl.static_range(COUNT):
        if (program >= entries[i].first_program) & (program < entries[i].end_program):
            local = program - entries[i].first_program
            _gradient_of_pair(entries[i], local, squares, ROOT, SUM)
