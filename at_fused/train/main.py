"""A run from its configuration to its report, in this process."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tqdm import tqdm

from at_fused.teacher_cache import StaleCacheError
from at_fused.train import checkpoints, parallel
from at_fused.train.cli import PROGRAM
from at_fused.train.config import Config, to_toml
from at_fused.train.experiment import Experiment, Result
from at_fused.train.loop import NotFiniteError
from at_fused.train.report import text, write_report
from at_fused.train.rules import ConfigError
from at_fused.train.stop import Signals, Stopped

# What a user can do something about: said in a line. The rest is a defect, and shows where.
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


def run(config: Config, out: Path) -> int:
    """Trains, reports, and returns the exit status."""
    start = time.perf_counter()
    try:
        with Signals() as signals:
            result, experiment = _train(config, out, signals)
        if parallel.first():
            # First of all the table, for which no file is needed.
            print(text(result, config))
            write_report(result, experiment)
            seconds = time.perf_counter() - start
            print(f"\n{seconds:.0f} s in all; everything is in {experiment.out}")
    except Stopped as stopped:
        if parallel.place().rank == 0:
            say(f"{stopped}; go on with {PROGRAM} --resume {out}")
        return stopped.status
    except EXPECTED as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:  # the second Ctrl-C, or one before or after the training
        return 130
    finally:
        parallel.leave()
    return 0


def _train(config: Config, out: Path, signals: Signals) -> tuple[Result, Experiment]:
    first = parallel.place().rank == 0
    # None: where it is no terminal, no bar.
    with tqdm(unit="step", dynamic_ncols=True, disable=None if first else True) as bar:

        def log(text: str) -> None:
            if first:
                bar.write(f"{PROGRAM}: {text}", file=sys.stderr)

        experiment = Experiment(
            config, out, tick=bar.update, say=bar.set_description, log=log, signals=signals
        )
        if first:
            experiment.out.mkdir(parents=True, exist_ok=True)
            checkpoints.write(experiment.out / "config.toml", to_toml(config).encode())
        parallel.wait()
        bar.reset(total=experiment.total_steps())
        return experiment.run(), experiment
