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
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from at_fused.train.cli import build_parser, configure, file_of
from at_fused.train.config import METHODS, TITLES, Config, ConfigError, method_rule, read_file
from at_fused.train.experiment import Experiment
from at_fused.train.loop import Callbacks, Job, Point
from at_fused.train.report import table

SEED = 100
Settings = tuple[str, dict[str, Any]]  # of a method


def settings_of(grid: str) -> list[Settings]:
    """METHOD:OPTION=X,Y:OPTION=Z, as its points."""
    method, *options = grid.split(":")
    if method not in METHODS or not all(option.partition("=")[2] for option in options):
        raise ConfigError(f"--grid: got {grid!r}, allowed is {settings_of.__doc__}")
    named = [option.split("=") for option in options]
    values = [[method_rule(method, n).read(x) for x in given.split(",")] for n, given in named]
    return [(method, dict(zip(dict(named), each, strict=True))) for each in product(*values)]


def written(value: Any) -> str:
    """Return a setting as it is given."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def name_of(settings: Settings) -> str:
    """Return the name of a point."""
    method, options = settings
    return "-".join([method, *(f"{name}{written(value)}" for name, value in options.items())])


def table_of_points(points: list[dict[str, Any]]) -> str:
    """Return the table of a search: each point's settings, mean and accuracies by seed."""
    rows = []
    for point in points:
        cells = {n: written(x) for n, x in point.items() if n not in ("method", "accuracy")}
        cells |= {"mean": f"{statistics.mean(point['accuracy']):.2f}"}
        cells |= {"by seed": ", ".join(f"{x:.2f}" for x in point["accuracy"])}
        rows.append({"": TITLES[point["method"]], **cells})
    settings = dict.fromkeys(name for row in rows for name in [*row][1:-2])
    return table([*settings, "mean", "by seed"], rows)


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
        self.points, self.seeds, self.done = points, seeds, done
        super().__init__(config, **options)

    def jobs(self) -> Iterator[Job]:
        """Yield the trainings."""
        yield from (job for job in super().jobs() if job.is_teacher)
        for seed in self.seeds:
            for name, (method, options) in self.points.items():
                own = replace(self.config.for_method(method), **options)
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
    if wrong := {"compare", "evaluate", "eval"} & flags.keys():
        parser.error(f"--{min(wrong)}: a search has none")
    try:
        points = {name_of(each): each for grid in flags.pop("grid") for each in settings_of(grid)}
        flags |= {"compare": (*dict.fromkeys(method for method, _ in points.values()),)}
        flags["evaluate"] = "val"
        file = file_of(flags)
        config, out = configure(flags, file and read_file(file))
    except ConfigError as error:
        parser.error(str(error))
    record, seeds = Record(), range(SEED, SEED + config.seeds)
    with record.signals:
        search = Points(
            config, points, seeds, out=out, fresh="resume" not in flags, callbacks=record
        )
        search.run()
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
