"""The compiled libraries (csrc/cpu, csrc/cuda): found, loaded, and asked about themselves."""

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
    """``at_fused/<stem>*.so``; ``failure`` says why it is not in use, "" if it is."""

    def __init__(self, stem: str) -> None:
        self.stem = stem
        self.failure = "not loaded yet"
        self.found = False

    def load(self) -> None:
        """Load the library, which registers its kernels, or say in ``failure`` why not."""
        libraries = sorted(_FOLDER.glob(f"{self.stem}*.so"))
        self.found = bool(libraries)
        if not self.found:
            self.failure = f"no compiled library in {_FOLDER}"
            return
        try:
            torch.ops.load_library(str(libraries[0]))
            self.failure = ""
        except (OSError, RuntimeError) as error:
            self.failure = f"{libraries[0].name} does not load: {error}"

    def loaded(self) -> bool:
        """Return True once the library's kernels are registered."""
        return not self.failure

    available = loaded


class _CPU(_Library):
    def load(self) -> None:
        """Load the library; where that fails, warn, unless the user asked for none."""
        super().load()
        if self.loaded():
            wanted = os.environ.get("AT_FUSED_CPU_ISA")
            if wanted and wanted != self.isa():
                warn(
                    f"AT_FUSED_CPU_ISA must be one of {', '.join(self.isa_levels())} on this "
                    f"machine, got {wanted!r}; {self.isa()} is used"
                )
            return
        nothing = nothing_compiled()
        if not (nothing and nothing.wanted):
            advice = f": {nothing.reason}" if nothing else ""
            warn(
                f"the CPU kernels are not used ({self.failure}{advice}); at_fused runs on plain "
                "PyTorch, slower"
            )

    def isa(self) -> str:
        """Return the instruction set in use: "baseline", "avx2" or "avx512"."""
        return str(torch.ops.at_fused.cpu_isa())

    def isa_levels(self) -> list[str]:
        """Return the instruction sets that this processor can run, lowest first."""
        return list(torch.ops.at_fused.cpu_isa_levels())

    def reason(self) -> str:
        """Return the instruction set in use, or why the library is not."""
        return self.failure or f"C++ kernels, {self.isa()}"


class _CUDA(_Library):
    def load(self) -> None:
        """Load the library if there is one and torch has CUDA; warn only where that should work."""
        if torch.version.cuda is None:
            self.failure = f"torch {torch.__version__} has no CUDA"
            return
        super().load()
        if self.found and not self.loaded():
            warn(
                f"the CUDA kernels are not used ({self.failure}); CUDA tensors take Triton or "
                "plain PyTorch"
            )

    def available(self) -> bool:
        """Return True where the library is loaded and there is a device for it."""
        return self.loaded() and torch.cuda.is_available()

    def reason(self) -> str:
        """Return what the library is, or why it is not used."""
        if not self.loaded():
            build = build_info()
            why = f" ({build.cuda})" if build and build.cuda.startswith("not built") else ""
            return f"{self.failure}{why}"
        return "CUDA kernels" if torch.cuda.is_available() else "CUDA kernels, but no CUDA device"


cpu = _CPU("_cpu")
cuda = _CUDA("_cuda")


# ---- how this package was built ------------------------------------------------------------------


def build_info() -> ModuleType | None:
    """Return how this package was built; None where it was not, or that cannot be read."""
    if not any(_FOLDER.glob("_build_info*")):
        return None  # an editable package elsewhere would lend its own
    try:
        return importlib.import_module("at_fused._build_info")
    except ImportError:
        return None


class Nothing(NamedTuple):
    """The reason why there is nothing compiled in this package, and if the user wanted that."""

    reason: str
    wanted: bool


def nothing_compiled() -> Nothing | None:
    """Return why there is nothing compiled in this package; None where there is something."""
    if any(_FOLDER.glob("*.so")):
        return None
    wheels = [each.read_text("WHEEL") or "" for each in distributions(name="at_fused")]
    if any("Root-Is-Purelib: true" in wheel for wheel in wheels):
        return Nothing("installed with AT_FUSED_CPP=0", wanted=True)
    if not (_FOLDER.parent / "csrc").is_dir():
        return Nothing("it is damaged; install it again", wanted=False)
    advice = f"run in another folder, or pip install -e {_FOLDER.parent}"
    return Nothing(f"these are the sources; {advice}", wanted=False)
