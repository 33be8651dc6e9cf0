"""at-fused-train: whole small runs, what they leave behind, and how fast ways of running agree."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_runs import SMALL, run, small

from at_fused.train import main as program
from at_fused.train import memory
from at_fused.train.config import from_toml, resolve, to_toml
from at_fused.train.data import open_data
from at_fused.train.experiment import Experiment, Result
from at_fused.train.loop import Curve
from at_fused.train.networks import build
from at_fused.train.report import paired_difference, table_of
from at_fused.train.saved import load_network
from at_fused.train.speed import Way

METHODS = ("none", "at", "kd", "at+kd")
FILES = ("config.toml", "metrics.jsonl", "run.json", "report.md", "curves.png", "attention.png")


# ---- one run of the program


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and stdout of one run, long enough for a student to learn."""
    out = tmp_path_factory.mktemp("train") / "run"
    file = out.parent / "given.toml"
    more = {"preset": "digits-quick", "epochs": 100, "teacher_epochs": 4, "image_size": 8}
    file.write_text(to_toml(resolve({**more, "labels": 50, "lr": 0.2})))
    command = [sys.executable, "-m", "at_fused.train", "--config", str(file), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=out.parent)
    assert done.returncode == 0, done.stderr
    # Nothing but the table is said where there is no terminal.
    assert done.stderr == ""
    return out, done.stdout


@pytest.fixture(scope="module")
def lines(quick: tuple[Path, str]) -> list[dict[str, Any]]:
    return read(quick[0])


