"""Losses of the methods, with a class for each kind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
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
    """Losses of a batch: the loss to minimise and its parts, with the transfer loss times beta.

    ``loss`` and ``transfer`` have graphs; their difference is the loss without transfer.
    """

    loss: Tensor
    task: Tensor
    kd: Tensor
    transfer: Tensor


@dataclass(frozen=True)
class Networks:
    """Student and teacher, and callables that run them: compiled or in a process group."""

    student: nn.Module
    teacher: nn.Module
    pairs: list[Pair]
    run_student: Callable[..., Any]
    run_teacher: Callable[..., Any]
    example: Tensor


@dataclass(frozen=True)
class Batch:
    """Images, labels, indices of the images in the data set, and the augmentation seed."""

    x: Tensor
    y: Tensor
    index: Tensor
    seed: int


def logits_of(output: Any) -> Tensor:
    """Return the logits in a network's output, as float32."""
    logits = _models.logits_of(output)
    if logits is None:
        raise TypeError(f"a network must return logits, got {type(output).__name__}")
    return logits.float()


class Objective:
    """Base class of the losses, and ``none``: cross-entropy with the labels."""

    # A network that is trained with the student and then discarded, and the callable that runs it
    # (in a process group, its DistributedDataParallel module).
    extra: nn.Module | None = None
    run_extra: Any = None

    def __init__(
        self, config: Config, networks: Networks, cache: TeacherCache | None, **options: Any
    ) -> None:
        self.config, self.networks, self.cache = config, networks, cache
        self._setup(**options)

    def _setup(self) -> None:
        """Create modules and hooks that the loss needs."""

    def close(self) -> None:
        """Remove the hooks."""

    def unwrapped(self) -> Objective:
        """Return a copy that calls the networks directly, without compilation and DDP."""
        plain = copy.copy(self)
        plain.networks = replace(self.networks, run_student=self.networks.student)
        plain.run_extra = self.extra
        return plain

    def _student_logits(self, x: Tensor) -> Tensor:
        return logits_of(self.networks.run_student(x))

    def _task_loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(logits, y, label_smoothing=self.config.label_smoothing)

    def _terms(self, task: Tensor, transfer: Tensor) -> Terms:
        return Terms(task + transfer, task, task.new_zeros(()), transfer)

    def _kd_terms(self, logits: Tensor, teacher_logits: Tensor, y: Tensor) -> Terms:
        c = self.config
        loss = at_fused.kd_loss(
            logits, teacher_logits, y, T=c.T, alpha=c.alpha, label_smoothing=c.label_smoothing
        )
        return Terms(loss, self._task_loss(logits.detach(), y), loss.detach(), loss.new_zeros(()))

    def __call__(self, batch: Batch, beta: float) -> Terms:
        """Return the losses of a batch at this beta."""
        task = self._task_loss(self._student_logits(batch.x), batch.y)
        return Terms(task, task, *task.new_zeros(2))


class Distillation(Objective):
    """``kd``: alpha T^2 KL(teacher || student) + (1 - alpha) cross-entropy."""

    def _setup(self) -> None:
        self._hash = TeacherHash(self.networks.teacher)

    def _teacher_logits(self, batch: Batch) -> Tensor:
        """Return the teacher's logits, from the cache if there is one."""

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
        """Return the losses of a batch; beta is ignored."""
        teacher_logits = self._teacher_logits(batch)
        return self._kd_terms(self._student_logits(batch.x), teacher_logits, batch.y)


class Attention(Objective):
    """``at``, ``channel-at``: cross-entropy + beta AT; ``at+kd``: KD's loss + beta AT."""

    def _setup(self, kd: bool = False, attend: str = "spatial") -> None:
        config, networks, self.kd = self.config, self.networks, kd
        self.at = AttentionTransfer(
            networks.student,
            networks.teacher,
            networks.pairs,
            example=networks.example,
            beta=1.0,
            cache=self.cache,
            verbose=False,
            p=config.p,
            collapse=config.collapse,
            form=config.form,
            attend=attend,
        )

    def close(self) -> None:
        """Remove the hooks."""
        self.at.remove()

    def __call__(self, batch: Batch, beta: float) -> Terms:
        """Return the losses of a batch at this beta."""
        index, seed = (None, 0) if self.cache is None else (batch.index, batch.seed)
        self.at.beta = beta
        # The teacher runs first, before the student's graph occupies memory.
        self.at.prepare(batch.x, index, seed)
        logits = self._student_logits(batch.x)
        transfer = self.at(batch.x, index, seed)
        if not self.kd:
            return self._terms(self._task_loss(logits, batch.y), transfer)
        kd = self._kd_terms(logits, logits_of(self.at.teacher_output), batch.y)
        return kd._replace(loss=kd.loss + transfer, transfer=transfer)


