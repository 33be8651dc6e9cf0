"""The rest of the method (methods.py) counted as roofline.py does: bytes and launches.

Forward and backward together, one case of each variant, on a share of the batch and of the device.
What torch's own operators do to the maps between two of ours is not counted: a C-th of the bytes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import methods
from benchmarks.methods import differentiable
from benchmarks.roofline import H100, Counters, Operators, simt
from benchmarks.roofline_model import Count, MethodRow

SHARE = 4  # divides the batches and the multiprocessors
# Features are pooled by torch's own operator, whose bytes nobody counts here.
VARIANTS = {
    name: variant
    for name, variant in methods.VARIANTS.items()
    if not name.startswith("resize features")
}


def apply(inputs: list[Any], change: Any) -> list[Any]:
    """The inputs with every tensor changed, those that require gradients still doing so."""

    def each(x: Tensor) -> Tensor:
        return change(x.detach()).requires_grad_(x.requires_grad)

    return [[each(y) for y in x] if isinstance(x, list) else each(x) for x in inputs]


def tensors(inputs: list[Any]) -> list[Tensor]:
    """All of them."""
    return [y for x in inputs for y in (x if isinstance(x, list) else [x])]


# Whose gradient reads no more than the winners, which do not count.
READS_WINNERS = ("max",)


def floor(name: str, inputs: list[Any]) -> int:
    """Bytes of all inputs, read once; of what the gradient reads again; and of the gradient.

    The class's tokens are not read, and torch's own operator fills their gradient.
    """
    first = 1 if name == "tokens" else 0
    everything = sum(x[:, first:].nbytes for x in tensors(inputs))
    gradients = sum(x[:, first:].nbytes for x in differentiable(inputs))
    again = 0 if name in READS_WINNERS else gradients
    return everything + again + gradients


def row_of(name: str, case: str, dtype: str, layout: str) -> MethodRow:
    """Counts one setting."""
    variant = VARIANTS[name]
    whole = variant.make(case, dtype, layout)
    part = apply(whole, lambda x: x[: x.shape[0] // SHARE].clone())
    with simt(multiprocessors=H100.multiprocessors // SHARE) as harness:
        harness.simt_reset_counters()
        torch.autograd.grad(variant.ours(*part), differentiable(part))
        if harness.simt_last_error():
            raise RuntimeError(harness.simt_last_error().decode())
        c = Counters()
        harness.simt_counters(ctypes.byref(c))
    meta = apply(whole, lambda x: x.to("meta"))
    with Operators() as eager:
        torch.autograd.grad(variant.eager(*meta), differentiable(meta))
    moved = SHARE * (c.distinct_load_bytes + c.distinct_store_bytes)
    counted = Count(moved, c.launches)
    return MethodRow(name, case, dtype, layout, floor(name, whole), counted, eager.count)


def rows() -> Iterator[MethodRow]:
    """The smallest case of each variant, in every layout, fp32."""
    for name, variant in VARIANTS.items():
        for layout in variant.layouts:
            yield row_of(name, variant.cases[0], "fp32", layout)
