"""Time a training step of at-fused-train and of the authors' recipe, with their data loading.

    python -m benchmarks.train_step

WRN-16-2 -> WRN-16-1, batch 128, images of CIFAR's size. The recipe is eager PyTorch in fp32 and
NCHW. It loads images as the authors' program does: one by one, through torchvision's transforms, in
worker processes. Each program has its own process, so memory that one leaves does not affect
another. They run one at a time, a few steps each, in random order.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import chain, count, repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from at_fused.train.cli import HUGE_PAGES_TUNABLE
from at_fused.train.config import resolve
from at_fused.train.data import Data
from at_fused.train.data.samples import InMemory
from at_fused.train.experiment import Experiment
from at_fused.train.networks import WRN
from benchmarks import ROOT, argument_parser
from benchmarks.cases import eager_losses
from benchmarks.measure import Comparison, Timer
from benchmarks.tables import markdown

BATCH, STEPS, WORKERS = 128, 12, 4
IMAGES, CACHED_IMAGES = 12_800, 1_280
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
BETA = 1e3
RECIPE, IN_MEMORY = "the authors' recipe", "the authors' recipe, images in memory"
# Name -> options of at-fused-train; the recipe has none.
PROGRAMS: dict[str, dict[str, Any]] = {
    RECIPE: {},
    IN_MEMORY: {},
    "`--speed exact`": {"speed": "exact"},
    "`--speed fp32`": {"speed": "fp32"},
    "`--speed auto`": {"speed": "auto"},
    "`--speed auto --cache 1`": {"speed": "auto", "cache": 1},
}


def pixels(images: int) -> Tensor:
    """Return random images (N, 32, 32, 3) uint8."""
    g = torch.Generator().manual_seed(0)
    return torch.randint(256, (images, 32, 32, 3), generator=g).to(torch.uint8)


def authors_batches() -> Iterator[Any]:
    """Yield batches of random images endlessly, loaded as the authors' program loads CIFAR-10."""
    from torchvision import datasets
    from torchvision import transforms as t

    data = datasets.CIFAR10.__new__(datasets.CIFAR10)  # __init__ needs files
    data.data, data.targets = pixels(IMAGES).numpy(), torch.randint(10, (IMAGES,)).tolist()
    pad, crop = t.Pad(4, padding_mode="reflect"), t.RandomCrop(32)
    steps = [pad, t.RandomHorizontalFlip(), crop, t.ToTensor(), t.Normalize(MEAN, STD)]
    data.transform, data.target_transform = t.Compose(steps), None
    batches = DataLoader(data, BATCH, shuffle=True, num_workers=WORKERS, drop_last=True)
    return chain.from_iterable(repeat(batches))


def authors_step(batches: Iterator[Any]) -> Callable[[], None]:
    """Return a training step of the authors' program."""
    student, teacher = WRN(16, 1), WRN(16, 2).eval().requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)

    def step() -> None:
        x, y = next(batches)
        logits, features = student(x)
        with torch.no_grad():
            _, targets = teacher(x)
        loss = cross_entropy(logits, y) + BETA * eager_losses(features, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def at_fused_step(options: dict[str, Any], folder: str) -> Callable[[], None]:
    """Return a training step of at-fused-train."""
    config = resolve({"preset": "cifar-wrn-16-1-from-16-2", "compare": ("at",)}, options)
    images = CACHED_IMAGES if config.cache else IMAGES
    labels, channels_last = torch.randint(10, (images,)), config.speed != "exact"
    samples = InMemory(pixels(images), labels, MEAN, STD, 4, True, channels_last=channels_last)
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


def run_worker(name: str) -> None:
    """Run as many steps as each line of the standard input asks for, and print their time."""
    with tempfile.TemporaryDirectory() as folder:
        if options := PROGRAMS[name]:
            step = at_fused_step(options, folder)
        else:
            batch = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
            step = authors_step(authors_batches() if name == RECIPE else repeat(batch))
        for line in sys.stdin:
            begin = time.perf_counter()
            for _ in range(int(line)):
                step()
            print(time.perf_counter() - begin, flush=True)


def start_worker(name: str) -> subprocess.Popen[str]:
    environment = dict(os.environ)
    if PROGRAMS[name].get("speed", "exact") != "exact":
        environment["GLIBC_TUNABLES"] = f"{HUGE_PAGES_TUNABLE}=1"  # as at-fused-train does
    command = [sys.executable, "-m", "benchmarks.train_step", "--worker", name]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)


class ProcessTimer(Timer):
    """Timer of a step in another process, which is stopped with its children between runs.

    Otherwise the recipe's workers would load images while another program is timed.
    """

    min_rounds = max_rounds = 12

    def measure(self, run: Any) -> float:
        """Return the mean time of several steps, after one that refills the caches."""
        os.killpg(run.pid, signal.SIGCONT)
        for steps in (1, STEPS):
            run.stdin.write(f"{steps}\n")
            run.stdin.flush()
            seconds = float(run.stdout.readline())
        os.killpg(run.pid, signal.SIGSTOP)
        return 1e3 * seconds / STEPS


def compare() -> None:
    """Print the speed of all programs, and the speedups over the recipe."""
    processes: dict[str, Any] = {name: start_worker(name) for name in PROGRAMS}
    try:
        (row,) = Comparison({}, processes, {}, ProcessTimer(), {"cpu": nullcontext}).rows()
    finally:
        for process in processes.values():
            os.killpg(process.pid, signal.SIGKILL)
    lines = []
    for name, ms in row["ms"].items():
        ratios = [f"{row['ms'][other] / ms:.2f}x" for other in (RECIPE, IN_MEMORY)]
        lines.append(("cpu", name, f"{ms:.0f}", f"{1e3 * BATCH / ms:.0f}", *ratios))
    heads = "program | ms/step | images/s | over the recipe | over the recipe, images in memory"
    print(*markdown(heads, 1, lines), sep="\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argument_parser("train_step", __doc__)
    parser.add_argument("--worker", choices=PROGRAMS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    run_worker(options.worker) if options.worker else compare()


if __name__ == "__main__":
    main()
