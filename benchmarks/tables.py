"""The report's tables in Markdown: PARTS has one for each part of measure.PARTS."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import geometric_mean
from typing import NamedTuple

from benchmarks.measure import Row

BASELINES = ("eager", "compile")
NETWORKS = {"wrn": "WRN-16-2 to WRN-16-1", "resnet": "ResNet-34 to ResNet-18"}
STEPS = {
    "alone": "student alone",
    "without": "teacher's forward pass, no AT",
    "eager": "AT in eager PyTorch",
    "drop-in": "`at_loss`",
    "tap": "`AttentionTransfer`",
    "prepared": "`AttentionTransfer` with `at.prepare(x)`",
}

# The back end of a line, then its cells.
Line = tuple[str, ...]


def markdown(heads: str, text: int, lines: Iterable[Line]) -> list[str]:
    """Return a table: ``text`` columns of text, on a GPU the back end, then numbers."""
    lines, columns = list(lines), heads.split(" | ")
    if any(backend != "cpu" for backend, *_ in lines):
        columns.insert(text, "back end")
        lines = [(on, *cells[:text], on, *cells[text:]) for on, *cells in lines]
        text += 1
    ruler = "|---" * text + "|--:" * (len(columns) - text) + "|"
    first, *others = (f"| {' | '.join(row)} |" for row in (columns, *(line[1:] for line in lines)))
    return [first, ruler, *others]


def group_by(rows: Iterable[Row], *keys: str) -> dict[tuple[str, ...], list[Row]]:
    """Return rows grouped by the values of keys."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def star(row: Row, *programs: str) -> str:
    """Return a star if a program was not timed in a CUDA graph, unlike the others."""
    return "*" * any(name in row.get("uncaptured", {}) for name in programs)


def milliseconds(ms: float) -> str:
    return f"{ms:.2f}" if ms >= 1 else f"{ms:.3f}"


def times(row: Row, *programs: str) -> list[str]:
    return [milliseconds(row["ms"][name]) + star(row, name) for name in programs]


def speedups(row: Row, baselines: Sequence[str] = BASELINES) -> list[str]:
    """Return the times of the baselines over the time of at_fused."""
    ratios = [(name, row["ms"][name] / row["ms"]["at_fused"]) for name in baselines]
    return [f"{ratio:.1f}x{star(row, name, 'at_fused')}" for name, ratio in ratios]


def copy_rate(row: Row) -> list[str]:
    """Return the bandwidth of at_fused over that of a copy, on a GPU."""
    if "copy" not in row["ms"]:
        return []
    ours, copy = (row["bytes"][name] / row["ms"][name] for name in ("at_fused", "copy"))
    return [f"{ours / copy:.0%}"]


def megabytes(count: float) -> str:
    return f"{count / 1e6:.1f}" if count >= 1e6 else f"{count / 1e6:.2g}"


def shape(row: Row) -> str:
    return "x".join(map(str, row["shape"]))


def mean_speedups(rows: Sequence[Row]) -> list[Line]:
    """Return a line per pass: settings, geometric mean (minimum to maximum) over each baseline."""
    lines = []
    for (name, backend), group in group_by(rows, "pass", "backend").items():
        cells = []
        for baseline in BASELINES:
            ratios = [row["ms"][baseline] / row["ms"]["at_fused"] for row in group]
            span = f"{min(ratios):.1f}x to {max(ratios):.1f}x"
            cells.append(f"{geometric_mean(ratios):.1f}x ({span})")
        lines.append((backend, name, str(len(group)), *cells))
    return lines


def more_memory(row: Row, step: str, baseline: str) -> str:
    return f"{row['bytes'][step] / row['bytes'][baseline] - 1:+.1%}"


def figures(case_rows: Sequence[Row], step_rows: Sequence[Row]) -> list[str]:
    """Return the headline figures of one back end: speedups, and memory of training steps."""
    lines: list[Line] = []
    for _, name, _, *cells in mean_speedups(case_rows):
        lines.append(("cpu", f"speedup, {name}", *cells))
    for row in step_rows:
        label = f"peak memory of a step, {NETWORKS[row['networks']]}"
        lines.append(("cpu", label, more_memory(row, "prepared", "eager"), ""))
    return markdown(" | over eager | over torch.compile", 1, lines)


