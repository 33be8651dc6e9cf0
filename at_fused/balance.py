"""Balance of a task loss and a transfer loss: the ratio of their gradients, and beta from it."""

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

# The ratio that beta="auto" aims at, and the number of calls it measures (study: docs/results.md).
AUTO_RATIO = 3.0
AUTO_STEPS = 10
# Small 16-bit gradients underflow. The first scale without an overflow is used.
SCALES = (2.0**16, 2.0**8, 1.0)
Gradients = list[Tensor]


class GradientRatio(NamedTuple):
    """Comparison of the gradients of two losses; ``str`` formats it as one line.

    Attributes:
        task: norm of the task loss's gradient.
        transfer: norm of the transfer loss's gradient, which includes beta.
        ratio: transfer / task. inf if only ``task`` is 0, nan if both are 0.
        cosine: cosine of the angle between the gradients, from -1 to 1. nan if a norm is 0.
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
    """Compare the gradients of two losses, to find a beta that is off by orders of magnitude.

        ratio = |d transfer_loss / d w| / |d task_loss / d w|

    The norms are over the parameters w with nonzero gradients from both losses. (Layers after the
    last tapped one learn from the task loss only.) ``ratio`` is proportional to the beta in
    ``transfer_loss``: beta / ratio makes both gradients equally long. It changes during training,
    often by a factor of ten or more (docs/results.md).

        task, transfer = cross_entropy(student(x), y), at(x)
        print(gradient_ratio(task, transfer, student.parameters()))
        (task + transfer).backward()

    The function runs two backward passes, keeps both graphs, and does not touch ``.grad``. Under
    DistributedDataParallel it compares the gradients of the local batch. If torch.compile of the
    student supports a single backward pass only, its error names the setting to change. Pass the
    losses before GradScaler scales them: the function itself scales small float16 gradients.

    Args:
        task_loss: a scalar with a graph, of any floating dtype (float16, bfloat16, float32,
            float64): the cross-entropy, or any other loss without the factor beta.
        transfer_loss: a scalar as above, times beta.
        parameters: the student's, as an iterable or a module. Real, and not sharded by FSDP. Other
            tensors in both graphs also work, such as the outputs of the tapped layers. Tensors
            that require no gradient are ignored.

    Returns:
        The norms, their ratio and the cosine, as Python floats (this synchronises with a GPU).

    Raises:
        TypeError: a loss is not a tensor; a parameter is not a tensor, is complex, or is sharded.
        ValueError: a loss is not a scalar or has no graph; no parameter depends on both losses.
    """
    return compare(*shared_gradients(task_loss, transfer_loss, parameters))


def shared_gradients(
    task_loss: Tensor, transfer_loss: Tensor, parameters: Iterable[Tensor] | nn.Module
) -> tuple[Gradients, Gradients]:
    """Return the gradients of both losses, for the parameters that both depend on."""
    check_loss("task_loss", task_loss)
    check_loss("transfer_loss", transfer_loss)
    tensors = parameters.parameters() if isinstance(parameters, nn.Module) else parameters
    if isinstance(tensors, Tensor) or not isinstance(tensors, Iterable):
        got = "a tensor" if isinstance(tensors, Tensor) else type_name(tensors)
        raise TypeError(f"parameters must be an iterable of tensors or a module, got {got}")
    tensors = list(tensors)
    for x in tensors:
        if not isinstance(x, Tensor):
            raise TypeError(f"parameters must be tensors, got {type_name(x)}")
        if x.is_complex():
            raise TypeError(f"parameters must be real, got {x.dtype}")
        if hasattr(x, "full_tensor"):
            raise TypeError(
                "parameters must not be sharded, got one that FSDP shards; pass the outputs of the "
                'tapped layers, or a number instead of beta="auto"'
            )
    # A weight shared by two modules must count once.
    trainable = list({id(x): x for x in tensors if x.requires_grad}.values())
    if not trainable:
        raise ValueError("parameters must include one that requires a gradient, got none")
    task, transfer = (_gradients(loss, trainable) for loss in (task_loss, transfer_loss))
    pairs = [(a, b) for a, b in zip(task, transfer, strict=True) if not (a is None or b is None)]
    if not pairs:
        raise ValueError(
            "parameters must include one that both losses depend on, got none; pass the student's "
            "parameters, and losses from the same forward pass"
        )
    return [a for a, _ in pairs], [b for _, b in pairs]


def check_loss(name: str, loss: Tensor) -> None:
    """Raise an error unless the loss is a scalar with a graph."""
    check_tensor(name, loss)
    if loss.dim() or not loss.requires_grad:
        got = f"shape {tuple(loss.shape)}" if loss.dim() else "one without a graph"
        raise ValueError(f"{name} must be a scalar that requires a gradient, got {got}")


def _gradients(loss: Tensor, parameters: list[Tensor]) -> list[Tensor | None]:
    """Return dense gradients in float32 or float64; None for parameters outside the graph."""
    gradients: list[Tensor | None] = []
    for scale in SCALES:
        scaled = torch.autograd.grad(
            loss, parameters, torch.full_like(loss, scale), retain_graph=True, allow_unused=True
        )
        gradients = [None if g is None else _to_float32(g) / scale for g in scaled]
        if all(bool(g.isfinite().all()) for g in gradients if g is not None):
            break
    return gradients


def _to_float32(gradient: Tensor) -> Tensor:
    dense = gradient.to_dense() if gradient.is_sparse else gradient
    # float16 squares overflow from 256 on.
    return dense.to(torch.promote_types(dense.dtype, torch.float32))


def compare(task: Gradients, transfer: Gradients) -> GradientRatio:
    """Return the norms of two gradients of the same parameters, their ratio and cosine."""
    pairs = list(zip(task, transfer, strict=True))
    # Gathered on one device, to synchronise once.
    products = torch.stack([_products(a, b).to(task[0].device) for a, b in pairs]).cpu().double()
    # Squares in float32 are exact enough from 1e-38 to 3e38.
    in_range = (products[:, :2] > 1e-30).all(1) & (products[:, :2] < 1e38).all(1)
    for i in (~in_range).nonzero().flatten().tolist():
        products[i] = _products(*map(to_float64, pairs[i])).cpu()
    # A compiled network returns zeros for parameters that a loss does not depend on.
    nonzero = (products[:, :2] != 0).all(1)
    task_square, transfer_square, dot = products[nonzero if nonzero.any() else ...].sum(0).tolist()
    a, b = math.sqrt(task_square), math.sqrt(transfer_square)
    ratio = b / a if a else math.inf if b else math.nan
    return GradientRatio(a, b, ratio, dot / (a * b) if a * b else math.nan)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Return a.a, b.b and a.b."""
    a, b = a.flatten(), b.flatten()
    return torch.stack([a.dot(a), b.dot(b), a.dot(b)])


