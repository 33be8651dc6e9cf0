"""at-fused-train: whole small runs, what they leave behind, and how fast ways of running agree."""

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
from pictures import open_data
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train_runs import Listener, metrics, run, same, small, stop_in_step, weights

from at_fused.balance import GradientRatio
from at_fused.train.checkpoints import CheckpointError
from at_fused.train.cli import main
from at_fused.train.config import from_toml, resolve
from at_fused.train.data import Samples
from at_fused.train.experiment import Experiment, Result
from at_fused.train.loop import Curve, NotFiniteError, Stopped, Trainer, accuracy
from at_fused.train.report import notes, paired_difference, searched, table_of, text
from at_fused.train.saved import load_network
from at_fused.train.speed import peak

METHODS = ("none", "at", "kd", "at+kd")
Run, Lines = tuple[Path, str], list[dict[str, Any]]  # folder and stdout; metrics
FILES = ("config.toml", "metrics.jsonl", "run.json", "report.md", "curves.png", "attention.png")


# ---- one run of the program


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Folder and stdout of one run, long enough for a student to learn."""
    out = tmp_path_factory.mktemp("train") / "run"
    words = "--preset=digits-quick --epochs=100 --teacher-epochs=6 --image-size=8 --labels=50 "
    words += "--lr=0.2 --teacher=wrn-10-1"
    said, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(said), redirect_stderr(errors), pytest.raises(SystemExit) as end:
        main([*words.split(), f"--out={out}"])
    assert (end.value.code, errors.getvalue()) == (0, "")
    assert f"everything is in {out}" in said.getvalue()
    return out, said.getvalue()


@pytest.fixture(scope="module")
def lines(quick: Run) -> Lines:
    return metrics(quick[0])


def last(lines: Lines, name: str) -> dict[str, Any]:
    return [line for line in lines if line["run"] == name][-1]


def test_run_writes_its_files(quick: Run) -> None:
    out, _ = quick
    students = {f"student_{m}-seed{s}.pt" for m in METHODS for s in range(2)}
    more = {".lock", "cache", "checkpoints", "teacher.pt", "tensorboard"}
    assert {p.name for p in out.iterdir()} == {*FILES, *more, *students}
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


def test_checkpoints_give_the_reported_accuracy(quick: Run, lines: Lines) -> None:
    data = open_data("digits", image_size=8)
    for name in ("none-seed1", "at+kd-seed0"):
        student, state = load_network(quick[0] / f"student_{name}.pt")
        assert (state["image_size"], state["network"]) == (8, "wrn-10-1-b8")
        found = accuracy(student, data.evaluate, torch.device("cpu"))
        # One image of slack: another number of threads may round a tie the other way.
        assert found is not None
        assert found[0] == pytest.approx(last(lines, name)["accuracy"], abs=0.21)


def test_metrics_are_complete_and_plausible(quick: Run, lines: Lines) -> None:
    names = [f"{m}-seed{s}" for s in range(2) for m in METHODS]
    assert list(dict.fromkeys(line["run"] for line in lines)) == ["teacher", *names]
    teacher = last(lines, "teacher")["accuracy"]
    assert teacher > 85
    for name in names:
        points = [line for line in lines if line["run"] == name]
        assert [p["epoch"] for p in points] == [30, 60, 90, 100]
        first, *_, point = points
        # Chance is 10 %; a student of a few labels must neither fail nor cheat.
        assert 20 < point["accuracy"] < teacher + 1
        assert all(point[key] < first[key] for key in ("loss", "ce", "lr"))
        assert (point["transfer"] > 0) == (point["beta"] > 0) == (point["method"][:2] == "at")
        transfers = "gradient_ratio" in point and -1 <= point["gradient_cosine"] <= 1
        assert transfers == (point["beta"] > 0)
        assert (point["kd"] > 0) == (point["method"] in ("kd", "at+kd"))
        base = point["kd"] or point["ce"]
        assert point["loss"] == pytest.approx(base + point["transfer"], rel=1e-6)
        assert first["ms"] > 0
    assert np.mean([last(lines, name)["accuracy"] for name in names]) > 50
    # TensorBoard has the same.
    found = EventAccumulator(str(quick[0] / "tensorboard" / name))
    scalars = found.Reload().Scalars("accuracy")
    assert [s.step for s in scalars] == [p["step"] for p in points]
    assert [s.value for s in scalars] == pytest.approx([p["accuracy"] for p in points])


def cells(table: str) -> dict[str, list[str]]:
    """The rows of a table by their first cell."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return {first: rest for first, *rest in (row for row in rows if row)}


