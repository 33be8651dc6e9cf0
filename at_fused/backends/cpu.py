"""The compiled CPU library: found, loaded (which registers its kernels), and asked about itself."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch

from at_fused._warnings import AtFusedWarning

_failure = "not loaded yet"


def load() -> None:
    """Loads the library; where that fails, warns once and leaves the operators to eager."""
    global _failure
    folder = Path(__file__).resolve().parent.parent
    libraries = sorted(folder.glob("_cpu*.so"))
    if not libraries:
        _failure = f"no compiled library in {folder}"
    else:
        try:
            torch.ops.load_library(str(libraries[0]))
            _failure = ""
        except (OSError, RuntimeError) as error:
            _failure = f"{libraries[0].name} does not load: {error}"
    wanted = os.environ.get("AT_FUSED_CPU_ISA")
    if not _failure and wanted and wanted != isa():
        warnings.warn(
            f"AT_FUSED_CPU_ISA must be one of {', '.join(isa_levels())} on this machine, "
            f"got {wanted!r}; {isa()} is used",
            AtFusedWarning,
            stacklevel=2,
        )
    if _failure:
        warnings.warn(
            f"the CPU kernels are not used ({_failure}); at_fused runs on plain PyTorch, slower",
            AtFusedWarning,
            stacklevel=2,
        )


def available() -> bool:
    """Whether the library's kernels are registered."""
    return not _failure


def isa() -> str:
    """The instruction-set level in use: "baseline", "avx2" or "avx512"."""
    return str(torch.ops.at_fused.cpu_isa())


def isa_levels() -> list[str]:
    """The levels that this processor can run, lowest first."""
    return list(torch.ops.at_fused.cpu_isa_levels())


def reason() -> str:
    """The level in use, or why the library is not."""
    return _failure or f"C++ kernels, {isa()}"
