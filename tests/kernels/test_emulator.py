"""The CUDA emulator reports every bug in the buggy kernels of emulator/selftest.cu."""

from __future__ import annotations

import platform
import shutil

import pytest
from cuda_emulator import EMULATOR, Emulator, build

CORRECT = ["sum_blocks", "copy16", "halves"]
MASKS = "mask_lacks_caller mask_lacks_source mask_of_ended mask_of_missing shuffle_against_barrier"
SHARED = "missing_barrier missing_second_barrier race_in_warp shuffle_for_barrier"
BUGGY = {
    "race on shared memory": SHARED,
    "out of bounds of shared memory": "off_by_one",
    "uninitialised shared memory": "uninitialised",
    "warp mask": MASKS,
    "divergent barriers": "divergent_barriers",
    "misaligned access": "misaligned misaligned_members",
    "race on global memory": "global_race read_then_written",
    "race between blocks": "neighbour_block no_release no_acquire no_barrier late_read",
}

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or platform.system() != "Linux", reason="needs g++ on Linux"
)


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    kernels = [EMULATOR / "selftest.cu"]
    return Emulator(str(build("selftest", "callbacks", kernels, [], ["-Wl,-z,defs"], "-Wall")))


@pytest.mark.parametrize("name", CORRECT)
@pytest.mark.parametrize("resident", [2, 4, 12])
def test_correct_kernels_pass(emulator: Emulator, name: str, resident: int) -> None:
    for seed in range(20):
        emulator.schedule(seed, resident)
        result = getattr(emulator, f"correct_{name}")()
        assert (result, emulator.error()) == (0, "")


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for kind, names in BUGGY.items() for name in names.split()]
)
def test_bugs_are_reported(emulator: Emulator, name: str, kind: str) -> None:
    for seed in range(8):
        emulator.schedule(seed)
        assert getattr(emulator, f"buggy_{name}")() == 719
        assert emulator.error().startswith(f"emulator: {kind}: ")
    # A failed launch does not affect the next one.
    assert emulator.correct_sum_blocks() == 0
    assert not emulator.error()


def test_counters_count_accesses_and_bytes(emulator: Emulator) -> None:
    for launches in (2, 1):
        _, c = emulator.counted(lambda n=launches: [emulator.correct_copy16() for _ in range(n)])
        assert (c.launches, c.max_dynamic_shared) == (launches, 1024)
        assert list(c.loads) == list(c.stores) == [0, 0, 0, 0, 1000 * launches]
        assert c.load_bytes == c.store_bytes == 16000 * launches
        assert c.distinct_load_bytes == c.distinct_store_bytes == 16000 * launches
    _, c = emulator.counted(emulator.correct_sum_blocks)
    assert (c.atomics, c.load_bytes) == (8, 8 * 64 * 4)
