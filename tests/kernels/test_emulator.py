"""Tests of the emulator, which runs CUDA kernels on the CPU: it must report every planted bug.

The kernels are those of emulator/selftest.cu. AddressSanitizer watches them too.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import sanitized
from cuda_emulator import EMULATOR, Emulator, build
from outside import run

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


def selftest(mode: str) -> Path:
    kernels = [EMULATOR / "selftest.cu"]
    return build("selftest", mode, kernels, [], ["-Wl,-z,defs"] * (mode == "callbacks"), "-Wall")


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    return Emulator(str(selftest("callbacks")))


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize(("resident", "shuffle"), [(4, False), (2, False), (12, True)])
def test_right_kernels_pass(emulator: Emulator, name: str, resident: int, shuffle: bool) -> None:
    for seed in range(20):
        emulator.schedule(seed, resident, shuffle)
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


def test_report_says_where(emulator: Emulator) -> None:
    emulator.wrong_off_by_one()
    text = emulator.error()
    assert "4 bytes at offset 256 of 256" in text
    assert re.search(r"block [01] thread 63, at", text)
    library, offset = re.search(r", at (\S+)\+(0x[0-9a-f]+)", text).groups()
    place = subprocess.run(["addr2line", "-e", library, offset], capture_output=True, text=True)
    assert "selftest.cu:" in place.stdout


def test_block_order(emulator: Emulator) -> None:
    for shuffle in (False, True):
        emulator.schedule(resident=1, shuffle=shuffle)
        assert emulator.blocks_in_order() == (not shuffle)


def test_launch_errors(emulator: Emulator) -> None:
    invalid_value, invalid_configuration, large = 1, 9, 100 << 10
    for grid, block in ((0, 64), (1, 0), (1, 1025)):
        assert emulator.start(grid, block, 0) == invalid_configuration
    assert (emulator.last_error(), emulator.last_error()) == (invalid_configuration, 0)
    assert emulator.start(1, 64, large) == invalid_value
    assert (emulator.allow(1 << 20), emulator.allow(large)) == (invalid_value, 0)
    assert (emulator.start(1, 64, large), emulator.start(1, 64, large + 1)) == (0, invalid_value)
    emulator.allow(0)


def test_counters(emulator: Emulator) -> None:
    for launches in (2, 1):
        _, c = emulator.counted(lambda n=launches: [emulator.right_copy16() for _ in range(n)])
        assert (c.launches, c.max_dynamic_shared) == (launches, 1024)
        assert list(c.loads) == list(c.stores) == [0, 0, 0, 0, 1000 * launches]
        assert c.load_bytes == c.store_bytes == 16000 * launches
        assert c.distinct_load_bytes == c.distinct_store_bytes == 16000 * launches
    _, c = emulator.counted(emulator.right_hand_over)
    assert (c.atomics, c.load_bytes) == (8, 8 * 64 * 4)


CASES = """
import ctypes, sys
emulator = ctypes.CDLL(sys.argv[1])
emulator.emulator_last_error.restype = ctypes.c_char_p
for case in sys.argv[2:]:
    for seed in range(3):
        emulator.emulator_schedule(ctypes.c_uint64(seed), 4, 0)
        result = getattr(emulator, case)()
        print(case, result, emulator.emulator_last_error().decode(), flush=True)
"""


def under_asan(folder: Path, *cases: str) -> subprocess.CompletedProcess[str]:
    environment = {"LD_PRELOAD": sanitized.preloaded("address")}
    environment["ASAN_OPTIONS"] = "detect_leaks=0:handle_segv=0"
    return run(folder, "-c", CASES, str(selftest("sanitizers")), *cases, **environment)


@pytest.mark.exhaustive
def test_right_kernels_and_reports_under_asan(tmp_path: Path) -> None:
    right = [f"right_{name}" for name in RIGHT]
    done = under_asan(tmp_path, *right, "wrong_shuffle_against_barrier", "wrong_divergent_barriers")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" 0 \n") == 3 * len(right)
    for kind in ("warp mask", "divergent barriers"):
        assert done.stdout.count(f"emulator: {kind}") == 3


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("case", "report"),
    [("off_by_one", "heap-buffer-overflow"), ("misaligned", "misaligned address")],
)
def test_asan_reports(tmp_path: Path, case: str, report: str) -> None:
    done = under_asan(tmp_path, f"wrong_{case}")
    assert done.returncode != 0
    assert report in done.stderr
