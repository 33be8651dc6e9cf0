"""The rows of a result as Markdown: a function for each part of measure.PARTS."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from benchmarks.timing import Row

RIVALS = ("eager", "compile")
STEPS = {
    "alone": "the student, no teacher",
    "without": "and the teacher's pass, no AT",
    "eager": "the popular lines",
    "drop-in": "`at_loss`",
    "tap": "`AttentionTransfer`",
    "prepared": "with `at.prepare(x)`",
}

# Cells of a row, and the back end that it is of.
Line = tuple[str, Sequence[str]]


def markdown(head: Sequence[str], text: int, lines: Iterable[Line]) -> list[str]:
    """A table with ``text`` columns of text, then numbers; on a GPU with the back ends' names."""
    lines = list(lines)
    gpu = any(backend != "cpu" for backend, _ in lines)
    named = ["back end"] if gpu else []

    def joined(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    ruler = "|---" * (text + len(named)) + "|--:" * (len(head) - text) + "|"
    return [joined([*head[:text], *named, *head[text:]]), ruler] + [
        joined([*cells[:text], *([backend] if gpu else []), *cells[text:]])
        for backend, cells in lines
    ]


def geometric_mean(values: Sequence[float]) -> float:
    """The mean of ratios."""
    return math.exp(sum(map(math.log, values)) / len(values))


def times(ms: float) -> str:
    """Milliseconds, to the microsecond below one."""
    return f"{ms:.2f}" if ms >= 1 else f"{ms:.3f}"


def to(row: Row, rival: str, program: str = "at_fused") -> str:
    """How many times as long a rival takes."""
    return f"{row['ms'][rival] / row['ms'][program]:.1f}x"


def megabytes(count: float) -> str:
    """Of 10^6 bytes."""
    return f"{count / 1e6:.1f}" if count >= 1e6 else f"{count / 1e6:.2g}"


def same(rows: Sequence[Row], *keys: str) -> dict[tuple[str, ...], list[Row]]:
    """The rows by what they have in common."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


# ---- at_loss -------------------------------------------------------------------------------------


def of_copy(row: Row) -> str:
    """The rate at which the bytes went that have to, to that of a plain copy."""
    rates = {key: row["bytes"][key] / row["ms"][key] for key in ("at_fused", "copy")}
    return f"{rates['at_fused'] / rates['copy']:.0%}"


def cases(rows: Sequence[Row]) -> list[str]:
    """The canonical cases: milliseconds, and the others' over ours."""
    gpu = any("copy" in row["ms"] for row in rows)
    names = same(rows, "pass")
    columns = ["to eager", "to compile", *(["of copy"] if gpu else [])]
    lines = []
    for (*setting, backend), passes in same(rows, "case", "dtype", "layout", "backend").items():
        cells = [*setting, times(passes[0]["ms"]["floor"])]
        by_pass = {row["pass"]: row for row in passes}
        for (name,) in names:
            row = by_pass.get(name)
            if row:
                cells += [times(row["ms"]["at_fused"]), *(to(row, rival) for rival in RIVALS)]
                cells += [of_copy(row)] if gpu else []
            else:  # pytest was told to leave it out
                cells += [""] * (1 + len(columns))
        lines.append((backend, cells))
    heads = [each for (name,) in names for each in (name, *columns)]
    return markdown(["case", "dtype", "layout", "one read", *heads], 3, lines)


def ratios(rows: Sequence[Row]) -> dict[str, list[float]]:
    """Rival -> its times over ours."""
    return {rival: [r["ms"][rival] / r["ms"]["at_fused"] for r in rows] for rival in RIVALS}


def mean_and_least(rows: Sequence[Row]) -> list[str]:
    """Cells: the geometric mean of a rival's ratios and the least of them, of each rival."""
    return [
        f"{of(values):.1f}x" for values in ratios(rows).values() for of in (geometric_mean, min)
    ]


def means(rows: Sequence[Row]) -> list[str]:
    """Geometric means of the ratios of all cases, and the least of them."""
    return markdown(
        ["geometric means", "to eager", "least", "to compile", "least"],
        1,
        (
            (backend, [name, *mean_and_least(found)])
            for (name, backend), found in same(rows, "pass", "backend").items()
        ),
    )


def summary(results: dict[str, Sequence[Row]]) -> list[str]:
    """Geometric means of the ratios of the cases, a row for each back end of each device."""
    passes = dict.fromkeys(row["pass"] for rows in results.values() for row in rows)
    heads = [f"{name}: to {rival}" for name in passes for rival in RIVALS]
    lines = []
    for device, rows in results.items():
        for (backend,), found in same(rows, "backend").items():
            by_pass = same(found, "pass")
            means = [ratios(by_pass[name,]) for name in passes]
            cells = [f"{geometric_mean(v):.1f}x" for each in means for v in each.values()]
            lines.append(("cpu", [device, backend, *cells]))
    return markdown(["device", "back end", *heads], 2, lines)


def all_cases(rows: Sequence[Row]) -> list[str]:
    """Both."""
    return [*cases(rows), "", *means(rows)]


def sizes(rows: Sequence[Row]) -> list[str]:
    """Milliseconds of each size."""
    return markdown(
        ["features", "MB", "one read", "at_fused", "eager", "compile", "to eager", "to compile"],
        1,
        (
            (
                row["backend"],
                [
                    "x".join(map(str, row["shape"])),
                    megabytes(row["bytes"]),
                    *(times(row["ms"][key]) for key in ("floor", "at_fused", *RIVALS)),
                    *(to(row, rival) for rival in RIVALS),
                ],
            )
            for row in rows
        ),
    )


def memory(rows: Sequence[Row]) -> list[str]:
    """Megabytes at each batch, and over those of the gradient."""

    def cell(row: Row, program: str) -> str:
        size = row["bytes"][program]
        return f"{megabytes(size)} ({size / row['gradient']:.2f}x)"

    return markdown(
        ["batch", "the gradient, MB", "at_fused", "eager", "compile"],
        0,
        (
            (
                row["backend"],
                [str(row["batch"]), megabytes(row["gradient"])]
                + [cell(row, program) for program in ("at_fused", *RIVALS)],
            )
            for row in rows
        ),
    )


def threads(rows: Sequence[Row]) -> list[str]:
    """Milliseconds, and how many times as fast as one thread."""
    columns = {"floor": "one read", "forward": "forward", "forward+backward": "forward+backward"}
    lines = []
    for found in same(rows, "case").values():
        for row in found:
            cells = [row["case"], str(row["threads"])]
            for key in columns:
                gain = found[0]["ms"][key] / row["ms"][key]
                cells += [times(row["ms"][key]), f"{gain:.2f}x"]
            lines.append((row["backend"], cells))
    heads = [each for name in columns.values() for each in (name, "to one thread")]
    return markdown(["case", "threads", *heads], 1, lines)


def calls(rows: Sequence[Row]) -> list[str]:
    """Microseconds of tiny calls."""
    return markdown(
        ["pairs", "at_fused, us", "eager, us", "to eager"],
        1,
        (
            (
                row["backend"],
                [
                    f"{row['pairs']} of {'x'.join(map(str, row['shape']))}",
                    *(f"{1e3 * row['ms'][key]:.1f}" for key in ("at_fused", "eager")),
                    to(row, "eager"),
                ],
            )
            for row in rows
        ),
    )


# ---- the rest of the method ----------------------------------------------------------------------


def variants(rows: Sequence[Row]) -> list[str]:
    """Each variant: the geometric means of its ratios, and the least of them."""
    lines = []
    for (name, backend), found in same(rows, "variant", "backend").items():
        lines.append((backend, [name, str(len(found)), *mean_and_least(found)]))
    head = ["variant", "settings", "to eager", "least", "to compile", "least"]
    return markdown(head, 1, lines)


def method_settings(rows: Sequence[Row]) -> list[str]:
    """Each setting of each variant."""
    keys = ("variant", "case", "dtype", "layout")
    return markdown(
        [*keys, "ms", "to eager", "to compile"],
        len(keys),
        (
            (
                row["backend"],
                [row[key] for key in keys]
                + [times(row["ms"]["at_fused"]), *(to(row, rival) for rival in RIVALS)],
            )
            for row in rows
        ),
    )


def methods(rows: Sequence[Row]) -> list[str]:
    """Both."""
    every = ["<details><summary>Every setting</summary>", "", *method_settings(rows), ""]
    return [*variants(rows), "", *every, "</details>"]


# ---- whole steps ---------------------------------------------------------------------------------


def steps(rows: Sequence[Row]) -> list[str]:
    """Their times, attention transfer's own, and the most that they hold."""
    lines = []
    for row in rows:
        for step, title in STEPS.items():
            own, size = row["own"].get(step), row["bytes"]
            cells = [row["networks"], title, f"{row['ms'][step]:.0f}", "", ""]
            if own:
                share = row["share"] if step == "tap" else own / row["ms"]["without"]
                cells[-2:] = [times(own), f"{share:.2%}"]
            cells += [megabytes(size[step])]
            cells += [f"{size[step] / size[base] - 1:+.1%}" for base in ("alone", "without")]
            lines.append((row["backend"], cells))
    heads = ["networks", "step", "ms", "AT's own ms", "share"]
    return markdown([*heads, "peak MB", "to no teacher", "to no AT"], 2, lines)


def taps(rows: Sequence[Row]) -> list[str]:
    """The backward of taps, to the drop-in's gradient and its addition, and to eager's."""
    heads = ("drop-in", "eager")
    lines = [
        (
            row["backend"],
            [row["case"], row["dtype"], row["layout"], times(row["ms"]["tap"])]
            + [to(row, rival, "tap") for rival in heads],
        )
        for row in rows
    ]
    for (backend,), found in same(rows, "backend").items():
        ratios = [[row["ms"][rival] / row["ms"]["tap"] for row in found] for rival in heads]
        for name, of in (("geometric mean", geometric_mean), ("least", min)):
            cells = [name, "", "", "", *(f"{of(values):.1f}x" for values in ratios)]
            lines.append((backend, cells))
    return markdown(["case", "dtype", "layout", "tap ms", "to drop-in", "to eager"], 3, lines)


TABLES: dict[str, Callable[[Sequence[Row]], list[str]]] = {
    "cases": all_cases,
    "sizes": sizes,
    "memory": memory,
    "threads": threads,
    "calls": calls,
    "methods": methods,
    "steps": steps,
    "taps": taps,
}

TITLES = {
    "cases": "at_loss: the canonical cases",
    "sizes": "Time against size",
    "memory": "Memory against batch",
    "threads": "From one thread to all",
    "calls": "Tiny calls",
    "methods": "The rest of the method",
    "steps": "Training steps",
    "taps": "The backward of taps",
}
