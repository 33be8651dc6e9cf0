"""The whole experiment: a teacher, then students of every method, seed by seed, into a folder."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import at_fused
from at_fused import TeacherCache, match_layers
from at_fused._models import evaluating, modules_named
from at_fused.layers import Pair, parse_pairs
from at_fused.teacher_cache import TeacherHash
from at_fused.train import checkpoints, parallel
from at_fused.train.checkpoints import CheckpointError
from at_fused.train.config import (
    NEEDS_LAYERS,
    NEEDS_TEACHER,
    OF_TEACHER,
    OPTIONS,
    TRANSFER,
    Config,
    ConfigError,
    in_a_line,
    readers,
    to_toml,
    word_of,
)
from at_fused.train.data import PICTURES, Data, read_data
from at_fused.train.data.samples import few_labels
from at_fused.train.loop import Callbacks, Curve, Job, Plan, Trainer, accuracy
from at_fused.train.methods import OBJECTIVES, Batch, Networks
from at_fused.train.networks import build, count_parameters
from at_fused.train.saved import find_weights, read_weights, save_network
from at_fused.train.speed import StepMode, folded, prepare, step_mode

# Students' seeds count up from 0; the teacher's, and those that choose beta, keep clear of them.
TEACHER_SEED = 10_000
SEARCH_SEED = 20_000
SEARCH_SEEDS = 3
# Options of a machine, which may differ between those of a run.
OF_A_MACHINE = {"root", "device", "threads", "workers"}
# Options that may change in a run that goes on: they do not make other networks.
MAY_CHANGE = {*OF_A_MACHINE, *OF_TEACHER, "preset", "compare", "seeds", "nproc"}
MAY_CHANGE |= {"download", "skip_unreadable", "checkpoint_every", "keep"}
# Compared by the rates and betas that they give to the steps that are done.
SCHEDULE = {"epochs", "lr", "lr_schedule", "lr_drops", "lr_factor", "warmup", "beta"}
SCHEDULE |= {"beta_schedule"}


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
        shared = [name for name in (*OPTIONS, "method") if name not in OF_A_MACHINE]
        parallel.same_in_all({name: getattr(config, name) for name in shared})
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
        self.result = Result(None, {m: [] for m in config.compare})
        self.result.facts = self._facts(student)
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
            rest: Any = {"network": name, "new_head": side == "student", "data": self.data}
            self._first_weights[side], line = parallel.from_first(
                lambda: find_weights(model, read_weights(source, option, name), option, **rest)
            )
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
            pairs = parse_pairs([tuple(n.split(":")) if ":" in n else n for n in names])
            modules_named(student, [pair.student for pair in pairs])
            modules_named(self.teacher, [pair.teacher for pair in pairs])
            return pairs
        except (TypeError, ValueError) as error:
            raise ConfigError(f"layers: {str(error).removeprefix('layers: ')}") from error

    def _check_methods(self, student: nn.Module) -> None:
        """Compute each method's loss once, before hours are spent on the methods before it."""
        x, config = self.example, self.config
        y = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        for method in config.compare:
            networks = Networks(student, self.teacher, self.pairs, student, self.teacher, x)
            try:
                objective = OBJECTIVES[method](config.for_method(method), networks, None)
                objective(Batch(x, y, torch.arange(len(x)), 0), 1.0)
                objective.close()
            except (TypeError, ValueError, RuntimeError) as error:
                raise ConfigError(
                    f"compare: {method} does not go with {config.student} and {config.teacher}: "
                    f"{error}"
                ) from error

    def _facts(self, student: nn.Module) -> dict[str, Any]:
        """Return what run.json has, and the heading of a run says."""
        config, data = self.config, self.data
        sizes = {"train": data.train, "validation": data.validation, "report on": data.evaluate}
        images = {name: len(part) for name, part in sizes.items() if part is not None}
        trained = [*["teacher"] * config.trains_teacher, *config.compare]
        teacher = {config.teacher: f"{count_parameters(self.teacher):,} parameters"}
        return {
            "data": {config.data: "x".join(map(str, self.example.shape[1:])), **images},
            **data.facts,
            "classes": data.classes,
            "teacher": teacher if config.needs_teacher else {},
            "student": {config.student: f"{count_parameters(student):,} parameters"},
            "loaded": self.loaded,
            "layers": [list(pair) for pair in self.pairs],
            "training": f"{config.seeds} seed(s), batches of {config.batch_size}, "
            f"{config.optimizer}, rate by {config.lr_schedule}",
            "steps": sum(job.plan.steps for job in self.jobs()),
            "steps_run_in": {method: str(self._mode(method)) for method in trained},
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
                    name = f"{method}-beta{word_of(beta)}-seed{i}"
                    yield self._job(name, method, SEARCH_SEED + i, own)
        # Seed by seed, not method by method: a machine that slows down slows all rows alike.
        for seed in range(config.seeds):
            for method in config.compare:
                own = config.for_method(method)
                if self._searches(method):  # None until then
                    own = replace(own, beta=self.result.chosen(method))
                yield self._job(f"{method}-seed{seed}", method, seed, own)

    def _searches(self, method: str) -> bool:
        """Tell the methods whose beta the validation share chooses."""
        alone = self.config.for_method(method).beta is None
        return bool(self.config.betas) and method in TRANSFER and alone

    def _job(self, name: str, method: str, seed: int, config: Config) -> Job:
        train = self.data.train
        if config.labels:
            train = train.subset(few_labels(train.labels, config.labels, seed))
        plan = Plan(config, len(train), seed, config.beta_of(method))
        folder = self._out / "checkpoints" / name if self._out else Path()
        settings = {"run": name, **self._settings(method, seed, config)}
        return Job(name, method, seed, config, plan, self.data, train, folder, settings)

    def _settings(self, method: str, seed: int, config: Config) -> dict[str, Any]:
        """List all that makes a network, but for its seed, a teacher and beta still to come."""
        # Weights are known by their content, and their source may move.
        unread = MAY_CHANGE | {"teacher_from", "student_from"}
        unread |= {name for name in OPTIONS if method not in readers(name)}
        if seed >= SEARCH_SEED or not self._searches(method):
            unread |= {"betas"}
            config = replace(config, beta=config.beta_of(method))
        if not config.validation:  # which chooses among the evaluations
            unread |= {"evaluate_every"}
        if seed == TEACHER_SEED:
            unread = (unread | {"student"}) - {"teacher"}
        found = {name: getattr(config, name) for name in OPTIONS if name not in unread}
        shares = 1 if config.sync_norm else parallel.size()
        found["sync_norm"] = shares == 1 or f"no, {shares} shares of a batch"
        found["images"] = self.data.digest
        if seed != TEACHER_SEED:
            found["first_weights"] = self._student_weights
        if method in NEEDS_TEACHER and self._teacher_weights:
            found["teacher_weights"] = self._teacher_weights
        return {name: value for name, value in found.items() if value is not None}

    # ---- what is there ----

    def _file(self, job: Job) -> Path:
        if job.is_teacher:
            return self.out / "teacher.pt"
        return self.out / ("search" if job.seed >= SEARCH_SEED else "") / f"student_{job.name}.pt"

    def _saved(self, job: Job) -> tuple[Path, dict[str, Any]] | None:
        """Return the file of a job's network, or else its last checkpoint, and the content."""
        path, state = self._file(job), self._finished.get(job.name)
        if not state and path.is_file():
            state = checkpoints.load(path, "network")
            if "settings" not in state:
                raise CheckpointError(
                    f"{path}: is a teacher that was given; go on with --teacher-from, or begin "
                    "another run with --out"
                )
        if state:
            self._check_settings(path, state, job)
            if state["settings"]["epochs"] == job.config.epochs:
                return path, state
        found = checkpoints.newest(job.checkpoints, job.what)
        if found:
            self._check_settings(*found, job)
        return found

    def _check_settings(self, path: Path, state: dict[str, Any], job: Job) -> None:
        """Raise CheckpointError where a file was made with other settings."""
        made, wanted = state.get("settings", {}), job.settings
        to_come = {"teacher_weights", "beta"} - wanted.keys()
        names = sorted((made.keys() | wanted.keys()) - to_come)
        # A validation share chooses among all evaluations, and would have another choice.
        whole = job.is_teacher or self.data.validation is not None
        scheduled = SCHEDULE - ({"epochs"} if whole else set())
        changed = [n for n in names if made.get(n) != wanted.get(n)]
        differ = [n for n in changed if n not in scheduled]
        if not differ:
            before = replace(job.config, **{n: made[n] for n in names if n in scheduled})
            plan = Plan(before, len(job.train), job.seed, before.beta_of(job.method))
            steps = int(state["step"] if "step" in state else state["points"][-1]["step"])
            if steps > job.plan.steps or job.plan.differs(plan, steps):
                differ = changed
        if differ:
            # Digests by their first digits.
            both = [
                (n, *(str(each.get(n, "none"))[:12] for each in (made, wanted))) for n in differ
            ]
            pairs = ", ".join(f"{name} {old} (now {new})" for name, old, new in both[:4])
            raise CheckpointError(
                f"{path}: was made with {pairs}; networks of both would be mixed: go on with "
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
        before: list[dict[str, Any]] = []
        for job in self.jobs():
            if not (saved := self._saved(job)):
                continue
            _, state = saved
            if "step" not in state:
                weights = state.pop("model")
                self._finished[job.name] = state
                if job.is_teacher:
                    self.teacher.load_state_dict(weights)
                    self._teacher_weights = TeacherHash(self.teacher.eval())()
            before += [job.label | point for point in state["points"]]
        self._metrics = checkpoints.Metrics(self.out, before)
        checkpoints.write(self.out / "config.toml", to_toml(self.config).encode())
        self._write_facts()
        if self.data.pictures:
            found = json.dumps(asdict(self.data.pictures), indent=1)
            checkpoints.write(self.out / PICTURES, found.encode())

    def _evaluate_given_teacher(self) -> None:
        teacher = self.teacher.eval().requires_grad_(False)
        self.result.teacher = accuracy(teacher, self.data.evaluate, self.device)
        if self.result.teacher is None:
            raise ConfigError(
                f"teacher_from: got {self.config.teacher_from!r}, whose outputs on the images to "
                "report on are not finite; allowed are the weights of a network that works"
            )
        path = self.out / "teacher.pt"
        parallel.from_first(
            lambda: save_network(path, "teacher", teacher, self.data, self.config, run="teacher")
        )

    def _train(self, job: Job) -> None:
        saved = parallel.from_first(lambda: self._saved(job))
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
            # Statistics that processes keep apart are the first's, as in its file; GPUs differ.
            state = parallel.from_first(lambda: {k: v.cpu() for k, v in model.state_dict().items()})
            self.teacher.load_state_dict(state)
            self.teacher.eval().requires_grad_(False)
            self._teacher_weights = TeacherHash(self.teacher)()
            found = [curve.chosen[name] for name in ("accuracy", "top5") if name in curve.chosen]
            self.result.teacher = tuple(found)
        elif job.seed >= SEARCH_SEED:
            searched = self.result.searched.setdefault(job.method, {})
            searched.setdefault(job.settings["beta"], []).append(curve)
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
        if mode.fast and job.method in NEEDS_TEACHER:
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
        objective = OBJECTIVES[job.method](job.config, networks, self._cache(job))
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
