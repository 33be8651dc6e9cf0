"""The balance of a task loss and a transfer loss, which beta decides: their gradients compared."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from at_fused._arguments import check_tensor
from at_fused._models import find_ddp
from at_fused._numbers import type_name
from at_fused.backends.eager import to_float64

# The ratio that beta="auto" gives, and the calls that it measures: docs/results.md has the study.
AUTO_RATIO = 3.0
AUTO_STEPS = 10
# Gradients in 16 bits lose what is small: the first scale is taken at which none overflows.
SCALES = (2.0**16, 2.0**8, 1.0)
Gradients = list[Tensor]


class GradientRatio(NamedTuple):
    """The gradients of two losses, compared; ``str`` of it is one line.

    Attributes:
        task: the norm of the task loss's gradient.
        transfer: the norm of the transfer loss's gradient, with the beta that it was scaled by.
        ratio: transfer / task; inf where only ``task`` is 0, nan where both are.
        cosine: of the angle between them, from -1 (opposed) to 1; nan where a norm is 0.
    """

    task: float
    transfer: float
    ratio: float
    cosine: float

    def __str__(self) -> str:
        return (
            f"gradient of transfer / task {self.ratio:.3g} ({self.transfer:.3g} / "
            f"{self.task:.3g}), cosine {self.cosine:+.2f}"
        )


def gradient_ratio(
    task_loss: Tensor, transfer_loss: Tensor, parameters: Iterable[Tensor] | nn.Module
) -> GradientRatio:
    """Compare the gradients of two losses: shows a beta that is wrong by orders of magnitude.

        ratio = |d transfer_loss / d w| / |d task_loss / d w|

    over the parameters w that get a gradient other than zero from both losses (layers after the
    last tapped one learn from the task alone). ``ratio`` is proportional to the beta in
    ``transfer_loss``: beta / ratio makes both gradients equally long. It changes in training, often
    by a factor of ten and more (docs/results.md).

        task, transfer = cross_entropy(student(x), y), at(x)
        print(gradient_ratio(task, transfer, student.parameters()))
        (task + transfer).backward()

    Takes two backward passes, keeps the graphs for the ``backward`` to come, and leaves ``.grad``
    as it is. Under DistributedDataParallel these are the gradients of the process's own batch.
    Where torch.compile of the student allows only one backward, its error names the switch. The
    losses are those before GradScaler: small gradients in float16 are scaled here.

    Args:
        task_loss: a scalar with a graph, of any floating dtype (float16, bfloat16, float32,
            float64): the cross-entropy, or any loss that is not weighted by beta.
        transfer_loss: likewise, times beta.
        parameters: those of the student, as an iterable or the module itself, real and not sharded
            by FSDP. Other tensors of both graphs will do, such as the outputs of the tapped layers.
            Those that require no gradient are left out.

    Returns:
        The norms, their ratio and the cosine, as Python floats (which waits for a GPU).

    Raises:
        TypeError: a loss is not a tensor, a parameter is not one or complex, or is sharded.
        ValueError: a loss is not a scalar or has no graph; no parameter is reached by both.
    """
    return compare(*shared_gradients(task_loss, transfer_loss, parameters))


def shared_gradients(
    task_loss: Tensor, transfer_loss: Tensor, parameters: Iterable[Tensor] | nn.Module
) -> tuple[Gradients, Gradients]:
    """Return both losses' gradients for the parameters that both reach."""
    check_loss("task_loss", task_loss)
    check_loss("transfer_loss", transfer_loss)
    given = parameters.parameters() if isinstance(parameters, nn.Module) else parameters
    if isinstance(given, Tensor) or not isinstance(given, Iterable):
        found = "a tensor" if isinstance(given, Tensor) else type_name(given)
        raise TypeError(f"parameters must be an iterable of tensors or a module, got {found}")
    given = list(given)
    for each in given:
        if not isinstance(each, Tensor):
            raise TypeError(f"parameters must be tensors, got {type_name(each)}")
        if each.is_complex():
            raise TypeError(f"parameters must be real, got {each.dtype}")
        if hasattr(each, "full_tensor"):
            raise TypeError(
                "parameters must be whole, got one that FSDP shards: give the outputs of the "
                'tapped layers, and for beta="auto" a number'
            )
    # Each once: a weight that is shared by two modules would count twice.
    trained = list({id(each): each for each in given if each.requires_grad}.values())
    if not trained:
        raise ValueError("parameters must have one that requires a gradient, got none")
    task, transfer = (_gradients(loss, trained) for loss in (task_loss, transfer_loss))
    both = [(a, b) for a, b in zip(task, transfer, strict=True) if not (a is None or b is None)]
    if not both:
        raise ValueError(
            "parameters must have one that both losses depend on, got none: give the student's, "
            "and losses of the same pass of it"
        )
    return [a for a, _ in both], [b for _, b in both]


