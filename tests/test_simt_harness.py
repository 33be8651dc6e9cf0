"""Tests of tests/simt, which runs CUDA kernels on the CPU: it must report every planted bug.

Kernels are compiled as C++ against tests/simt/include (simt/build.py). With "callbacks" every load
and store comes to tests/simt/callbacks.cpp; libtsan is not linked. With "sanitizers"
AddressSanitizer looks instead.
"""

import ctypes
import os
import platform
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from native import built
from simt_backend import Counters, build

SELFTEST = build.SIMT / "selftest"
RIGHT = ["block_reduction", "grid_reduction", "copy16", "halves", "grid_fenced"]
WRONG = {
    "missing_barrier": "race on shared memory",
    "missing_second_barrier": "race on shared memory",
    "race_in_warp": "race on shared memory",
    "shuffle_for_barrier": "race on shared memory",
    "off_by_one": "out of bounds of shared memory",
    "uninitialised": "uninitialised shared memory",
    "mask_lacks_caller": "warp mask",
    "mask_lacks_source": "warp mask",
    "mask_of_ended": "warp mask",
    "mask_of_missing": "warp mask",
    "shuffle_against_barrier": "warp mask",
    "divergent_barriers": "divergent barriers",
    "misaligned": "misaligned access",
    "misaligned_members": "misaligned access",
    "global_race": "race on global memory",
    "read_then_written": "race on global memory",
    "neighbour_block": "unordered hand-over",
    "grid_no_fence": "unordered hand-over",
    "grid_no_barrier": "unordered hand-over",
    "grid_no_second_fence": "unordered hand-over",
    "grid_late_read": "unordered hand-over",
}

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or platform.system() != "Linux", reason="needs g++ on Linux"
)


def program(name, runtime, kernels, link):
    """The runtime and the cases, compiled with these options, and perhaps main.cpp."""
    files = [build.SIMT / "all.cpp", SELFTEST / "right.cu", SELFTEST / "wrong.cu"]
    files += [SELFTEST / "main.cpp"] * ("-shared" not in link)
    common = [*build.COMMON, "-Wall", f"-I{build.SIMT / 'include'}", "-x", "c++"]
    jobs = [(f, [*common, *(kernels if f.suffix == ".cu" else runtime)]) for f in files]
    headers = [f for f in build.SIMT.rglob("*.[hc]*") if f.is_file()]
    return built(f"selftest_{name}", jobs, [*link, "-ldl"], headers)


@pytest.fixture(scope="session")
def simt():
    lib = ctypes.CDLL(program("callbacks", ["-O2"], build.WATCHED, ["-shared", "-Wl,-z,defs"]))
    lib.simt_seed.argtypes = [ctypes.c_uint64]
    lib.simt_last_error.restype = ctypes.c_char_p
    return lib


@pytest.fixture(scope="session")
def with_asan():
    link = ["-fsanitize=address,undefined", "-rdynamic"]
    made = program("sanitizers", build.SANITIZED, build.SANITIZED, link)

    def run(*cases):
        environment = {**os.environ, "ASAN_OPTIONS": "", "LD_PRELOAD": ""}
        return subprocess.run([made, *cases], capture_output=True, text=True, env=environment)

    return run


def kind(lib):
    return re.match(r"(?:simt: (.*?):|$)", lib.simt_last_error().decode())[1]


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize(("resident", "shuffle"), [(4, False), (2, False), (12, True)])
def test_right_kernels_pass(simt, name, resident, shuffle):
    simt.simt_options(resident, shuffle)
    for seed in range(20):
        simt.simt_seed(seed)
        result = getattr(simt, f"right_{name}")()
        assert (result, simt.simt_last_error()) == (0, b"")
    simt.simt_options(4, 0)


@pytest.mark.parametrize("name", WRONG)
def test_planted_bugs_are_reported(simt, name):
    for seed in range(8):
        simt.simt_seed(seed)
        assert getattr(simt, f"wrong_{name}")() == 719
        assert kind(simt) == WRONG[name]
    # A report leaves nothing behind.
    assert simt.right_block_reduction() == 0
    assert kind(simt) is None


