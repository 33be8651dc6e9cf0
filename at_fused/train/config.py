"""Options of a run: what each takes, presets, files of them, and what layers of them come to.

Imports nothing heavy: the command line is made of these options, and answers --help at once.
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
    """An option, file or data set that a user can put right; its text says how, in a line."""


@contextmanager
def naming(name: object) -> Iterator[None]:
    """Let the ConfigErrors of a block begin with a name."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def is_import(value: object) -> bool:
    """Tell MODULE:FUNCTION from the name of something built in."""
    return isinstance(value, str) and re.fullmatch(r"[\w.]+:\w+", value) is not None


def imported(option: str, name: str) -> Callable[..., Any]:
    """Return the function that "MODULE:FUNCTION" names, from the working folder if nowhere else."""
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found: Callable[..., Any] = attrgetter(function)(import_module(module))
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{option}: {name!r} cannot be imported: {in_a_line(error)}") from error
    return found


def in_a_line(error: BaseException) -> str:
    """Return the kind of an error and the first line of its text."""
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")


def nearest(name: str, names: Iterable[str]) -> str:
    """Return words for an error: the known name that a wrong one may have meant."""
    found = get_close_matches(name, list(names), n=1)
    return f"; did you mean {found[0]}?" if found else ""


# ---- rules of options ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """The values that an option takes."""

    type: type
    allowed: str  # in words
    accepts: Callable[[Any], bool] = lambda value: True
    metavar: str = ""
    names: tuple[str, ...] = ()
    words: tuple[str, ...] = ()  # in place of a number
    many: bool = False  # a list, on the command line with commas
    default: Any = None
    help: str = ""

    def check(self, value: Any) -> Any:
        """Return the value; ConfigError says what is allowed."""
        if self.many:
            if not isinstance(value, list | tuple):
                raise ConfigError(f"got {value!r}, allowed is a list of {self.allowed}")
            return tuple(map(replace(self, many=False).check, value))
        if isinstance(value, str) and value in self.words:
            return value
        types = (int, float) if self.type is float else (self.type,)
        if type(value) not in types or not self.accepts(value):
            near = nearest(str(value), self.names)
            raise ConfigError(f"got {value!r}, allowed is {self.allowed}{near}")
        return self.type(value)

    def read(self, word: str) -> Any:
        """Return the value of a word of the command line: argparse's ``type``."""
        if self.many:
            return self.check([self._typed(each) for each in word.split(",") if word.strip()])
        return self.check(self._typed(word))

    def _typed(self, word: str) -> Any:
        try:
            return self.type(word.strip())
        except ValueError:
            return word


def word_of(value: Any) -> str:
    """Return a value as a word of the command line, with the digits that it was given with."""
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def whole(low: int, high: int) -> Rule:
    """A whole number."""
    return Rule(int, f"a whole number from {low} to {high}", lambda x: low <= x <= high, "N")


def real(low: float, high: float) -> Rule:
    """A number."""
    return Rule(float, f"a number from {low:g} to {high:g}", lambda x: low <= x <= high, "X")


def real_or(word: str, low: float, high: float) -> Rule:
    """A number, or a word."""
    rule = real(low, high)
    return replace(rule, allowed=f"{rule.allowed}, or {word}", words=(word,), metavar=f"X|{word}")


def choice(*names: str, imports: bool = False) -> Rule:
    """One of a few words; with ``imports`` also MODULE:FUNCTION."""
    return Rule(
        str,
        ", ".join(names) + ", or MODULE:FUNCTION" * imports,
        lambda value: value in names or (imports and is_import(value)),
        "|".join(names) + "|MODULE:FUNCTION" * imports,
        names,
    )


def text(metavar: str) -> Rule:
    """Any text."""
    return Rule(str, "text", metavar=metavar)


SWITCH = Rule(bool, "true or false")
DEVICE = Rule(
    str, "cpu, cuda or cuda:N", lambda x: bool(re.fullmatch(r"cpu|cuda(:\d+)?", x)), "DEV"
)


def several(of: Rule) -> Rule:
    """A list."""
    return replace(of, many=True, metavar="A,B")


def option(default: Any, rule: Rule, help: str) -> Any:
    """A field of Config; a default None is an option that is not given."""
    return field(default=default, metadata={"rule": replace(rule, help=help, default=default)})


# ---- methods -------------------------------------------------------------------------------------

