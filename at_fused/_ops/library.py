"""The library ``torch.ops.at_fused``, and helpers for the operators' autograd.

``torch.library.register_autograd`` would take several times as long per call: it walks every
argument as a pytree. The autograd functions of this package take a flat list of tensors instead,
and are registered under the dispatch key "Autograd". In eager mode they are called directly, which
saves a pass through the dispatcher. Compiled and exported graphs hold the operators themselves.
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
    """Define an operator; ``backends.eager`` is its kernel for all devices and its fake kernel."""
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema[: schema.index("(")]
    library.impl(name, getattr(eager, name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"at_fused::{name}", getattr(eager, name), lib=library)


def register_autograd(name: str, function: Callable[..., Any], *last: Any) -> Callable[..., Any]:
    """Register an operator's autograd; return a function that calls it with ``last`` appended."""
    library.impl(name, function, "Autograd")
    library.impl(name, function, "FuncTorchBatched")  # for a vmap in a compiled graph
    operator = getattr(operators, name).default

    def call(*arguments: Any) -> Any:
        return (operator if torch.compiler.is_compiling() else function)(*arguments, *last)

    return call


def is_transformed() -> bool:
    """Return True under forward-mode AD and the transforms of ``torch.func``.

    torch has rules for its own operators only, so plain PyTorch runs there.
    """
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def call_below_autograd(operator: Any, *arguments: Any) -> Any:
    """Call an operator's kernel, without its autograd."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Call ``function.apply`` with less overhead.

    ``Function.apply`` checks for transforms of ``torch.func`` and binds the arguments to the
    signature of ``forward``. Here no transform is active and no argument has a default.
    """
    base: Any = super(torch.autograd.Function, function)
    return base.apply(*arguments)


def save_for_backward(ctx: Any, *tensors: Tensor | None) -> None:
    """Save tensors for the backward pass; inference tensors, which torch refuses, as copies.

    A teacher's features, maps and masks are often inference tensors.
    """
    ctx.save_for_backward(
        *(x.clone() if x is not None and x.is_inference() else x for x in tensors)
    )


def needs_graph(*groups: Sequence[Tensor | None]) -> bool:
    """Return True if autograd records an operation on these tensors."""
    if torch.is_grad_enabled():
        for group in groups:
            for x in group:
                if x is not None and x.requires_grad:
                    return True
    return False
