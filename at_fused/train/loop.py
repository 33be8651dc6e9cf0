"""Training: one loop for the teacher and for every student."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from at_fused._models import evaluating
from at_fused.train import checkpoints, parallel
from at_fused.train.config import TRANSFER, Config
from at_fused.train.data import Samples
from at_fused.train.memory import peak
from at_fused.train.methods import Batch, Objective, logits_of
from at_fused.train.plan import Plan
from at_fused.train.speed import Way
from at_fused.train.stop import Signals, Stopped

EVALUATE_BATCH = 500
TOP5_FROM = 100  # classes
GPU_LOOK = 20  # steps between looks at what a GPU has found, each of which waits for it
PROBE_STEP = 3


class NotFiniteError(RuntimeError):
    """A loss was inf or nan."""


Point = dict[str, float]


@dataclass
class Curve:
    """The evaluations of a network in training, and the most memory that a step took."""

    points: list[Point] = field(default_factory=list)
    peak_bytes: int = 0

    @property
    def chosen(self) -> Point:
        """The point whose weights are kept: the best on the validation share, or the last."""
        # The first of equal ones, as in Trainer._point.
        if "validation" in self.points[-1]:
            return max(self.points, key=lambda point: point["validation"])
        return self.points[-1]


@dataclass(frozen=True)
class Job:
    """One network to train."""

    name: str
    method: str
    seed: int
    config: Config
    train: Samples
    evaluate: Samples
    validation: Samples | None
    classes: int
    checkpoints: Path
    # Everything that makes the network, for its files to be told from others'.
    settings: Mapping[str, Any]

    @property
    def what(self) -> str:
        """The content of a checkpoint, as its file names it."""
        return f"checkpoint of {self.name}"


@dataclass
class Watch:
    """Callbacks of a training."""

    tick: Callable[[], object]
    point: Callable[[Job, Point], object]
    signals: Signals


class Trainer:
    """A student on its way: ``run`` takes it from where it is to the end."""

    def __init__(
        self,
        job: Job,
        student: nn.Module,
        objective: Objective,
        plan: Plan,
        way: Way,
        device: torch.device,
        watch: Watch,
    ) -> None:
        self.job, self.student, self.objective, self.plan = job, student, objective, plan
        self.way, self.device, self.watch = way, device, watch
        self.extra = objective.extra()
        parameters = [*student.parameters(), *(self.extra.parameters() if self.extra else [])]
        config = job.config
        common: Any = {"weight_decay": config.weight_decay, "fused": way.fused or None}
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(parameters, config.lr, **common)
            if config.optimizer == "adamw"
            else torch.optim.SGD(
                parameters,
                config.lr,
                momentum=config.momentum,
                nesterov=config.nesterov,
                **common,
            )
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=way.dtype is torch.float16)
        self.step = 0
        self.curve = Curve()
        # Weights of the best point on the validation share.
        self.best: dict[str, Tensor] | None = None
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)
        self._since = 0
        self._ms: list[float] = []
        self._bad = torch.zeros((), dtype=torch.int64, device=device)

    # ---- one step ----

    def train_step(self, batch: Batch, share: float) -> None:
        """Forward, backward and update.

        ``share`` is this process's part of the batch, times the number of processes.
        """
        if self.way.compile and self.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        plan, step = self.plan, self.step
        for group in self.optimizer.param_groups:
            group["lr"] = plan.lr(step)
        if self.job.config.reset_momentum and plan.drops(step) > plan.drops(max(0, step - 1)):
            self.optimizer.state.clear()
        with self.way.autocast(self.device):
            terms = self.objective(batch, self.plan.beta(self.step))
        self.optimizer.zero_grad()
        self.scaler.scale(terms.loss * share if share != 1 else terms.loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        found = torch.stack([x.detach() for x in terms]).double() * share
        self._sums += found
        self._since += 1
        # No look at the number itself here, for which a GPU would have to be waited.
        first = ~found.isfinite().all() & (self._bad == 0)
        self._bad = torch.where(first, self.step, self._bad)

    def batches(self, epoch: int) -> Iterator[tuple[Batch, float]]:
        """Yield the rest of an epoch, each batch with this process's ``share`` of it."""
        seed = self.plan.augmentation(epoch)
        rest = self.plan.batches(epoch)[self.step - epoch * self.plan.per_epoch :]
        own = [parallel.share(rows) for rows in rest]
        shares = [len(o) * parallel.size() / len(r) for o, r in zip(own, rest, strict=True)]
        batches = self.job.train.batches(own, seed)
        for (x, y, index), share in zip(batches, shares, strict=True):
            yield Batch(x, y, index, seed or 0), share

    # ---- the run ----

    def run(self) -> Curve:
        """Trains to the end.

        Raises:
            Stopped: a signal came; the state is saved.
            NotFiniteError: a loss was inf or nan; nothing is saved of what came after.
        """
        config, plan = self.job.config, self.plan
        self.student.train()
        for epoch in range(self.step // plan.per_epoch, config.epochs):
            begin = time.perf_counter()
            for batch, share in self.batches(epoch):
                probe = self.step == PROBE_STEP and not self.curve.peak_bytes
                if probe:
                    # Of some old gradients the profiler would know the sizes, of others not.
                    self.optimizer.zero_grad()
                with peak(self.device) if probe else nullcontext() as found:
                    self.train_step(batch, share)
                if found is not None:
                    self.curve.peak_bytes = found.bytes
                if not probe:  # which is slower
                    self._ms.append((time.perf_counter() - begin) * 1e3)
                self.watch.tick()
                ended = self.step % plan.per_epoch == 0
                due = ended and ((epoch + 1) % config.evaluate_every == 0)
                due = due or self.step == plan.steps
                self._look(due)
                if due:
                    self._point(epoch + 1)
                if self.step % config.checkpoint_every == 0 and self.step < plan.steps:
                    self.save()
                begin = time.perf_counter()
        self.save()
        if self.best:
            self.student.load_state_dict(self.best)
        return self.curve

    def _last_state(self) -> str:
        last = checkpoints.last(self.job.checkpoints)
        return f"the last good state is {last}" if last else "no state was saved before"

    def _not_finite(self, what: str) -> NotFiniteError:
        name = "the teacher" if self.job.name == "teacher" else f"method {self.job.method}"
        remedy = "a lower lr" if self.job.method in ("none", "kd") else "a lower lr or beta"
        return NotFiniteError(
            f"{self.job.name} ({name}): {what} not finite; {self._last_state()}; {remedy} may help"
        )

    def _look(self, due: bool) -> None:
        """Ends the run where a loss was not finite, or a signal has come to any process."""
        often = self.device.type == "cpu" or self.step % GPU_LOOK == 0
        if not (often or due or self.step % self.job.config.checkpoint_every == 0):
            return
        bad = parallel.greatest(int(self._bad), self.device)
        if bad:
            raise self._not_finite(f"the loss of step {bad} is")
        number = parallel.greatest(self.watch.signals.number, self.device)
        if number:
            self.save()
            raise Stopped(number)

    def _accuracy(self, samples: Samples) -> tuple[float, float]:
        with self.way.autocast(self.device):
            found = accuracy(self.student, samples, self.device)
        if found is None:
            raise self._not_finite(f"after step {self.step} the network's outputs are")
        return found

    def _point(self, epoch: int) -> None:
        sums = parallel.total([*self._sums.tolist(), float(self._since)], self.device)
        loss, task, soft, transfer = (x / sums[-1] for x in sums[:4])
        top1, top5 = self._accuracy(self.job.evaluate)
        point = {
            "step": self.step,
            "epoch": epoch,
            "loss": loss,
            "ce": task,
            "kd": soft,
            "transfer": transfer,
            "beta": self.plan.beta(self.step - 1) if self.job.method in TRANSFER else 0.0,
            "accuracy": top1,
            "lr": self.plan.lr(self.step - 1),
            "ms": statistics.median(self._ms) if self._ms else self.curve.points[-1]["ms"],
        }
        if self.job.classes >= TOP5_FROM:
            point["top5"] = top5
        if self.job.validation is not None:
            point["validation"], _ = self._accuracy(self.job.validation)
            before = [each["validation"] for each in self.curve.points]
            if point["validation"] > max(before, default=-1.0):
                self.best = {k: v.clone() for k, v in self.student.state_dict().items()}
        self.curve.points.append(point)
        self._sums.zero_()
        self._since, self._ms = 0, []
        parallel.from_first(lambda: self.watch.point(self.job, point))

    # ---- state ----

    def save(self) -> None:
        """Writes a checkpoint."""
        random = parallel.gather(_random_state(self.device))

        def write() -> None:
            state: dict[str, Any] = {
                "settings": self.job.settings,
                "step": self.step,
                "student": self.student.state_dict(),
                "best": self.best,
                "extra": self.extra.state_dict() if self.extra else {},
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "random": random,
                "points": self.curve.points,
                "peak_bytes": self.curve.peak_bytes,
                "sums": self._sums,
                "since": self._since,
                "ms": self._ms,
            }
            config = self.job.config
            checkpoints.save_step(
                self.job.checkpoints, self.step, self.job.what, state, config.keep
            )

        parallel.from_first(write)

    def restore(self, path: Path, state: dict[str, Any]) -> None:
        """Goes back to the state of a checkpoint.

        Raises:
            CheckpointError: the file does not fit.
        """
        try:
            self.student.load_state_dict(state["student"])
            if self.extra:
                self.extra.load_state_dict(state["extra"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.step = int(state["step"])
            self.curve = Curve(list(state["points"]), int(state["peak_bytes"]))
            self.best = state["best"]
            self._sums.copy_(state["sums"])
            self._since, self._ms = int(state["since"]), list(state["ms"])
            mine = state["random"][parallel.place().rank % len(state["random"])]
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise checkpoints.CheckpointError(
                f"{path}: does not fit this run ({reason})"
            ) from error
        _set_random_state(mine, self.device)


def accuracy(
    model: nn.Module, samples: Samples, device: torch.device
) -> tuple[float, float] | None:
    """Percent of samples that are classified right, and that are among the first five.

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
    top1, top5, count, wrong = parallel.total(sums.tolist(), device)
    return None if wrong else (100 * top1 / count, 100 * top5 / count)


def distribute(student: nn.Module, device: torch.device) -> nn.Module:
    """Wrap a network whose batches several processes share: its gradients are averaged."""
    if parallel.size() == 1 or not any(p.requires_grad for p in student.parameters()):
        return student
    where: dict[str, Any] = {"device_ids": [device]} if device.type == "cuda" else {}
    # Statistics are shared; or each process's own, and then rank 0's are as good as the rest's.
    names = signature(DistributedDataParallel).parameters
    new = "forward_sync_buffers"
    where[new if new in names else "broadcast_buffers"] = False
    return DistributedDataParallel(student, **where)


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)
