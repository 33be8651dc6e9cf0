"""Train students at every point of grids of settings, and report them on validation images.

    python scripts/search_settings.py --preset fashion-mnist --grid at:lr=0.1:beta=100,1000,10000

Test images are not looked at: the run has --evaluate val. Takes the options of at-fused-train that
a run has, but for --compare; --resume goes on. The students' seeds are 100, 101, ...: other first
weights and, with --labels, other images than a run of the preset has. Leaves search.json and
search.md in the run's folder.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from at_fused.train.cli import build_parser, configure, file_of
from at_fused.train.config import (
    METHODS,
    TITLES,
    Config,
    ConfigError,
    method_rule,
    naming,
    read_file,
    resolve,
    word_of,
)
from at_fused.train.experiment import Experiment
from at_fused.train.loop import Callbacks, Job, Point
from at_fused.train.report import table

SEED = 100
Settings = tuple[str, dict[str, Any]]  # of a method


def settings_of(grid: str) -> list[Settings]:
    """METHOD:OPTION=X,Y:OPTION=Z, as its points."""
    method, *options = grid.split(":")
    named = dict(option.split("=", 1) for option in options if "=" in option)
    if method not in METHODS or len(named) < len(options) or not all(named.values()):
        raise ConfigError(f"--grid: got {grid!r}, allowed is {settings_of.__doc__}")
    values = []
    for name, given in named.items():
        with naming(f"--grid: {method}:{name}"):
            rule = method_rule(method, name)
            values.append([rule.read(x) for x in given.split(",")])
    return [(method, dict(zip(named, each, strict=True))) for each in product(*values)]


def name_of(settings: Settings) -> str:
    """Return the name of a point."""
    method, options = settings
    return "-".join([method, *(f"{name}{word_of(value)}" for name, value in options.items())])


def table_of_points(points: list[dict[str, Any]]) -> str:
    """Return the table of a search: each point's settings, mean and accuracies by seed."""
    rows = []
    for point in points:
        cells = {n: word_of(x) for n, x in point.items() if n not in ("method", "accuracy")}
        cells |= {"mean": f"{statistics.mean(point['accuracy']):.2f}"}
        cells |= {"by seed": ", ".join(f"{x:.2f}" for x in point["accuracy"])}
        rows.append({"": TITLES[point["method"]], **cells})
    settings = dict.fromkeys(name for row in rows for name in [*row][1:-2])
    return table([*settings, "mean", "by seed"], rows)


def of_point(config: Config, point: Settings) -> tuple[str, Config]:
    """Return a point's method and configuration; ConfigError where a run would not take it."""
    method, options = point
    with naming(name_of(point)):
        own = resolve(config.given, {"compare": (method,), "method": {method: options}})
    return method, own.for_method(method)


class Points(Experiment):
    """An experiment whose students are those of named points, seed by seed.

    Args:
        points: settings by name.
        seeds: of the students.
        done: names of students that need no training any more, such as at-beta10-seed3.
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
        self.points = {name: of_point(config, point) for name, point in points.items()}
        super().__init__(config, **options)

    def jobs(self) -> Iterator[Job]:
        """Yield the trainings."""
        yield from (job for job in super().jobs() if job.is_teacher)
        for seed in self.seeds:
            for name, (method, own) in self.points.items():
                if f"{name}-seed{seed}" not in self.done:
                    yield self._job(f"{name}-seed{seed}", method, seed, own)


class Record(Callbacks):
    """Keeps the last evaluation of each network."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Point] = {}

    def point(self, job: Job, point: Point) -> None:
        """Keep and print it."""
        self.found[job.name] = point
        if point["step"] == job.plan.steps:
            print(f"{job.name}: {point['accuracy']:.2f} %, {point['ms']:.0f} ms/step", flush=True)


def main() -> None:
    """Run the program."""
    parser = build_parser()
    parser.add_argument("--grid", action="append", required=True, help=settings_of.__doc__)
    flags = vars(parser.parse_args())
    if wrong := {"compare", "evaluate", "eval", "betas"} & flags.keys():
        parser.error(f"--{min(wrong)}: a search has none")
    try:
        points = {name_of(each): each for grid in flags.pop("grid") for each in settings_of(grid)}
        flags |= {"compare": (*dict.fromkeys(method for method, _ in points.values()),)}
        flags["evaluate"] = "val"
        file = file_of(flags)
        config, out = configure(flags, file and read_file(file))
        if config.validation:  # it would choose among the evaluations, of which the last counts
            raise ConfigError("--validation: a search has none")
        record, seeds = Record(), range(SEED, SEED + config.seeds)
        search = Points(
            config, points, seeds, out=out, fresh="resume" not in flags, callbacks=record
        )
        with record.signals:
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
