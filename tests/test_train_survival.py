"""at-fused-train when things go wrong: killed, interrupted, a full disk, damaged files, nan."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train_runs import in_child, run, small

from at_fused.train import checkpoints, methods
from at_fused.train import main as program
from at_fused.train.checkpoints import CheckpointError
from at_fused.train.cli import main
from at_fused.train.config import to_toml
from at_fused.train.experiment import Experiment
from at_fused.train.loop import NotFiniteError, Trainer
from at_fused.train.stop import Signals, Stopped

KILLS = 20


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def weights(out: Path) -> dict[str, dict[str, Tensor]]:
    """All networks of a run, by file."""
    return {p.name: torch.load(p, weights_only=True)["model"] for p in sorted(out.glob("*.pt"))}


def same(a: dict[str, dict[str, Tensor]], b: dict[str, dict[str, Tensor]]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(x, b[file][name]) for file, model in a.items() for name, x in model.items()
    )


def told(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without times."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k != "ms"} for line in lines]


# ---- SIGKILL, at random moments ------------------------------------------------------------------


@pytest.mark.long
def test_a_run_that_is_killed_twenty_times_ends_as_one_that_is_not(tmp_path: Path) -> None:
    """In random moments, of which some are within the writing of a checkpoint."""
    config = small(compare=["none", "at+kd", "f-actt"], epochs=16, checkpoint_every=3)
    begin = time.perf_counter()
    run(config, tmp_path / "whole")
    whole = time.perf_counter() - begin

    draw = random.Random(0)
    killed = 0
    while killed < KILLS:
        child = in_child(lambda: run(config, tmp_path / "killed") and 0)
        # Most within what a run takes from where it is; a run that ends is begun anew.
        time.sleep(draw.uniform(0.1, 1.0) * whole / 3)
        if os.waitpid(child, os.WNOHANG)[0]:
            assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
            shutil.rmtree(tmp_path / "killed")
            continue
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        killed += 1
    run(config, tmp_path / "killed")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    # Neither is a line there twice, nor one missing.
    assert told(tmp_path / "whole") == told(tmp_path / "killed")
    assert not (tmp_path / "killed" / "checkpoints" / "none-seed0").exists()


def test_a_run_goes_on_from_any_step_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a scheduled beta, momentum and dropout's random numbers."""
    config = small(compare=["at"], epochs=7, checkpoint_every=1, beta_schedule="cosine", keep=99)
    run(config, tmp_path / "whole")
    # Keep what a run clears away at its end.
    monkeypatch.setattr(checkpoints, "clear", lambda folder: None)
    run(config, tmp_path / "kept")
    files = sorted((tmp_path / "kept/checkpoints/at-seed0").iterdir())
    assert [f.name for f in files] == [f"step-{i:08d}.pt" for i in range(1, 7)]
    for file in files:
        out = tmp_path / file.stem
        (out / "checkpoints/at-seed0").mkdir(parents=True)
        shutil.copy(tmp_path / "kept/teacher.pt", out)
        shutil.copy(file, out / "checkpoints/at-seed0")
        run(config, out)
        assert same(weights(tmp_path / "whole"), weights(out))
        assert told(tmp_path / "whole") == told(out)


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
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "stopped"))


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
    command = [sys.executable, "-m", "at_fused.train"]
    process = subprocess.Popen(
        [*command, "--config", str(file), "--out", str(out)], stderr=subprocess.PIPE, text=True
    )
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.is_file() and "none-seed0" in metrics.read_text()):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
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


def damage(path: Path, how: str) -> None:
    whole = path.read_bytes()
    if how == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "foreign":
        torch.save({"weights": torch.ones(3)}, path)
    elif how == "pickle":
        torch.save({"format": 1, "what": subprocess.Popen}, path)
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
    run(config, tmp_path / "whole")
    assert same(weights(out), weights(tmp_path / "whole"))


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
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_a_rate_that_diverges_is_said_by_the_program(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(compare=["none"], epochs=40, method={"none": {"lr": 1000.0, "weight_decay": 10}})
    assert program.run(config, tmp_path / "run") == 1
    assert "is not finite; no state was saved before" in capsys.readouterr().err


def test_nothing_is_loaded_but_tensors(tmp_path: Path) -> None:
    """No pickle of a checkpoint runs."""
    path = tmp_path / "evil.pt"

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"format": 1, "what": "network", "model": Evil()}, path)
    with pytest.raises(CheckpointError, match=r"evil\.pt: truncated, or no file"):
        checkpoints.load(path, "network")
    assert not (tmp_path / "ran").exists()
