"""Options of a run: their ranges, files of them, and what they come to.

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
    is_import,
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
TRANSFER = (*ATTENTION, "f-actt", "gradient-at", "flip-symmetry")  # those with a beta
SOFT = ("kd", "at+kd")  # those with KD's loss
NEEDS_LAYERS = (*ATTENTION, "f-actt")
NEEDS_TEACHER = (*NEEDS_LAYERS, "kd", "gradient-at")
# Height and width of each data set's images, where nothing else is said.
SIZES = {"digits": 16, "cifar10": 32, "cifar100": 32, "folder": 224}
# The methods that read an option. A method may have each to itself: a rate that suits one
# handicaps another.
OF_A_METHOD: dict[str, tuple[str, ...]] = {
    "beta": TRANSFER,
    "beta_schedule": TRANSFER,
    "p": ATTENTION,
    "collapse": ATTENTION,
    "form": ATTENTION,
    "T": SOFT,
    "alpha": SOFT,
    "lr": METHODS,
    "weight_decay": METHODS,
}
# Used where none is given. 1e3 is the paper's, for the form "code"; the others are nobody's.
BETAS = {"f-actt": 1.0, "gradient-at": 1.0, "flip-symmetry": 1.0}
AUTHORS_BETA = 1e3


@dataclass(frozen=True)
class Config:
    """All options of a run. The defaults suit any images; nothing in them was tuned."""

    preset: str = text("", "where the other options' defaults come from", shape="NAME")

    data: str = choice(
        "digits", SIZES, "the images; MODULE:FUNCTION is one's own data set", imports=True
    )
    root: str = text("data", "folder of CIFAR, or with train/ and val/ of images", shape="DIR")
    download: bool = switch(False, "fetch CIFAR if it is not there")
    image_size: int | None = whole(
        None, 4, 1024, "height and width (16 for digits, 32 for CIFAR, 224 for a folder)"
    )
    mean: tuple[float, ...] = several(
        (), {"kind": "real", "low": 0.0, "high": 1.0}, "of each channel, for pixels in [0, 1]"
    )
    std: tuple[float, ...] = several(
        (), {"kind": "real", "low": 1e-6, "high": 10.0}, "of each channel, as --mean"
    )
    skip_unreadable: int = whole(
        0, 0, 10**9, "pictures of a folder that may be left out, where they cannot be read"
    )
    fraction: float = real(1.0, 1e-6, 1.0, "part of the training images that is used")
    validation: float = real(
        0.0, 0, 0.9, "part of these that chooses each network's best epoch, and beta"
    )
    labels: int = whole(0, 0, 10**9, "labelled images that a student sees, 0 for all")
    augment: bool = switch(True, "shifted and, but for digits, flipped images")
    evaluate: str = choice("test", ("test", "val"), "digits to report on: tune on val")

    teacher: str = text("wrn-16-2", "the teacher's network", shape="NETWORK")
    student: str = text("wrn-16-1", "the student's network", shape="NETWORK")
    teacher_from: str = text(
        "", "weights of a teacher, which is then not trained; or torchvision", shape="FILE"
    )
    student_from: str = text(
        "", "weights that every student starts from; or torchvision", shape="FILE"
    )
    init: str = choice(
        "torch", ("torch", "paper"), "first weights: BatchNorm's 1, or the authors' in [0, 1]"
    )
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
    seeds: int = whole(3, 1, 1000, "students per method, each with its own start and order")
    beta: float | None = real(None, 0, 1e9, "weight of the transfer loss (1000 for AT)")
    betas: tuple[float, ...] = several(
        (),
        {"kind": "real", "low": 0.0, "high": 1e9},
        "betas to choose from, by the accuracy on the validation share",
    )
    beta_schedule: str = choice(
        "constant", ("constant", "linear", "cosine"), "beta over the run, the latter two to 0"
    )
    p: float = real(2.0, 1, 100, "power in the attention map")
    collapse: str = choice("mean", ("mean", "sum", "max"), "over the channels, in the map")
    form: str = choice("code", ("code", "paper"), "the AT loss of the authors' code, or eq. (2)")
    T: float = real(4.0, 1e-3, 1e4, "temperature of KD")
    alpha: float = real(0.9, 0, 1, "weight of KD's soft labels; the labels have the rest")
    label_smoothing: float = real(0.0, 0, 0.99, "of the labels in the cross-entropy")

    epochs: int = whole(200, 1, 10**6, "passes of a student over its images")
    batch_size: int = whole(128, 2, 10**6, "images a step, on all devices together")
    optimizer: str = choice("sgd", ("sgd", "adamw"), "torch's SGD or AdamW")
    lr: float = real(0.1, 0, 1e3, "learning rate at the start")
    warmup: float = real(0.0, 0, 1e6, "epochs in which the rate rises from 0")
    lr_schedule: str = choice("cosine", ("step", "cosine"), "drops, or half a cosine to 0")
    lr_drops: tuple[float, ...] = several(
        (0.3, 0.6, 0.8),
        {"kind": "real", "low": 0.0, "high": 1.0},
        "where the rate drops, as parts of the run",
    )
    lr_factor: float = real(0.2, 0, 1, "factor of each drop")
    reset_momentum: bool = switch(False, "momentum from 0 at each drop, as the authors have it")
    momentum: float = real(0.9, 0, 1, "SGD's momentum")
    nesterov: bool = switch(False, "Nesterov's momentum")
    weight_decay: float = real(5e-4, 0, 10, "weight decay")
    teacher_epochs: int | None = whole(None, 1, 10**6, "the teacher's epochs (a student's)")
    teacher_lr: float | None = real(None, 0, 1e3, "the teacher's lr (a student's)")
    teacher_weight_decay: float | None = real(None, 0, 10, "the teacher's (a student's)")

    speed: str = choice(
        "auto",
        ("auto", "exact", "fp32", "bf16", "fp16"),
        "how a step runs: auto takes bf16 where the device has it, exact is plain PyTorch",
    )
    compile: bool = switch(True, "torch.compile, where speed is not exact")
    cache: int = whole(
        0,
        0,
        10**6,
        "augmentations of an image that students see, whose teacher's maps are kept on disk; "
        "0: no cache, new ones each epoch",
    )
    device: str = text("cpu", "cpu, cuda or cuda:N", r"cpu|cuda(:\d+)?", shape="DEV")
    threads: int = whole(0, 0, 1024, "CPU threads, 0 for one a core")
    workers: int = whole(2, 0, 256, "processes that read a folder's images, or one's own")
    nproc: int = whole(1, 1, 64, "processes to share each batch (or use torchrun)")
    sync_norm: bool = switch(True, "BatchNorm over the whole batch where processes share it")

    evaluate_every: int = whole(1, 1, 10**6, "epochs between evaluations")
    checkpoint_every: int = whole(1000, 1, 10**9, "steps between checkpoints")
    keep: int = whole(2, 1, 1000, "checkpoints that are kept of a training run")

    method: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, metadata={})
    # The options over those of the preset, as one layer.
    given: Mapping[str, Any] = field(default_factory=dict, compare=False, metadata={})


OPTIONS: dict[str, Field[Any]] = {f.name: f for f in fields(Config) if f.metadata}


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
    if method not in OF_A_METHOD[name]:
        raise ConfigError(f"{method}.{name}: {name} is of {', '.join(OF_A_METHOD[name])}")
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


def _lines(method: Mapping[str, Mapping[str, Any]], sign: str = "") -> list[str]:
    lines = []
    for name, options in method.items():
        lines += ["", f"{sign}[method.{_toml(name)}]"]
        lines += [f"{sign}{option} = {_toml(value)}" for option, value in options.items()]
    return lines


def to_toml(config: Config) -> str:
    """The file that gives this configuration back: what was given; the rest as a comment."""
    own = [f"{name} = {_toml(value)}" for name, value in config.given.items() if name in OPTIONS]
    rest = [
        f"# {name} = {_toml(getattr(config, name))}"
        for name in OPTIONS
        if name not in config.given and getattr(config, name) is not None
    ]
    given = config.given.get("method", {})
    others = {
        method: {
            name: value for name, value in options.items() if name not in given.get(method, {})
        }
        for method, options in config.method.items()
    }
    lines = [
        *own,
        "",
        "# The other options, as the run has them. To change one, take its # away.",
        *rest,
        *_lines({method: options for method, options in given.items() if options}),
        *_lines({method: options for method, options in others.items() if options}, "# "),
    ]
    return "\n".join(lines).strip() + "\n"


def read_file(path: Path) -> str:
    """The text of a file; ConfigError names it."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None


