"""scripts/measure_errors.py: measured errors are within the bounds of docs/numerics.md."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from reference import GRADIENT_TOLERANCE, ROUNDING, VALUE_TOLERANCE

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import measure_errors

DOCUMENT = Path(__file__).parents[2] / "docs" / "numerics.md"


@pytest.mark.parametrize("dtype", measure_errors.DTYPES, ids=str)
def test_errors_are_within_the_bounds(fast_backend: str, dtype: torch.dtype) -> None:
    for i, (s, t, p, form) in enumerate(measure_errors.cases(1)):
        if i % 9 == 0:
            errors = measure_errors.errors(s.to(dtype), t.to(dtype), p, form)
            assert errors.value <= VALUE_TOLERANCE[dtype == torch.float64]
            assert 0 < errors.gradient <= GRADIENT_TOLERANCE[dtype]
            assert errors.distance > 0.1
    near = (s * (1 + 1e-3 * torch.randn(s.shape, dtype=s.dtype))).float()
    errors = measure_errors.errors(s.float(), near, p, form)
    assert errors.value * errors.distance <= 2 * ROUNDING
    assert errors.gradient * errors.distance <= 4 * ROUNDING


def test_document_states_the_bounds() -> None:
    text = DOCUMENT.read_text()
    for dtype in measure_errors.DTYPES:
        assert f"| {str(dtype)[6:]} |" in text
        assert f"{GRADIENT_TOLERANCE[dtype]:.1e}" in text
    for bound in (*VALUE_TOLERANCE.values(), 2 * ROUNDING):
        assert f"{bound:.0e}" in text
