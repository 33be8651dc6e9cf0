"""Losses of the methods, a class for each kind of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import at_fused
from at_fused import AttentionTransfer, TeacherCache, _models
from at_fused._models import evaluating, modules_named, precision
from at_fused.layers import Pair
from at_fused.teacher_cache import TeacherHash
from at_fused.train.config import Config


class Terms(NamedTuple):
    """The loss to minimise; the cross-entropy, KD's loss, and the transfer's with its weight."""

    loss: Tensor
    task: Tensor
    kd: Tensor
    transfer: Tensor


@dataclass(frozen=True)
class Networks:
    """The two networks of a method, and what runs them: compiled, or in several processes."""

    student: nn.Module
    teacher: nn.Module
    pairs: list[Pair]
    run_student: Callable[..., Any]
    run_teacher: Callable[..., Any]
    example: Tensor


@dataclass(frozen=True)
class Batch:
    """Images, labels, the images' numbers in the data set, and the seed of their augmentation."""

    x: Tensor
    y: Tensor
    index: Tensor
    seed: int


def logits_of(output: Any) -> Tensor:
    """Logits, in float32, of what a network returns."""
    logits = _models.logits_of(output)
    if logits is None:
        raise TypeError(f"a network must return logits, got {type(output).__name__}")
    return logits.float()


