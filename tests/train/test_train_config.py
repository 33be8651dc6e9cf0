"""Options of at-fused-train: presets, files, flags, and their errors."""

from __future__ import annotations

import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from outside import output_of

from at_fused.train import cli
from at_fused.train.cli import build_parser, configure, main
from at_fused.train.config import (
    OPTIONS,
    PRESETS,
    Config,
    ConfigError,
    from_toml,
    published_errors,
    read_file,
    resolve,
    to_toml,
)
from at_fused.train.loop import Plan
from at_fused.train.report import table_notes


def configuration(*flags: str) -> Config:
    parsed = vars(build_parser().parse_args(flags))
    return configure(parsed, read_file(parsed["config"]) if "config" in parsed else None)[0]


# ---- resolved options ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_preset_survives_a_round_trip_through_toml(name: str) -> None:
    flags = ["--preset", name, *["--data=a.module:function"] * (name == "own")]
    config = configuration(*flags)
    assert resolve(from_toml(to_toml(config))) == config


def test_flags_override_the_preset() -> None:
    """Check also the preset's learning rates of single methods."""
    config = configuration("--lr=0.01", "--beta=500", "--compare=none,at,kd")
    assert config.method == {}
    for method in config.compare:
        own = config.for_method(method)
        assert (own.lr, own.initial_beta(method)) == (0.01, 500 if method == "at" else 0)
    # A layer keeps its own options of a method, and drops those of lower layers.
    config = configuration("--lr=0.01", "--set=at.lr=0.02")
    assert config.method == {"at": {"lr": 0.02, "beta": 100}, "at+kd": {"beta": 300}}
    assert resolve({"method": {"at": {"lr": 1.0}}}, {"lr": 2.0}).method["at"] == {"beta": 100.0}
    config = configuration("--betas=1,10", "--validation=0.2")
    assert [config.for_method(m).beta for m in ("at", "at+kd")] == [None, None]
    assert resolve({"betas": (1.0, 2.0), "validation": 0.1}, {"beta": 0.0}).betas == ()
    # A preset's betas are for its form.
    assert configuration("--form=paper", "--beta=0.1").method == {"none": {"lr": 0.5}}


def test_flags_override_a_run_file_like_its_preset(tmp_path: Path) -> None:
    """Check that the file contains only the options that were given, others as comments."""
    file = tmp_path / "config.toml"
    flags = ("--preset=digits-quick", "--lr=0.2", "--set=at.beta=5")
    file.write_text(to_toml(configuration(*flags)))
    for more in (["--lr=0.01"], ["--momentum=0.5"], ["--epochs=400"], ["--preset=digits"]):
        assert configuration("--config", str(file), *more) == configuration(*flags, *more)
    assert configuration("--config", str(file), "--lr=0.01").teacher_lr == 0.01
    # A line without its # is an option of all methods, as it precedes their tables.
    text = file.read_text()
    file.write_text(text.replace("# weight_decay = 0.02\n", "weight_decay = 0.5\n"))
    assert configuration("--config", str(file)).weight_decay == 0.5


@pytest.mark.parametrize(
    ("base", "layer", "beta"),
    [
        ({"method": {"at": {"form": "paper", "beta": 2.0}}}, {"form": "code"}, 1000.0),
        ({"beta": 5.0}, {"form": "paper", "beta": 2.0}, 2.0),
        ({"beta": 5.0}, {"method": {"at": {"form": "paper", "beta": 2.0}}}, 2.0),
        ({"beta": 5.0}, {"method": {"at": {"form": "paper"}}}, "a number for at with form 'paper'"),
        ({"beta": 5.0}, {"form": "paper"}, "a number for at with form 'paper'"),
    ],
)
def test_beta_applies_to_one_form(base: Any, layer: Any, beta: float | str) -> None:
    layers = {"compare": ("at",), **base}, layer
    if isinstance(beta, str):
        with pytest.raises(ConfigError, match=beta):
            resolve(*layers)
    else:
        assert resolve(*layers).for_method("at").initial_beta("at") == beta


@pytest.mark.parametrize("data", ["digits", "fashion-mnist"])
def test_preset_cache_is_limited_without_augmentation(data: str) -> None:
    assert configuration("--data", data).cache > 1
    assert configuration("--data", data, "--no-augment").cache == 1
    with pytest.raises(ConfigError, match="cache: got 3, expected 0 or 1 with --no-augment"):
        configuration("--data", data, "--no-augment", "--cache=3")


