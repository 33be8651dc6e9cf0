"""Options of a run: allowed values, presets, TOML files and how layers of options merge.

Imports no heavy package, so that the command line answers --help at once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any


class ConfigError(argparse.ArgumentTypeError, ValueError):
    """An option, file or data set that the user can fix; the message fits on one line."""


@contextmanager
def error_prefix(name: object) -> Iterator[None]:
    """Prefix the ConfigErrors of the block with a name."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def is_import_path(value: object) -> bool:
    """Return True for MODULE:FUNCTION, False for the name of a built-in."""
    return isinstance(value, str) and re.fullmatch(r"[\w.]+:\w+", value) is not None


def import_function(option: str, name: str) -> Callable[..., Any]:
    """Return the function "MODULE:FUNCTION"; the working folder is searched last."""
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        result: Callable[..., Any] = attrgetter(function)(import_module(module))
    except (Exception, SystemExit) as error:
        reason = error_summary(error)
        raise ConfigError(f"{option}: cannot import {name!r}: {reason}") from error
    return result


def error_summary(error: BaseException) -> str:
    """Return the type of an error and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")


def suggest(name: str, names: Iterable[str]) -> str:
    """Return "; did you mean X?" with the closest known name, or an empty string."""
    matches = get_close_matches(name, list(names), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""


# ---- rules of options ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """Allowed values of an option; ``keywords`` are strings allowed in place of a number."""

    type: type
    expected: str  # a phrase for error messages
    accepts: Callable[[Any], bool] = lambda value: True
    metavar: str = ""
    names: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    is_list: bool = False
    default: Any = None
    help: str = ""

    def check(self, value: Any) -> Any:
        """Return the value; raise ConfigError if it is not allowed."""
        if self.is_list:
            if not isinstance(value, list | tuple):
                raise ConfigError(f"got {value!r}, expected a list, each item {self.expected}")
            return tuple(map(replace(self, is_list=False).check, value))
        if isinstance(value, str) and value in self.keywords:
            return value
        types = (int, float) if self.type is float else (self.type,)
        if type(value) not in types or not self.accepts(value):
            hint = suggest(str(value), self.names)
            raise ConfigError(f"got {value!r}, expected {self.expected}{hint}")
        return self.type(value)

    def parse(self, text: str) -> Any:
        """Return the value of a command-line argument; serves as argparse's ``type``."""
        if self.is_list:
            return self.check([self._convert(item) for item in text.split(",") if text.strip()])
        return self.check(self._convert(text))

    def _convert(self, text: str) -> Any:
        try:
            return self.type(text.strip())
        except ValueError:
            return text


def format_value(value: Any) -> str:
    """Return a value as a command-line argument, with the digits that the user gave."""
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def integer(low: int, high: int) -> Rule:
    """Return a rule for integers in a range."""
    return Rule(int, f"an integer from {low} to {high}", lambda x: low <= x <= high, "N")


def number(low: float, high: float) -> Rule:
    """Return a rule for numbers in a range."""
    return Rule(float, f"a number from {low:g} to {high:g}", lambda x: low <= x <= high, "X")


def number_or(keyword: str, low: float, high: float) -> Rule:
    """Return a rule for numbers in a range, and a keyword."""
    rule, metavar = number(low, high), f"X|{keyword}"
    expected = f"{rule.expected}, or {keyword}"
    return replace(rule, expected=expected, keywords=(keyword,), metavar=metavar)


def choice(*names: str, imports: bool = False) -> Rule:
    """Return a rule for one of several names; ``imports`` also allows MODULE:FUNCTION."""
    return Rule(
        str,
        f"one of {', '.join(names)}" + ", or MODULE:FUNCTION" * imports,
        lambda value: value in names or (imports and is_import_path(value)),
        "|".join(names) + "|MODULE:FUNCTION" * imports,
        names,
    )


def string(metavar: str) -> Rule:
    """Return a rule for any text."""
    return Rule(str, "text", metavar=metavar)


BOOLEAN = Rule(bool, "true or false")
DEVICE = Rule(
    str, "cpu, cuda or cuda:N", lambda x: bool(re.fullmatch(r"cpu|cuda(:\d+)?", x)), "DEV"
)


