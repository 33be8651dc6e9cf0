"""at-fused-train: its network, its data, its command line, and one whole small run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import at_fused
from at_fused.train.cli import build_parser, main, settings
from at_fused.train.config import FULL, QUICK
from at_fused.train.data import few_labels, load_digits, random_shift
from at_fused.train.experiment import load, run
from at_fused.train.report import paired_difference
from at_fused.train.wrn import WRN, count_parameters

TEST_HEAD = [1768, 687, 1066, 1223, 858, 1656, 775, 288]
VAL_HEAD = [1724, 59, 1172, 1777, 1528, 829, 238, 1348]
METHODS = ("alone", "at_fused", "at_eager")


# --- the network


@pytest.mark.parametrize(
    ("depth", "width", "millions"), [(16, 1, 0.18), (16, 2, 0.69), (40, 1, 0.56), (40, 2, 2.24)]
)
def test_wrn_has_the_published_size(depth: int, width: int, millions: float) -> None:
    assert count_parameters(WRN(depth, width)) / 1e6 == pytest.approx(millions, abs=0.006)


def test_wrn_10_1_counted_by_hand() -> None:
    stem = 3 * 16 * 9
    # A block: BN in, conv, BN out, conv, and a 1x1 projection where the shape changes.
    g0 = 2 * 16 + 16 * 16 * 9 + 2 * 16 + 16 * 16 * 9
    g1 = 2 * 16 + 16 * 32 * 9 + 2 * 32 + 32 * 32 * 9 + 16 * 32
    g2 = 2 * 32 + 32 * 64 * 9 + 2 * 64 + 64 * 64 * 9 + 32 * 64
    head = 2 * 64 + 64 * 10 + 10
    assert count_parameters(WRN(10, 1)) == stem + g0 + g1 + g2 + head


@pytest.mark.parametrize(
    ("depth", "width", "base", "size"), [(10, 1, 8, 16), (16, 2, 16, 16), (22, 3, 4, 32)]
)
def test_wrn_shapes(depth: int, width: int, base: int, size: int) -> None:
    model = WRN(depth, width, classes=7, in_channels=1, base=base)
    logits, features = model(torch.randn(2, 1, size, size))
    c = base * width
    assert logits.shape == (2, 7)
    assert [tuple(g.shape) for g in features] == [
        (2, c, size, size),
        (2, 2 * c, size // 2, size // 2),
        (2, 4 * c, size // 4, size // 4),
    ]


def test_features_are_signed_and_feed_the_logits() -> None:
    torch.manual_seed(0)
    logits, features = WRN(10, 1)(torch.randn(4, 3, 16, 16))
    assert all(g.min() < 0 < g.max() for g in features)
    grads = torch.autograd.grad(logits.sum(), features)
    assert all(g.abs().max() > 0 for g in grads)


@pytest.mark.parametrize("depth", [4, 12, 20])
def test_wrn_refuses_a_depth_that_is_not_6n_plus_4(depth: int) -> None:
    with pytest.raises(ValueError, match=f"6n \\+ 4.*got {depth}"):
        WRN(depth, 1)


# --- the data


def test_split_is_disjoint_complete_and_stratified() -> None:
    images, labels, split = load_digits(16)
    parts = (split.train, split.val, split.test)
    assert [len(p) for p in parts] == [997, 300, 500]
    assert images.shape == (1797, 1, 16, 16)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(1797))
    whole = labels.bincount() / len(labels)
    for part in parts:
        share = labels[part].bincount(minlength=10) / len(part)
        # Stratified: every class within one image of its share (of rounding, for the val part).
        assert ((share - whole).abs() * len(part)).max() < 1.5


def test_split_is_stable() -> None:
    """These are the held-out images: a change here changes every published figure."""
    _, _, first = load_digits(8)
    _, _, again = load_digits(16)
    assert torch.equal(first.test, again.test)
    assert torch.equal(first.val, again.val)
    assert first.test[:8].tolist() == TEST_HEAD
    assert first.val[:8].tolist() == VAL_HEAD


def test_images_are_standardised_by_the_training_part() -> None:
    images, _, split = load_digits(16)
    assert images[split.train].mean().abs() < 1e-5
    assert images[split.train].std() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("count", [10, 25, 50])
def test_few_labels_are_balanced_seeded_training_images(count: int) -> None:
    _, labels, split = load_digits(8)
    idx = few_labels(labels, split.train, count, seed=3)
    assert len(set(idx.tolist())) == count
    assert set(idx.tolist()) <= set(split.train.tolist())
    per_class = labels[idx].bincount(minlength=10)
    assert per_class.max() - per_class.min() == (1 if count % 10 else 0)
    assert torch.equal(idx, few_labels(labels, split.train, count, seed=3))
    assert not torch.equal(idx, few_labels(labels, split.train, count, seed=4))


def test_random_shift_moves_whole_images() -> None:
    image = torch.zeros(1, 1, 6, 6)
    image[0, 0, 2, 3] = 1.0
    g = torch.Generator().manual_seed(0)
    moved = random_shift(image.expand(200, 1, 6, 6), 1, g)
    assert moved.sum(dim=(1, 2, 3)).eq(1).all()
    places = {divmod(int(i), 6) for i in moved.flatten(1).argmax(1)}
    assert places == {(2 + dy, 3 + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)}


# --- the report


def test_paired_difference_is_the_textbook_interval() -> None:
    a, b = torch.tensor([3.0, 5.0, 4.0, 8.0]).numpy(), torch.tensor([1.0, 4.0, 4.0, 3.0]).numpy()
    # d = 2, 1, 0, 5: mean 2, std 2.1602; t(0.975, 3) = 3.1824.
    mean, half = paired_difference(a, b)
    assert mean == pytest.approx(2.0)
    assert half == pytest.approx(3.1824 * 2.1602 / 2, rel=1e-4)


# --- the command line


def test_help_needs_no_torch() -> None:
    # The parent package is stubbed out: what it imports is its own affair, and tested there.
    code = (
        "import sys, types\n"
        "stub = types.ModuleType('at_fused')\n"
        f"stub.__path__ = {list(at_fused.__path__)!r}\n"
        "sys.modules['at_fused'] = stub\n"
        "from at_fused.train.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as e:\n    assert e.code == 0\n"
        "heavy = {'torch', 'numpy', 'scipy', 'sklearn', 'matplotlib', 'tqdm'}\n"
        "print('LOADED', heavy & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--teacher-steps" in done.stdout
    assert "LOADED set()" in done.stdout


@pytest.mark.parametrize(
    ("flag", "value", "allowed"),
    [
        ("--labels", "9", "a whole number from 10 to 997"),
        ("--labels", "many", "a whole number from 10 to 997"),
        ("--beta", "-1", "a number from 0 to 1e+06"),
        ("--beta", "nan", "a number from 0 to 1e+06"),
        ("--p", "0.5", "a number from 1 to 8"),
        ("--seeds", "1", "a whole number from 2 to 100"),
        ("--steps", "0", "a whole number from 1 to 100000"),
        ("--teacher-steps", "1.5", "a whole number from 1 to 100000"),
        ("--threads", "0", "a whole number from 1 to 1024"),
        ("--device", "tpu", "cpu, cuda or cuda:N"),
        ("--device", "cuda:99", "cpu"),
    ],
)
def test_a_bad_value_is_one_clear_error(
    flag: str, value: str, allowed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([f"{flag}={value}", "--out", str(tmp_path / "run")])
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"argument {flag}: got {value!r}" in last
    assert f"allowed is {allowed}" in last
    assert not (tmp_path / "run").exists()


def test_flags_override_the_quick_preset() -> None:
    given = vars(build_parser().parse_args(["--quick", "--seeds=3", "--beta", "1e2"]))
    assert settings(given) == replace(QUICK, seeds=3, beta=100.0)
    assert settings({}) == FULL


def test_an_existing_run_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "config.json"
    old.write_text("kept")
    with pytest.raises(SystemExit) as stop:
        main(["--quick", "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert f"argument --out: got {str(tmp_path)!r}" in capsys.readouterr().err
    assert old.read_text() == "kept"
    assert list(tmp_path.iterdir()) == [old]


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(module: str) -> object:
        return None if module == "sklearn" else find_spec(module)

    monkeypatch.setattr("at_fused.train.cli.find_spec", find)
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(tmp_path / "run")])
    message = str(stop.value.code)
    assert message == 'at-fused-train: needs scikit-learn: pip install "at_fused[train]"'
    assert not (tmp_path / "run").exists()


# --- one whole small run


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and stdout of one --quick run."""
    out = tmp_path_factory.mktemp("train") / "run"
    command = [sys.executable, "-m", "at_fused.train", "--quick", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=out.parent)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.fixture(scope="module")
