"""Write the tables and figures of docs/results.md and README.md from the records in docs/results.

    python scripts/results.py [RUN NAME]

With a run's folder its records are added first, by a name. NAME.jsonl and NAME.toml are of its
metrics.jsonl and config.toml, NAME-attention.png its picture. NAME-search.json is the search.json
of scripts/search_settings.py, whose folder may be RUN too, and adds to it; beta/TASK.json are of
scripts/beta_study.py. A table stands between <!-- NAME --> and <!-- end -->.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from search_settings import table_of_points

from at_fused.balance import AUTO_RATIO
from at_fused.train.config import TITLES, Config, from_toml, resolve
from at_fused.train.experiment import Result
from at_fused.train.loop import Curve
from at_fused.train.report import draw_curves, paired_difference, table, table_of

Array = NDArray[np.float64]

FOLDER = Path(__file__).parents[1] / "docs" / "results"
PAGES = (FOLDER.with_suffix(".md"), FOLDER.parents[1] / "README.md")

# Fields of metrics.jsonl that a record has.
KEPT = (
    "run",
    "method",
    "seed",
    "step",
    "epoch",
    "ce",
    "accuracy",
    "gradient_ratio",
    "ms",
    "validation",
)


def shown(picture: str) -> bool:
    """Return whether a page has a picture."""
    return any(f"results/{picture})" in page.read_text() for page in PAGES)


def add(run: Path, name: str) -> None:
    """Add the records of a run, or of a search. SystemExit where it is not finished, or unknown."""
    search = (run / "search.json").exists()
    block = f"<!-- {name}{'-search' * search} -->"
    if not any(block in page.read_text() for page in PAGES):
        raise SystemExit(f"NAME: got {name!r}, but no page has a block {block}")
    if search:
        file, found = FOLDER / f"{name}-search.json", {}
        for each in filter(Path.exists, (file, run / "search.json")):
            for point in json.loads(each.read_text()):
                point["accuracy"] = [round(x, 2) for x in point["accuracy"]]
                found[json.dumps({**point, "accuracy": 0})] = point
        points = sorted(found.values(), key=lambda p: [*TITLES].index(p["method"]))
        file.write_text(json.dumps(points, indent=1) + "\n")
        return
    options, metrics, copies = run / "config.toml", run / "metrics.jsonl", {}
    copies[options] = f"{name}.toml"
    if shown(f"{name}-attention.png"):
        copies[run / "attention.png"] = f"{name}-attention.png"
    if missing := [file.name for file in (metrics, *copies) if not file.is_file()]:
        raise SystemExit(f"RUN: got {run}, which has no {', '.join(missing)}")
    read(options, metrics)  # raises for a run that is not finished
    for file, copy in copies.items():
        shutil.copy(file, FOLDER / copy)
    lines = []
    for line in map(json.loads, metrics.read_text().splitlines()):
        kept = {n: line[n] for n in KEPT if n in line}
        short = {n: float(f"{x:.5g}") if isinstance(x, float) else x for n, x in kept.items()}
        lines.append(json.dumps(short) + "\n")
    (FOLDER / f"{name}.jsonl").write_text("".join(lines))


def read(options: Path, metrics: Path) -> tuple[Result, Config]:
    """Return the results and the configuration of a run's files; SystemExit if it is unfinished."""
    config = resolve(from_toml(options.read_text()))
    curves: dict[str, Curve] = {}
    for line in map(json.loads, metrics.read_text().splitlines()):
        curves.setdefault(line["run"], Curve()).points.append(line)
    # Differences are paired by seed.
    names = {m: [f"{m}-seed{seed}" for seed in range(config.seeds)] for m in config.compare}
    for name in (each for of_method in names.values() for each in of_method):
        if name not in curves or curves[name].points[-1]["epoch"] < config.epochs:
            raise SystemExit(f"{metrics}: {name} is not finished; at-fused-train --resume goes on")
    result = Result(None, {method: [curves[n] for n in names[method]] for method in names})
    if "teacher" in curves:
        result.teacher = (curves["teacher"].chosen["accuracy"],)
    return result, config


def run_of(name: str) -> tuple[Result, Config]:
    """Return the results and the configuration of a run's records."""
    return read(FOLDER / f"{name}.toml", FOLDER / f"{name}.jsonl")


class Task:
    """The students of a task of scripts/beta_study.py, by point and seed.

    Attributes:
        base: the point without attention transfer.
        best: the beta of the grid with the best mean on validation images.
        ratios: of beta="auto".
    """

    def __init__(self, file: Path) -> None:
        self.name, self.points = file.stem, dict[str, list[dict[str, Any]]]()
        for name, student in json.loads(file.read_text()).items():
            self.points.setdefault(name.rpartition("-seed")[0], []).append(student)
        for students in self.points.values():  # differences are paired by seed
            students.sort(key=lambda student: student["seed"])
        self.base = next(iter(self.points))
        grid = [name for name in self.points if "-beta" in name]
        self.grid = {self.points[name][0]["beta"]: name for name in grid}
        self.best = max(self.grid, key=lambda beta: self.of(self.grid[beta], "validation").mean())
        self.ratios = {
            float(name.rpartition("ratio")[2]): name for name in self.points if "-ratio" in name
        }

    def of(self, point: str, value: str) -> Array:
        """Return (seeds,) a value of a point's students."""
        return np.array([student[value] for student in self.points[point]])

    def to_best(self, point: str, value: str = "accuracy") -> tuple[float, float]:
        """Return the difference to the best beta and half its interval."""
        return paired_difference(self.of(point, value), self.of(self.grid[self.best], value))

    def ratio(self, beta: float, first: int, last: int) -> float:
        """Return the geometric mean of the ratio at a beta of the grid, from a step to another."""
        found = [
            math.log(ratio * beta)
            for student in self.points[self.grid[beta]]
            for step, ratio in student["ratios"]
            if first <= step < last
        ]
        return math.exp(statistics.mean(found))


