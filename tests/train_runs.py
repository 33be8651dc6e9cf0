"""Small runs of at-fused-train for its tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from at_fused.train.config import Config, resolve
from at_fused.train.experiment import Experiment, Result

# A student of 5,000 parameters on 20 digits of 8x8: a step takes milliseconds.
SMALL: dict[str, Any] = {
    "teacher": "wrn-10-1-b8",
    "student": "wrn-10-1-b4",
    "image_size": 8,
    "epochs": 6,
    "teacher_epochs": 1,
    "seeds": 1,
    "evaluate_every": 2,
}


def small(**changes: Any) -> Config:
    """A configuration whose run takes a second or two."""
    return resolve(SMALL | changes)


def run(config: Config, out: Path, **watch: Any) -> Result:
    """Trains in this process, without a report."""
    out.mkdir(parents=True, exist_ok=True)
    return Experiment(config, out, **watch).run()


def in_child(function: Any) -> int:
    """A forked process that runs a function and ends; its number.

    Forked, because importing torch takes longer than the runs do; of threads, which a fork does not
    survive, these runs have one.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = function() or 0
        finally:
            os._exit(status)
    return child
