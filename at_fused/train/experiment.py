"""The whole experiment: a teacher, then students of every method, seed by seed, into a folder."""

from __future__ import annotations

import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import at_fused
from at_fused import TeacherCache, match_layers
from at_fused._models import evaluating, modules_named
from at_fused.layers import Pair, named_pairs
from at_fused.teacher_cache import TeacherHash
from at_fused.train import checkpoints, parallel
from at_fused.train.config import (
    NEEDS_LAYERS,
    NEEDS_TEACHER,
    OF_A_METHOD,
    OPTIONS,
    TRANSFER,
    Config,
    beta_of,
    for_method,
    for_teacher,
    to_toml,
)
from at_fused.train.data import Data, Pictures, check_unreadable, inspect, open_data
from at_fused.train.data.folder import PARTS
from at_fused.train.data.samples import few_labels
from at_fused.train.loop import Curve, Job, Point, Trainer, Watch, accuracy, distribute
from at_fused.train.methods import Batch, Networks, objective
from at_fused.train.networks import build, count_parameters
from at_fused.train.plan import Plan
from at_fused.train.record import Record
from at_fused.train.rules import ConfigError, in_a_line
from at_fused.train.saved import DATA_OPTIONS, load_weights, save_network
from at_fused.train.speed import Way, folded, way
from at_fused.train.stop import Signals
from at_fused.train.sync_norm import share_statistics

# Students' seeds count up from 0; the teacher's, and those that choose beta, keep clear of them.
TEACHER_SEED = 10_000
SEARCH_SEED = 20_000
SEARCH_SEEDS = 3
PICTURES = "pictures.json"
# Options that may change in a run that goes on: they do not make other networks.
FREE = {
    *("preset", "root", "download", "skip_unreadable", "compare", "seeds"),
    *("device", "threads", "workers", "nproc", "checkpoint_every", "keep"),
    *("teacher_epochs", "teacher_lr", "teacher_weight_decay"),  # the teacher's epochs, lr, ...
}
# Options of a machine, which may differ between those of a run.
LOCAL = {"root", "device", "threads", "workers"}
# Compared by the rates and betas that they give to the steps that are done.
SCHEDULE = {
    *("epochs", "lr", "lr_schedule", "lr_drops", "lr_factor", "warmup"),
    *("beta", "beta_schedule"),
}


