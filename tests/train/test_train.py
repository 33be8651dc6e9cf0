"""at-fused-train: whole small runs, what they leave behind, and how fast ways of running agree."""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import open_data
from train_runs import Listener, metrics, run, same, small, weights

from at_fused.train.checkpoints import CheckpointError
from at_fused.train.cli import main
from at_fused.train.config import from_toml, resolve
from at_fused.train.data import Samples
from at_fused.train.experiment import Experiment, Result
from at_fused.train.loop import Curve, Trainer, accuracy
from at_fused.train.report import duration, notes, paired_difference, searched, table_of
from at_fused.train.saved import load_network
from at_fused.train.speed import peak

METHODS = ("none", "at", "kd", "at+kd")
FILES = ("config.toml", "metrics.jsonl", "run.json", "report.md", "curves.png", "attention.png")


# ---- one run of the program


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
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
def lines(quick: tuple[Path, str]) -> list[dict[str, Any]]:
    return metrics(quick[0])


def last(lines: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return [line for line in lines if line["run"] == name][-1]


def test_run_writes_its_files(quick: tuple[Path, str]) -> None:
    out, _ = quick
    students = {f"student_{m}-seed{s}.pt" for m in METHODS for s in range(2)}
    more = {".lock", "checkpoints", "teacher.pt", "tensorboard"}
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
    assert f"- at: {facts['steps_run_in']['at']}" in report


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
        point = points[-1]
        assert (point["transfer"] > 0) == (point["method"] in ("at", "at+kd"))
        assert (point["kd"] > 0) == (point["method"] in ("kd", "at+kd"))
        base = point["kd"] if point["kd"] else point["ce"]
        assert point["loss"] == pytest.approx(base + point["transfer"], rel=1e-6)
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
    assert (
        "not comparable with the preset digits-quick: 100 of 140 epochs, its own image_size, "
        "labels, lr, teacher" in quick[1]
    )
    for method, title in titles.items():
        row = re.search(rf"^{title}  +(.*)$", quick[1], re.MULTILINE)
        assert row
        mean, std = map(float, row[1].split()[:2])
        assert mean == pytest.approx(accuracy[method].mean(), abs=0.006)
        assert std == pytest.approx(accuracy[method].std(ddof=1), abs=0.006)
        if method != "none":
            mean, _ = paired_difference(accuracy[method], accuracy["none"])
            # Two seeds have no interval worth the name.
            assert f" {mean:+.2f}  " in row[1]
            assert "+-" not in row[1]
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


def test_a_presets_table_has_the_published_error_beside_the_median() -> None:
    def curve(accuracy: float, **more: float) -> Curve:
        return Curve([{"step": 1, "accuracy": accuracy, "ms": 2.0, **more}], 3_000_000)

    config = resolve({"preset": "cifar-wrn-16-1-from-16-2", "compare": ("none", "at"), "seeds": 3})
    students = {
        "none": [curve(91.0), curve(92.0), curve(91.3)],
        "at": [curve(92.0), curve(94.0), curve(92.1)],
    }
    head, teacher, none, at = table_of(Result((93.5, 99.0), students), config)
    assert head[-4:] == ["median error", "published", "ms/step", "MB/step"]
    assert teacher == ["teacher", "93.50", "", "", "6.50", "6.31", "", ""]
    assert none == ["student alone", "91.43", "0.51", "", "8.70", "8.77", "2.0", "3.0"]
    # d = 1, 2, 0.8: mean 1.2667, std 0.6429; t(0.975, 2) = 4.3027.
    assert at[3:6] == ["+1.27 +- 1.60", "7.90", "7.93"]
    # Other networks are not the paper's.
    other = resolve({"data": "cifar10", "student": "wrn-10-1", "seeds": 3})
    assert "published" not in table_of(Result(None, students), other)[0]
    config = resolve({"preset": "imagenet-resnet18-from-34"})
    students = {"none": [curve(69.0, top5=88.0)], "at": [curve(70.0, top5=89.5)]}
    _, teacher, none, _ = table_of(Result((73.0, 91.0), students), config)
    assert teacher[1:5] == ["73.00", "91.00", "27.00 / 9.00", ""]
    assert none[3:5] == ["31.00 / 12.00", "30.40 / 10.80"]


def test_a_run_says_what_it_is_about_to_do_and_then_each_evaluation(
    quick: tuple[Path, str], lines: list[dict[str, Any]]
) -> None:
    """Without a terminal, as in a batch job."""
    out, said = quick
    for line in (
        f"folder    {out}",
        "data      digits: 997 images to train with, 500 to report on; 10 classes, 1x8x8",
        "teacher   wrn-10-1, 77,562 parameters",
        "student   wrn-10-1-b8, 19,714 parameters; sees 50 labelled images",
        "layers    groups.0:groups.0, groups.1:groups.1, groups.2:groups.2",
        "training  batches of 64, sgd, rate by cosine; 2 seeds, 896 steps in all",
        "runs in   float32 (teacher, none, at, kd, at+kd)",
    ):
        assert f"{line}\n" in said
    # The resolved options of each method: what was given, and the preset's where nothing was.
    rows = [" ".join(line.split()) for line in said.splitlines()]
    for row in (
        "epochs lr weight decay beta beta schedule p collapse form T alpha",
        "teacher 6 0.2 0.0005",
        "none 100 0.2 0.02",
        "at+kd 100 0.2 0.02 100 constant 2 mean code 4 0.9",
    ):
        assert row in rows
    points = [line for line in said.splitlines() if re.match(r"\S+: epoch ", line)]
    assert len(points) == len(lines)
    point = last(lines, "at-seed1")
    assert re.fullmatch(
        rf"at-seed1: epoch 100 of 100, loss {point['loss']:.4g} \(cross-entropy {point['ce']:.4g}, "
        rf"transfer {point['transfer']:.4g}\), accuracy {point['accuracy']:.2f} %, "
        rf"{point['ms']:.3g} ms a step, \d+ s left",
        next(line for line in reversed(points) if line.startswith("at-seed1")),
    )
    assert point["beta"] == 100
    assert last(lines, "kd-seed1")["beta"] == 0


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (119, "119 s"), (3600, "60 min"), (9000, "2.5 h")]
)
def test_times_left_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


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
    one, two = (weights(tmp_path / name)["teacher.pt"] for name in ("plain", "cached"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert any("all students saw the same 2 augmentations" in line for line in notes(config))


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
    validation = [point["validation"] for point in curve.points]
    best = validation.index(max(validation))
    assert best < 5
    assert curve.chosen == curve.points[best] != curve.points[-1]
    student, _ = load_network(tmp_path / "student_none-seed0.pt")
    found = accuracy(student, experiment.data.evaluate, torch.device("cpu"))
    assert found is not None
    assert found[0] == pytest.approx(curve.points[best]["accuracy"], abs=0.21)
    assert "20 % of the training images chose the epoch of each network" in notes(config)
    assert experiment.data.validation is not None
    assert len(experiment.data.validation) + len(experiment.data.train) == 997


def test_the_validation_share_chooses_beta(tmp_path: Path) -> None:
    config = small(compare=["none", "at"], seeds=2, validation=0.2, betas=(0.0, 1e6), epochs=4)
    result = run(config, tmp_path)
    found = result.searched["at"]
    assert [len(curves) for curves in found.values()] == [3, 3]  # whatever the number of seeds
    means = {
        beta: np.mean([curve.chosen["validation"] for curve in curves])
        for beta, curves in found.items()
    }
    chosen = max(means, key=lambda beta: means[beta])
    assert result.chosen("at") == chosen
    assert {p["beta"] for p in metrics(tmp_path) if p["run"] == "at-seed1"} == {chosen}
    assert json.loads((tmp_path / "run.json").read_text())["betas_chosen"] == {"at": chosen}
    rows = searched(result)
    assert rows[0] == ["validation accuracy, %, of beta", "0", "1e+06", "chosen"]
    assert rows[1][-1] == f"{chosen:g}"
    assert sorted(path.name for path in (tmp_path / "search").iterdir()) == [
        f"student_at-beta{beta}-seed{i}.pt" for beta in ("0", "1e+06") for i in range(3)
    ]
    # More seeds have the beta that was chosen, and nothing is trained again; other betas would
    # choose anew.
    before = weights(tmp_path)
    assert run(replace(config, seeds=3), tmp_path).chosen("at") == chosen
    after = weights(tmp_path)
    assert all(torch.equal(x, after[n][k]) for n, model in before.items() for k, x in model.items())
    with pytest.raises(CheckpointError, match=r"student_at-seed0.pt: was made with betas"):
        run(replace(config, betas=(50.0,)), tmp_path)
    assert "betas = [0.0, 1000000.0]" in (tmp_path / "config.toml").read_text()


# ---- faster ways to run a step


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("way", "tolerance"),
    [
        ({"speed": "fp32", "compile": False}, 2e-3),
        ({"speed": "bf16", "compile": False}, 0.05),
        ({"speed": "fp16", "compile": False}, 0.02),
        ({"speed": "fp32"}, 0.02),
    ],
    ids=["fp32", "bf16", "fp16", "compiled"],
)
def test_a_faster_way_trains_alike(way: dict[str, Any], tolerance: float, tmp_path: Path) -> None:
    """Losses of a short run agree with the plain program's, to what the precision allows."""
    changes = {"compare": ["none", "at", "at+kd"], "epochs": 2, "evaluate_every": 1}
    if "compile" not in way:  # of whole batches and an epoch's last
        changes |= {"compare": ["at+kd"], "batch_size": 8, "labels": 20}
    listener = Listener()
    run(small(**changes), tmp_path / "exact")
    teacher = {"teacher_from": str(tmp_path / "exact/teacher.pt")}
    run(small(**changes, **teacher, **way), tmp_path / "fast", listener)
    assert listener.said == []
    exact = {p["run"]: p for p in metrics(tmp_path / "exact") if p["epoch"] == 1}
    found = [p for p in metrics(tmp_path / "fast") if p["epoch"] == 1]
    assert len(found) == len(changes["compare"])
    for point in found:
        assert point["loss"] == pytest.approx(exact[point["run"]]["loss"], rel=tolerance)
    facts = json.loads((tmp_path / "fast/run.json").read_text())
    assert "channels_last" in facts["steps_run_in"]["at+kd"]
    assert "folded BatchNorm, fused SGD" in facts["steps_run_in"]["at+kd"]


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
