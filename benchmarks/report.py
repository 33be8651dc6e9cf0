"""Measures this machine, and makes one report of the results of all machines.

    python -m benchmarks.report                      all that this machine has, CPU and GPU
    python -m benchmarks.report --device cuda        only its GPU
    python -m benchmarks.report --only cases calls   some parts, beside those measured before
    python -m benchmarks.report --merge              measures nothing

Writes results/<device>.json for each device, then results/report.md, its pictures, and what
README.md shows between markers that name a file of results.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Container, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import ROOT, charts, measure, results, roofline, tables
from benchmarks.cases import CANONICAL, CASES, DEVICES
from benchmarks.results import FOLDER, MODEL, Result, ResultError
from benchmarks.roofline import Count, Model, Row
from benchmarks.steps import NETWORKS

README = ROOT / "README.md"
DRAWN = {"cases": charts.cases, "sizes": charts.sizes, "memory": charts.memory}
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
without. On a GPU all programs but tiny calls run in CUDA graphs, each after a read of other data; a
star is at what could not be captured, whose launches by the host count. Milliseconds where nothing
else is said, MB of 10^6 bytes. The cases, of which all stages are one call:

{chr(10).join(f"- {case}, batch {CASES[case][0]}" for case in CANONICAL)}
"""

# ---- measuring -----------------------------------------------------------------------------------


def measured(device: str, parts: Sequence[str], folder: Path) -> None:
    """Measures parts of a device, and saves it after each."""
    result = results.begin(device)
    if set(parts) != set(measure.PARTS):
        result = results.resume(result, folder)
    path = results.path_of(result, folder)
    for part in parts:
        if device == "cpu" or part not in measure.ON_CPU_ONLY:
            begin = time.perf_counter()
            result["parts"][part] = measure.measure(device, part)
            results.write(path, result)
            seconds = time.perf_counter() - begin
            print(f"{result['device']}: {part}, {seconds:.0f} s, in {path}", flush=True)


# ---- the report ----------------------------------------------------------------------------------


def pictures(found: dict[str, Result], model: Model) -> dict[str, tuple[Callable[[], Figure], Any]]:
    """Name -> how to draw it, and what from."""
    drawn: dict[str, tuple[Callable[[], Figure], Any]] = {}
    for name, result in found.items():
        for part in DRAWN.keys() & result["parts"].keys():
            drawn[f"{name}-{part}"] = partial(DRAWN[part], result), result
        if result["kind"] == "cuda" and "cases" in result["parts"]:
            drawn[f"{name}-roofline"] = partial(charts.roofline, model, result), [model, result]
    drawn["roofline"] = partial(charts.roofline, model), model
    return drawn


def device_section(name: str, result: Result, pictured: Container[str]) -> list[str]:
    """All of a device's tables and pictures."""
    lines = [f"## {name}", "", f"{results.describe(result)}.", ""]
    for part, shown in tables.PARTS.items():
        if rows := result["parts"].get(part):
            lines += [f"### {shown.title}", "", shown.note, ""]
            if f"{name}-{part}" in pictured:
                lines += [f"![{shown.title}, {result['device']}]({name}-{part}.png)", ""]
            lines += [*shown.table(rows), ""]
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
        f"case) has to read and write: at_fused {span(lambda row: row.counted)}, "
        f"torch.compile {span(lambda row: row.compiled)}, eager {span(lambda row: row.eager)}."
    )


def text(found: dict[str, Result], model: Model, pictured: Container[str]) -> str:
    """report.md, with the pictures that there are."""
    cases = {f"[{r['device']}](#{n})": r["parts"].get("cases", []) for n, r in found.items()}
    lines = [INTRODUCTION]
    if len(found) > 1:
        lines += ["Geometric means of their ratios:", "", *tables.summary(cases), ""]
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


def in_readme(readme: str, found: dict[str, Result], model: Model) -> str:
    """README.md with what is between its markers made anew."""

    def block(match: re.Match[str]) -> str:
        begin, part, name, end = match.groups()
        if name == MODEL:
            return f"{begin}{model_sentence(model)}\n{end}"
        if name not in found:
            raise ResultError(f"README.md shows benchmarks/results/{name}.json, which is not there")
        shown = tables.PARTS[part or "cases"]
        lines = shown.table(found[name]["parts"].get(part or "cases", []))
        if not part:
            picture = f"![{shown.title}](benchmarks/results/{name}-cases.png)"
            lines = [f"{results.describe(found[name])}:", "", *lines, "", picture]
        return "\n".join([begin.rstrip(), *lines, end])

    return MARKED.sub(block, readme)


def merge(folder: Path, readme: Path) -> None:
    """Writes the report and its pictures, and the README's part."""
    found, model = results.load_all(folder), roofline.load(folder / f"{MODEL}.json")
    if not found:
        raise ResultError(f"no results in {folder}")
    shown = in_readme(readme.read_text(), found, model)
    drawn = pictures(found, model)
    for name, (draw, source) in drawn.items():
        charts.save(draw(), folder / f"{name}.png", source)
    (folder / "report.md").write_text(text(found, model, drawn))
    readme.write_text(shown)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    choice = parser.add_mutually_exclusive_group()
    parts = list(measure.PARTS)
    choice.add_argument(
        "--only", nargs="+", choices=parts, default=parts, help="parts to measure (all)"
    )
    parser.add_argument(
        "--device", nargs="+", choices=DEVICES, default=DEVICES, help="what to measure (all)"
    )
    choice.add_argument("--merge", action="store_true", help="measure nothing")
    given = parser.parse_args(arguments)
    try:
        if not given.merge:
            # Said at once, not after ten minutes.
            if {"steps", "resnet"} <= {*given.only, *NETWORKS} and not find_spec("torchvision"):
                raise ResultError("the steps are of torchvision's networks: pip install '.[train]'")
            for device in given.device:
                measured(device, given.only, FOLDER)
        merge(FOLDER, README)
    except ResultError as error:
        sys.exit(f"benchmarks.report: {error}")
    print(f"report: {FOLDER / 'report.md'}")


if __name__ == "__main__":
    main()
