"""The compiled CUDA kernels: no spilled registers, 128-bit accesses, bounds on registers."""

from __future__ import annotations

import itertools
import shutil

import pytest
from cuda_compile import ARCHITECTURES, Kernel, kernels

pytestmark = pytest.mark.exhaustive

# Template arguments (exponent and fp64, or fp64 alone), and rows in flight per thread.
POWERS = {"Square, false": 4, "AnyPower, false": 2, "AnyPower, true": 2}
DTYPES = dict.fromkeys(("false", "true"), 0)
# Rows per thread: loads through the read-only cache, other loads, stores. None: rows in flight.
KERNELS: dict[str, tuple[dict[str, int], int | None, int, int | None]] = {
    "at_loss": (POWERS, None, 0, 0),
    "at_value_and_grad": (POWERS, None, 0, 2),  # sweeps students in shared memory
    "attention_map": (POWERS, None, 0, 0),
    "attention_map_backward": (POWERS, None, 0, None),
    "attention_tap_backward": (POWERS, 2, 2, 2),  # the addend may be the output
    "max_map": (DTYPES, 4, 0, 0),
    "max_map_backward": (DTYPES, 0, 2, 2),  # four, but one loop for both layouts
    "map_loss": ({"": 0}, 0, 0, 0),
}
INSTANCES = [(name, arguments) for name, (each, *_) in KERNELS.items() for arguments in each]
# These allow registers for two blocks of 256 threads, like fp64; others for three.
TWO_BLOCKS = "map_loss", "at_value_and_grad", "attention_tap_backward", "max_map_backward"


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, str], Kernel]:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    return kernels()


def test_all_instances_are_compiled(compiled: dict[tuple[str, str], Kernel]) -> None:
    names = [f"{name}_kernel<{arguments}>" for name, arguments in INSTANCES]
    assert set(compiled) == set(itertools.product(ARCHITECTURES, names))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("name", "arguments"), INSTANCES)
def test_registers_and_128_bit_accesses(
    compiled: dict[tuple[str, str], Kernel], architecture: str, name: str, arguments: str
) -> None:
    kernel = compiled[architecture, f"{name}_kernel<{arguments}>"]
    assert kernel.stack == 0
    fp64 = arguments.endswith("true")
    assert kernel.registers <= (128 if fp64 or name in TWO_BLOCKS else 80)
    instances, constant, loads, stores = KERNELS[name]
    rows = instances[arguments]
    variants = 2 * (4 if fp64 else 3)  # layouts, dtypes
    assert kernel.constant >= variants * (rows if constant is None else constant)
    assert kernel.loads >= variants * loads
    assert kernel.stores >= variants * (rows if stores is None else stores)
