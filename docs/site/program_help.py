"""A MkDocs hook: ends the page of at_fused.train with the program's --help text."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mkdocs.structure.pages import Page


def on_page_markdown(markdown: str, page: Page, **options: object) -> str:
    """Append the text. This imports neither torch nor the compiled libraries."""
    if page.file.src_uri != "api/train.md":
        return markdown
    os.environ["COLUMNS"] = "100"
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from at_fused.train.cli import build_parser

    return f"{markdown}\n## at-fused-train --help\n\n```text\n{build_parser().format_help()}```\n"
