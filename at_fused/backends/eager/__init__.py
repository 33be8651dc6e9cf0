"""The operators in plain PyTorch: the readable reference, and the path of last resort.

Runs on every device that torch has. Each function has the signature of its operator in
``_ops``. Everything here is differentiable, to any order: ``_ops`` leans on that for second
derivatives. fp16, bf16 and fp32 are computed in fp32, fp64 in fp64.
"""

from at_fused.backends.eager.attention import (
    at_loss,
    at_value_and_grad,
    attention_map,
    attention_map_backward,
    attention_tap_backward,
    attention_tap_backward_,
    collapse_scale,
    map_loss,
    normalize,
    pair_loss,
    sample_weight,
    times_loss_gradient,
    wide,
    without_first,
)

__all__ = [
    "at_loss",
    "at_value_and_grad",
    "attention_map",
    "attention_map_backward",
    "attention_tap_backward",
    "attention_tap_backward_",
    "available",
    "collapse_scale",
    "loaded",
    "map_loss",
    "normalize",
    "pair_loss",
    "reason",
    "sample_weight",
    "times_loss_gradient",
    "wide",
    "without_first",
]


def loaded() -> bool:
    """Whether torch's dispatcher has it."""
    return True


def available() -> bool:
    """Whether it can run here."""
    return True


def reason() -> str:
    """What it is."""
    return "plain PyTorch"
