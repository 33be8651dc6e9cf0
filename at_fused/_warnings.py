"""This package's warnings: their category, so that they can be filtered as one, and their line."""

import sys
import warnings

_NOT_THE_CALLER = ("at_fused", "torch", "importlib")


class AtFusedWarning(UserWarning):
    """Something works, but not as the user may expect."""


def warn(message: str) -> None:
    """Warn at the caller's line, the first up the stack outside this package, torch and imports."""
    level, frame = 1, sys._getframe()
    while frame.f_back and str(frame.f_globals.get("__name__")).split(".")[0] in _NOT_THE_CALLER:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, AtFusedWarning, stacklevel=level)
