"""What a kernel cannot check for itself: the operators' arguments, as csrc/arguments.h has them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from at_fused.backends import eager

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f"at_fused: {message}")


require = _require


def check_dtypes(tensors: Sequence[Tensor], what: str, interpreted: bool) -> None:
    """Dtypes, and that all are on one device, which Triton can run on."""
    for x in tensors:
        _require(x.dtype in _DTYPES, f"{what} must be float16, bfloat16, float32 or float64")
        _require(x.device == tensors[0].device, f"all {what} must be on the same device")
        _require(
            x.is_cuda or interpreted,
            f"Triton runs {x.device.type} tensors under TRITON_INTERPRET=1 only",
        )


def check_features(features: Sequence[Tensor], interpreted: bool) -> None:
    """Shapes, dtypes, and that all are on one device, which Triton can run on."""
    for x in features:
        _require(x.dim() >= 3, "features must be (B, C, *spatial)")
        _require(x.numel() > 0, "features must not be empty")
        _require(x.dtype in _DTYPES, "features must be float16, bfloat16, float32 or float64")
        _require(x.device == features[0].device, "all features must be on the same device")
        _require(
            x.is_cuda or interpreted,
            f"Triton runs {x.device.type} tensors under TRITON_INTERPRET=1 only",
        )


def check_exponent(p: float) -> None:
    """P >= 1, and finite."""
    _require(1 <= p < math.inf, f"p must be a finite number >= 1, got {p}")


def check_collapse(collapse: str) -> None:
    """One of the two."""
    _require(collapse in ("mean", "sum"), f"collapse must be 'mean' or 'sum', got '{collapse}'")


def check_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weights: Sequence[float],
    p: float,
    collapse: str,
    form: str,
    reduction: str,
    eps: float,
) -> None:
    """The pairs of a loss and its options."""
    n = len(student)
    _require(
        n > 0 and len(teacher) == n,
        f"as many teachers as students, got {n} and {len(teacher)}",
    )
    _require(len(weights) in (0, n), f"a weight per pair, got {len(weights)} for {n}")
    _require(form in ("code", "paper"), f"form must be 'code' or 'paper', got '{form}'")
    _require(reduction in ("sum", "none"), f"reduction must be 'sum' or 'none', got '{reduction}'")
    _require(0 < eps < math.inf, f"eps must be a finite number > 0, got {eps}")
    check_collapse(collapse)
    check_exponent(p)
    for s, t in zip(student, teacher, strict=True):
        same = s.shape[0] == t.shape[0] and s[0, 0].numel() == t[0, 0].numel()
        _require(same, "student and teacher of a pair must have the same B and positions")


def check_loss_gradient(
    gradient: Tensor | None, pairs: Sequence[int], device: torch.device
) -> None:
    """Nothing, a scalar, or one value for each pair number."""
    if gradient is None:
        return
    _require(
        gradient.dim() <= 1 and gradient.device == device,
        "the loss gradient must be a scalar or a vector on the features' device",
    )
    _require(
        gradient.dtype in (torch.float32, torch.float64),
        "the loss gradient must be float32 or float64",
    )
    for pair in pairs:
        _require(
            gradient.dim() == 0 or 0 <= pair < gradient.numel(),
            f"pair number {pair} is out of range",
        )


def check_coefficients(
    features: Sequence[Tensor], coefficients: Sequence[Tensor], pairs: Sequence[int]
) -> None:
    """A map and a pair number for each feature."""
    _require(len(coefficients) == len(features), "a coefficient map per feature")
    _require(len(pairs) == len(features), "a pair number per feature")
    for x, k in zip(features, coefficients, strict=True):
        _require(
            k.shape == (x.shape[0], x[0, 0].numel())
            and k.device == x.device
            and k.dtype == eager.accumulate_dtype(x),
            "a coefficient map must be (B, N), float64 for float64 features and float32 otherwise",
        )