def lines(quick: tuple[Path, str]) -> list[dict[str, Any]]:
    """metrics.jsonl, read."""
    return [json.loads(line) for line in (quick[0] / "metrics.jsonl").read_text().splitlines()]


def test_run_writes_its_files(quick: tuple[Path, str]) -> None:
    out, _ = quick
    students = {f"student_{m}_seed{s}.pt" for m in METHODS for s in range(2)}
    expected = {"config.json", "metrics.jsonl", "curves.png", "teacher.pt"} | students
    assert {p.name for p in out.iterdir()} == expected
    assert (out / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    config = json.loads((out / "config.json").read_text())
    assert config["quick"] is True
    assert config["seeds"] == 2
    assert config["torch"] == torch.__version__
    assert config["at_fused"]


def test_checkpoints_give_the_reported_accuracy(
    quick: tuple[Path, str], lines: list[dict[str, Any]]
) -> None:
    config = json.loads((quick[0] / "config.json").read_text())
    images, labels, split = load_digits(config["image_size"])
    reported = {(r["method"], r["seed"]): r["accuracy"] for r in lines if r["kind"] == "summary"}
    for method in METHODS:
        path = quick[0] / f"student_{method}_seed1.pt"
        saved = torch.load(path, weights_only=True)
        assert len(saved["labelled"]) == config["labels"]
        assert set(saved["labelled"].tolist()) <= set(split.train.tolist())
        student, size = load(path)
        assert size == config["image_size"]
        with torch.no_grad():
            logits, _ = student(images[split.test])
        right = (logits.argmax(1) == labels[split.test]).double().mean().item()
        # One image of slack: another number of threads may round a tie the other way.
        assert 100 * right == pytest.approx(reported[method, 1], abs=0.21)


def test_metrics_are_complete_and_plausible(lines: list[dict[str, Any]]) -> None:
    summaries = [r for r in lines if r["kind"] == "summary"]
    runs = [(r["method"], r["seed"]) for r in summaries]
    assert runs[1:] == [(m, s) for s in range(2) for m in METHODS]
    assert runs[0][0] == "teacher"
    assert summaries[0]["accuracy"] > 85
    for r in summaries[1:]:
        # Chance is 10 %; a student of a few labels must neither fail nor cheat.
        assert 40 < r["accuracy"] < summaries[0]["accuracy"]
        assert (r["at_ms"] > 0) == (r["method"] != "alone")
        assert r["seconds"] > 0
        steps = [
            p
            for p in lines
            if p["kind"] == "step" and (p["method"], p["seed"]) == (r["method"], r["seed"])
        ]
        assert [p["step"] for p in steps] == [1, *range(20, 141, 20)]
        assert steps[-1]["ce"] < steps[0]["ce"] / 2
        assert steps[-1]["accuracy"] == r["accuracy"]
        if r["method"] != "alone":
            assert steps[-1]["at"] < steps[0]["at"]


def test_fused_and_eager_curves_agree(lines: list[dict[str, Any]]) -> None:
    (check,) = [r for r in lines if r["kind"] == "check"]
    assert 0 <= check["largest_relative_difference"] < 1e-9
    first = {
        (p["method"], p["seed"]): p["at"]
        for p in lines
        if p["kind"] == "step" and p["step"] == 1 and p["method"] in METHODS[1:]
    }
    for seed in range(2):
        assert first["at_fused", seed] == pytest.approx(first["at_eager", seed], rel=1e-5)


def test_table_says_what_the_metrics_say(
    quick: tuple[Path, str], lines: list[dict[str, Any]]
) -> None:
    acc = {
        m: np.array([r["accuracy"] for r in lines if r["kind"] == "summary" and r["method"] == m])
        for m in METHODS
    }
    rows = dict(re.findall(r"^(student \S+(?: AT, \w+)?) +(.*)$", quick[1], re.MULTILINE))
    names = {"alone": "student alone", "at_fused": "student + AT, fused"}
    for method, name in names.items():
        mean, std = map(float, rows[name].split()[:2])
        assert mean == pytest.approx(acc[method].mean(), abs=0.006)
        assert std == pytest.approx(acc[method].std(ddof=1), abs=0.006)
    mean, half = paired_difference(acc["at_fused"], acc["alone"])
    assert f"{mean:+.2f} +- {half:.2f}" in rows["student + AT, fused"]
    assert "largest relative difference of the fused and the eager AT loss curve" in quick[1]


@pytest.fixture
def threads() -> Iterator[None]:
    """Give later tests the number of threads back that a run sets."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_same_seed_same_numbers(tmp_path: Path) -> None:
    cfg = replace(QUICK, steps=4, teacher_steps=4, check_steps=2)

    def metrics(name: str) -> list[dict[str, Any]]:
        run(cfg, tmp_path / name, tick=lambda: None, say=lambda _: None)
        rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return [{k: v for k, v in r.items() if k not in ("at_ms", "seconds")} for r in rows]

    first = metrics("first")
    assert first == metrics("second")
    seeds = {r["seed"]: r["ce"] for r in first if r.get("method") == "alone" and r.get("step") == 1}
    assert seeds[0] != seeds[1]
