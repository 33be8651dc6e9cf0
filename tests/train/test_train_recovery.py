"""Recovery of at-fused-train: kills, signals, full disks, damaged files and NaN."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train_runs import (
    Listener,
    fork,
    kill_before_call,
    metrics,
    run,
    same_weights,
    small,
    start_training,
    stop_at_step,
    wait_for,
)

from at_fused.train import checkpoints, cli, methods
from at_fused.train.checkpoints import CheckpointError
from at_fused.train.cli import main
from at_fused.train.config import Config, to_toml
from at_fused.train.experiment import Experiment
from at_fused.train.loop import Callbacks, Job, NotFiniteError, Signals, Stopped, Trainer
from at_fused.train.networks import build


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def run_until(step: int, config: Config, out: Path) -> None:
    """Start a run, and stop it by SIGTERM in a step of a student."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at_step(step, patch)
        with pytest.raises(Stopped):
            run(config, out)


def metrics_without_times(out: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "ms"} for line in metrics(out)]


# ---- SIGKILL -------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [7, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_killed_run_resumes_to_the_same_weights(every: int, tmp_path: Path) -> None:
    """Kill the run before a step or within a write; momentum and a scheduled beta must continue."""
    run(small(compare=["kd"], epochs=1), tmp_path / "teacher")
    teacher = str(tmp_path / "teacher/teacher.pt")
    config = small(compare=["at"], epochs=5, evaluate_every=2, checkpoint_every=2,
                   beta_schedule="cosine", teacher_from=teacher)  # fmt: skip
    reference = tmp_path / "reference"
    run(config, reference)

    def child(at: int, out: Path) -> None:
        kill_before_call(at, (Trainer, "train_step"), (os, "fsync"), (os, "replace"))
        run(config, out)

    for at in itertools.count(step=every):
        out = tmp_path / str(at)
        status = wait_for(fork(lambda at=at, out=out: child(at, out)))
        if status == 0:
            break
        assert status == -signal.SIGKILL
        (curve,) = run(config, out).students["at"]
        assert same_weights(reference, out)
        assert [point["epoch"] for point in curve.points] == [2, 4, 5]
        # No record is missing or duplicated.
        assert metrics_without_times(reference) == metrics_without_times(out)
    assert at > 20


def test_stopped_run_keeps_random_state_and_pending_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_dropout(*_: Any) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))

    monkeypatch.setattr("at_fused.train.experiment.build", with_dropout)
    config = small(compare=["none"], epochs=8, checkpoint_every=3)
    run(config, tmp_path / "reference")
    run_until(5, config, tmp_path / "stopped")
    torch.manual_seed(1234)
    run(config, tmp_path / "stopped")
    assert same_weights(tmp_path / "reference", tmp_path / "stopped")
    reference = metrics_without_times(tmp_path / "reference")
    assert reference == metrics_without_times(tmp_path / "stopped")


# ---- signals -------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signal_finishes_the_step_and_saves(number: int, status: int, tmp_path: Path) -> None:
    """Check the exit status, the message and the checkpoint of a run from the command line."""
    file = tmp_path / "config.toml"
    file.write_text(to_toml(small(compare=["none"], epochs=100_000)))
    out = tmp_path / "run"
    process = start_training(out, "--config", str(file), "--out", str(out))
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    name = signal.Signals(number).name
    assert errors.strip().endswith(
        f"at-fused-train: stopped by {name}; resume with at-fused-train --resume {out}"
    )
    (saved,) = (out / "checkpoints/none-seed0").iterdir()
    state = torch.load(saved, weights_only=True)
    assert state["step"] == int(saved.stem.removeprefix("step-")) > 0
    check_exit(1, "--resume", out, "--epochs", "7")  # fewer epochs than before


def test_second_signal_has_its_default_effect() -> None:
    # Python's default handler: a shell that runs the tests in the background ignores SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.number == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


# ---- files ---------------------------------------------------------------------------------------


def start_and_interrupt(out: Path) -> Path:
    """Start a run and stop it after five steps, with checkpoints of steps 3 and 5."""
    config = small(compare=["none"], checkpoint_every=3)
    run_until(4, config, out)
    checkpoints.atomic_write(out / "config.toml", to_toml(config).encode())
    return out