def list_of(item: Rule) -> Rule:
    """Return a rule for lists of items."""
    return replace(item, is_list=True, metavar="A,B")


def option(default: Any, rule: Rule, help: str) -> Any:
    """Return a field of Config; a default of None means that the option is unset."""
    return field(default=default, metadata={"rule": replace(rule, help=help, default=default)})


# ---- methods -------------------------------------------------------------------------------------

# Titles in tables and figures.
TITLES = {
    "none": "student alone",
    "at": "AT",
    "kd": "KD",
    "at+kd": "AT + KD",
    "f-actt": "full-activation transfer",
    "gradient-at": "gradient-based AT",
    "flip-symmetry": "flip symmetry",
    "channel-at": "channel AT",
}
METHODS = tuple(TITLES)
WITH_AT = ("at", "at+kd", "channel-at")
WITH_BETA = (*WITH_AT, "f-actt", "gradient-at", "flip-symmetry")
WITH_KD = ("kd", "at+kd")
NEEDS_LAYERS = (*WITH_AT, "f-actt")
NEEDS_TEACHER = (*NEEDS_LAYERS, "kd", "gradient-at")
# Height and width of the images of each data set.
DEFAULT_SIZES = {"digits": 16, "fashion-mnist": 32, "cifar10": 32, "cifar100": 32, "folder": 224}
# Debian's package dataset-fashion-mnist. Used if it is installed, the user gave no root, and the
# default root has no Fashion-MNIST.
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
# Options of --set. For example, one learning rate for all methods would handicap some of them.
METHOD_OPTIONS: tuple[str, ...] = (
    *("beta", "beta_schedule", "p", "collapse", "form", "T", "alpha"),
    *("lr", "weight_decay"),
)
TEACHER_OPTIONS = ("teacher_epochs", "teacher_lr", "teacher_weight_decay")
# Options, another option, values: the options have an effect only with one of these values.
USED_ONLY_IF: tuple[tuple[tuple[str, ...], str, tuple[str, ...]], ...] = (
    (("beta", "betas", "beta_schedule"), "compare", WITH_BETA),
    (("p", "collapse", "form"), "compare", WITH_AT),
    (("T", "alpha"), "compare", WITH_KD),
    (("cache",), "compare", ("at", "kd", "at+kd", "channel-at")),
    (("layers",), "compare", NEEDS_LAYERS),
    (("teacher", "teacher_from", *TEACHER_OPTIONS), "compare", NEEDS_TEACHER),
    (TEACHER_OPTIONS, "teacher_from", ("",)),
    (("root",), "data", ("fashion-mnist", "cifar10", "cifar100", "folder", "own")),
    (("download",), "data", ("fashion-mnist", "cifar10", "cifar100")),
    (("workers",), "data", ("folder", "own")),
    (("skip_unreadable",), "data", ("folder",)),
    (("lr_drops", "lr_factor", "reset_momentum"), "lr_schedule", ("step",)),
    (("momentum", "nesterov"), "optimizer", ("sgd",)),
    (("compile",), "speed", ("auto", "fp32", "bf16", "fp16")),
)
# Default betas: the paper's for AT in the form "code". For the others, none was published.
BETAS = {**dict.fromkeys(WITH_AT, 1e3), "f-actt": 1.0, "gradient-at": 1.0, "flip-symmetry": 1.0}


# ---- presets -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preset:
    """Defaults for one experiment, and its published results."""

    description: str
    options: Mapping[str, Any] = field(default_factory=dict)
    # Test error in percent, top-1 and (ImageNet) top-5, by method and for "teacher".
    published_errors: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


# Learning rate and beta were tuned for each method on validation images (docs/results.md). One
# rate for all methods would bias the comparison.
_DIGITS: dict[str, Any] = {"data": "digits", "labels": 20, "student": "wrn-10-1-b8", "seeds": 20}
_DIGITS |= {"epochs": 300, "batch_size": 64, "nesterov": True, "weight_decay": 2e-2}
_DIGITS |= {"teacher_epochs": 25, "teacher_weight_decay": 5e-4}
_DIGITS |= {"speed": "exact", "threads": 1, "evaluate_every": 30}
# An image has nine possible shifts.
_DIGITS |= {"cache": 20}
_DIGITS["method"] = {
    "none": {"lr": 0.5},
    "at": {"beta": 100.0},
    "at+kd": {"beta": 300.0},
}
_QUICK = {"seeds": 2, "epochs": 140, "teacher_epochs": 6, "teacher": "wrn-10-2"}

