"""Fused kernels for attention transfer, the knowledge-distillation loss of Zagoruyko & Komodakis.

``at_loss`` is the drop-in, ``AttentionTransfer`` the loss of two networks as they are; README.md
has the API at a glance. Beside what is here:

- ``at_fused.compat``: the losses of published programs, and a beta of one as that of another
- ``at_fused.schedules``: beta as a function of the step
- ``at_fused.visualize``: attention maps over images; also a program
- ``at_fused.teacher_cache``: what ``TeacherCache`` writes, and the hash of a teacher
- ``at_fused.integrations.torchdistill``: the loss in torchdistill's configurations
- ``at_fused.info``: what is installed and what runs; a program
- ``at_fused.train``: at-fused-train, the training program
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

# The modules named above, each imported when it is first asked for.
_MODULES = ("compat", "info", "integrations", "teacher_cache", "train", "visualize")

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
        if name in _MODULES:
            return import_module(f"at_fused.{name}")
        if name not in __all__:
            raise AttributeError(f"module 'at_fused' has no attribute {name!r}")
        # Nobody needed torch so far, and it takes a second or two: at-fused-train answers --help
        # without.
        api = import_module("at_fused._api")
        globals().update({each: getattr(api, each) for each in __all__ if hasattr(api, each)})
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__, *_MODULES})


class _Package(ModuleType):
    """A package whose ``backends`` is the function, also where only the sub-package is imported."""

    @property
    def backends(self) -> Any:
        return import_module("at_fused._api").backends

    @backends.setter
    def backends(self, module: object) -> None:
        """Ignore what the import system sets once the sub-package of that name is imported."""


sys.modules[__name__].__class__ = _Package