def check_exit(status: int, *words: str | Path) -> None:
    """Check the exit status of the program."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert stop.value.code == status


def test_damaged_file_is_an_error_and_resume_works_without_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Damage a checkpoint, and a finished network with an already reported accuracy."""
    out, config = start_and_interrupt(tmp_path / "run"), small(compare=["none"], checkpoint_every=3)
    last = out / "checkpoints/none-seed0/step-00000005.pt"
    run(config, tmp_path / "reference")
    for file in (last, out / "student_none-seed0.pt"):
        file.write_bytes(file.read_bytes()[:-1])
        check_exit(1, "--resume", out)
        message = f"at-fused-train: {file}: truncated, damaged, or not from this version"
        assert message in capsys.readouterr().err
        file.unlink()
        run(config, out)
        assert same_weights(out, tmp_path / "reference")


def test_resume_refuses_other_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(status: int, *words: str | Path) -> str:
        check_exit(status, *words)
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "config.toml: [Errno 2] No such file" in error(2, "--resume", tmp_path)
    out = start_and_interrupt(tmp_path / "run")
    last = f"at-fused-train: {out}/checkpoints/none-seed0/step-00000005.pt: was trained with"
    for status, flags, message in (
        (1, "--momentum=0.5", f"{last} momentum 0.9 (now 0.5); a run must not mix both"),
        (1, "--set=none.lr=0.7", f"{last} lr 0.5 (now 0.7); a run must not mix both"),
        (1, "--epochs=7", f"{last} epochs 6 (now 7); a run must not mix both"),
        (1, "--epochs=5", f"{last} epochs 6 (now 5); a run must not mix both"),
        (2, "--out=elsewhere", "argument --resume: uses the folder"),
    ):
        assert message in error(status, "--resume", out, flags)
    # Networks are also checked against an edited config.toml, and against their job.
    before = (out / "config.toml").read_text()
    run(small(compare=["none"], checkpoint_every=3), out)
    (out / "config.toml").write_text(f"{before}\n[method.none]\nlr = 0.25\n")
    path = out / "student_none-seed0.pt"
    assert f"{path}: was trained with lr 0.5 (now 0.25); a run" in error(1, "--resume", out)
    (out / "config.toml").write_text(before)
    path.rename(out / "student_none-seed1.pt")
    message = "none-seed1.pt: was trained with run none-seed0 (now none-seed1); a run"
    assert message in error(1, "--resume", out, "--seeds=2")


def test_finished_run_can_be_extended(tmp_path: Path) -> None:
    """Add seeds, methods and epochs; the result must equal a run that had them from the start."""
    out, steady = tmp_path / "run", {"lr_schedule": "step", "lr_drops": (), "evaluate_every": 1}
    more = steady | {"compare": ["none", "kd"], "seeds": 2, "epochs": 4}
    run(small(**steady, compare=["none"], epochs=2), out)
    run(small(**more | {"epochs": 2}), out)
    result = run(small(**more), out, (listener := Listener()))
    run(small(**more), tmp_path / "reference")
    assert same_weights(out, tmp_path / "reference")
    assert listener.jobs[0] == "teacher"
    assert [[p["epoch"] for p in c.points] for c in result.students["kd"]] == [[1, 2, 3, 4]] * 2
    extended, reference = map(metrics_without_times, (out, tmp_path / "reference"))
    assert sorted(map(str, extended)) == sorted(map(str, reference))
    # Without their checkpoints, students are trained from the start.
    shutil.rmtree(out / "checkpoints")
    run(small(**more | {"epochs": 5}), out)
    run(small(**more | {"epochs": 5}), tmp_path / "longer")
    assert same_weights(out, tmp_path / "longer")


def test_refused_settings_change_no_file(tmp_path: Path) -> None:
    """Try another teacher, a longer-trained one, and other initial weights."""

    def digests() -> dict[str, str]:
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.glob("*.*")}

    def check_refused(message: str, **changes: Any) -> None:
        before = digests()
        with pytest.raises(CheckpointError, match=message):
            run(replace(config, **changes), out)
        assert digests() == before

    out, initial = tmp_path / "run", tmp_path / "initial.pt"
    steady = {"lr_schedule": "step", "lr_drops": (), "compare": ["none", "kd"]}
    torch.save(build("wrn-10-1-b4", 10, 1).state_dict(), initial)
    config = small(**steady, student_from=str(initial))
    run(config, out)
    check_refused(r"teacher.pt: was trained with lr 0.1 \(now 0.2\)", teacher_lr=0.2)
    check_refused(r"teacher.pt: was trained with epochs 1 \(now 2\)", teacher_epochs=2)
    torch.save(build("wrn-10-1-b4", 10, 1).state_dict(), initial)
    check_refused("was trained with first_weights", seeds=2)
    # A teacher is identified by its weights.
    state = torch.load(out / "teacher.pt", weights_only=True)
    state["model"]["head.bias"] += 1
    checkpoints.save(out / "teacher.pt", "network", state)
    config = replace(config, compare=("kd",))
    check_refused("student_kd-seed0.pt: was trained with first_weights .*, teacher_weights")


