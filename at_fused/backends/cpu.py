"""The compiled CPU library: found, loaded (which registers its kernels), and asked about itself."""

from __future__ import annotations

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


def reason() -> str:
    """The level in use, or why the library is not."""
    return _failure or f"C++ kernels, {isa()}"
