"""The API reference, from the docstrings: python docs/api/make.py writes site/index.html.

Needs pip install ".[docs]"; with torchdistill installed, its adapter has a page as well.
"""

from __future__ import annotations

import importlib
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pdoc

from at_fused.train import cli
from at_fused.visualize.__main__ import build_parser

OUT = Path(__file__).parents[2] / "site"
PAGES = (
    "at_fused",
    "at_fused.compat",
    "at_fused.schedules",
    "at_fused.visualize",
    "at_fused.teacher_cache",
    "at_fused.integrations.torchdistill",
    "at_fused.info",
    "at_fused.train",
)
HELP = {"at_fused.visualize": build_parser, "at_fused.train": cli.build_parser}


def page_of(name: str) -> pdoc.doc.Module:
    """A module, with its program's --help."""
    module: Any = importlib.import_module(name)
    if name in HELP:
        module.__doc__ += f"\n\n```\n{HELP[name]().format_help()}```\n"
    return pdoc.doc.Module(module)


def main() -> None:
    """Renders all pages, an index and what the search looks through."""
    os.environ["COLUMNS"] = "88"  # of the programs' help: as wide as a page
    # An adapter can only be imported where its framework is.
    names = [n for n in PAGES if ".integrations." not in n or find_spec(n.rpartition(".")[2])]
    pages = {name: page_of(name) for name in names}
    here = Path(__file__).parent
    pdoc.render.configure(docformat="google", show_source=False, template_directory=here)
    for name, page in pages.items():
        file = OUT / f"{name.replace('.', '/')}.html"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(pdoc.render.html_module(page, pages), encoding="utf-8")
    (OUT / "index.html").write_text(pdoc.render.html_index(pages), encoding="utf-8")
    (OUT / "search.js").write_text(pdoc.render.search_index(pages), encoding="utf-8")
    print(OUT / "index.html")


if __name__ == "__main__":
    main()
