"""Build of the compiled libraries. All other metadata of the package is in pyproject.toml.

AT_FUSED_CUDA=0|1|auto   0 skips the CUDA library, 1 requires it, auto (default) builds it if nvcc
                         works. CUDA_HOME or CUDA_PATH selects the toolkit, otherwise nvcc on PATH.
AT_FUSED_CPP=0|1         0 compiles nothing and needs no compiler: at_fused runs in plain PyTorch.
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

# The libraries use only the stable ABI of this torch release, so that one build works with all
# later releases, even if a newer one compiled it.
TORCH_TARGET_VERSION = "0x020a000000000000"

LINK = ["-Wl,-s", "-Wl,--as-needed"] if platform.system() == "Linux" else []
# -g0: the linker strips debug symbols, and Python's default -g takes a third of the build time.
# -ffile-prefix-map: error messages have the repository's file names, not the build machine's.
COMPILE = ["-fvisibility=hidden", "-g0", f"-ffile-prefix-map={ROOT}/="]
CPU = ["-O3", "-fno-math-errno", "-ffp-contract=fast", "-Wno-psabi", "-Wno-maybe-uninitialized"]

# Targets of the CUDA library; the last two also as PTX, for devices between and after them. Targets
# that the toolkit does not support are skipped. TORCH_CUDA_ARCH_LIST overrides this list.
CUDA_ARCHITECTURES = (80, 90, 100, 120)


def read_switch(name: str, default: str, *others: str) -> str:
    """Return the value of one of the environment variables above."""
    value = os.environ.get(name) or default
    if value not in (default, *others):
        raise SystemExit(f"{name} must be {' or '.join((default, *others))}, got {value!r}")
    return value


class NoCudaError(Exception):
    """Reason why the CUDA library cannot be built, in one line."""


def run_nvcc(nvcc: str | Path, *arguments: str | Path) -> str:
    """Return the output of nvcc; if it fails, raise an error with its first error line."""
    try:
        done = subprocess.run([nvcc, *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise NoCudaError(f"{nvcc} does not run: {error.strerror}") from None
    lines = (done.stdout + done.stderr).strip().splitlines()
    if done.returncode:
        pattern = r"\b(error|fatal|No such file|not found)\b"
        errors = [line.strip() for line in lines if re.search(pattern, line)]
        raise NoCudaError(f"{nvcc} fails: {[*errors, *lines[-1:], f'status {done.returncode}'][0]}")
    return "\n".join(lines)


def find_cuda() -> Path:
    """Return the folder of a CUDA toolkit that can compile for this torch; needs no GPU."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None:
        raise NoCudaError(f"no nvcc in {home}/bin (CUDA_HOME)" if home else "no nvcc on PATH")
    if torch.version.cuda is None:
        raise NoCudaError(f"torch {torch.__version__} has no CUDA")
    # nvcc on PATH may be a wrapper outside the toolkit's folder.
    top = re.search(r"^#\$ (?:TOP|_HERE_)=(.+)$", run_nvcc(nvcc, "--dryrun", "probe.cu"), re.M)
    if top is None:
        raise NoCudaError(f"{nvcc} --dryrun names no toolkit")
    release = re.search(r"release (\d+)\.|$", run_nvcc(nvcc, "--version"))[1] or "unknown"
    if release != torch.version.cuda.split(".")[0]:
        # The driver for this torch may not support the output of that nvcc.
        raise NoCudaError(f"nvcc is from CUDA {release}, torch from CUDA {torch.version.cuda}")
    folder = Path(top[1]).resolve()
    toolkit = folder.parent if folder.name == "bin" else folder
    with tempfile.TemporaryDirectory() as work:
        probe = Path(work, "probe.cu")
        probe.write_text("#include <cuda_fp16.h>\n__global__ void probe() {}\n")
        # The same host compiler as in torch's build.
        host = ["-ccbin", os.environ["CC"]] if "CC" in os.environ else []
        options = [*host, *architecture_flags(toolkit)[:1], "-c", probe, "-o", f"{probe}.o"]
        run_nvcc(toolkit / "bin/nvcc", *options)
    return toolkit