# By name, and as tables and pictures call them.
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
ATTENTION = ("at", "at+kd", "channel-at")  # those with the AT loss
TRANSFER = (*ATTENTION, "f-actt", "gradient-at", "flip-symmetry")  # those with a beta
WITH_KD = ("kd", "at+kd")  # those with KD's loss
NEEDS_LAYERS = (*ATTENTION, "f-actt")
NEEDS_TEACHER = (*NEEDS_LAYERS, "kd", "gradient-at")
# Height and width of each data set's images, where nothing else is said.
SIZES = {"digits": 16, "fashion-mnist": 32, "cifar10": 32, "cifar100": 32, "folder": 224}
# The folder of Debian's package dataset-fashion-mnist, which is used where it is installed, no
# root is given, and the default has no such files.
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
# A method may have each of these to itself: a rate that suits one handicaps another.
METHOD_OPTIONS: tuple[str, ...] = (
    *("beta", "beta_schedule", "p", "collapse", "form", "T", "alpha"),
    *("lr", "weight_decay"),
)
OF_TEACHER = ("teacher_epochs", "teacher_lr", "teacher_weight_decay")
# Options that only some runs read: where another option has one of these values.
READ_WITH: tuple[tuple[tuple[str, ...], str, tuple[str, ...]], ...] = (
    (("beta", "betas", "beta_schedule"), "compare", TRANSFER),
    (("p", "collapse", "form"), "compare", ATTENTION),
    (("T", "alpha"), "compare", WITH_KD),
    (("cache",), "compare", ("at", "kd", "at+kd", "channel-at")),
    (("layers",), "compare", NEEDS_LAYERS),
    (("teacher", "teacher_from", *OF_TEACHER), "compare", NEEDS_TEACHER),
    (OF_TEACHER, "teacher_from", ("",)),
    (("root",), "data", ("fashion-mnist", "cifar10", "cifar100", "folder", "own")),
    (("download",), "data", ("fashion-mnist", "cifar10", "cifar100")),
    (("workers",), "data", ("folder", "own")),
    (("skip_unreadable",), "data", ("folder",)),
    (("lr_drops", "lr_factor", "reset_momentum"), "lr_schedule", ("step",)),
    (("momentum", "nesterov"), "optimizer", ("sgd",)),
    (("compile",), "speed", ("auto", "fp32", "bf16", "fp16")),
)
# Used where none is given: the paper's, for the form "code"; the others are nobody's.
BETAS = {**dict.fromkeys(ATTENTION, 1e3), "f-actt": 1.0, "gradient-at": 1.0, "flip-symmetry": 1.0}


# ---- presets -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preset:
    """Options over the defaults, and what was published for them."""

    about: str
    options: Mapping[str, Any] = field(default_factory=dict)
    # Test error in percent, top-1 and (ImageNet) top-5, by method and for "teacher".
    published: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


# Rate and beta of each method by validation images (docs/results.md): with one rate for all, part
# of a method's gain would be another's handicap.
_DIGITS: dict[str, Any] = {"data": "digits", "labels": 20, "student": "wrn-10-1-b8", "seeds": 20}
_DIGITS |= {"epochs": 300, "batch_size": 64, "nesterov": True, "weight_decay": 2e-2}
_DIGITS |= {"teacher_epochs": 25, "teacher_weight_decay": 5e-4}
_DIGITS |= {"speed": "exact", "threads": 1, "evaluate_every": 30}
# A picture can be shifted in nine ways.
_DIGITS |= {"cache": 20}
_DIGITS["method"] = {
    "none": {"lr": 0.5},
    "at": {"beta": 100.0},
    "at+kd": {"beta": 300.0},
}
_QUICK = {"seeds": 2, "epochs": 140, "teacher_epochs": 6, "teacher": "wrn-10-2"}

# Options of the paper and of the authors' program.
_PAPER: dict[str, Any] = {"init": "paper", "lr_schedule": "step", "reset_momentum": True}
# Section 4.1 and the program, which drops the rate at the beginning of epochs 60, 120 and 160,
# counted from 1. That beta decays with KD is said in the paper, not how.
_CIFAR: dict[str, Any] = {
    **_PAPER,
    "data": "cifar10",
    "compare": ("none", "at", "f-actt", "kd", "at+kd"),
    "seeds": 5,
    "lr_drops": (59 / 200, 119 / 200, 159 / 200),
    "method": {"at+kd": {"beta_schedule": "linear"}},
}