def check_loss(name: str, loss: Tensor) -> None:
    """Raise for a loss that has no gradient."""
    check_tensor(name, loss)
    if loss.dim() or not loss.requires_grad:
        found = f"shape {tuple(loss.shape)}" if loss.dim() else "one without a graph"
        raise ValueError(f"{name} must be a scalar that requires a gradient, got {found}")


def _gradients(loss: Tensor, trained: list[Tensor]) -> list[Tensor | None]:
    """Return the gradients in float32 or wider, dense; None where a tensor is not reached."""
    gradients: list[Tensor | None] = []
    for scale in SCALES:
        found = torch.autograd.grad(
            loss, trained, torch.full_like(loss, scale), retain_graph=True, allow_unused=True
        )
        gradients = [None if each is None else _widened(each) / scale for each in found]
        if all(bool(each.isfinite().all()) for each in gradients if each is not None):
            break
    return gradients


def _widened(gradient: Tensor) -> Tensor:
    dense = gradient.to_dense() if gradient.is_sparse else gradient
    # In 16 bits squares overflow from 256 on.
    return dense.to(torch.promote_types(dense.dtype, torch.float32))


def compare(task: Gradients, transfer: Gradients) -> GradientRatio:
    """Return the norms of two gradients of the same parameters, their ratio and cosine."""
    pairs = list(zip(task, transfer, strict=True))
    # On one device, which is waited for once.
    found = torch.stack([_products(a, b).to(task[0].device) for a, b in pairs]).cpu().double()
    # Squares of float32 are right from 1e-38 to 3e38.
    sound = (found[:, :2] > 1e-30).all(1) & (found[:, :2] < 1e38).all(1)
    for i in (~sound).nonzero().flatten().tolist():
        found[i] = _products(*map(to_float64, pairs[i])).cpu()
    # A compiled network gives zeros for a parameter that a loss does not reach.
    reached = (found[:, :2] != 0).all(1)
    of_task, of_transfer, both = found[reached if reached.any() else ...].sum(0).tolist()
    of_task, of_transfer = math.sqrt(of_task), math.sqrt(of_transfer)
    ratio = of_transfer / of_task if of_task else math.inf if of_transfer else math.nan
    product = of_task * of_transfer
    return GradientRatio(of_task, of_transfer, ratio, both / product if product else math.nan)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Return a.a, b.b and a.b."""
    a, b = a.flatten(), b.flatten()
    return torch.stack([a.dot(a), b.dot(b), a.dot(b)])


class AutoBeta:
    """The beta at which the gradients have a ratio, measured in the first AUTO_STEPS steps.

        beta = ratio / (geometric mean of the ratios at beta 1 so far)

    It changes with each of these steps, and is fixed afterwards. A step in which a gradient is 0,
    inf or nan does not count: the last layer may begin at zeros, and float16 overflows.
    """

    def __init__(self, logarithms: Iterable[float] = (), ratio: float = AUTO_RATIO) -> None:
        self.logarithms = [*logarithms]  # of the ratios
        self.ratio = ratio
        self._missed = 0

    @property
    def chosen(self) -> bool:
        """True once beta is fixed."""
        return len(self.logarithms) >= AUTO_STEPS

    @property
    def beta(self) -> float:
        """The beta by the steps so far; 0 before the first that counts."""
        if not self.logarithms:
            return 0.0
        return self.ratio / math.exp(sum(self.logarithms) / len(self.logarithms))

    def add(self, ratio: float, student: nn.Module | None = None) -> None:
        """Add a step's ratio at beta 1; of a DistributedDataParallel, the mean of its processes."""
        counts = 0 < ratio < math.inf
        found = torch.tensor([math.log(ratio) if counts else 0.0, counts], dtype=torch.float64)
        if parallel := find_ddp(student):
            group: Any = parallel.process_group
            found = found.to(next(parallel.parameters()).device)
            torch.distributed.all_reduce(found, group=group)
        total, count = found.tolist()
        if count:
            self.logarithms.append(total / count)
            return
        self._missed += 1
        if self._missed >= AUTO_STEPS:
            raise ValueError(
                f"beta: 'auto' needs steps in which neither gradient is 0, inf or nan, got "
                f"{self._missed} others, the last with a ratio of {ratio}; give a number"
            )
