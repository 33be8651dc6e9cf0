"""at-fused-train when things go wrong: killed, interrupted, a full disk, damaged files, nan."""

from __future__ import annotations

import errno
import itertools
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train_runs import die_before, ended, in_child, metrics, run, same, small, training

from at_fused.train import checkpoints, methods
from at_fused.train import main as program
from at_fused.train.checkpoints import CheckpointError
from at_fused.train.cli import main
from at_fused.train.config import to_toml
from at_fused.train.experiment import Experiment
from at_fused.train.loop import NotFiniteError, Trainer
from at_fused.train.stop import Signals, Stopped


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def told(out: Path) -> list[dict[str, Any]]:
    """The metrics without times."""
    return [{k: v for k, v in line.items() if k != "ms"} for line in metrics(out)]


# ---- SIGKILL -------------------------------------------------------------------------------------


def test_a_run_that_is_killed_anywhere_ends_as_one_that_is_not(tmp_path: Path) -> None:
    """Before a step, from which momentum and a scheduled beta go on, or within a write."""
    run(small(compare=["at"], epochs=1), tmp_path / "teacher")
    config = small(
        compare=["at"],
        epochs=7,
        evaluate_every=1,
        checkpoint_every=2,
        beta_schedule="cosine",
        teacher_from=str(tmp_path / "teacher/teacher.pt"),
    )
    whole = tmp_path / "whole"
    run(config, whole)

    def child(at: int, out: Path) -> None:
        die_before(at, (Trainer, "train_step"), (os, "fsync"), (os, "replace"))
        run(config, out)

    for at in itertools.count(step=3):
        out = tmp_path / str(at)
        status = ended(in_child(lambda at=at, out=out: child(at, out)))
        if status == 0:
            break
        assert status == -signal.SIGKILL
        (curve,) = run(config, out).students["at"]
        assert same(whole, out)
        assert [point["epoch"] for point in curve.points] == [1, 2, 3, 4, 5, 6, 7]
        # Neither is a line there twice, nor one missing.
        assert told(whole) == told(out)
    assert at > 20


