"""What is written about the code is true of it: docstrings, names, defaults, code in Markdown."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections import OrderedDict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from reference import popular_at_loss
from torch import nn
from torch.nn.functional import cross_entropy

import at_fused
from at_fused import _inputs, _ops, _options, _problem
from at_fused.backends import override

ROOT = Path(__file__).parents[1]
PAGES = ast.literal_eval(
    re.search(r"^PAGES = (\(.*?\))$", (ROOT / "docs/api/make.py").read_text(), re.M | re.S)[1]
)

# ---- docstrings ----------------------------------------------------------------------------------

SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises")
# What torch calls by itself, and a name tells.
PLAIN = {"extra_repr"}


class Public(NamedTuple):
    """A function, method or class that the API reference shows."""

    name: str
    node: ast.FunctionDef | ast.ClassDef
    text: str

    def parameters(self) -> dict[str, str]:
        """Names and annotations, a class's those of its constructor."""
        node = self.node
        if isinstance(node, ast.ClassDef):
            made = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
            if not made:
                return {}
            node = made[0]
        a = node.args
        given = [*a.posonlyargs, *a.args, *([a.vararg] if a.vararg else []), *a.kwonlyargs]
        given += [a.kwarg] if a.kwarg else []
        found = {x.arg: ast.unparse(x.annotation) if x.annotation else "" for x in given}
        found.pop("self", None)
        return found

    def result(self) -> str:
        """What a function returns, by its annotation."""
        returns = None if isinstance(self.node, ast.ClassDef) else self.node.returns
        return ast.unparse(returns) if returns else "None"

    def sections(self) -> dict[str, str]:
        """The text of each section."""
        parts = re.split(r"^(\w+):\n(?=    )", self.text, flags=re.M)
        found = dict(zip(parts[1::2], parts[2::2], strict=True))
        return {name: re.split(r"\n(?=\S)", body)[0] for name, body in found.items()}

    def documented(self) -> dict[str, str]:
        """Each name in Args, and what is said of it."""
        found = {}
        items = re.split(r"^    (?=\S)", self.sections().get("Args", ""), flags=re.M)
        for item in filter(None, items):
            names, said = re.split(r":\s", item, maxsplit=1)
            found.update(dict.fromkeys(names.split(", "), said))
        return found


