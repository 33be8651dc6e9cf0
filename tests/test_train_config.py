"""at-fused-train: its options, files of them, presets, and its command line."""

from __future__ import annotations

import os
import sys
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from outside import output_of

from at_fused.train import cli
from at_fused.train.cli import build_parser, main, settings
from at_fused.train.config import (
    OPTIONS,
    Config,
    beta_of,
    for_method,
    from_toml,
    resolve,
    to_toml,
)
from at_fused.train.presets import PRESETS
from at_fused.train.report import shortened


def flags(*words: str) -> Config:
    return settings(vars(build_parser().parse_args(words)))


# ---- what they come to ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_a_resolved_preset_is_its_own_file(name: str) -> None:
    config = resolve({"preset": name})
    assert resolve(from_toml(to_toml(config))) == config
    assert flags("--preset", name) == config
    assert shortened(config) == ""


def test_the_papers_recipe_is_to_the_letter() -> None:
    config = resolve({"preset": "cifar-wrn-16-1-from-16-2"})
    own = for_method(config, "at")
    recipe: dict[str, Any] = {"epochs": 200, "batch_size": 128, "lr": 0.1, "momentum": 0.9}
    recipe |= {"nesterov": False, "weight_decay": 5e-4, "lr_schedule": "step", "lr_factor": 0.2}
    recipe |= {"form": "code", "p": 2.0, "collapse": "mean", "beta_schedule": "constant"}
    recipe |= {"alpha": 0.9, "T": 4.0, "labels": 0}
    recipe |= {"teacher_epochs": 200, "teacher_lr": 0.1, "teacher_weight_decay": 5e-4}
    assert {name: getattr(own, name) for name in recipe} == recipe
    assert [round(drop * own.epochs, 6) for drop in own.lr_drops] == [60, 120, 160]
    assert beta_of(own, "at") == 1e3
    assert for_method(config, "at+kd").beta_schedule == "linear"
    assert PRESETS[config.preset].published["at"] == (7.93,)


