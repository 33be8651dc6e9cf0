"""Named sets of options: the paper's experiments, with the errors that it published for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from at_fused.train.rules import ConfigError, nearest


@dataclass(frozen=True)
class Preset:
    """Options over the defaults, and what was published for them."""

    about: str
    options: Mapping[str, Any] = field(default_factory=dict)
    # Of each method, and of "teacher": test error in percent, top-1 and (ImageNet) top-5.
    published: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    source: str = "Zagoruyko & Komodakis, ICLR 2017"


# Section 4.1 and the authors' program. That beta decays with KD is said there, not how.
_CIFAR: dict[str, Any] = {
    "data": "cifar10",
    "labels": 0,
    "compare": ("none", "at", "f-actt", "kd", "at+kd"),
    "seeds": 5,
    "epochs": 200,
    "batch_size": 128,
    "lr": 0.1,
    "lr_schedule": "step",
    "lr_drops": (0.3, 0.6, 0.8),
    "lr_factor": 0.2,
    "nesterov": False,
    "weight_decay": 5e-4,
    "teacher_epochs": None,
    "teacher_weight_decay": None,
    "speed": "auto",
    "threads": 0,
    "evaluate_every": 1,
    "method": {"at+kd": {"beta_schedule": "linear"}},
}


def _cifar(student: str, teacher: str, *errors: float) -> Preset:
    names = ("none", "at", "f-actt", "kd", "at+kd", "teacher")
    return Preset(
        f"CIFAR-10, {student.upper()} from {teacher.upper()} (the paper's table 1)",
        {**_CIFAR, "student": student, "teacher": teacher},
        {name: (error,) for name, error in zip(names, errors, strict=True)},
    )


_IMAGENET: dict[str, Any] = {
    **_CIFAR,
    "data": "folder",
    "compare": ("none", "at"),
    "seeds": 1,
    "epochs": 90,
    "batch_size": 256,
    "lr_drops": (1 / 3, 2 / 3),
    "lr_factor": 0.1,
    "weight_decay": 1e-4,
    "workers": 8,
    "student": "resnet-18",
    "teacher": "resnet-34",
    "method": {},
}

PRESETS: dict[str, Preset] = {
    "digits": Preset("scikit-learn's digits, students of 20 labelled ones, 15 seeds"),
    "digits-quick": Preset(
        "the same in well under a minute, for a look at the program",
        {"seeds": 2, "epochs": 140, "teacher_epochs": 6, "teacher": "wrn-10-2"},
    ),
    "cifar-wrn-16-1-from-16-2": _cifar("wrn-16-1", "wrn-16-2", 8.77, 7.93, 8.51, 7.41, 7.51, 6.31),
    "cifar-wrn-16-1-from-40-1": _cifar("wrn-16-1", "wrn-40-1", 8.77, 8.25, 8.62, 8.39, 8.01, 6.58),
    "cifar-wrn-16-2-from-40-2": _cifar("wrn-16-2", "wrn-40-2", 6.31, 5.85, 6.24, 6.08, 5.71, 5.23),
    "imagenet-resnet18-from-34": Preset(
        "ImageNet, ResNet-18 from ResNet-34 (the paper's table 5)",
        _IMAGENET,
        {"none": (30.4, 10.8), "at": (29.3, 10.0)},
    ),
}


def preset(name: str) -> Preset:
    """The preset of a name; ConfigError names the nearest."""
    try:
        return PRESETS[name]
    except KeyError:
        raise ConfigError(
            f"preset: got {name!r}, allowed is {', '.join(PRESETS)}{nearest(name, PRESETS)}"
        ) from None
