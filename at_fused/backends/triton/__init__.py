"""The operators as Triton kernels, for CUDA and ROCm GPUs without a compiled library.

Nothing here imports Triton before the first call, which compiles: a second or so for each new
combination of dtypes, layouts and options. Under ``TRITON_INTERPRET=1``, set before Triton is
imported, the same kernels run on CPU tensors, slowly.

A list of up to ``launch.MAX_ENTRIES`` pairs or features is one launch.
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
    """Return whether CUDA tensors can go to Triton; ask no device: importing stays cheap."""
    has_gpus = torch.version.cuda or torch.version.hip
    return bool(has_gpus) and _installed()


def available() -> bool:
    """Return whether Triton is installed and has something to run on."""
    return _installed() and (torch.cuda.is_available() or interpreted())


def reason() -> str:
    """Return a name, or why the kernels cannot run here."""
    if not _installed():
        return "triton is not installed"
    return "Triton kernels" if available() else "no GPU, and TRITON_INTERPRET=1 is not set"


def interpreted() -> bool:
    """Return whether Triton's interpreter is asked for, which runs kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _later(module: str, name: str) -> Callable[..., Any]:
    """Make an operator that imports Triton when it is first called."""

    def operator(*arguments: Any) -> Any:
        found = importlib.import_module(f"at_fused.backends.triton.{module}")
        return getattr(found, name)(*arguments)

    return operator


attention_map = _later("maps", "attention_map")
at_loss = _later("loss", "at_loss")
attention_map_backward = _later("gradients", "attention_map_backward")
attention_tap_backward = _later("gradients", "attention_tap_backward")
attention_tap_backward_ = _later("gradients", "attention_tap_backward_")
at_value_and_grad = _later("loss", "at_value_and_grad")
map_loss = _later("loss_of_maps", "map_loss")
