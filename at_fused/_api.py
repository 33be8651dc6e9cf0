"""Public names that need torch: the package imports them with torch, or at their first use."""

from at_fused._hooks import remove_hooks
from at_fused._warnings import AtFusedWarning
from at_fused.backends import Backend, backends, use_backend
from at_fused.balance import GradientRatio, gradient_ratio
from at_fused.distillation import FeaturesLoss, KDLoss, features_loss, kd_loss
from at_fused.functional import (
    ATLoss,
    at,
    at_loss,
    at_value_and_grad,
    attention_map,
    attention_tap,
    map_loss,
)
from at_fused.gradients import flip_symmetry_loss, gradient_at_loss, input_gradient
from at_fused.layers import match_layers
from at_fused.teacher_cache import StaleCacheError, TeacherCache, teacher_hash
from at_fused.transfer import AttentionTransfer
