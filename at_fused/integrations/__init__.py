"""Attention transfer inside other people's frameworks; each module needs its framework installed.

Nothing here is imported by ``import at_fused``.
"""

from importlib import import_module
from typing import Any

_MODULES = ("torchdistill",)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'at_fused.integrations' has no attribute {name!r}")
    return import_module(f"at_fused.integrations.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
