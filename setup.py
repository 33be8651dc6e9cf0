"""The extension build; everything else about the package is in pyproject.toml.

AT_FUSED_CUDA=0|1|auto   build the CUDA library: never, or fail; auto (default) where nvcc works.
AT_FUSED_CPP=0|1         leave the C++ libraries out: at_fused then runs on plain PyTorch.
"""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pybind11
import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "at_fused/_version.py").read_text(), re.M)[1]

# The stable ABI of this torch release is all that the libraries use: one build serves every later
# one, whichever release it was compiled with.
TORCH_TARGET_VERSION = "0x020a000000000000"


def find_cuda() -> tuple[bool, str]:
    """(usable, what was found): asks nvcc itself, since no GPU is needed to compile for one."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return False, "no nvcc on PATH"
    dryrun = subprocess.run(
        [nvcc, "--dryrun", "probe.cu"], capture_output=True, text=True, check=False
    )
    top = re.search(r"^#\$ (?:TOP|_HERE_)=(.+)$", dryrun.stdout + dryrun.stderr, re.M)
    if top is None:
        return False, f"{nvcc} --dryrun names no toolkit"
    return True, os.path.realpath(top[1])


def cuda_choice() -> str:
    """What to say about CUDA in the build's own record."""
    wanted = os.environ.get("AT_FUSED_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"AT_FUSED_CUDA must be 0, 1 or auto, got {wanted!r}")
    if wanted == "0":
        return "not built: AT_FUSED_CUDA=0"
    usable, found = find_cuda()
    if wanted == "1":
        raise SystemExit(
            f"AT_FUSED_CUDA=1: this version of at_fused has no CUDA kernels yet (nvcc: {found}); "
            "build with AT_FUSED_CUDA=0 or auto"
        )
    if not usable:
        return f"not built: {found}"
    return f"not built: no CUDA kernels in this version (nvcc found: {found})"


def extensions() -> list:
    cuda = cuda_choice()
    defines = {
        "AT_FUSED_VERSION": VERSION,
        "AT_FUSED_TORCH": torch.__version__,
        "AT_FUSED_CUDA": cuda,
    }
    windows = platform.system() == "Windows"
    link = ["-Wl,-s", "-Wl,--as-needed"] if platform.system() == "Linux" else []
    build_info = CppExtension(
        "at_fused._build_info",
        ["csrc/build_info.cpp"],
        include_dirs=[pybind11.get_include()],
        define_macros=[(name, f'"{value}"') for name, value in defines.items()],
    )
    build_info.extra_link_args = link
    # It reports on a package that cannot find its torch, so it must not need one itself.
    build_info.libraries.clear()
    build_info.library_dirs.clear()
    if os.environ.get("AT_FUSED_CPP", "1") == "0" or windows:
        return [build_info]
    cpu = CppExtension(
        "at_fused._cpu",
        sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cpu").glob("*.cpp")),
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args=[
            "-O3",
            "-fno-math-errno",
            "-ffp-contract=fast",
            "-fvisibility=hidden",
            "-Wno-psabi",
            "-Wno-maybe-uninitialized",
        ],
        extra_link_args=link,
        # The library has no Python in it: one file for all Pythons.
        py_limited_api=True,
    )
    return [cpu, build_info]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)})
