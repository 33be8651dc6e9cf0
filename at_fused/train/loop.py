"""Training: one loop for the teacher and for every student, by a plan of its steps."""

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
from at_fused.train.config import TRANSFER, Config, ConfigError, in_a_line
from at_fused.train.data import Data, Samples
from at_fused.train.methods import Batch, Objective, logits_of
from at_fused.train.speed import StepMode, peak

EVALUATE_BATCH = 500
TOP5_FROM = 100  # classes
GPU_LOOK = 20  # steps between looks at what a GPU has found, each of which waits for it
PROBE_STEP = 3
SCHEDULES: dict[str, Callable[[float, float], schedules.Schedule]] = {
    "constant": lambda beta, steps: schedules.constant(beta),
    "linear": schedules.linear_decay,
    "cosine": schedules.cosine,
}
Point = dict[str, float]


class NotFiniteError(RuntimeError):
    """A loss was inf or nan."""


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """A signal has ended the run; its state is saved."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        # As shells have it for Ctrl-C; a sender of SIGTERM got what was asked for.
        self.status = 130 if number == signal.SIGINT else 0


class Signals:
    """While open, the first signal is noted in ``number``; the second acts as it always does."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, _: object) -> None:
        self.number = number
        self.__exit__()

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


@dataclass
class Curve:
    """The evaluations of a network in training, and the most memory that a step took."""

    points: list[Point] = field(default_factory=list)
    peak_bytes: int = 0

    @property
    def chosen(self) -> Point:
        """The point whose weights are kept: the best on the validation share, or the last."""
        # The first of equal ones, as in Trainer._evaluate.
        if "validation" in self.points[-1]:
            return max(self.points, key=lambda point: point["validation"])
        return self.points[-1]


@dataclass(frozen=True)
class Job:
    """One network to train, and by which steps."""

    name: str
    method: str
    seed: int
    config: Config
    plan: Plan
    data: Data
    train: Samples  # those of data, or some of them
    checkpoints: Path
    # Everything that makes the network, for its files to be told from others'.
    settings: Mapping[str, Any]

    @property
    def is_teacher(self) -> bool:
        """True for the teacher."""
        return self.name == "teacher"

    @property
    def label(self) -> dict[str, Any]:
        """The network's part of a record of metrics."""
        return {"run": self.name, "method": self.method, "seed": self.seed}

    @property
    def what(self) -> str:
        """The content of a checkpoint, as its file names it."""
        return f"checkpoint of {self.name}"


class Callbacks:
    """Callbacks of a run, and the signals that it heeds; these show nothing."""

    def __init__(self) -> None:
        self.signals = Signals()

    def log(self, text: str) -> None:
        """Something went wrong, or was decided."""
        print(text)

    def begin(self, experiment: Any) -> None:
        """The run begins, in ``experiment.out``."""

    def end(self, experiment: Any) -> None:
        """All is trained, and ``experiment.out`` still held."""

    def job(self, job: Job) -> None:
        """A network's training begins."""

    def step(self) -> None:
        """A step is done."""

    def skipped(self, steps: int) -> None:
        """So many steps were done before."""

    def point(self, job: Job, point: Point) -> None:
        """A network was evaluated."""


