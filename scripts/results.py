"""Write the tables and figures of docs/results.md and README.md from the records in docs/results.

    python scripts/results.py [RUN NAME]

With RUN, the folder of a run, copies its records first: metrics.jsonl and config.toml as NAME.jsonl
and NAME.toml, and attention.png if a page shows NAME-attention.png. With the folder of a search,
adds the points of its search.json to NAME-search.json. scripts/beta_study.py writes beta/TASK.json.
In the pages, a table stands between <!-- NAME --> and <!-- end -->.
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
from at_fused.train.report import draw_curves, paired_difference, results_table, table

Array = NDArray[np.float64]

FOLDER = Path(__file__).parents[1] / "docs" / "results"
PAGES = (FOLDER.with_suffix(".md"), FOLDER.parents[1] / "README.md")

# Fields of metrics.jsonl that are copied.
FIELDS = (
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


def is_shown(picture: str) -> bool:
    """Return whether a page shows a picture."""
    return any(f"results/{picture})" in page.read_text() for page in PAGES)


def add_records(run: Path, name: str) -> None:
    """Copy the records of a run or a search; SystemExit if unfinished, or if no page has NAME."""
    is_search = (run / "search.json").exists()
    block = f"<!-- {name}{'-search' * is_search} -->"
    if not any(block in page.read_text() for page in PAGES):
        raise SystemExit(f"NAME: got {name!r}, but no page has a block {block}")
    if is_search:
        file, by_settings = FOLDER / f"{name}-search.json", {}
        for source in filter(Path.exists, (file, run / "search.json")):
            for point in json.loads(source.read_text()):
                point["accuracy"] = [round(x, 2) for x in point["accuracy"]]
                by_settings[json.dumps({**point, "accuracy": 0})] = point
        points = sorted(by_settings.values(), key=lambda p: [*TITLES].index(p["method"]))
        file.write_text(json.dumps(points, indent=1) + "\n")
        return
    options, metrics, copies = run / "config.toml", run / "metrics.jsonl", {}
    copies[options] = f"{name}.toml"
    if is_shown(f"{name}-attention.png"):
        copies[run / "attention.png"] = f"{name}-attention.png"
    if missing := [file.name for file in (metrics, *copies) if not file.is_file()]:
        raise SystemExit(f"RUN: got {run}, which has no {', '.join(missing)}")
    read_run(options, metrics)  # raises if the run is not finished
    for file, copy in copies.items():
        shutil.copy(file, FOLDER / copy)
    lines = []
    for line in map(json.loads, metrics.read_text().splitlines()):
        values = {n: line[n] for n in FIELDS if n in line}
        short = {n: float(f"{x:.5g}") if isinstance(x, float) else x for n, x in values.items()}
        lines.append(json.dumps(short) + "\n")
    (FOLDER / f"{name}.jsonl").write_text("".join(lines))


def read_run(options: Path, metrics: Path) -> tuple[Result, Config]:
    """Return the results and configuration in a run's files; SystemExit if it is unfinished."""
    config = resolve(from_toml(options.read_text()))
    curves: dict[str, Curve] = {}
    for line in map(json.loads, metrics.read_text().splitlines()):
        curves.setdefault(line["run"], Curve()).points.append(line)
    # In the order of the seeds, by which differences are paired.
    names = {m: [f"{m}-seed{seed}" for seed in range(config.seeds)] for m in config.compare}
    for name in (name for of_method in names.values() for name in of_method):
        if name not in curves or curves[name].points[-1]["epoch"] < config.epochs:
            raise SystemExit(f"{metrics}: {name} is not finished; continue it with --resume")
    result = Result(None, {method: [curves[n] for n in names[method]] for method in names})
    if "teacher" in curves:
        result.teacher = (curves["teacher"].selected["accuracy"],)
    return result, config


def read_record(name: str) -> tuple[Result, Config]:
    """Return the results and configuration of a run in docs/results."""
    return read_run(FOLDER / f"{name}.toml", FOLDER / f"{name}.jsonl")


class Task:
    """The students of a task of scripts/beta_study.py, by setting and seed.

    Attributes:
        base: the setting without attention transfer.
        grid: the settings with a fixed beta, by beta.
        ratios: the settings with beta="auto", by ratio.
        best: the beta of the grid with the best mean accuracy on validation images.
    """

    def __init__(self, file: Path) -> None:
        self.name, self.students = file.stem, dict[str, list[dict[str, Any]]]()
        for name, student in json.loads(file.read_text()).items():
            self.students.setdefault(name.rpartition("-seed")[0], []).append(student)
        for students in self.students.values():  # differences are paired by seed
            students.sort(key=lambda student: student["seed"])
        self.base = next(iter(self.students))
        fixed = [name for name in self.students if "-beta" in name]
        self.grid = {self.students[name][0]["beta"]: name for name in fixed}
        self.best = max(self.grid, key=lambda b: self.values(self.grid[b], "validation").mean())
        self.ratios = {
            float(name.rpartition("ratio")[2]): name for name in self.students if "-ratio" in name
        }

    def values(self, setting: str, field: str) -> Array:
        """Return (seeds,) a field of a setting's students."""
        return np.array([student[field] for student in self.students[setting]])

    def difference_to_best(self, setting: str, field: str = "accuracy") -> tuple[float, float]:
        """Return the difference to the best beta and half its 95 % interval."""
        best = self.values(self.grid[self.best], field)
        return paired_difference(self.values(setting, field), best)

    def mean_ratio(self, beta: float, first: int, end: int) -> float:
        """Return the geometric mean of the ratio at a beta of the grid, in steps first to end-1."""
        logs = [
            math.log(ratio * beta)
            for student in self.students[self.grid[beta]]
            for step, ratio in student["ratios"]
            if first <= step < end
        ]
        return math.exp(statistics.mean(logs))