@dataclass
class Result:
    """The teacher's accuracy (top-1, top-5), if there is one, and each method's curves by seed."""

    teacher: tuple[float, ...] | None = None
    students: dict[str, list[Curve]] = field(default_factory=dict)
    # The students that choose beta, by method and beta.
    searched: dict[str, dict[float, list[Curve]]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def chosen(self, method: str) -> float | None:
        """The beta whose students are best on the validation share; None without a search."""
        found = self.searched.get(method, {})
        means = {b: statistics.mean(c.chosen["validation"] for c in cs) for b, cs in found.items()}
        return max(means, key=lambda beta: means[beta]) if means else None


class Show:
    """Callbacks of a run, for a terminal: this one shows nothing."""

    def begin(self, experiment: Experiment) -> None:
        """The run begins, in ``experiment.out``."""

    def job(self, job: Job) -> None:
        """A network's training begins."""

    def tick(self) -> None:
        """A step is done."""

    def known(self, steps: int) -> None:
        """So many steps were done before."""

    def point(self, job: Job, point: Point) -> None:
        """A network was evaluated."""


class Experiment:
    """A run in its folder; ``run`` trains what is not trained yet.

    Args:
        config: what to train.
        out: the folder, for the files; None: a new one, runs/DATE-TIME.
        fresh: the folder must be new or empty.
        show: told what happens.
        log: told what went wrong, and what was decided.
        signals: looked at after each step.
        data: in place of what the configuration names.

    Raises:
        ConfigError, ImportError, OSError, ValueError: the configuration and the data, the networks
            or the machine do not go together.
    """

    def __init__(
        self,
        config: Config,
        out: Path | None,
        *,
        fresh: bool = False,
        show: Show | None = None,
        log: Callable[[str], object] = print,
        signals: Signals | None = None,
        data: Data | None = None,
    ) -> None:
        self.config, self.fresh = config, fresh
        self.show, self.log = show or Show(), log
        self.signals = signals or Signals()
        self.device = prepare(config)
        parallel.join(self.device)
        options = {n: getattr(config, n) for n in OPTIONS if n not in LOCAL}
        parallel.same_in_all(options)
        for method in config.compare:
            own = for_method(config, method)
            parallel.same_in_all({f"{method}.{n}": getattr(own, n) for n in OF_A_METHOD})
        self._out = out
        self._pictures: Pictures | None = None
        if data is None:
            data, self._pictures = read_data(config, self.device, out, log)
        self.data = data
        parallel.same_in_all({"data": data.digest})
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
        self._teacher_weights = self._student_weights = ""
        self.loaded: list[str] = []
        self.teacher = self._new(config.teacher, TEACHER_SEED, "teacher")
        if config.teacher_from:
            self._load(self.teacher, "teacher", self.loaded.append)
            self._teacher_weights = TeacherHash(self.teacher)()
        student = self._new(config.student, 0, "student")
        if config.student_from:
            self._load(student, "student", self.loaded.append)
            self._student_weights = TeacherHash(student)()
        self.pairs = self._pairs(student)
        self._record: Record | None = None
        self.result = Result(students={method: [] for method in config.compare})
        self.result.facts = self._facts(student)
        self._check_methods(student)

    @property
    def out(self) -> Path:
        """The run's folder, once it has one."""
        assert self._out is not None
        return self._out

    def _new(self, name: str, seed: int, option: str) -> nn.Module:
        torch.manual_seed(seed)
        data, x = self.data, self.example
        model = build(name, data.classes, data.channels, option, self.config.init).to(self.device)
        if seed in (0, TEACHER_SEED):
            try:
                with evaluating(model):
                    model(x)
            except Exception as error:
                raise ConfigError(
                    f"{option}: {name} does not take images of {'x'.join(map(str, x.shape[1:]))}: "
                    f"{in_a_line(error)}"
                ) from error
        return model

    def _load(self, model: nn.Module, side: str, log: Callable[[str], object]) -> None:
        option = f"{side}_from"
        source, network = getattr(self.config, option), getattr(self.config, side)
        new = side == "student"
        log(
            parallel.from_first(
                lambda: load_weights(
                    model, source, option, network=network, new_head=new, data=self.data
                )
            )
        )
        model.load_state_dict(parallel.from_first(lambda: _weights(model)))

    def _pairs(self, student: nn.Module) -> list[Pair]:
        if not any(method in NEEDS_LAYERS for method in self.config.compare):
            return []
        try:
            if self.config.layers:
                names = [each.strip() for each in self.config.layers.split(",")]
                if not all(names):
                    raise ConfigError(
                        f"got {self.config.layers!r}, allowed are names of modules, as "
                        "layer2,layer3 or layer2:features.8,..."
                    )
                both = [tuple(n.split(":")) if ":" in n else n for n in names]
                pairs = named_pairs(both)
                modules_named(student, [pair.student for pair in pairs])
                modules_named(self.teacher, [pair.teacher for pair in pairs])
                return pairs
            return match_layers(student, self.teacher, self.example, verbose=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"layers: {str(error).removeprefix('layers: ')}") from error

    def _check_methods(self, student: nn.Module, taught: bool = False) -> None:
        """Each method's loss once, before hours are spent on the methods before it.

        Raises:
            ConfigError: it cannot be computed, or is not finite with the teacher there.
        """
        x = self.example
        y = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        for method in self.config.compare:
            networks = Networks(student, self.teacher, self.pairs, student, self.teacher, x)
            try:
                made = objective(method, for_method(self.config, method), networks, None)
                terms = made(Batch(x, y, torch.arange(len(x)), 0), 1.0)
                made.close()
            except (TypeError, ValueError, RuntimeError) as error:
                raise ConfigError(
                    f"compare: {method} does not go with {self.config.student} and "
                    f"{self.config.teacher}: {error}"
                ) from error
            if taught and method in NEEDS_TEACHER and not terms.loss.isfinite():
                raise ConfigError(
                    f"teacher: the loss of {method} is not finite with it, on the first images: "
                    "its weights or features are too large; it needs a lower teacher_lr, or "
                    "other weights"
                )

    def _facts(self, student: nn.Module) -> dict[str, Any]:
        ways = {m: str(self._way(m)) for m in ("teacher", *self.config.compare)}
        return {
            "teacher_parameters": count_parameters(self.teacher),
            "student_parameters": count_parameters(student),
            "layers": [list(pair) for pair in self.pairs],
            "steps_run_in": ways,
            "loaded": self.loaded,
            "data": self.data.facts,
            "processes": parallel.size(),
            "torch": torch.__version__,
            "at_fused": at_fused.__version__,
            "backends_in_use": [b.name for b in at_fused.backends().values() if b.in_use],
            "python": platform.python_version(),
        }

    def _way(self, method: str) -> Way:
        return way(self.config, self.device, method, parallel.size())

    @property
    def needs_teacher(self) -> bool:
        """True where a method has a teacher."""
        return any(method in NEEDS_TEACHER for method in self.config.compare)

    # ---- jobs ----

    def jobs(self) -> Iterator[tuple[Job, Plan]]:
        """All trainings: the teacher's, those that choose beta, then the students'."""
        config = self.config
        if self.needs_teacher and not config.teacher_from:
            yield self._job("teacher", "none", TEACHER_SEED, for_teacher(config))
        for method in filter(self._searches, config.compare):
            for beta in config.betas:
                own = replace(for_method(config, method), beta=beta)
                for i in range(SEARCH_SEEDS):
                    yield self._job(f"{method}-beta{beta:g}-seed{i}", method, SEARCH_SEED + i, own)
        # Seed by seed, not method by method: a machine that slows down slows all rows alike.
        for seed in range(config.seeds):
            for method in config.compare:
                own = for_method(config, method)
                if self._searches(method):
                    found = self.result.searched.get(method, {})
                    done = [beta for beta, curves in found.items() if len(curves) == SEARCH_SEEDS]
                    complete = len(done) == len(config.betas)
                    own = replace(own, beta=self.result.chosen(method) if complete else None)
                yield self._job(f"{method}-seed{seed}", method, seed, own)

    def _searches(self, method: str) -> bool:
        """Tell the methods whose beta the validation share chooses."""
        alone = for_method(self.config, method).beta is None
        return bool(self.config.betas) and method in TRANSFER and alone

    def _job(self, name: str, method: str, seed: int, config: Config) -> tuple[Job, Plan]:
        train, data = self.data.train, self.data
        if config.labels:
            train = train.subset(
                few_labels(train.labels, torch.arange(len(train)), config.labels, seed)
            )
        plan = Plan(config, len(train), seed, beta_of(config, method))
        unknown = config.beta is None and self._searches(method)
        made_by = config if unknown else replace(config, beta=beta_of(config, method))
        job = Job(
            name,
            method,
            seed,
            config,
            train,
            data.evaluate,
            data.validation,
            data.classes,
            self._out / "checkpoints" / name if self._out else Path(),
            self._settings(method, seed, made_by),
        )
        return job, plan

    def _settings(self, method: str, seed: int, config: Config) -> dict[str, Any]:
        """List everything but the seed that makes a network the one that it is."""
        left_out = {each for each, users in OF_A_METHOD.items() if method not in users} | FREE
        # Weights are known by their content, and their source may move.
        left_out |= {"teacher_from", "student_from"}
        if seed >= TEACHER_SEED or not self._searches(method):
            left_out |= {"betas"}
        teaches = seed == TEACHER_SEED
        if teaches:
            left_out |= {"student", "labels"}
        elif method not in NEEDS_TEACHER:
            left_out |= {"teacher"}
        if method not in NEEDS_LAYERS:
            left_out |= {"layers"}
        if not config.validation:  # which chooses among the evaluations
            left_out |= {"evaluate_every"}
        found = {each: getattr(config, each) for each in OPTIONS if each not in left_out}
        shares = 1 if config.sync_norm else parallel.size()
        found["sync_norm"] = shares == 1 or f"no, {shares} shares of a batch"
        found["images"] = self.data.digest
        if not teaches:
            found["first_weights"] = self._student_weights
        if method in NEEDS_TEACHER:
            found["teacher_weights"] = self._teacher_weights
        return found

    def total_steps(self) -> int:
        """Optimiser steps of all trainings, for a progress bar."""
        return sum(plan.steps for _, plan in self.jobs())

    # ---- files ----

    def _file(self, job: Job) -> Path:
        if job.name == "teacher":
            return self.out / "teacher.pt"
        return self.out / ("search" if job.seed >= SEARCH_SEED else "") / f"student_{job.name}.pt"

    def _saved(
        self, job: Job, plan: Plan, log: Callable[[str], object]
    ) -> tuple[Path, dict[str, Any]] | None:
        """The file of a job's network, or else its last good checkpoint, and the content.

        Raises:
            CheckpointError: it is damaged, or was made with other settings.
        """
        path = self._file(job)
        epochs = 0
        if path.is_file():
            try:
                state = checkpoints.load(path, "network")
            except checkpoints.DamagedError as error:
                raise checkpoints.CheckpointError(
                    f"{error}; delete it, and --resume makes it anew"
                ) from error
            if state.get("run") != job.name:
                raise checkpoints.CheckpointError(
                    f"{path}: is the network of {state.get('run')}, wanted is {job.name}'s"
                )
            epochs = self._check(path, state, job, plan)
            if epochs == job.config.epochs:
                return path, state
        found = checkpoints.newest(job.checkpoints, job.what, log)
        if found:
            self._check(*found, job, plan)
        elif epochs:
            raise checkpoints.CheckpointError(
                f"{path}: has {epochs} epochs, and the state to go on from is gone "
                f"({job.checkpoints}); delete it, too, to train it from the start, or begin "
                "another run with --out"
            )
        return found

    def _check(self, path: Path, state: dict[str, Any], job: Job, plan: Plan) -> int:
        """Raises CheckpointError where a file is of other settings; else its epochs."""
        made, wanted = dict(state.get("settings", {})), dict(job.settings)
        if not self._teacher_weights:  # so far: the teacher comes first
            made.pop("teacher_weights", None)
            wanted.pop("teacher_weights", None)
        if wanted.get("beta", 0.0) is None and "beta" in made:  # still to be chosen
            wanted["beta"] = made["beta"]
            plan = Plan(job.config, len(job.train), job.seed, made["beta"])
        steps = int(state["step"] if "step" in state else state["points"][-1]["step"])
        others = sorted((made.keys() | wanted.keys()) - SCHEDULE)
        differ = [name for name in others if made.get(name) != wanted.get(name)]
        # A setting that only one of them has follows from another that differs.
        differ = [name for name in differ if name in made and name in wanted] or differ
        names = sorted(SCHEDULE & made.keys() & wanted.keys())
        why = ", and its steps follow from that"
        if not differ:
            before = replace(job.config, **{name: made[name] for name in names})
            other = Plan(before, len(job.train), job.seed, beta_of(before, job.method))
            # An end that was no evaluation of a longer run may have been chosen.
            longer = made["epochs"] != wanted["epochs"]
            every = job.config.evaluate_every
            chosen = job.validation is not None and longer and bool(made["epochs"] % every)
            if chosen:
                why = f", no multiple of evaluate_every {every}, where validation would choose"
            if steps > plan.steps or plan.differs(other, steps) or chosen:
                differ = [name for name in names if made[name] != wanted[name]]
        if differ:
            pairs = ", ".join(
                _other(name)
                or f"{name} {made.get(name, 'unknown')!s} (now {wanted.get(name, 'none')!s})"
                for name in differ[:4]
            )
            why = why if differ == ["epochs"] else ""
            raise checkpoints.CheckpointError(
                f"{path}: was made with {pairs}{why}; networks of both would be mixed: go on with "
                "what it was made with, or begin another run with --out"
            )
        epochs: int = made["epochs"]
        return epochs

    # ---- the run ----

    def run(self, report: Callable[[Result], object] = lambda result: None) -> Result:
        """Trains everything that is not trained yet, and returns what comes of it.

        Args:
            report: called with that while the folder is still held.

        Raises:
            CheckpointError, OSError: a file cannot be read or written, or is another run's.
            NotFiniteError: a loss or a network's outputs are inf or nan.
            Stopped: a signal came; the state is saved.
        """
        with ExitStack() as held:
            self._out = parallel.from_first(
                lambda: held.enter_context(checkpoints.claimed(self._out, self.fresh))
            )
            report(self._run())
        return self.result

    def _run(self) -> Result:
        parallel.from_first(self._begin)
        record = self._record
        self.show.begin(self)

        def point(job: Job, found: Point) -> None:
            if record:
                record.point(job.name, job.method, job.seed, found)
            self.show.point(job, found)

        watch = Watch(self.show.tick, point, self.signals)
        try:
            if self.config.teacher_from and self.needs_teacher:
                self._given_teacher()
            for job, plan in self.jobs():
                self.show.job(job)
                self._do(job, plan, watch)
            self.result.facts["betas_chosen"] = {
                method: self.result.chosen(method) for method in self.result.searched
            }
            parallel.from_first(self._write_facts)
        finally:
            if record:
                record.close()
        return self.result

    def _write_facts(self) -> None:
        facts = json.dumps(self.result.facts, indent=2) + "\n"
        checkpoints.write(self.out / "run.json", facts.encode())

    def _begin(self) -> None:
        """Reads what the run had come to, and begins its files with it.

        All is looked at before anything is written.
        """
        told = []
        more = 0  # the epochs of a teacher that is to have more
        done = True
        for job, plan in self.jobs():
            saved = self._saved(job, plan, lambda text: None)
            done = done and saved is not None and "step" not in saved[1]
            if not saved:
                continue
            path, state = saved
            if job.name == "teacher":
                if "step" in state:
                    more = state["settings"]["epochs"] if self._file(job).is_file() else 0
                else:
                    self.teacher.load_state_dict(state["model"])
                    self._teacher_weights = TeacherHash(self.teacher.eval())()
            elif more and job.method in NEEDS_TEACHER:
                raise checkpoints.CheckpointError(
                    f"{path}: has learned from a teacher of {more} epochs; allowed are "
                    f"--teacher-epochs {more}, or another run with --out"
                )
            told.append((job.name, job.method, job.seed, state["points"]))
        self._record = Record(self.out, told)
        if done and (file := self.out / "run.json").is_file():
            # Nothing is left to train: what is on record stays.
            with suppress(ValueError):
                self.result.facts = json.loads(file.read_text(encoding="utf-8"))
            return
        checkpoints.write(self.out / "config.toml", to_toml(self.config).encode())
        self._write_facts()
        if self._pictures:
            found = json.dumps(asdict(self._pictures), indent=1)
            checkpoints.write(self.out / PICTURES, found.encode())

    def _images(self) -> dict[str, Any]:
        """The options by which a network's images are opened again."""
        return {each: getattr(self.config, each) for each in DATA_OPTIONS}

    def _given_teacher(self) -> None:
        config, teacher = self.config, self.teacher.eval().requires_grad_(False)
        found = accuracy(teacher, self.data.evaluate, self.device)
        if found is None:
            raise ConfigError(
                f"teacher_from: got {config.teacher_from!r}, whose outputs on the images to report "
                "on are not finite; allowed are the weights of a network that works"
            )
        self._taught(found)
        path, facts = self.out / "teacher.pt", {"run": "teacher", "images": self._images()}
        parallel.from_first(lambda: save_network(path, config.teacher, teacher, self.data, **facts))

    def _taught(self, accuracy: tuple[float, ...]) -> None:
        """The teacher is there."""
        self._teacher_weights = TeacherHash(self.teacher)()
        self.result.teacher = accuracy
        self._check_methods(self._new(self.config.student, 0, "student"), taught=True)
        images, share = len(self.data.evaluate), 1 / self.data.classes
        noise = 100 * math.sqrt(share * (1 - share) / images)
        if accuracy[0] <= 100 * share + 3 * noise:
            self.log(
                f"the teacher's accuracy, {accuracy[0]:.2f} %, is that of guessing "
                f"({100 * share:.2f} %): students have nothing to learn from it"
            )

    def _do(self, job: Job, plan: Plan, watch: Watch) -> None:
        saved = parallel.from_first(lambda: self._saved(job, plan, self.log))
        teaches = job.name == "teacher"
        if saved and "step" not in saved[1]:
            state = saved[1]
            self.show.known(plan.steps)
            curve, weights = Curve(state["points"], state["peak_bytes"]), state["model"]
        else:
            trainer = self.trainer(job, plan, watch)
            if saved:
                trainer.restore(*saved)
                self.show.known(trainer.step)
            try:
                curve, model = trainer.run(), trainer.student
            finally:
                trainer.objective.close()
            parallel.from_first(lambda: self._save(job, curve, model))
            # Statistics that processes keep apart are the first's, as in its file.
            weights = parallel.from_first(lambda: _weights(model)) if teaches else {}
        if teaches:
            self.teacher.load_state_dict(weights)
            self.teacher.eval().requires_grad_(False)
            self._taught(tuple(curve.chosen[k] for k in ("accuracy", "top5") if k in curve.chosen))
        elif job.seed >= SEARCH_SEED:
            found = self.result.searched.setdefault(job.method, {})
            found.setdefault(job.settings["beta"], []).append(curve)
        else:
            self.result.students[job.method].append(curve)

    def _save(self, job: Job, curve: Curve, model: nn.Module) -> None:
        name = self.config.teacher if job.name == "teacher" else self.config.student
        facts = {"points": curve.points, "peak_bytes": curve.peak_bytes, "run": job.name}
        facts |= {"method": job.method, "seed": job.seed, "settings": job.settings}
        path = self._file(job)
        path.parent.mkdir(exist_ok=True)
        save_network(path, name, model, self.data, images=self._images(), **facts)
        checkpoints.tidy(job.checkpoints)

    # ---- a trainer ----

    def trainer(self, job: Job, plan: Plan, watch: Watch, compiles: bool = True) -> Trainer:
        """Make the trainer of a job's network, at its start."""
        name = self.config.teacher if job.name == "teacher" else self.config.student
        chosen = self._way("teacher" if job.name == "teacher" else job.method)
        chosen = replace(chosen, compile=chosen.compile and compiles)
        student = self._new(name, job.seed, "network")
        if self.config.student_from and job.name != "teacher":
            self._load(student, "student", lambda line: None)
        student = chosen.layout(student)
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
        # Machines may not share one.
        machine = parallel.place().machine
        folder = f"cache/machine{machine}" if machine else "cache"
        return TeacherCache(self.out / folder / which, len(job.train))

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


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """A state_dict that other processes, which have other GPUs, can take."""
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}


