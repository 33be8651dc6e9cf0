"""What a run is made of: options with their ranges, files of them, and what they come to.

Imports nothing heavy: the command line is made of these options, and answers --help at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from at_fused.train.rules import (
    ConfigError,
    check,
    choice,
    nearest,
    read,
    real,
    several,
    switch,
    text,
    whole,
)

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
# Height and width of each data set's images, where nothing else is said.
SIZES = {"digits": 16, "cifar10": 32, "cifar100": 32, "folder": 224}
# Options that a method may have to itself: a rate that suits one handicaps another.
OF_A_METHOD = (
    "beta",
    "beta_schedule",
    "p",
    "collapse",
    "form",
    "T",
    "alpha",
    "lr",
    "weight_decay",
)
# Where none is given. 1e3 is the paper's, for the form "code"; the others are nobody's.
BETAS = {"f-actt": 1.0, "gradient-at": 1.0, "flip-symmetry": 1.0}
AUTHORS_BETA = 1e3


@dataclass(frozen=True)
class Config:
    """All options of a run; the defaults are the preset "digits"."""

    preset: str = text("digits", "where the other options' defaults come from", shape="NAME")

    data: str = choice("digits", SIZES, "the images")
    root: str = text("data", "folder of CIFAR, or with train/ and val/ of images", shape="DIR")
    download: bool = switch(False, "fetch CIFAR if it is not there")
    image_size: int | None = whole(
        None, 4, 1024, "height and width (16 for digits, 32 for CIFAR, 224 for a folder)"
    )
    fraction: float = real(1.0, 1e-6, 1.0, "part of the training images that is used")
    labels: int = whole(20, 0, 10**9, "labelled images that a student sees, 0 for all")
    augment: bool = switch(True, "shifted and, but for digits, flipped images")
    evaluate: str = choice("test", ("test", "val"), "digits to report on: tune on val")

    teacher: str = text("wrn-16-2", "the teacher's network", shape="NETWORK")
    student: str = text("wrn-10-1-b8", "the student's network", shape="NETWORK")
    teacher_from: str = text("", "weights of a teacher, which is then not trained", shape="FILE")
    layers: str = text(
        "",
        "layers to compare, as A,B or STUDENT:TEACHER,... (found where not given)",
        shape="NAMES",
    )

    compare: tuple[str, ...] = several(
        ("none", "at", "kd", "at+kd"),
        {"kind": "choice", "allowed": METHODS},
        "methods to train a student with, the first of them the baseline",
    )
    seeds: int = whole(15, 1, 1000, "students per method, each with its own start and order")
    beta: float | None = real(None, 0, 1e9, "weight of the transfer loss (1000 for AT)")
    beta_schedule: str = choice(
        "constant", ("constant", "linear", "cosine"), "beta over the run, the latter two to 0"
    )
    p: float = real(2.0, 1, 100, "power in the attention map")
    collapse: str = choice("mean", ("mean", "sum", "max"), "over the channels, in the map")
    form: str = choice("code", ("code", "paper"), "the AT loss of the authors' code, or eq. (2)")
    T: float = real(4.0, 1e-3, 1e4, "temperature of KD")
    alpha: float = real(0.9, 0, 1, "weight of KD's soft labels; the labels have the rest")

    epochs: int = whole(300, 1, 10**6, "passes of a student over its images")
    batch_size: int = whole(64, 2, 10**6, "images a step, on all devices together")
    lr: float = real(0.1, 0, 1e3, "learning rate at the start")
    lr_schedule: str = choice("cosine", ("step", "cosine"), "drops, or half a cosine to 0")
    lr_drops: tuple[float, ...] = several(
        (0.3, 0.6, 0.8),
        {"kind": "real", "low": 0.0, "high": 1.0},
        "where the rate drops, as parts of the run",
    )
    lr_factor: float = real(0.2, 0, 1, "factor of each drop")
    momentum: float = real(0.9, 0, 1, "SGD's momentum")
    nesterov: bool = switch(True, "Nesterov's momentum")
    weight_decay: float = real(2e-2, 0, 10, "weight decay")
    teacher_epochs: int | None = whole(25, 1, 10**6, "the teacher's epochs (a student's)")
    teacher_lr: float | None = real(None, 0, 1e3, "the teacher's lr (a student's)")
    teacher_weight_decay: float | None = real(5e-4, 0, 10, "the teacher's (a student's)")

    speed: str = choice(
        "exact",
        ("auto", "exact", "fp32", "bf16", "fp16"),
        "how a step runs: auto takes bf16 where the device has it, exact is plain PyTorch",
    )
    compile: bool = switch(True, "torch.compile, where speed is not exact")
    cache: int = whole(
        0, 0, 10**6, "augmentations of an image whose teacher's maps are kept on disk, 0 for none"
    )
    device: str = text("cpu", "cpu, cuda or cuda:N", r"cpu|cuda(:\d+)?", shape="DEV")
    threads: int = whole(1, 0, 1024, "CPU threads, 0 for one a core")
    workers: int = whole(2, 0, 256, "processes that read a folder's images")
    nproc: int = whole(1, 1, 64, "processes to share each batch (or use torchrun)")
    sync_norm: bool = switch(True, "BatchNorm over the whole batch where processes share it")

    evaluate_every: int = whole(20, 1, 10**6, "epochs between evaluations")
    checkpoint_every: int = whole(1000, 1, 10**9, "steps between checkpoints")
    keep: int = whole(2, 1, 1000, "checkpoints that are kept of a training run")

    # Each method at what is best for it on the validation images: with one rate for all, half of a
    # method's gain would be another's handicap.
    method: Mapping[str, Mapping[str, Any]] = field(
        default_factory=lambda: {
            "none": {"lr": 0.3},
            "at": {"beta": 100.0},
            "kd": {"lr": 0.2},
            "at+kd": {"beta": 100.0},
        },
        metadata={},
    )


OPTIONS: dict[str, Field[Any]] = {f.name: f for f in fields(Config) if f.name != "method"}


def of_method(method: str, name: str, value: Any, *, words: bool = False) -> tuple[str, Any]:
    """An option of one method, checked: (name, value)."""
    if method not in METHODS:
        raise ConfigError(
            f"{method!r} is no method; there are {', '.join(METHODS)}{nearest(method, METHODS)}"
        )
    if name not in OF_A_METHOD:
        raise ConfigError(
            f"{name!r} is no option of a method; there are {', '.join(OF_A_METHOD)}"
            f"{nearest(name, OF_A_METHOD)}"
        )
    rule = OPTIONS[name].metadata
    try:
        return name, read(rule, value) if words else check(rule, value)
    except ConfigError as error:
        raise ConfigError(f"{method}.{name}: {error}") from None


# ---- files ---------------------------------------------------------------------------------------


def from_toml(content: str) -> dict[str, Any]:
    """The options of a file, checked; ConfigError names the first that is wrong."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        table = tomllib.loads(content)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"not TOML: {error}") from None
    found: dict[str, Any] = {}
    for name, value in table.items():
        if name == "method":
            if not isinstance(value, dict) or not all(isinstance(v, dict) for v in value.values()):
                raise ConfigError("method must have a table for each method, as [method.at]")
            found[name] = {
                method: dict(of_method(method, *item) for item in options.items())
                for method, options in value.items()
            }
            continue
        if name not in OPTIONS:
            raise ConfigError(f"no option is called {name!r}{nearest(name, [*OPTIONS, 'method'])}")
        try:
            found[name] = check(OPTIONS[name].metadata, value)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
    return found


