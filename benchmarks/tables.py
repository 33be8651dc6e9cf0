"""The rows of a result as Markdown: a function for each part of measure.PARTS.

Its docstring is the note that the report has above the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from benchmarks.measure import Row

RIVALS = ("eager", "compile")
STEPS = {
    "alone": "the student, no teacher",
    "without": "and the teacher's pass, no AT",
    "eager": "the popular lines",
    "drop-in": "`at_loss`",
    "tap": "`AttentionTransfer`",
    "prepared": "with `at.prepare(x)`",
}

# The back end that a line is of, then its cells.
Line = tuple[str, ...]


def markdown(heads: str, text: int, lines: Iterable[Line]) -> list[str]:
    """A table with ``text`` columns of text, then numbers; on a GPU with the back ends' names."""
    lines, columns = list(lines), heads.split(" | ")
    if any(backend != "cpu" for backend, *_ in lines):
        columns.insert(text, "back end")
        lines = [(on, *cells[:text], on, *cells[text:]) for on, *cells in lines]
        text += 1
    ruler = "|---" * text + "|--:" * (len(columns) - text) + "|"
    first, *others = (f"| {' | '.join(row)} |" for row in (columns, *(line[1:] for line in lines)))
    return [first, ruler, *others]


def same(rows: Iterable[Row], *keys: str) -> dict[tuple[str, ...], list[Row]]:
    """The rows by what they have in common."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def star(row: Row, *programs: str) -> str:
    """Mark a time that is not of a CUDA graph, as the others are."""
    return "*" * any(name in row.get("uncaptured", {}) for name in programs)


def milliseconds(ms: float) -> str:
    return f"{ms:.2f}" if ms >= 1 else f"{ms:.3f}"


def times(row: Row, *programs: str) -> list[str]:
    return [milliseconds(row["ms"][name]) + star(row, name) for name in programs]


def to(row: Row, rivals: Sequence[str] = RIVALS) -> list[str]:
    """Return how many times as long the rivals take."""
    ratios = [(rival, row["ms"][rival] / row["ms"]["at_fused"]) for rival in rivals]
    return [f"{ratio:.1f}x{star(row, rival, 'at_fused')}" for rival, ratio in ratios]


def of_copy(row: Row) -> list[str]:
    """Return the rate of the bytes that have to move over that of a copy, on a GPU."""
    if "copy" not in row["ms"]:
        return []
    ours, copy = (row["bytes"][name] / row["ms"][name] for name in ("at_fused", "copy"))
    return [f"{ours / copy:.0%}"]


def megabytes(count: float) -> str:
    return f"{count / 1e6:.1f}" if count >= 1e6 else f"{count / 1e6:.2g}"


def shape(row: Row) -> str:
    return "x".join(map(str, row["shape"]))


def means(rows: Sequence[Row]) -> list[str]:
    """The geometric means of the rivals' ratios in each pass, and the least."""
    lines = []
    for (name, backend), found in same(rows, "pass", "backend").items():
        cells = []
        for rival in RIVALS:
            ratios = [row["ms"][rival] / row["ms"]["at_fused"] for row in found]
            cells += [math.exp(sum(map(math.log, ratios)) / len(ratios)), min(ratios)]
        lines.append((backend, name, str(len(found)), *(f"{ratio:.1f}x" for ratio in cells)))
    heads = "geometric means | settings | to eager | least | to compile | least"
    return markdown(heads, 1, lines)


def cases(rows: Sequence[Row]) -> list[str]:
    """In the picture the floor is what has to move (forward reads both features, backward reads the
    student's and writes its gradient; the maps between them), at the rate of one read; dotted, that
    of value and gradient, which reads the student's once. *Value and gradient* is
    `at_value_and_grad`, against the others' forward and backward.
    """
    gpu = any("copy" in row["ms"] for row in rows)
    directions = [name for (name,) in same(rows, "pass")]
    lines = []
    for (*setting, backend), found in same(rows, "case", "dtype", "layout", "backend").items():
        cells = [backend, *setting, *times(found[0], "floor")]
        by_pass = {row["pass"]: row for row in found}
        for name in directions:
            row = by_pass.get(name)
            if not row:  # pytest was told to leave it out
                cells += [""] * (3 + gpu)
                continue
            cells += [*times(row, "at_fused"), *to(row), *of_copy(row)]
        lines.append(tuple(cells))
    each = "".join(f" | {name} | to eager | to compile{' | of copy' * gpu}" for name in directions)
    table = markdown(f"case | dtype | layout | one read{each}", 3, lines)
    return [*table, "", *means(rows)]


def sizes(rows: Sequence[Row]) -> list[str]:
    """Forward and backward of one pair, fp32 NCHW."""
    shown = ("floor", "at_fused", *RIVALS)
    return markdown(
        "features | MB | one read | at_fused | eager | compile | to eager | to compile",
        1,
        [(r["backend"], shape(r), megabytes(r["bytes"]), *times(r, *shown), *to(r)) for r in rows],
    )


def memory(rows: Sequence[Row]) -> list[str]:
    """The most that forward and backward of case b allocate, fp32 NCHW, and over the gradient's own
    bytes.
    """
    lines = []
    for row in rows:
        held = [row["bytes"][program] for program in ("at_fused", *RIVALS)]
        cells = [f"{megabytes(size)} ({size / row['gradient']:.2f}x)" for size in held]
        lines.append((row["backend"], str(row["batch"]), megabytes(row["gradient"]), *cells))
    return markdown("batch | the gradient, MB | at_fused | eager | compile", 0, lines)


def calls(rows: Sequence[Row]) -> list[str]:
    """Tiny features: what a call costs."""
    lines = []
    for r in rows:
        us = [f"{1e3 * r['ms'][key]:.1f}" for key in ("at_fused", "eager")]
        pairs = f"{r['pairs']} of {shape(r)}"
        lines.append((r["backend"], pairs, r["pass"], *us, *to(r, ["eager"])))
    return markdown("pairs | pass | at_fused, us | eager, us | to eager", 2, lines)


def steps(rows: Sequence[Row]) -> list[str]:
    """Forward and backward of whole networks, without the optimizer, fp32 NCHW: WRN-16-2 to
    WRN-16-1, batch 128, 32x32; ResNet-34 to ResNet-18, batch 16, 224x224. *Peak* is the most that a
    step allocates.
    """
    lines = []
    for row in rows:
        size = row["bytes"]
        for step, title in STEPS.items():
            more = [f"{size[step] / size[base] - 1:+.1%}" for base in ("alone", "without")]
            cells = (f"{row['ms'][step]:.0f}", megabytes(size[step]), *more)
            lines.append((row["backend"], row["networks"], title, *cells))
    heads = "networks | step | ms | peak MB | to no teacher | to no AT"
    return markdown(heads, 2, lines)


# Name -> title, and table with its note.
PARTS: dict[str, tuple[str, Callable[[Sequence[Row]], list[str]]]] = {
    "cases": ("at_loss: the canonical cases", cases),
    "sizes": ("Time against size", sizes),
    "memory": ("Memory against batch", memory),
    "calls": ("Tiny calls", calls),
    "steps": ("Training steps", steps),
}


def note(part: str) -> str:
    """Return what the report says of a part."""
    return " ".join(PARTS[part][1].__doc__.split())