def test_flags_come_over_a_file_and_a_file_over_its_preset(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(
        'preset = "cifar-wrn-16-2-from-40-2"\nepochs = 20\np = 4\n'
        '[method.at]\nlr = 0.05\nbeta = 10\n[method."at+kd"]\nT = 2\n'
    )
    config = flags("--config", str(file), "--epochs", "3", "--set", "at.lr=0.5", "--seeds=1")
    assert (config.preset, config.teacher, config.epochs, config.p, config.seeds) == (
        "cifar-wrn-16-2-from-40-2",
        "wrn-40-2",
        3,
        4.0,
        1,
    )
    assert config.method == {
        "at": {"lr": 0.5, "beta": 10.0},
        "at+kd": {"T": 2.0, "beta_schedule": "linear"},
    }
    assert for_method(config, "at").lr == 0.5
    assert for_method(config, "none").lr == config.lr
    assert shortened(config) == "3 of 200 epochs, 1 of 5 seeds"
    assert flags("--method", "kd").compare == ("kd",)
    assert flags("--compare", "none, at").compare == ("none", "at")
    assert flags("--no-augment", "--lr-drops", "0.5,0.9").lr_drops == (0.5, 0.9)
    assert shortened(flags("--fraction", "0.1")) == "10 % of the training images"


def test_every_option_is_a_flag_a_key_and_documented() -> None:
    text = build_parser().format_help()
    for name in OPTIONS:
        assert "--" + name.replace("_", "-") in text
    assert {f.name for f in fields(Config)} == {*OPTIONS, "method"}
    assert all(each in text for each in PRESETS)


# ---- errors --------------------------------------------------------------------------------------


def refused(words: list[str], message: str, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The program ends with a last line that has the message, and no run is begun."""
    with pytest.raises(SystemExit) as stop:
        main([*words, "--out", str(out / "run")])
    errors = capsys.readouterr().err
    last = errors.strip().splitlines()[-1]
    assert message in last
    # 1 is for what only the data and the networks show.
    assert stop.value.code == (2 if last.startswith("at-fused-train: error: ") else 1)
    assert "Traceback" not in errors
    assert not (out / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("epoch = 3", "no option is called 'epoch'; did you mean epochs?"),
        ("qwertyuiop = 3", "no option is called 'qwertyuiop'"),
        ('epochs = "3"', "epochs: got '3', allowed is a whole number from 1 to 1000000"),
        ("epochs = true", "epochs: got True, allowed is a whole number"),
        ("lr = nan", "lr: got nan, allowed is a number from 0 to 1000"),
        (f"lr = 1{400 * '0'}", "lr: got 1000"),
        ('augment = "yes"', "augment: got 'yes', allowed is true or false"),
        ('data = "cifar"', "data: got 'cifar', allowed is digits, cifar10, cifar100, folder"),
        ('compare = "at"', "compare: got 'at', allowed is a list of none, at, kd"),
        ('compare = ["at", "at"]', "compare: got ('at', 'at'), allowed is a list"),
        ('compare = ["att"]', "did you mean at?"),
        ("lr_drops = [0.5, 2]", "lr_drops: got 2, allowed is a number from 0 to 1"),
        ('device = "tpu"', "device: got 'tpu', allowed is cpu, cuda or cuda:N"),
        ('preset = "cifar"', "preset: got 'cifar', allowed is digits, digits-quick, cifar-wrn"),
        ("[method.ate]\nlr = 1", "'ate' is no method; there are none, at, kd"),
        ("[method.at]\nseeds = 1", "'seeds' is no option of a method; there are beta,"),
        ("method = 3", "method must have a table for each method"),
        ("epochs = ", "not TOML"),
        (
            'data = "cifar10"\nimage_size = 64',
            "argument --image-size: got 64, allowed is 32 for cifar10",
        ),
        ('data = "folder"\nevaluate = "val"', "evaluate: got 'val', allowed is test for folder"),
        ('form = "paper"\ncompare = ["at"]\nmethod.at.p = 2', "beta: must be given for at"),
    ],
)
def test_a_wrong_file_is_one_clear_error(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.toml"
    # The preset's own tables have a beta for AT, by which the form could be told.
    base = "" if "preset" in content else 'preset = "cifar-wrn-16-1-from-16-2"\n'
    file.write_text(base + content)
    refused(["--config", str(file)], message, tmp_path, capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--labels=-1"], "argument --labels: got '-1', allowed is a whole number from 0"),
        (["--beta=nan"], "argument --beta: got 'nan', allowed is a number from 0 to 1e+09"),
        ([f"--beta=1{5000 * '0'}"], "argument --beta: got '1000"),
        (["--device=tpu"], "argument --device: got 'tpu', allowed is cpu, cuda or cuda:N"),
        (["--speed=fast"], "argument --speed: got 'fast', allowed is auto, exact, fp32, bf16"),
        (["--lables=9"], "unrecognized arguments: --lables=9; did you mean --labels?"),
        (["--set", "at.lr"], "argument --set: got 'at.lr', allowed is METHOD.OPTION=VALUE"),
        (["--set", "ta.lr=1"], "argument --set: 'ta' is no method"),
        (["--set", "at.lr=x"], "argument --set: at.lr: got 'x', allowed is a number"),
        (["--set", "at.Temp=1"], "argument --set: 'Temp' is no option of a method"),
        (["--method=at", "--compare=at"], "argument --method: got --method and --compare"),
        (["--config=none.toml"], "none.toml: [Errno 2] No such file"),
        (["--preset=digit"], "argument --preset: got 'digit', allowed is digits, digits-quick"),
        (["--device=cuda:99"], "device: got 'cuda:99', but PyTorch sees"),
        (["--labels=5"], "labels: got 5, allowed is one for each of 10 classes, or 0 for all"),
        (["--labels=5000"], "labels: got 5000, allowed is up to 997, or 0"),
        (["--student=wrn-12-1"], "student: got 'wrn-12-1', allowed is a depth of 6n + 4"),
        (["--teacher=wrn-10-0"], "teacher: got 'wrn-10-0', allowed is a depth of 6n + 4 (10,"),
        (["--layers=groups.0,group.1"], "layers: WRN has no module 'group.1'; near: groups.1"),
        (["--layers=groups.0:groups.1"], "compare: at does not go with wrn-10-1-b8 and wrn-16-2"),
        (["--method=channel-at"], "compare: channel-at does not go with wrn-10-1-b8 and wrn-16-2"),
        (["--teacher-from=none.pt"], "teacher_from: none.pt has no weights of wrn-16-2"),
        (["--data=cifar10"], "data 'cifar10' needs cifar-10-batches-py/ with data_batch_1,"),
        (["--data=folder"], "data 'folder' needs train/<class>/<picture> and val/<class>/"),
    ],
)
def test_a_wrong_flag_is_one_clear_error(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    refused([*words, "--seeds=1"], message, tmp_path, capsys)


def test_an_existing_run_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "config.toml"
    old.write_text("kept")
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(tmp_path)])
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


# ---- --help --------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["cli", "visualize_cli"])
def test_help_needs_no_torch(module: str, tmp_path: Path) -> None:
    code = f"""
import sys
from at_fused.train.{module} import main
try:
    main(["--help"])
except SystemExit as end:
    assert end.code == 0
print("LOADED", {{"torch", "numpy", "scipy", "sklearn", "matplotlib", "tqdm"}} & set(sys.modules))
"""
    assert "LOADED set()" in output_of(tmp_path, "-c", code)


def test_large_pages_are_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a second start, of which the environment tells: glibc decides as a program starts."""
    begun: list[Any] = []
    monkeypatch.setattr("os.execv", lambda *a: begun.append(a))
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    # Whichever way it was started; -m would find a source folder before the package.
    monkeypatch.setattr("sys.orig_argv", ["python3", "bin/at-fused-train", "--speed=auto"])
    for config in (resolve({"speed": "exact"}), resolve({"speed": "auto", "device": "cuda"})):
        cli._with_large_pages(config)
    assert begun == []
    cli._with_large_pages(resolve({"speed": "auto"}))
    program = [sys.executable, "bin/at-fused-train", "--speed=auto"]
    assert begun == [(sys.executable, program)]
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.check=0:glibc.malloc.hugetlb=1"
    cli._with_large_pages(resolve({"speed": "auto"}))
    assert len(begun) == 1
