"""The rows of a result as Markdown: a function for each part of measure.PARTS."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

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
    rows = [columns, *(cells for _, *cells in lines)]
    first, *others = (f"| {' | '.join(cells)} |" for cells in rows)
    return [first, ruler, *others]


def same(rows: Iterable[Row], *keys: str) -> dict[tuple[str, ...], list[Row]]:
    """The rows by what they have in common."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


# ---- cells ---------------------------------------------------------------------------------------


def mark(row: Row, *programs: str) -> str:
    """A star where a time is not of a CUDA graph, as the others are."""
    return "*" * any(name in row.get("uncaptured", {}) for name in programs)


def times(row: Row, *programs: str) -> list[str]:
    """Milliseconds, to the microsecond below one."""
    found = [(row["ms"][name], mark(row, name)) for name in programs]
    return [(f"{ms:.2f}" if ms >= 1 else f"{ms:.3f}") + star for ms, star in found]


def to(row: Row, rivals: Sequence[str] = RIVALS, program: str = "at_fused") -> list[str]:
    """How many times as long the rivals take."""
    ratios = [(rival, row["ms"][rival] / row["ms"][program]) for rival in rivals]
    return [f"{ratio:.1f}x{mark(row, rival, program)}" for rival, ratio in ratios]


def megabytes(count: float) -> str:
    """Of 10^6 bytes."""
    return f"{count / 1e6:.1f}" if count >= 1e6 else f"{count / 1e6:.2g}"


def shape(row: Row) -> str:
    """As 4x8x4x4."""
    return "x".join(map(str, row["shape"]))


def geometric_mean(values: Sequence[float]) -> float:
    """The mean of ratios."""
    return math.exp(sum(map(math.log, values)) / len(values))


Reduce = Callable[[Sequence[float]], float]


def over(
    rows: Sequence[Row],
    *reductions: Reduce,
    rivals: Sequence[str] = RIVALS,
    program: str = "at_fused",
) -> list[str]:
    """Of each rival's ratios in all rows: the geometric mean, the least."""
    ratios = [[row["ms"][rival] / row["ms"][program] for row in rows] for rival in rivals]
    return [f"{reduce(values):.1f}x" for values in ratios for reduce in reductions]


# ---- the parts -----------------------------------------------------------------------------------


def means(rows: Sequence[Row], key: str, title: str) -> list[str]:
    """Geometric means of the ratios of rows with something in common, and the least of them."""
    return markdown(
        f"{title} | settings | to eager | least | to compile | least",
        1,
        [
            (backend, name, str(len(found)), *over(found, geometric_mean, min))
            for (name, backend), found in same(rows, key, "backend").items()
        ],
    )


def cases(rows: Sequence[Row]) -> list[str]:
    """The canonical cases: milliseconds, and the others' over ours; on a GPU the share of a copy.

    That is the rate at which the bytes went that have to, to that of a plain copy of as many.
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
            cells += [*times(row, "at_fused"), *to(row)]
            if gpu:
                ours, copy = (row["bytes"][key] / row["ms"][key] for key in ("at_fused", "copy"))
                cells.append(f"{ours / copy:.0%}")
        lines.append(tuple(cells))
    each = "".join(f" | {name} | to eager | to compile{' | of copy' * gpu}" for name in directions)
    return markdown(f"case | dtype | layout | one read{each}", 3, lines)


def all_cases(rows: Sequence[Row]) -> list[str]:
    """The cases and their means."""
    return [*cases(rows), "", *means(rows, "pass", "geometric means")]


def summary(results: dict[str, Sequence[Row]]) -> list[str]:
    """Geometric means of the ratios of the cases, a row for each back end of each device."""
    directions = dict.fromkeys(row["pass"] for rows in results.values() for row in rows)
    heads = [f"{name}: to {rival}" for name in directions for rival in RIVALS]
    lines = []
    for device, rows in results.items():
        for (backend,), found in same(rows, "backend").items():
            by_pass = same(found, "pass")
            cells = [cell for name in directions for cell in over(by_pass[name,], geometric_mean)]
            lines.append(("cpu", device, backend, *cells))
    return markdown(" | ".join(["device", "back end", *heads]), 2, lines)


def sizes(rows: Sequence[Row]) -> list[str]:
    """Milliseconds of each size."""
    shown = ("floor", "at_fused", *RIVALS)
    return markdown(
        "features | MB | one read | at_fused | eager | compile | to eager | to compile",
        1,
        [(r["backend"], shape(r), megabytes(r["bytes"]), *times(r, *shown), *to(r)) for r in rows],
    )


def memory(rows: Sequence[Row]) -> list[str]:
    """Megabytes at each batch, and over those of the gradient."""

    def cells(row: Row) -> Iterable[str]:
        for program in ("at_fused", *RIVALS):
            size = row["bytes"][program]
            yield f"{megabytes(size)} ({size / row['gradient']:.2f}x)"

    return markdown(
        "batch | the gradient, MB | at_fused | eager | compile",
        0,
        [(r["backend"], str(r["batch"]), megabytes(r["gradient"]), *cells(r)) for r in rows],
    )


def threads(rows: Sequence[Row]) -> list[str]:
    """Milliseconds, and how many times as fast as one thread."""
    names = ("floor", "forward", "forward+backward")
    lines = []
    for found in same(rows, "case").values():
        for row in found:
            gains = [f"{found[0]['ms'][name] / row['ms'][name]:.2f}x" for name in names]
            pairs = zip(times(row, *names), gains, strict=True)
            cells = [cell for pair in pairs for cell in pair]
            lines.append((row["backend"], row["case"], str(row["threads"]), *cells))
    heads = "".join(f" | {name} | to one thread" for name in ("one read", *names[1:]))
    return markdown(f"case | threads{heads}", 1, lines)


def calls(rows: Sequence[Row]) -> list[str]:
    """Microseconds of tiny calls."""
    lines = []
    for r in rows:
        us = [f"{1e3 * r['ms'][key]:.1f}" for key in ("at_fused", "eager")]
        lines.append(
            (r["backend"], f"{r['pairs']} of {shape(r)}", r["pass"], *us, *to(r, ["eager"]))
        )
    return markdown("pairs | pass | at_fused, us | eager, us | to eager", 2, lines)


def by_kind(rows: Sequence[Row], keys: Sequence[str], cell: Callable[[Row], str]) -> list[str]:
    """A line for each setting, with a cell for each dtype and layout."""
    kinds = list(same(rows, "dtype", "layout"))
    lines = []
    for (*setting, backend), found in same(rows, *keys, "backend").items():
        cells = {(row["dtype"], row["layout"]): cell(row) for row in found}
        lines.append((backend, *setting, *(cells.get(kind, "") for kind in kinds)))
    return markdown(" | ".join([*keys, *map(" ".join, kinds)]), len(keys), lines)


def methods(rows: Sequence[Row]) -> list[str]:
    """Each variant's means, then every setting: ours, and what the others take over it."""
    fold = ["<details><summary>Every setting: ms / to eager / to compile</summary>", ""]
    cells = by_kind(
        rows, ["variant", "case"], lambda r: " / ".join([*times(r, "at_fused"), *to(r)])
    )
    return [*means(rows, "variant", "variant"), "", *fold, *cells, "", "</details>"]


