"""A training step of the authors' recipe and of at-fused-train's, side by side, with their data.

    python -m benchmarks.train_step

WRN-16-2 -> WRN-16-1, batch 128, images of CIFAR's size. The recipe is eager PyTorch in fp32 and
NCHW, with the popular four lines, and reads its images as its program does: one by one, through
torchvision's transforms in worker processes. Each program is a process of its own, as they differ
in what they leave in memory; they run in turns, a few steps each, in random order.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from at_fused.train.cli import TUNABLE
from at_fused.train.config import resolve
from at_fused.train.data import Data
from at_fused.train.data.samples import InMemory
from at_fused.train.experiment import Experiment
from at_fused.train.loop import Watch
from at_fused.train.stop import Signals
from at_fused.train.wrn import WRN
from benchmarks import ROOT
from benchmarks.cases import popular_losses
from benchmarks.tables import markdown

BATCH, STEPS, WARM_UP, TURNS, WORKERS = 128, 12, 3, 12, 4
IMAGES = 12_800
CACHED_IMAGES = 1_280
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
BETA = 1e3
# What it is -> at-fused-train's options for it; the recipe has none.
RECIPE, AT_HAND = "the authors' recipe", "the same, its images at hand"
PROGRAMS: dict[str, dict[str, Any]] = {
    RECIPE: {},
    AT_HAND: {},
    "`--speed exact`": {"speed": "exact"},
    "`--speed fp32`": {"speed": "fp32"},
    "`--speed auto`": {"speed": "auto"},
    "`--speed auto --cache 1`": {"speed": "auto", "cache": 1},
}


def pixels(images: int) -> Tensor:
    """Random images (N, 32, 32, 3) uint8."""
    g = torch.Generator().manual_seed(0)
    return torch.randint(256, (images, 32, 32, 3), generator=g).to(torch.uint8)


# ---- the authors' recipe -------------------------------------------------------------------------


class Pictures(Dataset[Any]):
    """Random images, as the authors' program reads and changes them."""

    def __init__(self) -> None:
        from torchvision import transforms as t

        self.array, self.labels = pixels(IMAGES).numpy(), torch.randint(10, (IMAGES,))
        normalize = t.Normalize(MEAN, STD)
        pad, crop = t.Pad(4, padding_mode="reflect"), t.RandomCrop(32)
        self.augment = t.Compose([pad, t.RandomHorizontalFlip(), crop, t.ToTensor(), normalize])

    def __len__(self) -> int:
        """As many as are read in an epoch."""
        return IMAGES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image and its label."""
        from PIL import Image

        return self.augment(Image.fromarray(self.array[index])), int(self.labels[index])


def read() -> Iterator[Any]:
    """Batches (x, y) for ever."""
    while True:
        yield from DataLoader(Pictures(), BATCH, shuffle=True, num_workers=WORKERS, drop_last=True)


def at_hand() -> Iterator[Any]:
    """The same batch for ever."""
    batch = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
    while True:
        yield batch


def recipe(batches: Iterator[Any]) -> Callable[[], None]:
    """A step as the authors' program takes it, with the popular lines."""
    student, teacher = WRN(16, 1), WRN(16, 2).eval().requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)

    def step() -> None:
        x, y = next(batches)
        logits, features = student(x)
        with torch.no_grad():
            _, wanted = teacher(x)
        loss = cross_entropy(logits, y) + BETA * popular_losses(features, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


# ---- ours ----------------------------------------------------------------------------------------


def ours(options: dict[str, Any], folder: str) -> Callable[[], None]:
    """A step of at-fused-train."""
    config = resolve({"preset": "cifar-wrn-16-1-from-16-2", "compare": ("at",)}, options)
    images = CACHED_IMAGES if config.cache else IMAGES
    labels, last = torch.randint(10, (images,)), config.speed != "exact"
    samples = InMemory(pixels(images), labels, MEAN, STD, 4, True, channels_last=last)
    names = tuple(map(str, range(10)))
    data = Data(10, 3, 32, names, samples, samples, MEAN, STD)
    experiment = Experiment(config, Path(folder), data=data)
    *_, (job, plan) = experiment.jobs()
    experiment.teacher.eval().requires_grad_(False)
    trainer = experiment.trainer(job, plan, Watch(lambda: None, lambda *_: None, Signals()))
    trainer.student.train()
    batches = chain.from_iterable(trainer.batches(epoch) for epoch in count())

    def step() -> None:
        trainer.train_step(*next(batches))

    for _ in range(images // BATCH if config.cache else 0):
        step()  # fills the cache
    return step


# ---- in turns ------------------------------------------------------------------------------------


def work(name: str) -> None:
    """A program that runs some steps for each line it reads, and writes their time."""
    with tempfile.TemporaryDirectory() as folder:
        options = PROGRAMS[name]
        step = ours(options, folder) if options else recipe(read() if name == RECIPE else at_hand())
        for line in sys.stdin:
            begin = time.perf_counter()
            for _ in range(int(line)):
                step()
            print(time.perf_counter() - begin, flush=True)


class Program:
    """A process that works in turns with others."""

    def __init__(self, name: str) -> None:
        environment = dict(os.environ)
        if PROGRAMS[name].get("speed", "exact") != "exact":
            environment["GLIBC_TUNABLES"] = f"{TUNABLE}=1"  # as the program itself does
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.train_step", "--work", name],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self.seconds: list[float] = []

    def run(self, steps: int) -> float:
        """The seconds of some steps. Out of its turn it stands still, with all that it started.

        Else the recipe's workers would read its images in the others' time.
        """
        os.killpg(self.process.pid, signal.SIGCONT)
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        seconds = float(self.process.stdout.readline())
        os.killpg(self.process.pid, signal.SIGSTOP)
        return seconds


def compare(turns: int) -> None:
    """Prints images per second of all programs, and their ratios to the recipe."""
    programs = {name: Program(name) for name in PROGRAMS}
    for program in programs.values():
        program.run(WARM_UP)
    order, shuffle = list(programs), random.Random(0).shuffle
    for _ in range(turns):
        shuffle(order)
        for name in order:
            programs[name].run(1)  # what the others have left in the caches
            programs[name].seconds.append(programs[name].run(STEPS) / STEPS)
    for program in programs.values():
        os.killpg(program.process.pid, signal.SIGKILL)
    median = {name: statistics.median(p.seconds) for name, p in programs.items()}
    lines = []
    for name, seconds in median.items():
        ratios = [f"{median[other] / seconds:.2f}x" for other in (RECIPE, AT_HAND)]
        lines.append(("cpu", name, f"{1e3 * seconds:.0f}", f"{BATCH / seconds:.0f}", *ratios))
    heads = "program | ms a step | images/s | to the recipe | to the same, its images at hand"
    print(*markdown(heads, 1, lines), sep="\n")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=TURNS, help=f"of each program ({TURNS})")
    parser.add_argument("--work", choices=PROGRAMS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.work)
    else:
        compare(given.turns)


if __name__ == "__main__":
    main()
