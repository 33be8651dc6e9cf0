"""The category of this package's warnings, and the function that issues them."""

import sys
import warnings

_SKIPPED_PACKAGES = ("at_fused", "torch", "importlib")


class AtFusedWarning(UserWarning):
    """Warning about behaviour that the user may not expect."""


def warn(message: str) -> None:
    """Warn at the caller's line: the first frame outside this package, torch and imports."""
    level, frame = 1, sys._getframe()
    while frame.f_back and str(frame.f_globals.get("__name__")).split(".")[0] in _SKIPPED_PACKAGES:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, AtFusedWarning, stacklevel=level)
