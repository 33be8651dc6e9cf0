"""The plan of a training: images, augmentation and rate of each step, by its number alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from at_fused import schedules
from at_fused.train import parallel
from at_fused.train.config import Config
from at_fused.train.rules import ConfigError

SCHEDULES: dict[str, Callable[[float, float], schedules.Schedule]] = {
    "constant": lambda beta, steps: schedules.constant(beta),
    "linear": schedules.linear_decay,
    "cosine": schedules.cosine,
}


class Plan:
    """The steps of a training run over ``samples`` images.

    Nothing in it depends on what was before, so a run may go on from any step. An epoch is a
    permutation of the images, cut into batches; a last one of fewer than two images a process is
    left out, BatchNorm having nothing to average.
    """

    def __init__(self, config: Config, samples: int, seed: int, beta: float) -> None:
        self.config, self.samples, self.seed = config, samples, seed
        least = 2 * parallel.size()
        whole, rest = divmod(samples, config.batch_size)
        self.per_epoch = whole + (rest >= least)
        if self.per_epoch == 0:
            raise ConfigError(
                f"batch_size: {samples} images make no batch of two for each of "
                f"{parallel.size()} processes"
            )
        self.steps = self.per_epoch * config.epochs
        self.beta = SCHEDULES[config.beta_schedule](beta, self.steps)

    def batches(self, epoch: int) -> list[Tensor]:
        """The images' numbers of each of an epoch's batches."""
        g = torch.Generator().manual_seed(_mixed(self.seed, epoch))
        order = torch.randperm(self.samples, generator=g)
        return list(order.split(self.config.batch_size))[: self.per_epoch]

    def augmentation(self, epoch: int) -> int | None:
        """The seed of an epoch's augmentation."""
        if not self.config.augment:
            return None
        # With a cache the same for all students, and again after so many epochs.
        return epoch % self.config.cache if self.config.cache else _mixed(self.seed, epoch)

    def drops(self, step: int) -> int:
        """The times that the rate has dropped until a step, counted from 0."""
        if self.config.lr_schedule != "step":
            return 0
        done = step / self.steps
        return sum(done >= drop - 1e-9 for drop in self.config.lr_drops)

    def lr(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        config = self.config
        rise = config.warmup * self.per_epoch
        warm = min(1.0, (step + 1) / rise) if rise else 1.0
        if config.lr_schedule == "cosine":
            return warm * config.lr * (1 + math.cos(math.pi * step / self.steps)) / 2
        return warm * config.lr * config.lr_factor ** self.drops(step)

    def differs(self, other: Plan, steps: int) -> str:
        """The option by which another plan's first steps are not these; empty if they are."""
        for name in ("lr", "beta"):
            mine, others = getattr(self, name), getattr(other, name)
            if any(mine(step) != others(step) for step in range(steps)):
                return name
        return ""


def _mixed(seed: int, epoch: int) -> int:
    return seed * 1_000_003 + epoch