def test_report_says_where(simt):
    simt.wrong_off_by_one()
    text = simt.simt_last_error().decode()
    assert "4 bytes at offset 256 of 256" in text
    assert re.search(r"block [01] thread 63, at", text)
    library, offset = re.search(r", at (\S+)\+(0x[0-9a-f]+)", text).groups()
    place = subprocess.run(["addr2line", "-e", library, offset], capture_output=True, text=True)
    assert "wrong.cu:" in place.stdout


def test_block_order(simt):
    simt.simt_options(1, 0)
    assert simt.blocks_in_order() == 1
    simt.simt_options(1, 1)
    assert simt.blocks_in_order() == 0
    simt.simt_options(4, 0)


def test_launch_errors(simt):
    assert simt.launch_errors() == 0


def test_counters(simt):
    simt.simt_reset_counters()
    simt.right_copy16()
    simt.right_copy16()
    c, last = Counters(), Counters()
    simt.simt_counters(ctypes.byref(c))
    simt.simt_last_counters(ctypes.byref(last))
    assert (c.launches, last.launches) == (2, 1)
    assert (c.load_bytes, last.load_bytes) == (32000, 16000)
    assert list(last.loads) == list(last.stores) == [0, 0, 0, 0, 1000]
    assert last.distinct_load_bytes == last.distinct_store_bytes == last.store_bytes == 16000
    assert c.max_dynamic_shared == 1024


def test_counters_of_atomics(simt):
    simt.right_grid_fenced()
    last = Counters()
    simt.simt_last_counters(ctypes.byref(last))
    assert (last.atomics, last.atomic_bytes) == (8, 32)
    assert last.load_bytes == 8 * 64 * 4


@pytest.mark.parametrize(("code", "dtype"), [(0, torch.float16), (1, torch.bfloat16)])
def test_conversions(simt, code, dtype):
    bits = np.arange(65536, dtype=np.uint16)
    ours = np.empty(65536, np.float32)
    simt.from_half(code, bits.ctypes.data_as(ctypes.c_void_p), ours.ctypes.data_as(ctypes.c_void_p))
    values = torch.from_numpy(bits.view(np.int16)).view(dtype).float().numpy()
    np.testing.assert_array_equal(ours, values)

    # Every value, the midpoints between neighbours and what lies next to them.
    finite = np.sort(values[np.isfinite(values)].astype(np.float64))
    middle = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
    edges = [np.nextafter(middle, s, dtype=np.float32) for s in (-np.inf, np.inf)]
    extreme = np.float32([65519.996, 65520, 1e38, 3.4e38, 3.3895e38, 1e-45, np.inf, np.nan])
    inputs = np.concatenate([values, middle, *edges, extreme, -extreme])
    back = np.empty(len(inputs), np.uint16)
    simt.to_half(
        code,
        inputs.ctypes.data_as(ctypes.c_void_p),
        back.ctypes.data_as(ctypes.c_void_p),
        len(inputs),
    )
    want = torch.from_numpy(inputs).to(dtype)
    got = torch.from_numpy(back.view(np.int16)).view(dtype)
    nan = want.isnan()
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(got.view(torch.int16)[~nan], want.view(torch.int16)[~nan])


@pytest.mark.long
def test_right_kernels_under_asan(with_asan):
    result = with_asan("launch_errors", *(f"right_{name}" for name in RIGHT))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(" 0 \n") == 3 * (len(RIGHT) + 1)


@pytest.mark.long
@pytest.mark.parametrize(
    ("case", "report"),
    [
        ("wrong_off_by_one", "heap-buffer-overflow"),
        ("wrong_misaligned", "misaligned address"),
    ],
)
def test_asan_reports(with_asan, case, report):
    result = with_asan(case)
    assert result.returncode != 0
    assert report in result.stderr


@pytest.mark.long
def test_scheduler_reports_under_asan(with_asan):
    result = with_asan("wrong_shuffle_against_barrier", "wrong_divergent_barriers")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("simt: warp mask") == 3
    assert result.stdout.count("simt: divergent barriers") == 3
