"""Training: one loop for the teacher and for every student."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
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
from at_fused.train.config import Config
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


@dataclass
class Curve:
    """What a training run leaves behind beside the weights."""

    points: list[dict[str, float]] = field(default_factory=list)
    peak_bytes: int = 0

    def last(self, name: str) -> float:
        """The last value of a quantity."""
        return self.points[-1][name]


@dataclass(frozen=True)
class Job:
    """One network to train."""

    name: str
    method: str
    seed: int
    config: Config
    train: Samples
    evaluate: Samples
    classes: int
    # Says which run a checkpoint belongs to.
    what: str
    checkpoints: Path


@dataclass
class Watch:
    """Who is told what happens."""

    tick: Callable[[], object]
    point: Callable[[Job, dict[str, float]], object]
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
        self.optimizer = torch.optim.SGD(
            parameters,
            config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
            fused=way.fused or None,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=way.dtype is torch.float16)
        self.step = 0
        self.curve = Curve()
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)
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
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.lr(self.step)
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
        """What is left of an epoch, each batch with this process's ``share`` of it."""
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
        return self.curve

    def _look(self, due: bool) -> None:
        """Ends the run where a loss was not finite, or a signal has come to any process."""
        often = self.device.type == "cpu" or self.step % GPU_LOOK == 0
        if not (often or due or self.step % self.job.config.checkpoint_every == 0):
            return
        bad = parallel.greatest(int(self._bad), self.device)
        if bad:
            last = checkpoints.newest(self.job.checkpoints)
            kept = f"the last good state is {last}" if last else "no state was saved before"
            raise NotFiniteError(
                f"{self.job.name} (method {self.job.method}): the loss of step {bad} is not "
                f"finite; {kept}; a lower lr or beta may help"
            )
        number = parallel.greatest(self.watch.signals.number, self.device)
        if number:
            self.save()
            raise Stopped(number)

    def _point(self, epoch: int) -> None:
        sums = parallel.total([*self._sums.tolist(), float(self._since)], self.device)
        loss, task, transfer = (x / sums[-1] for x in sums[:3])
        with self.way.autocast(self.device):
            top1, top5 = accuracy(self.student, self.job.evaluate, self.device)
        point = {
            "step": self.step,
            "epoch": epoch,
            "loss": loss,
            "ce": task,
            "transfer": transfer,
            "accuracy": top1,
            "lr": self.plan.lr(self.step - 1),
            "ms": statistics.median(self._ms),
        }
        if self.job.classes >= TOP5_FROM:
            point["top5"] = top5
        self.curve.points.append(point)
        self._sums.zero_()
        self._since, self._ms = 0, []
        if parallel.first():
            self.watch.point(self.job, point)

    # ---- state ----

    def save(self) -> None:
        """Writes a checkpoint."""
        random = parallel.gather(_random_state(self.device))
        if parallel.first():
            state: dict[str, Any] = {
                "step": self.step,
                "student": self.student.state_dict(),
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
        parallel.wait()

    def restore(self, path: Path) -> None:
        """Goes back to what a checkpoint has.

        Raises:
            CheckpointError: the file is damaged, or of another run.
        """
        state = checkpoints.load(path, self.job.what)
        try:
            self.student.load_state_dict(state["student"])
            if self.extra:
                self.extra.load_state_dict(state["extra"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.step = int(state["step"])
            self.curve = Curve(list(state["points"]), int(state["peak_bytes"]))
            self._sums.copy_(state["sums"])
            self._since, self._ms = int(state["since"]), list(state["ms"])
            mine = state["random"][parallel.place().rank % len(state["random"])]
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise checkpoints.CheckpointError(
                f"{path}: does not fit this run ({reason})"
            ) from error
        _set_random_state(mine, self.device)


def accuracy(model: nn.Module, samples: Samples, device: torch.device) -> tuple[float, float]:
    """Percent of samples that are classified right, and that are among the first five."""
    rows = torch.arange(len(samples)).split(EVALUATE_BATCH)
    right = torch.zeros(3, dtype=torch.float64, device=device)
    with evaluating(model):
        for x, y, _ in samples.batches([parallel.share(r) for r in rows], None):
            logits = logits_of(model(x))
            hits = logits.topk(min(5, logits.shape[1])).indices == y[:, None]
            right += torch.stack([hits[:, 0].sum(), hits.sum(), torch.tensor(len(y)).to(y)])
    top1, top5, count = parallel.total(right.tolist(), device)
    return 100 * top1 / count, 100 * top5 / count


def distribute(student: nn.Module, device: torch.device) -> nn.Module:
    """What runs a network where several processes share a batch, its gradients averaged."""
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
