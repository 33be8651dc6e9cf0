"""The operators ``torch.ops.at_fused.*``, each with its schema and autograd.

``backends`` chooses their kernels: ``backends.eager`` is registered for every device, and a
compiled library overrides it for its own device.
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

load()
