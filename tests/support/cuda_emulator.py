"""Runs the CUDA kernels on CPU tensors: compiles them as C++ and emulates the threads.

    callbacks   checks every access for races, misalignment and uninitialised memory
    sanitizers  runs kernels and operators under AddressSanitizer and UndefinedBehaviorSanitizer,
                which test_sanitizers.py preloads into Python

The library registers the operators under ``at_fused_emulated``.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

import torch
from native import build_library
from outside import ROOT, TESTS
from torch.utils import cpp_extension

from at_fused.backends import OPERATORS, override

T = TypeVar("T")

EMULATOR = TESTS / "kernels/emulator"
CUDA = ROOT / "csrc/cuda"
MODE = os.environ.get("AT_FUSED_EMULATOR", "callbacks")

COMMON = ["-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-DAT_FUSED_EMULATED"]
COMMON += ["-Wno-unknown-pragmas", "-Wno-attributes"]
COMMON += [f"-I{EMULATOR / 'include'}", f"-I{EMULATOR}"]
# -fno-tree-*: g++ must not split 16-byte accesses, which are counted and checked for alignment.
INSTRUMENTED = ["-O1", "-fno-tree-sra", "-fno-tree-fre", "-fsanitize=thread"]
INSTRUMENTED += ["--param=tsan-instrument-func-entry-exit=0"]
# Threshold 0 replaces inline address checks by calls, which compile three times as fast.
SANITIZED = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
SANITIZED += ["--param=asan-instrumentation-with-call-threshold=0"]


def build(
    name: str, mode: str, kernels: list[Path], host: list[Path], link: list[str], *options: str
) -> Path:
    """Build a library of the emulator, kernels and host code, or return the cached one."""
    is_sanitized = mode == "sanitizers"
    for_kernels, for_host = (SANITIZED, SANITIZED) if is_sanitized else (INSTRUMENTED, ["-O2"])
    jobs = [(file, [*COMMON, *options, *for_kernels, "-x", "c++"]) for file in kernels]
    host = [*host, *sorted(EMULATOR.glob("*.cpp"))]
    jobs += [(file, [*COMMON, *options, *for_host]) for file in host]
    link = ["-shared", "-ldl", *["-fsanitize=address,undefined"] * is_sanitized, *link]
    folders = EMULATOR, EMULATOR / "include", *{file.parent for file in kernels}, ROOT / "csrc"
    headers = [file for folder in folders for file in folder.glob("*.*h")]
    return build_library(f"{name}_{mode}", jobs, link, headers, torch.__version__)


def build_operators(mode: str = MODE) -> Path:
    """Build the kernels and operators of csrc/cuda."""
    kernels, host = sorted(CUDA.glob("*.cu")), sorted(CUDA.glob("*.cpp"))
    include = [word for path in cpp_extension.include_paths() for word in ("-isystem", path)]
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]
    stable = "-DTORCH_TARGET_VERSION=0x020a000000000000"
    return build("emulated", mode, kernels, host, libraries, stable, *include)


class Counters(ctypes.Structure):
    """``emulator_counters_t`` in emulator.h."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("launches", "load_bytes", "store_bytes", "atomics")),
        ("loads", ctypes.c_uint64 * 5),
        ("stores", ctypes.c_uint64 * 5),
        *((f"distinct_{name}_bytes", ctypes.c_uint64) for name in ("load", "store")),
        ("max_dynamic_shared", ctypes.c_uint64),
    )


class Emulator(ctypes.CDLL):
    """A library of kernels with the functions of the emulator."""

    # Values of cudaDeviceAttr.
    DEFAULT_SHARED_PER_BLOCK, MULTIPROCESSORS, COMPUTE_CAPABILITY_MAJOR = 8, 16, 75
    SHARED_PER_MULTIPROCESSOR, SHARED_PER_BLOCK = 81, 97

    def schedule(self, seed: int = 0, resident: int = 4) -> None:
        """Set the seed of the thread and block order, and the number of resident blocks."""
        self.emulator_schedule(ctypes.c_uint64(seed), resident)

    def set_attribute(self, attribute: int, value: int) -> None:
        """Set an attribute of the emulated device."""
        self.emulator_set_attribute(attribute, value)

    def counted(self, call: Callable[[], T]) -> tuple[T, Counters]:
        """Return the result of a call and the counters of its launches."""
        counters = Counters()
        self.emulator_take_counters(ctypes.byref(counters))
        result = call()
        self.emulator_take_counters(ctypes.byref(counters))
        return result, counters

    def error(self) -> str:
        """Return the error of the last launch, or ""."""
        function = self.emulator_last_error
        function.restype = ctypes.c_char_p
        return function().decode()


@cache
def load() -> tuple[Emulator, SimpleNamespace]:
    """Return the emulator and its operators."""
    library = str(build_operators())
    define = torch.library.Library("at_fused_emulated", "DEF")
    for name in OPERATORS:
        schema = str(getattr(torch.ops.at_fused, name).default._schema)
        define.define(schema.removeprefix("at_fused::"))
    torch.ops.load_library(library)
    functions = {name: getattr(torch.ops.at_fused_emulated, name).default for name in OPERATORS}
    return Emulator(library), SimpleNamespace(library=define, **functions)


@contextmanager
def emulated(
    multiprocessors: int = 132, shared: int = 232448, seed: int = 0, resident: int = 4
) -> Iterator[Emulator]:
    """Run CPU tensors on the emulated CUDA kernels, with the given size of the device."""
    emulator, functions = load()
    emulator.schedule(seed, resident)
    emulator.set_attribute(Emulator.MULTIPROCESSORS, multiprocessors)
    emulator.set_attribute(Emulator.SHARED_PER_BLOCK, shared)
    emulator.set_attribute(Emulator.SHARED_PER_MULTIPROCESSOR, shared + 1024)
    library = override(functions, ("CPU",))
    try:
        yield emulator
    finally:
        library._destroy()
    assert not emulator.error()