def last(lines: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return [line for line in lines if line["run"] == name][-1]


def weights(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True)["model"]


def read(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl of a run."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_run_writes_its_files(quick: tuple[Path, str]) -> None:
    out, _ = quick
    students = {f"student_{m}-seed{s}.pt" for m in METHODS for s in range(2)}
    assert {p.name for p in out.iterdir()} == {*FILES, "teacher.pt", "tensorboard", *students}
    facts = json.loads((out / "run.json").read_text())
    assert facts["torch"] == torch.__version__
    assert facts["layers"] == [[f"groups.{i}"] * 2 for i in range(3)]
    assert resolve(from_toml((out / "config.toml").read_text())).preset == "digits-quick"
    for name in ("curves.png", "attention.png"):
        assert (out / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert f"]({name})" in (out / "report.md").read_text()


def test_checkpoints_give_the_reported_accuracy(
    quick: tuple[Path, str], lines: list[dict[str, Any]]
) -> None:
    data = open_data("digits", image_size=8)
    rows = torch.arange(len(data.evaluate))
    ((images, labels, _),) = data.evaluate.batches([rows], None)
    for name in ("none-seed1", "at+kd-seed0"):
        student, state = load_network(quick[0] / f"student_{name}.pt")
        assert (state["image_size"], state["network"]) == (8, "wrn-10-1-b8")
        with torch.no_grad():
            right = (student(images)[0].argmax(1) == labels).double().mean().item()
        # One image of slack: another number of threads may round a tie the other way.
        assert 100 * right == pytest.approx(last(lines, name)["accuracy"], abs=0.21)


def test_metrics_are_complete_and_plausible(lines: list[dict[str, Any]]) -> None:
    names = [f"{m}-seed{s}" for s in range(2) for m in METHODS]
    assert list(dict.fromkeys(line["run"] for line in lines)) == ["teacher", *names]
    teacher = last(lines, "teacher")["accuracy"]
    assert teacher > 85
    for name in names:
        points = [line for line in lines if line["run"] == name]
        assert [p["epoch"] for p in points] == [20, 40, 60, 80, 100]
        # Chance is 10 %; a student of a few labels must neither fail nor cheat.
        assert 20 < points[-1]["accuracy"] < teacher + 1
        assert points[-1]["ce"] < points[0]["ce"]
        assert (points[-1]["transfer"] > 0) == (points[-1]["method"] != "none")
        assert points[0]["loss"] > points[-1]["loss"]
        assert points[0]["lr"] > points[-1]["lr"]
        assert points[0]["ms"] > 0
    assert np.mean([last(lines, name)["accuracy"] for name in names]) > 50


def test_the_table_says_what_the_metrics_say(
    quick: tuple[Path, str], lines: list[dict[str, Any]]
) -> None:
    accuracy = {
        m: np.array([last(lines, f"{m}-seed{s}")["accuracy"] for s in range(2)]) for m in METHODS
    }
    titles = {"none": "student alone", "at": "AT", "kd": "KD", "at+kd": r"AT \+ KD"}
    # d = 2, 1, 0, 5: mean 2, std 2.1602; t(0.975, 3) = 3.1824.
    mean, half = paired_difference(np.array([3.0, 5, 4, 8]), np.array([1.0, 4, 4, 3]))
    assert (mean, half) == pytest.approx((2.0, 3.1824 * 2.1602 / 2), rel=1e-4)
    assert "shortened, 100 of 140 epochs: no figures of the preset digits-quick" in quick[1]
    for method, title in titles.items():
        row = re.search(rf"^{title}  +(.*)$", quick[1], re.MULTILINE)
        assert row
        mean, std = map(float, row[1].split()[:2])
        assert mean == pytest.approx(accuracy[method].mean(), abs=0.006)
        assert std == pytest.approx(accuracy[method].std(ddof=1), abs=0.006)
        if method != "none":
            mean, half = paired_difference(accuracy[method], accuracy["none"])
            assert f"{mean:+.2f} +- {half:.2f}" in row[1]
    # The same in the report.
    assert f"| {accuracy['at'].mean():.2f} |" in (quick[0] / "report.md").read_text()


def test_tensorboard_has_the_curves(quick: tuple[Path, str], lines: list[dict[str, Any]]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(quick[0] / "tensorboard/at-seed1"))
    found.Reload()
    points = [line for line in lines if line["run"] == "at-seed1"]
    scalars = found.Scalars("accuracy")
    assert [s.step for s in scalars] == [p["step"] for p in points]
    assert [s.value for s in scalars] == pytest.approx([p["accuracy"] for p in points])


# ---- the parts of a report


def test_a_presets_table_has_the_published_error_beside_the_obtained() -> None:
    def curve(accuracy: float, **more: float) -> Curve:
        return Curve([{"step": 1, "accuracy": accuracy, "ms": 2.0, **more}], 3_000_000)

    config = resolve({"preset": "cifar-wrn-16-1-from-16-2", "compare": ("none", "at"), "seeds": 2})
    students = {"none": [curve(91.0), curve(92.0)], "at": [curve(92.0), curve(92.5)]}
    head, teacher, none, at = table_of(Result((93.5, 99.0), students), config)
    assert head[-4:] == ["test error", "published", "ms/step", "MB/step"]
    assert teacher == ["teacher", "93.50", "", "", "6.50", "6.31", "", ""]
    assert none == ["student alone", "91.50", "0.71", "", "8.50", "8.77", "2.0", "3.0"]
    assert at[4:6] == ["7.75", "7.93"]

    config = resolve({"preset": "imagenet-resnet18-from-34"})
    students = {"none": [curve(69.0, top5=88.0)], "at": [curve(70.0, top5=89.5)]}
    _, teacher, none, _ = table_of(Result((73.0, 91.0), students), config)
    assert teacher[1:5] == ["73.00", "91.00", "27.00 / 9.00", ""]
    assert none[3:5] == ["31.00 / 12.00", "30.40 / 10.80"]


def test_peak_memory_is_what_a_step_holds(capfd: pytest.CaptureFixture[str]) -> None:
    with memory.peak(torch.device("cpu")) as found:
        x = torch.zeros(1_000_000)
        y = x + 1
        del x
        z = y + 1
    assert 8_000_000 <= found.bytes <= 8_200_000
    del y, z
    assert capfd.readouterr().err == ""


# ---- data, networks and methods as a user combines them


def test_a_given_teacher_is_not_trained(tmp_path: Path) -> None:
    """Neither this program's file nor a plain state_dict."""
    run(small(compare=["at"]), tmp_path / "first")
    torch.save(weights(tmp_path / "first/teacher.pt"), tmp_path / "plain.pt")
    for name in ("first/teacher.pt", "plain.pt"):
        out = tmp_path / f"run-{name.replace('/', '-')}"
        result = run(small(compare=["at"], teacher_from=str(tmp_path / name)), out)
        assert "teacher" not in (out / "metrics.jsonl").read_text()
        assert result.teacher is not None
        # And a student of it is the first run's.
        for file in ("teacher.pt", "student_at-seed0.pt"):
            again = weights(out / file)
            first = weights(tmp_path / "first" / file)
            assert all(torch.equal(x, again[k]) for k, x in first.items())


def test_no_teacher_is_trained_for_methods_without_one(tmp_path: Path) -> None:
    result = run(small(compare=["none", "flip-symmetry"]), tmp_path)
    assert result.teacher is None
    assert not (tmp_path / "teacher.pt").exists()
    assert len(result.students["none"]) == 1


def test_a_cached_run_learns_and_asks_its_teacher_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two augmentations of each image the teacher runs twice, in 6 epochs of 2 methods."""
    config = small(compare=["at", "kd"], labels=20, batch_size=20, cache=2, workers=0)
    experiment = Experiment(config, tmp_path)
    calls = []
    experiment.teacher.register_forward_hook(lambda *a: calls.append(len(a[1][0])))
    tmp_path.mkdir(exist_ok=True)
    result = experiment.run()
    assert calls.count(20) == 2 + 2
    assert [len(c.points) for m in ("at", "kd") for c in result.students[m]] == [3, 3]
    assert (tmp_path / "cache/seed0").is_dir()


# ---- faster ways to run a step


@pytest.mark.long
@pytest.mark.parametrize("chosen", ["fp32", "bf16", "fp16"])
def test_a_faster_way_trains_alike(chosen: str, tmp_path: Path) -> None:
    """Losses of a short run agree with the plain program's, to what the precision allows."""
    changes = {"compare": ["none", "at", "at+kd"], "epochs": 4, "evaluate_every": 1}
    run(small(**changes), tmp_path / "exact")
    teacher = {"teacher_from": str(tmp_path / "exact/teacher.pt")}
    run(small(**changes, **teacher, speed=chosen, compile=False), tmp_path / chosen)
    exact, other = read(tmp_path / "exact"), read(tmp_path / chosen)
    tolerance = {"fp32": 2e-3, "bf16": 0.05, "fp16": 0.02}[chosen]
    firsts = [p for p in exact if p["epoch"] == 1 and p["run"] != "teacher"]
    assert len(firsts) == 3
    for a in firsts:
        (b,) = [p for p in other if p["epoch"] == 1 and p["run"] == a["run"]]
        assert b["loss"] == pytest.approx(a["loss"], rel=tolerance)
    facts = json.loads((tmp_path / chosen / "run.json").read_text())
    assert "channels_last, folded BatchNorm, fused SGD" in facts["steps_run_in"]["at"]


def test_where_torch_compile_fails_the_run_goes_on_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And has lost nothing: the trial step leaves no trace in the weights."""
    said: list[str] = []

    def broken(model: Any, **_: Any) -> Any:
        def fails(x: torch.Tensor) -> Any:
            model(x)  # BatchNorm's statistics move before it is noticed
            raise RuntimeError("no compiler found\nand more")

        return fails

    monkeypatch.setattr(torch, "compile", broken)
    config = small(compare=["none", "at"], speed="fp32")
    run(config, tmp_path / "compiled", log=said.append)
    assert said == [
        f"{name}: torch.compile failed, going on without: RuntimeError: no compiler found"
        for name in ("teacher", "none-seed0", "at-seed0")
    ]
    run(small(compare=["none", "at"], speed="fp32", compile=False), tmp_path / "plain")
    a, b = (weights(tmp_path / n / "student_at-seed0.pt") for n in ("compiled", "plain"))
    assert all(torch.equal(x, b[k]) for k, x in a.items())


@pytest.mark.long
def test_compiled_steps_train_alike(tmp_path: Path) -> None:
    """By torch.compile itself, of both networks, whole batches and an epoch's last."""
    said: list[str] = []
    changes = {"compare": ["at+kd"], "epochs": 2, "batch_size": 8, "labels": 20}
    changes |= {"evaluate_every": 1}
    run(small(**changes), tmp_path / "exact")
    teacher = {"teacher_from": str(tmp_path / "exact/teacher.pt"), "speed": "fp32"}
    run(small(**changes, **teacher), tmp_path / "compiled", log=said.append)
    assert said == []
    exact, other = read(tmp_path / "exact"), read(tmp_path / "compiled")
    for a, b in zip(exact[-2:], other[-2:], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-2)
        assert b["transfer"] == pytest.approx(a["transfer"], rel=2e-2)


def test_a_compiled_network_gets_batches_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(torch, "compile", lambda model, **_: lambda x: sizes.append(len(x)))
    model = build("wrn-10-1-b4", 10, 1)
    run_it = Way(compile=True).compiled(model, torch.device("cpu"), 8)
    for count in (8, 3, 8):
        run_it(torch.randn(count, 1, 8, 8))
    assert sizes == [8, 8]
    assert Way().compiled(model, torch.device("cpu"), 8) is model


def test_the_program_reports_how_steps_ran(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = resolve({**SMALL, "compare": ("none",), "speed": "bf16", "compile": False})
    assert program.run(config, tmp_path / "run") == 0
    assert "everything is in" in capsys.readouterr().out
    report = (tmp_path / "run/report.md").read_text()
    assert "- none: bfloat16, channels_last, folded BatchNorm, fused SGD" in report