def test_the_table_says_what_the_metrics_say(quick: Run, lines: Lines) -> None:
    accuracy = {
        m: np.array([last(lines, f"{m}-seed{s}")["accuracy"] for s in range(2)]) for m in METHODS
    }
    titles = {"none": "student alone", "at": "AT", "kd": "KD", "at+kd": "AT + KD"}
    # d = 2, 1, 0, 5: mean 2, std 2.1602; t(0.975, 3) = 3.1824.
    mean, half = paired_difference(np.array([3.0, 5, 4, 8]), np.array([1.0, 4, 4, 3]))
    assert (mean, half) == pytest.approx((2.0, 3.1824 * 2.1602 / 2), rel=1e-4)
    but = "image_size, labels, teacher, epochs, lr, teacher_epochs"  # what was given
    for said in (quick[1], (quick[0] / "report.md").read_text()):
        assert f"- preset digits-quick, but for {but}" in said
        rows = cells(next(each for each in said.split("\n\n") if "accuracy |" in each))
        assert rows[""][:4] == ["accuracy", "std", "to student alone", "to KD"]
        for method, title in titles.items():
            found = accuracy[method]
            assert rows[title][:2] == [f"{found.mean():.2f}", f"{found.std(ddof=1):.2f}"]
            # Two seeds have no interval worth the name.
            mean, _ = paired_difference(found, accuracy["none"])
            assert rows[title][2] == (f"{mean:+.2f}" if method != "none" else "")
            mean, _ = paired_difference(found, accuracy["kd"])
            assert rows[title][3] == (f"{mean:+.2f}" if method == "at+kd" else "")


# ---- the parts of a report


def test_a_presets_table_has_the_published_error_beside_the_median() -> None:
    def curve(accuracy: float, **more: float) -> Curve:
        return Curve([{"step": 1, "accuracy": accuracy, "ms": 2.0, **more}], 3_000_000)

    config = resolve({"preset": "cifar-wrn-16-1-from-16-2", "compare": ("none", "at"), "seeds": 3})
    students = {
        "none": [curve(91.0), curve(92.0), curve(91.3)],
        "at": [curve(92.0), curve(94.0), curve(92.1)],
    }
    rows = cells(table_of(Result((93.5, 99.0), students), config))
    columns = ["top-5", "to student alone", "median error", "published", "ms/step", "MB/step"]
    assert rows[""] == ["accuracy", "std", *columns]
    assert rows["teacher"] == ["93.50", "", "99.00", "", "6.50", "6.31", "", ""]
    assert rows["student alone"] == ["91.43", "0.51", "", "", "8.70", "8.77", "2.0", "3.0"]
    # d = 1, 2, 0.8: mean 1.2667, std 0.6429; t(0.975, 2) = 4.3027.
    assert rows["AT"][3:6] == ["+1.27 +- 1.60", "7.90", "7.93"]
    # Other networks are not the paper's.
    other = resolve({"data": "cifar10", "student": "wrn-10-1", "seeds": 3})
    assert "published" not in table_of(Result(None, students), other)
    config = resolve({"preset": "imagenet-resnet18-from-34"})
    students = {"none": [curve(69.0, top5=88.0)], "at": [curve(70.0, top5=89.5)]}
    rows = cells(table_of(Result((73.0, 91.0), students), config))
    assert rows["teacher"][:3] == ["73.00", "91.00", ""]
    assert rows["student alone"][2:4] == ["31.00 / 12.00", "30.40 / 10.80"]


