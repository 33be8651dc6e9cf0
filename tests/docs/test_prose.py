"""Rules of plain English that can be counted: first words, word lists, lengths of sentences."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("at_fused", "benchmarks", "csrc", "docs", "examples", "scripts", "tests")
SUFFIXES = (".py", ".h", ".cuh", ".cpp", ".cu", ".md")
FILES = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.suffix in SUFFIXES and path != Path(__file__)
) + sorted(path for path in ROOT.glob("*") if path.suffix in SUFFIXES)
PYTHON = [path for path in FILES if path.suffix == ".py"]
COMPILED = [path for path in FILES if path.suffix in (".h", ".cuh", ".cpp", ".cu")]
MARKDOWN = [path for path in FILES if path.suffix == ".md"]

# A docstring or comment that opens with one of these is half a sentence.
CLAUSE = r"(What|Whatever|Whether|How|Where|Which|Who|Whose|Of|As|That|Those)\b"
# A function does something: its docstring opens with a verb.
NOUN = CLAUSE[:-3] + r"|A|An|The|All|Any|Both|Each|Every|No|None|One|Some|Two|It|Its|This|These)\b"
# Words that are not plain English, not the field's terms, or say less than a plainer word.
DECODED = (
    r"\b(of which|whose|whoever|whichever|whatever|nobody|alike|(is|are|was|were) none"
    r"|to eager|popular|harness|plain options|comes? along|as (it|they) lies?|without a word"
    r"|but for|beside|behind|all that|all else|for which|anew|once more|at hand|told|watch(ed|es)"
    r"|takes? turns|in turn|goe?s? on|lest|hence|(its|their) (like|kin)|dear|CPU levels?)\b"
)
WORDS_IN_A_SENTENCE = 20


def each(paths: list[Path]) -> pytest.MarkDecorator:
    names = [str(path.relative_to(ROOT)) for path in paths]
    return pytest.mark.parametrize("path", paths, ids=names)


def docstrings(path: Path) -> Iterator[tuple[int, bool, str]]:
    """Yield line, True for a function's, and text of each docstring."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            is_property = isinstance(node, ast.FunctionDef) and node.decorator_list
            is_function = isinstance(node, ast.FunctionDef) and not is_property
            if text := ast.get_docstring(node):
                yield getattr(node, "lineno", 1), is_function, text


@each(PYTHON)
def test_docstrings_open_with_a_verb_or_a_noun(path: Path) -> None:
    for line, is_function, text in docstrings(path):
        assert not re.match(NOUN if is_function else CLAUSE, text), f"{path}:{line}: {text[:60]}"


@each(COMPILED)
def test_comments_open_with_a_verb_or_a_noun(path: Path) -> None:
    lines = path.read_text().splitlines()
    for i, (before, line) in enumerate(zip(["", *lines], lines, strict=False), 1):
        opens = line.lstrip().startswith("// ") and not before.lstrip().startswith("//")
        assert not (opens and re.match(CLAUSE, line.lstrip("/ "))), f"{path}:{i}: {line}"


@each(FILES)
def test_no_word_has_to_be_decoded(path: Path) -> None:
    for i, line in enumerate(path.read_text().splitlines(), 1):
        assert not (found := re.search(DECODED, line)), f"{path}:{i}: {found[0]!r} in {line}"


def sentences(text: str) -> list[str]:
    """Return the sentences of paragraphs and list items, an expression in code as one word."""
    text = re.sub(r"^(```|\$\$).*?^\1|<!--.*?-->", "", text, flags=re.M | re.S)
    text = re.sub(r"^(#|\||!\[| {4,}\S|---).*$", "", text, flags=re.M)
    text = re.sub(r"`[^`]+`", "code", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    items = re.split(r"\n\s*\n|\n\s*(?:[-*]|\d+\.) ", text)
    found = [s for item in items for s in re.split(r"(?<=[.!?])[\"')]*\s+", item.strip())]
    return [s for s in found if len(s.split()) > 1]


@each(MARKDOWN)
def test_sentences_are_short(path: Path) -> None:
    found = sentences(path.read_text())
    words = sum(len(s.split()) for s in found)
    assert words <= WORDS_IN_A_SENTENCE * len(found), (
        f"{words / len(found):.1f} words, for example: {max(found, key=len)}"
    )
