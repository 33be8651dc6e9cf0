"""Training loop of the teacher and all students, and the plan of its steps."""

from __future__ import annotations

import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from at_fused import schedules
from at_fused._models import evaluating
from at_fused.balance import AutoBeta, GradientRatio, compare, shared_gradients
from at_fused.train import checkpoints, parallel
from at_fused.train.config import WITH_BETA, Config, ConfigError, error_summary
from at_fused.train.data import Data, Samples
from at_fused.train.methods import Batch, Objective, logits_of
from at_fused.train.speed import StepMode, peak_memory

EVAL_BATCH_SIZE = 500
TOP5_MIN_CLASSES = 100
GPU_POLL_STEPS = 20  # steps between checks that synchronise with a GPU
MEMORY_STEP = 3  # the first step that measures memory
SCHEDULES: dict[str, Callable[[float, float], schedules.Schedule]] = {
    "constant": lambda beta, steps: schedules.constant(beta),
    "linear": schedules.linear_decay,
    "cosine": schedules.cosine,
}
Point = dict[str, float]


class NotFiniteError(RuntimeError):
    """A loss or a network's output is inf or nan."""


class Stopped(Exception):  # noqa: N818 - not an error
    """A signal stopped the run; its state is saved."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        # 130 is the shells' convention for Ctrl-C. A stop by SIGTERM is a success.
        self.status = 130 if number == signal.SIGINT else 0


class Signals:
    """Context manager that records the first signal in ``number``; the second acts as usual."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._record)
        return self

    def _record(self, number: int, _: object) -> None:
        self.number = number
        self.__exit__()

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


@dataclass
class Curve:
    """Evaluations of a network during training, and the peak memory of a step."""

    points: list[Point] = field(default_factory=list)
    peak_bytes: int = 0

    @property
    def selected(self) -> Point:
        """The point of the saved weights: the best on validation images, or the last."""
        # max returns the first of equal points, as Trainer._evaluate does.
        if "validation" in self.points[-1]:
            return max(self.points, key=lambda point: point["validation"])
        return self.points[-1]


@dataclass(frozen=True)
class Job:
    """A network to train: its configuration, data and files."""

    name: str
    method: str
    seed: int
    config: Config
    plan: Plan
    data: Data
    train: Samples  # data.train or a subset of it
    checkpoints: Path
    # The settings that determine the network, stored in its files and compared on --resume.
    settings: Mapping[str, Any]

    @property
    def is_teacher(self) -> bool:
        """True for the teacher."""
        return self.name == "teacher"

    @property
    def tags(self) -> dict[str, Any]:
        """The keys of a metrics record that identify the network."""
        return {"run": self.name, "method": self.method, "seed": self.seed}

    @property
    def checkpoint_kind(self) -> str:
        """The kind of the network's checkpoints, stored in their files."""
        return f"checkpoint of {self.name}"


class Callbacks:
    """Callbacks of a run, and its signals. The base class shows nothing but log messages."""

    def __init__(self) -> None:
        self.signals = Signals()

    def log(self, text: str) -> None:
        """Print a warning or a decision."""
        print(text)

    def on_run_start(self, experiment: Any) -> None:
        """Handle the start of a run; its files are in ``experiment.out``."""

    def on_run_end(self, experiment: Any) -> None:
        """Handle the end of a run, when all networks are trained and the folder is still locked."""

    def on_job_start(self, job: Job) -> None:
        """Handle the start of a network's training."""

    def on_step(self) -> None:
        """Handle the end of a step."""

    def on_steps_skipped(self, steps: int) -> None:
        """Handle steps that an earlier run has completed."""

    def on_evaluation(self, job: Job, point: Point) -> None:
        """Handle the evaluation of a network."""


