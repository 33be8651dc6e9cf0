"""A training step of the authors' recipe and of at-fused-train's, side by side, with their data.

    python -m benchmarks.train_step

WRN-16-2 -> WRN-16-1, batch 128, images of CIFAR's size. The recipe is eager PyTorch in fp32 and
NCHW, with the popular four lines, and reads its images as its program does: one by one, through
torchvision's transforms in worker processes. Each program is a process of its own, as they differ
in what they leave in memory; they run in turns, a few steps each, in random order.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import chain, count, repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from at_fused.train.cli import TUNABLE
from at_fused.train.config import resolve
from at_fused.train.data import Data
from at_fused.train.data.samples import InMemory
from at_fused.train.experiment import Experiment
from at_fused.train.networks import WRN
from benchmarks import ROOT
from benchmarks.cases import popular_losses
from benchmarks.measure import Clock, Comparison
from benchmarks.tables import markdown

BATCH, STEPS, WORKERS = 128, 12, 4
IMAGES, CACHED_IMAGES = 12_800, 1_280
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


def read() -> Iterator[Any]:
    """Batches of random images for ever, read as the authors' program reads CIFAR-10."""
    from torchvision import datasets
    from torchvision import transforms as t

    data = datasets.CIFAR10.__new__(datasets.CIFAR10)  # which needs no files so
    data.data, data.targets = pixels(IMAGES).numpy(), torch.randint(10, (IMAGES,)).tolist()
    pad, crop = t.Pad(4, padding_mode="reflect"), t.RandomCrop(32)
    changes = [pad, t.RandomHorizontalFlip(), crop, t.ToTensor(), t.Normalize(MEAN, STD)]
    data.transform, data.target_transform = t.Compose(changes), None
    batches = DataLoader(data, BATCH, shuffle=True, num_workers=WORKERS, drop_last=True)
    return chain.from_iterable(repeat(batches))


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


def ours(options: dict[str, Any], folder: str) -> Callable[[], None]:
    """A step of at-fused-train."""
    config = resolve({"preset": "cifar-wrn-16-1-from-16-2", "compare": ("at",)}, options)
    images = CACHED_IMAGES if config.cache else IMAGES
    labels, last = torch.randint(10, (images,)), config.speed != "exact"
    samples = InMemory(pixels(images), labels, MEAN, STD, 4, True, channels_last=last)
    names = tuple(map(str, range(10)))
    data = Data(names, 32, samples, samples, MEAN, STD)
    experiment = Experiment(config, Path(folder), data=data)
    *_, job = experiment.jobs()
    experiment.teacher.eval().requires_grad_(False)
    trainer = experiment.trainer(job)
    trainer.student.train()
    batches = chain.from_iterable(trainer.batches(epoch) for epoch in count())

    def step() -> None:
        trainer.train_step(*next(batches))

    for _ in range(images // BATCH if config.cache else 0):
        step()  # fills the cache
    return step


def work(name: str) -> None:
    """Run as many steps as each line asks for, and write their time."""
    with tempfile.TemporaryDirectory() as folder:
        if options := PROGRAMS[name]:
            step = ours(options, folder)
        else:
            batch = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
            step = recipe(read() if name == RECIPE else repeat(batch))
        for line in sys.stdin:
            begin = time.perf_counter()
            for _ in range(int(line)):
                step()
            print(time.perf_counter() - begin, flush=True)


def start(name: str) -> subprocess.Popen[str]:
    """Start a process that works."""
    environment = dict(os.environ)
    if PROGRAMS[name].get("speed", "exact") != "exact":
        environment["GLIBC_TUNABLES"] = f"{TUNABLE}=1"  # as the program itself does
    command = [sys.executable, "-m", "benchmarks.train_step", name]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)


class Turns(Clock):
    """Milliseconds of a step of a process, which stands still out of its turn with all it started.

    Else the recipe's workers would read its images in the others' time.
    """

    least = most = 12

    def take(self, run: Any) -> float:
        """Some steps, after one for what the others have left in the caches."""
        os.killpg(run.pid, signal.SIGCONT)
        for steps in (1, STEPS):
            run.stdin.write(f"{steps}\n")
            run.stdin.flush()
            seconds = float(run.stdout.readline())
        os.killpg(run.pid, signal.SIGSTOP)
        return 1e3 * seconds / STEPS


def compare() -> None:
    """Print images per second of all programs, and their ratios to the recipe."""
    processes: dict[str, Any] = {name: start(name) for name in PROGRAMS}
    try:
        (row,) = Comparison({}, processes, {}, Turns(), {"cpu": nullcontext}).rows()
    finally:
        for process in processes.values():
            os.killpg(process.pid, signal.SIGKILL)
    lines = []
    for name, ms in row["ms"].items():
        ratios = [f"{row['ms'][other] / ms:.2f}x" for other in (RECIPE, AT_HAND)]
        lines.append(("cpu", name, f"{ms:.0f}", f"{1e3 * BATCH / ms:.0f}", *ratios))
    heads = "program | ms a step | images/s | to the recipe | to the same, its images at hand"
    print(*markdown(heads, 1, lines), sep="\n")


if __name__ == "__main__":
    if sys.argv[1:]:
        work(sys.argv[1])
    else:
        compare()
