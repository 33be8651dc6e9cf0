"""The whole experiment: a teacher, then students of every method, seed by seed, into a folder."""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Callable, Iterator
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
from at_fused.train.checkpoints import CheckpointError
from at_fused.train.config import (
    METHOD_OPTIONS,
    NEEDS_LAYERS,
    NEEDS_TEACHER,
    OPTIONS,
    TRANSFER,
    Config,
    ConfigError,
    in_a_line,
    to_toml,
)
from at_fused.train.data import PICTURES, Data, read_data
from at_fused.train.data.samples import few_labels
from at_fused.train.loop import Callbacks, Curve, Job, Plan, Trainer, accuracy
from at_fused.train.methods import Batch, Networks, make_objective
from at_fused.train.networks import build, count_parameters
from at_fused.train.saved import find_weights, read_weights, save_network
from at_fused.train.speed import StepMode, folded, prepare, step_mode

# Students' seeds count up from 0; the teacher's, and those that choose beta, keep clear of them.
TEACHER_SEED = 10_000
SEARCH_SEED = 20_000
SEARCH_SEEDS = 3
# Options that may change in a run that goes on: they do not make other networks.
MAY_CHANGE = {
    *("preset", "root", "download", "skip_unreadable", "compare", "seeds"),
    *("device", "threads", "workers", "nproc", "checkpoint_every", "keep"),
    *("teacher_epochs", "teacher_lr", "teacher_weight_decay"),  # the teacher's epochs, lr, ...
}
# Options of a machine, which may differ between those of a run.
OF_A_MACHINE = {"root", "device", "threads", "workers"}
# Compared by the rates and betas that they give to the steps that are done.
SCHEDULE = {
    *("epochs", "lr", "lr_schedule", "lr_drops", "lr_factor", "warmup"),
    *("beta", "beta_schedule"),
}
# Words for settings whose values say nothing to a person.
DIGESTS = {
    "images": "other images",
    "teacher_weights": "another teacher",
    "first_weights": "other first weights (student_from)",
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
        """Return the beta that is best on the validation share; None without a search."""
        found = self.searched.get(method, {})
        means = {b: statistics.mean(c.chosen["validation"] for c in cs) for b, cs in found.items()}
        return max(means, key=lambda beta: means[beta]) if means else None


class Experiment:
    """A run in its folder; ``run`` trains what is not trained yet.

    Args:
        config: what to train.
        out: the folder, for the files; None: a new one, runs/DATE-TIME.
        fresh: the folder must be new or empty.
        callbacks: told what happens; their signals are looked at after each step.
        data: in place of what the configuration names.
    """

    def __init__(
        self,
        config: Config,
        out: Path | None,
        *,
        fresh: bool = False,
        callbacks: Callbacks | None = None,
        data: Data | None = None,
    ) -> None:
        self.config, self.fresh, self._out = config, fresh, out
        self.callbacks = callbacks or Callbacks()
        self.device = prepare(config)
        parallel.same_in_all({n: getattr(config, n) for n in OPTIONS if n not in OF_A_MACHINE})
        for method in config.compare:
            own = config.for_method(method)
            parallel.same_in_all({f"{method}.{n}": getattr(own, n) for n in METHOD_OPTIONS})
        self.data = data = data or read_data(config, self.device, out)
        parallel.same_in_all({"data": data.digest})
        if config.labels and not data.classes <= config.labels <= len(data.train):
            raise ConfigError(
                f"labels: got {config.labels}, allowed is {data.classes}, one for each class, to "
                f"{len(data.train)}, or 0 for all"
            )
        self.example: Tensor = next(data.evaluate.batches([torch.arange(2)], None))[0]
        self.loaded: list[str] = []  # lines on the files that weights came from
        self._first_weights: dict[str, dict[str, Tensor]] = {}  # theirs, by side
        self.teacher = self._first_network("teacher", TEACHER_SEED)
        student = self._first_network("student", 0)
        # Digests of weights; the teacher's once it is there.
        self._teacher_weights = TeacherHash(self.teacher)() if config.teacher_from else ""
        self._student_weights = TeacherHash(student)() if config.student_from else ""
        self.pairs = self._pairs(student)
        # Content of the files of networks that were trained before, without the weights.
        self._finished: dict[str, dict[str, Any]] = {}
        self._metrics: checkpoints.Metrics | None = None
        self.result = Result(None, {m: [] for m in config.compare}, facts=self._facts(student))
        self._check_methods(student)

    @property
    def out(self) -> Path:
        """The run's folder, once it has one."""
        assert self._out is not None
        return self._out

    def _network(self, side: str, seed: int) -> nn.Module:
        """Return a new network, with the weights of its side's file, if there is one."""
        name, data = getattr(self.config, side), self.data
        torch.manual_seed(seed)
        model = build(name, data.classes, data.channels, side, self.config.init).to(self.device)
        if side in self._first_weights:
            model.load_state_dict(self._first_weights[side], strict=False)
        return model

    def _first_network(self, side: str, seed: int) -> nn.Module:
        """Return a side's first network, and keep the weights of its file for those to come."""
        name, option = getattr(self.config, side), f"{side}_from"
        model = self._network(side, seed)
        try:
            with evaluating(model):
                model(self.example)
        except Exception as error:
            size = "x".join(map(str, self.example.shape[1:]))
            raise ConfigError(
                f"{side}: {name} does not take images of {size}: {in_a_line(error)}"
            ) from error
        if source := getattr(self.config, option):

            def found() -> tuple[dict[str, Tensor], str]:
                file, head = read_weights(source, option, name), side == "student"
                return find_weights(
                    model, file, option, network=name, new_head=head, data=self.data
                )

            self._first_weights[side], line = parallel.from_first(found)
            self.loaded.append(line)
            model.load_state_dict(self._first_weights[side], strict=False)
        return model

    def _pairs(self, student: nn.Module) -> list[Pair]:
        layers = self.config.layers
        if not any(method in NEEDS_LAYERS for method in self.config.compare):
            return []
        try:
            if not layers:
                return match_layers(student, self.teacher, self.example, verbose=False)
            names = [each.strip() for each in layers.split(",")]
            if not all(names):
                raise ConfigError(
                    f"got {layers!r}, allowed are names of modules, as layer2,layer3 or "
                    "layer2:features.8,..."
                )
            pairs = named_pairs([tuple(n.split(":")) if ":" in n else n for n in names])
            modules_named(student, [pair.student for pair in pairs])
            modules_named(self.teacher, [pair.teacher for pair in pairs])
            return pairs
        except (TypeError, ValueError) as error:
            raise ConfigError(f"layers: {str(error).removeprefix('layers: ')}") from error

    def _check_methods(self, student: nn.Module, taught: bool = False) -> None:
        """Compute each method's loss once, before hours are spent on the methods before it."""
        x, config = self.example, self.config
        y = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        for method in config.compare:
            networks = Networks(student, self.teacher, self.pairs, student, self.teacher, x)
            try:
                objective = make_objective(method, config.for_method(method), networks, None)
                terms = objective(Batch(x, y, torch.arange(len(x)), 0), 1.0)
                objective.close()
            except (TypeError, ValueError, RuntimeError) as error:
                raise ConfigError(
                    f"compare: {method} does not go with {config.student} and {config.teacher}: "
                    f"{error}"
                ) from error
            if taught and method in NEEDS_TEACHER and not terms.loss.isfinite():
                raise ConfigError(
                    f"teacher: the loss of {method} is not finite with it, on the first images: "
                    "its weights or features are too large; it needs a lower teacher_lr, or "
                    "other weights"
                )

    def _facts(self, student: nn.Module) -> dict[str, Any]:
        modes = {m: str(self._mode(m)) for m in ("teacher", *self.config.compare)}
        return {
            "teacher_parameters": count_parameters(self.teacher),
            "student_parameters": count_parameters(student),
            "layers": [list(pair) for pair in self.pairs],
            "steps_run_in": modes,
            "loaded": self.loaded,
            "data": self.data.facts,
            "processes": parallel.size(),
            "torch": torch.__version__,
            "at_fused": at_fused.__version__,
            "backends_in_use": [b.name for b in at_fused.backends().values() if b.in_use],
            "python": platform.python_version(),
        }

    def _mode(self, method: str) -> StepMode:
        return step_mode(self.config, self.device, method, parallel.size())

    # ---- jobs ----

    def jobs(self) -> Iterator[Job]:
        """Yield all trainings: the teacher's, those that choose beta, then the students'."""
        config = self.config
        if config.trains_teacher:
            yield self._job("teacher", "none", TEACHER_SEED, config.for_teacher())
        for method in filter(self._searches, config.compare):
            for beta in config.betas:
                own = replace(config.for_method(method), beta=beta)
                for i in range(SEARCH_SEEDS):
                    yield self._job(f"{method}-beta{beta:g}-seed{i}", method, SEARCH_SEED + i, own)
        # Seed by seed, not method by method: a machine that slows down slows all rows alike.
        for seed in range(config.seeds):
            for method in config.compare:
                own = config.for_method(method)
                if self._searches(method):
                    found = self.result.searched.get(method, {})
                    done = [beta for beta, curves in found.items() if len(curves) == SEARCH_SEEDS]
                    complete = len(done) == len(config.betas)
                    own = replace(own, beta=self.result.chosen(method) if complete else None)
                yield self._job(f"{method}-seed{seed}", method, seed, own)

    def _searches(self, method: str) -> bool:
        """Tell the methods whose beta the validation share chooses."""
        alone = self.config.for_method(method).beta is None
        return bool(self.config.betas) and method in TRANSFER and alone

    def _job(self, name: str, method: str, seed: int, config: Config) -> Job:
        train = self.data.train
        if config.labels:
            train = train.subset(few_labels(train.labels, config.labels, seed))
        beta = config.beta_of(method)
        unknown = config.beta is None and self._searches(method)
        return Job(
            name,
            method,
            seed,
            config,
            Plan(config, len(train), seed, beta),
            self.data,
            train,
            self._out / "checkpoints" / name if self._out else Path(),
            self._settings(method, seed, config if unknown else replace(config, beta=beta)),
        )

    def _settings(self, method: str, seed: int, config: Config) -> dict[str, Any]:
        """List everything but the seed that makes a network the one that it is."""
        teaches = seed == TEACHER_SEED
        # Weights are known by their content, and their source may move.
        unread = MAY_CHANGE | {"teacher_from", "student_from"}
        unread |= {name for name, users in METHOD_OPTIONS.items() if method not in users}
        for names, read in (
            ({"betas"}, seed < TEACHER_SEED and self._searches(method)),
            ({"student", "labels"}, not teaches),
            ({"teacher"}, teaches or method in NEEDS_TEACHER),
            ({"layers"}, method in NEEDS_LAYERS),
            ({"evaluate_every"}, config.validation),  # which chooses among the evaluations
        ):
            unread |= set() if read else names
        found = {name: getattr(config, name) for name in OPTIONS if name not in unread}
        shares = 1 if config.sync_norm else parallel.size()
        found["sync_norm"] = shares == 1 or f"no, {shares} shares of a batch"
        found["images"] = self.data.digest
        if not teaches:
            found["first_weights"] = self._student_weights
        if method in NEEDS_TEACHER:
            found["teacher_weights"] = self._teacher_weights
        return found

    def total_steps(self) -> int:
        """Return the optimiser steps of all trainings, for a progress bar."""
        return sum(job.plan.steps for job in self.jobs())

    # ---- what is there ----

    def _file(self, job: Job) -> Path:
        if job.is_teacher:
            return self.out / "teacher.pt"
        return self.out / ("search" if job.seed >= SEARCH_SEED else "") / f"student_{job.name}.pt"

    def _saved(self, job: Job, log: Callable[[str], object]) -> tuple[Path, dict[str, Any]] | None:
        """Return the file of a job's network, or else its last good checkpoint, and the content."""
        path, state = self._file(job), self._finished.get(job.name)
        if not state and path.is_file():
            try:
                state = checkpoints.load(path, "network")
            except checkpoints.DamagedError as error:
                raise CheckpointError(f"{error}; delete it, and --resume makes it anew") from error
            if state.get("run") != job.name:
                raise CheckpointError(
                    f"{path}: is the network of {state.get('run')}, wanted is {job.name}'s"
                )
        if state:
            self._check_settings(path, state, job)
            if state["settings"]["epochs"] == job.config.epochs:
                return path, state
        found = checkpoints.newest(job.checkpoints, job.what, log)
        if found:
            self._check_settings(*found, job)
        elif state:
            raise CheckpointError(
                f"{path}: has {state['settings']['epochs']} epochs, and the state to go on from is "
                f"gone ({job.checkpoints}); delete it, too, to train it from the start, or begin "
                "another run with --out"
            )
        return found

    def _check_settings(self, path: Path, state: dict[str, Any], job: Job) -> None:
        """Raise CheckpointError where a file was made with other settings."""
        made, wanted, plan = dict(state.get("settings", {})), dict(job.settings), job.plan
        if not self._teacher_weights:  # so far: the teacher comes first
            made.pop("teacher_weights", None)
            wanted.pop("teacher_weights", None)
        if wanted.get("beta", 0.0) is None and "beta" in made:  # still to be chosen
            wanted["beta"] = made["beta"]
            plan = Plan(job.config, len(job.train), job.seed, made["beta"])
        others = sorted((made.keys() | wanted.keys()) - SCHEDULE)
        differ = [name for name in others if made.get(name) != wanted.get(name)]
        # A setting that only one of them has follows from another that differs.
        differ = [name for name in differ if name in made and name in wanted] or differ
        why = ""
        if not differ:
            steps = int(state["step"] if "step" in state else state["points"][-1]["step"])
            names = sorted(SCHEDULE & made.keys() & wanted.keys())
            before = replace(job.config, **{name: made[name] for name in names})
            other = Plan(before, len(job.train), job.seed, before.beta_of(job.method))
            # An end that was no evaluation of a longer run may have been chosen.
            longer, every = made["epochs"] != wanted["epochs"], job.config.evaluate_every
            chosen = self.data.validation is not None and longer and bool(made["epochs"] % every)
            if steps > plan.steps or plan.differs(other, steps) or chosen:
                differ = [name for name in names if made[name] != wanted[name]]
            if differ == ["epochs"]:
                why = ", and its steps follow from that"
                if chosen:
                    why = f", no multiple of evaluate_every {every}, where validation would choose"
        if differ:
            pairs = ", ".join(
                DIGESTS.get(name)
                or f"{name} {made.get(name, 'unknown')!s} (now {wanted.get(name, 'none')!s})"
                for name in differ[:4]
            )
            raise CheckpointError(
                f"{path}: was made with {pairs}{why}; networks of both would be mixed: go on with "
                "what it was made with, or begin another run with --out"
            )

    # ---- the run ----

    def run(self) -> Result:
        """Train everything that is not trained yet, and return what comes of it.

        Raises:
            CheckpointError, OSError: a file cannot be read or written, or is another run's.
            NotFiniteError: a loss or a network's outputs are inf or nan.
            Stopped: a signal came; the state is saved.
        """
        with ExitStack() as held:
            self._out = parallel.from_first(
                lambda: held.enter_context(checkpoints.claimed(self._out, self.fresh))
            )
            parallel.from_first(self._take_stock)
            if self._metrics:
                held.callback(self._metrics.close)
            self.callbacks.begin(self)
            if self.config.teacher_from and self.config.needs_teacher:
                self._evaluate_given_teacher()
            for job in self.jobs():
                self.callbacks.job(job)
                self._train(job)
            self.result.facts["betas_chosen"] = {
                method: self.result.chosen(method) for method in self.result.searched
            }
            parallel.from_first(self._write_facts)
            self.callbacks.end(self)
        return self.result

    def _write_facts(self) -> None:
        facts = json.dumps(self.result.facts, indent=2) + "\n"
        checkpoints.write(self.out / "run.json", facts.encode())

    def _take_stock(self) -> None:
        """Read what the run had come to, all before anything is written, and begin its files."""
        before = []
        more = 0  # the epochs of a teacher that is to have more
        complete = True
        for job in self.jobs():
            saved = self._saved(job, lambda text: None)
            finished = saved is not None and "step" not in saved[1]
            complete = complete and finished
            if not saved:
                continue
            path, state = saved
            if finished:
                weights = state.pop("model")
                self._finished[job.name] = state
            if job.is_teacher and finished:
                self.teacher.load_state_dict(weights)
                self._teacher_weights = TeacherHash(self.teacher.eval())()
            elif job.is_teacher:
                more = state["settings"]["epochs"] if self._file(job).is_file() else 0
            elif more and job.method in NEEDS_TEACHER:
                raise CheckpointError(
                    f"{path}: has learned from a teacher of {more} epochs; allowed are "
                    f"--teacher-epochs {more}, or another run with --out"
                )
            before.append((job, state["points"]))
        self._metrics = checkpoints.Metrics(self.out, before)
        if complete and (file := self.out / "run.json").is_file():
            # Nothing is left to train: what is on record stays.
            with suppress(ValueError):
                self.result.facts = json.loads(file.read_text(encoding="utf-8"))
            return
        checkpoints.write(self.out / "config.toml", to_toml(self.config).encode())
        self._write_facts()
        if self.data.pictures:
            found = json.dumps(asdict(self.data.pictures), indent=1)
            checkpoints.write(self.out / PICTURES, found.encode())

    def _evaluate_given_teacher(self) -> None:
        teacher = self.teacher.eval().requires_grad_(False)
        found = accuracy(teacher, self.data.evaluate, self.device)
        if found is None:
            raise ConfigError(
                f"teacher_from: got {self.config.teacher_from!r}, whose outputs on the images to "
                "report on are not finite; allowed are the weights of a network that works"
            )
        self._taught(found)
        path = self.out / "teacher.pt"
        parallel.from_first(
            lambda: save_network(path, "teacher", teacher, self.data, self.config, run="teacher")
        )

    def _taught(self, accuracy: tuple[float, ...]) -> None:
        """Check the teacher, now that it is there."""
        self._teacher_weights = TeacherHash(self.teacher)()
        self.result.teacher = accuracy
        self._check_methods(self._network("student", 0), taught=True)
        images, share = len(self.data.evaluate), 1 / self.data.classes
        noise = 100 * math.sqrt(share * (1 - share) / images)
        if accuracy[0] <= 100 * share + 3 * noise:
            self.callbacks.log(
                f"the teacher's accuracy, {accuracy[0]:.2f} %, is that of guessing "
                f"({100 * share:.2f} %): students have nothing to learn from it"
            )

    def _train(self, job: Job) -> None:
        saved = parallel.from_first(lambda: self._saved(job, self.callbacks.log))
        if saved and "step" not in saved[1]:
            self.callbacks.skipped(job.plan.steps)
            curve, model = Curve(saved[1]["points"], saved[1]["peak_bytes"]), self.teacher
        else:
            trainer = self.trainer(job)
            if saved:
                trainer.restore(*saved)
                self.callbacks.skipped(trainer.step)
            try:
                curve, model = trainer.run(), trainer.student
            finally:
                trainer.objective.close()
            parallel.from_first(lambda: self._save_trained(job, curve, model))
        if job.is_teacher:
            # Statistics that processes keep apart are the first's, as in its file.
            self.teacher.load_state_dict(parallel.from_first(lambda: _weights(model)))
            self.teacher.eval().requires_grad_(False)
            self._taught(tuple(curve.chosen[k] for k in ("accuracy", "top5") if k in curve.chosen))
        elif job.seed >= SEARCH_SEED:
            found = self.result.searched.setdefault(job.method, {})
            found.setdefault(job.settings["beta"], []).append(curve)
        else:
            self.result.students[job.method].append(curve)

    def _save_trained(self, job: Job, curve: Curve, model: nn.Module) -> None:
        path, side = self._file(job), "teacher" if job.is_teacher else "student"
        path.parent.mkdir(exist_ok=True)
        facts = {"points": curve.points, "peak_bytes": curve.peak_bytes, "run": job.name}
        facts |= {"method": job.method, "seed": job.seed, "settings": job.settings}
        save_network(path, side, model, self.data, self.config, **facts)
        checkpoints.tidy(job.checkpoints)

    # ---- a trainer ----

    def trainer(self, job: Job, compiles: bool = True) -> Trainer:
        """Make the trainer of a job's network, at its start."""
        side = "teacher" if job.is_teacher else "student"
        mode = self._mode("teacher" if job.is_teacher else job.method)
        mode = replace(mode, compile=mode.compile and compiles)
        student = mode.layout(self._network(side, job.seed))
        if parallel.size() > 1 and self.config.sync_norm:
            student = parallel.share_statistics(student, self.device)
        teacher = self.teacher
        if mode.fold_norms and job.method in NEEDS_TEACHER:
            teacher, _ = folded(teacher, [pair.teacher for pair in self.pairs])
            teacher = mode.layout(teacher)
        batch = min(job.config.batch_size // parallel.size(), len(job.train))
        if mode.compile:
            torch.compiler.reset()  # graphs of networks that are gone
        networks = Networks(
            student,
            teacher,
            self.pairs,
            mode.compiled(parallel.distribute(student, self.device), self.device, batch),
            mode.compiled(teacher, self.device, batch),
            self.example,
        )
        objective = make_objective(job.method, job.config, networks, self._cache(job))
        if objective.extra:
            objective.run_extra = parallel.distribute(objective.extra, self.device)
        if parallel.size() > 1:
            # Weights are alike in all processes; what dropout draws is not.
            torch.manual_seed(job.seed * parallel.size() + parallel.process().rank)
        trainer = Trainer(job, student, objective, mode, self.device, self.callbacks, self._metrics)
        if mode.compile and (error := self._compile_error(trainer)):
            objective.close()
            self.callbacks.log(f"{job.name}: torch.compile failed, going on without: {error}")
            return self.trainer(job, compiles=False)
        return trainer

    def _cache(self, job: Job) -> TeacherCache | None:
        if not self.config.cache or job.method not in NEEDS_TEACHER:
            return None
        # Students of few labels have their own; a cache numbers the images that a student sees.
        which = f"seed{job.seed}" if self.config.labels else "all"
        # Machines may not share one.
        machine = parallel.process().machine
        folder = f"cache/machine{machine}" if machine else "cache"
        return TeacherCache(self.out / folder / which, len(job.train))

    def _compile_error(self, trainer: Trainer) -> str | None:
        """Compile by one step that leaves no trace; return why that failed."""
        state = {k: v.clone() for k, v in trainer.student.state_dict().items()}
        random = torch.get_rng_state()
        try:
            batch, share = next(iter(trainer.batches(0)))
            with trainer.mode.autocast(self.device):
                terms = trainer.objective(batch, 1.0)
            (terms.loss * share).backward()
        except Exception as error:
            return in_a_line(error)[:200]
        finally:
            trainer.student.load_state_dict(state)
            trainer.optimizer.zero_grad()
            torch.set_rng_state(random)
        return None


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Return a state_dict that other processes, which have other GPUs, can take."""
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}
