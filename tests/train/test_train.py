"""Complete small runs of at-fused-train: files, reports, beta, validation and fast modes."""

from __future__ import annotations

import io
import json
import math
import re
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_data import open_data
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train_runs import Listener, metrics, run, same_weights, small, stop_at_step, weights

from at_fused.balance import GradientRatio
from at_fused.train.checkpoints import CheckpointError
from at_fused.train.cli import main
from at_fused.train.config import from_toml, resolve
from at_fused.train.data import Samples
from at_fused.train.experiment import Experiment, Result
from at_fused.train.loop import Curve, NotFiniteError, Stopped, Trainer, accuracy
from at_fused.train.report import (
    beta_search_table,
    paired_difference,
    results_table,
    results_text,
    table_notes,
)
from at_fused.train.saved import load_network
from at_fused.train.speed import peak_memory

METHODS = ("none", "at", "kd", "at+kd")
Run, Lines = tuple[Path, str], list[dict[str, Any]]  # (folder, stdout), records of metrics.jsonl
FILES = ("config.toml", "metrics.jsonl", "run.json", "report.md", "curves.png", "attention.png")


# ---- a run of the program


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run the program long enough for students to learn; return its folder and stdout."""
    out = tmp_path_factory.mktemp("train") / "run"
    flags = "--preset=digits-quick --epochs=100 --teacher-epochs=6 --image-size=8 --labels=50 "
    flags += "--lr=0.2 --teacher=wrn-10-1"
    stdout, stderr = io.StringIO(), io.StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr), pytest.raises(SystemExit) as end:
        main([*flags.split(), f"--out={out}"])
    assert (end.value.code, stderr.getvalue()) == (0, "")
    assert f"results are in {out}" in stdout.getvalue()
    return out, stdout.getvalue()


@pytest.fixture(scope="module")
def lines(quick: Run) -> Lines:
    return metrics(quick[0])


def last_line(lines: Lines, name: str) -> dict[str, Any]:
    return [line for line in lines if line["run"] == name][-1]


def test_run_writes_all_files(quick: Run) -> None:
    out, _ = quick
    students = {f"student_{m}-seed{s}.pt" for m in METHODS for s in range(2)}
    others = {".lock", "cache", "checkpoints", "teacher.pt", "tensorboard"}
    assert {p.name for p in out.iterdir()} == {*FILES, *others, *students}
    states = {p.parent.name: p.name for p in out.glob("checkpoints/*/*")}
    assert len(states) == len(students) + 1
    assert states["at-seed0"] == "step-00000100.pt"
    facts = json.loads((out / "run.json").read_text())
    assert facts["torch"] == torch.__version__
    assert facts["layers"] == [[f"groups.{i}"] * 2 for i in range(3)]
    assert resolve(from_toml((out / "config.toml").read_text())).preset == "digits-quick"
    report = (out / "report.md").read_text()
    for name in ("curves.png", "attention.png"):
        assert (out / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert f"]({name})" in report
    assert f"at {facts['steps_run_in']['at']}" in report


def test_saved_networks_reproduce_the_reported_accuracy(quick: Run, lines: Lines) -> None:
    data = open_data("digits", image_size=8)
    for name in ("none-seed1", "at+kd-seed0"):
        student, state = load_network(quick[0] / f"student_{name}.pt")
        assert (state["image_size"], state["network"]) == (8, "wrn-10-1-b8")
        result = accuracy(student, data.evaluate, torch.device("cpu"))
        # One image of tolerance: another number of threads may round a tie differently.
        assert result is not None
        assert result[0] == pytest.approx(last_line(lines, name)["accuracy"], abs=0.21)


def test_metrics_are_complete_and_plausible(quick: Run, lines: Lines) -> None:
    names = [f"{m}-seed{s}" for s in range(2) for m in METHODS]
    assert list(dict.fromkeys(line["run"] for line in lines)) == ["teacher", *names]
    teacher = last_line(lines, "teacher")["accuracy"]
    assert teacher > 85
    for name in names:
        points = [line for line in lines if line["run"] == name]
        assert [p["epoch"] for p in points] == [30, 60, 90, 100]
        first, *_, point = points
        # Chance is 10 %. A student of few labels must learn, but not beat its teacher.
        assert 20 < point["accuracy"] < teacher + 1
        assert all(point[key] < first[key] for key in ("loss", "ce", "lr"))
        assert (point["transfer"] > 0) == (point["beta"] > 0) == (point["method"][:2] == "at")
        has_ratio = "gradient_ratio" in point and -1 <= point["gradient_cosine"] <= 1
        assert has_ratio == (point["beta"] > 0)
        assert (point["kd"] > 0) == (point["method"] in ("kd", "at+kd"))
        base = point["kd"] or point["ce"]
        assert point["loss"] == pytest.approx(base + point["transfer"], rel=1e-6)
        assert first["ms"] > 0
    assert np.mean([last_line(lines, name)["accuracy"] for name in names]) > 50
    # TensorBoard's files must agree.
    events = EventAccumulator(str(quick[0] / "tensorboard" / name))
    scalars = events.Reload().Scalars("accuracy")
    assert [s.step for s in scalars] == [p["step"] for p in points]
    assert [s.value for s in scalars] == pytest.approx([p["accuracy"] for p in points])


def cells(table: str) -> dict[str, list[str]]:
    """Return the rows of a Markdown table by their first cell."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return {first: rest for first, *rest in (row for row in rows if row)}


