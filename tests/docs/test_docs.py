"""Documentation against the code: docstrings, names, links, defaults and code in Markdown."""

from __future__ import annotations

import importlib
import inspect
import re
from collections import OrderedDict
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import eager_at_loss
from torch import nn
from torch.nn.functional import cross_entropy

import at_fused
from at_fused import _layouts, _options
from at_fused.backends import override
from at_fused.train.networks import WRN

ROOT = Path(__file__).parents[2]
# The modules and objects of the API reference.
DIRECTIVES = [
    name
    for path in sorted((ROOT / "docs/api").glob("*.md"))
    for name in re.findall(r"^::: (\S+)$", path.read_text(), re.M)
]

# ---- docstrings ----------------------------------------------------------------------------------

TENSORS = r"\b(Tensor|Features|Maps)\b"
# A shape, or a reference to one.
SHAPE = r"\((B|pairs)[^)]*\)|scalar|one element|shape|as in\b|what the"
DTYPE = r"float(32|64|ing)|int64|dtype|as in\b"
# A formula as inline code or a block, or a reference to another function's formula.
FORMULA = r"(?:``|^ {4,})[^`\n]*?(?:\|\||sum_|\^|sqrt|max\(|/ d x|\w \* )|formula is that of :func:"


def public() -> Iterator[tuple[str, Any]]:
    """Yield names and objects of the functions, classes and methods in the API reference."""
    for directive in DIRECTIVES:
        # A program without an API, and a module that needs another framework.
        if directive in ("at_fused.train", "at_fused.integrations.torchdistill"):
            continue
        page, _, name = directive.rpartition(".")
        names = [name]
        if find_spec(directive):
            page, module = directive, importlib.import_module(directive)
            defined = [n for n, x in vars(module).items() if getattr(x, "__module__", "") == page]
            names = getattr(module, "__all__", defined)
        for name in names:
            value = getattr(importlib.import_module(page), name)
            if name[0] == "_" or not callable(value):
                continue
            yield f"{page}.{name}", value
            for attribute, method in vars(value).items() if inspect.isclass(value) else ():
                is_private = attribute[0] == "_" and attribute != "__call__"
                if inspect.isfunction(method) and not is_private and attribute != "extra_repr":
                    yield f"{page}.{name}.{attribute}", method


def section(name: str, docstring: str) -> str:
    match = re.search(rf"^{name}:\n((?: .*\n|\n)+)", f"{docstring}\n", re.M)
    return match[1] if match else ""


PUBLIC = dict(public())


def test_api_reference_has_every_public_name() -> None:
    documented = {id(value) for value in PUBLIC.values()}
    for name in set(at_fused.__all__) - {"__version__", "schedules"}:
        assert id(getattr(at_fused, name)) in documented, name


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings_cover_signatures(name: str) -> None:
    value = PUBLIC[name]
    function = vars(value).get("__init__") if inspect.isclass(value) else value
    text = inspect.cleandoc(value.__doc__)
    assert text.splitlines()[1:2] in ([], [""]), "the summary must be one line"
    assert "::\n" not in text, "the pages are Markdown"
    parameters = dict(inspect.signature(function).parameters) if function else {}
    is_method = parameters.pop("self", None) is not None
    items = re.findall(r"^    (\S[^:]*):\s", section("Args", text), re.M)
    assert {argument for item in items for argument in item.split(", ")} == parameters.keys()
    assert section("Raises", text) or not parameters
    result = "None" if value is not function else inspect.signature(value).return_annotation
    assert bool(section("Returns", text)) == (result != "None")
    for types, title in ((result, "Returns"), (str(parameters), "Args")):
        if re.search(TENSORS, types):
            assert re.search(SHAPE, section(title, text), re.I)
            assert re.search(DTYPE, section(title, text))
    if name.endswith("Loss") or (result in ("Tensor", "dict[str, Tensor]") and not is_method):
        assert re.search(FORMULA, text, re.M)
        assert re.search(r"^Source: ", text, re.M)


# ---- Markdown ------------------------------------------------------------------------------------

PAGES_MD = sorted(
    path for folder in (".", "docs", "benchmarks/results") for path in (ROOT / folder).glob("*.md")
)
# Names of files in the text are relative to the page or to one of these.
FOLDERS = ("", "at_fused", "at_fused/_ops", "at_fused/backends", "at_fused/backends/triton")
FOLDERS += ("csrc", "csrc/cpu", "csrc/cuda", "benchmarks", "examples/stacks", "tests/support")
# Programs write these to a folder of the user's choice.
GENERATED = {"report.md"}


@pytest.fixture(params=PAGES_MD, ids=lambda path: str(path.relative_to(ROOT)))
def page(request: pytest.FixtureRequest) -> Path:
    return request.param


