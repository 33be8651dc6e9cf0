"""Fused kernels for attention transfer, the knowledge-distillation loss of Zagoruyko & Komodakis.

``at_loss`` is a drop-in loss of features. ``AttentionTransfer`` applies it to two networks without
changes to their code. README.md gives an overview of the API. The package also has these modules:

- ``at_fused.compat``: the losses of published programs, and conversion between their betas
- ``at_fused.schedules``: schedules of beta
- ``at_fused.visualize``: attention maps drawn over images; also a command-line program
- ``at_fused.teacher_cache``: the files of ``TeacherCache``, and the hash of a teacher's weights
- ``at_fused.integrations.torchdistill``: the loss for torchdistill's configuration files
- ``at_fused.info``: a report of the installation and of the back ends in use; also a program
- ``at_fused.train``: the training program, at-fused-train
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from at_fused import schedules
from at_fused._interpreter import refuse_subinterpreters
from at_fused._version import __version__

__all__ = [
    "ATLoss",
    "AtFusedWarning",
    "AttentionTransfer",
    "Backend",
    "FeaturesLoss",
    "GradientRatio",
    "KDLoss",
    "StaleCacheError",
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
    "gradient_ratio",
    "input_gradient",
    "kd_loss",
    "map_loss",
    "match_layers",
    "remove_hooks",
    "schedules",
    "teacher_hash",
    "use_backend",
]

refuse_subinterpreters()

_LAZY_MODULES = ("compat", "info", "integrations", "teacher_cache", "train", "visualize")

if TYPE_CHECKING or "torch" in sys.modules:
    from at_fused._api import *

if TYPE_CHECKING:
    from at_fused import compat as compat
    from at_fused import info as info
    from at_fused import integrations as integrations
    from at_fused import teacher_cache as teacher_cache
    from at_fused import train as train
    from at_fused import visualize as visualize
else:

    def __getattr__(name: str) -> Any:
        if name in _LAZY_MODULES:
            return import_module(f"at_fused.{name}")
        if name not in __all__:
            raise AttributeError(f"module 'at_fused' has no attribute {name!r}")
        # Importing torch takes a second or two, and at-fused-train --help does not need it.
        api = import_module("at_fused._api")
        globals().update({n: getattr(api, n) for n in __all__ if hasattr(api, n)})
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__, *_LAZY_MODULES})


class _Package(ModuleType):
    """A package in which ``backends`` stays the function when the sub-package is imported."""

    @property
    def backends(self) -> Any:
        return import_module("at_fused._api").backends

    @backends.setter
    def backends(self, module: object) -> None:
        """Ignore the module that the import system assigns after importing the sub-package."""


sys.modules[__name__].__class__ = _Package
