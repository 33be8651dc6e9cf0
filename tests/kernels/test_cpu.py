"""The CPU library: rounding of 16-bit values, failed allocations, non-temporal stores."""

from __future__ import annotations

import pytest
import torch

from at_fused import _ops

TIES = (0.5, 1.5, 1 + 2**-9, 1 + 2**-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_of_all_16_bit_values(dtype: torch.dtype) -> None:
    """Round all 16-bit values times factors that yield ties, subnormals, overflow and NaN."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x.reshape(1, 2**8, 2**8)
    for factor in (*TIES, 1.0, 3.14159, 2**-10, 2**-20, 2**-35, 2**12, -1.0):
        k = torch.full((1, 2**8), float(factor))
        (actual,) = _ops.attention_map_backward([x], [k], None, [0], 2.0)
        expected = (x.float() * factor).to(dtype)
        equal = (actual == expected) | (actual.isnan() & expected.isnan())
        assert equal.all(), (factor, x[~equal][:4], actual[~equal][:4], expected[~equal][:4])


def test_failed_allocation_of_a_map_raises() -> None:
    x = torch.zeros(1, dtype=torch.float64).expand(1, 1, 2**22, 2**22)
    with pytest.raises(
        RuntimeError, match=f"cannot allocate a result of {2**44} elements: .*memory"
    ):
        _ops.attention_map([x], 2.0, "mean")


def test_non_temporal_stores_write_large_gradients() -> None:
    """Gradients larger than the caches are written by non-temporal stores, also if unaligned."""
    # With one thread, a write past the end of a line would be repaired by the next line.
    torch.set_num_threads(2)
    for layout in (torch.contiguous_format, torch.channels_last):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(2, 1032, 79, 83, dtype=dtype)[:, 1:].contiguous(memory_format=layout)
            x = torch.cat([x] * (1 if dtype == torch.float32 else 2))
            k = torch.randn(x.shape[0], x[0, 0].numel())
            (actual,) = _ops.attention_map_backward([x], [k], torch.tensor(2.0), [0], 2.0)
            expected = (2 * k.reshape(x.shape[0], 1, *x.shape[2:]) * x.float()).to(dtype)
            assert torch.equal(actual, expected)