def studied(tasks: list[Task]) -> dict[str, str]:
    """Return the tables of the study of beta."""
    autos, grids, measured = [], [], []
    for task in tasks:
        title, best = {"": task.name}, {"best beta": f"{task.best:g}"}
        cells = {"without": f"{task.of(task.base, 'accuracy').mean():.2f}"}
        cells["best"] = f"{task.of(task.grid[task.best], 'accuracy').mean():.2f}"
        to_best = {
            r: "{:+.2f} +- {:.2f}".format(*task.to_best(task.ratios[r])) for r in task.ratios
        }
        cells |= {f"ratio {ratio:g}": words for ratio, words in to_best.items()}
        # The ratio that comes closest to the best betas of the other tasks, on validation images.
        others = [other for other in tasks if other is not task]
        chosen = max(
            task.ratios,
            key=lambda r: sum(other.to_best(other.ratios[r], "validation")[0] for other in others),
        )
        cells["by the others"] = f"{chosen:g}: {to_best[chosen]}"
        betas = task.of(task.ratios[AUTO_RATIO], "beta")
        cells["betas of 3"] = f"{betas.min():.3g} to {betas.max():.3g}"
        autos.append(title | best | cells)
        costs = {f"{b:g}": f"{task.to_best(point)[0]:+.2f}" for b, point in task.grid.items()}
        grids.append(
            title | {name: cost for name, cost in costs.items() if name != f"{task.best:g}"}
        )
        grids[-1][f"{task.best:g}"] = "best"
        spans = {"before step 1": (0, 1), "steps 1 to 10": (0, 10), "from step 50": (50, 10**6)}
        means = {name: f"{task.ratio(task.best, *span):.2g}" for name, span in spans.items()}
        measured.append(title | best | means)
    return {
        "beta-auto": table([*autos[0]][1:], autos),
        "beta-grid": table([f"{10.0**k:g}" for k in range(-2, 5)], grids),
        "beta-ratio": table([*measured[0]][1:], measured),
    }


def draw_study(tasks: list[Task], path: Path) -> None:
    """Draw what a beta of the grid costs, by the ratio that it has in the first ten steps."""
    fig = Figure(figsize=(9, 5), layout="constrained")
    ax = fig.subplots()
    for task in tasks:
        x = [task.ratio(beta, 0, 10) for beta in task.grid]
        ax.plot(x, [task.to_best(p)[0] for p in task.grid.values()], marker="o", label=task.name)
    ax.axvline(AUTO_RATIO, color="black", ls=":", label=f'beta="auto": {AUTO_RATIO:g}')
    ax.set(xscale="log", ylim=(-12, 1), ylabel="test accuracy below that of the best beta, points")
    ax.set(xlabel="gradient of attention transfer / gradient of the rest, first ten steps")
    ax.grid(color="0.93")
    ax.legend(frameon=False)
    fig.savefig(path, dpi=110)


def tables() -> dict[str, str]:
    """Return every table of the page by its name."""
    found = studied(tasks())
    for file in sorted(FOLDER.glob("*.jsonl")):
        found[file.stem] = table_of(*run_of(file.stem))
    for file in sorted(FOLDER.glob("*-search.json")):
        found[file.stem] = table_of_points(json.loads(file.read_text()))
    return found


def tasks() -> list[Task]:
    """Return the tasks of the study of beta."""
    return [Task(file) for file in sorted((FOLDER / "beta").glob("*.json"))]


def pages() -> dict[Path, str]:
    """Return the pages with their tables."""
    texts, missing = {page: page.read_text() for page in PAGES}, []
    for name, content in tables().items():
        block = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.S)
        found = {page: block.subn(rf"\g<1>{content}\n\2", text) for page, text in texts.items()}
        texts = {page: text for page, (text, _) in found.items()}
        if not any(count for _, count in found.values()):
            missing.append(name)
    if missing:
        raise SystemExit(f"no page has a block <!-- NAME --> for {', '.join(missing)}")
    return texts


def main() -> None:
    """Run the program."""
    if len(sys.argv) not in (1, 3):
        raise SystemExit(__doc__)
    if len(sys.argv) == 3:
        add(Path(sys.argv[1]), sys.argv[2])
    for page, text in pages().items():
        page.write_text(text)
    for name in (file.stem for file in sorted(FOLDER.glob("*.jsonl"))):
        if shown(f"{name}.png"):
            draw_curves(*run_of(name), FOLDER / f"{name}.png")
    draw_study(tasks(), FOLDER / "beta.png")


if __name__ == "__main__":
    main()