def _toml(value: Any) -> str:
    # JSON's strings, numbers, lists and booleans are TOML's.
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def to_toml(config: Config) -> str:
    """The file that gives this configuration back."""
    lines = [
        f"{name} = {_toml(getattr(config, name))}"
        for name in OPTIONS
        if getattr(config, name) is not None
    ]
    for method, options in config.method.items():
        lines += ["", f"[method.{_toml(method)}]"]
        lines += [f"{name} = {_toml(value)}" for name, value in options.items()]
    return "\n".join(lines) + "\n"


def load(path: Path) -> dict[str, Any]:
    """The options of a TOML file; ConfigError names the file."""
    try:
        return from_toml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


# ---- what they come to ---------------------------------------------------------------------------


def resolve(*layers: Mapping[str, Any]) -> Config:
    """The preset that the last layer names, and the layers' options over it, the last on top."""
    from at_fused.train.presets import preset

    name = next((each["preset"] for each in reversed(layers) if "preset" in each), Config.preset)
    config = replace(Config(), **preset(name).options)
    for each in layers:
        own = {
            method: {**config.method.get(method, {}), **options}
            for method, options in each.get("method", {}).items()
        }
        config = replace(config, **{**each, "preset": name, "method": {**config.method, **own}})
    _agree(config)
    return replace(
        config,
        image_size=config.image_size or SIZES[config.data],
        teacher_epochs=config.teacher_epochs or config.epochs,
        teacher_lr=config.lr if config.teacher_lr is None else config.teacher_lr,
        teacher_weight_decay=(
            config.weight_decay
            if config.teacher_weight_decay is None
            else config.teacher_weight_decay
        ),
    )


def _agree(config: Config) -> None:
    """Raises ConfigError for options that do not go together."""
    if config.data.startswith("cifar") and config.image_size not in (None, 32):
        raise ConfigError(f"image_size: got {config.image_size}, allowed is 32 for {config.data}")
    if config.data != "digits" and config.evaluate == "val":
        raise ConfigError(f"evaluate: got 'val', allowed is test for {config.data}")
    for method in config.compare:
        own = for_method(config, method)
        if own.form == "paper" and own.beta is None and method in ATTENTION:
            raise ConfigError(
                f"beta: must be given for {method} in the form 'paper'; 1000 is for 'code'"
            )


def for_method(config: Config, method: str) -> Config:
    """The configuration of one method's students."""
    return replace(config, **config.method.get(method, {}))


def for_teacher(config: Config) -> Config:
    """The configuration of the teacher's own training, of a resolved one."""
    names = ("epochs", "lr", "weight_decay")
    return replace(config, **{name: getattr(config, f"teacher_{name}") for name in names})


def drawn(config: Config) -> list[str]:
    """The methods whose attention maps are shown: the first, and the first of AT."""
    first, *others = config.compare
    return [first, *(method for method in others if method in ATTENTION)][:2]


def beta_of(config: Config, method: str) -> float:
    """The weight of a method's transfer loss at the start, of ``for_method(config, method)``."""
    return BETAS.get(method, AUTHORS_BETA) if config.beta is None else config.beta