def module_file(name: str) -> Path:
    path = ROOT / name.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def names_of(tree: ast.Module) -> list[str]:
    """``__all__``, or all names without an underscore that are defined here."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    defined = (ast.FunctionDef, ast.ClassDef)
    return [n.name for n in tree.body if isinstance(n, defined) and not n.name.startswith("_")]


def decorators(node: ast.FunctionDef) -> list[str]:
    return [ast.unparse(decorator) for decorator in node.decorator_list]


def public() -> Iterator[Public]:
    for page in PAGES:
        if page == "at_fused.train":  # a program; its parts are nobody else's
            continue
        tree = ast.parse(module_file(page).read_text())
        for name in names_of(tree):
            own = page
            if not any(getattr(node, "name", "") == name for node in tree.body):
                own = getattr(getattr(importlib.import_module(page), name), "__module__", "")
            if not own:  # a module, or a number
                continue
            nodes = ast.parse(module_file(own).read_text()).body
            (node,) = [node for node in nodes if getattr(node, "name", "") == name]
            assert isinstance(node, (ast.FunctionDef, ast.ClassDef))
            yield Public(f"{page}.{name}", node, ast.get_docstring(node) or "")
            for method in node.body if isinstance(node, ast.ClassDef) else ():
                if not isinstance(method, ast.FunctionDef) or method.name in PLAIN:
                    continue
                attribute = any("property" in d or "setter" in d for d in decorators(method))
                if not attribute and (method.name == "__call__" or method.name[0] != "_"):
                    text = ast.get_docstring(method) or ""
                    yield Public(f"{page}.{name}.{method.name}", method, text)


EVERYTHING = list(public())


@pytest.mark.parametrize("item", EVERYTHING, ids=lambda item: item.name)
def test_docstrings_say_all_of_the_call_and_no_more(item: Public) -> None:
    assert item.text.splitlines()[1:2] in ([], [""]), "one line of purpose"
    assert "::\n" not in item.text, "not Markdown, of which the pages are made"
    assert set(item.sections()) <= set(SECTIONS), "a section that the generator does not know"
    assert set(item.documented()) == set(item.parameters())
    assert ("Returns" in item.sections()) == (item.result() != "None")
    if item.parameters():
        assert "Raises" in item.sections()


# A shape, or where one is said.
SHAPE = r"\((B|pairs)[^)]*\)|scalar|one element|shape|as in\b|what the"
DTYPE = r"float(32|64|ing)|int64|dtype|as in\b"
TENSORS = r"\b(Tensor|Features|Maps)\b"


@pytest.mark.parametrize(
    "item",
    [i for i in EVERYTHING if re.search(TENSORS, f"{i.parameters()} {i.result()}")],
    ids=lambda item: item.name,
)
def test_tensors_have_shapes_and_dtypes(item: Public) -> None:
    for name, annotation in item.parameters().items():
        if re.search(TENSORS, annotation):
            assert re.search(SHAPE, item.documented()[name], re.I), name
    if re.search(TENSORS, str(item.parameters())):
        assert re.search(DTYPE, item.sections()["Args"])
    if re.search(TENSORS, item.result()):
        assert re.search(SHAPE, item.sections()["Returns"], re.I)
        assert re.search(DTYPE, item.sections()["Returns"])


# Symbols of a formula in code, in line or as a block; and losses whose formula is another's.
FORMULA = r"(?:``|^ {4,})[^`\n]*?(?:\|\||sum_|\^|sqrt|max\(|/ d x|\w \* )"
OF_ANOTHER = r"formula is that of :func:"


@pytest.mark.parametrize(
    "item",
    [
        i
        for i in EVERYTHING
        if i.name.count(".") == 1 + i.name.startswith(("at_fused.compat.", "at_fused.visualize."))
        and (i.result() in ("Tensor", "dict[str, Tensor]") or "Loss" in i.name)
    ],
    ids=lambda item: item.name,
)
def test_what_is_computed_has_a_formula_and_a_source(item: Public) -> None:
    assert re.search(FORMULA, item.text, re.M) or re.search(OF_ANOTHER, item.text)
    assert re.search(r"^Source: ", item.text, re.M)


# ---- Markdown ------------------------------------------------------------------------------------

PAGES_MD = sorted(
    path for folder in (".", "docs", "benchmarks/results") for path in (ROOT / folder).glob("*.md")
)
# Where names of files in the text begin.
FOLDERS = ("", "at_fused", "at_fused/_ops", "at_fused/backends", "at_fused/backends/triton")
FOLDERS += ("csrc", "csrc/cpu", "csrc/cuda", "benchmarks")
# What programs write where they are told to.
WRITTEN = {"report.md"}


@pytest.fixture(params=PAGES_MD, ids=lambda path: str(path.relative_to(ROOT)))
def page(request: pytest.FixtureRequest) -> Path:
    return request.param


def anchors(path: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def test_files_that_are_named_exist(page: Path) -> None:
    suffixes = "py|md|h|cuh|cu|cpp|sh|jinja2"
    for name in re.findall(rf"(?<![\w/.<>*-])[\w./-]+\.(?:{suffixes})\b", page.read_text()):
        found = any((root / name).exists() for root in (page.parent, *(ROOT / f for f in FOLDERS)))
        assert found or Path(name).name in WRITTEN, name


@cache
def words() -> set[str]:
    """Every name in the sources."""
    files = [ROOT / "pyproject.toml", ROOT / "setup.py"]
    for folder in ("at_fused", "csrc", "tests", "benchmarks", "examples", "scripts"):
        files += [
            p for p in (ROOT / folder).rglob("*") if re.fullmatch(r"\.(py|h|cuh?|cpp|sh)", p.suffix)
        ]
    own = Path(__file__)
    return set().union(*(re.findall(r"\w+", p.read_text()) for p in files if p != own))


@pytest.mark.parametrize(
    "page", ["docs/architecture.md", "docs/adding-a-backend.md", "CONTRIBUTING.md"]
)
def test_names_that_explain_the_code_are_in_it(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.M | re.S)
    for name in re.findall(r"`([A-Za-z_]\w*(?:\.\w+)*)(?:\([^`]*\))?`", text):
        assert set(name.split(".")) <= words() | {"py", "h", "cu", "cpp", "toml", "md"}, name


def test_qualified_names_are_there(page: Path) -> None:
    for name in set(re.findall(r"\bat_fused(?:\.[A-Za-z_]\w*)+", page.read_text())):
        parts = name.split(".")
        if parts[1] == "integrations":
            assert module_file(".".join(parts[:3])).exists(), name
            continue
        found: Any = at_fused
        for i, part in enumerate(parts[1:], 2):
            if not hasattr(found, part):
                importlib.import_module(".".join(parts[:i]))
            found = getattr(found, part)


# ---- defaults ------------------------------------------------------------------------------------


def defaults(function: Any) -> dict[str, Any]:
    found = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in found if p.default is not p.empty}


@pytest.mark.parametrize(
    "function",
    [
        at_fused.attention_map,
        at_fused.attention_tap,
        at_fused.map_loss,
        at_fused.at,
        _problem.prepare,
        _options.LossOptions,
        _inputs.check_options,
        _inputs.Side,
        _ops.Place,
    ],
)
def test_an_option_has_one_default(function: Any) -> None:
    right, own = defaults(at_fused.at_loss), defaults(function)
    shared = right.keys() & own.keys()
    assert shared
    assert {name: own[name] for name in shared} == {name: right[name] for name in shared}


# ---- code in Markdown ----------------------------------------------------------------------------


def networks() -> tuple[nn.Module, nn.Module]:
    """A student and a teacher with the layers that README.md names."""

    def conv(c: int, stride: int = 1) -> nn.Module:
        return nn.Sequential(nn.Conv2d(c, 8, 3, stride, padding=1), nn.BatchNorm2d(8), nn.ReLU())

    def head() -> nn.Module:
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))

    blocks = nn.Sequential(conv(8, 2), *(conv(8) for _ in range(8)))
    student = OrderedDict(layer2=conv(3), layer3=conv(8, 2), head=head())
    teacher = OrderedDict(layer2=conv(3), blocks=blocks, head=head())
    return nn.Sequential(student), nn.Sequential(teacher)


def before(page: Path) -> dict[str, Any]:
    """What a reader of a page has at hand."""
    if page.name != "README.md":
        return {}
    student, teacher = networks()
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    names = {"student": student, "teacher": teacher, "images": images, "x": images}
    names |= {"labels": labels, "logits": torch.randn(4, 10), "beta": 1e3}
    names |= {"student_features": [torch.randn(4, 8, 4, 4, requires_grad=True)]}
    names |= {"teacher_features": [torch.randn(4, 16, 4, 4)], "loader": [(images, labels)]}
    return names | {"cross_entropy": cross_entropy}


def run(page: Path) -> dict[str, Any]:
    """The names of a page's Python blocks, run one after the other."""
    names = before(page)
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S):
        exec(compile(block, str(page), "exec"), names)
    return names


def test_code_runs(page: Path) -> None:
    names = run(page)
    if "loss" in names:
        names["loss"].backward()


def test_the_toy_back_end_is_one() -> None:
    toy = run(ROOT / "docs/adding-a-backend.md")["toy"]
    library = override(toy, ("CPU",))
    try:
        s, t = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
        with torch.profiler.profile() as record:
            found = at_fused.attention_map(s)
        torch.testing.assert_close(found, s.square().mean(1))
        assert any(event.key == "aten::einsum" for event in record.key_averages())
        torch.testing.assert_close(at_fused.at_loss(s, t), popular_at_loss(s, t))
    finally:
        library._destroy()
