"""Named sets of options: the paper's experiments, with the errors that it published for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from at_fused.train.rules import ConfigError, is_import, nearest

if TYPE_CHECKING:
    from at_fused.train.config import Config


@dataclass(frozen=True)
class Preset:
    """Options over the defaults, and what was published for them."""

    about: str
    options: Mapping[str, Any] = field(default_factory=dict)
    # Of each method, and of "teacher": test error in percent, top-1 and (ImageNet) top-5.
    published: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    source: str = "Zagoruyko & Komodakis, ICLR 2017"


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

# Section 4.1 and the authors' program, which drops the rate at the beginning of epochs 60, 120 and
# 160, counted from 1. That beta decays with KD is said in the paper, not how.
_CIFAR: dict[str, Any] = {
    "data": "cifar10",
    "compare": ("none", "at", "f-actt", "kd", "at+kd"),
    "seeds": 5,
    "init": "paper",
    "lr_schedule": "step",
    "lr_drops": (59 / 200, 119 / 200, 159 / 200),
    "reset_momentum": True,
    "method": {"at+kd": {"beta_schedule": "linear"}},
}


def _cifar(student: str, teacher: str, *errors: float) -> Preset:
    names = ("none", "at", "f-actt", "kd", "at+kd", "teacher")
    return Preset(
        f"CIFAR-10, {student.upper()} from {teacher.upper()} (the paper's table 1)",
        {**_CIFAR, "student": student, "teacher": teacher},
        {name: (error,) for name, error in zip(names, errors, strict=True)},
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
    "compare": ("none", "at"),
    "seeds": 1,
    "init": "paper",
    "batch_size": 256,
    "lr_schedule": "step",
    "lr_drops": (0.29, 0.59, 0.89),
    "lr_factor": 0.1,
    "reset_momentum": True,
    "weight_decay": 1e-4,
    "student": "resnet-18-paper",
    "teacher_from": "torchvision",
}

PRESETS: dict[str, Preset] = {
    "digits": Preset("scikit-learn's digits, students of 20 labelled ones, 15 seeds", _DIGITS),
    "digits-quick": Preset(
        "the same in well under a minute, for a look at the program",
        {**_DIGITS, "seeds": 2, "epochs": 140, "teacher_epochs": 6, "teacher": "wrn-10-2"},
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
    """The preset that suits a data set."""
    cifar = "cifar-wrn-16-1-from-16-2"
    return _OF_DATA.get("own" if is_import(data) else data, cifar)


def published(config: Config) -> Mapping[str, tuple[float, ...]]:
    """The errors that were published for a run's data set and networks; empty for others."""
    found = preset(config.preset)
    same = all(getattr(config, n) == found.options.get(n) for n in ("data", "student", "teacher"))
    return found.published if same else {}


def preset(name: str) -> Preset:
    """The preset of a name; ConfigError names the nearest."""
    try:
        return PRESETS[name]
    except KeyError:
        raise ConfigError(
            f"preset: got {name!r}, allowed is {', '.join(PRESETS)}{nearest(name, PRESETS)}"
        ) from None