def cases(rows: Sequence[Row]) -> list[str]:
    gpu = any("copy" in row["ms"] for row in rows)
    passes = [name for (name,) in group_by(rows, "pass")]
    lines = []
    for (*setting, backend), group in group_by(rows, "case", "dtype", "layout", "backend").items():
        cells = [backend, *setting, *times(group[0], "floor")]
        by_pass = {row["pass"]: row for row in group}
        for name in passes:
            row = by_pass.get(name)
            if not row:  # deselected in pytest
                cells += [""] * (3 + gpu)
                continue
            cells += [*times(row, "at_fused"), *speedups(row), *copy_rate(row)]
        lines.append(tuple(cells))
    each = "".join(f" | {name} | over eager | over compile{' | of copy' * gpu}" for name in passes)
    table = markdown(f"case | dtype | layout | one read{each}", 3, lines)
    heads = "geometric mean (minimum to maximum) | settings | over eager | over compile"
    return [*table, "", *markdown(heads, 1, mean_speedups(rows))]


def sizes(rows: Sequence[Row]) -> list[str]:
    heads = "features | MB | one read | at_fused | eager | compile | over eager | over compile"
    lines = []
    for row in rows:
        cells = times(row, "floor", "at_fused", *BASELINES) + speedups(row)
        lines.append((row["backend"], shape(row), megabytes(row["bytes"]), *cells))
    return markdown(heads, 1, lines)


def memory(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        peaks = [row["bytes"][program] for program in ("at_fused", *BASELINES)]
        cells = [f"{megabytes(peak)} ({peak / row['gradient']:.2f}x)" for peak in peaks]
        lines.append((row["backend"], str(row["batch"]), megabytes(row["gradient"]), *cells))
    return markdown("batch | gradient, MB | at_fused, MB | eager, MB | compile, MB", 0, lines)


def calls(rows: Sequence[Row]) -> list[str]:
    lines = []
    for r in rows:
        us = [f"{1e3 * r['ms'][key]:.1f}" for key in ("at_fused", "eager")]
        pairs = f"{r['pairs']} of {shape(r)}"
        lines.append((r["backend"], pairs, r["pass"], *us, *speedups(r, ["eager"])))
    return markdown("pairs | pass | at_fused, us | eager, us | over eager", 2, lines)


def steps(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        for step, title in STEPS.items():
            more = [more_memory(row, step, baseline) for baseline in ("alone", "without")]
            cells = (f"{row['ms'][step]:.0f}", megabytes(row["bytes"][step]), *more)
            lines.append((row["backend"], NETWORKS[row["networks"]], title, *cells))
    return markdown("networks | step | ms | peak, MB | over student alone | over no AT", 2, lines)


class Part(NamedTuple):
    """A section of the report: its title, the note above its table, and the table."""

    title: str
    note: str
    table: Callable[[Sequence[Row]], list[str]]


PARTS = {
    "cases": Part(
        "Speed of at_loss on three cases",
        "*Value and gradient* is one call of `at_value_and_grad`; the others run forward and "
        "backward. In the chart, times are relative to one read of the input. The lines are lower "
        "bounds: the time to move the bytes that a pass must move, at the rate of one read. "
        "Forward reads both features. Backward reads the student's feature and writes its "
        "gradient. Value and gradient (dotted) reads the student's feature only once.",
        cases,
    ),
    "sizes": Part("Time by feature size", "Forward and backward of one pair, fp32 NCHW.", sizes),
    "memory": Part(
        "Peak memory by batch size",
        "Peak memory that forward and backward of case b allocate, fp32 NCHW. In parentheses: "
        "relative to the gradient.",
        memory,
    ),
    "calls": Part("Tiny calls", "Overhead of a call, on tiny features.", calls),
    "steps": Part(
        "Training steps",
        "Forward and backward of whole networks without the optimizer, fp32 NCHW. WRN: batch 128, "
        "32x32. ResNet: batch 16, 224x224. *Peak* is the largest amount of memory that a step "
        "allocates. The last columns compare it with the student alone, and with a step that runs "
        "the teacher without AT.",
        steps,
    ),
}