class AutoBeta:
    """Beta for a given ratio of the gradients, measured in the first AUTO_STEPS steps.

        beta = ratio / (geometric mean of the measured ratios at beta 1)

    Beta changes with each of these steps, and is fixed afterwards. Steps with a gradient of 0, inf
    or nan are skipped: a last layer initialised to zeros and float16 overflows cause them.
    """

    def __init__(self, log_ratios: Iterable[float] = (), ratio: float = AUTO_RATIO) -> None:
        self.log_ratios = [*log_ratios]
        self.ratio = ratio
        self._skipped_steps = 0

    @property
    def is_fixed(self) -> bool:
        """True after AUTO_STEPS measured steps."""
        return len(self.log_ratios) >= AUTO_STEPS

    @property
    def beta(self) -> float:
        """Beta from the steps measured so far; 0 before the first one."""
        if not self.log_ratios:
            return 0.0
        return self.ratio / math.exp(sum(self.log_ratios) / len(self.log_ratios))

    def add(self, ratio: float, student: nn.Module | None = None) -> None:
        """Add a step's ratio at beta 1, averaged over processes if the student is distributed."""
        is_valid = 0 < ratio < math.inf
        sums = torch.tensor([math.log(ratio) if is_valid else 0.0, is_valid], dtype=torch.float64)
        if parallel := find_ddp(student):
            group: Any = parallel.process_group
            sums = sums.to(next(parallel.parameters()).device)
            torch.distributed.all_reduce(sums, group=group)
        total, count = sums.tolist()
        if count:
            self.log_ratios.append(total / count)
            return
        self._skipped_steps += 1
        if self._skipped_steps >= AUTO_STEPS:
            raise ValueError(
                "beta: 'auto' needs steps in which no gradient is 0, inf or nan, got "
                f"{self._skipped_steps} other steps, the last with a ratio of {ratio}; set beta to "
                "a number"
            )
