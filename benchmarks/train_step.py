"""A training step of the authors' recipe and of at-fused-train's, side by side, with their data.

    python -m benchmarks.train_step
    python -m benchmarks.train_step --accuracy

WRN-16-2 -> WRN-16-1, batch 128, images of CIFAR's size. The recipe is eager PyTorch in fp32 and
NCHW, with the popular four lines, and reads its images as its program does: one by one, through
torchvision's transforms in worker processes. Each program is a process of its own, as they differ
in what they leave in memory; they run in turns, a few steps each, in random order.

--accuracy trains both on digits of 32x32 and compares what the students reach.
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

from at_fused.train.cli import TUNABLE
from benchmarks import ROOT

BATCH, STEPS, WARM_UP = 128, 12, 3
IMAGES = 12_800
CACHED_IMAGES = 1_280
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
BETA = 1e3
# Name -> what it is, and at-fused-train's options for it.
PROGRAMS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "authors": ("the authors' recipe", None),
    "authors-no-data": ("the same, its images at hand", None),
    "exact": ("--speed exact", {"speed": "exact"}),
    "fp32": ("--speed fp32", {"speed": "fp32"}),
    "auto": ("--speed auto", {"speed": "auto"}),
    "cached": ("--speed auto --cache 1", {"speed": "auto", "cache": 1}),
}


def pixels(images: int) -> Any:
    """Random images (N, 32, 32, 3) uint8."""
    import torch

    g = torch.Generator().manual_seed(0)
    return torch.randint(256, (images, 32, 32, 3), generator=g).to(torch.uint8)


# ---- the authors' recipe -------------------------------------------------------------------------


def authors_batches(images: Any, labels: Any, read: bool, workers: int) -> Iterator[Any]:
    """Batches (x, y) for ever, read as the authors' program reads them, or one that is at hand."""
    import torch
    from torch.utils.data import DataLoader, Dataset

    if not read:
        x = torch.randn(BATCH, 3, 32, 32)
        while True:
            yield x, labels[:BATCH]
    from PIL import Image
    from torchvision import transforms as t

    # In the order of the authors' program.
    augment = t.Compose(
        [
            t.Pad(4, padding_mode="reflect"),
            t.RandomHorizontalFlip(),
            t.RandomCrop(32),
            t.ToTensor(),
            t.Normalize(MEAN, STD),
        ]
    )
    array = images.numpy()

    class Pictures(Dataset[Any]):
        def __len__(self) -> int:
            return len(array)

        def __getitem__(self, index: int) -> Any:
            return augment(Image.fromarray(array[index])), int(labels[index])

    while True:
        yield from DataLoader(Pictures(), BATCH, shuffle=True, num_workers=workers, drop_last=True)


def recipe_step(student: Any, teacher: Any, optimizer: Any, x: Any, y: Any) -> None:
    """A step as the authors' program takes it, with the popular lines."""
    import torch
    from torch.nn.functional import cross_entropy

    from benchmarks.cases import popular_losses

    logits, features = student(x)
    with torch.no_grad():
        _, wanted = teacher(x)
    loss = cross_entropy(logits, y) + BETA * popular_losses(features, wanted)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def recipe_optimizer(student: Any) -> Any:
    """SGD as the authors' program has it."""
    import torch

    return torch.optim.SGD(student.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)


def authors(read: bool, workers: int) -> Callable[[], None]:
    """A step of the recipe, with its images."""
    import torch

    from at_fused.train.wrn import WRN

    student, teacher = WRN(16, 1), WRN(16, 2).eval().requires_grad_(False)
    optimizer = recipe_optimizer(student)
    batches = authors_batches(pixels(IMAGES), torch.randint(10, (IMAGES,)), read, workers)
    return lambda: recipe_step(student, teacher, optimizer, *next(batches))


# ---- ours ----------------------------------------------------------------------------------------


