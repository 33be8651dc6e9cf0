"""The options that a loss hands from its public function to the operators."""

from __future__ import annotations

from typing import NamedTuple


class LossOptions(NamedTuple):
    """The options that make, normalise and compare maps; the defaults of ``at_loss``."""

    p: float = 2.0
    collapse: str = "mean"
    form: str = "code"
    reduction: str = "sum"
    eps_mode: str = "max"
    eps: float = 1e-12