class Objective:
    """Cross-entropy with the labels, and the base of the rest: ``none``."""

    def __init__(self, config: Config, networks: Networks, cache: TeacherCache | None) -> None:
        self.config, self.networks, self.cache = config, networks, cache
        # Runs ``extra()``; several processes put what averages its gradients here.
        self.run_extra: Any = None

    def extra(self) -> nn.Module | None:
        """Return what is trained with the student and thrown away after."""
        return None

    def close(self) -> None:
        """Takes hooks away."""

    def student(self, x: Tensor) -> Tensor:
        """The student's logits, (B, K)."""
        return logits_of(self.networks.run_student(x))

    def task(self, logits: Tensor, y: Tensor) -> Tensor:
        """The cross-entropy with the labels."""
        return cross_entropy(logits, y, label_smoothing=self.config.label_smoothing)

    def distilled(self, logits: Tensor, wanted: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """KD's loss, and the cross-entropy for the record."""
        c = self.config
        loss = at_fused.kd_loss(
            logits, wanted, y, T=c.T, alpha=c.alpha, label_smoothing=c.label_smoothing
        )
        return loss, self.task(logits.detach(), y)

    def __call__(self, batch: Batch, beta: float) -> Terms:
        """The loss of a batch, with the transfer's weight at this step."""
        task = self.task(self.student(batch.x), batch.y)
        return Terms(task, task, *task.new_zeros(2))


class Distillation(Objective):
    """``kd``: alpha T^2 KL(teacher || student) + (1 - alpha) cross-entropy."""

    def __init__(self, config: Config, networks: Networks, cache: TeacherCache | None) -> None:
        super().__init__(config, networks, cache)
        self._hash = TeacherHash(networks.teacher)

    def teacher(self, batch: Batch) -> Tensor:
        """The teacher's logits, from the cache where there is one."""

        def compute(x: Tensor) -> tuple[list[Tensor], Tensor]:
            with evaluating(self.networks.teacher):
                return [], logits_of(self.networks.run_teacher(x))

        if self.cache is None:
            return compute(batch.x)[1]
        identity = self._hash("logits", precision(batch.x))
        _, logits = self.cache.fetch(
            compute, batch.x, batch.index, identity=identity, seed=batch.seed
        )
        assert logits is not None
        return logits

    def __call__(self, batch: Batch, beta: float) -> Terms:
        """The loss of a batch."""
        wanted = self.teacher(batch)
        loss, task = self.distilled(self.student(batch.x), wanted, batch.y)
        return Terms(loss, task, loss.detach(), loss.new_zeros(()))


class Attention(Objective):
    """``at``, ``channel-at``: cross-entropy + beta AT; ``at+kd``: KD's loss + beta AT."""

    def __init__(
        self,
        config: Config,
        networks: Networks,
        cache: TeacherCache | None,
        *,
        kd: bool = False,
        attend: str = "spatial",
    ) -> None:
        super().__init__(config, networks, cache)
        self.kd = kd
        self.at = AttentionTransfer(
            networks.student,
            networks.teacher,
            networks.pairs,
            beta=1.0,
            cache=cache,
            verbose=False,
            p=config.p,
            collapse=config.collapse,
            form=config.form,
            attend=attend,
        )

    def close(self) -> None:
        """Takes the hooks away."""
        self.at.remove()

    def __call__(self, batch: Batch, beta: float) -> Terms:
        """The loss of a batch."""
        index, seed = (None, 0) if self.cache is None else (batch.index, batch.seed)
        self.at.beta = beta
        # The teacher first: its pass then takes memory that the student's graph does not hold yet.
        self.at.prepare(batch.x, index, seed)
        logits = self.student(batch.x)
        transfer = self.at(batch.x, index, seed)
        if not self.kd:
            task = self.task(logits, batch.y)
            return Terms(task + transfer, task, task.new_zeros(()), transfer.detach())
        loss, task = self.distilled(logits, logits_of(self.at.teacher_output), batch.y)
        return Terms(loss + transfer, task, loss.detach(), transfer.detach())


class _Kept:
    """The outputs of layers, by hooks that keep them."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.features: dict[str, Tensor] = {}
        self.names = names
        self.handles = [
            module.register_forward_hook(self._keep(name))
            for name, module in zip(names, modules_named(model, names), strict=True)
        ]

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.features[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def take(self) -> list[Tensor]:
        found, self.features = self.features, {}
        return [found[name] for name in self.names]


class Features(Objective):
    """``f-actt``: cross-entropy + beta |f(student) - teacher|^2 of the features themselves.

    f is a 1x1 convolution for each pair whose channels differ, trained with the student.
    """

    def __init__(self, config: Config, networks: Networks, cache: TeacherCache | None) -> None:
        super().__init__(config, networks, None)
        self.kept = [
            _Kept(networks.student, [pair.student for pair in networks.pairs]),
            _Kept(networks.teacher, [pair.teacher for pair in networks.pairs]),
        ]
        x = networks.example
        with evaluating(networks.student), evaluating(networks.teacher):
            networks.student(x)
            networks.teacher(x)
        students, teachers = ([f.shape[1] for f in kept.take()] for kept in self.kept)
        self.loss = at_fused.FeaturesLoss(students, teachers).to(x.device)
        self.run_extra = self.loss

    def extra(self) -> nn.Module | None:
        """The convolutions."""
        return self.loss

    def close(self) -> None:
        """Takes the hooks away."""
        for kept in self.kept:
            for handle in kept.handles:
                handle.remove()

    def __call__(self, batch: Batch, beta: float) -> Terms:
        """The loss of a batch."""
        with evaluating(self.networks.teacher):
            self.networks.run_teacher(batch.x)
        wanted = self.kept[1].take()
        task = self.task(self.student(batch.x), batch.y)
        transfer = beta * self.run_extra(self.kept[0].take(), wanted)
        return Terms(task + transfer, task, task.new_zeros(()), transfer.detach())


class Gradients(Objective):
    """``gradient-at``: cross-entropy + beta/2 |J_S - J_T| of the input gradients J."""

    def __call__(self, batch: Batch, beta: float) -> Terms:
        """The loss of a batch."""

        def teacher(x: Tensor) -> Tensor:
            return logits_of(self.networks.run_teacher(x))

        self.networks.teacher.eval()
        wanted = at_fused.input_gradient(teacher, batch.x, batch.y)
        x = batch.x.detach().requires_grad_()
        logits = self.student(x)
        task = self.task(logits, batch.y)
        seen = at_fused.input_gradient(logits, x, batch.y, create_graph=True)
        transfer = beta / 2 * at_fused.gradient_at_loss(seen, wanted)
        return Terms(task + transfer, task, task.new_zeros(()), transfer.detach())


class FlipSymmetry(Objective):
    """``flip-symmetry``: cross-entropy + beta/2 |J(x) - flip(J(flip(x)))|; no teacher."""

    def __call__(self, batch: Batch, beta: float) -> Terms:
        """The loss of a batch."""
        x = batch.x.detach().requires_grad_()
        logits = self.student(x)
        task = self.task(logits, batch.y)
        straight = at_fused.input_gradient(logits, x, batch.y, create_graph=True)
        flipped = at_fused.input_gradient(self.student, x.flip(-1), batch.y, create_graph=True)
        transfer = beta / 2 * at_fused.gradient_at_loss(straight, flipped.flip(-1))
        return Terms(task + transfer, task, task.new_zeros(()), transfer.detach())


def objective(
    method: str, config: Config, networks: Networks, cache: TeacherCache | None
) -> Objective:
    """The loss of a method, of ``for_method(config, method)``."""
    if method == "none":
        return Objective(config, networks, None)
    if method == "kd":
        return Distillation(config, networks, cache)
    if method == "f-actt":
        return Features(config, networks, cache)
    if method == "gradient-at":
        return Gradients(config, networks, None)
    if method == "flip-symmetry":
        return FlipSymmetry(config, networks, None)
    attend = "channel" if method == "channel-at" else "spatial"
    return Attention(config, networks, cache, kd=method == "at+kd", attend=attend)
