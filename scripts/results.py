"""Write the tables and figures of docs/results.md from the records in docs/results.

    python scripts/results.py [RUN NAME]

With a run's folder its records are added first, by a name. NAME.jsonl and NAME.toml are of its
metrics.jsonl and config.toml; NAME-search.json has the search.json files of
scripts/search_settings.py by preset. A table stands between <!-- NAME --> and <!-- end -->.
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
import sys
from pathlib import Path

from at_fused.train.config import TITLES, Config, from_toml, resolve
from at_fused.train.experiment import Result
from at_fused.train.loop import Curve
from at_fused.train.report import draw_curves, table, table_of

FOLDER = Path(__file__).parents[1] / "docs" / "results"
PAGE = FOLDER.with_suffix(".md")


# Fields of metrics.jsonl that tables and figures read.
KEPT = ("run", "method", "seed", "step", "epoch", "ce", "accuracy", "gradient_ratio", "ms")


def add(run: Path, name: str) -> None:
    """Add the records of a run."""
    shutil.copy(run / "config.toml", FOLDER / f"{name}.toml")
    lines = []
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        kept = {n: line[n] for n in KEPT if n in line}
        short = {n: float(f"{x:.5g}") if isinstance(x, float) else x for n, x in kept.items()}
        lines.append(json.dumps(short) + "\n")
    (FOLDER / f"{name}.jsonl").write_text("".join(lines))


def run_of(name: str) -> tuple[Result, Config]:
    """Return the results and the configuration of a run's records."""
    config = resolve(from_toml((FOLDER / f"{name}.toml").read_text()))
    curves: dict[str, Curve] = {}
    result = Result(None, {method: [] for method in config.compare})
    for line in map(json.loads, (FOLDER / f"{name}.jsonl").read_text().splitlines()):
        if line["run"] not in curves:
            curves[line["run"]] = curve = Curve()
            if line["run"] != "teacher":
                result.students[line["method"]].append(curve)
        curves[line["run"]].points.append(line)
    if "teacher" in curves:
        result.teacher = (curves["teacher"].chosen["accuracy"],)
    return result, config


def searched(name: str) -> dict[str, str]:
    """Return the tables of a search by the names of their presets."""
    found = {}
    for preset, points in json.loads((FOLDER / f"{name}.json").read_text()).items():
        rows = []
        for point in points:
            cells = {n: f"{x:g}" for n, x in point.items() if n in ("lr", "beta")}
            cells |= {"mean": f"{statistics.mean(point['accuracy']):.2f}"}
            cells |= {"by seed": ", ".join(f"{x:.2f}" for x in point["accuracy"])}
            rows.append({"": TITLES[point["method"]], **cells})
        found[f"{name} {preset}"] = table(["lr", "beta", "mean", "by seed"], rows)
    return found


def tables() -> dict[str, str]:
    """Return every table of the page by its name."""
    found = {}
    for file in sorted(FOLDER.glob("*.jsonl")):
        found[file.stem] = table_of(*run_of(file.stem))
    for file in sorted(FOLDER.glob("*-search.json")):
        found |= searched(file.stem)
    return found


def page() -> str:
    """Return the page with its tables."""
    text = PAGE.read_text()
    for name, content in tables().items():
        block = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.S)
        text, count = block.subn(lambda m, c=content: f"{m[1]}{c}\n{m[2]}", text)
        if count != 1:
            raise SystemExit(f"{PAGE}: has {count} blocks <!-- {name} -->, should have one")
    return text


def main() -> None:
    """Run the program."""
    if len(sys.argv) > 1:
        add(Path(sys.argv[1]), sys.argv[2])
    PAGE.write_text(page())
    for file in sorted(FOLDER.glob("*.jsonl")):
        draw_curves(*run_of(file.stem), FOLDER / f"{file.stem}.png")


if __name__ == "__main__":
    main()