class Features(Objective):
    """``f-actt``: cross-entropy + beta |f(student) - teacher|^2 of the features.

    f is a 1x1 convolution per pair with different channels, trained with the student.
    """

    def _setup(self) -> None:
        networks = self.networks
        self.students: dict[int, Tensor] = {}
        self.teachers: dict[int, Tensor] = {}
        self.handles: list[Any] = []
        for model, layers, features in (
            (networks.student, [pair.student for pair in networks.pairs], self.students),
            (networks.teacher, [pair.teacher for pair in networks.pairs], self.teachers),
        ):
            for i, module in enumerate(modules_named(model, layers)):
                self.handles.append(module.register_forward_hook(partial(self._store, features, i)))
        with evaluating(networks.student), evaluating(networks.teacher):
            networks.student(networks.example)
            networks.teacher(networks.example)
        channels = [[x.shape[1] for x in each] for each in self._pop_features()]
        self.extra = at_fused.FeaturesLoss(*channels).to(networks.example.device)
        self.run_extra = self.extra

    @staticmethod
    def _store(features: dict[int, Tensor], i: int, module: Any, inputs: Any, output: Any) -> None:
        features[i] = output[0] if isinstance(output, tuple) else output

    def _pop_features(self) -> list[list[Tensor]]:
        """Return the features of both networks' last pass, and release them."""
        pairs = range(len(self.networks.pairs))
        return [[features.pop(i) for i in pairs] for features in (self.students, self.teachers)]

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()

    def __call__(self, batch: Batch, beta: float) -> Terms:
        """Return the losses of a batch at this beta."""
        with evaluating(self.networks.teacher):
            self.networks.run_teacher(batch.x)
        task = self._task_loss(self._student_logits(batch.x), batch.y)
        return self._terms(task, beta * self.run_extra(*self._pop_features()))


class Gradients(Objective):
    """``gradient-at``: cross-entropy + beta/2 |J_S - J_T| of the input gradients J."""

    def _target_gradient(self, batch: Batch) -> Tensor:
        """Return the teacher's input gradient, which the student's is compared with."""
        self.networks.teacher.eval()
        return at_fused.input_gradient(
            lambda x: logits_of(self.networks.run_teacher(x)), batch.x, batch.y
        )

    def __call__(self, batch: Batch, beta: float) -> Terms:
        """Return the losses of a batch at this beta."""
        x = batch.x.detach().requires_grad_()
        logits = self._student_logits(x)
        task = self._task_loss(logits, batch.y)
        gradient = at_fused.input_gradient(logits, x, batch.y, create_graph=True)
        target = self._target_gradient(batch)
        return self._terms(task, beta / 2 * at_fused.gradient_at_loss(gradient, target))


class FlipSymmetry(Gradients):
    """``flip-symmetry``: cross-entropy + beta/2 |J(x) - flip(J(flip(x)))|; no teacher."""

    def _target_gradient(self, batch: Batch) -> Tensor:
        """Return the student's input gradient of the flipped images, flipped back."""
        x = batch.x.detach().flip(-1)
        return at_fused.input_gradient(self._student_logits, x, batch.y, create_graph=True).flip(-1)


# Factories. Their arguments are ``config.for_method(method)``, the networks and a cache.
OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "none": Objective,
    "at": Attention,
    "channel-at": partial(Attention, attend="channel"),
    "kd": Distillation,
    "at+kd": partial(Attention, kd=True),
    "f-actt": Features,
    "gradient-at": Gradients,
    "flip-symmetry": FlipSymmetry,
}