def anchors(path: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def test_named_files_exist(page: Path) -> None:
    suffixes = "py|md|h|cuh|cu|cpp|sh|jinja2"
    for name in re.findall(rf"(?<![\w/.<>*-])[\w./-]+\.(?:{suffixes})\b", page.read_text()):
        folders = (page.parent, *(ROOT / folder for folder in FOLDERS))
        exists = any((folder / name).exists() for folder in folders)
        assert exists or Path(name).name in GENERATED, name


@cache
def source_words() -> set[str]:
    files = [ROOT / "pyproject.toml", ROOT / "setup.py"]
    for folder in ("at_fused", "csrc", "tests", "benchmarks", "examples", "scripts"):
        files += [
            p for p in (ROOT / folder).rglob("*") if re.fullmatch(r"\.(py|h|cuh?|cpp|sh)", p.suffix)
        ]
    this_file = Path(__file__)
    return set().union(*(re.findall(r"\w+", p.read_text()) for p in files if p != this_file))


@pytest.mark.parametrize(
    "page", ["docs/architecture.md", "docs/adding-a-backend.md", "CONTRIBUTING.md"]
)
def test_quoted_names_exist_in_the_sources(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.M | re.S)
    for name in re.findall(r"`([A-Za-z_]\w*(?:\.\w+)*)(?:\([^`]*\))?`", text):
        assert set(name.split(".")) <= source_words() | {"py", "h", "cu", "cpp", "toml", "md"}, name


def test_qualified_names_resolve(page: Path) -> None:
    for name in set(re.findall(r"\bat_fused(?:\.[A-Za-z_]\w*)+", page.read_text())):
        parts = name.split(".")
        if parts[1] == "integrations":
            assert find_spec(".".join(parts[:3])), name
            continue
        value: Any = at_fused
        for i, part in enumerate(parts[1:], 2):
            if not hasattr(value, part):
                importlib.import_module(".".join(parts[:i]))
            value = getattr(value, part)


# ---- defaults ------------------------------------------------------------------------------------


def defaults(function: Any) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


@pytest.mark.parametrize(
    "function",
    [
        at_fused.attention_map,
        at_fused.attention_tap,
        at_fused.map_loss,
        at_fused.at,
        _options.LossArguments,
        _options.LossOptions,
        _layouts.FeatureLayout,
    ],
)
def test_options_have_the_defaults_of_at_loss(function: Any) -> None:
    expected, actual = defaults(at_fused.at_loss), defaults(function)
    shared = expected.keys() & actual.keys()
    assert shared
    assert {name: actual[name] for name in shared} == {name: expected[name] for name in shared}


# ---- code in Markdown ----------------------------------------------------------------------------


def networks() -> tuple[nn.Module, nn.Module]:
    """Return a student and a teacher with the layers that README.md names."""

    def conv(c: int, stride: int = 1) -> nn.Module:
        return nn.Sequential(nn.Conv2d(c, 8, 3, stride, padding=1), nn.BatchNorm2d(8), nn.ReLU())

    def head() -> nn.Module:
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))

    def network(depth: int) -> nn.Module:
        layer4 = nn.Sequential(conv(8, 2), *(conv(8) for _ in range(depth - 1)))
        return nn.Sequential(OrderedDict(layer3=conv(3), layer4=layer4, head=head()))

    return network(2), network(3)


def predefined_names(page: Path) -> dict[str, Any]:
    """Return the names that a page's code may use."""
    if page.name != "README.md":
        return {}
    student, teacher = networks()
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    names = {"student": student, "teacher": teacher, "images": images, "x": images}
    names |= {"labels": labels, "logits": torch.randn(4, 10), "beta": 1e3}
    names |= {"student_features": [torch.randn(4, 8, 4, 4, requires_grad=True)]}
    names |= {"teacher_features": [torch.randn(4, 16, 4, 4)], "loader": [(images, labels)]}
    names |= {"wrn_16_1": WRN(16, 1), "wrn_16_2": WRN(16, 2), "torch": torch}
    return names | {"cross_entropy": cross_entropy}


def run(page: Path) -> dict[str, Any]:
    """Run the Python blocks of a page in order and return their names."""
    names = predefined_names(page)
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S):
        exec(compile(block, str(page), "exec"), names)
    return names


def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run(page)
    if "loss" in names:
        names["loss"].backward()


def test_excerpts_match_the_example_programs() -> None:
    """``py`` blocks are lines of a program, in order but with gaps and without comments."""
    page = (ROOT / "docs/stacks.md").read_text()
    programs = {path.name: path.read_text() for path in (ROOT / "examples/stacks").glob("*.py")}
    assert set(re.findall(r"\w+\.py(?=\))", page)) == programs.keys() - {"toy.py"}
    blocks = re.findall(r"^```py\n(.*?)^```", page, re.M | re.S)
    assert len(blocks) >= len(programs) - 1
    for block in blocks:

        def contains_block(program: str, block: str = block) -> bool:
            lines = iter([line.split("  #")[0].strip() for line in program.splitlines()])
            return all(line.strip() in lines for line in block.splitlines() if line.strip())

        assert any(map(contains_block, programs.values())), block


def test_documented_toy_back_end_works() -> None:
    toy = run(ROOT / "docs/adding-a-backend.md")["toy"]
    library = override(toy, ("CPU",))
    try:
        s, t = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
        with torch.profiler.profile() as record:
            result = at_fused.attention_map(s)
        torch.testing.assert_close(result, s.square().mean(1))
        assert any(event.key == "aten::einsum" for event in record.key_averages())
        torch.testing.assert_close(at_fused.at_loss(s, t), eager_at_loss(s, t))
    finally:
        library._destroy()