def _other(name: str) -> str:
    """Words for a setting whose value says nothing to a person."""
    return {
        "images": "other images",
        "teacher_weights": "another teacher",
        "first_weights": "other first weights (student_from)",
    }.get(name, "")


def read_data(
    config: Config,
    device: torch.device,
    out: Path | None = None,
    log: Callable[[str], object] = print,
    parts: Sequence[str] = PARTS,
) -> tuple[Data, Pictures | None]:
    """The data set of a configuration, and what came of a look at a folder's pictures.

    Those of its ``parts`` are read once, before hours are spent; in a run that goes on, if they
    have changed.

    Raises:
        ConfigError, ImportError, OSError: the configuration and the files do not go together.
    """
    fetches = config.download and parallel.place().local == 0
    if config.download and not fetches:
        parallel.wait()  # for the files that the first process of this machine fetches
    pictures: Pictures | None = None
    try:
        if config.data == "folder":
            pictures = parallel.from_first(lambda: _look_at_pictures(config, out, log, parts))
        data = open_data(
            config.data,
            config.root,
            download=fetches,
            image_size=config.image_size,
            evaluate=config.evaluate,
            fraction=config.fraction,
            validation=config.validation,
            augment=config.augment,
            device=device,
            channels_last=config.speed != "exact",
            workers=config.workers,
            mean=config.mean,
            std=config.std,
            pictures=pictures,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if fetches:
        parallel.wait()
    return data, pictures


def _look_at_pictures(
    config: Config, out: Path | None, log: Callable[[str], object], parts: Sequence[str]
) -> Pictures:
    known = None
    if out and (file := out / PICTURES).is_file():
        with suppress(ValueError):  # of a damaged file: then they are read again
            known = json.loads(file.read_text(encoding="utf-8"))
    begin, done = time.monotonic(), 0

    def tick(count: int) -> None:
        nonlocal begin, done
        done += count
        if time.monotonic() - begin > 60:
            log(f"{done} pictures are looked at")
            begin = time.monotonic()

    pictures = inspect(config.root, config.workers, parts=parts, known=known, tick=tick)
    check_unreadable(pictures, config.root, config.skip_unreadable)
    return pictures


def prepare(config: Config) -> torch.device:
    """The device of a configuration, with PyTorch's threads and cuDNN set for it.

    Raises:
        ConfigError: there is no such device.
    """
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
    elif parallel.place().local_size > 1 and device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // parallel.place().local_size))
    return device
