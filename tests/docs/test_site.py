"""The documentation site: links, anchors and resources of the built pages, without a network."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
MISSING = [name for name in ("mkdocs", "material", "mkdocstrings") if find_spec(name) is None]

pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f'needs {", ".join(MISSING)}: pip install "at_fused[docs]"'
)


class Page(HTMLParser):
    """The anchors, links and loaded resources of a page, and its text outside of code."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors, self.links, self.resources = set[str](), list[str](), list[str]()
        self.text, self.depth_in_code = "", 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        self.depth_in_code += tag in ("code", "script", "style")
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag == "link" and values.get("rel") != "canonical" and "href" in values:
            self.resources.append(values["href"])
        elif "src" in values:
            self.resources.append(values["src"])

    def handle_endtag(self, tag: str) -> None:
        self.depth_in_code -= tag in ("code", "script", "style")

    def handle_data(self, data: str) -> None:
        self.text += "" if self.depth_in_code else data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    pages = {path: Page(path) for path in site.rglob("*.html")}
    assert len(pages) > 30
    return pages


def test_links_and_anchors_exist(site: Path, pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        for link in page.links + page.resources:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            folder = site if url.path.startswith("/") else path.parent
            target = (folder / unquote(url.path).lstrip("/")).resolve() if url.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{path.relative_to(site)}: {link}"
            if url.fragment and target.suffix == ".html":
                anchors = pages[target].anchors
                assert unquote(url.fragment) in anchors, f"{path.relative_to(site)}: {link}"


def test_no_page_loads_from_another_host(site: Path, pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        for resource in page.resources:
            url = urlsplit(resource)
            is_local = not url.netloc and url.scheme in ("", "data")
            assert is_local, f"{path.relative_to(site)}: {resource}"
    for path in site.rglob("*.css"):
        external = re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)]+", path.read_text())
        assert not external, f"{path.relative_to(site)}: {external}"


def test_links_to_sources_resolve(pages: dict[Path, Page]) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (address,) = re.findall(r'^Repository = "(.+)"', project, re.M)
    links = {link for page in pages.values() for link in page.links if link.startswith(address)}
    view = re.compile(rf"{re.escape(address)}/(?:blob|tree)/main/([^#]+)")
    paths = [ROOT / match[1] for match in map(view.match, links) if match]
    assert ROOT / "examples/wrn.py" in paths
    assert all(path.exists() for path in paths)


def test_docstrings_are_rendered(site: Path, pages: dict[Path, Page]) -> None:
    page = pages[site / "api/losses/index.html"]
    html = (site / "api/losses/index.html").read_text(encoding="utf-8")
    assert {"at_fused.at_loss", "at_fused.ATLoss"} <= page.anchors
    assert not any("extra_repr" in anchor for each in pages.values() for anchor in each.anchors)
    # Cross-references within a module and to another one, and a formula that kept its columns.
    assert re.search(r'<a [^>]*href="#at_fused.at_loss"[^>]*><code>at_loss</code></a>', html)
    assert re.search(r"1/B {5,}\* sum_b", html)
    networks = (site / "api/networks/index.html").read_text(encoding="utf-8")
    assert re.search(r'href="#at_fused.match_layers"[^>]*><code>match_layers</code></a>', networks)
    for path, each in pages.items():
        assert not re.search(r":(func|class|meth|mod):|\]\[at_fused", each.text), path


def test_pages_from_outside_docs_are_rendered(site: Path, pages: dict[Path, Page]) -> None:
    html = (site / "notebook/index.html").read_text(encoding="utf-8")
    assert html.count("data:image/png;base64,") == 2
    assert 'class="mermaid"' in (site / "architecture/index.html").read_text(encoding="utf-8")
    assert "--teacher-from" in (site / "api/train/index.html").read_text(encoding="utf-8")
    # Bars in the code of a table.
    assert "\\|" not in (site / "formulas/index.html").read_text(encoding="utf-8")