def choose_cuda() -> tuple[Path | None, str]:
    """Return the CUDA toolkit to build with, or None, and a line for the build's record."""
    choice = read_switch("AT_FUSED_CUDA", "auto", "0", "1")
    if choice == "0":
        return None, "not built: AT_FUSED_CUDA=0"
    try:
        toolkit = find_cuda()
    except NoCudaError as error:
        if choice == "1":
            message = f"AT_FUSED_CUDA=1, but the CUDA library cannot be built: {error}"
            raise SystemExit(message) from None
        return None, f"not built: {error}"
    return toolkit, f"built with {toolkit} against torch's CUDA {torch.version.cuda}"


def architecture_flags(toolkit: Path) -> list[str]:
    """Return the -gencode options for nvcc."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return []  # torch's build adds the options
    targets = run_nvcc(toolkit / "bin/nvcc", "--list-gpu-code").split()
    supported = [sm for sm in CUDA_ARCHITECTURES if f"sm_{sm}" in targets]
    if not supported:
        raise NoCudaError(f"{toolkit}/bin/nvcc supports none of sm_{CUDA_ARCHITECTURES}")
    flags = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in supported]
    return [*flags, *(f"-gencode=arch=compute_{sm},code=compute_{sm}" for sm in supported[-2:])]


def list_sources(device: str) -> list[str]:
    """List the source files of a device's library."""
    files = (ROOT / "csrc" / device).iterdir()
    return sorted(str(p.relative_to(ROOT)) for p in files if p.suffix in (".cpp", ".cu"))


def cuda_extension(toolkit: Path) -> CppExtension:
    """Return the CUDA library. It links the CUDA runtime statically, to work with any torch's."""
    os.environ["CUDA_HOME"] = cpp_extension.CUDA_HOME = str(toolkit)
    cuda = CUDAExtension(
        "at_fused._cuda",
        list_sources("cuda"),
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
    """List the libraries; the last one holds the record of the build."""
    # May contain compiler output. The shell, ninja and C++ must not interpret any of it.
    cuda = re.sub(r'[^ -~]|["$\\]', "'", cuda)
    defines = {"VERSION": VERSION, "TORCH": torch.__version__, "CUDA": cuda}
    build_info = CppExtension(
        "at_fused._build_info",
        ["csrc/build_info.cpp"],
        include_dirs=[pybind11.get_include()],
        define_macros=[(f"AT_FUSED_{name}", f'"{value}"') for name, value in defines.items()],
        extra_link_args=LINK,
    )
    # It must load without torch, to report on a package that cannot find its torch.
    build_info.libraries.clear()
    build_info.library_dirs.clear()
    cpu = CppExtension(
        "at_fused._cpu",
        list_sources("cpu"),
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args=[*CPU, *COMPILE],
        extra_link_args=LINK,
        py_limited_api=True,  # the library does not use Python: one file for all versions
    )
    return [cpu, *([cuda_extension(toolkit)] if toolkit else []), build_info]


class Build(BuildExtension):
    cuda_record = ""

    def run(self) -> None:
        compiler = os.environ.get("CXX", "c++")
        if shutil.which(shlex.split(compiler)[0]) is None:
            raise SystemExit(
                f"at_fused cannot be built: no C++ compiler ({compiler} is not on PATH). Install "
                "one (CXX selects another than c++), or set AT_FUSED_CPP=0 to install at_fused "
                "without compiled code; it then runs in plain PyTorch, which is slower."
            )
        print(f"at_fused: the CUDA library is {self.cuda_record}", flush=True)
        # Libraries from earlier builds with other settings must not get into this wheel.
        for library in Path(self.build_lib, "at_fused").glob("*.so"):
            library.unlink()
        super().run()


if read_switch("AT_FUSED_CPP", "1", "0") == "0":
    if os.environ.get("AT_FUSED_CUDA") == "1":
        raise SystemExit("AT_FUSED_CUDA=1, but nothing is compiled: AT_FUSED_CPP=0")
    setup()
else:
    toolkit, Build.cuda_record = choose_cuda()
    setup(ext_modules=extensions(toolkit, Build.cuda_record), cmdclass={"build_ext": Build})