def study_tables(tasks: list[Task]) -> dict[str, str]:
    """Return the tables of the study of beta, by name."""
    autos, grids, ratios = [], [], []
    for task in tasks:
        title, best = {"": task.name}, {"best beta": f"{task.best:g}"}
        cells = {"without AT": f"{task.values(task.base, 'accuracy').mean():.2f}"}
        cells["at best beta"] = f"{task.values(task.grid[task.best], 'accuracy').mean():.2f}"
        differences = {
            ratio: "{:+.2f} +- {:.2f}".format(*task.difference_to_best(setting))
            for ratio, setting in task.ratios.items()
        }
        cells |= {f"ratio {ratio:g}": text for ratio, text in differences.items()}
        others = [other for other in tasks if other is not task]
        chosen = max(
            task.ratios,
            key=lambda r: sum(t.difference_to_best(t.ratios[r], "validation")[0] for t in others),
        )
        cells["leave-one-out"] = f"{chosen:g}: {differences[chosen]}"
        betas = task.values(task.ratios[AUTO_RATIO], "beta")
        cells[f"beta at ratio {AUTO_RATIO:g}"] = f"{betas.min():.3g} to {betas.max():.3g}"
        autos.append(title | best | cells)
        costs = {b: f"{task.difference_to_best(s)[0]:+.2f}" for b, s in task.grid.items()}
        costs[task.best] = "best"
        grids.append(title | {f"{beta:g}": cost for beta, cost in costs.items()})
        spans = {"before step 1": (0, 1), "steps 1 to 10": (0, 10), "from step 50": (50, 10**6)}
        means = {name: f"{task.mean_ratio(task.best, *span):.2g}" for name, span in spans.items()}
        ratios.append(title | best | means)
    return {
        "beta-auto": table([*autos[0]][1:], autos),
        "beta-grid": table([f"{10.0**k:g}" for k in range(-2, 5)], grids),
        "beta-ratio": table([*ratios[0]][1:], ratios),
    }


def draw_study(tasks: list[Task], path: Path) -> None:
    """Draw the accuracy at each beta of the grid by its gradient ratio in the first ten steps."""
    fig = Figure(figsize=(9, 5), layout="constrained")
    ax = fig.subplots()
    for task in tasks:
        x = [task.mean_ratio(beta, 0, 10) for beta in task.grid]
        y = [task.difference_to_best(setting)[0] for setting in task.grid.values()]
        ax.plot(x, y, marker="o", label=task.name)
    ax.axvline(AUTO_RATIO, color="black", ls=":", label=f'beta="auto": {AUTO_RATIO:g}')
    ax.set(xscale="log", ylim=(-12, 1), ylabel="test accuracy minus that at the best beta, points")
    ax.set(xlabel="gradient of AT / gradient of the rest of the loss, first ten steps")
    ax.grid(color="0.93")
    ax.legend(frameon=False)
    fig.savefig(path, dpi=110)


def tables() -> dict[str, str]:
    """Return every table by its name."""
    result = study_tables(load_tasks())
    for file in sorted(FOLDER.glob("*.jsonl")):
        result[file.stem] = results_table(*read_record(file.stem))
    for file in sorted(FOLDER.glob("*-search.json")):
        result[file.stem] = table_of_points(json.loads(file.read_text()))
    return result


def load_tasks() -> list[Task]:
    """Return the tasks of the study of beta."""
    return [Task(file) for file in sorted((FOLDER / "beta").glob("*.json"))]


def updated_pages() -> dict[Path, str]:
    """Return the pages with the current tables; SystemExit if no page has a block for one."""
    texts, missing = {page: page.read_text() for page in PAGES}, []
    for name, content in tables().items():
        block = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.S)
        replaced = {page: block.subn(rf"\g<1>{content}\n\2", text) for page, text in texts.items()}
        texts = {page: text for page, (text, _) in replaced.items()}
        if not any(count for _, count in replaced.values()):
            missing.append(name)
    if missing:
        raise SystemExit(f"no page has a block <!-- NAME --> for {', '.join(missing)}")
    return texts


def main() -> None:
    """Run the program."""
    if len(sys.argv) not in (1, 3):
        raise SystemExit(__doc__)
    if len(sys.argv) == 3:
        add_records(Path(sys.argv[1]), sys.argv[2])
    for page, text in updated_pages().items():
        page.write_text(text)
    for name in (file.stem for file in sorted(FOLDER.glob("*.jsonl"))):
        if is_shown(f"{name}.png"):
            draw_curves(*read_record(name), FOLDER / f"{name}.png")
    draw_study(load_tasks(), FOLDER / "beta.png")


if __name__ == "__main__":
    main()
