"""The CUDA kernels' machine code: nothing spilled, 128-bit accesses, room for several blocks."""

from __future__ import annotations

import shutil
from pathlib import Path

import cuda_compile
import pytest
from cuda_compile import ARCHITECTURES, Kernel

KERNELS = ("at_loss", "at_value_and_grad", "attention_map", "attention_map_backward")
# Without an exponent: kernel -> whether it stores what it computes for each element.
PLAIN = {
    "kd_loss": False,
    "kd_loss_backward": True,
    "squared_distance": False,
    "squared_distance_backward": True,
}
# (exponent, fp64) -> rows that a thread has under way, dtypes
INSTANCES = {
    ("Square", "false"): (4, 3),
    ("AnyPower", "false"): (2, 3),
    ("AnyPower", "true"): (2, 4),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Kernel]:
    if cuda_compile.library() is None and shutil.which("nvcc") is None:
        pytest.skip("neither a CUDA library nor nvcc")
    files = cuda_compile.compiled(Path(tmp_path_factory.mktemp("cubin")))
    rows = cuda_compile.kernels(files)
    return {(k.architecture, k.name): k for k in rows}


def test_every_instance_is_there(found: dict[tuple[str, str], Kernel]) -> None:
    expected = {
        (architecture, f"{name}_kernel<{exponent}, {fp64}>")
        for architecture in ARCHITECTURES
        for name in KERNELS
        for exponent, fp64 in INSTANCES
    } | {
        (architecture, f"{name}_kernel<{fp64}>")
        for architecture in ARCHITECTURES
        for name in PLAIN
        for fp64 in ("false", "true")
    }
    assert set(found) == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("instance", INSTANCES, ids=str)
def test_resources_and_widths(
    found: dict[tuple[str, str], Kernel], architecture: str, name: str, instance: tuple[str, str]
) -> None:
    kernel = found[architecture, f"{name}_kernel<{', '.join(instance)}>"]
    assert kernel.stack == 0
    # 256 threads a block: three blocks in 65536 registers; two for fp64, and where samples are kept
    # in shared memory.
    two = instance[1] == "true" or name == "at_value_and_grad"
    assert kernel.registers <= (128 if two else 80)
    assert kernel.shared <= 1024  # the rest is asked for at the launch: plan.h
    rows, dtypes = INSTANCES[instance]
    vectors = rows * dtypes * 2  # each in both layouts
    assert kernel.loads[128] >= vectors
    if name in ("attention_map_backward", "at_value_and_grad"):
        assert kernel.stores[128] >= vectors


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("fp64", ["false", "true"])
def test_resources_and_widths_without_an_exponent(
    found: dict[tuple[str, str], Kernel], architecture: str, name: str, fp64: str
) -> None:
    kernel = found[architecture, f"{name}_kernel<{fp64}>"]
    assert kernel.stack == 0
    # Two blocks in 65536 registers where much is computed at a time, else three.
    two = fp64 == "true" or name.endswith("backward")
    assert kernel.registers <= (128 if two else 80)
    assert kernel.shared <= 1024
    # Both sides of a pair: 8 elements of fp32 and of each 16-bit type; or 4 of fp64 and of fp32.
    vectors = 3 if fp64 == "true" else 4
    assert kernel.loads[128] >= 2 * vectors
    if PLAIN[name]:
        assert kernel.stores[128] >= vectors
