"""Small runs of at-fused-train for its tests."""

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
    """A configuration whose run takes a second or two."""
    return resolve(SMALL | changes)


class Listener(Callbacks):
    """Notes what a run says, and which networks it comes to."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []
        self.jobs: list[str] = []

    def log(self, text: str) -> None:
        self.said.append(text)

    def job(self, job: Job) -> None:
        self.jobs.append(job.name)


def run(config: Config, out: Path, callbacks: Callbacks | None = None) -> Result:
    """Train in this process, without a report."""
    out.mkdir(parents=True, exist_ok=True)
    return Experiment(config, out, callbacks=callbacks).run()


def metrics(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl of a run."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, dict[str, Tensor]]:
    """All networks that a run has saved, by file."""
    return {p.name: torch.load(p, weights_only=True)["model"] for p in sorted(out.glob("*.pt"))}


def same(a: Path, b: Path) -> bool:
    """Whether two runs have saved the same networks, bit for bit."""
    one, two = weights(a), weights(b)
    return one.keys() == two.keys() and all(
        torch.equal(x, two[file][name]) for file, model in one.items() for name, x in model.items()
    )


def stop_in_step(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have SIGTERM arrive while a student's step is computed."""
    train_step = Trainer.train_step

    def signalled(self: Trainer, *arguments: Any) -> None:
        if self.step == step and not self.job.is_teacher:
            self.callbacks.signals.number = signal.SIGTERM
        train_step(self, *arguments)

    monkeypatch.setattr(Trainer, "train_step", signalled)


def training(out: Path, *words: str) -> subprocess.Popen[str]:
    """Start the program; return once its first student has come to another point of its curve."""
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


def in_child(function: Any) -> int:
    """Fork a process that runs a function and ends; return its number.

    Forked, because importing torch takes longer than the runs do; of threads, which a fork does not
    survive, these runs have one.
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


def ended(child: int) -> int:
    """Wait for it; return its exit status, or minus the number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_before(at: int, *places: tuple[Any, str]) -> None:
    """Has this process killed before the call of this number of any of these functions."""
    calls = itertools.count()

    def dying(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for owner, name in places:
        setattr(owner, name, dying(getattr(owner, name)))