def test_a_run_says_what_it_is_about_to_do_and_then_each_evaluation(
    quick: Run, lines: Lines
) -> None:
    """Without a terminal, as in a batch job."""
    out, said = quick
    for name, fact in (
        ("folder", f"{out}"),
        ("data", "digits 1x8x8, train 997, report on 500"),
        ("teacher", "wrn-10-1 77,562 parameters"),
        ("layers", "groups.0:groups.0, groups.1:groups.1, groups.2:groups.2"),
        ("steps", "896"),
        ("steps run in", "teacher float32, none float32, at float32, kd float32, at+kd float32"),
    ):
        assert f"{name:15} {fact}\n" in said
    # The resolved options of each method: what was given, and the preset's where nothing was.
    rows = cells(said[: said.index("teacher:")])
    assert rows[""][:4] == ["epochs", "lr", "weight_decay", "beta"]
    assert rows["teacher"][:4] == ["6", "0.2", "0.0005", ""]
    assert " ".join(rows["at+kd"]) == "100 0.2 0.02 300 constant 2 mean code 4 0.9"
    points = [line for line in said.splitlines() if re.match(r"\S+: step ", line)]
    assert len(points) == len(lines)
    accuracy = last(lines, "at-seed1")["accuracy"]
    at = next(line for line in reversed(points) if line.startswith("at-seed1"))
    assert re.match(r"at-seed1: step 100, epoch 100, loss \S+, ce \S+, transfer \S+, beta 100", at)
    assert f"accuracy {accuracy:.4g}, " in at


def test_peak_memory_is_what_a_step_holds(capfd: pytest.CaptureFixture[str]) -> None:
    kept = []

    def work() -> None:
        kept.append(torch.zeros(1_000_000) + 1)
        kept.append(kept[0] + 1)

    assert 8_000_000 <= peak(torch.device("cpu"), work) <= 8_200_000
    assert capfd.readouterr().err == ""


# ---- data, networks and methods as a user combines them


def test_a_given_teacher_is_not_trained(tmp_path: Path) -> None:
    """Neither this program's file nor a plain state_dict; and none is where no method has one."""
    run(small(compare=["at"]), tmp_path / "first")
    torch.save(weights(tmp_path / "first")["teacher.pt"], tmp_path / "plain.pt")
    for name in ("first/teacher.pt", "plain.pt"):
        out = tmp_path / f"run-{name.replace('/', '-')}"
        result = run(small(compare=["at"], teacher_from=str(tmp_path / name)), out)
        assert "teacher" not in (out / "metrics.jsonl").read_text()
        assert result.teacher is not None
        assert same(tmp_path / "first", out)  # its student as well
    result = run(small(compare=["none", "flip-symmetry"], epochs=1), tmp_path / "without")
    assert (result.teacher, len(result.students["none"])) == (None, 1)
    assert not (tmp_path / "without/teacher.pt").exists()


def test_a_cached_run_learns_and_asks_its_teacher_less(tmp_path: Path) -> None:
    """With two augmentations of each image the teacher runs twice, in 6 epochs of 2 methods.

    Its own training is not limited.
    """
    run(small(compare=["kd"], batch_size=20, teacher_epochs=3, epochs=1), tmp_path / "plain")
    config = small(compare=["at", "kd"], batch_size=20, teacher_epochs=3, cache=2)
    experiment = Experiment(config, tmp_path / "cached")
    calls = []
    experiment.teacher.register_forward_hook(lambda *a: calls.append(len(a[1][0])))
    result = experiment.run()
    assert calls.count(20) == 2 + 2
    assert [len(c.points) for m in ("at", "kd") for c in result.students[m]] == [3, 3]
    assert (tmp_path / "cached/cache/seed0").is_dir()
    teachers = (weights(tmp_path / name)["teacher.pt"] for name in ("plain", "cached"))
    torch.testing.assert_close(*teachers, rtol=0, atol=0)


# ---- beta by the first gradients


