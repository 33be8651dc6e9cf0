"""Deprecated module of 0.1.0: import ``ATLoss`` from ``at_fused``."""

import warnings

from at_fused.functional import ATLoss as ATLoss

warnings.warn(
    "at_fused.modules is deprecated and will be removed in 0.3.0: from at_fused import ATLoss",
    FutureWarning,
    stacklevel=2,
)
