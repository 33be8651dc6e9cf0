"""What every test file shares: the back ends at hand, and quiet, repeatable randomness."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from simt_backend import simt

import at_fused
from at_fused.backends import cpu

if not cpu.available():
    raise pytest.UsageError(
        f"the tests need the compiled library: {cpu.reason()}. Install the package, and run "
        "'pytest' rather than 'python -m pytest', which imports the checkout instead."
    )

# The same examples each time, so that a failure is a change. To look for new ones:
# pytest tests/test_properties.py --hypothesis-profile=search --hypothesis-seed=N
settings.register_profile("same", derandomize=True, max_examples=150)
settings.register_profile("search", max_examples=5000)
settings.load_profile("same")

# CUDA's kernels in the harness: on a device so wide that even small samples are cut and several
# blocks meet, and on one so small that samples stay whole, few of them on chip.
SIMT = {
    "simt-wide": {"multiprocessors": 132},
    "simt-small": {"multiprocessors": 1, "shared": 40 << 10},
}
BACKENDS = [name for name, row in at_fused.backends().items() if row.available]


@pytest.fixture(params=[*BACKENDS, *SIMT])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on every back end that this machine has, and on CUDA's kernels."""
    if request.param in SIMT:
        with simt(**SIMT[request.param]) as harness:
            yield request.param
            assert not harness.simt_last_error()
    else:
        with at_fused.use_backend(request.param):
            yield request.param


@pytest.fixture(autouse=True)
def repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    # Warnings of this package are errors here; the one-time warning has a test of its own.
    monkeypatch.setattr(at_fused.functional, "_single_position_warned", True)
