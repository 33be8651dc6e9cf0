"""The compiled CPU library: rounding of 16-bit values and of any exponent, memory."""

from __future__ import annotations

import pytest
import torch

from at_fused import _ops

TIES = (0.5, 1.5, 1 + 2**-9, 1 + 2**-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_of_all_16_bit_values(dtype: torch.dtype) -> None:
    """Every 16-bit number times factors that make ties, subnormals, overflow and NaN."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x.reshape(1, 2**8, 2**8)
    for factor in (*TIES, 1.0, 3.14159, 2**-10, 2**-20, 2**-35, 2**12, -1.0):
        k = torch.full((1, 2**8), float(factor))
        (found,) = _ops.attention_map_backward([x], [k], None, [0], 2.0)
        expected = (x.float() * factor).to(dtype)
        same = (found == expected) | (found.isnan() & expected.isnan())
        assert same.all(), (factor, x[~same][:4], found[~same][:4], expected[~same][:4])


def test_a_map_that_cannot_be_allocated() -> None:
    x = torch.zeros(1, dtype=torch.float64).expand(1, 1, 2**22, 2**22)
    with pytest.raises(RuntimeError, match=f"at_fused: no result of {2**44} elements: .*memory"):
        _ops.attention_map([x], 2.0, "mean")


def test_large_gradients_are_written_whole() -> None:
    """Above the size of the caches gradients are streamed to memory, from unaligned starts too."""
    torch.set_num_threads(2)  # one alone would write again what it spoils beyond a line
    for layout in (torch.contiguous_format, torch.channels_last):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(2, 1032, 79, 83, dtype=dtype)[:, 1:].contiguous(memory_format=layout)
            x = torch.cat([x] * (1 if dtype == torch.float32 else 2))
            k = torch.randn(x.shape[0], x[0, 0].numel())
            (found,) = _ops.attention_map_backward([x], [k], torch.tensor(2.0), [0], 2.0)
            expected = (2 * k.reshape(x.shape[0], 1, *x.shape[2:]) * x.float()).to(dtype)
            assert torch.equal(found, expected)
