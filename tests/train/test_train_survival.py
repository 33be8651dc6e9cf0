"""at-fused-train when things go wrong: killed, interrupted, a full disk, damaged files, nan."""

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
    die_before,
    ended,
    in_child,
    metrics,
    run,
    same,
    small,
    stop_in_step,
    training,
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


def stopped(config: Config, out: Path, step: int) -> None:
    """Begin a run that SIGTERM stops in a student's step."""
    with pytest.MonkeyPatch.context() as patch:
        stop_in_step(step, patch)
        with pytest.raises(Stopped):
            run(config, out)


def told(out: Path) -> list[dict[str, Any]]:
    """The metrics without times."""
    return [{k: v for k, v in line.items() if k != "ms"} for line in metrics(out)]


# ---- SIGKILL -------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [7, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_a_run_that_is_killed_anywhere_ends_as_one_that_is_not(every: int, tmp_path: Path) -> None:
    """Before a step, from which momentum and a scheduled beta go on, or within a write."""
    run(small(compare=["kd"], epochs=1), tmp_path / "teacher")
    teacher = str(tmp_path / "teacher/teacher.pt")
    config = small(compare=["at"], epochs=5, evaluate_every=2, checkpoint_every=2,
                   beta_schedule="cosine", teacher_from=teacher)  # fmt: skip
    whole = tmp_path / "whole"
    run(config, whole)

    def child(at: int, out: Path) -> None:
        die_before(at, (Trainer, "train_step"), (os, "fsync"), (os, "replace"))
        run(config, out)

    for at in itertools.count(step=every):
        out = tmp_path / str(at)
        status = ended(in_child(lambda at=at, out=out: child(at, out)))
        if status == 0:
            break
        assert status == -signal.SIGKILL
        (curve,) = run(config, out).students["at"]
        assert same(whole, out)
        assert [point["epoch"] for point in curve.points] == [2, 4, 5]
        # Neither is a line there twice, nor one missing.
        assert told(whole) == told(out)
    assert at > 20


def test_a_stop_loses_neither_random_numbers_nor_the_evaluation_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dropping(*_: Any) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))

    monkeypatch.setattr("at_fused.train.experiment.build", dropping)
    config = small(compare=["none"], epochs=8, checkpoint_every=3)
    run(config, tmp_path / "whole")
    stopped(config, tmp_path / "stopped", 5)
    torch.manual_seed(1234)
    run(config, tmp_path / "stopped")
    assert same(tmp_path / "whole", tmp_path / "stopped")
    assert told(tmp_path / "whole") == told(tmp_path / "stopped")


# ---- signals -------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_ends(
    number: int, status: int, tmp_path: Path
) -> None:
    """The program itself, by the command line, and again with --resume."""
    file = tmp_path / "config.toml"
    file.write_text(to_toml(small(compare=["none"], epochs=100_000)))
    out = tmp_path / "run"
    process = training(out, "--config", str(file), "--out", str(out))
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    name = signal.Signals(number).name
    assert errors.strip().endswith(
        f"at-fused-train: {name}; go on with at-fused-train --resume {out}"
    )
    (saved,) = (out / "checkpoints/none-seed0").iterdir()
    state = torch.load(saved, weights_only=True)
    assert state["step"] == int(saved.stem.removeprefix("step-")) > 0
    refused(1, "--resume", out, "--epochs", "7")  # fewer


def test_the_second_signal_acts_at_once() -> None:
    # Python's own; a shell that starts the tests in the background has them ignore it.
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


def interrupted(out: Path) -> Path:
    """Begin a run and stop it after five steps; its two checkpoints, of 3 and 5, are there."""
    config = small(compare=["none"], checkpoint_every=3)
    stopped(config, out, 4)
    checkpoints.write(out / "config.toml", to_toml(config).encode())
    return out


def refused(status: int, *words: str | Path) -> None:
    """The program ends with this status."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert stop.value.code == status


def test_a_damaged_checkpoint_is_an_error_and_the_one_before_serves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor is a finished network passed over, as it is what was reported."""
    out, config = interrupted(tmp_path / "run"), small(compare=["none"], checkpoint_every=3)
    last = out / "checkpoints/none-seed0/step-00000005.pt"
    run(config, tmp_path / "whole")
    for file in (last, out / "student_none-seed0.pt"):
        file.write_bytes(file.read_bytes()[:-1])
        refused(1, "--resume", out)
        said = f"at-fused-train: {file}: truncated, damaged, or no file of this version of at-fused"
        assert said in capsys.readouterr().err
        file.unlink()
        run(config, out)
        assert same(out, tmp_path / "whole")