@pytest.mark.parametrize("data", ["folder", "a.module:function"])
def test_beta_is_automatic_without_a_published_value(data: str) -> None:
    def betas(*flags: str) -> list[Any]:
        methods = "--compare=none,at,at+kd,channel-at,f-actt"
        config = configuration("--data", data, methods, *flags)
        return [config.for_method(method).initial_beta(method) for method in config.compare]

    assert betas() == [0, "auto", "auto", "auto", 1]
    # A gradient ratio means the same in both forms.
    assert betas("--form=paper") == betas("--set=at.form=paper") == betas()
    assert betas("--beta=5") == [0, 5, 5, 5, 5]
    assert betas("--set=at.beta=5") == [0, 5, "auto", "auto", 1]
    assert betas("--betas=1,10", "--validation=0.1") == [0, 1e3, 1e3, 1e3, 1]


def test_data_set_determines_the_preset() -> None:
    cifar = "cifar-wrn-16-1-from-16-2"
    presets = {"cifar10": cifar, "cifar100": cifar}
    presets |= {data: data for data in ("digits", "fashion-mnist", "folder")}
    for data, preset in {**presets, "a.module:function": "own"}.items():
        config = configuration("--data", data)
        assert (config.data, config.preset) == (data, preset)
        if data != "digits":
            assert (config.labels, config.threads, config.weight_decay) == (0, 0, 5e-4)
            rates = {method: config.for_method(method).lr for method in config.compare}
            assert {*rates.values()} == ({0.1, 0.2, 0.4} if data == "fashion-mnist" else {0.1})
        # The published errors are for CIFAR-10.
        assert bool(published_errors(config)) == (data == "cifar10")


def test_presets_are_the_papers_recipe() -> None:
    config = resolve({"preset": "cifar-wrn-16-1-from-16-2"})
    own = config.for_method("at")
    recipe: dict[str, Any] = {"epochs": 200, "batch_size": 128, "lr": 0.1, "momentum": 0.9}
    recipe |= {"nesterov": False, "weight_decay": 5e-4, "lr_schedule": "step", "lr_factor": 0.2}
    recipe |= {"form": "code", "p": 2.0, "collapse": "mean", "beta_schedule": "constant"}
    recipe |= {"alpha": 0.9, "T": 4.0, "labels": 0, "label_smoothing": 0, "validation": 0}
    recipe |= {"teacher_epochs": 200, "teacher_lr": 0.1, "teacher_weight_decay": 5e-4, "seeds": 5}
    recipe |= {"init": "paper", "reset_momentum": True, "optimizer": "sgd", "warmup": 0}
    assert {name: getattr(own, name) for name in recipe} == recipe
    assert own.initial_beta("at") == 1e3
    assert config.for_method("at+kd").beta_schedule == "linear"
    assert PRESETS[config.preset].published_errors["at"] == (7.93,)
    imagenet = resolve({"preset": "imagenet-resnet18-from-34"})
    assert (imagenet.epochs, imagenet.batch_size, imagenet.weight_decay) == (100, 256, 1e-4)
    assert (imagenet.student, imagenet.teacher_from) == ("resnet-18-paper", "torchvision")
    # The authors drop the rate when epoch + 1 is 60, 120 and 160, with epochs counted from 0.
    for preset, images, steps, drops, factor in (
        (own, 50_000, 391, (59, 119, 159), 0.2),  # with the last batch, of 80
        (imagenet, 1_281_167, 5005, (29, 59, 89), 0.1),
    ):
        plan = Plan(preset, images, 0, 1e3)
        assert plan.steps_per_epoch == steps
        for number, epoch in enumerate(drops):
            rates = [plan.lr(epoch * steps - 1), plan.lr(epoch * steps)]
            assert rates == pytest.approx([0.1 * factor**number, 0.1 * factor ** (number + 1)])