def test_results_table_agrees_with_metrics(quick: Run, lines: Lines) -> None:
    accuracy = {
        m: np.array([last_line(lines, f"{m}-seed{s}")["accuracy"] for s in range(2)])
        for m in METHODS
    }
    titles = {"none": "student alone", "at": "AT", "kd": "KD", "at+kd": "AT + KD"}
    # d = 2, 1, 0, 5: mean 2, std 2.1602; t(0.975, 3) = 3.1824.
    mean, half = paired_difference(np.array([3.0, 5, 4, 8]), np.array([1.0, 4, 4, 3]))
    assert (mean, half) == pytest.approx((2.0, 3.1824 * 2.1602 / 2), rel=1e-4)
    changed = "image_size, labels, teacher, epochs, lr, teacher_epochs"
    for text in (quick[1], (quick[0] / "report.md").read_text()):
        assert f"- preset digits-quick, changed: {changed}" in text
        rows = cells(next(part for part in text.split("\n\n") if "accuracy |" in part))
        assert rows[""][:4] == ["accuracy", "std", "vs. student alone", "vs. KD"]
        for method, title in titles.items():
            own = accuracy[method]
            assert rows[title][:2] == [f"{own.mean():.2f}", f"{own.std(ddof=1):.2f}"]
            # Two seeds are too few for an interval.
            mean, _ = paired_difference(own, accuracy["none"])
            assert rows[title][2] == (f"{mean:+.2f}" if method != "none" else "")
            mean, _ = paired_difference(own, accuracy["kd"])
            assert rows[title][3] == (f"{mean:+.2f}" if method == "at+kd" else "")


# ---- report


def test_preset_table_has_published_and_median_errors() -> None:
    def curve(accuracy: float, **others: float) -> Curve:
        return Curve([{"step": 1, "accuracy": accuracy, "ms": 2.0, **others}], 3_000_000)

    config = resolve({"preset": "cifar-wrn-16-1-from-16-2", "compare": ("none", "at"), "seeds": 3})
    students = {
        "none": [curve(91.0), curve(92.0), curve(91.3)],
        "at": [curve(92.0), curve(94.0), curve(92.1)],
    }
    rows = cells(results_table(Result((93.5, 99.0), students), config))
    columns = ["top-5", "vs. student alone", "median error", "published", "ms/step", "MB/step"]
    assert rows[""] == ["accuracy", "std", *columns]
    assert rows["teacher"] == ["93.50", "", "99.00", "", "6.50", "6.31", "", ""]
    assert rows["student alone"] == ["91.43", "0.51", "", "", "8.70", "8.77", "2.0", "3.0"]
    # d = 1, 2, 0.8: mean 1.2667, std 0.6429; t(0.975, 2) = 4.3027.
    assert rows["AT"][3:6] == ["+1.27 +- 1.60", "7.90", "7.93"]
    # No published errors for other networks than the paper's.
    other = resolve({"data": "cifar10", "student": "wrn-10-1", "seeds": 3})
    assert "published" not in results_table(Result(None, students), other)
    config = resolve({"preset": "imagenet-resnet18-from-34"})
    students = {"none": [curve(69.0, top5=88.0)], "at": [curve(70.0, top5=89.5)]}
    rows = cells(results_table(Result((73.0, 91.0), students), config))
    assert rows["teacher"][:3] == ["73.00", "91.00", ""]
    assert rows["student alone"][2:4] == ["31.00 / 12.00", "30.40 / 10.80"]