def test_beta_by_the_first_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(compare=["at", "at+kd"], beta="auto", epochs=16, checkpoint_every=4)
    assert config.for_method("at").beta_of("at") == "auto"
    result = run(config, tmp_path / "whole")
    found = [line for line in metrics(tmp_path / "whole") if line["method"] == "at"]
    (beta,) = {line["beta"] for line in found if line["step"] >= 10}
    # Taken once beta is fixed: in the run's step 11.
    assert all(curve.peak_bytes > 0 for curve in result.students["at"])
    # Measured at the step, so that 3 is the ratio in the middle of the first ten.
    assert found[0]["beta"] != beta
    assert 0.1 < found[0]["gradient_ratio"] < 30
    # The report has the one that was fixed, of the methods that have one.
    assert f"beta auto of AT: {beta:.3g} to {beta:.3g}" in text(result, config)
    assert found[-1]["auto_beta"] == beta
    assert 'beta = "auto"' in (tmp_path / "whole/config.toml").read_text()
    short = run(replace(config, epochs=4), tmp_path / "short")
    assert ", not fixed yet: 4 of 10 steps" in text(short, config)
    # A run that is interrupted in these steps, or after, comes to the same.
    for step in (6, 13):
        out = tmp_path / f"stopped{step}"
        with monkeypatch.context() as patch:
            stop_in_step(step, patch)
            with pytest.raises(Stopped):
                run(config, out)
        run(config, out)
        assert same(tmp_path / "whole", out)
    # Half of the steps' ratios are no beta to go on with.
    with pytest.raises(CheckpointError, match="was made with beta auto"):
        run(replace(config, beta=beta), tmp_path / "whole")


def test_auto_beta_and_a_schedule(tmp_path: Path) -> None:
    """The report has the beta that the schedule begins with; other methods have none."""
    config = small(compare=["none", "at"], beta="auto", beta_schedule="linear", epochs=12)
    result = run(config, tmp_path / "run")
    last = metrics(tmp_path / "run")[-1]
    assert last["beta"] == pytest.approx(last["auto_beta"] / 12)
    (line,) = [line for line in text(result, config).splitlines() if "beta auto of" in line]
    assert line.endswith(f"beta auto of AT: {last['auto_beta']:.3g} to {last['auto_beta']:.3g}")


def test_auto_beta_that_cannot_be_measured_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(compare=["at"], beta="auto", epochs=12)
    found = GradientRatio(0.0, 1.0, math.inf, 0.0)
    monkeypatch.setattr(Trainer, "gradient_ratio", lambda *_: found)
    words = "at-seed0: beta: 'auto' needs steps in which neither gradient is 0"
    with pytest.raises(NotFiniteError, match=words):
        run(config, tmp_path / "run")


# ---- a validation share