def test_the_state_has_the_random_numbers_that_dropout_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dropping(*_: Any) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))

    monkeypatch.setattr("at_fused.train.experiment.build", dropping)
    config = small(compare=["none"], epochs=8, checkpoint_every=3)
    run(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_in_step(5, patch)
        with pytest.raises(Stopped):
            run(config, tmp_path / "stopped")
    torch.manual_seed(1234)
    run(config, tmp_path / "stopped")
    assert same(tmp_path / "whole", tmp_path / "stopped")


# ---- signals -------------------------------------------------------------------------------------


def stop_in_step(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM arrives while a student's step is computed."""
    train_step = Trainer.train_step

    def signalled(self: Trainer, *arguments: Any) -> None:
        if self.step == step and self.job.name != "teacher":
            self.watch.signals.number = signal.SIGTERM
        train_step(self, *arguments)

    monkeypatch.setattr(Trainer, "train_step", signalled)


@pytest.mark.long
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
    # Shorter would be another configuration, which is refused; so is a folder that is no run's.
    refused(2, "--resume", out, "--epochs", "7")


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


def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was stopped after five steps, two checkpoints of which are there."""
    out = tmp_path / "run"
    stop_in_step(4, monkeypatch)
    config = small(compare=["none"], checkpoint_every=3)
    with pytest.raises(Stopped):
        run(config, out)
    monkeypatch.undo()
    checkpoints.write(out / "config.toml", to_toml(config).encode())
    assert [p.name for p in sorted((out / "checkpoints/none-seed0").iterdir())] == [
        "step-00000003.pt",
        "step-00000005.pt",
    ]
    return out


class Evil:
    """What a pickle would run."""

    ran = False

    def __reduce__(self) -> Any:
        return setattr, (Evil, "ran", True)


def damage(path: Path, how: str) -> None:
    whole = path.read_bytes()
    if how == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "foreign":
        torch.save({"weights": torch.ones(3)}, path)
    elif how == "pickle":
        torch.save({"format": 1, "what": Evil()}, path)
    else:
        state = torch.load(path, weights_only=True)
        state["what"] = state["what"].replace("none-seed0", "none-seed1")
        torch.save(state, path)


def refused(status: int, *words: str | Path) -> None:
    """The program ends with this status."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert stop.value.code == status


@pytest.mark.long
@pytest.mark.parametrize("how", ["truncated", "empty", "foreign", "pickle", "another run's"])
def test_a_damaged_checkpoint_is_one_clear_error(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = interrupted(tmp_path, monkeypatch)
    last = out / "checkpoints/none-seed0/step-00000005.pt"
    good = (last.parent / "step-00000003.pt").read_bytes()
    damage(last, how)
    refused(1, "--resume", out)
    errors = capsys.readouterr().err.strip().splitlines()
    assert errors[-1].startswith(f"at-fused-train: {last}: ")
    assert "Traceback" not in "\n".join(errors)
    assert (last.parent / "step-00000003.pt").read_bytes() == good
    assert not Evil.ran
    # Without it, the one before serves.
    last.unlink()
    refused(0, "--resume", out)


def test_another_configuration_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(status: int, *words: str | Path) -> str:
        refused(status, *words)
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "which has no config.toml of a run" in said(2, "--resume", tmp_path)
    out = interrupted(tmp_path, monkeypatch)
    for flags, message in (
        (["--lr", "0.5"], "argument --lr: got 0.5, but the run was begun with 0.1"),
        (["--set", "none.lr=0.7"], "argument --method: got {'none': {'lr': 0.7}"),
        (["--preset", "digits-quick"], "but the run was begun with 'digits'"),
        (["--out", "elsewhere"], "argument --resume: goes on in a folder"),
    ):
        assert message in said(2, "--resume", out, *flags)
    # What the file says is another run's, too.
    text = (out / "config.toml").read_text().replace("epochs = 6", "epochs = 60")
    (out / "config.toml").write_text(text)
    assert "is checkpoint of none-seed0, configuration" in said(1, "--resume", out)


def test_a_full_disk_is_one_clear_error_and_what_was_saved_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(compare=["none"], checkpoint_every=2, keep=1)
    out, fsync, files = tmp_path / "run", os.fsync, []

    def full(file: int) -> None:
        files.append(file)
        # Two each: metrics.jsonl, run.json, the checkpoint of step 2; then the one of step 4.
        if len(files) > 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"step-00000004.pt: No space left.*untouched"):
        run(config, out)
    monkeypatch.undo()
    assert [p.name for p in (out / "checkpoints/none-seed0").iterdir()] == ["step-00000002.pt"]
    run(config, out)
    assert not (out / "checkpoints").exists()
    run(config, tmp_path / "whole")
    assert same(out, tmp_path / "whole")


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read never is half of what is written: names change only after the data is down."""
    path = tmp_path / "file"
    checkpoints.write(path, b"old")
    order: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (order.append("fsync"), fsync(f))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("replace"), replace(a, b))[1])
    checkpoints.write(path, b"new")
    assert order == ["fsync", "replace", "fsync"]
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


# ---- a loss that is not finite -------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_run(
    bad: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lossy, calls = methods.cross_entropy, []

    def sometimes(*arguments: Any) -> Tensor:
        calls.append(arguments)
        return lossy(*arguments) * (bad if len(calls) == 6 else 1)

    config = small(compare=["none"], checkpoint_every=2)
    monkeypatch.setattr(methods, "cross_entropy", sometimes)
    monkeypatch.setattr(Experiment, "_check_methods", lambda self, student: None)
    with pytest.raises(NotFiniteError) as error:
        run(config, tmp_path / "run")
    last = tmp_path / "run/checkpoints/none-seed0/step-00000004.pt"
    assert str(error.value).startswith(
        "none-seed0 (method none): the loss of step 6 is not finite; "
        f"the last good state is {last}; a lower lr"
    )
    monkeypatch.undo()
    run(config, tmp_path / "run")
    run(config, tmp_path / "whole")
    assert same(tmp_path / "run", tmp_path / "whole")


def test_a_rate_that_diverges_is_said_by_the_program(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(compare=["none"], epochs=40, method={"none": {"lr": 1000.0, "weight_decay": 10}})
    assert program.run(config, tmp_path / "run") == 1
    assert "is not finite; no state was saved before" in capsys.readouterr().err