def test_stdout_has_summary_options_and_evaluations(quick: Run, lines: Lines) -> None:
    """Check the output without a terminal, as in a batch job."""
    out, stdout = quick
    for name, fact in (
        ("folder", f"{out}"),
        ("data", "digits 1x8x8, train 997, report on 500"),
        ("teacher", "wrn-10-1 77,562 parameters"),
        ("layers", "groups.0:groups.0, groups.1:groups.1, groups.2:groups.2"),
        ("steps", "896"),
        ("steps run in", "teacher float32, none float32, at float32, kd float32, at+kd float32"),
    ):
        assert f"{name:15} {fact}\n" in stdout
    # The resolved options of each method.
    rows = cells(stdout[: stdout.index("teacher:")])
    assert rows[""][:4] == ["epochs", "lr", "weight_decay", "beta"]
    assert rows["teacher"][:4] == ["6", "0.2", "0.0005", ""]
    assert " ".join(rows["at+kd"]) == "100 0.2 0.02 300 constant 2 mean code 4 0.9"
    points = [line for line in stdout.splitlines() if re.match(r"\S+: step ", line)]
    assert len(points) == len(lines)
    accuracy = last_line(lines, "at-seed1")["accuracy"]
    at = next(line for line in reversed(points) if line.startswith("at-seed1"))
    assert re.match(r"at-seed1: step 100, epoch 100, loss \S+, ce \S+, transfer \S+, beta 100", at)
    assert f"accuracy {accuracy:.4g}, " in at


def test_peak_memory_counts_the_tensors_of_a_step(capfd: pytest.CaptureFixture[str]) -> None:
    tensors = []

    def work() -> None:
        tensors.append(torch.zeros(1_000_000) + 1)
        tensors.append(tensors[0] + 1)

    assert 8_000_000 <= peak_memory(torch.device("cpu"), work) <= 8_200_000
    assert capfd.readouterr().err == ""


# ---- teacher and cache


def test_a_loaded_teacher_is_not_trained(tmp_path: Path) -> None:
    """Load it from a file of this program or a state_dict; methods without a teacher skip it."""
    run(small(compare=["at"]), tmp_path / "first")
    torch.save(weights(tmp_path / "first")["teacher.pt"], tmp_path / "plain.pt")
    for name in ("first/teacher.pt", "plain.pt"):
        out = tmp_path / f"run-{name.replace('/', '-')}"
        result = run(small(compare=["at"], teacher_from=str(tmp_path / name)), out)
        assert "teacher" not in (out / "metrics.jsonl").read_text()
        assert result.teacher is not None
        assert same_weights(tmp_path / "first", out)  # the student is the same, too
    result = run(small(compare=["none", "flip-symmetry"], epochs=1), tmp_path / "without")
    assert (result.teacher, len(result.students["none"])) == (None, 1)
    assert not (tmp_path / "without/teacher.pt").exists()


def test_cached_run_learns_and_calls_the_teacher_less(tmp_path: Path) -> None:
    """Expect a teacher pass for each of two augmentations, in 6 epochs of 2 methods.

    The teacher's own training has all augmentations.
    """
    run(small(compare=["kd"], batch_size=20, teacher_epochs=3, epochs=1), tmp_path / "plain")
    config = small(compare=["at", "kd"], batch_size=20, teacher_epochs=3, cache=2)
    experiment = Experiment(config, tmp_path / "cached")
    calls = []
    experiment.teacher.register_forward_hook(lambda *args: calls.append(len(args[1][0])))
    result = experiment.run()
    assert calls.count(20) == 2 + 2
    assert [len(c.points) for m in ("at", "kd") for c in result.students[m]] == [3, 3]
    assert (tmp_path / "cached/cache/seed0").is_dir()
    teachers = (weights(tmp_path / name)["teacher.pt"] for name in ("plain", "cached"))
    torch.testing.assert_close(*teachers, rtol=0, atol=0)


