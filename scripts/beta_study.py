"""Measure the gradient ratio at the best beta on several tasks.

    python scripts/beta_study.py --task digits-20 --out study --results docs/results/beta

Trains a student with attention transfer for each power of ten as beta and each of 10 seeds, and
records the gradient ratio at beta 1 (at_fused.gradient_ratio) during training. The best beta is
chosen on validation images; accuracies are on test images. Needs timm. Writes TASK.json to the
results folder, and skips students that are already in it. To continue an interrupted study, repeat
the command; the student that was being trained starts over.
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
# The paper's equation (2) is not squared, so its losses are larger.
PAPER_BETAS = (0.01, 0.1, 1.0, 10.0, 100.0)
SEEDS = 10
# The ratio is recorded for the first seeds, before these steps.
RECORDED_SEEDS = 3
RECORDED_STEPS = {*range(10), *range(10, 100, 5), *range(100, 10_000, 20)}

# ---- networks and images that at-fused-train does not provide


def _resnet(layers: list[int], channels: tuple[int, ...], classes: int) -> nn.Module:
    model = ResNet(BasicBlock, layers, num_classes=classes, in_chans=1, channels=channels)
    model.conv1 = nn.Conv2d(1, 64, 3, 2, 1, bias=False)
    model.maxpool = nn.Identity()
    return model


def resnet_teacher(num_classes: int) -> nn.Module:
    """Build a ResNet for 32x32 images, with four stages of two blocks."""
    return _resnet([2, 2, 2, 2], (32, 64, 96, 128), num_classes)


def resnet_student(num_classes: int) -> nn.Module:
    """Build a ResNet for 32x32 images, with four stages of one block, half as wide."""
    return _resnet([1, 1, 1, 1], (16, 32, 48, 64), num_classes)


def _vit(width: int, classes: int) -> nn.Module:
    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 4, "in_chans": 1}
    return VisionTransformer(
        **sizes, embed_dim=width, depth=4, num_heads=width // 16, num_classes=classes
    )


def vit_teacher(num_classes: int) -> nn.Module:
    """Build a ViT with 4x4 tokens and four blocks."""
    return _vit(96, num_classes)


def vit_student(num_classes: int) -> nn.Module:
    """Build the same ViT, half as wide."""
    return _vit(48, num_classes)


class ColourDigits(Dataset[Any]):
    """The digits in CIFAR's format: three channels of 32x32 pixels."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.targets = images.repeat(1, 3, 1, 1), labels.tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.images[i], self.targets[i]


def colour_digits(root: str) -> tuple[ColourDigits, ColourDigits]:
    """Return the training and test digits in CIFAR's format, for ``--data``."""
    data = open_data(Config(data="digits", image_size=32, augment=False, speed="exact"))
    parts = []
    for samples in (data.train, data.evaluate):
        ((x, y, _),) = samples.batches([torch.arange(len(samples))], None)
        parts.append(ColourDigits(x, y))
    return parts[0], parts[1]


# ---- tasks