def test_the_validation_share_chooses_the_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights that are kept and the accuracy that is reported are of its best evaluation."""
    found_by = Trainer._accuracy

    def worse_later(self: Trainer, samples: Samples) -> tuple[float, float]:
        top1, top5 = found_by(self, samples)
        return top1 - 100 * (samples is self.job.data.validation and self.step > 60), top5

    monkeypatch.setattr(Trainer, "_accuracy", worse_later)
    config = small(compare=["none"], labels=0, validation=0.2, epochs=8, evaluate_every=1)
    experiment = Experiment(config, tmp_path)
    (curve,) = experiment.run().students["none"]
    best = max(curve.points, key=lambda point: point["validation"])
    assert curve.chosen == best
    assert best["epoch"] < 6
    student, _ = load_network(tmp_path / "student_none-seed0.pt")
    found = accuracy(student, experiment.data.evaluate, torch.device("cpu"))
    assert found is not None
    assert found[0] == pytest.approx(best["accuracy"], abs=0.21)
    assert "20 % of the training images chose the epoch of each network" in notes(config)
    parts = experiment.data.train, experiment.data.validation
    assert sum(len(part) for part in parts if part is not None) == 997


def test_the_validation_share_chooses_beta(tmp_path: Path) -> None:
    config = small(compare=["none", "at"], seeds=2, validation=0.2, betas=(0.0, 1e6), epochs=4)
    result = run(config, tmp_path)
    found = result.searched["at"]
    assert [len(curves) for curves in found.values()] == [3, 3]  # whatever the number of seeds
    means = [np.mean([curve.chosen["validation"] for curve in found[b]]) for b in config.betas]
    chosen = config.betas[int(np.argmax(means))]
    assert result.chosen("at") == chosen
    assert {p["beta"] for p in metrics(tmp_path) if p["run"] == "at-seed1"} == {chosen}
    assert json.loads((tmp_path / "run.json").read_text())["betas_chosen"] == {"at": chosen}
    rows = cells(searched(result))
    assert rows[""] == ["0", "1000000", "chosen"]
    assert rows["validation accuracy, %, of AT by beta"][-1] == f"{chosen:.15g}"
    assert sorted(path.name for path in (tmp_path / "search").iterdir()) == [
        f"student_at-beta{beta}-seed{i}.pt" for beta in (0, 1000000) for i in range(3)
    ]
    # More seeds have the beta that was chosen, and nothing is trained again; other betas would
    # choose anew.
    before = weights(tmp_path)
    assert run(replace(config, seeds=3), tmp_path).chosen("at") == chosen
    torch.testing.assert_close({n: weights(tmp_path)[n] for n in before}, before, rtol=0, atol=0)
    with pytest.raises(CheckpointError, match=r"student_at-seed0.pt: was made with betas"):
        run(replace(config, betas=(50.0,)), tmp_path)
    assert "betas = [0.0, 1000000.0]" in (tmp_path / "config.toml").read_text()


# ---- faster ways to run a step


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("speed", "compiled", "tolerance"),
    [("fp32", False, 2e-3), ("bf16", False, 0.05), ("fp16", False, 0.02), ("fp32", True, 0.02)],
)
def test_a_faster_way_trains_alike(
    speed: str, compiled: bool, tolerance: float, tmp_path: Path
) -> None:
    """Losses of a short run agree with the plain program's, to what the precision allows."""
    changes = {"compare": ["none", "at", "at+kd"], "epochs": 2, "evaluate_every": 1}
    if compiled:  # of whole batches and an epoch's last
        changes |= {"compare": ["at+kd"], "batch_size": 8, "labels": 20}
    run(small(**changes), tmp_path / "exact")
    changes |= {"teacher_from": str(tmp_path / "exact/teacher.pt")}
    config = small(**changes, speed=speed, compile=compiled)
    run(config, tmp_path / "fast", listener := Listener())
    assert listener.said == []
    exact = {p["run"]: p for p in metrics(tmp_path / "exact") if p["epoch"] == 1}
    found = [p for p in metrics(tmp_path / "fast") if p["epoch"] == 1]
    assert len(found) == len(config.compare)
    for point in found:
        assert point["loss"] == pytest.approx(exact[point["run"]]["loss"], rel=tolerance)
    mode = json.loads((tmp_path / "fast/run.json").read_text())["steps_run_in"]["at+kd"]
    assert "channels_last" in mode
    assert "folded BatchNorm, fused SGD" in mode


def test_where_torch_compile_fails_the_run_goes_on_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And has lost nothing: the trial step leaves no trace in the weights."""
    listener = Listener()

    def broken(model: Any, **_: Any) -> Any:
        def fails(x: torch.Tensor) -> Any:
            model(x)  # BatchNorm's statistics move before it is noticed
            raise RuntimeError("no compiler found\nand more")

        return fails

    monkeypatch.setattr(torch, "compile", broken)
    config = small(compare=["none", "at"], speed="fp32")
    run(config, tmp_path / "compiled", listener)
    assert listener.said == [
        f"{name}: torch.compile failed, going on without: RuntimeError: no compiler found"
        for name in ("teacher", "none-seed0", "at-seed0")
    ]
    run(small(compare=["none", "at"], speed="fp32", compile=False), tmp_path / "plain")
    assert same(tmp_path / "compiled", tmp_path / "plain")
