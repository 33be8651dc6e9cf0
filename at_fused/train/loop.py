"""Training: one loop for the teacher and for every student, with and without AT."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import at_fused
from at_fused.train.config import Config
from at_fused.train.data import Split, random_shift
from at_fused.train.wrn import WRN


@dataclass(frozen=True)
class Data:
    """Images (N, 1, S, S) and labels (N,) on the device, the split, and what to evaluate on."""

    images: Tensor
    labels: Tensor
    split: Split
    evaluate: Tensor


@dataclass
class Curve:
    """What one training run leaves behind: a point every `log_every` steps, and its cost."""

    step: list[int] = field(default_factory=list)
    ce: list[float] = field(default_factory=list)
    at: list[float] = field(default_factory=list)  # stays empty without a teacher
    accuracy: list[float] = field(default_factory=list)
    at_ms: float = 0.0  # median milliseconds of the AT loss and its gradient, see time_at
    seconds: float = 0.0


@torch.no_grad()
def accuracy(model: WRN, data: Data) -> float:
    """Percent of the evaluation images classified correctly; leaves the model in train mode."""
    model.eval()
    logits, _ = model(data.images[data.evaluate])
    model.train()
    right = int((logits.argmax(1) == data.labels[data.evaluate]).sum())
    return 100 * right / len(data.evaluate)


def time_at(student: Sequence[Tensor], teacher: Sequence[Tensor], p: float) -> float:
    """Milliseconds for the AT loss of these features and its gradient in the student's.

    On detached copies: the backward of the training loss runs AT and network together, and
    g2 depends on g0 through the network, so neither clock nor autograd can part them there.
    """
    leaves = [x.detach().requires_grad_() for x in student]

    def now() -> float:
        if leaves[0].is_cuda:
            torch.cuda.synchronize(leaves[0].device)
        return time.perf_counter()

    start = now()
    at_fused.at_loss(leaves, teacher, p=p).backward()
    return (now() - start) * 1e3


def train(
    model: WRN,
    data: Data,
    idx: Tensor,
    cfg: Config,
    seed: int,
    tick: Callable[[], object],
    teacher: WRN | None = None,
) -> Curve:
    """cfg.steps of SGD on data[idx] with CE, plus beta * AT where a teacher is given.

    The teacher is in eval mode and stays as it is. `seed` sets batch order and shifts.
    """
    g = torch.Generator().manual_seed(seed)
    opt = torch.optim.SGD(
        model.parameters(), cfg.lr, momentum=0.9, nesterov=True, weight_decay=cfg.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, cfg.steps)
    batch_size = min(cfg.batch_size, len(idx))
    order = idx[:0]
    curve = Curve()
    at_ms: list[float] = []
    model.train()
    start = time.perf_counter()
    for step in range(1, cfg.steps + 1):
        if len(order) < batch_size:
            order = idx[torch.randperm(len(idx), generator=g)]
        batch, order = order[:batch_size], order[batch_size:]
        x = random_shift(data.images[batch], cfg.shift, g)
        log = step % cfg.log_every == 0 or step in (1, cfg.steps)

        logits, features = model(x)
        loss = ce = cross_entropy(logits, data.labels[batch])
        if teacher is not None:
            with torch.no_grad():
                _, target = teacher(x)
            at = at_fused.at_loss(features, target, p=cfg.p)
            loss = ce + cfg.beta * at
            if log:
                curve.at.append(at.item())
                at_ms.append(time_at(features, target, cfg.p))
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()

        if log:
            curve.step.append(step)
            curve.ce.append(ce.item())
            curve.accuracy.append(accuracy(model, data))
        tick()
    curve.seconds = time.perf_counter() - start
    # The first probe pays for warming up, the median does not.
    curve.at_ms = statistics.median(at_ms) if at_ms else 0.0
    return curve
