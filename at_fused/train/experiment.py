"""The whole experiment: a teacher, then students on few labels, seed by seed, into a folder."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch

import at_fused
from at_fused.train.config import Config
from at_fused.train.data import few_labels, load_digits
from at_fused.train.loop import Curve, Data, train
from at_fused.train.wrn import WRN, count_parameters

# Students' seeds count up from 0; the teacher's keeps clear of them.
TEACHER_SEED = 10_000


@dataclass(frozen=True)
class Method:
    """A row of the table: what the student learns from, and on which back end."""

    name: str
    slug: str
    at: bool
    backend: str | None  # None: the one at_fused picks for the device


METHODS = (
    Method("student alone", "alone", at=False, backend=None),
    Method("student + AT, fused", "at_fused", at=True, backend=None),
    Method("student + AT, eager", "at_eager", at=True, backend="eager"),
)


@dataclass
class Result:
    """Curves of the teacher and of each method (by slug, one a seed), and the float64 check."""

    teacher: Curve
    students: dict[str, list[Curve]]
    check: float


def new_student(cfg: Config, seed: int) -> WRN:
    """The small student of this seed, (B, 1, S, S) -> (B, 10)."""
    torch.manual_seed(seed)
    student = WRN(cfg.student_depth, cfg.student_width, in_channels=1, base=cfg.student_base)
    return student.to(cfg.device)


def new_teacher(cfg: Config) -> WRN:
    """The teacher, (B, 1, S, S) -> (B, 10)."""
    torch.manual_seed(TEACHER_SEED)
    return WRN(cfg.teacher_depth, cfg.teacher_width, in_channels=1).to(cfg.device)


def pick_backend(method: Method) -> Any:
    """Context manager under which at_loss runs on the method's back end."""
    return at_fused.use_backend(method.backend) if method.backend else nullcontext()


def largest_difference(a: list[float], b: list[float]) -> float:
    """max_i |a_i - b_i| / |b_i|."""
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


def check_curves(teacher: WRN, data: Data, cfg: Config, tick: Callable[[], object]) -> float:
    """Train seed 0 twice in float64, fused and eager; largest difference of the AT curves.

    In float64 because in float32 the last bit of a gradient decides on which side of zero some
    activation falls; from then on the two runs are honest but different ones.
    """
    cfg = replace(cfg, log_every=1, steps=cfg.check_steps, lr=cfg.at_lr)
    idx = few_labels(data.labels.cpu(), data.split.train, cfg.labels, 0)
    # Every step is logged, so evaluate on little: only the AT loss is looked at.
    data = replace(data, images=data.images.double(), evaluate=idx)
    teacher.double()
    curves = []
    for method in METHODS[1:]:
        with pick_backend(method):
            student = new_student(cfg, 0).double()
            curves.append(train(student, data, idx, cfg, 0, tick, teacher).at)
    teacher.float()
    return largest_difference(*curves)


def save(model: WRN, path: Path, image_size: int, **facts: Any) -> None:
    """Weights, what builds the network that they fit, and a few facts; `load` reads them back."""
    network = {"network": model.arguments, "image_size": image_size}
    torch.save({"model": model.state_dict(), **network, **facts}, path)


def load(path: Path) -> tuple[WRN, int]:
    """The network of a checkpoint that `save` wrote, in eval mode, and its image size.

    Raises ValueError for any other file.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model = WRN(**saved["network"])
        model.load_state_dict(saved["model"])
        size = int(saved["image_size"])
    # Foreign bytes raise a dozen kinds of errors in torch.load, foreign contents as many here.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"not a checkpoint of at-fused-train ({reason})") from error
    return model.eval(), size


def write_curve(f: IO[str], method: str, seed: int, curve: Curve) -> None:
    """One JSON line a logged point, then one summary line for the run."""
    run = {"method": method, "seed": seed}
    for i, step in enumerate(curve.step):
        point = {"kind": "step", **run, "step": step, "ce": curve.ce[i]}
        if curve.at:
            point["at"] = curve.at[i]
        print(json.dumps({**point, "accuracy": curve.accuracy[i]}), file=f)
    summary = {"accuracy": curve.accuracy[-1], "at_ms": curve.at_ms, "seconds": curve.seconds}
    print(json.dumps({"kind": "summary", **run, **summary}), file=f, flush=True)


def total_steps(cfg: Config) -> int:
    """Optimiser steps of the whole experiment, for a progress bar."""
    return cfg.teacher_steps + len(METHODS) * cfg.seeds * cfg.steps + 2 * cfg.check_steps


def run(cfg: Config, out: Path, tick: Callable[[], object], say: Callable[[str], object]) -> Result:
    """Train everything, writing config.json, metrics.jsonl and checkpoints into `out`."""
    torch.set_num_threads(cfg.threads)
    torch.backends.cudnn.deterministic = True

    images, labels, split = load_digits(cfg.image_size)
    images, labels = images.to(cfg.device), labels.to(cfg.device)
    data = Data(images, labels, split, getattr(split, cfg.evaluate))

    teacher = new_teacher(cfg)
    facts = {
        "teacher_parameters": count_parameters(teacher),
        "student_parameters": count_parameters(new_student(cfg, 0)),
        "torch": torch.__version__,
        "at_fused": at_fused.__version__,
        "backends_in_use": [b.name for b in at_fused.backends().values() if b.in_use],
        "python": platform.python_version(),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps({**asdict(cfg), **facts}, indent=2) + "\n")

    with open(out / "metrics.jsonl", "w") as f:
        say("teacher")
        teacher_cfg = replace(
            cfg,
            steps=cfg.teacher_steps,
            lr=cfg.teacher_lr,
            weight_decay=cfg.teacher_weight_decay,
        )
        teacher_curve = train(teacher, data, split.train, teacher_cfg, TEACHER_SEED, tick)
        teacher.eval().requires_grad_(False)
        write_curve(f, "teacher", TEACHER_SEED, teacher_curve)
        save(teacher, out / "teacher.pt", cfg.image_size)

        students: dict[str, list[Curve]] = {m.slug: [] for m in METHODS}
        # Seed by seed, not method by method: a machine that slows down slows all rows alike.
        for seed in range(cfg.seeds):
            idx = few_labels(labels.cpu(), split.train, cfg.labels, seed)
            for method in METHODS:
                say(f"seed {seed}: {method.name}")
                student = new_student(cfg, seed)
                method_cfg = replace(cfg, lr=cfg.at_lr) if method.at else cfg
                guide = teacher if method.at else None
                with pick_backend(method):
                    curve = train(student, data, idx, method_cfg, seed, tick, guide)
                students[method.slug].append(curve)
                write_curve(f, method.slug, seed, curve)
                path = out / f"student_{method.slug}_seed{seed}.pt"
                save(student, path, cfg.image_size, labelled=idx)

        say("float64 check")
        check = check_curves(teacher, data, cfg, tick)
        print(json.dumps({"kind": "check", "largest_relative_difference": check}), file=f)
    return Result(teacher_curve, students, check)
