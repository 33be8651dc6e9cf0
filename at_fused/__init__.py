"""Fused kernels for attention transfer, the knowledge-distillation loss of Zagoruyko & Komodakis.

``at_loss`` is the drop-in; README.md has the API at a glance.
"""

from at_fused import schedules
from at_fused._version import __version__
from at_fused._warnings import AtFusedWarning
from at_fused.backends import Backend, backends, use_backend
from at_fused.backends import load as _load
from at_fused.distillation import FeaturesLoss, KDLoss, features_loss, kd_loss
from at_fused.functional import (
    at,
    at_loss,
    at_value_and_grad,
    attention_map,
    attention_tap,
    map_loss,
)
from at_fused.gradients import flip_symmetry_loss, gradient_at_loss, input_gradient
from at_fused.layers import match_layers
from at_fused.modules import ATLoss
from at_fused.teacher_cache import TeacherCache
from at_fused.transfer import AttentionTransfer

_load()

__all__ = [
    "ATLoss",
    "AtFusedWarning",
    "AttentionTransfer",
    "Backend",
    "FeaturesLoss",
    "KDLoss",
    "TeacherCache",
    "__version__",
    "at",
    "at_loss",
    "at_value_and_grad",
    "attention_map",
    "attention_tap",
    "backends",
    "features_loss",
    "flip_symmetry_loss",
    "gradient_at_loss",
    "input_gradient",
    "kd_loss",
    "map_loss",
    "match_layers",
    "schedules",
    "use_backend",
]