# The same recipe in 1,876 steps, or 480 for 1,000 images, in place of 78,200. Rates and betas are
# the paper's, but for what was 0.1 points better on validation images (docs/results.md).
_FASHION: dict[str, Any] = {
    **_PAPER,
    "data": "fashion-mnist",
    "seeds": 5,
    "lr_drops": _CIFAR["lr_drops"],
    "epochs": 4,
    "cache": 4,
    "teacher_epochs": 6,
    "method": {"none": {"lr": 0.4}, "at": {"lr": 0.2, "beta": 100.0}},
    # Compiling a network takes longer than it saves in so few steps.
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


# Presets without a published beta measure it: docs/results.md has the study.
_AUTO: dict[str, Any] = {"method": {method: {"beta": "auto"} for method in ATTENTION}}
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
    "digits": Preset("scikit-learn's digits, students of 20 labelled ones, 20 seeds", _DIGITS),
    "digits-quick": Preset("the same in well under a minute", {**_DIGITS, **_QUICK}),
    "fashion-mnist": Preset("Fashion-MNIST, WRN-16-1 from WRN-16-2, 5 seeds", _FASHION),
    "fashion-mnist-few": Preset(
        "the same, students of 1,000 labelled images, 10 seeds", {**_FASHION, **_FASHION_FEW}
    ),
    "cifar-wrn-16-1-from-16-2": _cifar("wrn-16-1", "wrn-16-2", 8.77, 7.93, 8.51, 7.41, 7.51, 6.31),
    "cifar-wrn-16-1-from-40-1": _cifar("wrn-16-1", "wrn-40-1", 8.77, 8.25, 8.62, 8.39, 8.01, 6.58),
    "cifar-wrn-16-2-from-40-2": _cifar("wrn-16-2", "wrn-40-2", 6.31, 5.85, 6.24, 6.08, 5.71, 5.23),
    "imagenet-resnet18-from-34": Preset(
        "ImageNet, ResNet-18 from torchvision's ResNet-34 (the paper's table 5)",
        _IMAGENET,
        {"none": (30.4, 10.8), "at": (29.3, 10.0)},
    ),
    "folder": Preset("a folder of pictures, ResNet-18 from ResNet-34", {**_FOLDER, **_AUTO}),
    "own": Preset(
        "a data set of one's own, MODULE:FUNCTION; WRN-16-1 from 16-2", {"data": "own", **_AUTO}
    ),
}


def preset_of(data: str) -> str:
    """Return the preset that suits a data set, where none is named."""
    if is_import(data):
        return "own"
    return data if data in PRESETS else "cifar-wrn-16-1-from-16-2"