def test_validation_refuses_more_epochs(tmp_path: Path) -> None:
    """Refuse, because validation selects one of all evaluations, and a shorter run had others."""
    config = small(lr_schedule="step", lr_drops=(), compare=["none"], validation=0.2)
    run(config, tmp_path)
    with pytest.raises(CheckpointError, match=r"was trained with epochs 6 \(now 8\)"):
        run(replace(config, epochs=8), tmp_path)


def test_folder_is_locked_during_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, out = small(compare=["none"], epochs=1), tmp_path / "run"

    class Second(Callbacks):
        def on_job_start(self, job: Job) -> None:
            if job.name == "none-seed0":
                for fresh in (True, False):
                    with pytest.raises(CheckpointError, match="another at-fused-train is using"):
                        Experiment(config, out, fresh=fresh).run()

    result = Experiment(config, out, fresh=True, callbacks=Second()).run()
    assert len(result.students["none"]) == 1
    # A new run needs an empty folder.
    with pytest.raises(CheckpointError, match="not empty; choose a new"):
        Experiment(config, out, fresh=True).run()
    # Without --out the folder's name is the time.
    monkeypatch.chdir(tmp_path)
    Experiment(config, None, fresh=True).run()
    (dated,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}", dated.name)


def test_full_disk_is_an_error_and_keeps_saved_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(compare=["none"], checkpoint_every=2, keep=1)
    out, fsync, files = tmp_path / "run", os.fsync, []

    def full(file: int) -> None:
        files.append(file)
        # Two calls each: metrics.jsonl, config.toml, run.json, checkpoints of steps 2 and 4.
        if len(files) > 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"step-00000004.pt: No space left.*intact"):
        run(config, out)
    monkeypatch.undo()
    assert [p.name for p in (out / "checkpoints/none-seed0").iterdir()] == ["step-00000002.pt"]
    run(config, out)
    assert [p.name for p in (out / "checkpoints/none-seed0").iterdir()] == ["step-00000006.pt"]


# ---- NaN and inf ---------------------------------------------------------------------------------


def test_nonfinite_loss_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cross_entropy, calls = methods.cross_entropy, itertools.count()

    def inf_once(*arguments: Any, **options: Any) -> Tensor:
        return cross_entropy(*arguments, **options) * (torch.inf if next(calls) == 6 else 1)

    config = small(compare=["none"], checkpoint_every=2)
    monkeypatch.setattr(methods, "cross_entropy", inf_once)  # one call is before the first step
    last = tmp_path / "run/checkpoints/none-seed0/step-00000004.pt"
    message = f"none-seed0: the loss of step 6 is not finite; the last checkpoint is {last}; try a"
    with pytest.raises(NotFiniteError, match=message):
        run(config, tmp_path / "run")
    monkeypatch.undo()
    run(config, tmp_path / "run")
    run(config, tmp_path / "reference")
    assert same_weights(tmp_path / "run", tmp_path / "reference")


def test_diverging_network_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check a student, and a teacher that diverges after its last loss was computed."""
    wild = {"none": {"lr": 1000.0, "weight_decay": 10}}
    config = small(compare=["none"], epochs=40, evaluate_every=40, method=wild)
    assert cli.run(config, tmp_path / "run") == 1
    message = "is not finite; no checkpoint was saved; try a lower lr"
    assert message in capsys.readouterr().err
    train_step = Trainer.train_step

    def diverge_at_the_end(self: Trainer, *arguments: Any) -> None:
        train_step(self, *arguments)
        if self.step == self.plan.steps:
            next(self.student.parameters()).data.fill_(float("inf"))

    monkeypatch.setattr(Trainer, "train_step", diverge_at_the_end)
    assert cli.run(small(compare=["kd"]), tmp_path / "teacher") == 1
    message = "teacher: after step 16 the network's outputs are not finite"
    assert message in capsys.readouterr().err


def test_interrupt_before_training_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("at_fused.train.cli.build_parser", interrupt)
    check_exit(130)