# Options of the paper and of the authors' program.
_PAPER: dict[str, Any] = {"init": "paper", "lr_schedule": "step", "reset_momentum": True}
# Section 4.1 and the authors' program, which drops the rate at the start of epochs 60, 120 and
# 160, counted from 1. The paper says that beta decays with KD, but not how.
_CIFAR: dict[str, Any] = {
    **_PAPER,
    "data": "cifar10",
    "compare": ("none", "at", "f-actt", "kd", "at+kd"),
    "seeds": 5,
    "lr_drops": (59 / 200, 119 / 200, 159 / 200),
    "method": {"at+kd": {"beta_schedule": "linear"}},
}


# The same recipe in 1,876 steps (480 for 1,000 images) instead of 78,200. Rates and betas are the
# paper's unless another was better by 0.1 points on validation images (docs/results.md).
_FASHION: dict[str, Any] = {
    **_PAPER,
    "data": "fashion-mnist",
    "seeds": 5,
    "lr_drops": _CIFAR["lr_drops"],
    "epochs": 4,
    "cache": 4,
    "teacher_epochs": 6,
    "method": {"none": {"lr": 0.4}, "at": {"lr": 0.2, "beta": 100.0}},
    # Compiling takes longer than it saves in so few steps.
    "compile": False,
}
_FASHION_FEW: dict[str, Any] = {"labels": 1000, "epochs": 60, "cache": 20, "evaluate_every": 20}
_FASHION_FEW |= {"seeds": 10}
_FASHION_FEW["method"] = {"none": {"lr": 0.2}}


def _cifar(student: str, teacher: str, *errors: float) -> Preset:
    return Preset(
        f"CIFAR-10, {student.upper()} from {teacher.upper()} (the paper's table 1)",
        {**_CIFAR, "student": student, "teacher": teacher},
        {n: (error,) for n, error in zip((*_CIFAR["compare"], "teacher"), errors, strict=True)},
    )


# Without a published beta, presets measure it: docs/results.md has the study.
_AUTO: dict[str, Any] = {"method": {method: {"beta": "auto"} for method in WITH_AT}}
_FOLDER: dict[str, Any] = {"data": "folder", "epochs": 100, "workers": 8}
_FOLDER |= {"student": "resnet-18", "teacher": "resnet-34"}
_IMAGENET: dict[str, Any] = {
    **_FOLDER,
    **_PAPER,
    "compare": ("none", "at"),
    "seeds": 1,
    "batch_size": 256,
    "lr_drops": (0.29, 0.59, 0.89),
    "lr_factor": 0.1,
    "weight_decay": 1e-4,
    "student": "resnet-18-paper",
    "teacher_from": "torchvision",
}

PRESETS: dict[str, Preset] = {
    "digits": Preset("scikit-learn's digits, 20 labelled images per student, 20 seeds", _DIGITS),
    "digits-quick": Preset("the same in less than a minute", {**_DIGITS, **_QUICK}),
    "fashion-mnist": Preset("Fashion-MNIST, WRN-16-1 from WRN-16-2, 5 seeds", _FASHION),
    "fashion-mnist-few": Preset(
        "the same, 1,000 labelled images per student, 10 seeds", {**_FASHION, **_FASHION_FEW}
    ),
    "cifar-wrn-16-1-from-16-2": _cifar("wrn-16-1", "wrn-16-2", 8.77, 7.93, 8.51, 7.41, 7.51, 6.31),
    "cifar-wrn-16-1-from-40-1": _cifar("wrn-16-1", "wrn-40-1", 8.77, 8.25, 8.62, 8.39, 8.01, 6.58),
    "cifar-wrn-16-2-from-40-2": _cifar("wrn-16-2", "wrn-40-2", 6.31, 5.85, 6.24, 6.08, 5.71, 5.23),
    "imagenet-resnet18-from-34": Preset(
        "ImageNet, ResNet-18 from torchvision's ResNet-34 (the paper's table 5)",
        _IMAGENET,
        {"none": (30.4, 10.8), "at": (29.3, 10.0)},
    ),
    "folder": Preset("a folder of images, ResNet-18 from ResNet-34", {**_FOLDER, **_AUTO}),
    "own": Preset(
        "your own data set, MODULE:FUNCTION; WRN-16-1 from WRN-16-2", {"data": "own", **_AUTO}
    ),
}


