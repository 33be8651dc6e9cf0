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
    if not callable(found):
        raise ConfigError(f"{option}: {name!r} must be a function, got {type(found).__name__}")
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
    """The values that an option takes, and how the command line spells them."""

    allowed: str  # in words
    metavar: str
    accepts: Callable[[Any], bool]
    parse: Callable[[str], Any] = str  # of a word of the command line
    convert: Callable[[Any], Any] = lambda value: value  # before the check
    names: tuple[str, ...] = ()
    help: str = ""
    default: Any = None

    def check(self, value: Any, word: str | None = None) -> Any:
        """Return the value; ConfigError says what is allowed, and what was given by a word."""
        found = self.convert(value)
        if not self.accepts(found):
            given = found if word is None else word
            near = nearest(str(given), self.names)
            raise ConfigError(f"got {given!r}, allowed is {self.allowed}{near}")
        return found

    def read(self, word: str) -> Any:
        """Return the value of a word of the command line: argparse's ``type``."""
        return self.check(self.parse(word), word)


def _number(word: str) -> object:
    try:
        return int(word) if re.fullmatch(r"[+-]?\d+", word) else float(word)
    except ValueError:
        return word


def whole(low: int, high: int) -> Rule:
    """A whole number."""
    return Rule(
        f"a whole number from {low} to {high}",
        "N",
        lambda value: type(value) is int and low <= value <= high,
        _number,
    )


def real(low: float, high: float) -> Rule:
    """A number."""
    return Rule(
        f"a number from {low:g} to {high:g}",
        "X",
        lambda value: type(value) is float and low <= value <= high,
        _number,
        lambda value: float(value) if type(value) is int and abs(value) <= high else value,
    )


def choice(*names: str, imports: bool = False) -> Rule:
    """One of a few words; with ``imports`` also MODULE:FUNCTION."""
    return Rule(
        ", ".join(names) + ", or MODULE:FUNCTION" * imports,
        "|".join(names) + "|MODULE:FUNCTION" * imports,
        lambda value: value in names or (imports and is_import(value)),
        names=names,
    )


def text(metavar: str, pattern: str = ".*", allowed: str = "text") -> Rule:
    """A text of a pattern."""
    return Rule(
        allowed,
        metavar,
        lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None,
    )


def switch() -> Rule:
    """Yes or no."""
    return Rule(
        "true or false",
        "",
        lambda value: type(value) is bool,
        lambda word: {"true": True, "false": False}.get(word.lower(), word),
    )


def several(of: Rule, distinct: bool = False) -> Rule:
    """A list, on the command line with commas; ``distinct``: each once, and at least one."""
    return Rule(
        f"a list of {of.allowed}",
        "A,B",
        lambda value: (
            isinstance(value, tuple) and (not distinct or 0 < len(value) == len(set(value)))
        ),
        lambda word: (
            tuple(of.read(each.strip()) for each in word.split(",")) if word.strip() else ()
        ),
        lambda value: tuple(map(of.check, value)) if isinstance(value, list | tuple) else value,
    )


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
SIZES = {"digits": 16, "cifar10": 32, "cifar100": 32, "folder": 224}
# The methods that read an option. A method may have each to itself: a rate that suits one
# handicaps another.
METHOD_OPTIONS: dict[str, tuple[str, ...]] = {
    "beta": TRANSFER,
    "beta_schedule": TRANSFER,
    "p": ATTENTION,
    "collapse": ATTENTION,
    "form": ATTENTION,
    "T": WITH_KD,
    "alpha": WITH_KD,
    "lr": METHODS,
    "weight_decay": METHODS,
}
# Used where none is given. 1e3 is the paper's, for the form "code"; the others are nobody's.
BETAS = {"f-actt": 1.0, "gradient-at": 1.0, "flip-symmetry": 1.0}
AUTHORS_BETA = 1e3


