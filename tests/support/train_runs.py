"""Small runs of at-fused-train, and helpers that stop or kill them."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import torch
from torch import Tensor

from at_fused.train.config import Config, resolve
from at_fused.train.experiment import Experiment, Result
from at_fused.train.loop import Callbacks, Job, Trainer

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
    """Return a configuration that runs in a second or two."""
    return resolve(SMALL | changes)


class Listener(Callbacks):
    """Callbacks that record log messages and started jobs."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[str] = []
        self.jobs: list[str] = []

    def log(self, text: str) -> None:
        self.logged.append(text)

    def on_job_start(self, job: Job) -> None:
        self.jobs.append(job.name)


def run(config: Config, out: Path, callbacks: Callbacks | None = None) -> Result:
    """Train in this process, without a report."""
    out.mkdir(parents=True, exist_ok=True)
    return Experiment(config, out, callbacks=callbacks).run()


def metrics(out: Path) -> list[dict[str, Any]]:
    """Return the records in a run's metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, dict[str, Tensor]]:
    """Return the state_dicts of all networks that a run has saved, by file."""
    return {p.name: torch.load(p, weights_only=True)["model"] for p in sorted(out.glob("*.pt"))}


def same_weights(a: Path, b: Path) -> bool:
    """Return True if two runs have saved identical networks."""
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(
        torch.equal(x, second[file][k]) for file, state in first.items() for k, x in state.items()
    )


def stop_at_step(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a SIGTERM during a student's step."""
    train_step = Trainer.train_step

    def signalled(self: Trainer, *arguments: Any) -> None:
        if self.step == step and not self.job.is_teacher:
            self.callbacks.signals.number = signal.SIGTERM
        train_step(self, *arguments)

    monkeypatch.setattr(Trainer, "train_step", signalled)


def start_training(out: Path, *words: str) -> subprocess.Popen[str]:
    """Start the program; return once its first student has added an evaluation to the metrics."""
    file = out / "metrics.jsonl"
    before = len(metrics(out)) if file.is_file() else 1
    command = [sys.executable, "-m", "at_fused.train", *words]
    process = subprocess.Popen(command, stderr=PIPE, stdout=PIPE, text=True)
    deadline = time.monotonic() + 90
    while not file.is_file() or len(file.read_text().splitlines()) <= before:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    return process


def fork(function: Any) -> int:
    """Run a function in a forked process; return its process id.

    A fork is faster than a new process, which imports torch. Only the calling thread survives a
    fork; these runs use one thread.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = function() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def wait_for(child: int) -> int:
    """Wait for a process; return its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_before_call(number: int, *functions: tuple[Any, str]) -> None:
    """Kill this process before the ``number``-th call (from 0) of any of these functions."""
    calls = itertools.count()

    def killing(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for owner, name in functions:
        setattr(owner, name, killing(getattr(owner, name)))
