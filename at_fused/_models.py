"""Networks from outside: their modules by name, and a pass that leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn


def unwrap(model: nn.Module) -> nn.Module:
    """The network itself, out of torch.compile, DataParallel and DistributedDataParallel."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        inner = model.module if isinstance(model, parallel) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, without gradients; each module gets its own mode back, whatever happens."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def arguments_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a network: a mapping gives keyword arguments, a tuple positional ones."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (batch if isinstance(batch, tuple) else (batch,)), {}


def logits_of(output: Any) -> Tensor | None:
    """Find the logits in what a network returned; None where it does not say which they are.

    A tensor itself; the field ``logits``, or ``out`` (torchvision's of segmentation); else the
    first of a tuple, the only tensor of a mapping or a dataclass.
    """
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
    """Return True where both hold the same objects, in tuples, lists or mappings of their own."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same_batch(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)) and type(a) is type(b):
        return len(a) == len(b) and all(map(same_batch, a, b))
    return a is b


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of nested tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, Mapping)):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(each)


def precision(x: Tensor) -> str:
    """What a network computes in that takes x now: autocast's dtype where it is on, else x's."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return f"autocast {torch.get_autocast_dtype(device)}"
    return str(x.dtype)


def refuse_torchscript(model: nn.Module, names: Sequence[str] | None, side: str) -> None:
    """Raise a TypeError for layers of TorchScript, which takes no hooks; names None are all."""
    for name, module in model.named_modules():
        named = not name or names is None or name in names
        if named and isinstance(module, torch.jit.ScriptModule):
            whose, instead = (
                (f"{side}'s layer {name!r}", ", or name other layers") if name else (side, "")
            )
            raise TypeError(
                f"{whose} is a TorchScript module, which takes no hooks; give the nn.Module that "
                f"it was made of{instead}"
            )


def modules_named(model: nn.Module, names: Sequence[str], side: str = "") -> list[nn.Module]:
    """The modules of these names; a ValueError with the nearest for one that is not there."""
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
