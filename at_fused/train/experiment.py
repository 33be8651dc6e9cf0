"""A run: a teacher, then students of all methods, seed by seed, with files in one folder."""

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
    OPTIONS,
    TEACHER_OPTIONS,
    WITH_BETA,
    Config,
    ConfigError,
    error_summary,
    format_value,
    methods_using,
    to_toml,
)
from at_fused.train.data import SCAN_FILE, Data, prepare_data
from at_fused.train.data.samples import balanced_subset
from at_fused.train.loop import Callbacks, Curve, Job, Plan, Trainer, accuracy
from at_fused.train.methods import OBJECTIVES, Batch, Networks
from at_fused.train.networks import build, count_parameters
from at_fused.train.saved import find_weights, read_weights, save_network
from at_fused.train.speed import StepMode, fold_batchnorm, setup_device, step_mode

# Students have seeds 0, 1, ...; the teacher and the students of a beta search stay clear of them.
TEACHER_SEED = 10_000
SEARCH_SEED = 20_000
SEARCH_SEEDS = 3
# Options that may differ between the machines of a run.
MACHINE_OPTIONS = {"root", "device", "threads", "workers"}
# Options that may change on --resume, as they do not change the networks.
CHANGEABLE_OPTIONS = {*MACHINE_OPTIONS, *TEACHER_OPTIONS, "preset", "compare", "seeds", "nproc"}
CHANGEABLE_OPTIONS |= {"download", "skip_unreadable", "checkpoint_every", "keep"}
# On --resume, compared by the learning rates and betas of the completed steps.
SCHEDULE_OPTIONS = {"epochs", "lr", "lr_schedule", "lr_drops", "lr_factor", "warmup", "beta"}
SCHEDULE_OPTIONS |= {"beta_schedule"}