def test_another_configuration_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(status: int, *words: str | Path) -> str:
        refused(status, *words)
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "config.toml: [Errno 2] No such file" in said(2, "--resume", tmp_path)
    out = interrupted(tmp_path / "run")
    last = f"at-fused-train: {out}/checkpoints/none-seed0/step-00000005.pt: was made with"
    for status, flags, message in (
        (1, "--momentum=0.5", f"{last} momentum 0.9 (now 0.5); networks of both"),
        (1, "--set=none.lr=0.7", f"{last} lr 0.5 (now 0.7); networks of both"),
        (1, "--epochs=7", f"{last} epochs 6 (now 7); networks of both"),
        (1, "--epochs=5", f"{last} epochs 6 (now 5); networks of both"),
        (2, "--out=elsewhere", "argument --resume: goes on in a folder"),
    ):
        assert message in said(status, "--resume", out, flags)
    # An edited file is not believed for networks of before; nor is another's file.
    before = (out / "config.toml").read_text()
    run(small(compare=["none"], checkpoint_every=3), out)
    (out / "config.toml").write_text(f"{before}\n[method.none]\nlr = 0.25\n")
    path = out / "student_none-seed0.pt"
    assert f"{path}: was made with lr 0.5 (now 0.25); networks" in said(1, "--resume", out)
    (out / "config.toml").write_text(before)
    path.rename(out / "student_none-seed1.pt")
    found = said(1, "--resume", out, "--seeds=2")
    assert "none-seed1.pt: was made with run none-seed0 (now none-seed1); networks" in found


def test_a_finished_run_gets_more_seeds_methods_and_epochs(tmp_path: Path) -> None:
    """To the bits of a run that had them from the start; epochs where the rate has no end."""
    out, steady = tmp_path / "run", {"lr_schedule": "step", "lr_drops": (), "evaluate_every": 1}
    more = steady | {"compare": ["none", "kd"], "seeds": 2, "epochs": 4}
    run(small(**steady, compare=["none"], epochs=2), out)
    run(small(**more | {"epochs": 2}), out)
    result = run(small(**more), out, (listener := Listener()))
    run(small(**more), tmp_path / "whole")
    assert same(out, tmp_path / "whole")
    assert listener.jobs[0] == "teacher"
    assert [[p["epoch"] for p in c.points] for c in result.students["kd"]] == [[1, 2, 3, 4]] * 2
    assert sorted(map(str, told(out))) == sorted(map(str, told(tmp_path / "whole")))
    # Where the state to go on from is gone they are trained from the start.
    shutil.rmtree(out / "checkpoints")
    run(small(**more | {"epochs": 5}), out)
    run(small(**more | {"epochs": 5}), tmp_path / "longer")
    assert same(out, tmp_path / "longer")


def test_what_is_refused_is_refused_before_anything_changes(tmp_path: Path) -> None:
    """Another teacher, one of more epochs, and other weights to start from."""

    def digests() -> dict[str, str]:
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.glob("*.*")}

    def refuses(message: str, **changes: Any) -> None:
        before = digests()
        with pytest.raises(CheckpointError, match=message):
            run(replace(config, **changes), out)
        assert digests() == before

    out, first = tmp_path / "run", tmp_path / "first.pt"
    steady = {"lr_schedule": "step", "lr_drops": (), "compare": ["none", "kd"]}
    torch.save(build("wrn-10-1-b4", 10, 1).state_dict(), first)
    config = small(**steady, student_from=str(first))
    run(config, out)
    refuses(r"teacher.pt: was made with lr 0.1 \(now 0.2\)", teacher_lr=0.2)
    refuses(r"teacher.pt: was made with epochs 1 \(now 2\)", teacher_epochs=2)
    torch.save(build("wrn-10-1-b4", 10, 1).state_dict(), first)
    refuses("was made with first_weights", seeds=2)
    # The teacher of a run is known by its weights.
    state = torch.load(out / "teacher.pt", weights_only=True)
    state["model"]["head.bias"] += 1
    checkpoints.save(out / "teacher.pt", "network", state)
    config = replace(config, compare=("kd",))
    refuses("student_kd-seed0.pt: was made with first_weights .*, teacher_weights")


