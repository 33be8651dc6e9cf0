"""Find out which gradient ratio the best beta has, over several tasks.

    python scripts/beta_study.py --task digits-20 --out study --results docs/results/beta

Trains, for each beta of a grid of powers of ten and 10 seeds, a student with attention transfer,
and records the ratio of both gradients (at_fused.gradient_ratio, over beta) as it goes. Validation
images choose among the betas, test images report. Needs timm. Leaves TASK.json in the folder of
the results; students that it has are not trained again. An interrupted study goes on with the same
command, and begins the student anew that it was at.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from search_settings import Points, Settings, name_of
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import Dataset

from at_fused.balance import AutoBeta
from at_fused.train.config import Config, resolve
from at_fused.train.data import open_data
from at_fused.train.loop import Callbacks, Job, Point, Trainer
from at_fused.train.methods import Batch

BETAS = (1.0, 10.0, 100.0, 1e3, 1e4)
# The paper's formula is not squared.
PAPER_BETAS = (0.01, 0.1, 1.0, 10.0, 100.0)
SEEDS = 10
# Seeds whose ratio is recorded, and the steps before which it is.
RECORDED_SEEDS = 3
RECORDED = {*range(10), *range(10, 100, 5), *range(100, 10_000, 20)}

# ---- networks and images that at-fused-train has no names for


def _resnet(layers: list[int], channels: tuple[int, ...], classes: int) -> nn.Module:
    model = ResNet(BasicBlock, layers, num_classes=classes, in_chans=1, channels=channels)
    model.conv1 = nn.Conv2d(1, 64, 3, 2, 1, bias=False)
    model.maxpool = nn.Identity()
    return model


def resnet_teacher(num_classes: int) -> nn.Module:
    """Make a ResNet of four stages of two blocks for 32x32 pixels."""
    return _resnet([2, 2, 2, 2], (32, 64, 96, 128), num_classes)


def resnet_student(num_classes: int) -> nn.Module:
    """Make a ResNet of four stages of one block, half as wide."""
    return _resnet([1, 1, 1, 1], (16, 32, 48, 64), num_classes)


def _vit(width: int, classes: int) -> nn.Module:
    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 4, "in_chans": 1}
    return VisionTransformer(
        **sizes, embed_dim=width, depth=4, num_heads=width // 16, num_classes=classes
    )


def vit_teacher(num_classes: int) -> nn.Module:
    """Make a ViT of 4x4 tokens and four blocks."""
    return _vit(96, num_classes)


def vit_student(num_classes: int) -> nn.Module:
    """Make one half as wide."""
    return _vit(48, num_classes)


class Rows(Dataset[Any]):
    """The digits as pictures of CIFAR's format: three channels of 32x32 pixels."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.targets = images.repeat(1, 3, 1, 1), labels.tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.images[i], self.targets[i]


def colour_digits(root: str) -> tuple[Rows, Rows]:
    """Open the digits in CIFAR's format, as ``--data`` takes them."""
    data = open_data(Config(data="digits", image_size=32, augment=False, speed="exact"))
    parts = []
    for samples in (data.train, data.evaluate):
        ((x, y, _),) = samples.batches([torch.arange(len(samples))], None)
        parts.append(Rows(x, y))
    return parts[0], parts[1]


# ---- tasks