# ---- automatic beta


def test_auto_beta_is_set_by_the_first_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(compare=["at", "at+kd"], beta="auto", epochs=16, checkpoint_every=4)
    assert config.for_method("at").initial_beta("at") == "auto"
    result = run(config, tmp_path / "reference")
    records = [line for line in metrics(tmp_path / "reference") if line["method"] == "at"]
    (beta,) = {line["beta"] for line in records if line["step"] >= 10}
    # Memory is measured once beta is fixed, in step 11.
    assert all(curve.peak_bytes > 0 for curve in result.students["at"])
    # Measured before the update of each step, so that 3 is the mean ratio of the first ten.
    assert records[0]["beta"] != beta
    assert 0.1 < records[0]["gradient_ratio"] < 30
    # The report has the final beta of each method with a beta.
    assert f"automatic beta of AT: {beta:.3g} to {beta:.3g}" in results_text(result, config)
    assert records[-1]["auto_beta"] == beta
    assert 'beta = "auto"' in (tmp_path / "reference/config.toml").read_text()
    short = run(replace(config, epochs=4), tmp_path / "short")
    assert "(not final: 4 of 10 steps)" in results_text(short, config)
    # An interruption before or after the tenth step changes nothing.
    for step in (6, 13):
        out = tmp_path / f"stopped{step}"
        with monkeypatch.context() as patch:
            stop_at_step(step, patch)
            with pytest.raises(Stopped):
                run(config, out)
        run(config, out)
        assert same_weights(tmp_path / "reference", out)
    # A number instead of auto is another setting.
    with pytest.raises(CheckpointError, match="was trained with beta auto"):
        run(replace(config, beta=beta), tmp_path / "reference")


def test_report_has_auto_beta_without_its_schedule(tmp_path: Path) -> None:
    """Expect the initial value of the schedule, and a line only for methods with a beta."""
    config = small(compare=["none", "at"], beta="auto", beta_schedule="linear", epochs=12)
    result = run(config, tmp_path / "run")
    last = metrics(tmp_path / "run")[-1]
    assert last["beta"] == pytest.approx(last["auto_beta"] / 12)
    (line,) = [x for x in results_text(result, config).splitlines() if "automatic beta of" in x]
    beta = f"{last['auto_beta']:.3g}"
    assert line.endswith(f"automatic beta of AT: {beta} to {beta}")


def test_auto_beta_that_cannot_be_measured_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(compare=["at"], beta="auto", epochs=12)
    ratio = GradientRatio(0.0, 1.0, math.inf, 0.0)
    monkeypatch.setattr(Trainer, "gradient_ratio", lambda *_: ratio)
    message = "at-seed0: beta: 'auto' needs steps in which no gradient is 0"
    with pytest.raises(NotFiniteError, match=message):
        run(config, tmp_path / "run")


# ---- validation


