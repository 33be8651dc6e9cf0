"""The compiled CUDA library (csrc/cuda): loaded where torch has CUDA, and asked about itself."""

from __future__ import annotations

import warnings

import torch

from at_fused._warnings import AtFusedWarning
from at_fused.backends.compiled import Compiled, build_info

_library = Compiled("_cuda")
loaded = _library.loaded


def load() -> None:
    """Loads the library if there is one and torch has CUDA; warns only where that should work."""
    if torch.version.cuda is None:
        _library.failure = f"torch {torch.__version__} has no CUDA"
        return
    _library.load()
    if _library.found and not loaded():
        warnings.warn(
            f"the CUDA kernels are not used ({_library.failure}); CUDA tensors take Triton or "
            "plain PyTorch",
            AtFusedWarning,
            stacklevel=2,
        )


def available() -> bool:
    """Whether the library is loaded and there is a device for it."""
    return loaded() and torch.cuda.is_available()


def reason() -> str:
    """What the library is, or why it is not used."""
    if not loaded():
        build = build_info()
        why = f" ({build.cuda})" if build and build.cuda.startswith("not built") else ""
        return f"{_library.failure}{why}"
    return "CUDA kernels" if torch.cuda.is_available() else "CUDA kernels, but no CUDA device"