def ours(options: dict[str, Any], folder: str) -> Callable[[], None]:
    """A step of at-fused-train."""
    import torch

    from at_fused.train.config import resolve
    from at_fused.train.data import Data
    from at_fused.train.data.samples import InMemory
    from at_fused.train.experiment import Experiment
    from at_fused.train.loop import Watch
    from at_fused.train.stop import Signals

    config = resolve({"preset": "cifar-wrn-16-1-from-16-2", "compare": ("at",)}, options)
    images = CACHED_IMAGES if config.cache else IMAGES
    labels, last = torch.randint(10, (images,)), config.speed != "exact"
    samples = InMemory(pixels(images), labels, MEAN, STD, 4, True, channels_last=last)
    names = tuple(map(str, range(10)))
    data = Data(10, 3, 32, names, samples, samples, MEAN, STD)
    experiment = Experiment(config, Path(folder), data=data)
    *_, (job, plan) = experiment.jobs()
    experiment.teacher.eval().requires_grad_(False)
    watch = Watch(lambda: None, lambda *_: None, Signals())
    trainer = experiment.trainer(job, plan, watch)
    trainer.student.train()
    batches = chain.from_iterable(trainer.batches(epoch) for epoch in count())

    def step() -> None:
        trainer.train_step(*next(batches))

    for _ in range(images // BATCH if config.cache else 0):
        step()  # fills the cache
    return step


# ---- in turns ------------------------------------------------------------------------------------


def work(name: str, workers: int) -> None:
    """A program that runs some steps for each line it reads, and writes their time."""
    options = PROGRAMS[name][1]
    with tempfile.TemporaryDirectory() as folder:
        step = ours(options, folder) if options else authors(name == "authors", workers)
        for line in sys.stdin:
            begin = time.perf_counter()
            for _ in range(int(line)):
                step()
            print(time.perf_counter() - begin, flush=True)


class Program:
    """A process that works in turns with others."""

    def __init__(self, name: str, workers: int) -> None:
        environment = dict(os.environ)
        if (PROGRAMS[name][1] or {"speed": "exact"})["speed"] != "exact":
            environment["GLIBC_TUNABLES"] = f"{TUNABLE}=1"  # as the program itself does
        command = [sys.executable, "-m", "benchmarks.train_step", "--work", name]
        command += ["--workers", str(workers)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=pipe,
            stdout=pipe,
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


def compare(names: list[str], rounds: int, workers: int) -> None:
    """Prints images per second of all programs, and their ratios to the recipe."""
    programs = {name: Program(name, workers) for name in names}
    for program in programs.values():
        program.run(WARM_UP)
    order = list(programs)
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            programs[name].run(1)  # what the others have left in the caches
            programs[name].seconds.append(programs[name].run(STEPS) / STEPS)
    for program in programs.values():
        os.killpg(program.process.pid, signal.SIGKILL)
    median = {name: statistics.median(p.seconds) for name, p in programs.items()}
    recipes = [name for name in names if name.startswith("authors")]
    heads = ["program", "ms a step", "images/s", *(f"to {PROGRAMS[name][0]}" for name in recipes)]
    print("| " + " | ".join(heads) + " |\n|---" + "|--:" * (len(heads) - 1) + "|")
    for name, seconds in median.items():
        ratios = [f"{median[recipe] / seconds:.2f}x" for recipe in recipes]
        cells = [f"{1e3 * seconds:.1f}", f"{BATCH / seconds:.0f}", *ratios]
        print(f"| {PROGRAMS[name][0]} | " + " | ".join(cells) + " |")


# ---- what the students reach ---------------------------------------------------------------------


def accuracy(seeds: int, epochs: int) -> None:
    """Prints the accuracies of students of digits, by each program, from one teacher."""
    import torch

    from at_fused.train import loop
    from at_fused.train.config import resolve
    from at_fused.train.experiment import Experiment
    from at_fused.train.networks import build

    base = {"preset": "cifar-wrn-16-1-from-16-2", "data": "digits", "image_size": 32}
    base |= {"epochs": epochs, "compare": ("at",), "seeds": seeds, "evaluate_every": epochs}
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        teacher = {"teacher_from": f"{folder}/teacher/teacher.pt"}
        for name in ("teacher", "fp32", "auto"):
            options = base | {"speed": "exact" if name == "teacher" else name}
            options |= {"seeds": 1} if name == "teacher" else teacher
            out = Path(folder, name)
            out.mkdir()
            curves = Experiment(resolve(options), out).run().students["at"]
            if name != "teacher":
                found[f"--speed {name}"] = [curve.last("accuracy") for curve in curves]
        config = resolve(base | teacher | {"speed": "exact"})
        experiment = Experiment(config, Path(folder, "recipe"))
        reached = found.setdefault("the authors' recipe", [])
        for job, plan in experiment.jobs():
            torch.manual_seed(job.seed)
            student = build(config.student, 10, 1)
            optimizer = recipe_optimizer(student)
            student.train()
            experiment.teacher.eval()
            for epoch in range(epochs):
                optimizer.param_groups[0]["lr"] = plan.lr(epoch * plan.per_epoch)
                for x, y, _ in job.train.batches(plan.batches(epoch), plan.augmentation(epoch)):
                    recipe_step(student, experiment.teacher, optimizer, x, y)
            reached.append(loop.accuracy(student, job.evaluate, torch.device("cpu"))[0])
    print("| program | accuracy, % | std | each |\n|---|--:|--:|---|")
    for name, values in found.items():
        each = ", ".join(f"{v:.1f}" for v in values)
        std = statistics.stdev(values)
        print(f"| {name} | {statistics.mean(values):.2f} | {std:.2f} | {each} |")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12, help="turns of each program (12)")
    parser.add_argument(
        "--workers", type=int, default=4, help="the recipe's processes that read images (4)"
    )
    parser.add_argument(
        "--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS), help="which (all)"
    )
    parser.add_argument("--accuracy", action="store_true", help="compare what students reach")
    parser.add_argument("--seeds", type=int, default=5, help="students of each program (5)")
    parser.add_argument("--epochs", type=int, default=10, help="of each student (10)")
    parser.add_argument("--work", choices=PROGRAMS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.work, given.workers)
    elif given.accuracy:
        accuracy(given.seeds, given.epochs)
    else:
        compare(given.programs, given.rounds, given.workers)


if __name__ == "__main__":
    main()