def default_preset(data: str) -> str:
    """Return the preset for a data set, used if the user names none."""
    if is_import_path(data):
        return "own"
    return data if data in PRESETS else "cifar-wrn-16-1-from-16-2"


# ---- the options --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Options of a run. The defaults suit any images; none of them was tuned."""

    preset: str = option(
        "", replace(choice(*PRESETS), metavar="NAME"), "defaults for the other options"
    )

    data: str = option(
        "digits", choice(*DEFAULT_SIZES, imports=True), "data set, or a function that opens yours"
    )
    root: str = option("data", string("DIR"), "folder with the files, or train/ and val/")
    download: bool = option(False, BOOLEAN, "download Fashion-MNIST or CIFAR if it is missing")
    image_size: int | None = option(None, integer(4, 1024), "height and width (as in the data)")
    mean: tuple[float, ...] = option((), list_of(number(0, 1)), "mean of each channel, in [0, 1]")
    std: tuple[float, ...] = option((), list_of(number(1e-6, 1)), "std of each channel, in [0, 1]")
    skip_unreadable: int = option(0, integer(0, 10**9), "skip up to N unreadable images")
    fraction: float = option(1.0, number(1e-6, 1.0), "fraction of the training images to use")
    validation: float = option(0.0, number(0, 0.9), "fraction held out to choose epoch and beta")
    labels: int = option(0, integer(0, 10**9), "labelled images per student, 0 for all")
    augment: bool = option(True, BOOLEAN, "shift images at random, and flip all but digits")
    evaluate: str = option("test", choice("test", "val"), "images to report on: val for tuning")

    teacher: str = option("wrn-16-2", string("NETWORK"), "teacher network")
    student: str = option("wrn-16-1", string("NETWORK"), "student network")
    teacher_from: str = option("", string("FILE"), "weights of a trained teacher, or torchvision")
    student_from: str = option("", string("FILE"), "initial weights of students, or torchvision")
    init: str = option("torch", choice("torch", "paper"), "initial weights: torch's or the paper's")
    layers: str = option("", string("NAMES"), "A,B or STUDENT:TEACHER,... (matched automatically)")

    compare: tuple[str, ...] = option(
        ("none", "at", "kd", "at+kd"),
        list_of(choice(*METHODS)),
        f"any of {', '.join(METHODS)}; the first is the baseline",
    )
    seeds: int = option(3, integer(1, 1000), "students per method, seeded 0, 1, ...")
    beta: float | str | None = option(
        None,
        number_or("auto", 0, 1e9),
        "weight of the transfer loss (AT: 1000 or the preset's); auto: measured in the first steps",
    )
    betas: tuple[float, ...] = option((), list_of(number(0, 1e9)), "betas to try with --validation")
    beta_schedule: str = option(
        "constant", choice("constant", "linear", "cosine"), "linear and cosine decay to 0"
    )
    p: float = option(2.0, number(1, 100), "exponent of the attention map")
    collapse: str = option("mean", choice("mean", "sum", "max"), "reduction over channels")
    form: str = option("code", choice("code", "paper"), "AT loss: authors' code or paper's eq. (2)")
    T: float = option(4.0, number(1e-3, 1e4), "temperature of KD")
    alpha: float = option(0.9, number(0, 1), "weight of KD's soft labels; the labels get 1 - alpha")
    label_smoothing: float = option(0.0, number(0, 0.99), "label smoothing of the cross-entropy")

    epochs: int = option(200, integer(1, 10**6), "epochs of each student")
    batch_size: int = option(128, integer(2, 10**6), "images per step, over all devices")
    optimizer: str = option("sgd", choice("sgd", "adamw"), "torch's SGD or AdamW")
    lr: float = option(0.1, number(0, 1e3), "initial learning rate")
    warmup: float = option(0.0, number(0, 1e6), "epochs of linear warm-up from 0")
    lr_schedule: str = option("cosine", choice("step", "cosine"), "drops, or cosine decay to 0")
    lr_drops: tuple[float, ...] = option(
        (0.3, 0.6, 0.8), list_of(number(0, 1)), "when the rate drops, as fractions of the run"
    )
    lr_factor: float = option(0.2, number(0, 1), "factor of the learning rate at each drop")
    reset_momentum: bool = option(False, BOOLEAN, "reset momentum at each drop, as the authors do")
    momentum: float = option(0.9, number(0, 1), "SGD momentum")
    nesterov: bool = option(False, BOOLEAN, "Nesterov momentum")
    weight_decay: float = option(5e-4, number(0, 10), "weight decay")
    teacher_epochs: int | None = option(None, integer(1, 10**6), "teacher's epochs (as students)")
    teacher_lr: float | None = option(None, number(0, 1e3), "teacher's lr (as students)")
    teacher_weight_decay: float | None = option(None, number(0, 10), "teacher's (as students)")

    speed: str = option(
        "auto",
        choice("auto", "exact", "fp32", "bf16", "fp16"),
        "how steps run: auto uses bf16 if it is fast, exact is plain PyTorch in fp32",
    )
    compile: bool = option(True, BOOLEAN, "use torch.compile, unless speed is exact")
    cache: int = option(0, integer(0, 10**6), "cache the teacher's outputs for N augmentations")
    device: str = option("cpu", DEVICE, DEVICE.expected)
    threads: int = option(0, integer(0, 1024), "CPU threads, 0 for one per core")
    workers: int = option(2, integer(0, 256), "processes that read images from disk")
    nproc: int = option(1, integer(1, 64), "processes that share each batch (or use torchrun)")
    sync_norm: bool = option(True, BOOLEAN, "synchronise BatchNorm across processes")

    evaluate_every: int = option(1, integer(1, 10**6), "epochs between evaluations")
    checkpoint_every: int = option(1000, integer(1, 10**9), "steps between checkpoints")
    keep: int = option(2, integer(1, 1000), "checkpoints kept per network")

    method: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, metadata={})
    # All layers above the preset, merged; written to config.toml.
    overrides: Mapping[str, Any] = field(default_factory=dict, compare=False, metadata={})

    @property
    def needs_teacher(self) -> bool:
        """True if a method of the run uses a teacher."""
        return any(method in NEEDS_TEACHER for method in self.compare)

    @property
    def trains_teacher(self) -> bool:
        """True if the run trains its teacher."""
        return self.needs_teacher and not self.teacher_from

    def for_teacher(self) -> Config:
        """Return the configuration that trains the teacher; ``self`` must be resolved."""
        options = {name.removeprefix("teacher_"): getattr(self, name) for name in TEACHER_OPTIONS}
        return replace(self, **options, cache=0, labels=0, method={})

    def for_method(self, method: str) -> Config:
        """Return the configuration of a method's students."""
        options = self.method.get(method, {})
        # A general beta applies to the general form only.
        has_other_form = options.get("form", self.form) != self.form and self.beta != "auto"
        unset = {"beta": None} if has_other_form else {}
        return replace(self, **{**unset, **options})

    def initial_beta(self, method: str) -> float | str:
        """Return a method's beta at step 0, or "auto"; ``self`` must be ``for_method(method)``."""
        if self.beta is None or method not in WITH_BETA:
            return BETAS.get(method, 0.0)
        return self.beta