# ---- the options --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """All options of a run. The defaults suit any images; nothing in them was tuned."""

    preset: str = option(
        "", replace(choice(*PRESETS), metavar="NAME"), "where the other options' defaults come from"
    )

    data: str = option("digits", choice(*SIZES, imports=True), "the images, or one's own")
    root: str = option(
        "data", text("DIR"), "folder of the files, or with train/ and val/ of images"
    )
    download: bool = option(False, SWITCH, "fetch Fashion-MNIST or CIFAR if it is not there")
    image_size: int | None = option(None, whole(4, 1024), "height and width (as the data have)")
    mean: tuple[float, ...] = option((), several(real(0, 1)), "of each channel in [0, 1]")
    std: tuple[float, ...] = option((), several(real(1e-6, 1)), "of each channel, as --mean")
    skip_unreadable: int = option(0, whole(0, 10**9), "unreadable pictures that may be left out")
    fraction: float = option(1.0, real(1e-6, 1.0), "part of the training images that is used")
    validation: float = option(0.0, real(0, 0.9), "part of these that chooses epoch and beta")
    labels: int = option(0, whole(0, 10**9), "labelled images that a student sees, 0 for all")
    augment: bool = option(True, SWITCH, "shifted and, but for digits, flipped images")
    evaluate: str = option(
        "test", choice("test", "val"), "images to report on: tune on val, set apart"
    )

    teacher: str = option("wrn-16-2", text("NETWORK"), "the teacher's network")
    student: str = option("wrn-16-1", text("NETWORK"), "the student's network")
    teacher_from: str = option("", text("FILE"), "weights of a trained teacher; or torchvision")
    student_from: str = option("", text("FILE"), "first weights of students; or torchvision")
    init: str = option("torch", choice("torch", "paper"), "first weights: torch's, the authors'")
    layers: str = option("", text("NAMES"), "A,B or STUDENT:TEACHER,... (found where not given)")

    compare: tuple[str, ...] = option(
        ("none", "at", "kd", "at+kd"),
        several(choice(*METHODS)),
        f"of {', '.join(METHODS)}; the first is the baseline",
    )
    seeds: int = option(3, whole(1, 1000), "students per method, each with its own start and order")
    beta: float | str | None = option(
        None,
        real_or("auto", 0, 1e9),
        "weight of the transfer loss (1000 for AT), or auto, by the first gradients",
    )
    betas: tuple[float, ...] = option((), several(real(0, 1e9)), "to choose from, by --validation")
    beta_schedule: str = option(
        "constant", choice("constant", "linear", "cosine"), "the latter two fall to 0"
    )
    p: float = option(2.0, real(1, 100), "power in the attention map")
    collapse: str = option("mean", choice("mean", "sum", "max"), "over the channels, in the map")
    form: str = option("code", choice("code", "paper"), "the AT loss: authors' code, or eq. (2)")
    T: float = option(4.0, real(1e-3, 1e4), "temperature of KD")
    alpha: float = option(0.9, real(0, 1), "weight of KD's soft labels; the labels have the rest")
    label_smoothing: float = option(0.0, real(0, 0.99), "of the labels in the cross-entropy")

    epochs: int = option(200, whole(1, 10**6), "passes of a student over its images")
    batch_size: int = option(128, whole(2, 10**6), "images a step, on all devices together")
    optimizer: str = option("sgd", choice("sgd", "adamw"), "torch's SGD or AdamW")
    lr: float = option(0.1, real(0, 1e3), "learning rate at the start")
    warmup: float = option(0.0, real(0, 1e6), "epochs in which the rate rises from 0")
    lr_schedule: str = option("cosine", choice("step", "cosine"), "drops, or half a cosine to 0")
    lr_drops: tuple[float, ...] = option(
        (0.3, 0.6, 0.8), several(real(0, 1)), "where the rate drops, as parts of the run"
    )
    lr_factor: float = option(0.2, real(0, 1), "factor of each drop")
    reset_momentum: bool = option(False, SWITCH, "momentum from 0 at each drop, as the authors")
    momentum: float = option(0.9, real(0, 1), "SGD's momentum")
    nesterov: bool = option(False, SWITCH, "Nesterov's momentum")
    weight_decay: float = option(5e-4, real(0, 10), "weight decay")
    teacher_epochs: int | None = option(None, whole(1, 10**6), "the teacher's epochs (a student's)")
    teacher_lr: float | None = option(None, real(0, 1e3), "the teacher's lr (a student's)")
    teacher_weight_decay: float | None = option(None, real(0, 10), "the teacher's (a student's)")

    speed: str = option(
        "auto",
        choice("auto", "exact", "fp32", "bf16", "fp16"),
        "how a step runs: auto takes bf16 where the device has it, exact is plain PyTorch",
    )
    compile: bool = option(True, SWITCH, "torch.compile, where speed is not exact")
    cache: int = option(0, whole(0, 10**6), "augmentations to keep the teacher's maps of, on disk")
    device: str = option("cpu", DEVICE, DEVICE.allowed)
    threads: int = option(0, whole(0, 1024), "CPU threads, 0 for one a core")
    workers: int = option(2, whole(0, 256), "processes that read a folder's images, or one's own")
    nproc: int = option(1, whole(1, 64), "processes to share each batch (or use torchrun)")
    sync_norm: bool = option(True, SWITCH, "BatchNorm over the batch that processes share")

    evaluate_every: int = option(1, whole(1, 10**6), "epochs between evaluations")
    checkpoint_every: int = option(1000, whole(1, 10**9), "steps between checkpoints")
    keep: int = option(2, whole(1, 1000), "checkpoints that are kept of a training run")

    method: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, metadata={})
    # The options over those of the preset, as one layer.
    given: Mapping[str, Any] = field(default_factory=dict, compare=False, metadata={})

    @property
    def needs_teacher(self) -> bool:
        """True where a method of the run has a teacher."""
        return any(method in NEEDS_TEACHER for method in self.compare)

    @property
    def trains_teacher(self) -> bool:
        """True where the run trains it."""
        return self.needs_teacher and not self.teacher_from

    def for_teacher(self) -> Config:
        """Return the configuration of the teacher's own training, of a resolved one."""
        own = {name.removeprefix("teacher_"): getattr(self, name) for name in OF_TEACHER}
        return replace(self, **own, cache=0, labels=0, method={})

    def for_method(self, method: str) -> Config:
        """Return the configuration of one method's students."""
        own = self.method.get(method, {})
        # A general number for beta is of the general form.
        another = own.get("form", self.form) != self.form and self.beta != "auto"
        unknown = {"beta": None} if another else {}
        return replace(self, **{**unknown, **own})

    def beta_of(self, method: str) -> float | str:
        """Return the first weight of a method's transfer loss, of ``for_method(method)``."""
        if self.beta is None or method not in TRANSFER:
            return BETAS.get(method, 0.0)
        return self.beta


