"""The library ``torch.ops.at_fused``, and what the operators' autograd has in common.

``torch.library.register_autograd`` would do, at several times the time per call: it walks every
argument as a tree. The autograd functions of this package take their tensors flat instead, and are
registered under the key "Autograd". A graph that is being compiled or exported holds the operators
themselves; elsewhere the functions are called directly, which saves a way through the dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from at_fused.backends import eager

library = torch.library.Library("at_fused", "DEF")
operators = torch.ops.at_fused


def define(schema: str) -> None:
    """Define an operator; every device, and none, has its function in ``backends.eager``."""
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema[: schema.index("(")]
    library.impl(name, getattr(eager, name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"at_fused::{name}", getattr(eager, name), lib=library)


def entry(name: str, function: Callable[..., Any], *last: Any) -> Callable[..., Any]:
    """Register an operator's autograd; return what calls the operator, with ``last`` at the end.

    A graph that is being compiled or exported holds the operator itself.
    """
    library.impl(name, function, "Autograd")
    library.impl(name, function, "FuncTorchBatched")  # of a vmap in such a graph
    operator = getattr(operators, name).default

    def call(*arguments: Any) -> Any:
        return (operator if torch.compiler.is_compiling() else function)(*arguments, *last)

    return call


def transformed() -> bool:
    """Return True under forward-mode AD and the transforms of ``torch.func``.

    torch has their rules for its own operators alone: plain PyTorch runs there.
    """
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def below_autograd(operator: Any, *arguments: Any) -> Any:
    """Call an operator's kernel itself, not its autograd again."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Call ``function.apply``, quicker.

    ``Function.apply`` itself first looks for transforms of ``torch.func``, and binds the arguments
    to forward's signature for default values. There are none here.
    """
    plain: Any = super(torch.autograd.Function, function)
    return plain.apply(*arguments)


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """Save tensors for a backward pass: copies of those made under ``inference_mode``.

    torch saves none of these; a teacher's features, maps and masks often are.
    """
    ctx.save_for_backward(
        *(x.clone() if x is not None and x.is_inference() else x for x in tensors)
    )


def tracks(*groups: Sequence[Tensor | None]) -> bool:
    """Return True where autograd follows any of the tensors."""
    if torch.is_grad_enabled():
        for group in groups:
            for x in group:
                if x is not None and x.requires_grad:
                    return True
    return False
