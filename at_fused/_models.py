"""Networks of users: their modules by name, their arguments and outputs, passes without a trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Hook:
    """A hook of this package in a user's module."""

    # Only this owner's hooks act, in a pass that is not the user's; None: all do.
    acting: ClassVar[object] = None

    @property
    def __name__(self) -> str:
        # torch.jit.script asks a hook for its name, in order to compile it.
        raise AttributeError(
            "torch.jit.script cannot compile the hooks of AttentionTransfer: call at.remove() "
            "before, or script copy.deepcopy(network)"
        )


@contextmanager
def only_hooks_of(owner: object) -> Iterator[None]:
    """Let this owner's hooks act, and none of ours besides."""
    before, Hook.acting = Hook.acting, owner
    try:
        yield
    finally:
        Hook.acting = before


def unwrap(model: nn.Module) -> nn.Module:
    """Return the network itself, out of torch.compile and of torch's two for data parallelism."""
    parallel = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    inner = model.module if parallel else getattr(model, "_orig_mod", None)
    return unwrap(inner) if isinstance(inner, nn.Module) else model


def distributed(model: nn.Module | None) -> nn.parallel.DistributedDataParallel | None:
    """Return the DistributedDataParallel of a network, out of torch.compile, if it is in one."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model
    inner = getattr(model, "_orig_mod", None)
    return distributed(inner) if isinstance(inner, nn.Module) else None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Enter eval mode without gradients, and give each module its own mode back."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def arguments_of(batch: Any) -> Arguments:
    """Return a network's arguments: a mapping gives keyword arguments, a tuple positional ones."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (batch if isinstance(batch, tuple) else (batch,)), {}


def logits_of(output: Any) -> Tensor | None:
    """Find the logits in a network's output, as documented at ``teacher_output``."""
    if is_dataclass(output) and not isinstance(output, Mapping):
        output = {field.name: getattr(output, field.name) for field in fields(output)}
    mapping = isinstance(output, Mapping)
    for name in ("logits", "out"):
        found = output.get(name) if mapping else getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    several = list(tensors_in(output)) if mapping else [output]
    if isinstance(output, tuple):
        several = list(output[:1])
    return several[0] if len(several) == 1 and isinstance(several[0], Tensor) else None


def same_batch(a: Any, b: Any) -> bool:
    """Return True where both hold the same objects, if in other containers of these kinds."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same_batch(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)) and type(a) is type(b):
        return len(a) == len(b) and all(map(same_batch, a, b))
    return a is b


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, Mapping)):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(each)


def version_of(x: Tensor) -> int:
    """Return the number of changes in place, or -1 where nobody counts them."""
    return -1 if torch.compiler.is_compiling() or x.is_inference() else x._version


def precision(x: Tensor) -> str:
    """Name the dtype in which a network computes on x: autocast's where it is on, else x's."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return f"autocast {torch.get_autocast_dtype(device)}"
    return str(x.dtype)


def modules_named(model: nn.Module, names: Sequence[str], side: str = "") -> list[nn.Module]:
    """Return the modules of these names; a ValueError names the nearest to an unknown one."""
    whose = f"the {side} " if side else ""
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            known = [n for n in modules if n]
            near = get_close_matches(name, known, n=5, cutoff=0.4) or known[:5]
            raise ValueError(
                f"layers: {whose}{type(model).__name__} has no module {name!r}; "
                + (f"near: {', '.join(near)}; " if near else "")
                + f"all {len(known)} are in dict(model.named_modules())"
            )
    return [modules[name] for name in names]
