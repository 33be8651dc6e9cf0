"""The whole experiment: a teacher, then students of every method, seed by seed, into a folder."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import at_fused
from at_fused import TeacherCache, match_layers
from at_fused._models import modules_named
from at_fused.layers import Pair, named_pairs
from at_fused.train import checkpoints, parallel
from at_fused.train.config import Config, beta_of, for_method, for_teacher, to_toml
from at_fused.train.data import Data, Samples, open_data
from at_fused.train.data.samples import few_labels
from at_fused.train.loop import Curve, Job, Trainer, Watch, accuracy, distribute
from at_fused.train.methods import NEEDS_LAYERS, NEEDS_TEACHER, Batch, Networks, objective
from at_fused.train.networks import build, count_parameters
from at_fused.train.plan import Plan
from at_fused.train.record import Record
from at_fused.train.rules import ConfigError
from at_fused.train.saved import load_given, load_network, save_network
from at_fused.train.speed import Way, folded, way
from at_fused.train.stop import Signals
from at_fused.train.sync_norm import share_statistics

# Students' seeds count up from 0; the teacher's keeps clear of them.
TEACHER_SEED = 10_000


@dataclass
class Result:
    """The teacher's accuracy (top-1, top-5), if there is one, and each method's curves by seed."""

    teacher: tuple[float, ...] | None = None
    students: dict[str, list[Curve]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


class Experiment:
    """A run in its folder; ``run`` does what is not done yet.

    Args:
        config: what to train.
        out: the folder, for the files.
        tick, say, log: told how many steps were done, which network is trained, what went wrong.
        signals: looked at after each step.
        data: in place of what the configuration names.

    Raises:
        ConfigError, ImportError, OSError, ValueError: the configuration and the data, the networks
            or the machine do not go together.
    """

    def __init__(
        self,
        config: Config,
        out: Path,
        *,
        tick: Callable[[int], object] = lambda steps: None,
        say: Callable[[str], object] = lambda text: None,
        log: Callable[[str], object] = print,
        signals: Signals | None = None,
        data: Data | None = None,
    ) -> None:
        self.config = config
        self.tick, self.say, self.log = tick, say, log
        self.signals = signals or Signals()
        self.device = _device(config)
        parallel.join(self.device)
        # Every process has its own idea of the time that a folder is named after.
        self.out = parallel.gather(out)[0]
        self.data = data or _data(config, self.device)
        if config.labels and config.labels < self.data.classes:
            raise ConfigError(
                f"labels: got {config.labels}, allowed is one for each of {self.data.classes} "
                "classes, or 0 for all"
            )
        if config.labels > len(self.data.train):
            raise ConfigError(
                f"labels: got {config.labels}, allowed is up to {len(self.data.train)}, or 0"
            )
        self.example: Tensor = next(self.data.evaluate.batches([torch.arange(2)], None))[0]
        self.digest = hashlib.sha256(to_toml(config).encode()).hexdigest()[:12]
        self.teacher = self._new(config.teacher, TEACHER_SEED, "teacher")
        if config.teacher_from:
            load_given(self.teacher, config)
        student = self._new(config.student, 0, "student")
        self.pairs = self._pairs(student)
        self.result = Result(students={method: [] for method in config.compare})
        self.result.facts = self._facts(student)
        self._check_methods(student)

    def _new(self, name: str, seed: int, option: str) -> nn.Module:
        torch.manual_seed(seed)
        return build(name, self.data.classes, self.data.channels, option).to(self.device)

    def _pairs(self, student: nn.Module) -> list[Pair]:
        if not any(method in NEEDS_LAYERS for method in self.config.compare):
            return []
        try:
            if self.config.layers:
                names = [each.strip() for each in self.config.layers.split(",")]
                both = [tuple(n.split(":")) if ":" in n else n for n in names]
                pairs = named_pairs(both)
                modules_named(student, [pair.student for pair in pairs])
                modules_named(self.teacher, [pair.teacher for pair in pairs])
                return pairs
            return match_layers(student, self.teacher, self.example, verbose=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"layers: {str(error).removeprefix('layers: ')}") from error

    def _check_methods(self, student: nn.Module) -> None:
        """Each method's loss once, before hours are spent on the methods before it."""
        x = self.example
        y = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        for method in self.config.compare:
            networks = Networks(student, self.teacher, self.pairs, student, self.teacher, x)
            try:
                made = objective(method, for_method(self.config, method), networks, None)
                made(Batch(x, y, torch.arange(len(x)), 0), 1.0)
                made.close()
            except (TypeError, ValueError, RuntimeError) as error:
                raise ConfigError(
                    f"compare: {method} does not go with {self.config.student} and "
                    f"{self.config.teacher}: {error}"
                ) from error

    def _facts(self, student: nn.Module) -> dict[str, Any]:
        ways = {m: str(self._way(m)) for m in ("teacher", *self.config.compare)}
        return {
            "teacher_parameters": count_parameters(self.teacher),
            "student_parameters": count_parameters(student),
            "layers": [list(pair) for pair in self.pairs],
            "steps_run_in": ways,
            "processes": parallel.size(),
            "torch": torch.__version__,
            "at_fused": at_fused.__version__,
            "backends_in_use": [b.name for b in at_fused.backends().values() if b.in_use],
            "python": platform.python_version(),
        }

    def _way(self, method: str) -> Way:
        return way(self.config, self.device, method, parallel.size())

    def _needs_teacher(self) -> bool:
        return any(method in NEEDS_TEACHER for method in self.config.compare)

    # ---- jobs ----

    def jobs(self) -> Iterator[tuple[Job, Plan]]:
        """All trainings, the teacher's first."""
        config = self.config
        if self._needs_teacher() and not config.teacher_from:
            own = for_teacher(config)
            yield self._job("teacher", "none", TEACHER_SEED, own, self.data.train)
        # Seed by seed, not method by method: a machine that slows down slows all rows alike.
        for seed in range(config.seeds):
            train = self.data.train
            if config.labels:
                rows = few_labels(train.labels, torch.arange(len(train)), config.labels, seed)
                train = train.subset(rows)
            for method in config.compare:
                name = f"{method}-seed{seed}"
                yield self._job(name, method, seed, for_method(config, method), train)

    def _job(
        self, name: str, method: str, seed: int, config: Config, train: Samples
    ) -> tuple[Job, Plan]:
        what = f"checkpoint of {name}, configuration {self.digest}"
        folder = self.out / "checkpoints" / name
        data = self.data
        job = Job(name, method, seed, config, train, data.evaluate, data.classes, what, folder)
        return job, Plan(config, len(train), seed, beta_of(config, method))

    def total_steps(self) -> int:
        """Optimiser steps of all trainings, for a progress bar."""
        return sum(plan.steps for _, plan in self.jobs())

    def _file(self, job: Job) -> Path:
        return self.out / ("teacher.pt" if job.name == "teacher" else f"student_{job.name}.pt")

    def run(self) -> Result:
        """Trains everything that is not trained yet, and writes what comes of it."""
        known: dict[str, Curve] = {}
        told = []
        for job, _ in self.jobs():
            known[job.name] = self._curve(job)
            told.append((job.name, job.method, job.seed, known[job.name].points))
        record = Record(self.out, told) if parallel.first() else None
        if parallel.first():
            facts = json.dumps(self.result.facts, indent=2) + "\n"
            checkpoints.write(self.out / "run.json", facts.encode())

        def point(job: Job, found: dict[str, float]) -> None:
            if record:
                record.point(job.name, job.method, job.seed, found)

        watch = Watch(lambda: self.tick(1), point, self.signals)
        if self.config.teacher_from and self._needs_teacher():
            self.teacher.eval().requires_grad_(False)
            self.result.teacher = accuracy(self.teacher, self.data.evaluate, self.device)
            if parallel.first():
                path, name = self.out / "teacher.pt", self.config.teacher
                save_network(path, name, self.teacher, self.data, run="teacher")
        try:
            for job, plan in self.jobs():
                self.say(job.name)
                self._do(job, plan, watch, known[job.name])
        finally:
            if record:
                record.close()
        return self.result

    def _curve(self, job: Job) -> Curve:
        """What a job has come to, by its network's file or its last checkpoint."""
        if self._file(job).is_file():
            state = checkpoints.load(self._file(job), "network")
        elif last := checkpoints.newest(job.checkpoints):
            state = checkpoints.load(last, job.what)
        else:
            return Curve()
        return Curve(state["points"], state["peak_bytes"])

    def _do(self, job: Job, plan: Plan, watch: Watch, curve: Curve) -> None:
        path, teaches = self._file(job), job.name == "teacher"
        model = self.teacher
        if path.is_file():
            self.tick(plan.steps)
            if teaches:
                model, _ = load_network(path)
        else:
            trainer = self.trainer(job, plan, watch)
            if last := checkpoints.newest(job.checkpoints):
                trainer.restore(last)
                self.tick(trainer.step)
            try:
                curve, model = trainer.run(), trainer.student
            finally:
                trainer.objective.close()
            if parallel.first():
                name = self.config.teacher if teaches else self.config.student
                facts = {"points": curve.points, "peak_bytes": curve.peak_bytes, "run": job.name}
                facts |= {"method": job.method, "seed": job.seed}
                save_network(path, name, model, self.data, **facts)
                checkpoints.clear(job.checkpoints)
            parallel.wait()
        if teaches:
            self.teacher.load_state_dict(model.state_dict())
            self.teacher.eval().requires_grad_(False)
            point = curve.points[-1]
            self.result.teacher = tuple(point[k] for k in ("accuracy", "top5") if k in point)
        else:
            self.result.students[job.method].append(curve)

    # ---- a trainer ----

    def trainer(self, job: Job, plan: Plan, watch: Watch, compiles: bool = True) -> Trainer:
        """What trains a job's network, from its start."""
        name = self.config.teacher if job.name == "teacher" else self.config.student
        chosen = self._way("teacher" if job.name == "teacher" else job.method)
        chosen = replace(chosen, compile=chosen.compile and compiles)
        student = chosen.layout(self._new(name, job.seed, "network"))
        if parallel.size() > 1 and self.config.sync_norm:
            student = share_statistics(student, self.device)
        teacher = self.teacher
        if chosen.fold and job.method in NEEDS_TEACHER:
            teacher, _ = folded(teacher, [pair.teacher for pair in self.pairs])
            teacher = chosen.layout(teacher)
        batch = job.config.batch_size // parallel.size()
        batch = min(batch, len(job.train))
        if chosen.compile:
            torch.compiler.reset()  # graphs of networks that are gone
        networks = Networks(
            student,
            teacher,
            self.pairs,
            chosen.compiled(distribute(student, self.device), self.device, batch),
            chosen.compiled(teacher, self.device, batch),
            self.example,
        )
        made = objective(job.method, job.config, networks, self._cache(job))
        if extra := made.extra():
            made.run_extra = distribute(extra, self.device)
        if parallel.size() > 1:
            # Weights are alike in all processes; what dropout draws is not.
            torch.manual_seed(job.seed * parallel.size() + parallel.place().rank)
        trainer = Trainer(job, student, made, plan, chosen, self.device, watch)
        if chosen.compile and (error := self._first_error(trainer)):
            made.close()
            self.log(f"{job.name}: torch.compile failed, going on without: {error}")
            return self.trainer(job, plan, watch, compiles=False)
        return trainer

    def _cache(self, job: Job) -> TeacherCache | None:
        if not self.config.cache or job.method not in NEEDS_TEACHER:
            return None
        # Students of few labels have their own; a cache numbers the images that a student sees.
        which = f"seed{job.seed}" if self.config.labels else "all"
        return TeacherCache(self.out / "cache" / which, len(job.train))

    def _first_error(self, trainer: Trainer) -> str | None:
        """Compiles by one step that leaves no trace; why that failed."""
        state = {k: v.clone() for k, v in trainer.student.state_dict().items()}
        random = torch.get_rng_state()
        try:
            batch, share = next(iter(trainer.batches(0)))
            with trainer.way.autocast(self.device):
                terms = trainer.objective(batch, 1.0)
            (terms.loss * share).backward()
        except Exception as error:
            return f"{type(error).__name__}: {error}".splitlines()[0][:200]
        finally:
            trainer.student.load_state_dict(state)
            trainer.optimizer.zero_grad()
            torch.set_rng_state(random)
        return None


def _data(config: Config, device: torch.device) -> Data:
    alone = config.download and not parallel.first()
    if alone:
        parallel.wait()  # for the files that the first process fetches
    try:
        data = open_data(
            config.data,
            config.root,
            download=config.download and parallel.first(),
            image_size=config.image_size,
            evaluate=config.evaluate,
            fraction=config.fraction,
            augment=config.augment,
            device=device,
            channels_last=config.speed != "exact",
            workers=config.workers,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if config.download and not alone:
        parallel.wait()
    return data


def _device(config: Config) -> torch.device:
    name = config.device
    if name == "cuda" and parallel.place().size > 1:
        name = f"cuda:{parallel.place().local}"
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            there = ", ".join(["cpu", *(f"cuda:{i}" for i in range(count))])
            raise ConfigError(
                f"device: got {name!r}, but PyTorch sees {count} CUDA devices; allowed is {there}"
            )
        torch.cuda.set_device(device)
        torch.backends.cudnn.deterministic = config.speed == "exact"
        torch.backends.cudnn.benchmark = config.speed != "exact"
    if config.threads:
        torch.set_num_threads(config.threads)
    elif parallel.place().size > 1 and device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // parallel.place().size))
    return device
