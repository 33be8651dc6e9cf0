"""The CUDA kernels' machine code: nothing spilled, 128-bit accesses, room for several blocks."""

from __future__ import annotations

import shutil

import cuda_compile
import pytest
from cuda_compile import ARCHITECTURES, Kernel

pytestmark = pytest.mark.exhaustive

# Rows that a sweep has under way; None: as many as a map has. From shared memory two are enough.
SWEEPS = {"attention_map_backward": None, "at_value_and_grad": 2}
# (exponent, fp64) -> rows that a thread has under way, dtypes
SQUARE, ANY, WIDE = ("Square", "false"), ("AnyPower", "false"), ("AnyPower", "true")
ROWS = {SQUARE: (4, 3), ANY: (2, 3), WIDE: (2, 4)}
TAP_ROWS = 2
# As above for ("false",) and ("true",): fp64.
EITHER = [("false",), ("true",)]
INSTANCES: dict[str, list[tuple[str, ...]]] = {
    "at_loss": [SQUARE, ANY, WIDE],
    "at_value_and_grad": [SQUARE, ANY, WIDE],
    "attention_map": [SQUARE, ANY, WIDE],
    "attention_map_backward": [SQUARE, ANY, WIDE],
    "attention_tap_backward": [SQUARE, ANY, WIDE],
    "max_map": EITHER,
    "max_map_backward": EITHER,
    "max_tap_backward": EITHER,
    "map_loss": EITHER,
}
EVERY = [(name, instance) for name, instances in INSTANCES.items() for instance in instances]


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, str], Kernel]:
    if cuda_compile.library() is None and shutil.which("nvcc") is None:
        pytest.skip("neither a CUDA library nor nvcc")
    rows = cuda_compile.kernels(cuda_compile.compiled())
    return {(k.architecture, k.name): k for k in rows}


def test_every_instance_is_there(found: dict[tuple[str, str], Kernel]) -> None:
    expected = {
        (architecture, f"{name}_kernel<{', '.join(instance)}>")
        for architecture in ARCHITECTURES
        for name, instance in EVERY
    }
    assert set(found) == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("name", "instance"), EVERY, ids=str)
def test_resources_and_widths(
    found: dict[tuple[str, str], Kernel], architecture: str, name: str, instance: tuple[str, ...]
) -> None:
    kernel = found[architecture, f"{name}_kernel<{', '.join(instance)}>"]
    assert kernel.stack == 0
    # 256 threads a block: three blocks in 65536 registers; two for fp64, and for long code.
    fp64 = instance[-1] == "true"
    two = fp64 or name == "map_loss" or (name, instance) == ("at_value_and_grad", ANY)
    assert kernel.registers <= (128 if two else 80)
    assert kernel.shared <= 1024  # the rest is asked for at the launch: plan.h
    dtypes = 4 if fp64 else 3
    if name == "attention_tap_backward":
        vectors = TAP_ROWS * dtypes * 2  # each in both layouts
        assert kernel.constant >= vectors
        # What the gradient is added to may be what is written.
        assert kernel.loads[128] - kernel.constant >= vectors
        assert kernel.stores[128] >= vectors
    elif instance in ROWS:
        rows, known = ROWS[instance]
        assert known == dtypes
        vectors = rows * dtypes * 2  # each in both layouts
        assert kernel.loads[128] >= vectors
        if name in SWEEPS:
            assert kernel.stores[128] >= (SWEEPS[name] or rows) * dtypes * 2
    elif name == "max_map":
        assert kernel.loads[128] >= 4 * dtypes * 2
    elif name == "max_tap_backward":
        assert kernel.loads[128] >= 4 * dtypes
        assert kernel.stores[128] >= 4 * dtypes
    elif name == "max_map_backward":
        assert kernel.stores[128] >= dtypes * 2
