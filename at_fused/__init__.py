"""Fused kernels for attention transfer, the knowledge-distillation loss of Zagoruyko & Komodakis.

``at_loss`` is the drop-in; README.md has the API at a glance.
"""

from at_fused._version import __version__
from at_fused._warnings import AtFusedWarning
from at_fused.backends import Backend, backends, use_backend
from at_fused.backends import load as _load
from at_fused.functional import at, at_loss, at_value_and_grad, attention_map
from at_fused.modules import ATLoss

_load()

__all__ = [
    "ATLoss",
    "AtFusedWarning",
    "Backend",
    "__version__",
    "at",
    "at_loss",
    "at_value_and_grad",
    "attention_map",
    "backends",
    "use_backend",
]