def test_more_epochs_are_refused_where_a_validation_share_chooses(tmp_path: Path) -> None:
    """Among all evaluations, of which the shorter run had others."""
    config = small(lr_schedule="step", lr_drops=(), compare=["none"], validation=0.2)
    run(config, tmp_path)
    with pytest.raises(CheckpointError, match=r"was made with epochs 6 \(now 8\)"):
        run(replace(config, epochs=8), tmp_path)


def test_one_folder_has_one_run_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, out = small(compare=["none"], epochs=1), tmp_path / "run"

    class Second(Callbacks):
        def job(self, job: Job) -> None:
            if job.name == "none-seed0":
                for fresh in (True, False):
                    with pytest.raises(CheckpointError, match="another at-fused-train is at work"):
                        Experiment(config, out, fresh=fresh).run()

    result = Experiment(config, out, fresh=True, callbacks=Second()).run()
    assert len(result.students["none"]) == 1
    # One that looked before the first began comes too late.
    with pytest.raises(CheckpointError, match="already holds files; choose a new"):
        Experiment(config, out, fresh=True).run()
    # Without a name it is one of the time.
    monkeypatch.chdir(tmp_path)
    Experiment(config, None, fresh=True).run()
    (dated,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}", dated.name)


def test_a_full_disk_is_one_clear_error_and_what_was_saved_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(compare=["none"], checkpoint_every=2, keep=1)
    out, fsync, files = tmp_path / "run", os.fsync, []

    def full(file: int) -> None:
        files.append(file)
        # Two each: metrics.jsonl, config.toml, run.json, the checkpoint of step 2; then that of 4.
        if len(files) > 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"step-00000004.pt: No space left.*untouched"):
        run(config, out)
    monkeypatch.undo()
    assert [p.name for p in (out / "checkpoints/none-seed0").iterdir()] == ["step-00000002.pt"]
    run(config, out)
    assert [p.name for p in (out / "checkpoints/none-seed0").iterdir()] == ["step-00000006.pt"]


# ---- a loss that is not finite -------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lossy, calls = methods.cross_entropy, itertools.count()

    def sometimes(*arguments: Any, **options: Any) -> Tensor:
        return lossy(*arguments, **options) * (torch.inf if next(calls) == 6 else 1)

    config = small(compare=["none"], checkpoint_every=2)
    monkeypatch.setattr(methods, "cross_entropy", sometimes)  # once before the first step
    last = tmp_path / "run/checkpoints/none-seed0/step-00000004.pt"
    said = f"none-seed0: the loss of step 6 is not finite; the last good state is {last}; a lower"
    with pytest.raises(NotFiniteError, match=said):
        run(config, tmp_path / "run")
    monkeypatch.undo()
    run(config, tmp_path / "run")
    run(config, tmp_path / "whole")
    assert same(tmp_path / "run", tmp_path / "whole")


def test_a_network_that_diverges_is_named_where_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The teacher too, and by its last step, after which no loss is computed."""
    wild = {"none": {"lr": 1000.0, "weight_decay": 10}}
    config = small(compare=["none"], epochs=40, evaluate_every=40, method=wild)
    assert cli.run(config, tmp_path / "run") == 1
    assert "is not finite; no state was saved before; a lower lr" in capsys.readouterr().err
    train_step = Trainer.train_step

    def breaking(self: Trainer, *arguments: Any) -> None:
        train_step(self, *arguments)
        if self.step == self.plan.steps:
            next(self.student.parameters()).data.fill_(float("inf"))

    monkeypatch.setattr(Trainer, "train_step", breaking)
    assert cli.run(small(compare=["kd"]), tmp_path / "teacher") == 1
    found = capsys.readouterr().err
    assert "teacher: after step 16 the network's outputs are not finite" in found


def test_an_interrupt_before_the_training_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("at_fused.train.cli.build_parser", interrupted)
    refused(130)
