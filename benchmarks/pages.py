"""The text of the report, and of what the README shows of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Container

from benchmarks import results, tables
from benchmarks.cases import CASES
from benchmarks.results import MODEL, Result, ResultError
from benchmarks.roofline_model import Count, Model, Row

# What is shown of which results: one part's table, or without a part the cases and a picture.
MARKED = re.compile(
    r"(<!-- (?:(\w+) )?from benchmarks/results/(.+?)\.json -->\n).*?(<!-- end -->)", re.DOTALL
)

INTRODUCTION = f"""\
# Benchmarks

Made by `python -m benchmarks.report` from the `<device>.json` beside it ([README.md](README.md)
says how to add a device). All figures are medians of rounds in which the programs take turns, in
random order; ratios are within a run. *eager* is the lines that people paste, *compile* is
torch.compile of them, and *to eager* and *to compile* are their times over that of at_fused. *One
read* is the time to read the same bytes once (an integer maximum), which no forward pass can do
without. Milliseconds where nothing else is said, MB of 10^6 bytes. The cases, of which all stages
are one call:

{chr(10).join(f"- {case}, batch {batch}" for case, (batch, _) in CASES.items())}

Geometric means of their ratios:
"""
NOTES = {
    "cases": "In the picture the floor is what has to move (forward reads both features, backward "
    "reads the student's and writes its gradient; the maps between them), at the rate of one read; "
    "dotted, that of value and gradient, which reads the student's once. "
    "*Value and gradient* is `at_value_and_grad`, against the others' forward and backward.",
    "sizes": "Forward and backward of one pair, fp32 NCHW.",
    "memory": "The most that forward and backward of case b allocate, fp32 NCHW, and over the "
    "gradient's own bytes.",
    "threads": "fp32 NCHW; one read shows what the memory gains from more threads.",
    "calls": "Forward and backward of tiny features: what a call costs.",
    "methods": "Forward and backward; over fp32 and bf16, and cases a, b and c in NCHW and "
    "channels_last, or the variant's own cases. *Least* is the slowest setting.",
    "steps": "Forward and backward of whole networks, without the optimizer, fp32 NCHW: WRN-16-2 "
    "to WRN-16-1, batch 128, 32x32; ResNet-34 to ResNet-18, batch 16, 224x224. *AT's own* is the "
    "time of all that is attention transfer's: for `AttentionTransfer` by the clock within the "
    "step, on the CPU; for the popular lines and `at_loss` that of their calls alone. *Peak* is "
    "the most that a step allocates.",
    "taps": "The map's gradient added into the one that comes from the next layer, in place, "
    "against a gradient of its own that autograd adds.",
}


def device_section(name: str, result: Result, pictured: Container[str]) -> list[str]:
    """All of a device's tables and pictures."""
    lines = [f"## {name}", "", f"{results.describe(result)}.", ""]
    for part, title in tables.TITLES.items():
        rows = results.rows_of(result, part)
        if not rows:
            continue
        lines += [f"### {title}", "", NOTES[part], ""]
        if f"{name}-{part}" in pictured:
            lines += [f"![{title}, {result['device']}]({name}-{part}.png)", ""]
        lines += [*tables.TABLES[part](rows), ""]
    if f"{name}-roofline" in pictured:
        lines += ["### Roofline", "", f"![Roofline, {result['device']}]({name}-roofline.png)", ""]
    return lines


def model_sentence(model: Model) -> str:
    """What was counted, in short."""

    def span(count_of: Callable[[Row], Count]) -> str:
        counts = [count_of(row) for row in model.rows]
        to_floor = [count.bytes / row.floor for count, row in zip(counts, model.rows, strict=True)]
        launches = sorted({count.launches for count in counts})
        several = f"{launches[0]} to {launches[-1]} launches" if launches[1:] else "one launch"
        return f"{min(to_floor):.2f} to {max(to_floor):.2f} in {several}"

    return (
        "Bytes moved, over those that a pass (forward, backward, or value and gradient, of any "
        f"case) has to read and write: at_fused {span(Row.at_fused)}, torch.compile "
        f"{span(lambda row: row.compiled)}, eager {span(lambda row: row.eager)}."
    )


def report(found: dict[str, Result], model: Model, pictured: Container[str]) -> str:
    """report.md, with the pictures that there are."""
    cases = {f"[{r['device']}](#{n})": results.rows_of(r, "cases") for n, r in found.items()}
    lines = [INTRODUCTION, *tables.summary(cases), ""]
    for name, result in found.items():
        lines += device_section(name, result, pictured)
    lines += [
        "## The CUDA kernels, counted without a GPU",
        "",
        f"{model_sentence(model)} Every figure, and how they are counted, is in "
        "[roofline.md](roofline.md). The picture takes its times from a model, not from a GPU.",
        "",
        "![Roofline of the CUDA kernels, a model](roofline.png)",
    ]
    return "\n".join(lines) + "\n"


def in_readme(text: str, found: dict[str, Result], model: Model) -> str:
    """README.md with what is between its markers made anew."""

    def block(match: re.Match[str]) -> str:
        begin, part, name, end = match.groups()
        if name == MODEL:
            return f"{begin}{model_sentence(model)}\n{end}"
        if name not in found:
            raise ResultError(f"README.md shows benchmarks/results/{name}.json, which is not there")
        result = found[name]
        if part:
            table = tables.TABLES[part](results.rows_of(result, part))
            return "\n".join([begin.rstrip(), *table, end])
        rows = results.rows_of(result, "cases")
        picture = f"![{tables.TITLES['cases']}](benchmarks/results/{name}-cases.png)"
        lines = [f"{results.describe(result)}:", "", *tables.cases(rows), "", *tables.means(rows)]
        return "\n".join([begin.rstrip(), *lines, "", picture, end])

    return MARKED.sub(block, text)
