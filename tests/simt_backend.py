"""The CUDA kernels as a back end for CPU tensors: built by simt/build.py, run by the harness."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch

from at_fused.backends import OPERATORS, override

sys.path.insert(0, str(Path(__file__).parent / "simt"))
import build

# simt/build.py; "sanitizers" needs a Python with AddressSanitizer loaded: test_sanitizers.py.
MODE = os.environ.get("AT_FUSED_SIMT", "callbacks")

# cudaDeviceAttr
SHARED_PER_MULTIPROCESSOR, MULTIPROCESSORS, SHARED_PER_BLOCK = 81, 16, 97


class Counters(ctypes.Structure):
    """What simt_counters fills: simt.h, simt_counters_t."""

    _fields_ = (
        *((n, ctypes.c_uint64) for n in ("launches", "load_bytes", "store_bytes")),
        *((n, ctypes.c_uint64) for n in ("atomic_bytes", "atomics")),
        ("loads", ctypes.c_uint64 * 5),
        ("stores", ctypes.c_uint64 * 5),
        *((n, ctypes.c_uint64) for n in ("distinct_load_bytes", "distinct_store_bytes")),
        ("max_dynamic_shared", ctypes.c_uint64),
    )


@cache
def load() -> tuple[ctypes.CDLL, SimpleNamespace]:
    """The harness's own functions, and the operators that run in it."""
    library = build.build(MODE)
    define = torch.library.Library("at_fused_simt", "DEF")
    for name in OPERATORS:
        schema = str(getattr(torch.ops.at_fused, name).default._schema)
        define.define(schema.removeprefix("at_fused::"))
    torch.ops.load_library(str(library))
    harness = ctypes.CDLL(str(library))
    harness.simt_seed.argtypes = [ctypes.c_uint64]
    harness.simt_last_error.restype = ctypes.c_char_p
    functions = {name: getattr(torch.ops.at_fused_simt, name).default for name in OPERATORS}
    return harness, SimpleNamespace(library=define, **functions)


@contextmanager
def simt(seed: int = 0, multiprocessors: int = 132, shared: int = 232448) -> Iterator[ctypes.CDLL]:
    """Runs CPU tensors on the CUDA kernels, on a device of the given size."""
    harness, functions = load()
    harness.simt_seed(seed)
    harness.simt_set_attribute(MULTIPROCESSORS, multiprocessors)
    harness.simt_set_attribute(SHARED_PER_BLOCK, shared)
    harness.simt_set_attribute(SHARED_PER_MULTIPROCESSOR, shared + 1024)
    library = override(functions, ("CPU",))
    try:
        yield harness
    finally:
        library._destroy()