OPTIONS: dict[str, Rule] = {f.name: f.metadata["rule"] for f in fields(Config) if f.metadata}


def methods_using(name: str) -> tuple[str, ...]:
    """Return the methods that use an option."""
    methods = [values for names, by, values in USED_ONLY_IF if name in names and by == "compare"]
    return methods[0] if methods else METHODS


def method_rule(method: str, name: str) -> Rule:
    """Return the rule of a method's own option; raise ConfigError if it has no such option."""
    choice(*METHOD_OPTIONS).check(name)
    choice(*methods_using(name)).check(method)
    return OPTIONS[name]


# ---- files ---------------------------------------------------------------------------------------


def from_toml(content: str) -> dict[str, Any]:
    """Return the options of a TOML file; raise ConfigError for the first wrong one."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        table = tomllib.loads(content)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"not TOML: {error}") from None
    methods = table.pop("method", {})
    if not isinstance(methods, dict) or not all(isinstance(v, dict) for v in methods.values()):
        raise ConfigError("method must have a table for each method, such as [method.at]")
    options: dict[str, Any] = {}
    for name, value in table.items():
        if name not in OPTIONS:
            raise ConfigError(f"no option {name!r}{suggest(name, [*OPTIONS, 'method'])}")
        with error_prefix(name):
            options[name] = OPTIONS[name].check(value)
    for method, method_options in methods.items():
        for name, value in method_options.items():
            with error_prefix(f"{method}.{name}"):
                method_options[name] = method_rule(method, name).check(value)
    return {**options, "method": methods}


def to_toml(config: Config) -> str:
    """Return a configuration as TOML; options without an override are comments."""

    def line(name: str, value: Any) -> str:
        # JSON strings, numbers, lists and booleans are valid TOML.
        return f"{name} = {json.dumps(list(value) if isinstance(value, tuple) else value)}"

    methods = [(name, table) for name, table in config.overrides.get("method", {}).items() if table]
    rest = {n: getattr(config, n) for n in OPTIONS if n not in config.overrides}
    lines = [
        *(line(name, value) for name, value in config.overrides.items() if name in OPTIONS),
        "",
        "# The run's other options. To change one, remove its #.",
        *(f"# {line(name, value)}" for name, value in rest.items() if value is not None),
    ]
    for method, options in methods:
        lines += ["", f"[method.{json.dumps(method)}]", *(line(*item) for item in options.items())]
    return "\n".join(lines).strip() + "\n"


def read_file(path: Path) -> str:
    """Return the text of a file; raise ConfigError with its path if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None


