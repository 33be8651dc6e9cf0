"""The compiled libraries (csrc/cpu, csrc/cuda): loading them, and how they were built."""

from __future__ import annotations

import importlib
import os
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from at_fused._warnings import warn

_FOLDER = Path(__file__).resolve().parent.parent


class _Library:
    """Library ``at_fused/<stem>*.so``; ``failure`` is "", or the reason why it is not in use."""

    def __init__(self, stem: str) -> None:
        self.stem = stem
        self.failure = "not loaded yet"
        self.exists = False

    def load(self) -> None:
        """Load the library, which registers its kernels, or set ``failure``."""
        libraries = sorted(_FOLDER.glob(f"{self.stem}*.so"))
        self.exists = bool(libraries)
        if not self.exists:
            self.failure = f"no compiled library in {_FOLDER}"
            return
        try:
            torch.ops.load_library(str(libraries[0]))
            self.failure = ""
        except (OSError, RuntimeError) as error:
            self.failure = f"{libraries[0].name} cannot be loaded: {error}"

    def loaded(self) -> bool:
        """Return True once the library's kernels are registered."""
        return not self.failure

    available = loaded


class _CPU(_Library):
    def load(self) -> None:
        """Load the library; warn if that fails, unless the user chose to install without it."""
        super().load()
        if self.loaded():
            isa = os.environ.get("AT_FUSED_CPU_ISA")
            if isa and isa != self.isa():
                warn(
                    f"AT_FUSED_CPU_ISA must be one of {', '.join(self.instruction_sets())} on this "
                    f"machine, got {isa!r}; using {self.isa()} instead"
                )
            return
        not_compiled = why_not_compiled()
        if not (not_compiled and not_compiled.is_intended):
            advice = f": {not_compiled.reason}" if not_compiled else ""
            warn(
                f"the CPU kernels are not used ({self.failure}{advice}); at_fused runs in plain "
                "PyTorch, which is slower"
            )

    def isa(self) -> str:
        """Return the instruction set in use: "baseline", "avx2" or "avx512"."""
        return str(torch.ops.at_fused.cpu_isa())

    def instruction_sets(self) -> list[str]:
        """Return the instruction sets that this processor supports, lowest first."""
        return list(torch.ops.at_fused.cpu_instruction_sets())

    def reason(self) -> str:
        """Return the instruction set in use, or why the library is not in use."""
        return self.failure or f"C++ kernels, {self.isa()}"


class _CUDA(_Library):
    def load(self) -> None:
        """Load the library if torch has CUDA; warn if the library exists but cannot be loaded."""
        if torch.version.cuda is None:
            self.failure = f"torch {torch.__version__} has no CUDA"
            return
        super().load()
        if self.exists and not self.loaded():
            warn(
                f"the CUDA kernels are not used ({self.failure}); CUDA tensors use Triton or plain "
                "PyTorch instead"
            )

    def available(self) -> bool:
        """Return True if the library is loaded and there is a CUDA device."""
        return self.loaded() and torch.cuda.is_available()

    def reason(self) -> str:
        """Return a description of the library, or why it is not in use."""
        if not self.loaded():
            build = build_info()
            why = f" ({build.cuda})" if build and build.cuda.startswith("not built") else ""
            return f"{self.failure}{why}"
        return "CUDA kernels" if torch.cuda.is_available() else "CUDA kernels, but no CUDA device"


cpu = _CPU("_cpu")
cuda = _CUDA("_cuda")


# ---- how this package was built ------------------------------------------------------------------


def build_info() -> ModuleType | None:
    """Return the record of this package's build; None if it is missing or unreadable."""
    if not any(_FOLDER.glob("_build_info*")):
        return None  # the import could find that of an editable install in another folder
    try:
        return importlib.import_module("at_fused._build_info")
    except ImportError:
        return None


class NotCompiled(NamedTuple):
    """Reason why this package has no compiled libraries; ``is_intended`` if the user chose so."""

    reason: str
    is_intended: bool


def why_not_compiled() -> NotCompiled | None:
    """Return why this package has no compiled libraries; None if it has one."""
    if any(_FOLDER.glob("*.so")):
        return None
    wheels = [package.read_text("WHEEL") or "" for package in distributions(name="at_fused")]
    if any("Root-Is-Purelib: true" in wheel for wheel in wheels):
        return NotCompiled("installed with AT_FUSED_CPP=0", is_intended=True)
    if not (_FOLDER.parent / "csrc").is_dir():
        return NotCompiled("the installation is damaged; install it again", is_intended=False)
    advice = f"run in another folder, or pip install -e {_FOLDER.parent}"
    return NotCompiled(f"this is the source folder; {advice}", is_intended=False)
