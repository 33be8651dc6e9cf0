"""The CUDA kernels' machine code: nothing spilled, 128-bit accesses, room for several blocks."""

from __future__ import annotations

import itertools
import shutil

import pytest
from cuda_compile import ARCHITECTURES, Kernel, kernels

pytestmark = pytest.mark.exhaustive

# Instances: exponent and fp64, or fp64 alone; rows that a thread has under way.
POWERS = {"Square, false": 4, "AnyPower, false": 2, "AnyPower, true": 2}
EITHER = dict.fromkeys(("false", "true"), 0)
# Rows that are loaded as what no thread writes, loaded otherwise, and stored; None: as above.
KERNELS: dict[str, tuple[dict[str, int], int | None, int, int | None]] = {
    "at_loss": (POWERS, None, 0, 0),
    "at_value_and_grad": (POWERS, None, 0, 2),  # swept from shared memory
    "attention_map": (POWERS, None, 0, 0),
    "attention_map_backward": (POWERS, None, 0, None),
    "attention_tap_backward": (POWERS, 2, 2, 2),  # what it is added to may be what is written
    "max_map": (EITHER, 4, 0, 0),
    "max_map_backward": (EITHER, 0, 2, 2),  # four, the same in both layouts
    "map_loss": ({"": 0}, 0, 0, 0),
}
EVERY = [(name, instance) for name, (instances, *_) in KERNELS.items() for instance in instances]
# Registers leave room for two blocks of 256 threads, as they do for fp64; else for three.
TWO_BLOCKS = "map_loss", "at_value_and_grad", "attention_tap_backward", "max_map_backward"


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, str], Kernel]:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    return kernels()


def test_every_instance_is_there(found: dict[tuple[str, str], Kernel]) -> None:
    names = [f"{name}_kernel<{instance}>" for name, instance in EVERY]
    assert set(found) == set(itertools.product(ARCHITECTURES, names))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("name", "instance"), EVERY)
def test_resources_and_widths(
    found: dict[tuple[str, str], Kernel], architecture: str, name: str, instance: str
) -> None:
    kernel = found[architecture, f"{name}_kernel<{instance}>"]
    assert kernel.stack == 0
    fp64 = instance.endswith("true")
    assert kernel.registers <= (128 if fp64 or name in TWO_BLOCKS else 80)
    instances, constant, loads, stores = KERNELS[name]
    rows = instances[instance]
    of_each = 2 * (4 if fp64 else 3)  # layouts, dtypes
    assert kernel.constant >= of_each * (rows if constant is None else constant)
    assert kernel.loads >= of_each * loads
    assert kernel.stores >= of_each * (rows if stores is None else stores)
