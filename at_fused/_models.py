"""Access to a user's network: modules by name, arguments, outputs, eval mode, precision."""

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
    """A hook of this package on a user's module."""

    # The owner of the only hooks that act in this pass; None if all act.
    acting: ClassVar[object] = None

    @property
    def __name__(self) -> str:
        # torch.jit.script reads a hook's name in order to compile it.
        raise AttributeError(
            "torch.jit.script cannot compile the hooks of AttentionTransfer: call at.remove() "
            "before, or script copy.deepcopy(network)"
        )


@contextmanager
def only_hooks_of(owner: object) -> Iterator[None]:
    """Disable all hooks of this package except this owner's."""
    before, Hook.acting = Hook.acting, owner
    try:
        yield
    finally:
        Hook.acting = before


def unwrap(model: nn.Module) -> nn.Module:
    """Return the network inside torch.compile, DataParallel and DistributedDataParallel."""
    parallel = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    inner = model.module if parallel else getattr(model, "_orig_mod", None)
    return unwrap(inner) if isinstance(inner, nn.Module) else model


def find_ddp(model: nn.Module | None) -> nn.parallel.DistributedDataParallel | None:
    """Return the network's DistributedDataParallel, also inside torch.compile, or None."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model
    inner = getattr(model, "_orig_mod", None)
    return find_ddp(inner) if isinstance(inner, nn.Module) else None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Enter eval mode without gradients, and restore each module's mode on exit."""
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
    """Return a network's arguments: keyword ones from a mapping, positional ones otherwise."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (batch if isinstance(batch, tuple) else (batch,)), {}


def logits_of(output: Any) -> Tensor | None:
    """Return the logits in a network's output, as documented at ``teacher_output``."""
    if is_dataclass(output) and not isinstance(output, Mapping):
        output = {field.name: getattr(output, field.name) for field in fields(output)}
    is_mapping = isinstance(output, Mapping)
    for name in ("logits", "out"):
        logits = output.get(name) if is_mapping else getattr(output, name, None)
        if isinstance(logits, Tensor):
            return logits
    candidates = list(tensors_in(output)) if is_mapping else [output]
    if isinstance(output, tuple):
        candidates = list(output[:1])
    return candidates[0] if len(candidates) == 1 and isinstance(candidates[0], Tensor) else None


def same_batch(a: Any, b: Any) -> bool:
    """Return True if both hold the same objects; their containers may be copies."""
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
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)


def version_of(x: Tensor) -> int:
    """Return the number of changes in place, or -1 if torch does not count them."""
    return -1 if torch.compiler.is_compiling() or x.is_inference() else x._version


def precision(x: Tensor) -> str:
    """Return the name of the dtype that a network computes x in: autocast's, or else x's."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return f"autocast {torch.get_autocast_dtype(device)}"
    return str(x.dtype)


def modules_named(model: nn.Module, names: Sequence[str], side: str = "") -> list[nn.Module]:
    """Return the modules with these names; raise a ValueError that suggests names."""
    owner = f"the {side} " if side else ""
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            known = [n for n in modules if n]
            near = get_close_matches(name, known, n=5, cutoff=0.4) or known[:5]
            raise ValueError(
                f"layers: {owner}{type(model).__name__} has no module {name!r}; "
                + (f"some of its modules: {', '.join(near)}; " if near else "")
                + f"model.named_modules() lists all {len(known)}"
            )
    return [modules[name] for name in names]
