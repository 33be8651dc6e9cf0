"""The operators ``torch.ops.at_fused.*``: schema and autograd of each, in one place.

What runs them is chosen in ``backends``: ``backends.eager`` is registered for every device, a
compiled library for its own on top of it.
"""

from at_fused._ops.attention import attention_map, attention_map_backward
from at_fused._ops.loss import at_loss, at_value_and_grad, map_loss
from at_fused._ops.tap import attention_tap, attention_tap_backward, attention_tap_backward_
from at_fused.backends import load

__all__ = [
    "at_loss",
    "at_value_and_grad",
    "attention_map",
    "attention_map_backward",
    "attention_tap",
    "attention_tap_backward",
    "attention_tap_backward_",
    "map_loss",
]

load()  # importing the operators also gives each device its fastest kernels