def test_flags_override_a_file_and_a_file_its_preset(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(
        'preset = "cifar-wrn-16-2-from-40-2"\nepochs = 20\np = 4\n'
        '[method.at]\nlr = 0.05\nbeta = 10\n[method."at+kd"]\nT = 2\n'
    )
    flags = ("--config", str(file), "--epochs", "3", "--set", "at.lr=0.5", "--seeds=1")
    config = configuration(*flags)
    assert (config.teacher, config.epochs, config.p, config.seeds) == ("wrn-40-2", 3, 4.0, 1)
    own = {"at": {"lr": 0.5, "beta": 10.0}, "at+kd": {"T": 2.0, "beta_schedule": "linear"}}
    assert config.method == own
    assert (config.for_method("at").lr, config.for_method("none").lr) == (0.5, config.lr)
    changed = "changed: p, seeds, epochs, at.lr, at.beta, at+kd.T"
    assert table_notes(config)[1] == f"preset cifar-wrn-16-2-from-40-2, {changed}"
    assert configuration("--method", "kd").compare == ("kd",)
    assert configuration("--compare", "none, at").compare == ("none", "at")
    assert configuration("--lr-schedule=step", "--lr-drops", "0.5,0.9").lr_drops == (0.5, 0.9)
    assert configuration("--lr-schedule=step", "--lr-drops=").lr_drops == ()


def test_help_lists_every_option_and_preset() -> None:
    text = build_parser().format_help()
    for name in OPTIONS:
        assert "--" + name.replace("_", "-") in text
    assert {f.name for f in fields(Config)} == {*OPTIONS, "method", "overrides"}
    assert all(each in text for each in PRESETS)


# ---- errors --------------------------------------------------------------------------------------


@pytest.fixture
def check_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
    """Return a check that the program exits with a message on one line, without starting a run."""
    monkeypatch.chdir(tmp_path)

    def check(flags: list[str], message: str) -> None:
        with pytest.raises(SystemExit) as stop:
            main([*flags, *["--out=run"] * ("--eval" not in flags[0])])
        errors = capsys.readouterr().err
        last = errors.strip().splitlines()[-1]
        assert message in last
        # Status 1 is for errors that depend on the data or networks.
        assert stop.value.code == (2 if last.startswith("at-fused-train: error: ") else 1)
        assert "Traceback" not in errors
        assert "resize=" not in errors.replace("in Python pass resize=", "")
        assert not (tmp_path / "run").exists()

    return check


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("epoch = 3", "no option 'epoch'; did you mean epochs?"),
        ('epochs = "3"', "epochs: got '3', expected an integer from 1 to 1000000"),
        ('augment = "yes"', "augment: got 'yes', expected true or false"),
        ('data = "cifar"', "one of digits, fashion-mnist, cifar10, cifar100, folder, or MOD"),
        ('compare = "at"', "compare: got 'at', expected a list, each item one of none, at, kd"),
        ('compare = ["at", "at"]', "compare: got ('at', 'at'), expected one or more methods"),
        ("lr_drops = [0.5, 2]", "lr_drops: got 2, expected a number from 0 to 1"),
        ("[method.ate]\nlr = 1", "ate.lr: got 'ate', expected one of none, at, kd"),
        ("[method.at]\nseeds = 1", "at.seeds: got 'seeds', expected one of beta, beta_schedule"),
        ("method = 3", "method must have a table for each method"),
        ("epochs = ", "not TOML"),
        ('data = "cifar10"\nimage_size = 64', "--image-size: got 64, expected 32 for cifar10"),
        ('data = "a:b"\naugment = false', "--augment: got False, expected no value with data"),
        ('data = "fashion-mnist"\nimage_size = 24', "--image-size: got 24, expected 28 or more"),
    ],
)
def test_errors_in_a_file_are_one_line(check_error: Any, content: str, message: str) -> None:
    Path("c.toml").write_text(content)
    check_error(["--config=c.toml"], message)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--beta=nan", "argument --beta: got nan, expected a number from 0 to 1e+09"),
        ("--device=tpu", "argument --device: got 'tpu', expected cpu, cuda or cuda:N"),
        ("--set=at.lr", "argument --set: got 'at.lr', expected METHOD.OPTION=VALUE"),
        ("--set=at.lr=x", "argument --set: at.lr: got 'x', expected a number"),
        ("--T=8 --compare=none,at", "--T: has no effect in this run: it requires that compare"),
        ("--cache=2 --method=none", "--cache: has no effect in this run: it requires that compare"),
        ("--beta=5 --set=at.beta=3 --set=at+kd.beta=4", "--set overrides it for at, at+kd"),
        ("--method=at --betas=1,2 --validation=0.1 --set=at.beta=3", "--set overrides it for at"),
        ("--lr-schedule=step --lr-drops= --lr-factor=0.5", "lr_drops is empty"),
        ("--lr-schedule=step --lr-drops= --reset-momentum", "lr_drops is empty"),
        ("--student-from=x --teacher-from=y --init=paper", "all weights come from files"),
        ("--method=kd --alpha=0 --T=3", "argument --T: has no effect in this run: alpha is 0"),
        ("--sync-norm", "--sync-norm: has no effect in this run: there is only one process"),
        ("--root=x", "--root: has no effect in this run: it requires that data is fashion-mnist"),
        ("--teacher-lr=1 --teacher-from=x", "it requires that teacher_from is not given"),
        ("--cache=5 --no-augment", "argument --cache: got 5, expected 0 or 1 with --no-augment"),
        ("--method=kd --set=at.beta=1", "got an option for at, but --compare is kd"),
        ("--set=kd.beta=1", "--set: kd.beta: got 'kd', expected one of at, at+kd, channel-at"),
        ("--optimizer=adamw", "argument --lr: required with adamw"),
        ("--nesterov --momentum=0", "argument --nesterov: got True, expected false when momentum"),
        ("--betas=1,2", "argument --betas: got (1.0, 2.0), expected no value without --validation"),
        ("--betas=1,2,1 --validation=0.1", "betas: got (1.0, 2.0, 1.0), expected distinct numbers"),
        ("--compare=", "argument --compare: got (), expected one or more methods, each once"),
        ("--preset=own", "--data: got 'own', expected MODULE:FUNCTION with --preset own"),
        ("--eval=x.pt --lr=1", "eval: got --eval with --lr, expected only --data"),
        ("--config=none.toml", "none.toml: [Errno 2] No such file"),
        ("--device=cuda:99", "device: got 'cuda:99', but PyTorch has"),
        ("--labels=5", "labels: got 5, expected 10 (one per class) to 997, or 0 for all"),
        ("--student=wrn-12-1", "student: got 'wrn-12-1': depth must be 6n + 4 with n >= 1"),
        ("--layers=groups.0,group.1", "no module 'group.1'; some of its modules: groups.1"),
        ("--layers=groups.0:groups.1", "compare: at does not work with wrn-10-1-b8 and wrn-16-2"),
        ("--data=cifar10", "data 'cifar10': requires the published files in "),
        ("--data=folder", "data 'folder' requires train/<class>/<image> and val/<class>/"),
    ],
)
def test_errors_in_flags_are_one_line(check_error: Any, flags: str, message: str) -> None:
    check_error(flags.split(), message)


