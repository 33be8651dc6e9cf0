"""What a run is made of. Imports nothing heavy: the command line reads its defaults from here."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Config:
    """Every number that shapes a run; written to config.json as it was used."""

    labels: int = 20
    beta: float = 100.0
    p: float = 2.0
    seeds: int = 15
    steps: int = 300
    teacher_steps: int = 400
    # Networks this small gain little from more, and one thread sums in one order everywhere.
    threads: int = 1
    device: str = "cpu"
    evaluate: str = "test"
    quick: bool = False

    image_size: int = 16
    shift: int = 1
    batch_size: int = 64
    # Each method at the rate that is best for it on the validation images: with one rate for both,
    # half of AT's gain would be the other's handicap.
    lr: float = 0.3
    at_lr: float = 0.1
    weight_decay: float = 2e-2
    teacher_lr: float = 0.1
    teacher_weight_decay: float = 5e-4
    teacher_depth: int = 16
    teacher_width: int = 2
    student_depth: int = 10
    student_width: int = 1
    student_base: int = 8  # half the published width: the published one learns digits too easily
    log_every: int = 20
    check_steps: int = 100


FULL = Config()
QUICK = replace(
    FULL, quick=True, seeds=2, steps=140, teacher_steps=80, teacher_depth=10, check_steps=20
)