_COMMON: dict[str, Any] = {"speed": "exact", "threads": 1, "batch_size": 64, "seeds": SEEDS}
# The students of a seed then share the teacher's maps.
_COMMON |= {"cache": 20}
_DIGITS = {**_COMMON, "preset": "digits", "lr": 0.1, "validation": 0.3, "evaluate_every": 1000}
_FASHION = {**_COMMON, "preset": "fashion-mnist", "fraction": 0.2, "validation": 0.25}
_FASHION |= {"lr_schedule": "cosine", "reset_momentum": False, "init": "torch"}
_FASHION |= {"lr": 0.1, "teacher_epochs": 10, "evaluate_every": 1000}
_MODULE = "beta_study:"
TASKS: dict[str, dict[str, Any]] = {
    "digits-20": {**_DIGITS, "labels": 20, "epochs": 300},
    "digits-50": {**_DIGITS, "labels": 50, "epochs": 300},
    "digits-200": {**_DIGITS, "labels": 200, "epochs": 100},
    "digits-50-kd": {**_DIGITS, "labels": 50, "epochs": 300, "compare": ("kd", "at+kd")},
    "digits-50-paper": {**_DIGITS, "labels": 50, "epochs": 300, "form": "paper", "beta": 1.0},
    "colour-digits-100": {
        **(_DIGITS | {"preset": "own", "teacher_epochs": 25}),
        **{"data": f"{_MODULE}colour_digits", "workers": 0, "nesterov": True},
        **{"labels": 100, "epochs": 150, "student": "wrn-10-1-b8", "teacher": "wrn-10-2-b8"},
        **{"weight_decay": 2e-2, "teacher_weight_decay": 5e-4},
    },
    "fashion-200-resnet": {
        **_FASHION,
        **{"labels": 200, "epochs": 100},
        **{"student": f"{_MODULE}resnet_student", "teacher": f"{_MODULE}resnet_teacher"},
    },
    "fashion-1000-wrn": {
        **_FASHION,
        **{"labels": 1000, "epochs": 15, "student": "wrn-10-1-b8", "teacher": "wrn-16-1"},
    },
    "digits-200-vit": {
        **_DIGITS,
        **{"labels": 200, "epochs": 100, "optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05},
        **{"teacher_epochs": 60, "teacher_lr": 1e-3, "teacher_weight_decay": 0.05},
        **{"student": f"{_MODULE}vit_student", "teacher": f"{_MODULE}vit_teacher"},
    },
}


# ---- the study


class Study(Points):
    """The students of a task: without transfer, at each beta, and at each ratio (beta="auto")."""

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
        # By student: pairs of a step and the ratio at beta 1 before it.
        self.recorded: dict[str, list[tuple[int, float]]] = {}
        super().__init__(config, points, range(config.seeds), done, **options)

    def _load_saved(self, job: Job) -> tuple[Path, dict[str, Any]] | None:
        # A resumed student would lack the ratios of its first steps.
        return super()._load_saved(job) if job.is_teacher else None

    def trainer(self, job: Job, compiles: bool = True) -> Trainer:
        """Return a trainer that records the ratio."""
        trainer = super().trainer(job, compiles)
        original_step, recorded = trainer.train_step, self.recorded.setdefault(job.name, [])
        if trainer.plan.auto:
            ratio = job.name.removeprefix(f"{job.method}-ratio").removesuffix(f"-seed{job.seed}")
            trainer.plan.auto = AutoBeta(ratio=float(ratio))

        def train_step(batch: Batch, share: float) -> None:
            is_recorded = "at" in job.method and job.seed < RECORDED_SEEDS
            if is_recorded and trainer.step in RECORDED_STEPS:
                ratio = trainer.gradient_ratio(batch, share, 1.0).ratio
                recorded.append((trainer.step, float(f"{ratio:.4g}")))
            original_step(batch, share)

        trainer.train_step = train_step  # type: ignore[method-assign]
        return trainer


class Writer(Callbacks):
    """Writes the last evaluation of each student to the results file."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file, self.study = file, None
        self.students: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    def on_run_start(self, study: Any) -> None:
        """Store the study, which has the recorded ratios."""
        self.study = study

    def on_evaluation(self, job: Job, point: Point) -> None:
        """Write a student's last evaluation."""
        if job.is_teacher or point["step"] < job.plan.steps:
            return
        assert self.study is not None
        self.students[job.name] = {
            "beta": float(f"{point['beta']:.4g}"),
            "seed": job.seed,
            "validation": round(point["validation"], 3),
            "accuracy": round(point["accuracy"], 3),
            "ratios": self.study.recorded[job.name],
        }
        self.file.write_text(json.dumps(self.students) + "\n")
        print(f"{job.name}: {point['validation']:.2f} %, {point['accuracy']:.2f} %", flush=True)


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for weights")
    parser.add_argument("--results", type=Path, required=True, help="folder for TASK.json")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    numbers: Any = {"type": lambda words: tuple(float(x) for x in words.split(",") if x)}
    parser.add_argument("--betas", default=(), help="default: powers of ten", **numbers)
    parser.add_argument("--ratios", default=(), help='gradient ratios of beta="auto"', **numbers)
    options = parser.parse_args()
    config = resolve({"compare": ("none", "at"), **TASKS[options.task], "seeds": options.seeds})
    options.results.mkdir(parents=True, exist_ok=True)
    writer, out = Writer(options.results / f"{options.task}.json"), options.out / options.task
    with writer.signals:
        betas = options.betas or (PAPER_BETAS if config.form == "paper" else BETAS)
        Study(config, betas, options.ratios, writer.students, out=out, callbacks=writer).run()


if __name__ == "__main__":
    main()
