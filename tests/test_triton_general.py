"""The Triton back end beyond the plain options: a loss of maps, max, signed powers, pooling."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_triton import DEVICE, assert_near
from torch import Tensor

from at_fused.backends import eager
from at_fused.backends import triton as backend
from at_fused.backends.triton import launch

# ---- a loss of maps ------------------------------------------------------------------------------


def maps(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64).to(DEVICE, dtype)


def assert_map_loss(
    student: list[Tensor],
    teacher: list[Tensor],
    weights: list[float],
    *options: Any,
    sides: tuple[bool, bool] = (True, True),
) -> None:
    before = [q.clone() for q in (*student, *teacher)]
    loss, found = backend.map_loss(student, teacher, weights, *options, *sides)
    right_loss, right = eager.map_loss(student, teacher, weights, *options, *sides)
    assert_near([loss, *found], [right_loss, *right])
    for a, b in zip((*student, *teacher), before, strict=True):
        assert a.equal(b) or a.isnan().any()
    again = backend.map_loss(student, teacher, weights, *options, *sides)
    assert loss.equal(again[0])
    assert all(a.equal(b) for a, b in zip(found, again[1], strict=True))
    assert all(not counters.any() for counters in launch._workspaces.values())


@pytest.mark.parametrize("reduction", ["sum", "none", "sample"])
@pytest.mark.parametrize("eps_mode", ["max", "add"])
@pytest.mark.parametrize("form", ["code", "paper"])
def test_map_loss(
    form: str, eps_mode: str, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = [maps(3, 37), maps(3, 700), maps(3, 5, dtype=torch.float64), maps(3, 8)]
    teacher = [maps(3, 37), maps(3, 700), maps(3, 5), maps(3, 16)[:, ::2]]
    student[0][1] = 0  # a zero map
    teacher[1][0] *= 1e-4  # a norm below eps
    teacher[3][2] = student[3][2]
    weights = [1.0, -2.0, 0.25, 3.0]
    options = form, reduction, eps_mode
    assert_map_loss(student, teacher, weights, *options, 0.05)
    if reduction != "sample":
        student[0], teacher[0] = maps(2, 9), maps(2, 9)
    monkeypatch.setattr(launch, "MAX_ENTRIES", 3)
    assert_map_loss(student, teacher, [], *options, 1e-6, sides=(False, True))
    assert_map_loss(student, teacher, weights, *options, 1e-6, sides=(True, False))
    assert_map_loss(student, teacher, weights, *options, 1e-6, sides=(False, False))


@pytest.mark.parametrize("eps_mode", ["max", "add"])
@pytest.mark.parametrize("form", ["code", "paper"])
def test_map_loss_of_extreme_maps(form: str, eps_mode: str) -> None:
    zero, q = torch.zeros(2, 6, device=DEVICE), maps(2, 6)
    for s, t in ((zero, zero), (q, q), (1e18 * q, 1e-18 * maps(2, 6))):
        assert_map_loss([s], [t], [], form, "sum", eps_mode, 1e-12)
    # The other side's gradient is along itself, which is projected out: rounding is left.
    assert_map_loss([zero], [q], [], form, "sum", eps_mode, 1e-12, sides=(True, False))
    loss, gradients = backend.map_loss([q], [q], [], form, "none", eps_mode, 1e-12, True, True)
    assert loss.item() == 0
    assert not any(k.any() for k in gradients)
    q[0, 1] = math.nan
    loss, gradients = backend.map_loss(
        [q], [maps(2, 6)], [], form, "sample", eps_mode, 1e-12, True, True
    )
    assert loss[0, 0].isnan()
    assert loss[0, 1].isfinite()
    assert all(k[0].isnan().all() and k[1].isfinite().all() for k in gradients)


def test_map_loss_checks_its_arguments() -> None:
    def fails(match: str, student: Any = None, teacher: Any = None, **changed: Any) -> None:
        options: dict[str, Any] = {
            "weights": [],
            "form": "code",
            "reduction": "sum",
            "eps_mode": "max",
            "eps": 1e-12,
        } | changed
        q = [maps(2, 3)]
        with pytest.raises(RuntimeError, match=f"at_fused: {match}"):
            backend.map_loss(student or q, teacher or q, *options.values(), True, True)

    fails("as many teachers as students", [maps(2, 3)] * 2)
    fails("a weight per pair", weights=[1.0, 2.0])
    fails("form must be", form="letter")
    fails("reduction must be 'sum', 'none' or 'sample', got 'mean'", reduction="mean")
    fails("eps_mode must be 'max' or 'add', got 'min'", eps_mode="min")
    for eps in (0.0, math.inf, math.nan):
        fails("eps must be", eps=eps)
    for other in (maps(2, 4), maps(3, 3), maps(6), maps(2, 3).half(), maps(2, 0)):
        fails(r"maps must be \(B, N\)", teacher=[other])
    pairs = [maps(2, 3), maps(3, 3)]
    fails("a loss for each sample needs pairs of one batch", pairs, pairs, reduction="sample")
