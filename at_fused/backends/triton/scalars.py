"""Numbers of a call that no compilation depends on.

Triton compiles a kernel anew for an integer that is 1, a multiple of 16, or of more than 32 bits.
``do_not_specialize`` does not reach into tuples, so records hold numbers in a form that is always
odd and of 34 bits.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import struct

import triton
import triton.language as tl


def number_of(value: int) -> int:
    """A number of 32 bits, for a record or an argument."""
    return 2 * (2**32 + value) + 1


@triton.jit
def number(argument):
    """A number below 2^31 from what ``number_of`` made of it."""
    return (argument >> 1).to(tl.int32)


def double_of(value: float) -> tuple[int, int]:
    """A double, for a record or an argument: Triton would round a float to fp32."""
    low, high = struct.unpack("<II", struct.pack("<d", value))
    return number_of(high), number_of(low)


@triton.jit
def double(argument):
    """A double from what ``double_of`` made of it."""
    bits = ((argument[0] >> 1) << 32) | ((argument[1] >> 1) & 0xFFFFFFFF)
    return bits.to(tl.float64, bitcast=True)
