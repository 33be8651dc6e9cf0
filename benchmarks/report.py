"""Measures this machine, and makes one report of the results of all machines.

    python -m benchmarks.report                  all that this machine has, CPU and GPU
    python -m benchmarks.report --device cuda    only its GPU
    python -m benchmarks.report --merge          measures nothing

Writes results/<device>.json for each device, then results/report.md, its pictures, and what
README.md shows between markers that name a file of results.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from benchmarks import ROOT, charts, results, roofline, tables
from benchmarks.cases import CANONICAL, CASES, DEVICES
from benchmarks.measure import PARTS
from benchmarks.results import FOLDER, Result, ResultError
from benchmarks.steps import NETWORKS

README = ROOT / "README.md"
DRAWN = {"cases": charts.cases, "sizes": charts.sizes}
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


def device_section(name: str, result: Result) -> list[str]:
    """All of a device's tables and pictures."""
    lines = [f"## {name}", "", f"{results.describe(result)}.", ""]
    for part, (title, table) in tables.PARTS.items():
        if rows := result["parts"].get(part):
            lines += [f"### {title}", "", tables.note(part), ""]
            if part in DRAWN:
                lines += [f"![{title}, {result['device']}]({name}-{part}.png)", ""]
            lines += [*table(rows), ""]
    return lines


def text(found: dict[str, Result], counted: Sequence[roofline.Row]) -> str:
    """report.md."""
    lines = [INTRODUCTION]
    for name, result in found.items():
        lines += device_section(name, result)
    lines += [
        "## The CUDA kernels, counted without a GPU",
        "",
        f"{roofline.sentence(counted)} Every figure, and how they are counted, is in "
        "[roofline.md](roofline.md).",
    ]
    return "\n".join(lines) + "\n"


def in_readme(readme: str, found: dict[str, Result], counted: Sequence[roofline.Row]) -> str:
    """README.md with what is between its markers made anew."""

    def block(match: re.Match[str]) -> str:
        begin, part, name, end = match.groups()
        if name == roofline.FILE.stem:
            return f"{begin}{roofline.sentence(counted)}\n{end}"
        if name not in found:
            raise ResultError(f"README.md shows benchmarks/results/{name}.json, which is not there")
        title, table = tables.PARTS[part or "cases"]
        lines = table(found[name]["parts"].get(part or "cases", []))
        if not part:
            picture = f"![{title}](benchmarks/results/{name}-cases.png)"
            lines = [f"{results.describe(found[name])}:", "", *lines, "", picture]
        return "\n".join([begin.rstrip(), *lines, end])

    return MARKED.sub(block, readme)


def merge(folder: Path, readme: Path) -> None:
    """Write the report and its pictures, and the README's part."""
    found, counted = results.load_all(folder), roofline.load(folder / roofline.FILE.name)
    if not found:
        raise ResultError(f"no results in {folder}")
    shown = in_readme(readme.read_text(), found, counted)
    for name, result in found.items():
        for part in DRAWN.keys() & result["parts"].keys():
            charts.save(DRAWN[part](result), folder / f"{name}-{part}.png", result)
    (folder / "report.md").write_text(text(found, counted))
    readme.write_text(shown)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    some = {"nargs": "+", "choices": DEVICES, "default": DEVICES}
    parser.add_argument("--device", help="what to measure (all)", **some)
    parser.add_argument("--merge", action="store_true", help="measure nothing")
    given = parser.parse_args(arguments)
    try:
        if not given.merge:
            # Said at once, not after ten minutes.
            if "resnet" in NETWORKS and not find_spec("torchvision"):
                raise ResultError("the steps are of torchvision's networks: pip install '.[train]'")
            for device in given.device:
                settings = {part: each for part, (_, each) in PARTS.items()}
                print(f"in {results.measure(device, settings, None)}", flush=True)
        merge(FOLDER, README)
    except ResultError as error:
        sys.exit(f"benchmarks.report: {error}")
    print(f"report: {FOLDER / 'report.md'}")


if __name__ == "__main__":
    main()