@dataclass
class Result:
    """Accuracy of the teacher (top-1, top-5), curves of students by method and seed, and facts."""

    teacher: tuple[float, ...] | None = None
    students: dict[str, list[Curve]] = field(default_factory=dict)
    # Students that choose beta, by method and beta.
    beta_search: dict[str, dict[float, list[Curve]]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def chosen_beta(self, method: str) -> float | None:
        """Return the beta with the best mean validation accuracy; None without a search."""
        betas = self.beta_search.get(method, {})
        means = {
            b: statistics.mean(c.selected["validation"] for c in cs) for b, cs in betas.items()
        }
        return max(means, key=lambda beta: means[beta]) if means else None


class Experiment:
    """A run; ``run`` trains all networks that are not trained yet.

    Args:
        config: the resolved configuration.
        out: the output folder; None creates runs/DATE-TIME.
        fresh: whether the folder must be new or empty.
        callbacks: called on events; their signals are checked after each step.
        data: replaces the data set of the configuration.
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
        self.device = setup_device(config)
        shared = [name for name in (*OPTIONS, "method") if name not in MACHINE_OPTIONS]
        parallel.check_same_on_all_ranks({name: getattr(config, name) for name in shared})
        self.data = data = data or prepare_data(config, self.device, out)
        parallel.check_same_on_all_ranks({"data": data.digest})
        if config.labels and not data.classes <= config.labels <= len(data.train):
            raise ConfigError(
                f"labels: got {config.labels}, expected {data.classes} (one per class) to "
                f"{len(data.train)}, or 0 for all"
            )
        self.example: Tensor = next(data.evaluate.batches([torch.arange(2)], None))[0]
        self.loaded: list[str] = []  # a line for each file of weights
        self._initial_weights: dict[str, dict[str, Tensor]] = {}  # by "student" and "teacher"
        self.teacher = self._first_network("teacher", TEACHER_SEED)
        student = self._first_network("student", 0)
        # Hashes of weights; the teacher's is set once it is trained.
        self._teacher_hash = TeacherHash(self.teacher)() if config.teacher_from else ""
        self._student_hash = TeacherHash(student)() if config.student_from else ""
        self.pairs = self._pairs(student)
        # Files of trained networks by job name, without the weights.
        self._finished: dict[str, dict[str, Any]] = {}
        self._metrics: checkpoints.Metrics | None = None
        self.result = Result(None, {m: [] for m in config.compare})
        self.result.facts = self._facts(student)
        self._check_methods(student)

    @property
    def out(self) -> Path:
        """The output folder; it exists once ``run`` has started."""
        assert self._out is not None
        return self._out

    def _new_network(self, side: str, seed: int) -> nn.Module:
        """Return a new network, with weights from its file if one was given."""
        name, data = getattr(self.config, side), self.data
        torch.manual_seed(seed)
        model = build(name, data.classes, data.channels, side, self.config.init).to(self.device)
        if side in self._initial_weights:
            model.load_state_dict(self._initial_weights[side], strict=False)
        return model

    def _first_network(self, side: str, seed: int) -> nn.Module:
        """Return the first network of a side, and keep the weights of its file for later ones."""
        name, option = getattr(self.config, side), f"{side}_from"
        model = self._new_network(side, seed)
        try:
            with evaluating(model):
                model(self.example)
        except Exception as error:
            size = "x".join(map(str, self.example.shape[1:]))
            raise ConfigError(
                f"{side}: {name} does not accept {size} images: {error_summary(error)}"
            ) from error
        if source := getattr(self.config, option):
            options: Any = {"network": name, "new_head": side == "student", "data": self.data}
            self._initial_weights[side], line = parallel.run_on_rank_0(
                lambda: find_weights(model, read_weights(source, option, name), option, **options)
            )
            self.loaded.append(line)
            model.load_state_dict(self._initial_weights[side], strict=False)
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
        """Compute each method's loss once, so that errors appear before hours of training."""
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
                    f"compare: {method} does not work with {config.student} and {config.teacher}: "
                    f"{error}"
                ) from error

    def _facts(self, student: nn.Module) -> dict[str, Any]:
        """Return the facts about the run, for run.json and the summary."""
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
            "training": f"{config.seeds} seed(s), batch size {config.batch_size}, "
            f"{config.optimizer}, {config.lr_schedule} learning rate schedule",
            "steps": sum(job.plan.steps for job in self.jobs()),
            "steps_run_in": {method: str(self._mode(method)) for method in trained},
            "processes": parallel.world_size(),
            "torch": torch.__version__,
            "at_fused": at_fused.__version__,
            "backends_in_use": [b.name for b in at_fused.backends().values() if b.in_use],
            "python": platform.python_version(),
        }

    def _mode(self, method: str) -> StepMode:
        return step_mode(self.config, self.device, method, parallel.world_size())

    # ---- jobs ----

    def jobs(self) -> Iterator[Job]:
        """Yield all jobs: the teacher, the students that choose beta, then the others."""
        config = self.config
        if config.trains_teacher:
            yield self._make_job("teacher", "none", TEACHER_SEED, config.for_teacher())
        for method in filter(self._searches_beta, config.compare):
            for beta in config.betas:
                job_config = replace(config.for_method(method), beta=beta)
                for i in range(SEARCH_SEEDS):
                    name = f"{method}-beta{format_value(beta)}-seed{i}"
                    yield self._make_job(name, method, SEARCH_SEED + i, job_config)
        # Seed by seed, so that a slowdown of the machine affects all methods equally.
        for seed in range(config.seeds):
            for method in config.compare:
                job_config = config.for_method(method)
                if self._searches_beta(method):  # None before the search has finished
                    job_config = replace(job_config, beta=self.result.chosen_beta(method))
                yield self._make_job(f"{method}-seed{seed}", method, seed, job_config)

    def _searches_beta(self, method: str) -> bool:
        """Return True if validation images choose a method's beta."""
        is_unset = self.config.for_method(method).beta is None
        return bool(self.config.betas) and method in WITH_BETA and is_unset

    def _make_job(self, name: str, method: str, seed: int, config: Config) -> Job:
        train = self.data.train
        if config.labels:
            train = train.subset(balanced_subset(train.labels, config.labels, seed))
        plan = Plan(config, len(train), seed, config.initial_beta(method))
        folder = self._out / "checkpoints" / name if self._out else Path()
        settings = {"run": name, **self._settings(method, seed, config)}
        return Job(name, method, seed, config, plan, self.data, train, folder, settings)

    def _settings(self, method: str, seed: int, config: Config) -> dict[str, Any]:
        """Return what determines a network, except its seed and a future teacher or beta."""
        # Weights are identified by their hash, as files may move.
        ignored = CHANGEABLE_OPTIONS | {"teacher_from", "student_from"}
        ignored |= {name for name in OPTIONS if method not in methods_using(name)}
        if seed >= SEARCH_SEED or not self._searches_beta(method):
            ignored |= {"betas"}
            config = replace(config, beta=config.initial_beta(method))
        if not config.validation:  # otherwise validation selects one of the evaluations
            ignored |= {"evaluate_every"}
        if seed == TEACHER_SEED:
            ignored = (ignored | {"student"}) - {"teacher"}
        settings = {name: getattr(config, name) for name in OPTIONS if name not in ignored}
        shards = 1 if config.sync_norm else parallel.world_size()
        settings["sync_norm"] = shards == 1 or f"no, {shards} shares of a batch"
        settings["images"] = self.data.digest
        if seed != TEACHER_SEED:
            settings["first_weights"] = self._student_hash
        if method in NEEDS_TEACHER and self._teacher_hash:
            settings["teacher_weights"] = self._teacher_hash
        return {name: value for name, value in settings.items() if value is not None}

    # ---- saved files ----

    def _network_path(self, job: Job) -> Path:
        if job.is_teacher:
            return self.out / "teacher.pt"
        return self.out / ("search" if job.seed >= SEARCH_SEED else "") / f"student_{job.name}.pt"

    def _load_saved(self, job: Job) -> tuple[Path, dict[str, Any]] | None:
        """Return path and content of a job's network, or of its last checkpoint."""
        path, state = self._network_path(job), self._finished.get(job.name)
        if not state and path.is_file():
            state = checkpoints.load(path, "network")
            if "settings" not in state:
                raise CheckpointError(
                    f"{path}: is a teacher from --teacher-from; continue with --teacher-from, or "
                    "start a new run with --out"
                )
        if state:
            self._check_settings(path, state, job)
            if state["settings"]["epochs"] == job.config.epochs:
                return path, state
        checkpoint = checkpoints.load_latest(job.checkpoints, job.checkpoint_kind)
        if checkpoint:
            self._check_settings(*checkpoint, job)
        return checkpoint

    def _check_settings(self, path: Path, state: dict[str, Any], job: Job) -> None:
        """Raise CheckpointError if a file has other settings than the job."""
        old, new = state.get("settings", {}), job.settings
        pending = {"teacher_weights", "beta"} - new.keys()
        names = sorted((old.keys() | new.keys()) - pending)
        # Validation selects one of all evaluations; more epochs could change its selection.
        needs_same_epochs = job.is_teacher or self.data.validation is not None
        scheduled = SCHEDULE_OPTIONS - ({"epochs"} if needs_same_epochs else set())
        changed = [n for n in names if old.get(n) != new.get(n)]
        differ = [n for n in changed if n not in scheduled]
        if not differ:
            before = replace(job.config, **{n: old[n] for n in names if n in scheduled})
            plan = Plan(before, len(job.train), job.seed, before.initial_beta(job.method))
            steps = int(state["step"] if "step" in state else state["points"][-1]["step"])
            if steps > job.plan.steps or job.plan.schedule_differs(plan, steps):
                differ = changed
        if differ:
            # Hashes are shortened.
            values = [(n, *(str(each.get(n, "none"))[:12] for each in (old, new))) for n in differ]
            pairs = ", ".join(f"{name} {a} (now {b})" for name, a, b in values[:4])
            raise CheckpointError(
                f"{path}: was trained with {pairs}; a run must not mix both: continue with the old "
                "settings, or start a new run with --out"
            )

    # ---- the run ----

    def run(self) -> Result:
        """Train all networks that are not trained yet, and return the results.

        Raises:
            CheckpointError, OSError: a file cannot be read or written, or is from another run.
            NotFiniteError: a loss or a network's outputs are inf or nan.
            Stopped: a signal arrived; the state is saved.
        """
        with ExitStack() as stack:
            self._out = parallel.run_on_rank_0(
                lambda: stack.enter_context(checkpoints.lock_folder(self._out, self.fresh))
            )
            parallel.run_on_rank_0(self._load_previous)
            if self._metrics:
                stack.callback(self._metrics.close)
            self.callbacks.on_run_start(self)
            if self.config.teacher_from and self.config.needs_teacher:
                self._evaluate_loaded_teacher()
            for job in self.jobs():
                self.callbacks.on_job_start(job)
                self._train(job)
            self.result.facts["betas_chosen"] = {
                method: self.result.chosen_beta(method) for method in self.result.beta_search
            }
            parallel.run_on_rank_0(self._write_facts)
            self.callbacks.on_run_end(self)
        return self.result

    def _write_facts(self) -> None:
        facts = json.dumps(self.result.facts, indent=2) + "\n"
        checkpoints.atomic_write(self.out / "run.json", facts.encode())

    def _load_previous(self) -> None:
        """Read all files of the run before writing any, then start its new files."""
        records: list[dict[str, Any]] = []
        for job in self.jobs():
            if not (saved := self._load_saved(job)):
                continue
            _, state = saved
            if "step" not in state:
                weights = state.pop("model")
                self._finished[job.name] = state
                if job.is_teacher:
                    self.teacher.load_state_dict(weights)
                    self._teacher_hash = TeacherHash(self.teacher.eval())()
            records += [job.tags | point for point in state["points"]]
        self._metrics = checkpoints.Metrics(self.out, records)
        checkpoints.atomic_write(self.out / "config.toml", to_toml(self.config).encode())
        self._write_facts()
        if self.data.scan:
            scan = json.dumps(asdict(self.data.scan), indent=1)
            checkpoints.atomic_write(self.out / SCAN_FILE, scan.encode())

    def _evaluate_loaded_teacher(self) -> None:
        teacher = self.teacher.eval().requires_grad_(False)
        self.result.teacher = accuracy(teacher, self.data.evaluate, self.device)
        if self.result.teacher is None:
            raise ConfigError(
                f"teacher_from: the outputs of {self.config.teacher_from!r} on the images to "
                "report on are not finite"
            )
        path = self.out / "teacher.pt"
        parallel.run_on_rank_0(
            lambda: save_network(path, "teacher", teacher, self.data, self.config, run="teacher")
        )

    def _train(self, job: Job) -> None:
        saved = parallel.run_on_rank_0(lambda: self._load_saved(job))
        if saved and "step" not in saved[1]:
            self.callbacks.on_steps_skipped(job.plan.steps)
            curve, model = Curve(saved[1]["points"], saved[1]["peak_bytes"]), self.teacher
        else:
            trainer = self.trainer(job)
            if saved:
                trainer.restore(*saved)
                self.callbacks.on_steps_skipped(trainer.step)
            try:
                curve, model = trainer.run(), trainer.student
            finally:
                trainer.objective.close()
            parallel.run_on_rank_0(lambda: self._save_trained(job, curve, model))
        if job.is_teacher:
            # Unsynchronised statistics become those of rank 0, as in its file, on all devices.
            tensors = model.state_dict().items()
            state = parallel.run_on_rank_0(lambda: {name: x.cpu() for name, x in tensors})
            self.teacher.load_state_dict(state)
            self.teacher.eval().requires_grad_(False)
            self._teacher_hash = TeacherHash(self.teacher)()
            top = [curve.selected[name] for name in ("accuracy", "top5") if name in curve.selected]
            self.result.teacher = tuple(top)
        elif job.seed >= SEARCH_SEED:
            by_beta = self.result.beta_search.setdefault(job.method, {})
            by_beta.setdefault(job.settings["beta"], []).append(curve)
        else:
            self.result.students[job.method].append(curve)

    def _save_trained(self, job: Job, curve: Curve, model: nn.Module) -> None:
        path, side = self._network_path(job), "teacher" if job.is_teacher else "student"
        path.parent.mkdir(exist_ok=True)
        facts = {"points": curve.points, "peak_bytes": curve.peak_bytes, "run": job.name}
        facts |= {"method": job.method, "seed": job.seed, "settings": job.settings}
        save_network(path, side, model, self.data, self.config, **facts)
        checkpoints.keep_latest(job.checkpoints)

    # ---- trainer ----

    def trainer(self, job: Job, compiles: bool = True) -> Trainer:
        """Return the trainer of a job, before its first step."""
        side = "teacher" if job.is_teacher else "student"
        mode = self._mode("teacher" if job.is_teacher else job.method)
        mode = replace(mode, compile=mode.compile and compiles)
        student = mode.to_layout(self._new_network(side, job.seed))
        if parallel.world_size() > 1 and self.config.sync_norm:
            student = parallel.convert_sync_batchnorm(student, self.device)
        teacher = self.teacher
        if mode.fast and job.method in NEEDS_TEACHER:
            teacher, _ = fold_batchnorm(teacher, [pair.teacher for pair in self.pairs])
            teacher = mode.to_layout(teacher)
        batch = min(job.config.batch_size // parallel.world_size(), len(job.train))
        if mode.compile:
            torch.compiler.reset()  # free the graphs of earlier networks
        networks = Networks(
            student,
            teacher,
            self.pairs,
            mode.compiled(parallel.wrap_ddp(student, self.device), self.device, batch),
            mode.compiled(teacher, self.device, batch),
            self.example,
        )
        objective = OBJECTIVES[job.method](job.config, networks, self._cache(job))
        if objective.extra:
            objective.run_extra = parallel.wrap_ddp(objective.extra, self.device)
        if parallel.world_size() > 1:
            # Weights are the same on all ranks, but dropout masks must differ.
            torch.manual_seed(job.seed * parallel.world_size() + parallel.process_info().rank)
        trainer = Trainer(job, student, objective, mode, self.device, self.callbacks, self._metrics)
        if mode.compile and (error := self._try_compile(trainer)):
            objective.close()
            self.callbacks.log(f"{job.name}: torch.compile failed, continuing without it: {error}")
            return self.trainer(job, compiles=False)
        return trainer

    def _cache(self, job: Job) -> TeacherCache | None:
        if not self.config.cache or job.method not in NEEDS_TEACHER:
            return None
        # With few labels each seed has its own images, and the cache index counts only these.
        name = f"seed{job.seed}" if self.config.labels else "all"
        # Machines may share a file system, but must not share a cache.
        node = parallel.process_info().node
        folder = f"cache/machine{node}" if node else "cache"
        return TeacherCache(self.out / folder / name, len(job.train))

    def _try_compile(self, trainer: Trainer) -> str | None:
        """Compile by running a step without side effects; return the error, if any."""
        state = {k: v.clone() for k, v in trainer.student.state_dict().items()}
        random = torch.get_rng_state()
        try:
            batch, weight = next(iter(trainer.batches(0)))
            with trainer.mode.autocast(self.device):
                terms = trainer.objective(batch, 1.0)
            (terms.loss * weight).backward()
        except Exception as error:
            return error_summary(error)[:200]
        finally:
            trainer.student.load_state_dict(state)
            trainer.optimizer.zero_grad()
            torch.set_rng_state(random)
        return None
