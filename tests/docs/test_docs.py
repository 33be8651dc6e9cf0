"""What is written about the code is true of it: docstrings, names, defaults, code in Markdown."""

from __future__ import annotations

import ast
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
PAGES = ast.literal_eval(
    re.search(r"^PAGES = (\(.*?\))$", (ROOT / "docs/api/make.py").read_text(), re.M | re.S)[1]
)

# ---- docstrings ----------------------------------------------------------------------------------

TENSORS = r"\b(Tensor|Features|Maps)\b"
# A shape, or where one is said.
SHAPE = r"\((B|pairs)[^)]*\)|scalar|one element|shape|as in\b|what the"
DTYPE = r"float(32|64|ing)|int64|dtype|as in\b"
# Symbols of a formula in code, in line or as a block; or that it is another function's.
FORMULA = r"(?:``|^ {4,})[^`\n]*?(?:\|\||sum_|\^|sqrt|max\(|/ d x|\w \* )|formula is that of :func:"


def public() -> Iterator[tuple[str, Any]]:
    """Functions, classes and methods that the API reference shows, by name."""
    for page in PAGES:
        # A program, and what takes another's framework to import.
        if page in ("at_fused.train", "at_fused.integrations.torchdistill"):
            continue
        module = importlib.import_module(page)
        own = [n for n, x in vars(module).items() if getattr(x, "__module__", "") == page]
        for name in getattr(module, "__all__", own):
            found = getattr(module, name)
            if name[0] == "_" or not callable(found):
                continue
            yield f"{page}.{name}", found
            for part, method in vars(found).items() if inspect.isclass(found) else ():
                hidden = part == "extra_repr" or (part[0] == "_" and part != "__call__")
                if inspect.isfunction(method) and not hidden:
                    yield f"{page}.{name}.{part}", method


def section(name: str, text: str) -> str:
    found = re.search(rf"^{name}:\n((?: .*\n|\n)+)", f"{text}\n", re.M)
    return found[1] if found else ""


PUBLIC = dict(public())


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings_say_all_of_the_call_and_no_more(name: str) -> None:
    made = PUBLIC[name]
    call = vars(made).get("__init__") if inspect.isclass(made) else made
    text = inspect.cleandoc(made.__doc__)
    assert text.splitlines()[1:2] in ([], [""]), "one line of purpose"
    assert "::\n" not in text, "not Markdown, of which the pages are made"
    parameters = dict(inspect.signature(call).parameters) if call else {}
    method = parameters.pop("self", None) is not None
    items = re.findall(r"^    (\S[^:]*):\s", section("Args", text), re.M)
    assert {each for item in items for each in item.split(", ")} == parameters.keys()
    assert section("Raises", text) or not parameters
    result = "None" if made is not call else inspect.signature(made).return_annotation
    assert bool(section("Returns", text)) == (result != "None")
    for types, said in ((result, "Returns"), (str(parameters), "Args")):
        if re.search(TENSORS, types):
            assert re.search(SHAPE, section(said, text), re.I)
            assert re.search(DTYPE, section(said, text))
    if name.endswith("Loss") or (result in ("Tensor", "dict[str, Tensor]") and not method):
        assert re.search(FORMULA, text, re.M)
        assert re.search(r"^Source: ", text, re.M)


# ---- Markdown ------------------------------------------------------------------------------------

PAGES_MD = sorted(
    path for folder in (".", "docs", "benchmarks/results") for path in (ROOT / folder).glob("*.md")
)
# Where names of files in the text begin.
FOLDERS = ("", "at_fused", "at_fused/_ops", "at_fused/backends", "at_fused/backends/triton")
FOLDERS += ("csrc", "csrc/cpu", "csrc/cuda", "benchmarks", "examples/stacks", "tests/support")
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
            assert find_spec(".".join(parts[:3])), name
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
        _options.LossArguments,
        _options.LossOptions,
        _layouts.FeatureLayout,
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
    names |= {"wrn_16_1": WRN(16, 1), "wrn_16_2": WRN(16, 2), "torch": torch}
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


def test_excerpts_are_of_tested_programs() -> None:
    """Blocks in py are lines of a program, those between left out, as are comments."""
    page = (ROOT / "docs/stacks.md").read_text()
    programs = {path.name: path.read_text() for path in (ROOT / "examples/stacks").glob("*.py")}
    assert set(re.findall(r"\w+\.py(?=\))", page)) == programs.keys() - {"toy.py"}
    blocks = re.findall(r"^```py\n(.*?)^```", page, re.M | re.S)
    assert len(blocks) >= len(programs) - 1
    for block in blocks:

        def has(program: str, block: str = block) -> bool:
            lines = iter([line.split("  #")[0].strip() for line in program.splitlines()])
            return all(line.strip() in lines for line in block.splitlines() if line.strip())

        assert any(map(has, programs.values())), block


def test_the_toy_back_end_is_one() -> None:
    toy = run(ROOT / "docs/adding-a-backend.md")["toy"]
    library = override(toy, ("CPU",))
    try:
        s, t = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
        with torch.profiler.profile() as record:
            found = at_fused.attention_map(s)
        torch.testing.assert_close(found, s.square().mean(1))
        assert any(event.key == "aten::einsum" for event in record.key_averages())
        torch.testing.assert_close(at_fused.at_loss(s, t), eager_at_loss(s, t))
    finally:
        library._destroy()
