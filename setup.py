"""The extension build; everything else about the package is in pyproject.toml.

AT_FUSED_CUDA=0|1|auto   build the CUDA library: never, or fail; auto (default) where nvcc works.
AT_FUSED_CPP=0|1         0 compiles nothing and needs no compiler: at_fused runs on plain PyTorch.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pybind11
import torch
from setuptools import setup
from torch.utils import cpp_extension
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "at_fused/_version.py").read_text(), re.M)[1]

# The stable ABI of this torch release is all that the libraries use: one build serves every later
# one, whichever release it was compiled with.
TORCH_TARGET_VERSION = "0x020a000000000000"

LINK = ["-Wl,-s", "-Wl,--as-needed"] if platform.system() == "Linux" else []
# Python's own -g would take a third of the time, for what the linker leaves out; and errors name
# a file as the repository does, not as the machine that built it.
COMPILE = ["-fvisibility=hidden", "-g0", f"-ffile-prefix-map={ROOT}/="]


# What the CUDA library is compiled for; the last also as PTX, for later devices. A CUDA too old for
# one leaves it out. TORCH_CUDA_ARCH_LIST says otherwise.
CUDA_ARCHITECTURES = (80, 90, 100)


def find_cuda() -> tuple[bool, str]:
    """(usable, the toolkit's folder or what is wrong): asks nvcc itself, which needs no GPU."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return False, "no nvcc on PATH"
    dryrun = subprocess.run(
        [nvcc, "--dryrun", "probe.cu"], capture_output=True, text=True, check=False
    )
    top = re.search(r"^#\$ (?:TOP|_HERE_)=(.+)$", dryrun.stdout + dryrun.stderr, re.M)
    if top is None:
        return False, f"{nvcc} --dryrun names no toolkit"
    if torch.version.cuda is None:
        return False, f"torch {torch.__version__} has no CUDA"
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    release = re.search(r"release (\d+)\.", version.stdout)
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        # The driver that this torch needs may not run what that nvcc makes.
        found = release[1] if release else "unknown"
        return False, f"nvcc is of CUDA {found}, torch of CUDA {torch.version.cuda}"
    folder = Path(top[1]).resolve()
    return True, str(folder.parent if folder.name == "bin" else folder)


def cuda_choice() -> tuple[str | None, str]:
    """(the toolkit to build with, or None; what to say about it in the build's own record)."""
    wanted = os.environ.get("AT_FUSED_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"AT_FUSED_CUDA must be 0, 1 or auto, got {wanted!r}")
    if wanted == "0":
        return None, "not built: AT_FUSED_CUDA=0"
    usable, found = find_cuda()
    if usable:
        return found, f"built with {found} against torch's CUDA {torch.version.cuda}"
    if wanted == "1":
        raise SystemExit(f"AT_FUSED_CUDA=1, but the CUDA library cannot be built: {found}")
    return None, f"not built: {found}"


def architecture_flags(toolkit: str) -> list[str]:
    """The -gencode options for nvcc."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return []  # torch's build makes them of it
    nvcc = Path(toolkit) / "bin/nvcc"
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True)
    known = [sm for sm in CUDA_ARCHITECTURES if f"sm_{sm}" in listed.stdout.split()]
    flags = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in known]
    return [*flags, f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}"]


def cuda_extension(toolkit: str) -> CppExtension:
    """The CUDA library. The CUDA runtime is linked in: which one torch ships does not matter."""
    os.environ["CUDA_HOME"] = cpp_extension.CUDA_HOME = toolkit
    sources = [*(ROOT / "csrc/cuda").glob("*.cu"), *(ROOT / "csrc/cuda").glob("*.cpp")]
    cuda = CUDAExtension(
        "at_fused._cuda",
        sorted(str(p.relative_to(ROOT)) for p in sources),
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION), ("USE_CUDA", None)],
        extra_compile_args={
            "cxx": ["-O2", *COMPILE],
            "nvcc": ["-O3", "-Xcompiler=-fvisibility=hidden", *architecture_flags(toolkit)],
        },
        extra_link_args=[*LINK, "-ldl", "-lrt", "-lpthread"],
        py_limited_api=True,
    )
    cuda.libraries = ["c10", "torch_cpu", "torch_cuda", "cudart_static"]
    return cuda


def extensions() -> list:
    if os.environ.get("AT_FUSED_CPP", "1") == "0" or platform.system() == "Windows":
        return []
    toolkit, cuda = cuda_choice()
    defines = {
        "AT_FUSED_VERSION": VERSION,
        "AT_FUSED_TORCH": torch.__version__,
        "AT_FUSED_CUDA": cuda,
    }
    build_info = CppExtension(
        "at_fused._build_info",
        ["csrc/build_info.cpp"],
        include_dirs=[pybind11.get_include()],
        define_macros=[(name, f'"{value}"') for name, value in defines.items()],
    )
    build_info.extra_link_args = LINK
    # It reports on a package that cannot find its torch, so it must not need one itself.
    build_info.libraries.clear()
    build_info.library_dirs.clear()
    cpu = CppExtension(
        "at_fused._cpu",
        sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cpu").glob("*.cpp")),
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args=[
            "-O3",
            "-fno-math-errno",
            "-ffp-contract=fast",
            "-Wno-psabi",
            "-Wno-maybe-uninitialized",
            *COMPILE,
        ],
        extra_link_args=LINK,
        # The library has no Python in it: one file for all Pythons.
        py_limited_api=True,
    )
    return [cpu, *([cuda_extension(toolkit)] if toolkit else []), build_info]


class Build(BuildExtension):
    def run(self) -> None:
        compiler = os.environ.get("CXX", "c++")
        if shutil.which(shlex.split(compiler)[0]) is None:
            raise SystemExit(
                f"at_fused cannot be built: no C++ compiler, {compiler} is not on PATH. Install "
                "one (CXX names another than c++), or set AT_FUSED_CPP=0 to install at_fused "
                "without compiled code: it then runs on plain PyTorch, slower."
            )
        # A library that earlier switches left in the build folder would go into this wheel.
        for library in Path(self.build_lib, "at_fused").glob("*.so"):
            library.unlink()
        super().run()


setup(ext_modules=extensions(), cmdclass={"build_ext": Build})
