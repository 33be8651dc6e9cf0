"""The library ``torch.ops.at_fused``, and what the operators' autograd has in common.

``torch.library.register_autograd`` would do, at twice the time per call: it walks every argument as
a tree. The autograd functions of this package take their tensors flat instead, and are registered
under the key "Autograd". A graph that is being compiled or exported holds the operators themselves;
elsewhere the functions are called directly: it saves a way through the dispatcher, and torch.func
sees an autograd.Function only where it is applied above the dispatcher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from at_fused.backends import eager

library = torch.library.Library("at_fused", "DEF")
operators = torch.ops.at_fused


def define(schema: str) -> None:
    """Defines an operator; every device has the function of that name in ``backends.eager``."""
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema[: schema.index("(")]
    library.impl(name, getattr(eager, name), "CompositeExplicitAutograd")


def check_one_device(*groups: Sequence[Tensor | None]) -> None:
    """For fake kernels, which run wherever one tensor of a call is without data."""
    devices = {x.device for group in groups for x in group if x is not None}
    if len(devices) > 1:
        found = " and ".join(sorted(map(str, devices)))
        raise RuntimeError(f"at_fused: all tensors must be on one device, got {found}")


def differentiate(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    create_graph: bool,
) -> list[Tensor | None]:
    """Vector-Jacobian products; None where an input has no part in an output with a gradient."""
    known = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None]
    known = [(o, g) for o, g in known if o.requires_grad]
    if not known or not inputs:
        return [None] * len(inputs)
    return list(
        torch.autograd.grad(
            [o for o, _ in known],
            inputs,
            [g for _, g in known],
            create_graph=create_graph,
            allow_unused=True,
        )
    )


def below_autograd(operator: Any, *arguments: Any) -> Any:
    """Calls an operator's kernel itself, not its autograd again."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply``, quicker."""
    if torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    # Function.apply itself first binds the arguments to forward's signature, for default values;
    # there are none here, and that costs more than all the rest of a small call.
    plain: Any = super(torch.autograd.Function, function)
    return plain.apply(*arguments)


def tracks(*groups: Sequence[Tensor | None]) -> bool:
    """Whether autograd follows any of the tensors."""
    return torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for group in groups for x in group
    )
