"""Features as the kernels see them: records, addresses, and the tiles that maps and gradients take.

A launch takes a whole list: a tuple of records (``NamedTuple`` classes), and each program finds by
its number the entry that it works for. Fields in lower case are values of that call, those in upper
case are compiled in.

A tile is BLOCK_C channels by BLOCK_N positions of one sample, in both layouts: only the strides
differ, and Triton deals the threads out along the one that is 1.

A record is always named by its place (``entries[i]``) or passed on: bound to a variable, it would
lose which of its fields are compiled in. A record's own records stand before what is compiled in:
Triton 3.6 would forget theirs in a loop.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from at_fused.backends.triton.powers import slope


class Feature(NamedTuple):
    """One feature tensor as (B, C, N), and its map (B, N).

    ``batch``, ``line`` (the stride of whichever of C and N is not contiguous) and ``inner`` (the
    size of the one that is) are given in units of ALIGN elements: multiplied back in the kernel,
    they tell the compiler how wide an access may be.
    """

    data: Any
    map: Any
    batch: int
    line: int
    inner: int
    outer: int
    PLANAR: Any
    ALIGN: Any
    WIDE: Any  # offsets within a sample need 64 bits
    BLOCK_C: Any
    BLOCK_N: Any


class Gradient(NamedTuple):
    """Where the gradient of a feature goes: the same layout, its own strides."""

    data: Any
    batch: int
    line: int
    ALIGN: Any
    WIDE: Any


@triton.jit
def channels_of(feature):
    """C of a feature."""
    if feature.PLANAR:
        size = feature.outer
    else:
        size = feature.inner * feature.ALIGN
    return size


@triton.jit
def positions_of(feature):
    """N of a feature."""
    if feature.PLANAR:
        size = feature.inner * feature.ALIGN
    else:
        size = feature.outer
    return size


@triton.jit
def sample_of(array, b):
    """Where sample ``b`` of a feature or gradient begins."""
    return array.data + b.to(tl.int64) * array.batch * array.ALIGN


@triton.jit
def offsets_of(array, c, n, PLANAR: tl.constexpr):
    """Of elements from their sample's begin; channels and positions broadcast."""
    if array.WIDE:
        c = c.to(tl.int64)
        n = n.to(tl.int64)
    if PLANAR:
        offsets = c * array.line * array.ALIGN + n
    else:
        offsets = c + n * array.line * array.ALIGN
    return offsets


@triton.jit
def load_coefficients(feature, b, n, inside, loss_gradient):
    """Coefficients of one sample at positions n, times the loss gradient where there is one."""
    k = tl.load(feature.map + b.to(tl.int64) * positions_of(feature) + n, mask=inside, other=0.0)
    if loss_gradient is not None:
        k *= tl.load(loss_gradient).to(k.dtype)
    return k


@triton.jit
def store_gradient(
    feature,
    gradient,
    k,
    b,
    c,
    n,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
    addend=None,
):
    """Writes k[n] * |x|^(p-1) * sign(x) for one tile, plus the addend's where there is one."""
    mask = (c < channels_of(feature))[:, None] & (n < positions_of(feature))[None, :]
    x = tl.load(
        sample_of(feature, b) + offsets_of(feature, c[:, None], n[None, :], feature.PLANAR),
        mask=mask,
        other=0.0,
    )
    result = k[None, :] * slope(x.to(k.dtype), HIGH, LOW)
    if addend is not None:
        before = tl.load(
            sample_of(addend, b) + offsets_of(addend, c[:, None], n[None, :], feature.PLANAR),
            mask=mask,
            other=0.0,
        )
        result += before.to(k.dtype)
    tl.store(
        sample_of(gradient, b) + offsets_of(gradient, c[:, None], n[None, :], feature.PLANAR),
        result.to(gradient.data.dtype.element_ty),
        mask=mask,
    )