class Plan:
    """The steps of a training run over ``samples`` images: batches, augmentation, rate and beta.

    Nothing in it depends on what was before, so a run may go on from any step. An epoch is a
    permutation of the images, cut into batches; a last one of fewer than two images a process is
    left out, BatchNorm having nothing to average.
    """

    def __init__(self, config: Config, samples: int, seed: int, beta: float | str) -> None:
        self.config, self.samples, self.seed = config, samples, seed
        self.auto = AutoBeta() if isinstance(beta, str) else None
        self._first_beta = 1.0 if isinstance(beta, str) else beta
        whole, rest = divmod(samples, config.batch_size)
        self.per_epoch = whole + (rest >= 2 * parallel.size())
        if self.per_epoch == 0:
            raise ConfigError(
                f"batch_size: {samples} images make no batch of two for each of "
                f"{parallel.size()} processes"
            )
        self.steps = self.per_epoch * config.epochs
        self._share_of_beta = SCHEDULES[config.beta_schedule](1.0, self.steps)

    def beta(self, step: int) -> float:
        """Return the weight of the transfer loss of a step, counted from 0."""
        first = self.auto.beta if self.auto else self._first_beta
        return first * self._share_of_beta(step)

    def batches(self, epoch: int) -> list[Tensor]:
        """Return the images' numbers of each of an epoch's batches."""
        g = torch.Generator().manual_seed(self._seed_of(epoch))
        order = torch.randperm(self.samples, generator=g)
        return list(order.split(self.config.batch_size))[: self.per_epoch]

    def augmentation(self, epoch: int) -> int | None:
        """Return the seed of an epoch's augmentation."""
        if not self.config.augment:
            return None
        # With a cache the same for all students, and again after so many epochs.
        return epoch % self.config.cache if self.config.cache else self._seed_of(epoch)

    def _seed_of(self, epoch: int) -> int:
        return self.seed * 1_000_003 + epoch

    def drops(self, step: int) -> int:
        """Return how often the rate has dropped until a step, counted from 0."""
        if self.config.lr_schedule != "step":
            return 0
        done = step / self.steps
        return sum(done >= drop - 1e-9 for drop in self.config.lr_drops)

    def lr(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        config = self.config
        rise = config.warmup * self.per_epoch
        warm = min(1.0, (step + 1) / rise) if rise else 1.0
        if config.lr_schedule == "cosine":
            return warm * config.lr * (1 + math.cos(math.pi * step / self.steps)) / 2
        return warm * config.lr * config.lr_factor ** self.drops(step)

    def differs(self, other: Plan, steps: int) -> bool:
        """Tell whether another plan has other rates or betas in its first steps."""

        def course(plan: Plan) -> list[tuple[float, float]]:
            shares = map(plan._share_of_beta, range(steps))
            return [(plan.lr(step), plan._first_beta * x) for step, x in enumerate(shares)]

        return (self.auto is None) != (other.auto is None) or course(self) != course(other)


class Trainer:
    """A student of an objective on its way: ``run`` takes it from where it is to the end."""

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
        # The parts of a checkpoint that keep their own state.
        self._parts: dict[str, Any] = {
            **networks,
            "optimizer": self.optimizer,
            "scaler": self.scaler,
        }
        self.step = 0
        self.curve = Curve()
        # Weights of the best point on the validation share.
        self.best: dict[str, Tensor] | None = None
        # Since the last evaluation: the terms' sums, the steps, and the time of each.
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)
        self._steps = 0
        self._ms: list[float] = []
        # Seconds that the step took to measure beta.
        self._measuring = 0.0
        self._first_bad = torch.zeros((), dtype=torch.int64, device=device)

    # ---- one step ----

    def train_step(self, batch: Batch, share: float) -> None:
        """Take a step; ``share`` is this process's part of the batch, times the processes."""
        if self.mode.compile and self.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        plan, step = self.plan, self.step
        for group in self.optimizer.param_groups:
            group["lr"] = plan.lr(step)
        if self.job.config.reset_momentum and plan.drops(step) > plan.drops(max(0, step - 1)):
            self.optimizer.state.clear()
        if plan.auto and not plan.auto.is_fixed:
            begin = time.perf_counter()
            try:
                plan.auto.add(self.gradient_ratio(batch, share, 1.0).ratio)
                self._measuring += time.perf_counter() - begin
            except ValueError as error:
                raise NotFiniteError(f"{self.job.name}: {error}") from error
        with self.mode.autocast(self.device):
            terms = self.objective(batch, plan.beta(step))
        self.optimizer.zero_grad()
        self.scaler.scale(terms.loss * share if share != 1 else terms.loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        found = torch.stack([x.detach() for x in terms]).double() * share
        self._sums += found
        self._steps += 1
        # No look at the number itself here, for which a GPU would have to be waited.
        first = ~found.isfinite().all() & (self._first_bad == 0)
        self._first_bad = torch.where(first, self.step, self._first_bad)

    def batches(self, epoch: int) -> Iterator[tuple[Batch, float]]:
        """Yield the rest of an epoch, each batch with this process's ``share`` of it."""
        seed = self.plan.augmentation(epoch)
        rest = self.plan.batches(epoch)[self.step - epoch * self.plan.per_epoch :]
        batches = self.job.train.batches([parallel.share(rows) for rows in rest], seed)
        for rows, (x, y, index) in zip(rest, batches, strict=True):
            yield Batch(x, y, index, seed or 0), len(index) * parallel.size() / len(rows)

    # ---- the run ----

    def run(self) -> Curve:
        """Train to the end.

        Raises:
            Stopped: a signal came; the state is saved.
            NotFiniteError: a loss was inf or nan; nothing is saved of what came after.
        """
        config, plan, probed = self.job.config, self.plan, False
        self.student.train()
        for epoch in range(self.step // plan.per_epoch, config.epochs):
            begin = time.perf_counter()
            for batch, share in self.batches(epoch):
                measures = plan.auto is not None and not plan.auto.is_fixed
                if self.step >= PROBE_STEP and not (measures or probed or self.curve.peak_bytes):
                    probed = True
                    # Of some old gradients the profiler would know the sizes, of others not.
                    self.optimizer.zero_grad()
                    # And no time is taken: this is slower.
                    step = partial(self.train_step, batch, share)
                    self.curve.peak_bytes = peak(self.device, step)
                else:
                    self._measuring = 0.0
                    self.train_step(batch, share)
                    self._ms.append((time.perf_counter() - begin - self._measuring) * 1e3)
                self.callbacks.step()
                last = self.step == plan.steps
                ended = self.step % plan.per_epoch == 0
                due = last or (ended and (epoch + 1) % config.evaluate_every == 0)
                signalled = self._poll(due)
                if due:
                    self._evaluate(epoch + 1, batch, share)
                if signalled or last or self.step % config.checkpoint_every == 0:
                    self.save()
                if signalled:
                    raise Stopped(signalled)
                begin = time.perf_counter()
        if self.best:
            self.student.load_state_dict(self.best)
        return self.curve

    def _not_finite(self, what: str) -> NotFiniteError:
        job, states = self.job, checkpoints.saved_steps(self.job.checkpoints)
        saved = f"the last good state is {states[-1]}" if states else "no state was saved before"
        remedy = "a lower lr" if job.method in ("none", "kd") else "a lower lr or beta"
        return NotFiniteError(f"{job.name}: {what} not finite; {saved}; {remedy} may help")

    def _poll(self, due: bool) -> int:
        """End the run where a loss was not finite; return the signal that has come, or 0."""
        often = self.device.type == "cpu" or self.step % GPU_LOOK == 0
        if not (often or due or self.step % self.job.config.checkpoint_every == 0):
            return 0
        bad, signalled = parallel.greatest(int(self._first_bad), self.callbacks.signals.number)
        if bad:
            raise self._not_finite(f"the loss of step {bad} is")
        return signalled

    def _accuracy(self, samples: Samples) -> tuple[float, float]:
        with self.mode.autocast(self.device):
            found = accuracy(self.student, samples, self.device)
        if found is None:
            raise self._not_finite(f"after step {self.step} the network's outputs are")
        return found

    def gradient_ratio(self, batch: Batch, share: float, beta: float) -> GradientRatio:
        """Compare the gradients of a batch's losses with the weights of now; leaves no trace."""
        student = self.student
        buffers = {name: buffer.clone() for name, buffer in student.named_buffers()}
        gpus = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(gpus), self.mode.autocast(self.device):
            terms = self.objective.undistributed()(batch, beta)
        # Weighted before they go back through statistics that processes share.
        task, transfer = share * (terms.loss - terms.transfer), share * terms.transfer
        found = shared_gradients(task, transfer, student)
        with torch.no_grad():
            for name, buffer in student.named_buffers():
                buffer.copy_(buffers[name])
            return compare(*([parallel.mean(each) for each in side] for side in found))

    def _evaluate(self, epoch: int, batch: Batch, share: float) -> None:
        data, transfers = self.job.data, self.job.method in TRANSFER
        beta = self.plan.beta(self.step - 1) if transfers else 0.0
        ratio = self.gradient_ratio(batch, share, beta) if transfers else None
        sums = parallel.total([*self._sums.tolist(), float(self._steps)])
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
            # JSON has no inf.
            point |= {name: value for name, value in measured.items() if math.isfinite(value)}
        if data.classes >= TOP5_FROM:
            point["top5"] = top5
        if data.validation is not None:
            point["validation"], _ = self._accuracy(data.validation)
            before = [each["validation"] for each in self.curve.points]
            if point["validation"] > max(before, default=-1.0):
                self.best = {k: v.clone() for k, v in self.student.state_dict().items()}
        self.curve.points.append(point)
        self._sums.zero_()
        self._steps, self._ms = 0, []

        def tell() -> None:
            if self.metrics:
                self.metrics.add(self.job.label | point)
            self.callbacks.point(self.job, point)

        parallel.from_first(tell)

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
            **{name: part.state_dict() for name, part in self._parts.items()},
            "best": self.best,
            "auto_beta": self.plan.auto and self.plan.auto.log_ratios,
            "random": parallel.gather(random),
            "points": self.curve.points,
            "peak_bytes": self.curve.peak_bytes,
            "sums": self._sums,
            "since": self._steps,
            "ms": self._ms,
        }
        write, keep = checkpoints.save_step, job.config.keep
        parallel.from_first(lambda: write(job.checkpoints, self.step, job.what, state, keep))

    def restore(self, path: Path, state: dict[str, Any]) -> None:
        """Go back to the state of a checkpoint."""
        try:
            for name, part in self._parts.items():
                part.load_state_dict(state[name])
            self.step = int(state["step"])
            self.curve = Curve(list(state["points"]), int(state["peak_bytes"]))
            self.best = state["best"]
            if self.plan.auto:
                self.plan.auto = AutoBeta(state["auto_beta"], self.plan.auto.ratio)
            self._sums.copy_(state["sums"])
            self._steps, self._ms = int(state["since"]), list(state["ms"])
            states = state["random"]
            random = states[parallel.process().rank % len(states)]
            torch.set_rng_state(random[0])
            if self.device.type == "cuda" and len(random) > 1:
                torch.cuda.set_rng_state(random[1], self.device)
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise checkpoints.CheckpointError(
                f"{path}: does not fit this run ({in_a_line(error)})"
            ) from error


def accuracy(
    model: nn.Module, samples: Samples, device: torch.device
) -> tuple[float, float] | None:
    """Return the percent of samples that are classified right, and that are among the first five.

    None where a logit is not finite.
    """
    rows = torch.arange(len(samples)).split(EVALUATE_BATCH)
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    with evaluating(model):
        for x, y, _ in samples.batches([parallel.share(r) for r in rows], None):
            logits = logits_of(model(x))
            hits = logits.topk(min(5, logits.shape[1])).indices == y[:, None]
            bad = (~logits.isfinite()).sum()
            sums += torch.stack([hits[:, 0].sum(), hits.sum(), torch.tensor(len(y)).to(y), bad])
    top1, top5, count, wrong = parallel.total(sums.tolist())
    return None if wrong else (100 * top1 / count, 100 * top5 / count)