OPTIONS: dict[str, Rule] = {f.name: f.metadata["rule"] for f in fields(Config) if f.metadata}


def readers(name: str) -> tuple[str, ...]:
    """Return the methods that read an option."""
    found = [values for names, by, values in READ_WITH if name in names and by == "compare"]
    return found[0] if found else METHODS


def method_rule(method: str, name: str) -> Rule:
    """Return the rule of an option of one method; ConfigError for one that it has not."""
    choice(*METHOD_OPTIONS).check(name)
    choice(*readers(name)).check(method)
    return OPTIONS[name]


# ---- files ---------------------------------------------------------------------------------------


def from_toml(content: str) -> dict[str, Any]:
    """Return the options of a file, checked; ConfigError names the first that is wrong."""
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
        raise ConfigError("method must have a table for each method, as [method.at]")
    found: dict[str, Any] = {}
    for name, value in table.items():
        if name not in OPTIONS:
            raise ConfigError(f"no option is called {name!r}{nearest(name, [*OPTIONS, 'method'])}")
        with naming(name):
            found[name] = OPTIONS[name].check(value)
    for method, given in methods.items():
        for name, value in given.items():
            with naming(f"{method}.{name}"):
                given[name] = method_rule(method, name).check(value)
    return {**found, "method": methods}


def to_toml(config: Config) -> str:
    """Return the file of a configuration: what was given; the rest as a comment."""

    def line(name: str, value: Any) -> str:
        # JSON's strings, numbers, lists and booleans are TOML's.
        return f"{name} = {json.dumps(list(value) if isinstance(value, tuple) else value)}"

    own = [(method, given) for method, given in config.given.get("method", {}).items() if given]
    rest = {n: getattr(config, n) for n in OPTIONS if n not in config.given}
    lines = [
        *(line(name, value) for name, value in config.given.items() if name in OPTIONS),
        "",
        "# The other options, as the run has them. To change one, take its # away.",
        *(f"# {line(name, value)}" for name, value in rest.items() if value is not None),
    ]
    for method, options in own:
        lines += ["", f"[method.{json.dumps(method)}]", *(line(*item) for item in options.items())]
    return "\n".join(lines).strip() + "\n"