def from_file(path: Path, content: str) -> dict[str, Any]:
    """The options of a file's text; ConfigError names the file."""
    try:
        return from_toml(content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def load(path: Path) -> dict[str, Any]:
    """The options of a TOML file; ConfigError names the file."""
    return from_file(path, read_file(path))


# ---- what they come to ---------------------------------------------------------------------------


def resolve(*layers: Mapping[str, Any]) -> Config:
    """The layers' options, the last on top, over those of the preset that they name.

    A layer beats all under it: its ``lr`` takes the place of the lr that a method had to itself.
    Without a preset the data set has one that suits it.
    """
    from at_fused.train.presets import preset, preset_of

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
    _agree(config)
    return replace(
        config,
        image_size=config.image_size or SIZES.get(config.data),
        teacher_epochs=config.teacher_epochs or config.epochs,
        teacher_lr=config.lr if config.teacher_lr is None else config.teacher_lr,
        teacher_weight_decay=(
            config.weight_decay
            if config.teacher_weight_decay is None
            else config.teacher_weight_decay
        ),
    )


def _over(under: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """A layer over another, or over all that are under it."""
    beaten = {*layer}
    if layer.get("betas"):
        beaten.add("beta")
    if layer.get("beta") is not None:
        beaten.add("betas")
    if layer.get("form", under.get("form", Config.form)) != under.get("form", Config.form):
        beaten.add("beta")  # which means another thing in each
    form = under.get("form", Config.form)
    methods = {}
    for method, own in under.get("method", {}).items():
        # A form that is given anew is another than the method's own, too.
        new = layer.get("form", own.get("form", form)) != own.get("form", form)
        gone = beaten | {"beta"} if new else beaten
        methods[method] = {name: value for name, value in own.items() if name not in gone}
    for method, own in layer.get("method", {}).items():
        before = methods.get(method, {})
        base = before.get("form", layer.get("form", form))
        if own.get("form", base) != base:
            before = {name: value for name, value in before.items() if name != "beta"}
            general = under.get("beta")
            if general is not None and "beta" not in own and "beta" not in layer:
                raise ConfigError(
                    f"beta: must be given for {method} in the form {own['form']!r}, by --set "
                    f"{method}.beta=X; {general:g} is for {base!r}"
                )
        methods[method] = {**before, **own}
    kept = {name: value for name, value in under.items() if name not in beaten}
    return {**kept, **layer, "method": {method: own for method, own in methods.items() if own}}


def _agree(config: Config) -> None:
    """Raises ConfigError for options that do not go together."""
    if config.data == "own":
        raise ConfigError("data: must be given with --preset own, as MODULE:FUNCTION")
    if config.data.startswith("cifar") and config.image_size not in (None, 32):
        raise ConfigError(f"image_size: got {config.image_size}, allowed is 32 for {config.data}")
    if config.data != "digits" and config.evaluate == "val":
        raise ConfigError(f"evaluate: got 'val', allowed is test for {config.data}")
    if config.nesterov and config.momentum == 0:
        raise ConfigError("nesterov: got True, but momentum is 0; allowed is false")
    if config.betas and config.beta is not None:
        raise ConfigError("betas: got both beta and betas, allowed is one of them")
    if config.betas and not config.validation:
        raise ConfigError(
            "betas: need images to choose by, which are not reported on: --validation 0.1"
        )
    if config.cache > 1 and not config.augment:
        raise ConfigError(
            f"cache: got {config.cache}, allowed is 1 with --no-augment: an image has one form"
        )
    if len(set(config.betas)) < len(config.betas):
        raise ConfigError(f"betas: got {config.betas}, allowed is each once")
    for method in config.compare:
        own = for_method(config, method)
        unknown = own.beta is None and not config.betas
        if own.form == "paper" and unknown and method in ATTENTION:
            raise ConfigError(
                f"beta: must be given for {method} in the form 'paper'; 1000 is for 'code'"
            )


def unused(config: Config, name: str, processes: int = 1) -> str:
    """The reason why an option changes nothing in a run; empty where it does."""
    compared, own = config.compare, is_import(config.data)
    users = {
        **OF_A_METHOD,
        "betas": TRANSFER,
        "layers": NEEDS_LAYERS,
        "cache": ("at", "kd", "at+kd", "channel-at"),
        **dict.fromkeys(("teacher", "teacher_from"), NEEDS_TEACHER),
        **dict.fromkeys(("teacher_epochs", "teacher_lr", "teacher_weight_decay"), NEEDS_TEACHER),
    }.get(name, compared)
    reading = [method for method in compared if method in users]
    if not reading:
        return f"it is of {', '.join(users)}, and --compare has {', '.join(compared)}"
    trained = not config.teacher_from and any(method in NEEDS_TEACHER for method in compared)
    # The teacher's lr is a student's where it has none of its own.
    teaches = trained and getattr(config, f"teacher_{name}", None) == getattr(config, name)
    key = "beta" if name == "betas" else name
    alone = all(key in config.method.get(method, {}) for method in reading)
    if key in OF_A_METHOD and alone and not teaches:
        return f"{', '.join(reading)} have their own by --set"
    if name == "T" and all(for_method(config, method).alpha == 0 for method in reading):
        return "alpha is 0"
    if name.startswith("teacher_") and name != "teacher_from" and config.teacher_from:
        return "the teacher of --teacher-from is not trained"
    several, step = max(config.nproc, processes) > 1, config.lr_schedule == "step"
    drops = step and bool(config.lr_drops)
    no_drop = "the rate does not drop" if step else "the rate follows a cosine"
    sgd = config.optimizer == "sgd"
    used, why = {
        "root": (config.data != "digits", "the digits come with scikit-learn"),
        "download": (config.data.startswith("cifar"), "only CIFAR is downloaded"),
        "workers": (config.data == "folder" or own, f"{config.data} is kept in memory"),
        "skip_unreadable": (config.data == "folder", "it is of the pictures of a folder"),
        "augment": (not own, f"{config.data} does as it likes"),
        "init": (not config.student_from or trained, "all weights come from files"),
        "lr_drops": (step, no_drop),
        "lr_factor": (drops, no_drop),
        "reset_momentum": (drops and sgd and config.momentum > 0, "it is of SGD whose rate drops"),
        "momentum": (sgd, "it is SGD's"),
        "nesterov": (sgd, "it is SGD's"),
        "compile": (
            config.speed != "exact" and not (several and config.sync_norm),
            "--speed exact, and processes that share BatchNorm, go without",
        ),
        "sync_norm": (several, "one process has the whole batch"),
    }.get(name, (True, ""))
    return "" if used else why


def for_method(config: Config, method: str) -> Config:
    """The configuration of one method's students."""
    return replace(config, **config.method.get(method, {}))


def for_teacher(config: Config) -> Config:
    """The configuration of the teacher's own training, of a resolved one."""
    names = ("epochs", "lr", "weight_decay")
    own = {name: getattr(config, f"teacher_{name}") for name in names}
    return replace(config, **own, cache=0, labels=0, method={})


def drawn(config: Config) -> list[str]:
    """The methods whose attention maps are shown: the first, and the first of AT."""
    first, *others = config.compare
    return [first, *(method for method in others if method in ATTENTION)][:2]


def beta_of(config: Config, method: str) -> float:
    """The weight of a method's transfer loss at the start, of ``for_method(config, method)``."""
    return BETAS.get(method, AUTHORS_BETA) if config.beta is None else config.beta
