"""The balance of a task loss and a transfer loss, which beta decides: their gradients compared."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from at_fused._arguments import check_tensor
from at_fused._models import distributed
from at_fused._numbers import kind

# The ratio that beta="auto" gives, and the calls that it measures: docs/results.md has the study.
AUTO_RATIO = 3.0
AUTO_STEPS = 10
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

    over the parameters w that both losses reach (layers after the last tapped one learn from the
    task alone). ``ratio`` is proportional to the beta in ``transfer_loss``: beta / ratio makes both
    gradients as long. It changes in training, by a factor of thirty and more.

        task, transfer = cross_entropy(student(x), y), at(x)
        print(gradient_ratio(task, transfer, student.parameters()))
        (task + transfer).backward()

    Takes two backward passes, keeps the graphs for the ``backward`` to come, and leaves ``.grad``
    as it is. Under DistributedDataParallel these are the gradients of the process's own batch.
    Where torch.compile of the student allows one backward alone, its error names the switch.

    Args:
        task_loss: a scalar with a graph, of any floating dtype (float16, bfloat16, float32,
            float64): the cross-entropy, or any loss that is not weighted by beta.
        transfer_loss: likewise, times beta.
        parameters: those of the student, as an iterable or the module itself. Other tensors of both
            graphs will do, such as the outputs of the tapped layers. Those that require no gradient
            are left out.

    Returns:
        The norms, their ratio and the cosine, as Python floats (which waits for a GPU).

    Raises:
        TypeError: a loss is not a tensor, a parameter is not one.
        ValueError: a loss is not a scalar or has no graph; no parameter is reached by both.
    """
    return compare(*shared_gradients(task_loss, transfer_loss, parameters))


def shared_gradients(
    task_loss: Tensor, transfer_loss: Tensor, parameters: Iterable[Tensor] | nn.Module
) -> tuple[Gradients, Gradients]:
    """Return both losses' gradients for the parameters that both reach."""
    losses = {"task_loss": task_loss, "transfer_loss": transfer_loss}
    for name, loss in losses.items():
        check_tensor(name, loss)
        if loss.dim() or not loss.requires_grad:
            found = f"shape {tuple(loss.shape)}" if loss.dim() else "one without a graph"
            raise ValueError(f"{name} must be a scalar that requires a gradient, got {found}")
    given = list(parameters.parameters() if isinstance(parameters, nn.Module) else parameters)
    for each in given:
        if not isinstance(each, Tensor):
            raise TypeError(f"parameters must be tensors, got {kind(each)}")
    # Each once: a weight that is shared by two modules would count twice.
    trained = list({id(each): each for each in given if each.requires_grad}.values())
    if not trained:
        raise ValueError("parameters must have one that requires a gradient, got none")
    task, transfer = (
        torch.autograd.grad(each, trained, retain_graph=True, allow_unused=True)
        for each in losses.values()
    )
    both = [(a, b) for a, b in zip(task, transfer, strict=True) if not (a is None or b is None)]
    if not both:
        raise ValueError(
            "parameters must have one that both losses depend on, got none: give the student's, "
            "and losses of the same pass of it"
        )
    return [a for a, _ in both], [b for _, b in both]


def compare(task: Gradients, transfer: Gradients) -> GradientRatio:
    """Return the norms of two gradients of the same parameters, their ratio and cosine."""
    sums = []
    for a, b in zip(task, transfer, strict=True):
        # In 16 bits squares overflow from 256 on.
        dtype = torch.promote_types(a.dtype, torch.float32)
        a, b = (each.detach().to(dtype).flatten() for each in (a, b))
        # On one device, which is waited for once.
        sums.append(torch.stack([a.dot(a), b.dot(b), a.dot(b)]).to(task[0].device))
    found = torch.stack(sums).cpu().double()
    # A compiled network gives zeros for a parameter that a loss does not reach.
    reached = (found[:, :2] != 0).all(1)
    of_task, of_transfer, both = found[reached if reached.any() else ...].sum(0).tolist()
    of_task, of_transfer = math.sqrt(of_task), math.sqrt(of_transfer)
    ratio = of_transfer / of_task if of_task else math.inf if of_transfer else math.nan
    product = of_task * of_transfer
    return GradientRatio(of_task, of_transfer, ratio, both / product if product else math.nan)


class AutoBeta:
    """The beta at which the gradients have a ratio, measured in the first AUTO_STEPS steps.

        beta = ratio / (geometric mean of the ratios at beta 1 so far)

    It changes with each of these steps, and is fixed afterwards.
    """

    def __init__(self, logarithms: Iterable[float] = (), ratio: float = AUTO_RATIO) -> None:
        self.logarithms = [*logarithms]  # of the ratios
        self.ratio = ratio

    @property
    def chosen(self) -> bool:
        """True once beta is fixed."""
        return len(self.logarithms) >= AUTO_STEPS

    @property
    def beta(self) -> float:
        """The beta by the steps so far."""
        return self.ratio / math.exp(sum(self.logarithms) / len(self.logarithms))

    def add(self, ratio: float, student: nn.Module | None = None) -> None:
        """Add a step's ratio at beta 1; of a DistributedDataParallel, the mean of its processes."""
        if not 0 < ratio < math.inf:
            raise ValueError(
                f"beta: 'auto' needs two gradients that are neither 0 nor inf nor nan in its first "
                f"{AUTO_STEPS} steps, got a ratio of {ratio}; give a number"
            )
        found = torch.tensor(math.log(ratio), dtype=torch.float64)
        if parallel := distributed(student):
            group: Any = parallel.process_group
            found = found.to(next(parallel.parameters()).device)
            torch.distributed.all_reduce(found, group=group)
            found /= group.size()
        self.logarithms.append(float(found))
