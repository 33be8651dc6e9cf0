"""The extension build; everything else about the package is in pyproject.toml.

AT_FUSED_CUDA=0|1|auto   build the CUDA library: never, or fail; auto (default) where nvcc works.
                         CUDA_HOME, else CUDA_PATH, names its toolkit; without both nvcc on PATH.
AT_FUSED_CPP=0|1         0 compiles nothing and needs no compiler: at_fused runs on plain PyTorch.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
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
CPU = ["-O3", "-fno-math-errno", "-ffp-contract=fast", "-Wno-psabi", "-Wno-maybe-uninitialized"]

# The targets of the CUDA library; the last two also as PTX, for devices between and after them. A
# CUDA too old for one leaves it out. TORCH_CUDA_ARCH_LIST says otherwise.
CUDA_ARCHITECTURES = (80, 90, 100, 120)


def switch(name: str, default: str, *others: str) -> str:
    """Return the value of one of the switches above."""
    value = os.environ.get(name) or default
    if value not in (default, *others):
        raise SystemExit(f"{name} must be {' or '.join((default, *others))}, got {value!r}")
    return value


class NoCudaError(Exception):
    """The CUDA library cannot be built: the reason, in one line."""


def ask(nvcc: str | Path, *arguments: str | Path) -> str:
    """Return what nvcc prints; where it fails, the error has its own line."""
    try:
        done = subprocess.run([nvcc, *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise NoCudaError(f"{nvcc} does not run: {error.strerror}") from None
    lines = (done.stdout + done.stderr).strip().splitlines()
    if done.returncode:
        telling = r"\b(error|fatal|No such file|not found)\b"
        wrong = [line.strip() for line in lines if re.search(telling, line)]
        raise NoCudaError(f"{nvcc} fails: {[*wrong, *lines[-1:], f'status {done.returncode}'][0]}")
    return "\n".join(lines)


def find_cuda() -> Path:
    """Find the folder of a toolkit that compiles for this torch, which takes no GPU."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None:
        raise NoCudaError(f"no nvcc in {home}/bin (CUDA_HOME)" if home else "no nvcc on PATH")
    if torch.version.cuda is None:
        raise NoCudaError(f"torch {torch.__version__} has no CUDA")
    # On PATH it may be a wrapper, far from its toolkit.
    top = re.search(r"^#\$ (?:TOP|_HERE_)=(.+)$", ask(nvcc, "--dryrun", "probe.cu"), re.M)
    if top is None:
        raise NoCudaError(f"{nvcc} --dryrun names no toolkit")
    found = re.search(r"release (\d+)\.|$", ask(nvcc, "--version"))[1] or "unknown"
    if found != torch.version.cuda.split(".")[0]:
        # The driver that this torch needs may not run what that nvcc makes.
        raise NoCudaError(f"nvcc is of CUDA {found}, torch of CUDA {torch.version.cuda}")
    folder = Path(top[1]).resolve()
    toolkit = folder.parent if folder.name == "bin" else folder
    with tempfile.TemporaryDirectory() as work:
        probe = Path(work, "probe.cu")
        probe.write_text("#include <cuda_fp16.h>\n__global__ void probe() {}\n")
        # The host compiler is the one that torch's build takes.
        host = ["-ccbin", os.environ["CC"]] if "CC" in os.environ else []
        options = [*host, *architecture_flags(toolkit)[:1], "-c", probe, "-o", f"{probe}.o"]
        ask(toolkit / "bin/nvcc", *options)
    return toolkit


def cuda_choice() -> tuple[Path | None, str]:
    """Choose the toolkit to build with, or None, and what the build's own record says of it."""
    wanted = switch("AT_FUSED_CUDA", "auto", "0", "1")
    if wanted == "0":
        return None, "not built: AT_FUSED_CUDA=0"
    try:
        toolkit = find_cuda()
    except NoCudaError as error:
        if wanted == "1":
            message = f"AT_FUSED_CUDA=1, but the CUDA library cannot be built: {error}"
            raise SystemExit(message) from None
        return None, f"not built: {error}"
    return toolkit, f"built with {toolkit} against torch's CUDA {torch.version.cuda}"


def architecture_flags(toolkit: Path) -> list[str]:
    """Return the -gencode options for nvcc."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return []  # torch's build makes them of it
    listed = ask(toolkit / "bin/nvcc", "--list-gpu-code").split()
    known = [sm for sm in CUDA_ARCHITECTURES if f"sm_{sm}" in listed]
    if not known:
        raise NoCudaError(f"{toolkit}/bin/nvcc compiles for none of sm_{CUDA_ARCHITECTURES}")
    flags = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in known]
    return [*flags, *(f"-gencode=arch=compute_{sm},code=compute_{sm}" for sm in known[-2:])]


def sources(device: str) -> list[str]:
    """List what a device's library is compiled from."""
    files = (ROOT / "csrc" / device).iterdir()
    return sorted(str(p.relative_to(ROOT)) for p in files if p.suffix in (".cpp", ".cu"))


def cuda_extension(toolkit: Path) -> CppExtension:
    """Make the CUDA library. The CUDA runtime is linked in: whichever torch ships."""
    os.environ["CUDA_HOME"] = cpp_extension.CUDA_HOME = str(toolkit)
    cuda = CUDAExtension(
        "at_fused._cuda",
        sources("cuda"),
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


def extensions(toolkit: Path | None, cuda: str) -> list:
    """List the libraries, and what is known of their build."""
    # It may hold a compiler's words, and goes through a shell and ninja into C++.
    cuda = re.sub(r'[^ -~]|["$\\]', "'", cuda)
    defines = {"VERSION": VERSION, "TORCH": torch.__version__, "CUDA": cuda}
    build_info = CppExtension(
        "at_fused._build_info",
        ["csrc/build_info.cpp"],
        include_dirs=[pybind11.get_include()],
        define_macros=[(f"AT_FUSED_{name}", f'"{value}"') for name, value in defines.items()],
        extra_link_args=LINK,
    )
    # It reports on a package that cannot find its torch, so it must not need one itself.
    build_info.libraries.clear()
    build_info.library_dirs.clear()
    cpu = CppExtension(
        "at_fused._cpu",
        sources("cpu"),
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args=[*CPU, *COMPILE],
        extra_link_args=LINK,
        py_limited_api=True,  # the library has no Python in it: one file for all Pythons
    )
    return [cpu, *([cuda_extension(toolkit)] if toolkit else []), build_info]


class Build(BuildExtension):
    about_cuda = ""

    def run(self) -> None:
        compiler = os.environ.get("CXX", "c++")
        if shutil.which(shlex.split(compiler)[0]) is None:
            raise SystemExit(
                f"at_fused cannot be built: no C++ compiler, {compiler} is not on PATH. Install "
                "one (CXX names another than c++), or set AT_FUSED_CPP=0 to install at_fused "
                "without compiled code: it then runs on plain PyTorch, slower."
            )
        print(f"at_fused: the CUDA library is {self.about_cuda}", flush=True)
        # A library that earlier switches left in the build folder would go into this wheel.
        for library in Path(self.build_lib, "at_fused").glob("*.so"):
            library.unlink()
        super().run()


if switch("AT_FUSED_CPP", "1", "0") == "0":
    if os.environ.get("AT_FUSED_CUDA") == "1":
        raise SystemExit("AT_FUSED_CUDA=1, but nothing is compiled: AT_FUSED_CPP=0")
    setup()
else:
    toolkit, Build.about_cuda = cuda_choice()
    setup(ext_modules=extensions(toolkit, Build.about_cuda), cmdclass={"build_ext": Build})
