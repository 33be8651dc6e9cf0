"""Measure this machine, and write one report on the results of all machines.

    python -m benchmarks.report                  all devices of this machine, CPU and GPU
    python -m benchmarks.report --device cuda    only its GPU
    python -m benchmarks.report --merge          measures nothing

Writes results/<device>.json for each device, then results/report.md, the charts, and the blocks of
README.md and docs/*.md between ``<!-- KIND from benchmarks/results/NAME.json -->`` and
``<!-- end -->``. KIND is "figures" (headline figures) or a part (its table). Without it, a block
shows the cases with their chart, or a sentence on roofline.json.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from benchmarks import ROOT, argument_parser, charts, results, roofline, tables
from benchmarks.cases import CASES, DEVICES, TIMED_CASES
from benchmarks.measure import PARTS
from benchmarks.results import FOLDER, Result, ResultError
from benchmarks.steps import NETWORKS

CHARTS = {"cases": charts.cases, "sizes": charts.sizes}
BLOCK = re.compile(
    r"(<!-- (?:(\w+) )?from benchmarks/results/(.+?)\.json -->\n).*?(<!-- end -->)", re.DOTALL
)

INTRODUCTION = f"""\
# Benchmarks

`python -m benchmarks.report` makes this page from the `<device>.json` files next to it.
[README.md](README.md) says how to add a device.

- Times are medians in milliseconds; MB are 10^6 bytes. Each round runs all programs, shuffled.
- *eager* is the authors' loss in eager PyTorch. *compile* is torch.compile of it.
- *over eager* and *over compile* are speedups: their time over the time of at_fused.
- *one read* is the memory floor: the time to read the input once, measured with an integer
  maximum. No forward pass can be faster.
- On a GPU, programs run in CUDA graphs, and each starts with other data in the L2 cache. Tiny calls
  run without either. A star marks a program that could not be captured. Its time includes launches
  by the host.

Three cases are timed. All stages of a case are one call.

{chr(10).join(f"- {case}, batch {CASES[case][0]}" for case in TIMED_CASES)}
"""


def device_section(name: str, result: Result) -> list[str]:
    """Return all tables and charts of a device."""
    lines = [f"## {name}", "", f"{results.describe(result)}.", ""]
    for key, part in tables.PARTS.items():
        if rows := result["parts"].get(key):
            lines += [f"### {part.title}", "", part.note, ""]
            if key in CHARTS:
                lines += [f"![{part.title}, {result['device']}]({name}-{key}.png)", ""]
            lines += [*part.table(rows), ""]
    return lines


def text(devices: dict[str, Result], counts: Sequence[roofline.Row]) -> str:
    """Return the content of report.md."""
    lines = [INTRODUCTION]
    for name, result in devices.items():
        lines += device_section(name, result)
    lines += [
        "## The CUDA kernels, counted without a GPU",
        "",
        f"{roofline.sentence(counts)} [roofline.md](roofline.md) has all counts and the method.",
    ]
    return "\n".join(lines) + "\n"


def figures(result: Result) -> list[str]:
    """Return the headline figures of a device's first back end, after a line that explains them."""
    backend, kernels = next(iter(result["backends"].items()))
    cases, steps = (
        [row for row in result["parts"].get(part, []) if row["backend"] == backend]
        for part in ("cases", "steps")
    )
    settings = len(tables.group_by(cases, "case", "dtype", "layout"))
    torch = result["versions"]["torch"].partition("+")[0]
    line = (
        f"{results.machine_of(result)}, {kernels}, torch {torch}, {result['date']}. Speedup: "
        f"geometric mean (minimum to maximum) over {settings} settings of case, dtype and layout. "
        "Memory: a training step with `AttentionTransfer` and `at.prepare(x)`, over a step that "
        "runs the teacher after the student."
    )
    return [line, "", *tables.figures(cases, steps)]


def pages(root: Path) -> list[Path]:
    """Return the pages that may have blocks."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def fill(
    page: Path, folder: Path, devices: dict[str, Result], counts: Sequence[roofline.Row]
) -> str:
    """Return the text of a page, with its blocks made from the results in ``folder``."""
    link = Path(os.path.relpath(folder, page.parent)).as_posix()

    def block(match: re.Match[str]) -> str:
        begin, kind, name, end = match.groups()
        if kind not in (None, "figures", *tables.PARTS):
            known = ", ".join(tables.PARTS)
            raise ResultError(f"{page}: {kind!r} is not a kind of block; use figures, {known}")
        if name == roofline.FILE.stem:
            lines = [roofline.sentence(counts)]
        elif name not in devices:
            raise ResultError(f"{page} needs benchmarks/results/{name}.json, which does not exist")
        elif kind == "figures":
            lines = figures(devices[name])
        else:
            part = tables.PARTS[kind or "cases"]
            lines = part.table(devices[name]["parts"].get(kind or "cases", []))
            if not kind:
                chart = f"![{part.title}]({link}/{name}-cases.png)"
                lines = [f"{results.describe(devices[name])}:", "", *lines, "", chart]
        return "\n".join([begin.rstrip(), *lines, end])

    return BLOCK.sub(block, page.read_text())


def merge(folder: Path, root: Path) -> None:
    """Write the report, its charts and the blocks of all pages."""
    devices, counts = results.load_all(folder), roofline.load(folder / roofline.FILE.name)
    if not devices:
        raise ResultError(f"no results in {folder}")
    texts = {page: fill(page, folder, devices, counts) for page in pages(root)}
    for name, result in devices.items():
        for part in CHARTS.keys() & result["parts"].keys():
            charts.save(CHARTS[part](result), folder / f"{name}-{part}.png", result)
    texts[folder / "report.md"] = text(devices, counts)
    texts[folder / "roofline.md"] = roofline.text(counts)
    for page, content in texts.items():
        page.write_text(content)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argument_parser("report", __doc__)
    choice = {"nargs": "+", "choices": DEVICES, "default": DEVICES}
    parser.add_argument("--device", help="devices to measure (all)", **choice)
    parser.add_argument("--merge", action="store_true", help="only write the report again")
    options = parser.parse_args(arguments)
    try:
        if not options.merge:
            # Before ten minutes of other measurements.
            if "resnet" in NETWORKS and not find_spec("torchvision"):
                raise ResultError("training steps need torchvision: pip install '.[train]'")
            for device in options.device:
                settings = {part: each for part, (_, each) in PARTS.items()}
                print(f"results: {results.measure(device, settings, None)}", flush=True)
        merge(FOLDER, ROOT)
    except ResultError as error:
        sys.exit(f"benchmarks.report: {error}")
    print(f"report: {FOLDER / 'report.md'}")


if __name__ == "__main__":
    main()
