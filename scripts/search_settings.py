"""Train students at every point of one or more grids of settings, and report validation accuracy.

    python scripts/search_settings.py --preset fashion-mnist --grid at:lr=0.1:beta=100,1000,10000

Runs with --evaluate val, so test images are never read. Takes the options of at-fused-train for a
run, except --compare; --resume continues a search. The seeds are 100, 101, ..., so students have
other initial weights and, with --labels, other images than a run of the preset. Writes search.json
and search.md to the run's folder.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from at_fused.train.cli import build_parser, config_file, configure
from at_fused.train.config import (
    METHODS,
    TITLES,
    Config,
    ConfigError,
    error_prefix,
    format_value,
    method_rule,
    read_file,
    resolve,
)
from at_fused.train.experiment import Experiment
from at_fused.train.loop import Callbacks, Job, Point
from at_fused.train.report import table

SEED = 100
Settings = tuple[str, dict[str, Any]]  # method, options


GRID_SYNTAX = "METHOD:OPTION=X,Y:OPTION=Z"


def parse_grid(grid: str) -> list[Settings]:
    """Return the points of a grid."""
    method, *options = grid.split(":")
    named = dict(option.split("=", 1) for option in options if "=" in option)
    if method not in METHODS or len(named) < len(options) or not all(named.values()):
        raise ConfigError(f"--grid: got {grid!r}, expected {GRID_SYNTAX}")
    values = []
    for name, words in named.items():
        with error_prefix(f"--grid: {method}:{name}"):
            rule = method_rule(method, name)
            values.append([rule.parse(x) for x in words.split(",")])
    return [(method, dict(zip(named, point, strict=True))) for point in product(*values)]


def name_of(settings: Settings) -> str:
    """Return the name of a point, such as at-lr0.1-beta100."""
    method, options = settings
    return "-".join([method, *(f"{name}{format_value(value)}" for name, value in options.items())])


def table_of_points(points: list[dict[str, Any]]) -> str:
    """Return a table of each point's settings, mean accuracy and accuracies by seed."""
    rows = []
    for point in points:
        cells = {n: format_value(x) for n, x in point.items() if n not in ("method", "accuracy")}
        cells |= {"mean": f"{statistics.mean(point['accuracy']):.2f}"}
        cells |= {"by seed": ", ".join(f"{x:.2f}" for x in point["accuracy"])}
        rows.append({"": TITLES[point["method"]], **cells})
    settings = dict.fromkeys(name for row in rows for name in [*row][1:-2])
    return table([*settings, "mean", "by seed"], rows)


def config_of(settings: Settings, config: Config) -> tuple[str, Config]:
    """Return a point's method and configuration; ConfigError if a run would not accept them."""
    method, options = settings
    with error_prefix(name_of(settings)):
        resolved = resolve(config.overrides, {"compare": (method,), "method": {method: options}})
    return method, resolved.for_method(method)


class Points(Experiment):
    """An experiment that trains a student for each seed and point.

    Args:
        points: settings by name.
        seeds: seeds of the students.
        done: names of students to skip, such as at-beta10-seed3.
    """

    def __init__(
        self,
        config: Config,
        points: Mapping[str, Settings],
        seeds: Iterable[int],
        done: Collection[str] = (),
        **options: Any,
    ) -> None:
        self.seeds, self.done = seeds, done
        self.points = {name: config_of(point, config) for name, point in points.items()}
        super().__init__(config, **options)

    def jobs(self) -> Iterator[Job]:
        """Yield the teacher's training, then the students'."""
        yield from (job for job in super().jobs() if job.is_teacher)
        for seed in self.seeds:
            for name, (method, config) in self.points.items():
                if f"{name}-seed{seed}" not in self.done:
                    yield self._make_job(f"{name}-seed{seed}", method, seed, config)


class Printer(Callbacks):
    """Prints the last evaluation of each network."""

    def on_evaluation(self, job: Job, point: Point) -> None:
        """Print a network's last evaluation."""
        if point["step"] == job.plan.steps:
            print(f"{job.name}: {point['accuracy']:.2f} %, {point['ms']:.0f} ms/step", flush=True)


def main() -> None:
    """Run the program."""
    parser = build_parser()
    parser.add_argument("--grid", action="append", required=True, help=GRID_SYNTAX)
    flags = vars(parser.parse_args())
    if wrong := {"compare", "evaluate", "eval", "betas"} & flags.keys():
        parser.error(f"--{min(wrong)}: not an option of a search")
    try:
        points = {name_of(point): point for grid in flags.pop("grid") for point in parse_grid(grid)}
        flags |= {"compare": (*dict.fromkeys(method for method, _ in points.values()),)}
        flags["evaluate"] = "val"
        file = config_file(flags)
        config, out = configure(flags, file and read_file(file))
        if config.validation:  # it would choose an epoch, but a search reports the last one
            raise ConfigError("--validation: not an option of a search")
        printer, seeds = Printer(), range(SEED, SEED + config.seeds)
        search = Points(
            config, points, seeds, out=out, fresh="resume" not in flags, callbacks=printer
        )
        with printer.signals:
            search.run()
    except ConfigError as error:
        parser.error(str(error))
    lines = (search.out / "metrics.jsonl").read_text().splitlines()
    last = {line["run"]: line for line in map(json.loads, lines)}
    results = [
        {"method": method, **options}
        | {"accuracy": [last[f"{name}-seed{seed}"]["accuracy"] for seed in seeds]}
        for name, (method, options) in points.items()
    ]
    text = table_of_points(results)
    Path(search.out, "search.md").write_text(f"`{' '.join(sys.argv)}`\n\n{text}\n")
    Path(search.out, "search.json").write_text(json.dumps(results, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