_COMMON: dict[str, Any] = {"speed": "exact", "threads": 1, "batch_size": 64, "seeds": SEEDS}
# Betas of a seed then ask the teacher once.
_COMMON |= {"cache": 20}
_DIGITS = {**_COMMON, "preset": "digits", "lr": 0.1, "validation": 0.3, "evaluate_every": 1000}
_FASHION = {**_COMMON, "preset": "fashion-mnist", "fraction": 0.2, "validation": 0.25}
_FASHION |= {"lr_schedule": "cosine", "reset_momentum": False, "init": "torch"}
_FASHION |= {"lr": 0.1, "teacher_epochs": 10, "evaluate_every": 1000}
_OWN = "beta_study:"
TASKS: dict[str, dict[str, Any]] = {
    "digits-20": {**_DIGITS, "labels": 20, "epochs": 300},
    "digits-50": {**_DIGITS, "labels": 50, "epochs": 300},
    "digits-200": {**_DIGITS, "labels": 200, "epochs": 100},
    "digits-50-kd": {**_DIGITS, "labels": 50, "epochs": 300, "compare": ("kd", "at+kd")},
    "digits-50-paper": {**_DIGITS, "labels": 50, "epochs": 300, "form": "paper", "beta": 1.0},
    "colour-digits-100": {
        **(_DIGITS | {"preset": "own", "teacher_epochs": 25}),
        **{"data": f"{_OWN}colour_digits", "workers": 0, "nesterov": True},
        **{"labels": 100, "epochs": 150, "student": "wrn-10-1-b8", "teacher": "wrn-10-2-b8"},
        **{"weight_decay": 2e-2, "teacher_weight_decay": 5e-4},
    },
    "fashion-200-resnet": {
        **_FASHION,
        **{"labels": 200, "epochs": 100},
        **{"student": f"{_OWN}resnet_student", "teacher": f"{_OWN}resnet_teacher"},
    },
    "fashion-1000-wrn": {
        **_FASHION,
        **{"labels": 1000, "epochs": 15, "student": "wrn-10-1-b8", "teacher": "wrn-16-1"},
    },
    "digits-200-vit": {
        **_DIGITS,
        **{"labels": 200, "epochs": 100, "optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05},
        **{"teacher_epochs": 60, "teacher_lr": 1e-3, "teacher_weight_decay": 0.05},
        **{"student": f"{_OWN}vit_student", "teacher": f"{_OWN}vit_teacher"},
    },
}


# ---- the study


class Study(Points):
    """The students of a task: without transfer, of each beta, and of each ratio (beta="auto")."""

    def __init__(
        self,
        config: Config,
        betas: Iterable[float],
        ratios: Iterable[float],
        done: Collection[str],
        **options: Any,
    ) -> None:
        base, method = config.compare
        points: dict[str, Settings] = {base: (base, {"beta": 0.0})}
        grid: list[Settings] = [(method, {"beta": beta}) for beta in betas]
        points |= {name_of(point): point for point in grid}
        points |= {f"{method}-ratio{ratio:g}": (method, {"beta": "auto"}) for ratio in ratios}
        # Pairs of a step and the ratio at beta 1 before it, by student.
        self.found: dict[str, list[tuple[int, float]]] = {}
        super().__init__(config, points, range(config.seeds), done, **options)

    def _saved(self, job: Job) -> tuple[Path, dict[str, Any]] | None:
        # The ratios of a student that goes on would lack the first steps.
        return super()._saved(job) if job.is_teacher else None

    def trainer(self, job: Job, compiles: bool = True) -> Trainer:
        """Return the trainer of a job, which records the ratio."""
        trainer = super().trainer(job, compiles)
        step, found = trainer.train_step, self.found.setdefault(job.name, [])
        if trainer.plan.auto:
            ratio = job.name.removeprefix(f"{job.method}-ratio").removesuffix(f"-seed{job.seed}")
            trainer.plan.auto = AutoBeta(ratio=float(ratio))

        def train_step(batch: Batch, share: float) -> None:
            recorded = "at" in job.method and job.seed < RECORDED_SEEDS
            if recorded and trainer.step in RECORDED:
                ratio = trainer.gradient_ratio(batch, share, 1.0).ratio
                found.append((trainer.step, float(f"{ratio:.4g}")))
            step(batch, share)

        trainer.train_step = train_step  # type: ignore[method-assign]
        return trainer


class Writer(Callbacks):
    """Keeps the last evaluation of each student on the disk."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file, self.study = file, None
        self.found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    def begin(self, study: Any) -> None:
        """Keep the study."""
        self.study = study

    def point(self, job: Job, point: Point) -> None:
        """Write a student's result."""
        if job.is_teacher or point["step"] < job.plan.steps:
            return
        assert self.study is not None
        self.found[job.name] = {
            "beta": float(f"{point['beta']:.4g}"),
            "seed": job.seed,
            "validation": round(point["validation"], 3),
            "accuracy": round(point["accuracy"], 3),
            "ratios": self.study.found[job.name],
        }
        self.file.write_text(json.dumps(self.found) + "\n")
        print(f"{job.name}: {point['validation']:.2f} %, {point['accuracy']:.2f} %", flush=True)


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for weights")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    numbers: Any = {"type": lambda words: tuple(float(x) for x in words.split(",") if x)}
    parser.add_argument("--betas", default=(), help="powers of ten by default", **numbers)
    parser.add_argument("--ratios", default=(), **numbers)
    given = parser.parse_args()
    config = resolve({"compare": ("none", "at"), **TASKS[given.task], "seeds": given.seeds})
    given.results.mkdir(parents=True, exist_ok=True)
    writer, out = Writer(given.results / f"{given.task}.json"), given.out / given.task
    with writer.signals:
        betas = given.betas or (PAPER_BETAS if config.form == "paper" else BETAS)
        Study(config, betas, given.ratios, writer.found, out=out, callbacks=writer).run()


if __name__ == "__main__":
    main()