# ---- layers of options ---------------------------------------------------------------------------


def resolve(*layers: Mapping[str, Any]) -> Config:
    """Return the options of all layers, the last one on top, over their preset.

    A layer overrides everything below it: its ``lr`` also replaces the lr of single methods.
    Without a preset, the data set determines it.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _merge(merged, layer)
    name = merged.get("preset") or default_preset(merged.get("data", Config.data))
    options = _merge(PRESETS[name].options, merged)
    config = Config(**{**options, "preset": name, "overrides": merged})
    if config.optimizer == "adamw" and "lr" not in merged:
        raise ConfigError("lr: required with adamw (presets are for SGD); torch's default is 0.001")
    if not config.augment and "cache" not in merged:
        config = replace(config, cache=min(config.cache, 1))
    _check_combination(config)
    size = config.image_size or DEFAULT_SIZES.get(config.data)
    unset = [name for name in TEACHER_OPTIONS if getattr(config, name) is None]
    teacher_options = {name: getattr(config, name.removeprefix("teacher_")) for name in unset}
    root, is_default_root = config.root, config.data == "fashion-mnist" and "root" not in options
    if is_default_root and not Path(root, "FashionMNIST").is_dir() and FASHION_MNIST.is_dir():
        root = str(FASHION_MNIST)
    return replace(config, image_size=size, root=root, **teacher_options)


def _merge(base: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """Return the base with a layer on top. A new form drops the betas below it, except "auto"."""
    overridden = {*layer}
    if layer.get("betas"):
        overridden.add("beta")
    if layer.get("beta") is not None:
        overridden.add("betas")

    def remaining(options: Mapping[str, Any], has_new_form: bool) -> dict[str, Any]:
        left = {name: value for name, value in options.items() if name not in overridden}
        if has_new_form and left.get("beta") != "auto":
            left.pop("beta", None)
        return left

    methods, has_new_form = {}, "form" in layer
    for method in dict.fromkeys([*base.get("method", {}), *layer.get("method", {})]):
        below, above = (each.get("method", {}).get(method, {}) for each in (base, layer))
        if options := remaining(below, has_new_form or "form" in above) | above:
            methods[method] = options
    return {**remaining(base, has_new_form), **layer, "method": methods}


def _check_combination(config: Config) -> None:
    """Raise ConfigError if options contradict each other."""

    def check(name: str, is_valid: bool, expected: str) -> None:
        if not is_valid:
            raise ConfigError(f"{name}: got {getattr(config, name)!r}, expected {expected}")

    c, data, is_cifar = config, config.data, config.data[:5] == "cifar"
    check("data", data != "own", "MODULE:FUNCTION with --preset own")
    for name in ("image_size", "mean", "std", "augment"):
        check(
            name,
            not is_import_path(data) or getattr(c, name) in (None, (), True),
            f"no value with data {data!r}: its function makes the images",
        )
    check("image_size", not is_cifar or c.image_size in (None, 32), f"32 for {data}")
    padded = data != "fashion-mnist" or (c.image_size or 28) >= 28
    check("image_size", padded, f"28 or more for {data}, which pads its images")
    check("nesterov", not c.nesterov or c.momentum > 0, "false when momentum is 0")
    check("betas", not c.betas or c.beta is None, "no value when beta is given")
    check("betas", not c.betas or c.validation > 0, "no value without --validation")
    check("compare", 0 < len({*c.compare}) == len(c.compare), "one or more methods, each once")
    check("betas", len({*c.betas}) == len(c.betas), "distinct numbers")
    check("cache", c.cache < 2 or c.augment, "0 or 1 with --no-augment")
    for method in c.compare:
        each = c.for_method(method)
        has_beta = each.form == "code" or each.beta is not None or bool(c.betas)
        expected = f"auto, or a number for {method} with form 'paper'; the default is for 'code'"
        check("beta", has_beta or method not in WITH_AT, expected)
        if each.beta == "auto" and method in WITH_BETA and method not in WITH_AT:
            raise ConfigError(
                f"beta: got 'auto', expected a number for {method}; --set at.beta=auto sets it "
                "for one method"
            )


def reason_unused(config: Config, name: str, processes: int = 1) -> str:
    """Return the reason why an option has no effect in a run, or an empty string."""
    using = [method for method in config.compare if method in methods_using(name)]
    key = "beta" if name == "betas" else name
    # A teacher without an lr of its own takes the students'.
    lr = getattr(config, f"teacher_{name}", None)
    teaches = config.trains_teacher and lr == getattr(config, name)
    if using and not teaches and all(key in config.method.get(m, {}) for m in using):
        return f"--set overrides it for {', '.join(using)}"
    is_used, reason = {
        "T": (any(config.for_method(method).alpha for method in using), "alpha is 0"),
        "init": (config.trains_teacher or not config.student_from, "all weights come from files"),
        **dict.fromkeys(
            ("lr_factor", "reset_momentum"), (bool(config.lr_drops), "lr_drops is empty")
        ),
        "sync_norm": (max(config.nproc, processes) > 1, "there is only one process"),
    }.get(name, (True, ""))
    for names, other, values in USED_ONLY_IF:
        value, verb = getattr(config, other), "includes" if other == "compare" else "is"
        kinds = {*value} if other == "compare" else {"own" if is_import_path(value) else value}
        if name in names and not kinds & {*values}:
            return f"it requires that {other} {verb} {' or '.join(values) or 'not given'}"
    return "" if is_used else reason


def methods_to_draw(config: Config) -> list[str]:
    """Return the methods in the figure of attention maps: the baseline and the first with AT."""
    first, *others = config.compare
    return [first, *(method for method in others if method in WITH_AT)][:2]


def published_errors(config: Config) -> Mapping[str, tuple[float, ...]]:
    """Return the published errors of a run's data set and networks, or an empty dictionary."""
    preset = PRESETS[config.preset]
    same = all(getattr(config, n) == preset.options.get(n) for n in ("data", "student", "teacher"))
    return preset.published_errors if same else {}