class Plan:
    """Plan of a training run over ``samples`` images: batches, augmentation, rate and beta.

    A pure function of the step, so that a run can resume at any step. An epoch is a permutation
    of the images, split into batches. A last batch with fewer than two images per rank is dropped,
    as BatchNorm needs two.
    """

    def __init__(self, config: Config, samples: int, seed: int, beta: float | str) -> None:
        self.config, self.samples, self.seed = config, samples, seed
        self.auto = AutoBeta() if isinstance(beta, str) else None
        self._initial_beta = 1.0 if isinstance(beta, str) else beta
        full, rest = divmod(samples, config.batch_size)
        self.steps_per_epoch = full + (rest >= 2 * parallel.world_size())
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"batch_size: {samples} images are too few for two on each of "
                f"{parallel.world_size()} ranks"
            )
        self.steps = self.steps_per_epoch * config.epochs
        self._beta_schedule = SCHEDULES[config.beta_schedule](1.0, self.steps)

    def beta(self, step: int) -> float:
        """Return the weight of the transfer loss of a step, counted from 0."""
        initial = self.auto.beta if self.auto else self._initial_beta
        return initial * self._beta_schedule(step)

    def batches(self, epoch: int) -> list[Tensor]:
        """Return the image indices of each batch of an epoch."""
        g = torch.Generator().manual_seed(self._epoch_seed(epoch))
        order = torch.randperm(self.samples, generator=g)
        return list(order.split(self.config.batch_size))[: self.steps_per_epoch]

    def augmentation_seed(self, epoch: int) -> int | None:
        """Return the seed of an epoch's augmentation."""
        if not self.config.augment:
            return None
        # With a cache: the same for all students, and repeated every ``cache`` epochs.
        return epoch % self.config.cache if self.config.cache else self._epoch_seed(epoch)

    def _epoch_seed(self, epoch: int) -> int:
        return self.seed * 1_000_003 + epoch

    def drop_count(self, step: int) -> int:
        """Return how often the learning rate has dropped before a step, counted from 0."""
        if self.config.lr_schedule != "step":
            return 0
        done = step / self.steps
        return sum(done >= drop - 1e-9 for drop in self.config.lr_drops)

    def lr(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        config = self.config
        warmup_steps = config.warmup * self.steps_per_epoch
        warm = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
        if config.lr_schedule == "cosine":
            return warm * config.lr * (1 + math.cos(math.pi * step / self.steps)) / 2
        return warm * config.lr * config.lr_factor ** self.drop_count(step)

    def schedule_differs(self, other: Plan, steps: int) -> bool:
        """Return True if the first steps of another plan have other learning rates or betas."""

        def schedule(plan: Plan) -> list[tuple[float, float]]:
            factors = map(plan._beta_schedule, range(steps))
            return [(plan.lr(step), plan._initial_beta * x) for step, x in enumerate(factors)]

        return (self.auto is None) != (other.auto is None) or schedule(self) != schedule(other)


class Trainer:
    """Trainer of one network; ``run`` continues from the current step to the end."""

    def __init__(
        self,
        job: Job,
        student: nn.Module,
        objective: Objective,
        mode: StepMode,
        device: torch.device,
        callbacks: Callbacks,
        metrics: checkpoints.Metrics | None = None,
    ) -> None:
        self.job, self.plan, self.student, self.objective = job, job.plan, student, objective
        self.mode, self.device, self.callbacks, self.metrics = mode, device, callbacks, metrics
        config = job.config
        networks = {"student": student} | ({"extra": objective.extra} if objective.extra else {})
        parameters = [p for network in networks.values() for p in network.parameters()]
        common: Any = {"weight_decay": config.weight_decay, "fused": mode.fast or None}
        momentum: Any = {"momentum": config.momentum, "nesterov": config.nesterov}
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(parameters, config.lr, **common)
            if config.optimizer == "adamw"
            else torch.optim.SGD(parameters, config.lr, **momentum, **common)
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=mode.dtype is torch.float16)
        # Parts of a checkpoint that have a state_dict.
        self._stateful: dict[str, Any] = {
            **networks,
            "optimizer": self.optimizer,
            "scaler": self.scaler,
        }
        self.step = 0
        self.curve = Curve()
        # Weights of the best evaluation on validation images.
        self.best: dict[str, Tensor] | None = None
        # Since the last evaluation: sums of the loss terms, steps, and times of the steps.
        self._loss_sums = torch.zeros(4, dtype=torch.float64, device=device)
        self._steps_since_eval = 0
        self._ms: list[float] = []
        # Seconds that the current step spends on measuring beta.
        self._beta_time = 0.0
        self._first_nonfinite_step = torch.zeros((), dtype=torch.int64, device=device)

    # ---- step ----

    def train_step(self, batch: Batch, weight: float) -> None:
        """Take a step; ``weight`` is this rank's share of the batch times the number of ranks."""
        if self.mode.compile and self.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        plan, step = self.plan, self.step
        for group in self.optimizer.param_groups:
            group["lr"] = plan.lr(step)
        previous = max(0, step - 1)
        if self.job.config.reset_momentum and plan.drop_count(step) > plan.drop_count(previous):
            self.optimizer.state.clear()
        if plan.auto and not plan.auto.is_fixed:
            begin = time.perf_counter()
            try:
                plan.auto.add(self.gradient_ratio(batch, weight, 1.0).ratio)
                self._beta_time += time.perf_counter() - begin
            except ValueError as error:
                raise NotFiniteError(f"{self.job.name}: {error}") from error
        with self.mode.autocast(self.device):
            terms = self.objective(batch, plan.beta(step))
        self.optimizer.zero_grad()
        self.scaler.scale(terms.loss * weight if weight != 1 else terms.loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        values = torch.stack([x.detach() for x in terms]).double() * weight
        self._loss_sums += values
        self._steps_since_eval += 1
        # Stays on the device: reading it here would synchronise with the GPU.
        is_first = ~values.isfinite().all() & (self._first_nonfinite_step == 0)
        self._first_nonfinite_step = torch.where(is_first, self.step, self._first_nonfinite_step)

    def batches(self, epoch: int) -> Iterator[tuple[Batch, float]]:
        """Yield the remaining batches of an epoch, each with its ``weight`` in ``train_step``."""
        seed = self.plan.augmentation_seed(epoch)
        rest = self.plan.batches(epoch)[self.step - epoch * self.plan.steps_per_epoch :]
        batches = self.job.train.batches([parallel.shard(rows) for rows in rest], seed)
        for rows, (x, y, index) in zip(rest, batches, strict=True):
            yield Batch(x, y, index, seed or 0), len(index) * parallel.world_size() / len(rows)

    # ---- run ----

    def run(self) -> Curve:
        """Train to the end.

        Raises:
            Stopped: a signal arrived; the state is saved.
            NotFiniteError: a loss was inf or nan; nothing after it is saved.
        """
        config, plan, is_measured = self.job.config, self.plan, False
        self.student.train()
        for epoch in range(self.step // plan.steps_per_epoch, config.epochs):
            begin = time.perf_counter()
            for batch, weight in self.batches(epoch):
                needs_beta = plan.auto is not None and not plan.auto.is_fixed
                skips_memory = needs_beta or is_measured or self.curve.peak_bytes
                if self.step >= MEMORY_STEP and not skips_memory:
                    is_measured = True
                    # The profiler would know the size of some old gradients only.
                    self.optimizer.zero_grad()
                    # Not timed, as the profiler slows the step down.
                    step = partial(self.train_step, batch, weight)
                    self.curve.peak_bytes = peak_memory(self.device, step)
                else:
                    self._beta_time = 0.0
                    self.train_step(batch, weight)
                    self._ms.append((time.perf_counter() - begin - self._beta_time) * 1e3)
                self.callbacks.on_step()
                is_last = self.step == plan.steps
                ends_epoch = self.step % plan.steps_per_epoch == 0
                evaluates = is_last or (ends_epoch and (epoch + 1) % config.evaluate_every == 0)
                signalled = self._poll(evaluates)
                if evaluates:
                    self._evaluate(epoch + 1, batch, weight)
                if signalled or is_last or self.step % config.checkpoint_every == 0:
                    self.save()
                if signalled:
                    raise Stopped(signalled)
                begin = time.perf_counter()
        if self.best:
            self.student.load_state_dict(self.best)
        return self.curve

    def _not_finite_error(self, subject: str) -> NotFiniteError:
        job, states = self.job, checkpoints.list_checkpoints(self.job.checkpoints)
        saved = f"the last checkpoint is {states[-1]}" if states else "no checkpoint was saved"
        remedy = "a lower lr" if job.method in ("none", "kd") else "a lower lr or beta"
        return NotFiniteError(f"{job.name}: {subject} not finite; {saved}; try {remedy}")

    def _poll(self, evaluates: bool) -> int:
        """Raise if a loss was not finite; return the signal that has arrived on a rank, or 0."""
        is_due = self.device.type == "cpu" or self.step % GPU_POLL_STEPS == 0
        if not (is_due or evaluates or self.step % self.job.config.checkpoint_every == 0):
            return 0
        bad, signalled = parallel.all_reduce_max(
            int(self._first_nonfinite_step), self.callbacks.signals.number
        )
        if bad:
            raise self._not_finite_error(f"the loss of step {bad} is")
        return signalled

    def _accuracy(self, samples: Samples) -> tuple[float, float]:
        with self.mode.autocast(self.device):
            result = accuracy(self.student, samples, self.device)
        if result is None:
            raise self._not_finite_error(f"after step {self.step} the network's outputs are")
        return result

    def gradient_ratio(self, batch: Batch, weight: float, beta: float) -> GradientRatio:
        """Compare the gradients of a batch's losses at the current weights; has no side effects."""
        student = self.student
        buffers = {name: buffer.clone() for name, buffer in student.named_buffers()}
        gpus = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(gpus), self.mode.autocast(self.device):
            terms = self.objective.unwrapped()(batch, beta)
        # Weight the losses before the backward pass, as synchronised statistics mix the ranks.
        task, transfer = weight * (terms.loss - terms.transfer), weight * terms.transfer
        gradients = shared_gradients(task, transfer, student)
        with torch.no_grad():
            for name, buffer in student.named_buffers():
                buffer.copy_(buffers[name])
            return compare(*([parallel.all_reduce_mean(g) for g in side] for side in gradients))

    def _evaluate(self, epoch: int, batch: Batch, weight: float) -> None:
        data, has_beta = self.job.data, self.job.method in WITH_BETA
        beta = self.plan.beta(self.step - 1) if has_beta else 0.0
        ratio = self.gradient_ratio(batch, weight, beta) if has_beta else None
        sums = parallel.all_reduce_sum([*self._loss_sums.tolist(), float(self._steps_since_eval)])
        loss, task, soft, transfer = (x / sums[-1] for x in sums[:4])
        top1, top5 = self._accuracy(data.evaluate)
        point = {
            "step": self.step,
            "epoch": epoch,
            "loss": loss,
            "ce": task,
            "kd": soft,
            "transfer": transfer,
            "beta": beta,
            "accuracy": top1,
            "lr": self.plan.lr(self.step - 1),
            "ms": statistics.median(self._ms) if self._ms else self.curve.points[-1]["ms"],
        }
        if self.plan.auto:
            point["auto_beta"] = self.plan.auto.beta
        if ratio:
            measured = {"gradient_ratio": ratio.ratio, "gradient_cosine": ratio.cosine}
            # JSON has no inf and no nan.
            point |= {name: value for name, value in measured.items() if math.isfinite(value)}
        if data.classes >= TOP5_MIN_CLASSES:
            point["top5"] = top5
        if data.validation is not None:
            point["validation"], _ = self._accuracy(data.validation)
            before = [each["validation"] for each in self.curve.points]
            if point["validation"] > max(before, default=-1.0):
                self.best = {k: v.clone() for k, v in self.student.state_dict().items()}
        self.curve.points.append(point)
        self._loss_sums.zero_()
        self._steps_since_eval, self._ms = 0, []

        def report() -> None:
            if self.metrics:
                self.metrics.add(self.job.tags | point)
            self.callbacks.on_evaluation(self.job, point)

        parallel.run_on_rank_0(report)

    # ---- state ----

    def save(self) -> None:
        """Write a checkpoint."""
        random = [torch.get_rng_state()]
        if self.device.type == "cuda":
            random.append(torch.cuda.get_rng_state(self.device))
        job = self.job
        state: dict[str, Any] = {
            "settings": job.settings,
            "step": self.step,
            **{name: part.state_dict() for name, part in self._stateful.items()},
            "best": self.best,
            "auto_beta": self.plan.auto and self.plan.auto.log_ratios,
            "random": parallel.all_gather(random),
            "points": self.curve.points,
            "peak_bytes": self.curve.peak_bytes,
            "sums": self._loss_sums,
            "since": self._steps_since_eval,
            "ms": self._ms,
        }
        kind, keep, save = job.checkpoint_kind, job.config.keep, checkpoints.save_checkpoint
        parallel.run_on_rank_0(lambda: save(job.checkpoints, self.step, kind, state, keep))

    def restore(self, path: Path, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        try:
            for name, part in self._stateful.items():
                part.load_state_dict(state[name])
            self.step = int(state["step"])
            self.curve = Curve(list(state["points"]), int(state["peak_bytes"]))
            self.best = state["best"]
            if self.plan.auto:
                self.plan.auto = AutoBeta(state["auto_beta"], self.plan.auto.ratio)
            self._loss_sums.copy_(state["sums"])
            self._steps_since_eval, self._ms = int(state["since"]), list(state["ms"])
            states = state["random"]
            random = states[parallel.process_info().rank % len(states)]
            torch.set_rng_state(random[0])
            if self.device.type == "cuda" and len(random) > 1:
                torch.cuda.set_rng_state(random[1], self.device)
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise checkpoints.CheckpointError(
                f"{path}: does not fit this run ({error_summary(error)})"
            ) from error


def accuracy(
    model: nn.Module, samples: Samples, device: torch.device
) -> tuple[float, float] | None:
    """Return top-1 and top-5 accuracy in percent over all ranks; None if a logit is not finite."""
    rows = torch.arange(len(samples)).split(EVAL_BATCH_SIZE)
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    with evaluating(model):
        for x, y, _ in samples.batches([parallel.shard(r) for r in rows], None):
            logits = logits_of(model(x))
            hits = logits.topk(min(5, logits.shape[1])).indices == y[:, None]
            bad = (~logits.isfinite()).sum()
            sums += torch.stack([hits[:, 0].sum(), hits.sum(), torch.tensor(len(y)).to(y), bad])
    top1, top5, count, wrong = parallel.all_reduce_sum(sums.tolist())
    return None if wrong else (100 * top1 / count, 100 * top5 / count)
