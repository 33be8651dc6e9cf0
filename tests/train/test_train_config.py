"""at-fused-train: its options, files of them, presets, and its command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
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
    published,
    read_file,
    resolve,
    to_toml,
)
from at_fused.train.loop import Plan
from at_fused.train.report import notes


def flags(*words: str) -> Config:
    given = vars(build_parser().parse_args(words))
    return configure(given, read_file(given["config"]) if "config" in given else None)[0]


# ---- what they come to ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_a_resolved_preset_is_its_own_file(name: str) -> None:
    words = ["--preset", name, *["--data=a.module:function"] * (name == "own")]
    config = flags(*words)
    assert resolve(from_toml(to_toml(config))) == config


def test_what_is_given_beats_the_preset() -> None:
    """Also the rates that the preset has for each method."""
    config = flags("--lr=0.01", "--beta=500", "--compare=none,at,kd")
    assert config.method == {}
    for method in config.compare:
        own = config.for_method(method)
        assert (own.lr, own.beta_of(method)) == (0.01, 500 if method == "at" else 0)
    # A layer's own options of a method stand; those of the layers under it do not.
    config = flags("--lr=0.01", "--set=at.lr=0.02")
    assert config.method == {"at": {"lr": 0.02, "beta": 100}, "at+kd": {"beta": 300}}
    assert resolve({"method": {"at": {"lr": 1.0}}}, {"lr": 2.0}).method["at"] == {"beta": 100.0}
    config = flags("--betas=1,10", "--validation=0.2")
    assert [config.for_method(m).beta for m in ("at", "at+kd")] == [None, None]
    assert resolve({"betas": (1.0, 2.0), "validation": 0.1}, {"beta": 0.0}).betas == ()
    # A preset's betas go with its form.
    assert flags("--form=paper", "--beta=0.1").method == {"none": {"lr": 0.5}}


def test_the_file_of_a_run_is_as_good_as_its_flags(tmp_path: Path) -> None:
    """Flags come over it as over the preset: it has what was given, and the rest as notes."""
    file = tmp_path / "config.toml"
    file.write_text(to_toml(flags("--preset=digits-quick", "--lr=0.2", "--set=at.beta=5")))
    for words in (["--lr=0.01"], ["--momentum=0.5"], ["--epochs=400"], ["--preset=digits"]):
        again = flags("--config", str(file), *words)
        assert again == flags("--preset=digits-quick", "--lr=0.2", "--set=at.beta=5", *words)
    assert flags("--config", str(file), "--lr=0.01").teacher_lr == 0.01
    # A line that is uncommented is an option of all methods, wherever it stands.
    text = file.read_text()
    file.write_text(text.replace("# weight_decay = 0.02\n", "weight_decay = 0.5\n"))
    assert flags("--config", str(file)).weight_decay == 0.5


@pytest.mark.parametrize(
    ("under", "layer", "beta"),
    [
        ({"method": {"at": {"form": "paper", "beta": 2.0}}}, {"form": "code"}, 1000.0),
        ({"beta": 5.0}, {"form": "paper", "beta": 2.0}, 2.0),
        ({"beta": 5.0}, {"method": {"at": {"form": "paper", "beta": 2.0}}}, 2.0),
        ({"beta": 5.0}, {"method": {"at": {"form": "paper"}}}, "a number for at in the form"),
        ({"beta": 5.0}, {"form": "paper"}, "a number for at in the form"),
    ],
)
def test_a_beta_is_of_one_form(under: Any, layer: Any, beta: float | str) -> None:
    layers = {"compare": ("at",), **under}, layer
    if isinstance(beta, str):
        with pytest.raises(ConfigError, match=beta):
            resolve(*layers)
    else:
        assert resolve(*layers).for_method("at").beta_of("at") == beta


@pytest.mark.parametrize("data", ["digits", "fashion-mnist"])
def test_a_presets_cache_is_of_augmented_images(data: str) -> None:
    assert flags("--data", data).cache > 1
    assert flags("--data", data, "--no-augment").cache == 1
    with pytest.raises(ConfigError, match="cache: got 3, allowed is 1 with --no-augment"):
        flags("--data", data, "--no-augment", "--cache=3")


@pytest.mark.parametrize("data", ["folder", "a.module:function"])
def test_beta_is_measured_where_none_was_published(data: str) -> None:
    def betas(*words: str) -> list[Any]:
        config = flags("--data", data, "--compare=none,at,at+kd,channel-at,f-actt", *words)
        return [config.for_method(method).beta_of(method) for method in config.compare]

    assert betas() == [0, "auto", "auto", "auto", 1]
    # A ratio means the same in each form.
    assert betas("--form=paper") == betas("--set=at.form=paper") == betas()
    assert betas("--beta=5") == [0, 5, 5, 5, 5]
    assert betas("--set=at.beta=5") == [0, 5, "auto", "auto", 1]
    assert betas("--betas=1,10", "--validation=0.1") == [0, 1e3, 1e3, 1e3, 1]


def test_data_have_defaults_of_their_own() -> None:
    cifar = "cifar-wrn-16-1-from-16-2"
    presets = {"cifar10": cifar, "cifar100": cifar}
    presets |= {data: data for data in ("digits", "fashion-mnist", "folder")}
    for data, preset in {**presets, "a.module:function": "own"}.items():
        config = flags("--data", data)
        assert (config.data, config.preset) == (data, preset)
        if data != "digits":
            assert (config.labels, config.threads, config.weight_decay) == (0, 0, 5e-4)
            rates = {method: config.for_method(method).lr for method in config.compare}
            assert {*rates.values()} == ({0.1, 0.2, 0.4} if data == "fashion-mnist" else {0.1})
        # The errors of the paper are those of CIFAR-10.
        assert bool(published(config)) == (data == "cifar10")


def test_the_papers_recipe_is_to_the_letter() -> None:
    config = resolve({"preset": "cifar-wrn-16-1-from-16-2"})
    own = config.for_method("at")
    recipe: dict[str, Any] = {"epochs": 200, "batch_size": 128, "lr": 0.1, "momentum": 0.9}
    recipe |= {"nesterov": False, "weight_decay": 5e-4, "lr_schedule": "step", "lr_factor": 0.2}
    recipe |= {"form": "code", "p": 2.0, "collapse": "mean", "beta_schedule": "constant"}
    recipe |= {"alpha": 0.9, "T": 4.0, "labels": 0, "label_smoothing": 0, "validation": 0}
    recipe |= {"teacher_epochs": 200, "teacher_lr": 0.1, "teacher_weight_decay": 5e-4, "seeds": 5}
    recipe |= {"init": "paper", "reset_momentum": True, "optimizer": "sgd", "warmup": 0}
    assert {name: getattr(own, name) for name in recipe} == recipe
    assert own.beta_of("at") == 1e3
    assert config.for_method("at+kd").beta_schedule == "linear"
    assert PRESETS[config.preset].published["at"] == (7.93,)
    imagenet = resolve({"preset": "imagenet-resnet18-from-34"})
    assert (imagenet.epochs, imagenet.batch_size, imagenet.weight_decay) == (100, 256, 1e-4)
    assert (imagenet.student, imagenet.teacher_from) == ("resnet-18-paper", "torchvision")
    # The program drops the rate as epoch + 1 reaches 60, 120 and 160, with epochs counted from 0.
    for given, images, steps, drops, factor in (
        (own, 50_000, 391, (59, 119, 159), 0.2),  # the last batch, of 80, is kept
        (imagenet, 1_281_167, 5005, (29, 59, 89), 0.1),
    ):
        plan = Plan(given, images, 0, 1e3)
        assert plan.per_epoch == steps
        for number, epoch in enumerate(drops):
            rates = [plan.lr(epoch * steps - 1), plan.lr(epoch * steps)]
            assert rates == pytest.approx([0.1 * factor**number, 0.1 * factor ** (number + 1)])


def test_flags_come_over_a_file_and_a_file_over_its_preset(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(
        'preset = "cifar-wrn-16-2-from-40-2"\nepochs = 20\np = 4\n'
        '[method.at]\nlr = 0.05\nbeta = 10\n[method."at+kd"]\nT = 2\n'
    )
    config = flags("--config", str(file), "--epochs", "3", "--set", "at.lr=0.5", "--seeds=1")
    assert (config.teacher, config.epochs, config.p, config.seeds) == ("wrn-40-2", 3, 4.0, 1)
    own = {"at": {"lr": 0.5, "beta": 10.0}, "at+kd": {"T": 2.0, "beta_schedule": "linear"}}
    assert config.method == own
    assert (config.for_method("at").lr, config.for_method("none").lr) == (0.5, config.lr)
    but = "but for p, seeds, epochs, at.lr, at.beta, at+kd.T"
    assert notes(config)[1] == f"preset cifar-wrn-16-2-from-40-2, {but}"
    assert flags("--method", "kd").compare == ("kd",)
    assert flags("--compare", "none, at").compare == ("none", "at")
    assert flags("--lr-schedule=step", "--lr-drops", "0.5,0.9").lr_drops == (0.5, 0.9)
    assert flags("--lr-schedule=step", "--lr-drops=").lr_drops == ()


def test_every_option_is_a_flag_a_key_and_documented() -> None:
    text = build_parser().format_help()
    for name in OPTIONS:
        assert "--" + name.replace("_", "-") in text
    assert {f.name for f in fields(Config)} == {*OPTIONS, "method", "given"}
    assert all(each in text for each in PRESETS)


# ---- errors --------------------------------------------------------------------------------------


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Callable[..., None]:
    """The program ends with a last line that has the message, and no run is begun."""
    monkeypatch.chdir(tmp_path)

    def ends(words: list[str], message: str) -> None:
        with pytest.raises(SystemExit) as stop:
            main([*words, *["--out=run"] * ("--eval" not in words[0])])
        errors = capsys.readouterr().err
        last = errors.strip().splitlines()[-1]
        assert message in last
        # 1 is for what only the data and the networks show.
        assert stop.value.code == (2 if last.startswith("at-fused-train: error: ") else 1)
        assert "Traceback" not in errors
        assert not (tmp_path / "run").exists()

    return ends


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("epoch = 3", "no option is called 'epoch'; did you mean epochs?"),
        ('epochs = "3"', "epochs: got '3', allowed is a whole number from 1 to 1000000"),
        ('augment = "yes"', "augment: got 'yes', allowed is true or false"),
        ('data = "cifar"', "allowed is digits, fashion-mnist, cifar10, cifar100, folder, or MOD"),
        ('compare = "at"', "compare: got 'at', allowed is a list of none, at, kd"),
        ('compare = ["at", "at"]', "compare: got ('at', 'at'), allowed is one method or more"),
        ("lr_drops = [0.5, 2]", "lr_drops: got 2, allowed is a number from 0 to 1"),
        ("[method.ate]\nlr = 1", "ate.lr: got 'ate', allowed is none, at, kd"),
        ("[method.at]\nseeds = 1", "at.seeds: got 'seeds', allowed is beta, beta_schedule"),
        ("method = 3", "method must have a table for each method"),
        ("epochs = ", "not TOML"),
        ('data = "cifar10"\nimage_size = 64', "--image-size: got 64, allowed is 32 for cifar10"),
        ('data = "a:b"\naugment = false', "--augment: got False, allowed is none for 'a:b', whose"),
        ('data = "fashion-mnist"\nimage_size = 24', "--image-size: got 24, allowed is 28 or more"),
    ],
)
def test_a_wrong_file_is_one_clear_error(refused: Any, content: str, message: str) -> None:
    Path("c.toml").write_text(content)
    refused(["--config=c.toml"], message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--beta=nan", "argument --beta: got nan, allowed is a number from 0 to 1e+09"),
        ("--device=tpu", "argument --device: got 'tpu', allowed is cpu, cuda or cuda:N"),
        ("--set=at.lr", "argument --set: got 'at.lr', allowed is METHOD.OPTION=VALUE"),
        ("--set=at.lr=x", "argument --set: at.lr: got 'x', allowed is a number"),
        ("--T=8 --compare=none,at", "argument --T: changes nothing in this run: it is read where"),
        ("--cache=2 --method=none", "argument --cache: changes nothing in this run: it is read"),
        ("--beta=5 --set=at.beta=3 --set=at+kd.beta=4", "at, at+kd have their own by --set"),
        ("--method=at --betas=1,2 --validation=0.1 --set=at.beta=3", "at have their own by --set"),
        ("--lr-schedule=step --lr-drops= --lr-factor=0.5", "the rate does not drop"),
        ("--lr-schedule=step --lr-drops= --reset-momentum", "the rate does not drop"),
        ("--student-from=x --teacher-from=y --init=paper", "all weights come from files"),
        ("--method=kd --alpha=0 --T=3", "argument --T: changes nothing in this run: alpha"),
        ("--sync-norm", "argument --sync-norm: changes nothing in this run: one process"),
        ("--root=x", "argument --root: changes nothing in this run: it is read"),
        ("--teacher-lr=1 --teacher-from=x", "it is read where teacher_from has nothing"),
        ("--cache=5 --no-augment", "argument --cache: got 5, allowed is 1 with --no-augment"),
        ("--method=kd --set=at.beta=1", "got an option of at, but --compare has kd"),
        ("--set=kd.beta=1", "argument --set: kd.beta: got 'kd', allowed is at, at+kd, channel-at"),
        ("--optimizer=adamw", "argument --lr: must be given for adamw"),
        ("--nesterov --momentum=0", "argument --nesterov: got True, allowed is false where"),
        ("--betas=1,2", "argument --betas: got (1.0, 2.0), allowed is none without images"),
        ("--betas=1,2,1 --validation=0.1", "betas: got (1.0, 2.0, 1.0), allowed is numbers, each"),
        ("--compare=", "argument --compare: got (), allowed is one method or more, each once"),
        (
            "--preset=own",
            "argument --data: got 'own', allowed is MODULE:FUNCTION with --preset own",
        ),
        ("--eval=x.pt --lr=1", "eval: got --eval with --lr, allowed are --data"),
        ("--config=none.toml", "none.toml: [Errno 2] No such file"),
        ("--device=cuda:99", "device: got 'cuda:99', but PyTorch sees"),
        ("--labels=5", "labels: got 5, allowed is 10, one for each class, to 997, or 0 for all"),
        ("--student=wrn-12-1", "student: got 'wrn-12-1': depth must be 6n + 4 with n >= 1"),
        ("--layers=groups.0,group.1", "no module 'group.1'; some of its modules: groups.1"),
        ("--layers=groups.0:groups.1", "compare: at does not go with wrn-10-1-b8 and wrn-16-2"),
        ("--data=cifar10", "data 'cifar10': needs the published files in "),
        ("--data=folder", "data 'folder' needs train/<class>/<picture> and val/<class>/"),
    ],
)
def test_a_wrong_flag_is_one_clear_error(refused: Any, words: str, message: str) -> None:
    refused(words.split(), message)


def test_an_existing_run_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "config.toml"
    old.write_text("kept")
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(tmp_path)])
    assert stop.value.code == 1
    assert f"{tmp_path}: already holds files; choose a new" in capsys.readouterr().err
    assert old.read_text() == "kept"


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("at_fused.train.cli.find_spec", lambda module: module != "sklearn" or None)
    with pytest.raises(SystemExit, match=r"needs sklearn: pip install \"at_fused\[train\]\""):
        main(["--out=run"])


# ---- --help --------------------------------------------------------------------------------------


def test_help_needs_no_torch(tmp_path: Path) -> None:
    code = """
import sys
from contextlib import suppress
from at_fused.train.cli import main
with suppress(SystemExit):
    main(["--help"])
print("LOADED", {"torch", "numpy", "scipy", "sklearn", "matplotlib", "tqdm"} & set(sys.modules))
"""
    assert "LOADED set()" in output_of(tmp_path, "-c", code)


def test_large_pages_are_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a second start, of which the environment tells: glibc decides as a program starts."""
    begun: list[Any] = []
    monkeypatch.setattr("os.execv", lambda *a: begun.append(a))
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    # As it was started; -m would find a source folder before the package.
    monkeypatch.setattr("sys.orig_argv", ["python3", "bin/at-fused-train", "--speed=auto"])
    for options in ({"speed": "exact"}, {"speed": "auto", "device": "cuda"}, {"speed": "auto"}):
        assert begun == []
        cli._with_large_pages(resolve(options))
    cli._with_large_pages(resolve({"speed": "auto"}))
    assert begun == [(sys.executable, [sys.executable, "bin/at-fused-train", "--speed=auto"])]
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.check=0:glibc.malloc.hugetlb=1"
