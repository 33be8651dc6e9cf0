"""A compiled library of this package: found, and loaded, which registers its kernels."""

from __future__ import annotations

from pathlib import Path

import torch

_FOLDER = Path(__file__).resolve().parent.parent


class Compiled:
    """``at_fused/<stem>*.so``; ``failure`` says why it is not in use, "" if it is."""

    def __init__(self, stem: str) -> None:
        self.stem = stem
        self.failure = "not loaded yet"
        self.found = False  # whether there is one at all

    def load(self) -> None:
        """Loads the library, or says in ``failure`` why that cannot be."""
        libraries = sorted(_FOLDER.glob(f"{self.stem}*.so"))
        self.found = bool(libraries)
        if not self.found:
            self.failure = f"no compiled library in {_FOLDER}"
            return
        try:
            torch.ops.load_library(str(libraries[0]))
            self.failure = ""
        except (OSError, RuntimeError) as error:
            self.failure = f"{libraries[0].name} does not load: {error}"

    def loaded(self) -> bool:
        """Whether the library's kernels are registered."""
        return not self.failure
