"""Checks of arguments, whose errors name the argument, what was given, and what may be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from at_fused._numbers import as_python, check_finite, kind

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_choice(name: str, value: object, allowed: Sequence[str | None]) -> None:
    """Raises the ValueError that names the option, what was given, and what is allowed."""
    # An array would be compared element by element.
    if not isinstance(value, (str, type(None))) or value not in allowed:
        *most, last = map(repr, allowed)
        raise ValueError(f"{name} must be {', '.join(most)} or {last}, got {value!r}")


def pair_weights(weights: Sequence[float] | None, count: int | None) -> list[float]:
    """One number for each pair; none at all for ones. Of None pairs the number is not known yet."""
    if weights is None:
        return []
    given, weights = weights, as_python("weights", weights)
    if not isinstance(weights, (list, tuple)):
        raise TypeError(f"weights must be a list or tuple of numbers, got {kind(given)}")
    if count is not None and len(weights) != count:
        raise ValueError(
            f"weights must have one number per pair, got {len(weights)} for {count} pairs"
        )
    return [float(check_finite(f"weights[{i}]", weight)) for i, weight in enumerate(weights)]


def check_dense(name: str, x: object) -> Tensor:
    """Refuses what is no dense tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {kind(x)}")
    if x.layout is not torch.strided or x.is_nested:
        found = "a nested one" if x.is_nested else f"layout {x.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {found}")
    return x


def check_tensor(name: str, x: object) -> Tensor:
    """Refuses what is no dense floating-point tensor with elements."""
    x = check_dense(name, x)
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {x.dtype}")
    if 0 in x.shape:
        raise ValueError(f"{name} must not be empty, got shape {tuple(x.shape)}")
    return x


def savable(x: Tensor) -> Tensor:
    """The tensor, or a copy of one made under ``inference_mode``, which autograd does not save."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not x.is_inference():
        return x
    return x.clone()


def check_labels(labels: object, logits: Tensor, probabilities: bool = False) -> None:
    """Refuses what is no class number for each row of (B, K, *spatial) logits.

    With ``probabilities`` one for each class and row will do as well.
    """
    labels = check_dense("labels", labels)
    if not (probabilities and labels.dtype in DTYPES and labels.shape == logits.shape):
        if labels.dtype != torch.int64:
            soft = f", or class probabilities of the logits' shape, {tuple(logits.shape)}"
            raise TypeError(
                f"labels must be int64 (class numbers){soft if probabilities else ''}, "
                f"got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        rows = logits.shape[:1] + logits.shape[2:]
        if labels.shape != rows:
            raise ValueError(
                f"labels must be {'(B,)' if logits.dim() == 2 else '(B, *spatial)'}, "
                f"here {tuple(rows)}, got shape {tuple(labels.shape)}"
            )
    if labels.device != logits.device:
        raise ValueError(
            f"labels must be on the logits' device, {logits.device}, got {labels.device}"
        )


def named(name: str, given: object) -> dict[str, Any]:
    """Return what an argument holds, a tensor or a sequence of some, by its names in messages."""
    if not isinstance(given, (Tensor, list, tuple)):
        raise TypeError(f"{name} must be a tensor or a list or tuple of tensors, got {kind(given)}")
    if not isinstance(given, Tensor) and not given:
        raise ValueError(f"{name} must not be an empty {kind(given)}")
    if isinstance(given, Tensor):
        return {name: given}
    return {f"{name}[{i}]": x for i, x in enumerate(given)}


def check_pairs(
    names: tuple[str, str],
    first: Tensor | Sequence[Tensor],
    second: Tensor | Sequence[Tensor],
    rank: int = 2,
) -> tuple[list[Tensor], list[Tensor]]:
    """Two tensors, or two sequences of them, as lists of equal shapes, of one B and one device."""
    if isinstance(first, Tensor) != isinstance(second, Tensor):
        raise TypeError(
            f"{names[0]} and {names[1]} must both be tensors or both be sequences, "
            f"got {kind(first)} and {kind(second)}"
        )
    lists = []
    for name, given in zip(names, (first, second), strict=True):
        several = named(name, given)
        for own, x in several.items():
            if check_tensor(own, x).dim() < rank:
                raise ValueError(f"{own} must have a batch dimension, got shape {tuple(x.shape)}")
        lists.append(list(several.values()))
    if len(lists[0]) != len(lists[1]):
        raise ValueError(
            f"{names[0]} and {names[1]} must have the same number of tensors, "
            f"got {len(lists[0])} and {len(lists[1])}"
        )
    batch, device = lists[0][0].shape[0], lists[0][0].device
    for i, (a, b) in enumerate(zip(*lists, strict=True)):
        if a.shape != b.shape:
            raise ValueError(
                f"{names[0]} and {names[1]} of pair {i} must have the same shape, "
                f"got {tuple(a.shape)} and {tuple(b.shape)}"
            )
        if a.shape[0] != batch:
            raise ValueError(
                f"all pairs must have the same batch size, got {batch} and {a.shape[0]} (pair {i})"
            )
        if a.device != device or b.device != device:
            raise ValueError(
                f"all tensors must be on one device, got {device}, and {a.device} and {b.device} "
                f"for pair {i}"
            )
    return lists[0], lists[1]