def test_validation_selects_the_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare saved weights and reported accuracy with the best evaluation."""
    original = Trainer._accuracy

    def worse_later(self: Trainer, samples: Samples) -> tuple[float, float]:
        top1, top5 = original(self, samples)
        return top1 - 100 * (samples is self.job.data.validation and self.step > 60), top5

    monkeypatch.setattr(Trainer, "_accuracy", worse_later)
    config = small(compare=["none"], labels=0, validation=0.2, epochs=8, evaluate_every=1)
    experiment = Experiment(config, tmp_path)
    (curve,) = experiment.run().students["none"]
    best = max(curve.points, key=lambda point: point["validation"])
    assert curve.selected == best
    assert best["epoch"] < 6
    student, _ = load_network(tmp_path / "student_none-seed0.pt")
    result = accuracy(student, experiment.data.evaluate, torch.device("cpu"))
    assert result is not None
    assert result[0] == pytest.approx(best["accuracy"], abs=0.21)
    assert "epoch chosen on 20 % of the training images" in table_notes(config)
    parts = experiment.data.train, experiment.data.validation
    assert sum(len(part) for part in parts if part is not None) == 997


def test_validation_selects_beta(tmp_path: Path) -> None:
    config = small(compare=["none", "at"], seeds=2, validation=0.2, betas=(0.0, 1e6), epochs=4)
    result = run(config, tmp_path)
    search = result.beta_search["at"]
    assert [len(curves) for curves in search.values()] == [3, 3]  # not the number of seeds
    means = [np.mean([curve.selected["validation"] for curve in search[b]]) for b in config.betas]
    chosen = config.betas[int(np.argmax(means))]
    assert result.chosen_beta("at") == chosen
    assert {p["beta"] for p in metrics(tmp_path) if p["run"] == "at-seed1"} == {chosen}
    assert json.loads((tmp_path / "run.json").read_text())["betas_chosen"] == {"at": chosen}
    rows = cells(beta_search_table(result))
    assert rows[""] == ["0", "1000000", "chosen"]
    assert rows["validation accuracy (%) of AT by beta"][-1] == f"{chosen:.15g}"
    assert sorted(path.name for path in (tmp_path / "search").iterdir()) == [
        f"student_at-beta{beta}-seed{i}.pt" for beta in (0, 1000000) for i in range(3)
    ]
    # Another seed uses the chosen beta, and no network is trained again. Other betas are refused,
    # as they could change the choice.
    before = weights(tmp_path)
    assert run(replace(config, seeds=3), tmp_path).chosen_beta("at") == chosen
    torch.testing.assert_close({n: weights(tmp_path)[n] for n in before}, before, rtol=0, atol=0)
    with pytest.raises(CheckpointError, match=r"student_at-seed0.pt: was trained with betas"):
        run(replace(config, betas=(50.0,)), tmp_path)
    assert "betas = [0.0, 1000000.0]" in (tmp_path / "config.toml").read_text()


# ---- fast modes


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("speed", "compiled", "tolerance"),
    [("fp32", False, 2e-3), ("bf16", False, 0.05), ("fp16", False, 0.02), ("fp32", True, 0.02)],
)
def test_fast_modes_agree_with_exact(
    speed: str, compiled: bool, tolerance: float, tmp_path: Path
) -> None:
    """Losses of a short run agree within the precision."""
    changes = {"compare": ["none", "at", "at+kd"], "epochs": 2, "evaluate_every": 1}
    if compiled:  # full batches and a smaller last one
        changes |= {"compare": ["at+kd"], "batch_size": 8, "labels": 20}
    run(small(**changes), tmp_path / "exact")
    changes |= {"teacher_from": str(tmp_path / "exact/teacher.pt")}
    config = small(**changes, speed=speed, compile=compiled)
    run(config, tmp_path / "fast", listener := Listener())
    assert listener.logged == []
    exact = {p["run"]: p for p in metrics(tmp_path / "exact") if p["epoch"] == 1}
    records = [p for p in metrics(tmp_path / "fast") if p["epoch"] == 1]
    assert len(records) == len(config.compare)
    for point in records:
        assert point["loss"] == pytest.approx(exact[point["run"]]["loss"], rel=tolerance)
    mode = json.loads((tmp_path / "fast/run.json").read_text())["steps_run_in"]["at+kd"]
    assert "channels_last" in mode
    assert "folded BatchNorm, fused SGD" in mode


def test_run_continues_without_torch_compile_if_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check also that the trial step has no effect on the weights."""
    listener = Listener()

    def broken(model: Any, **_: Any) -> Any:
        def fails(x: torch.Tensor) -> Any:
            model(x)  # changes BatchNorm's statistics before it fails
            raise RuntimeError("no compiler found\nand more")

        return fails

    monkeypatch.setattr(torch, "compile", broken)
    config = small(compare=["none", "at"], speed="fp32")
    run(config, tmp_path / "compiled", listener)
    assert listener.logged == [
        f"{name}: torch.compile failed, continuing without it: RuntimeError: no compiler found"
        for name in ("teacher", "none-seed0", "at-seed0")
    ]
    run(small(compare=["none", "at"], speed="fp32", compile=False), tmp_path / "plain")
    assert same_weights(tmp_path / "compiled", tmp_path / "plain")
