"""A MkDocs hook: adds pages from outside docs/ and rewrites the relative links of all pages."""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath

import tomllib
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
# Files of the repository outside docs/, and their pages.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/results/README.md": "benchmarks/adding-a-device.md",
    "benchmarks/results/report.md": "benchmarks/report.md",
    "benchmarks/results/roofline.md": "benchmarks/roofline.md",
    "examples/quickstart.ipynb": "notebook.md",
}
for picture in (ROOT / "benchmarks/results").glob("*.png"):
    PAGES[f"benchmarks/results/{picture.name}"] = f"benchmarks/{picture.name}"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Read the repository's address from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    config.repo_url = project["urls"]["Repository"]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and pictures from outside docs/."""
    for source, uri in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at pages of the site, or at the repository for files that the site lacks."""
    uri = page.file.src_uri
    source = next((path for path, each in PAGES.items() if each == uri), f"docs/{uri}")

    def rewrite(link: re.Match[str]) -> str:
        anchor = link[2] or ""
        target = normpath(join(dirname(source), link[1]))
        if not (ROOT / target).exists():
            return link[0]
        found = PAGES.get(target, target.removeprefix("docs/"))
        if files.get_file_from_path(found):
            return f"]({relpath(found, dirname(uri) or '.')}{anchor})"
        view = "tree" if (ROOT / target).is_dir() else "blob"
        return f"]({config.repo_url}/{view}/main/{target}{anchor})"

    markdown = re.sub(r"\]\(([^)\s:#]+)(#[^)\s]*)?\)", rewrite, markdown)
    return re.sub(r"^\|.*\|$", unescape_bars, markdown, flags=re.M)


def unescape_bars(row: re.Match[str]) -> str:
    """Return a row of a table without backslashes before bars in code, which GitHub needs there."""
    return re.sub(r"`[^`]+`", lambda code: code[0].replace(r"\|", "|"), row[0])
