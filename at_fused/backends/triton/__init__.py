"""The operators as Triton kernels, for CUDA and ROCm GPUs without a compiled library.

Triton is imported by the first call. It compiles for about a second for each new combination of
dtypes, layouts and options. With ``TRITON_INTERPRET=1``, set before Triton is imported, the same
kernels run on CPU tensors, slowly.

A list of up to ``launch.MAX_ENTRIES`` pairs or features needs one launch.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch


def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def loaded() -> bool:
    """Return True if CUDA tensors can use Triton. Does not query devices, to keep imports fast."""
    has_gpus = torch.version.cuda or torch.version.hip
    return bool(has_gpus) and _installed()


def available() -> bool:
    """Return True if Triton is installed and there is a GPU, or the interpreter is on."""
    return _installed() and (torch.cuda.is_available() or interpreted())


def reason() -> str:
    """Return a description of the back end, or why the kernels cannot run here."""
    if not _installed():
        return "triton is not installed"
    return "Triton kernels" if available() else "no GPU, and TRITON_INTERPRET=1 is not set"


def interpreted() -> bool:
    """Return True if the user turned on Triton's interpreter, which runs on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _lazy(module_name: str, name: str) -> Callable[..., Any]:
    """Return an operator that imports its module, and Triton, when it is called."""

    def operator(*arguments: Any) -> Any:
        module = importlib.import_module(f"at_fused.backends.triton.{module_name}")
        return getattr(module, name)(*arguments)

    return operator


attention_map = _lazy("maps", "attention_map")
at_loss = _lazy("loss", "at_loss")
attention_map_backward = _lazy("gradients", "attention_map_backward")
attention_tap_backward = _lazy("gradients", "attention_tap_backward")
attention_tap_backward_ = _lazy("gradients", "attention_tap_backward_")
at_value_and_grad = _lazy("loss", "at_value_and_grad")
map_loss = _lazy("loss_of_maps", "map_loss")
