"""Tests of the emulator, which runs CUDA kernels on the CPU: it must report every planted bug.

The kernels are those of emulator/selftest.cu.
"""

from __future__ import annotations

import platform
import shutil

import pytest
from cuda_emulator import EMULATOR, Emulator, build

RIGHT = ["hand_over", "copy16", "halves"]
MASKS = "mask_lacks_caller mask_lacks_source mask_of_ended mask_of_missing shuffle_against_barrier"
SHARED = "missing_barrier missing_second_barrier race_in_warp shuffle_for_barrier"
WRONG = {
    "race on shared memory": SHARED,
    "out of bounds of shared memory": "off_by_one",
    "uninitialised shared memory": "uninitialised",
    "warp mask": MASKS,
    "divergent barriers": "divergent_barriers",
    "misaligned access": "misaligned misaligned_members",
    "race on global memory": "global_race read_then_written",
    "unordered hand-over": "neighbour_block no_release no_acquire no_barrier late_read",
}

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or platform.system() != "Linux", reason="needs g++ on Linux"
)


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    kernels = [EMULATOR / "selftest.cu"]
    return Emulator(str(build("selftest", "callbacks", kernels, [], ["-Wl,-z,defs"], "-Wall")))


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("resident", [2, 4, 12])
def test_right_kernels_pass(emulator: Emulator, name: str, resident: int) -> None:
    for seed in range(20):
        emulator.schedule(seed, resident)
        result = getattr(emulator, f"right_{name}")()
        assert (result, emulator.error()) == (0, "")


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for kind, names in WRONG.items() for name in names.split()]
)
def test_planted_bugs_are_reported(emulator: Emulator, name: str, kind: str) -> None:
    for seed in range(8):
        emulator.schedule(seed)
        assert getattr(emulator, f"wrong_{name}")() == 719
        assert emulator.error().startswith(f"emulator: {kind}: ")
    # A report leaves nothing behind.
    assert emulator.right_hand_over() == 0
    assert not emulator.error()


def test_counters(emulator: Emulator) -> None:
    for launches in (2, 1):
        _, c = emulator.counted(lambda n=launches: [emulator.right_copy16() for _ in range(n)])
        assert (c.launches, c.max_dynamic_shared) == (launches, 1024)
        assert list(c.loads) == list(c.stores) == [0, 0, 0, 0, 1000 * launches]
        assert c.load_bytes == c.store_bytes == 16000 * launches
        assert c.distinct_load_bytes == c.distinct_store_bytes == 16000 * launches
    _, c = emulator.counted(emulator.right_hand_over)
    assert (c.atomics, c.load_bytes) == (8, 8 * 64 * 4)
