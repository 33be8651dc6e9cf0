"""A run from its configuration to its report, in this process."""

from __future__ import annotations

import os
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from tqdm import tqdm

from at_fused.teacher_cache import StaleCacheError
from at_fused.train import checkpoints, parallel
from at_fused.train.cli import PROGRAM
from at_fused.train.config import SOFT, TRANSFER, Config, resolve
from at_fused.train.experiment import Experiment, Result, Show, prepare, read_data
from at_fused.train.loop import TOP5_FROM, Job, NotFiniteError, Point, accuracy
from at_fused.train.report import heading, text, write_report
from at_fused.train.rules import ConfigError, is_import
from at_fused.train.saved import data_options, open_network, same_images
from at_fused.train.stop import Signals, Stopped

# Errors that a user can do something about are one line. The rest are defects, and show where.
EXPECTED = (
    ConfigError,
    checkpoints.CheckpointError,
    NotFiniteError,
    StaleCacheError,
    OSError,
    ImportError,
)


def say(text: str) -> None:
    """A line for the terminal, with who says it where there are several processes."""
    place = parallel.place()
    who = PROGRAM if place.size == 1 else f"{PROGRAM}: process {place.rank} of {place.size}"
    print(f"\n{who}: {text}", file=sys.stderr)


class Terminal(Show):
    """Lines of a run as it goes, and where there is a terminal a bar."""

    def __init__(self) -> None:
        self.first = parallel.place().rank == 0
        self.bar: Any = None
        self.begun = time.perf_counter()
        self.steps = self.left = 0

    def line(self, text: str, file: Any = None) -> None:
        """Prints a line at once, above the bar."""
        if self.first and self.bar:
            self.bar.write(text, file=file)
        elif self.first:
            print(text, file=file, flush=True)

    def log(self, text: str) -> None:
        """Says what went wrong, or was decided."""
        self.line(f"{PROGRAM}: {text}", sys.stderr)

    def begin(self, experiment: Experiment) -> None:
        """Says what is trained, and with which options."""
        self.left = experiment.total_steps()
        self.line("\n".join(heading(experiment)))
        self.begun = time.perf_counter()
        # A bar needs a terminal with a width.
        if self.first and sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns:
            self.bar = tqdm(total=self.left, unit="step", dynamic_ncols=True)

    def close(self) -> None:
        """Ends the bar."""
        if self.bar:
            self.bar.close()
            self.bar = None

    def job(self, job: Job) -> None:
        """Names the network on the bar."""
        if self.bar:
            self.bar.set_description(job.name)

    def tick(self) -> None:
        """Counts a step."""
        self.steps += 1
        if self.bar:
            self.bar.update()

    def known(self, steps: int) -> None:
        """Counts what was done before."""
        self.left -= steps
        if self.bar:
            self.bar.update(steps)

    def point(self, job: Job, point: Point) -> None:
        """Prints an evaluation, or shows it on the bar."""
        if self.bar:
            self.bar.set_postfix_str(f"loss {point['loss']:.4g}, {point['accuracy']:.2f} %")
            return
        parts = [f"cross-entropy {point['ce']:.4g}"]
        parts += [f"KD {point['kd']:.4g}"] * (job.method in SOFT)
        parts += [f"transfer {point['transfer']:.4g}"] * (job.method in TRANSFER)
        found = f"loss {point['loss']:.4g} ({', '.join(parts)}), accuracy {point['accuracy']:.2f} %"
        if "validation" in point:
            found += f", on the validation share {point['validation']:.2f} %"
        spent = time.perf_counter() - self.begun
        seconds = spent / max(1, self.steps) * (self.left - self.steps)
        self.line(
            f"{job.name}: epoch {point['epoch']:.0f} of {job.config.epochs}, {found}, "
            f"{point['ms']:.3g} ms a step, {duration(seconds)} left"
        )


def duration(seconds: float) -> str:
    """A time in words: "40 s", "12 min", "3.5 h", "2.1 days"."""
    for size, unit in ((86400, "days"), (3600, "h")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def run(config: Config, out: Path | None, resume: bool = False) -> int:
    """Trains, reports, and returns the exit status."""
    start = time.perf_counter()
    terminal = Terminal()
    experiment: Experiment | None = None

    def report(result: Result) -> None:
        assert experiment
        if not parallel.first():
            return
        terminal.close()
        # First of all the table, for which no file is needed.
        print(f"\n{text(result, config)}")
        write_report(result, experiment)
        seconds = time.perf_counter() - start
        print(f"\n{seconds:.0f} s in all; everything is in {experiment.out}", flush=True)

    try:
        with closing(terminal), Signals() as signals:
            experiment = Experiment(
                config, out, fresh=not resume, show=terminal, log=terminal.log, signals=signals
            )
            experiment.run(report)
    except Stopped as stopped:
        if parallel.place().rank == 0 and experiment:
            say(f"{stopped}; go on with {PROGRAM} --resume {experiment.out}")
        return stopped.status
    except EXPECTED as error:
        if not getattr(error, "of_first", False) or parallel.place().rank == 0:
            say(str(error))
        return 1
    except KeyboardInterrupt:  # the second Ctrl-C, or one before or after the training
        return 130
    finally:
        parallel.leave()
    return 0


def evaluate(path: Path, given: dict[str, Any]) -> int:
    """Prints the accuracy of a saved network, and returns the exit status.

    Args:
        path: its file; one of this program says which network and which data it is of.
        given: the options that are given, over those of the file.
    """
    try:
        known = data_options(path)
        if path.is_file() and not known and "data" not in given:
            raise ConfigError(
                f"data: must be given for {path}, which does not say what its images are"
            )
        other = given.get("data", known.get("data"))
        if other != known.get("data"):
            # Other images, normalised as the network knows them.
            own = is_import(other)
            known = {} if own else {n: known[n] for n in ("mean", "std") if n in known}
            takes, have = len(known.get("mean", ())), 1 if other == "digits" else 3
            if takes not in (0, have):
                raise ConfigError(
                    f"{path}: the network takes {takes} channels, {other} have {have}"
                )
        known = {n: v for n, v in known.items() if v}
        config = resolve(known, given)
        device = prepare(config)
        try:
            data, _ = read_data(config, device, parts=("val",))
        except (ConfigError, OSError, ImportError) as error:
            named = [f"{n} {known[n]}" for n in ("data", "root") if n in known.keys() - given]
            told = f" ({' and '.join(named)} from {path})" if named else ""
            raise ConfigError(f"{error}{told}") from error
        model, facts = open_network(path, given.get("student", ""), data)
        found = accuracy(model.to(device), data.evaluate, device)
    except EXPECTED as error:
        say(str(error))
        return 1
    try:
        said = same_images(facts, data) if known or "images" in facts else ""
    except ValueError as error:  # which was asked for, by flags
        said = f"; {error}"
    if found is None:
        say(f"{path}: the network's outputs are not finite")
        return 1
    top5 = f", top-5 {found[1]:.2f} %" if data.classes >= TOP5_FROM else ""
    left_out = len(data.facts.get("left_out", ()))
    unread = f" ({left_out} that cannot be read are left out)" if left_out else ""
    print(
        f"{path}: {facts['network']} on {config.data}, {len(data.evaluate)} images{unread}: "
        f"accuracy {found[0]:.2f} %{top5}{said}"
    )
    return 0
