"""Measures this machine, and makes one report of the results of all machines.

    python -m benchmarks.report                      all that this machine has, CPU and GPU
    python -m benchmarks.report --only cases calls   some parts, beside those measured before
    python -m benchmarks.report --merge              measures nothing

Writes results/<device>.json for each device, then results/report.md, its pictures, and what
README.md shows between markers that name a file of results.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import ROOT, charts, pages, results, roofline_model
from benchmarks.cases import DEVICES
from benchmarks.measure import ON_CPU_ONLY, PARTS
from benchmarks.results import FOLDER, MODEL, Result, ResultError
from benchmarks.roofline_model import Model
from benchmarks.steps import NETWORKS

README = ROOT / "README.md"
DRAWN = {"cases": charts.cases, "sizes": charts.sizes, "memory": charts.memory}

# ---- measuring -----------------------------------------------------------------------------------


def check(parts: Sequence[str]) -> None:
    """Says at once, not after ten minutes, what a part needs."""
    if "steps" in parts and "resnet" in NETWORKS and find_spec("torchvision") is None:
        raise ResultError("the steps are of torchvision's networks: pip install '.[train]'")


def measure(device: str, parts: Sequence[str], folder: Path) -> None:
    """Measures parts of a device, and saves it after each."""
    result = results.begin(device)
    if set(parts) != set(PARTS):
        result = results.resume(result, folder)
    path = results.path_of(result, folder)
    for part in parts:
        if device == "cpu" or part not in ON_CPU_ONLY:
            begin = time.perf_counter()
            result["parts"][part] = list(PARTS[part](device))
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


def merge(folder: Path, readme: Path) -> None:
    """Writes the report and its pictures, and the README's part."""
    found, model = results.load_all(folder), roofline_model.load(folder / f"{MODEL}.json")
    if not found:
        raise ResultError(f"no results in {folder}")
    shown = pages.in_readme(readme.read_text(), found, model)
    drawn = pictures(found, model)
    for name, (draw, source) in drawn.items():
        charts.save(draw(), folder / f"{name}.png", source)
    (folder / "report.md").write_text(pages.report(found, model, drawn))
    readme.write_text(shown)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure (all)"
    )
    choice.add_argument("--merge", action="store_true", help="measure nothing")
    given = parser.parse_args(arguments)
    try:
        if not given.merge:
            check(given.only)
            for device in DEVICES:
                measure(device, given.only, FOLDER)
        merge(FOLDER, README)
    except ResultError as error:
        sys.exit(f"benchmarks.report: {error}")
    print(f"report: {FOLDER / 'report.md'}")


if __name__ == "__main__":
    main()