def read_file(path: Path) -> str:
    """Return the text of a file; ConfigError names it."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None


# ---- layers of options ---------------------------------------------------------------------------


def resolve(*layers: Mapping[str, Any]) -> Config:
    """Return the layers' options, the last on top, over those of the preset that they name.

    A layer beats all under it: its ``lr`` takes the place of the lr that a method had to itself.
    Without a preset the data set has one that suits it.
    """
    merged: dict[str, Any] = {}
    for each in layers:
        merged = _over(merged, each)
    name = merged.get("preset") or preset_of(merged.get("data", Config.data))
    options = _over(PRESETS[name].options, merged)
    config = Config(**{**options, "preset": name, "given": merged})
    if config.optimizer == "adamw" and "lr" not in merged:
        raise ConfigError("lr: must be given for adamw, as presets have SGD's; torch's is 0.001")
    if not config.augment and "cache" not in merged:  # a preset's
        config = replace(config, cache=min(config.cache, 1))
    _check_combination(config)
    size = config.image_size or SIZES.get(config.data)
    unset = [name for name in OF_TEACHER if getattr(config, name) is None]
    own = {name: getattr(config, name.removeprefix("teacher_")) for name in unset}
    root, packaged = config.root, config.data == "fashion-mnist" and "root" not in options
    if packaged and not Path(root, "FashionMNIST").is_dir() and FASHION_MNIST.is_dir():
        root = str(FASHION_MNIST)
    return replace(config, image_size=size, root=root, **own)


def _over(under: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """Put a layer over another. A number for beta goes with its form, "auto" is of each."""
    beaten = {*layer}
    if layer.get("betas"):
        beaten.add("beta")
    if layer.get("beta") is not None:
        beaten.add("betas")

    def kept(before: Mapping[str, Any], reformed: bool) -> dict[str, Any]:
        left = {n: value for n, value in before.items() if n not in beaten}
        if reformed and left.get("beta") != "auto":
            left.pop("beta", None)
        return left

    methods, reformed = {}, "form" in layer
    for method in dict.fromkeys([*under.get("method", {}), *layer.get("method", {})]):
        before, own = (each.get("method", {}).get(method, {}) for each in (under, layer))
        if found := kept(before, reformed or "form" in own) | own:
            methods[method] = found
    return {**kept(under, reformed), **layer, "method": methods}


def _check_combination(config: Config) -> None:
    """Raise ConfigError for options that do not go together."""

    def check(name: str, right: bool, allowed: str) -> None:
        if not right:
            raise ConfigError(f"{name}: got {getattr(config, name)!r}, allowed is {allowed}")

    c, data, own, cifar = config, config.data, is_import(config.data), config.data[:5] == "cifar"
    check("data", data != "own", "MODULE:FUNCTION with --preset own")
    for name in ("image_size", "mean", "std", "augment"):
        check(
            name,
            not own or getattr(c, name) in (None, (), True),
            f"none for {data!r}, whose images are made by its function",
        )
    check("image_size", not cifar or c.image_size in (None, 32), f"32 for {data}")
    padded = data != "fashion-mnist" or (c.image_size or 28) >= 28
    check("image_size", padded, f"28 or more for {data}, whose images get margins")
    check("nesterov", not c.nesterov or c.momentum > 0, "false where momentum is 0")
    check("betas", not c.betas or c.beta is None, "none where beta is given")
    check(
        "betas", not c.betas or c.validation > 0, "none without images to choose by: --validation"
    )
    check("compare", 0 < len({*c.compare}) == len(c.compare), "one method or more, each once")
    check("betas", len({*c.betas}) == len(c.betas), "numbers, each once")
    check("cache", c.cache < 2 or c.augment, "1 with --no-augment")
    for method in c.compare:
        each = c.for_method(method)
        known = each.form == "code" or each.beta is not None or bool(c.betas)
        allowed = f"auto, or a number for {method} in the form 'paper'; one for 'code' is not"
        check("beta", known or method not in ATTENTION, allowed)
        if each.beta == "auto" and method in TRANSFER and method not in ATTENTION:
            raise ConfigError(
                f"beta: got 'auto', allowed is a number for {method}; --set at.beta=auto sets it "
                "for one method"
            )


def unused(config: Config, name: str, processes: int = 1) -> str:
    """Return the reason why an option changes nothing in a run; empty where it does."""
    reading = [method for method in config.compare if method in readers(name)]
    key = "beta" if name == "betas" else name
    # The teacher has a student's lr where it has none of its own.
    lr = getattr(config, f"teacher_{name}", None)
    teaches = config.trains_teacher and lr == getattr(config, name)
    if reading and not teaches and all(key in config.method.get(m, {}) for m in reading):
        return f"{', '.join(reading)} have their own by --set"
    used, why = {
        "T": (any(config.for_method(method).alpha for method in reading), "alpha is 0"),
        "init": (config.trains_teacher or not config.student_from, "all weights come from files"),
        **dict.fromkeys(
            ("lr_factor", "reset_momentum"), (bool(config.lr_drops), "the rate does not drop")
        ),
        "sync_norm": (max(config.nproc, processes) > 1, "one process has the whole batch"),
    }.get(name, (True, ""))
    for names, other, values in READ_WITH:
        found = getattr(config, other)
        kinds = {*found} if other == "compare" else {"own" if is_import(found) else found}
        if name in names and not kinds & {*values}:
            return f"it is read where {other} has {' or '.join(values) or 'nothing'}"
    return "" if used else why


def drawn(config: Config) -> list[str]:
    """Return the methods whose attention maps are shown: the first, and the first of AT."""
    first, *others = config.compare
    return [first, *(method for method in others if method in ATTENTION)][:2]


def published(config: Config) -> Mapping[str, tuple[float, ...]]:
    """Return the errors that were published for a run's data set and networks; empty for others."""
    found = PRESETS[config.preset]
    same = all(getattr(config, n) == found.options.get(n) for n in ("data", "student", "teacher"))
    return found.published if same else {}
