"""A MkDocs hook: turns a notebook with stored outputs into Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from mkdocs.structure.pages import Page


def on_page_markdown(markdown: str, page: Page, **options: object) -> str:
    """Convert the page of a notebook; other pages stay as they are."""
    if not str(page.file.abs_src_path).endswith(".ipynb"):
        return markdown
    return "\n\n".join(part for cell in json.loads(markdown)["cells"] for part in parts(cell))


def parts(cell: dict[str, Any]) -> Iterator[str]:
    """Yield the source of a cell, then its outputs."""
    source = "".join(cell["source"])
    yield source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```"
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if "image/png" in data:
            yield f"![output](data:image/png;base64,{data['image/png'].strip()})"
        else:
            text = "".join(output["text"] if "text" in output else data["text/plain"])
            yield f"```text\n{text.rstrip()}\n```"
