"""A compiled library of this package: found, and loaded, which registers its kernels."""

from __future__ import annotations

import importlib
import json
import os
from importlib.metadata import Distribution, distributions
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from urllib.parse import urlparse
from urllib.request import url2pathname

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


def _folder_of(installed: Distribution) -> Path:
    """The package that this is the record of: beside it, or where an editable one points."""
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        return Path(url2pathname(urlparse(origin["url"]).path), "at_fused").resolve()
    return Path(str(installed.locate_file("at_fused"))).resolve()


def build_info() -> ModuleType | None:
    """How this package was built; None where it was not, or that cannot be read."""
    if not any(_FOLDER.glob("_build_info*")):
        return None  # an editable package elsewhere would lend its own
    try:
        return importlib.import_module("at_fused._build_info")
    except ImportError:
        return None


class Nothing(NamedTuple):
    """Why there is nothing compiled in this package."""

    reason: str
    wanted: bool  # whether the user asked for that


def nothing_compiled() -> Nothing | None:
    """Why there is nothing compiled in this package; None where there is something."""
    if any(_FOLDER.glob("*.so")):
        return None
    other = None
    for installed in distributions(name="at_fused"):
        folder = _folder_of(installed)
        if folder != _FOLDER:
            other = other or (folder if folder.is_dir() else None)
        # So are all wheels without libraries; for Windows there are no others.
        elif os.name != "nt" and "Root-Is-Purelib: true" in (installed.read_text("WHEEL") or ""):
            return Nothing("installed with AT_FUSED_CPP=0", wanted=True)
    sources = (_FOLDER.parent / "csrc").is_dir()
    install = f"pip install -e {_FOLDER.parent}"
    if other:
        reason = f"imported in place of the package in {other}; run in another folder"
        return Nothing(f"{reason}, or {install}" if sources else reason, wanted=False)
    reason = f"these are the sources; {install}" if sources else "it is damaged; install it again"
    return Nothing(reason, wanted=False)