def steps(rows: Sequence[Row]) -> list[str]:
    """Their times, attention transfer's own, and the most that they hold."""
    lines = []
    for row in rows:
        for step, title in STEPS.items():
            own, size = row["own"].get(step), row["bytes"]
            of_it = ["", ""]
            if own:
                share = row["share"] if step == "tap" else own / row["ms"]["without"]
                of_it = [*times({"ms": row["own"]}, step), f"{share:.2%}"]
            more = [f"{size[step] / size[base] - 1:+.1%}" for base in ("alone", "without")]
            cells = (f"{row['ms'][step]:.0f}", *of_it, megabytes(size[step]), *more)
            lines.append((row["backend"], row["networks"], title, *cells))
    heads = "networks | step | ms | AT's own ms | share | peak MB | to no teacher | to no AT"
    return markdown(heads, 2, lines)


def taps(rows: Sequence[Row]) -> list[str]:
    """The backward of taps, to the drop-in's gradient and its addition, and to eager's."""
    rivals = ("drop-in", "eager")
    cells = by_kind(rows, ["case"], lambda r: " / ".join([*times(r, "tap"), *to(r, rivals, "tap")]))
    lines = [
        (backend, *over(found, geometric_mean, min, rivals=rivals, program="tap"))
        for (backend,), found in same(rows, "backend").items()
    ]
    return [*cells, "", *markdown("to drop-in | least | to eager | least", 0, lines)]


class Part(NamedTuple):
    """How a part of the report is shown."""

    title: str
    table: Callable[[Sequence[Row]], list[str]]
    note: str


PARTS = {
    "cases": Part(
        "at_loss: the canonical cases",
        all_cases,
        "In the picture the floor is what has to move (forward reads both features, backward "
        "reads the student's and writes its gradient; the maps between them), at the rate of one "
        "read; dotted, that of value and gradient, which reads the student's once. "
        "*Value and gradient* is `at_value_and_grad`, against the others' forward and backward.",
    ),
    "sizes": Part("Time against size", sizes, "Forward and backward of one pair, fp32 NCHW."),
    "memory": Part(
        "Memory against batch",
        memory,
        "The most that forward and backward of case b allocate, fp32 NCHW, and over the "
        "gradient's own bytes.",
    ),
    "threads": Part(
        "From one thread to all",
        threads,
        "fp32 NCHW; one read shows what the memory gains from more threads.",
    ),
    "calls": Part("Tiny calls", calls, "Tiny features: what a call costs."),
    "methods": Part(
        "The rest of the method",
        methods,
        "Forward and backward; over fp32 and bf16, and cases a, b and c in NCHW and "
        "channels_last, or the variant's own cases. *Least* is the slowest setting.",
    ),
    "steps": Part(
        "Training steps",
        steps,
        "Forward and backward of whole networks, without the optimizer, fp32 NCHW: WRN-16-2 "
        "to WRN-16-1, batch 128, 32x32; ResNet-34 to ResNet-18, batch 16, 224x224. *AT's own* is "
        "the time of all that is attention transfer's: for `AttentionTransfer` by the clock within "
        "the step, on the CPU; for the popular lines and `at_loss` that of their calls alone. "
        "*Peak* is the most that a step allocates.",
    ),
    "taps": Part(
        "The backward of taps",
        taps,
        "The map's gradient added into the one that comes from the next layer, in place, "
        "against a gradient of its own that autograd adds: ms / to drop-in / to eager, and the "
        "geometric means of the ratios.",
    ),
}
