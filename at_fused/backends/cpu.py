"""The compiled CPU library (csrc/cpu): loaded, and asked about itself."""

from __future__ import annotations

import os
import warnings

import torch

from at_fused._warnings import AtFusedWarning
from at_fused.backends.compiled import Compiled, nothing_compiled

_library = Compiled("_cpu")
loaded = available = _library.loaded


def load() -> None:
    """Loads the library; where that fails, warns once and leaves the operators to eager.

    A user who asked for none is not warned.
    """
    _library.load()
    wanted = os.environ.get("AT_FUSED_CPU_ISA")
    if loaded() and wanted and wanted != isa():
        warnings.warn(
            f"AT_FUSED_CPU_ISA must be one of {', '.join(isa_levels())} on this machine, "
            f"got {wanted!r}; {isa()} is used",
            AtFusedWarning,
            stacklevel=2,
        )
    if loaded():
        return
    nothing = nothing_compiled()
    if not (nothing and nothing.wanted):
        advice = f": {nothing.reason}" if nothing else ""
        warnings.warn(
            f"the CPU kernels are not used ({_library.failure}{advice}); at_fused runs on plain "
            "PyTorch, slower",
            AtFusedWarning,
            stacklevel=2,
        )


def isa() -> str:
    """The instruction-set level in use: "baseline", "avx2" or "avx512"."""
    return str(torch.ops.at_fused.cpu_isa())


def isa_levels() -> list[str]:
    """The levels that this processor can run, lowest first."""
    return list(torch.ops.at_fused.cpu_isa_levels())


def reason() -> str:
    """The level in use, or why the library is not."""
    return _library.failure or f"C++ kernels, {isa()}"