def test_existing_run_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "config.toml"
    old.write_text("kept")
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(tmp_path)])
    assert stop.value.code == 1
    assert f"{tmp_path}: not empty; choose a new or empty" in capsys.readouterr().err
    assert old.read_text() == "kept"


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("at_fused.train.cli.find_spec", lambda module: module != "sklearn" or None)
    with pytest.raises(SystemExit, match=r"needs sklearn: pip install \"at_fused\[train\]\""):
        main(["--out=run"])


# ---- --help --------------------------------------------------------------------------------------


def test_help_does_not_import_torch(tmp_path: Path) -> None:
    code = """
import sys
from contextlib import suppress
from at_fused.train.cli import main
with suppress(SystemExit):
    main(["--help"])
print("LOADED", {"torch", "numpy", "scipy", "sklearn", "matplotlib", "tqdm"} & set(sys.modules))
"""
    assert "LOADED set()" in output_of(tmp_path, "-c", code)


def test_program_restarts_once_for_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr("os.execv", lambda *args: calls.append(args))
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    # The original arguments; -m would find a source folder before the package.
    monkeypatch.setattr("sys.orig_argv", ["python3", "bin/at-fused-train", "--speed=auto"])
    for options in ({"speed": "exact"}, {"speed": "auto", "device": "cuda"}, {"speed": "auto"}):
        assert calls == []
        cli._restart_with_huge_pages(resolve(options))
    cli._restart_with_huge_pages(resolve({"speed": "auto"}))
    assert calls == [(sys.executable, [sys.executable, "bin/at-fused-train", "--speed=auto"])]
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.check=0:glibc.malloc.hugetlb=1"
