"""The Triton back end beyond the plain options: maps, their maxima, and a loss of maps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from reference import loss_arguments
from test_triton import DEVICE, DTYPES, LAYOUTS, assert_near, features
from torch import Tensor

from at_fused.backends import eager
from at_fused.backends import triton as backend
from at_fused.backends.triton import launch


def long(*parameters: Any) -> list[Any]:
    """Those of a parametrised test that only the long run has."""
    return [pytest.param(parameter, marks=pytest.mark.long) for parameter in parameters]


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


@pytest.mark.parametrize(
    "options",
    [
        ("code", "sum", "max"),
        ("paper", "none", "add"),
        ("code", "sample", "add"),
        *long(("code", "none", "max"), ("code", "sum", "add")),
        *long(("paper", "sum", "add"), ("paper", "sample", "max")),
    ],
    ids="-".join,
)
def test_map_loss(options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    student = [maps(3, 37), maps(3, 700), maps(3, 5, dtype=torch.float64), maps(3, 8)]
    teacher = [maps(3, 37), maps(3, 700), maps(3, 5), maps(3, 16)[:, ::2]]
    student[0][1] = 0  # a zero map
    teacher[1][0] *= 1e-4  # a norm below eps
    teacher[3][2] = student[3][2]
    weights = [1.0, -2.0, 0.25, 3.0]
    assert_map_loss(student, teacher, weights, *options, 0.05)
    if "sample" not in options:
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


# ---- maps ----------------------------------------------------------------------------------------


def assert_matches_eager(xs: list[Tensor], p: float, collapse: str) -> None:
    """Maps, and the gradients of random coefficients, without and with a loss gradient."""
    n = len(xs)
    found, right = backend.attention_map(xs, p, collapse), eager.attention_map(xs, p, collapse)
    assert_near(found[:n], right[:n])
    channels = right[n:]
    assert all(a.equal(b) for a, b in zip(found[n:], channels, strict=True))
    coefficients = [torch.randn_like(q) for q in right[:n]]
    pairs = [i % 2 for i in range(n)]
    for gradient in (None, torch.tensor(-0.5), torch.tensor([2.0, 0.25]).double()):
        g = None if gradient is None else gradient.to(DEVICE)
        swept = xs, coefficients, g, pairs, p, [], channels
        again = backend.attention_map_backward(*swept)
        assert_near(again, eager.attention_map_backward(*swept))
    if channels:
        for x, q in zip(again, channels, strict=True):
            assert (x.flatten(2) != 0).sum(1).le(1).all()
            assert q.dtype == torch.int32


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [1.0, 2.0, *long(3.0, 2.5)])
def test_max(p: float, dtype: torch.dtype, layout: str) -> None:
    assert_matches_eager([features(2, 75, 7, 5, layout=layout, dtype=dtype)], p, "max")


def test_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MAX_ENTRIES", 3)
    xs = [
        features(2, 40, 9, 7),
        features(3, 5, 6, layout="interleaved", dtype=torch.float16),
        features(4, 3, 2, 3, 4).transpose(2, 4)[..., 1:],
        features(2, 8, 16, 16)[:, 1:7, ::2],
        features(1, 1, 2, 2, dtype=torch.float64),
    ]
    for p, collapse in ((2.0, "max"), (1.0, "max"), (3.0, "sum")):
        assert_matches_eager(xs, p, collapse)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_ties_and_specials(dtype: torch.dtype, layout: str) -> None:
    x = torch.zeros(1, 200, 8, dtype=dtype, device=DEVICE)
    x[0, 70, 1], x[0, 199, 1] = -2, 2  # a tie of two signs
    x[0, 3, 2], x[0, 130, 2], x[0, 190, 2] = math.inf, -math.nan, math.nan
    x[0, 5, 3], x[0, 4, 3] = math.inf, -math.inf
    x[0, :, 4] = -1
    x[0, 199, 5] = torch.finfo(dtype).smallest_normal
    x[0, 150, 6] = -0.0
    x[0, 64:, 7] = 3
    if layout == "interleaved":
        x = x.mT.contiguous().mT
    q, channel = backend.attention_map([x], 1.0, "max")
    assert channel.tolist() == [[0, 70, 130, 4, 0, 199, 0, 64]]
    torch.testing.assert_close(q, eager.attention_map([x], 1.0, "max")[0], equal_nan=True)
    swept = [x], [torch.ones_like(q)], None, [0], 2.0, [], [channel]
    found, right = backend.attention_map_backward(*swept), eager.attention_map_backward(*swept)
    torch.testing.assert_close(found, right, equal_nan=True)
    # What did not win has no gradient, whatever its coefficient.
    swept = [x], [q * math.nan], None, [0], 2.0, [], [channel]
    (found,) = backend.attention_map_backward(*swept)
    assert (found.isnan().sum(1) == 1).all()
    assert (found != 0).sum() == found.isnan().sum()


def test_powers_near_the_largest_number_have_one_winner() -> None:
    x = torch.tensor([1e30, -2e30, 3e30], device=DEVICE).view(1, 3, 1)
    q, channel = backend.attention_map([x], 4.0, "max")
    assert q.item() == math.inf
    assert channel.item() == 2


def test_maps_check_their_arguments() -> None:
    x, k = features(2, 3, 4), torch.ones(2, 4, device=DEVICE)
    q = torch.zeros(2, 4, dtype=torch.int32, device=DEVICE)
    with pytest.raises(RuntimeError, match="collapse must be 'mean', 'sum' or 'max', got 'min'"):
        backend.attention_map([x], 2.0, "min")
    for match, channels in {
        "a map of channels per feature": [q, q],
        r"a map of channels must be \(B, N\) of int32": [q.long()],
        r"a map of channels must be \(B, N\)": [q[:, :3]],
    }.items():
        with pytest.raises(RuntimeError, match=f"at_fused: {match}"):
            backend.attention_map_backward([x], [k], None, [0], 2.0, [], channels)
    with pytest.raises(RuntimeError, match="a coefficient map must be"):
        backend.attention_map_backward([x], [k[:, :3]], None, [0], 2.0)
    # Channels that there are not are nobody's.
    q += torch.tensor([0, 1, 3, -5], device=DEVICE)
    (found,) = backend.attention_map_backward([x], [k], None, [0], 2.0, [], [q])
    assert (found != 0).sum(1).tolist() == [[1, 1, 0, 0]] * 2
    with pytest.raises(RuntimeError, match="collapse must be 'mean' or 'sum' here"):
        backend.at_loss(*loss_arguments([x], [x], collapse="max"), False, False)


def test_samples_cut_into_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_PIECE_BYTES", 4096)
    monkeypatch.setattr(launch, "processors", lambda _: 10**6)
    for collapse in ("mean", "max"):
        assert_matches_eager([features(1, 5, 30, 31)], 2.0, collapse)


@pytest.mark.parametrize("order", LAYOUTS)
def test_offsets_beyond_31_bits(order: str) -> None:
    # Lines of a sample 2^32 bytes apart; what is between them is never touched.
    far = 2**31 + 16
    memory = torch.empty(far + 64, dtype=torch.bfloat16, device=DEVICE)
    x = memory.as_strided((1, 2, 2), (0, far, 1) if order == "planar" else (0, 1, far))
    x.copy_(features(1, 2, 2))
    assert_matches_eager([x], 2.0, "max")