@dataclass(frozen=True)
class Config:
    """All options of a run. The defaults suit any images; nothing in them was tuned."""

    preset: str = option("", text("NAME"), "where the other options' defaults come from")

    data: str = option("digits", choice(*SIZES, imports=True), "the images, or one's own")
    root: str = option("data", text("DIR"), "folder of CIFAR, or with train/ and val/ of images")
    download: bool = option(False, switch(), "fetch CIFAR if it is not there")
    image_size: int | None = option(
        None, whole(4, 1024), "height and width (16 for digits, 32 for CIFAR, 224 for a folder)"
    )
    mean: tuple[float, ...] = option((), several(real(0, 1)), "of each channel in [0, 1]")
    std: tuple[float, ...] = option((), several(real(1e-6, 1)), "of each channel, as --mean")
    skip_unreadable: int = option(0, whole(0, 10**9), "unreadable pictures that may be left out")
    fraction: float = option(1.0, real(1e-6, 1.0), "part of the training images that is used")
    validation: float = option(0.0, real(0, 0.9), "part of these that chooses epoch and beta")
    labels: int = option(0, whole(0, 10**9), "labelled images that a student sees, 0 for all")
    augment: bool = option(True, switch(), "shifted and, but for digits, flipped images")
    evaluate: str = option("test", choice("test", "val"), "digits to report on: tune on val")

    teacher: str = option("wrn-16-2", text("NETWORK"), "the teacher's network")
    student: str = option("wrn-16-1", text("NETWORK"), "the student's network")
    teacher_from: str = option("", text("FILE"), "weights of a trained teacher; or torchvision")
    student_from: str = option("", text("FILE"), "first weights of students; or torchvision")
    init: str = option("torch", choice("torch", "paper"), "first weights: torch's, the authors'")
    layers: str = option(
        "", text("NAMES"), "to compare, as A,B or STUDENT:TEACHER,... (found where not given)"
    )

    compare: tuple[str, ...] = option(
        ("none", "at", "kd", "at+kd"),
        several(choice(*METHODS), distinct=True),
        "methods to train a student with, the first of them the baseline",
    )
    seeds: int = option(3, whole(1, 1000), "students per method, each with its own start and order")
    beta: float | None = option(None, real(0, 1e9), "weight of the transfer loss (1000 for AT)")
    betas: tuple[float, ...] = option(
        (), several(real(0, 1e9)), "betas to choose from, by the accuracy on the validation share"
    )
    beta_schedule: str = option(
        "constant", choice("constant", "linear", "cosine"), "beta over the run, the latter two to 0"
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
    reset_momentum: bool = option(False, switch(), "momentum from 0 at each drop, as the authors")
    momentum: float = option(0.9, real(0, 1), "SGD's momentum")
    nesterov: bool = option(False, switch(), "Nesterov's momentum")
    weight_decay: float = option(5e-4, real(0, 10), "weight decay")
    teacher_epochs: int | None = option(None, whole(1, 10**6), "the teacher's epochs (a student's)")
    teacher_lr: float | None = option(None, real(0, 1e3), "the teacher's lr (a student's)")
    teacher_weight_decay: float | None = option(None, real(0, 10), "the teacher's (a student's)")

    speed: str = option(
        "auto",
        choice("auto", "exact", "fp32", "bf16", "fp16"),
        "how a step runs: auto takes bf16 where the device has it, exact is plain PyTorch",
    )
    compile: bool = option(True, switch(), "torch.compile, where speed is not exact")
    cache: int = option(
        0,
        whole(0, 10**6),
        "augmentations of an image that students see, whose teacher's maps are kept on disk; "
        "0: no cache, new ones each epoch",
    )
    device: str = option(
        "cpu", text("DEV", r"cpu|cuda(:\d+)?", "cpu, cuda or cuda:N"), "cpu, cuda or cuda:N"
    )
    threads: int = option(0, whole(0, 1024), "CPU threads, 0 for one a core")
    workers: int = option(2, whole(0, 256), "processes that read a folder's images, or one's own")
    nproc: int = option(1, whole(1, 64), "processes to share each batch (or use torchrun)")
    sync_norm: bool = option(True, switch(), "BatchNorm over the batch that processes share")

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
        names = ("epochs", "lr", "weight_decay")
        own = {name: getattr(self, f"teacher_{name}") for name in names}
        return replace(self, **own, cache=0, labels=0, method={})

    def for_method(self, method: str) -> Config:
        """Return the configuration of one method's students."""
        own = self.method.get(method, {})
        # The general beta is of the general form.
        unknown = {"beta": None} if own.get("form", self.form) != self.form else {}
        return replace(self, **{**unknown, **own})

    def beta_of(self, method: str) -> float:
        """Return the first weight of a method's transfer loss, of ``for_method(method)``."""
        return BETAS.get(method, AUTHORS_BETA) if self.beta is None else self.beta


OPTIONS: dict[str, Rule] = {f.name: f.metadata["rule"] for f in fields(Config) if f.metadata}


def method_option(method: str, name: str, value: Any, *, words: bool = False) -> tuple[str, Any]:
    """Return an option of one method, checked: (name, value)."""
    for given, known, kind in (
        (method, METHODS, "method"),
        (name, METHOD_OPTIONS, "option of a method"),
    ):
        if given not in known:
            near = nearest(given, known)
            raise ConfigError(f"{given!r} is no {kind}; there are {', '.join(known)}{near}")
    with naming(f"{method}.{name}"):
        if method not in METHOD_OPTIONS[name]:
            raise ConfigError(f"{name} is of {', '.join(METHOD_OPTIONS[name])}")
        return name, OPTIONS[name].read(value) if words else OPTIONS[name].check(value)


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
    found["method"] = {
        method: dict(method_option(method, *item) for item in options.items())
        for method, options in methods.items()
    }
    return found


def to_toml(config: Config) -> str:
    """Return the file of a configuration: what was given; the rest as a comment."""

    def line(name: str, value: Any) -> str:
        # JSON's strings, numbers, lists and booleans are TOML's.
        return f"{name} = {json.dumps(list(value) if isinstance(value, tuple) else value)}"

    given, tables = config.given.get("method", {}), []
    for sign in ("", "# "):
        for method, options in config.method.items():
            own = {n: v for n, v in options.items() if (n in given.get(method, {})) == (not sign)}
            if own:
                tables += ["", f"{sign}[method.{json.dumps(method)}]"]
                tables += [sign + line(*item) for item in own.items()]
    rest = {n: getattr(config, n) for n in OPTIONS if n not in config.given}
    lines = [
        *(line(name, value) for name, value in config.given.items() if name in OPTIONS),
        "",
        "# The other options, as the run has them. To change one, take its # away.",
        *(f"# {line(name, value)}" for name, value in rest.items() if value is not None),
        *tables,
    ]
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
    named = {name: each[name] for each in layers for name in ("data", "preset") if name in each}
    name = named.get("preset") or preset_of(named.get("data", Config.data))
    options = preset(name).options
    if preset_of(named.get("data", options["data"])) != preset_of(options["data"]):
        raise ConfigError(
            f"data: got {named['data']!r}, but the preset {name!r}, which --preset or a file "
            f"names, is of {options['data']}; leave it out, or name one of {named['data']}"
        )
    merged: dict[str, Any] = {}
    for each in layers:
        merged = _over(merged, each)
    config = Config(**{**_over(options, merged), "preset": name, "given": merged})
    if config.momentum == 0 and "nesterov" not in merged:
        config = replace(config, nesterov=False)
    if config.optimizer == "adamw" and "lr" not in merged:
        raise ConfigError("lr: must be given for adamw, as presets have SGD's; torch's is 0.001")
    _check_combination(config)
    size = config.image_size or SIZES.get(config.data)
    teachers = {f"teacher_{n}": getattr(config, n) for n in ("epochs", "lr", "weight_decay")}
    own = {n: value for n, value in teachers.items() if getattr(config, n) is None}
    return replace(config, image_size=size, **own)


def _over(under: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """Put a layer over another. A beta means another thing in each form, and goes with its own."""
    old_form = under.get("form", Config.form)
    form = layer.get("form", old_form)
    beaten = {*layer}
    if layer.get("betas"):
        beaten.add("beta")
    if layer.get("beta") is not None:
        beaten.add("betas")
    methods = {}
    for method in dict.fromkeys([*under.get("method", {}), *layer.get("method", {})]):
        before, own = (each.get("method", {}).get(method, {}) for each in (under, layer))
        found = {name: value for name, value in before.items() if name not in beaten} | own
        if "beta" not in own and found.get("form", form) != before.get("form", old_form):
            found.pop("beta", None)
        if found:
            methods[method] = found
    if form != old_form:
        beaten.add("beta")
    kept = {name: value for name, value in under.items() if name not in beaten}
    return {**kept, **layer, "method": methods}


def _check_combination(config: Config) -> None:
    """Raise ConfigError for options that do not go together."""
    if config.data == "own":
        raise ConfigError("data: must be given with --preset own, as MODULE:FUNCTION")
    for name in ("image_size", "mean", "std", "augment"):
        value = getattr(config, name)
        if is_import(config.data) and value not in (None, (), True):
            raise ConfigError(
                f"{name}: got {value}, allowed is none for {config.data!r}, whose function makes "
                "the images as the networks take them"
            )
    if config.data.startswith("cifar") and config.image_size not in (None, 32):
        raise ConfigError(f"image_size: got {config.image_size}, allowed is 32 for {config.data}")
    if config.data != "digits" and config.evaluate == "val":
        raise ConfigError(f"evaluate: got 'val', allowed is test for {config.data}")
    if config.nesterov and config.momentum == 0:
        raise ConfigError("nesterov: got True, but momentum is 0; allowed is false")
    if config.betas and config.beta is not None:
        raise ConfigError("betas: got both beta and betas, allowed is one of them")
    if config.betas and not config.validation:
        raise ConfigError("betas: need images to choose by, and not to report on: --validation 0.1")
    if len(set(config.betas)) < len(config.betas):
        raise ConfigError(f"betas: got {config.betas}, allowed is each once")
    if config.cache > 1 and not config.augment:
        raise ConfigError(f"cache: got {config.cache}, allowed is 1 with --no-augment")
    for method in config.compare:
        own = config.for_method(method)
        known = own.beta is not None or config.betas
        if method in ATTENTION and own.form == "paper" and not known:
            why = "in the form 'paper'; 1000 is for 'code'"
            raise ConfigError(f"beta: must be given for {method} {why}")


def unused(config: Config, name: str, processes: int = 1) -> str:
    """Return the reason why an option changes nothing in a run; empty where it does."""
    compared, own = config.compare, is_import(config.data)
    of_teacher = ("teacher", "teacher_from", "teacher_epochs", "teacher_lr", "teacher_weight_decay")
    users = {
        **METHOD_OPTIONS,
        "betas": TRANSFER,
        "layers": NEEDS_LAYERS,
        "cache": ("at", "kd", "at+kd", "channel-at"),
        **dict.fromkeys(of_teacher, NEEDS_TEACHER),
    }.get(name, compared)
    reading = [method for method in compared if method in users]
    if not reading:
        return f"it is of {', '.join(users)}, and --compare has {', '.join(compared)}"
    trained = config.trains_teacher
    # The teacher's lr is a student's where it has none of its own.
    teaches = trained and getattr(config, f"teacher_{name}", None) == getattr(config, name)
    key = "beta" if name == "betas" else name
    overridden = all(key in config.method.get(method, {}) for method in reading)
    several, step = max(config.nproc, processes) > 1, config.lr_schedule == "step"
    drops = step and bool(config.lr_drops)
    no_drop = "the rate does not drop" if step else "the rate follows a cosine"
    sgd = config.optimizer == "sgd"
    no_training = (not config.teacher_from, "the teacher of --teacher-from is not trained")
    used, why = {
        **dict.fromkeys(of_teacher[2:], no_training),
        "T": (any(config.for_method(method).alpha for method in reading), "alpha is 0"),
        "root": (config.data != "digits", "the digits come with scikit-learn"),
        "download": (config.data.startswith("cifar"), "only CIFAR is downloaded"),
        "workers": (config.data == "folder" or own, f"{config.data} is kept in memory"),
        "skip_unreadable": (config.data == "folder", "it is of the pictures of a folder"),
        "augment": (not own, f"{config.data} does as it likes"),
        "init": (not config.student_from or trained, "all weights come from files"),
        "lr_drops": (step, no_drop),
        "lr_factor": (drops, no_drop),
        "reset_momentum": (drops and sgd and config.momentum > 0, "it is of SGD whose rate drops"),
        **dict.fromkeys(("momentum", "nesterov"), (sgd, "it is SGD's")),
        "compile": (
            config.speed != "exact" and not (several and config.sync_norm),
            "--speed exact, and processes that share BatchNorm, go without",
        ),
        "sync_norm": (several, "one process has the whole batch"),
    }.get(name, (True, ""))
    if key in METHOD_OPTIONS and overridden and not teaches:
        return f"{', '.join(reading)} have their own by --set"
    return "" if used else why


def drawn(config: Config) -> list[str]:
    """Return the methods whose attention maps are shown: the first, and the first of AT."""
    first, *others = config.compare
    return [first, *(method for method in others if method in ATTENTION)][:2]


# ---- presets -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preset:
    """Options over the defaults, and what was published for them."""

    about: str
    options: Mapping[str, Any] = field(default_factory=dict)
    # Test error in percent, top-1 and (ImageNet) top-5, by method and for "teacher".
    published: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


# Each method at what is best for it on the validation images: with one rate for all, half of a
# method's gain would be another's handicap.
_DIGITS: dict[str, Any] = {
    "data": "digits",
    "labels": 20,
    "student": "wrn-10-1-b8",
    "seeds": 15,
    "epochs": 300,
    "batch_size": 64,
    "nesterov": True,
    "weight_decay": 2e-2,
    "teacher_epochs": 25,
    "teacher_weight_decay": 5e-4,
    "speed": "exact",
    "threads": 1,
    "evaluate_every": 20,
    "method": {
        "none": {"lr": 0.3},
        "at": {"beta": 100.0},
        "kd": {"lr": 0.2},
        "at+kd": {"beta": 100.0},
    },
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


def _cifar(student: str, teacher: str, *errors: float) -> Preset:
    return Preset(
        f"CIFAR-10, {student.upper()} from {teacher.upper()} (the paper's table 1)",
        {**_CIFAR, "student": student, "teacher": teacher},
        {n: (error,) for n, error in zip((*_CIFAR["compare"], "teacher"), errors, strict=True)},
    )


_FOLDER: dict[str, Any] = {
    "data": "folder",
    "epochs": 100,
    "workers": 8,
    "student": "resnet-18",
    "teacher": "resnet-34",
}
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
    "digits": Preset("scikit-learn's digits, students of 20 labelled ones, 15 seeds", _DIGITS),
    "digits-quick": Preset(
        "the same in well under a minute, for a look at the program",
        {**_DIGITS, **_QUICK},
    ),
    "cifar-wrn-16-1-from-16-2": _cifar("wrn-16-1", "wrn-16-2", 8.77, 7.93, 8.51, 7.41, 7.51, 6.31),
    "cifar-wrn-16-1-from-40-1": _cifar("wrn-16-1", "wrn-40-1", 8.77, 8.25, 8.62, 8.39, 8.01, 6.58),
    "cifar-wrn-16-2-from-40-2": _cifar("wrn-16-2", "wrn-40-2", 6.31, 5.85, 6.24, 6.08, 5.71, 5.23),
    "imagenet-resnet18-from-34": Preset(
        "ImageNet, ResNet-18 from torchvision's ResNet-34 (the paper's table 5)",
        _IMAGENET,
        {"none": (30.4, 10.8), "at": (29.3, 10.0)},
    ),
    "folder": Preset("a folder of pictures, ResNet-18 from ResNet-34", _FOLDER),
    "own": Preset("a data set of one's own, MODULE:FUNCTION; WRN-16-1 from 16-2", {"data": "own"}),
}
# The presets of data sets for which none is named.
_OF_DATA = {"digits": "digits", "folder": "folder", "own": "own"}


def preset_of(data: str) -> str:
    """Return the preset that suits a data set."""
    cifar = "cifar-wrn-16-1-from-16-2"
    return _OF_DATA.get("own" if is_import(data) else data, cifar)


def published(config: Config) -> Mapping[str, tuple[float, ...]]:
    """Return the errors that were published for a run's data set and networks; empty for others."""
    found = preset(config.preset)
    same = all(getattr(config, n) == found.options.get(n) for n in ("data", "student", "teacher"))
    return found.published if same else {}


def preset(name: str) -> Preset:
    """Return the preset of a name; ConfigError names the nearest."""
    if name not in PRESETS:
        near = nearest(name, PRESETS)
        raise ConfigError(f"preset: got {name!r}, allowed is {', '.join(PRESETS)}{near}")
    return PRESETS[name]
