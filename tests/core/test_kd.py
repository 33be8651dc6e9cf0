"""Hinton's loss against the formula in float64, and other programs'. More: test_properties.py."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain_losses import DTYPES, gradient_tolerance, leaves_and_doubles
from torch import Tensor

import at_fused
from at_fused import kd_loss


def reference(
    s: Tensor,
    t: Tensor,
    labels: Tensor | None,
    T: float = 4.0,
    alpha: float = 0.9,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """The loss as people write it; positions of images are rows of a batch."""
    log_p, log_q = F.log_softmax(s / T, 1), F.log_softmax(t / T, 1)
    kl = F.kl_div(log_p, log_q, log_target=True, reduction="sum") / (s.numel() / s.shape[1])
    loss = alpha * T * T * kl
    if labels is None or alpha == 1:
        return loss
    ce = F.cross_entropy(s, labels, label_smoothing=label_smoothing, ignore_index=ignore_index)
    return ce if alpha == 0 else loss + (1 - alpha) * ce


def assert_matches(
    s: Tensor, t: Tensor, labels: Tensor | None = None, *, scale: float = 1.0, **options: Any
) -> None:
    (s, t), doubles = leaves_and_doubles(s, t)
    loss = kd_loss(s, t, labels, **options)
    right = reference(*doubles, labels, **options)
    fp64 = torch.float64 in (s.dtype, t.dtype)
    assert loss.dtype == (torch.float64 if fp64 else torch.float32)
    rounding = 2**-53 if fp64 else 2**-24
    T = options.get("T", 4.0)
    torch.testing.assert_close(
        loss.double(), right, rtol=16 * rounding, atol=2 * rounding * T * T, equal_nan=True
    )
    found = torch.autograd.grad(loss * scale, (s, t), allow_unused=True)
    expected = torch.autograd.grad(right * scale, doubles, allow_unused=True)
    for x, g, r in zip((s, t), found, expected, strict=True):
        if g is None:  # the term with the teacher is left out
            assert r is None or not r.any()
            continue
        assert g.dtype == x.dtype
        rows = x.numel() / x.shape[1]
        tolerance = max(gradient_tolerance(g.dtype, 1e-5), 16 * rounding)
        least = 16 * rounding * T / rows * scale + (2**-24 if g.dtype == torch.float16 else 1e-12)
        assert (g.double() - r).abs().max() <= tolerance * r.abs().max() + least


def logits(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(*shape, dtype=torch.float64)).to(dtype)


# ---- values and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_classes(dtype: torch.dtype) -> None:
    """Where fp16's gradients would vanish but for a loss scale, which comes from above."""
    s, t = logits(2, 21841, dtype=dtype), logits(2, 21841)
    assert_matches(s, t, torch.tensor([21840, 0]), label_smoothing=0.1, scale=2.0**14)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("T", [0.5, 1.0, 20.0])
def test_options(alpha: float, T: float) -> None:
    s, t = logits(6, 11), logits(6, 11)
    labels = torch.tensor([3, 0, 10, 5, 3, 7])
    for options in ({}, {"ignore_index": 3}, {"label_smoothing": 0.3, "ignore_index": 10}):
        assert_matches(s, t, labels, T=T, alpha=alpha, **options)


def test_all_labels_ignored() -> None:
    """The entropy is NaN, as F.cross_entropy; the gradient is that of the divergence."""
    s, t = logits(3, 5).requires_grad_(), logits(3, 5)
    (only_kl,) = torch.autograd.grad(reference(s.double(), t.double(), None), s)
    for smoothing in (0.0, 0.1):
        loss = kd_loss(s, t, torch.full((3,), -100), label_smoothing=smoothing)
        assert loss.isnan()
        torch.testing.assert_close(torch.autograd.grad(loss, s)[0], only_kl)


def test_equal_logits_are_exactly_0() -> None:
    for T in (1e-3, 1.0, 1e6):
        for size in (1e-3, 1.0, 1e4):
            s = (torch.randn(4, 33) * size).requires_grad_()
            t = s.detach().clone().requires_grad_()
            loss = kd_loss(s, t, T=T, alpha=1.0)
            assert loss.item() == 0
            for g in torch.autograd.grad(loss, (s, t)):
                assert g.abs().max() <= 2**-22 * T / 4


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (3, 4, 7), (2, 3, 2, 3, 2)], ids=str)
def test_images_are_rows(shape: tuple[int, ...]) -> None:
    """Segmentation: the mean of both terms is over samples and positions."""
    s, t = logits(*shape), logits(*shape, dtype=torch.float16)
    labels = torch.randint(shape[1], (shape[0], *shape[2:]))
    labels[0, 0] = -100
    assert_matches(s, t, labels, T=3.0, alpha=0.4, label_smoothing=0.1)
    assert_matches(s, t)
    last = s.movedim(1, -1).contiguous().movedim(-1, 1)
    assert_matches(last, t, labels)


@pytest.mark.parametrize("shape", [(4, 6), (2, 6, 3, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_class_probabilities(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """What mixup and CutMix make of labels."""
    s, t = logits(*shape), logits(*shape)
    mixed = logits(*shape).softmax(1).to(dtype)
    for smoothing in (0.0, 0.2):
        for alpha in (0.0, 0.4):
            assert_matches(s, t, mixed.double(), alpha=alpha, label_smoothing=smoothing)
            found = kd_loss(s, t, mixed, alpha=alpha, label_smoothing=smoothing)
            right = reference(s, t, mixed.float(), alpha=alpha, label_smoothing=smoothing)
            torch.testing.assert_close(found, right)
    mixed.requires_grad_()
    (g,) = torch.autograd.grad(kd_loss(s, t, mixed, alpha=0.5), mixed)
    assert g.any()


def test_a_term_without_weight_is_left_out() -> None:
    labels = torch.tensor([1, 2])
    s = torch.tensor([[torch.nan, 0.0, 0.0], [1.0, 2.0, 3.0]])
    assert kd_loss(logits(2, 3), s, labels, alpha=0.0).isfinite()
    assert kd_loss(logits(2, 3), logits(2, 3), torch.full((2,), -100), alpha=1.0).isfinite()
    s = logits(2, 3).requires_grad_()
    loss = kd_loss(s, logits(2, 3), alpha=0.0)
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, s)[0].any()


# ---- rounding ------------------------------------------------------------------------------------


def cases() -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)

    def draw() -> Tensor:
        return torch.randn(6, generator=generator)

    found = {}
    for size in (1e-3, 1.0, 30.0, 4000.0):
        base = draw() * size
        found[f"logits of {size:g}"] = draw() * size, base
        found[f"near each other, {size:g}"] = base, base + draw() * size * 1e-3
        found[f"apart by a constant, {size:g}"] = base, base + draw() * 1e-3 + 1000.0
    sure = torch.full((6,), -20.0)
    sure[2] = 5.0
    found["both sure"] = sure, sure * 1.1
    found["a sure teacher"] = draw() * 0.1, sure
    found["a sure student"] = sure, draw() * 0.1
    found["sure of something else"] = sure, sure.roll(1)
    found["the ends"] = torch.tensor([1e4, -1e4, 0.0, 1.0]), torch.tensor([-1e4, 1e4, 0.5, 0.0])
    return found


@pytest.mark.parametrize("T", [1e-3, 0.1, 1.0, 4.0, 20.0, 100.0, 1e4, 1e6])
def test_the_bounds_of_rounding(T: float) -> None:
    """Those of docs/numerics.md: of the loss, and of the gradients."""
    for name, sides in cases().items():
        x, y = (side[None].requires_grad_() for side in sides)
        u, v = (side[None].double().requires_grad_() for side in sides)
        loss, right = kd_loss(x, y, T=T, alpha=1.0), reference(u, v, None, T, alpha=1.0)
        size = float(torch.stack(sides).abs().max())
        error = 1e-6 * right + 2e-7 * T * T + 2e-7 * T * size
        assert (loss - right).abs() <= error, (T, name, loss, right)
        gradients = torch.autograd.grad(loss, (x, y)), torch.autograd.grad(right, (u, v))
        for g, r in zip(*gradients, strict=True):
            bound = 1e-6 * r.abs().max() + 1e-6 * (T + size)
            assert (g.double() - r).abs().max() <= bound, (T, name, g, r)


@pytest.mark.parametrize("classes", [10, 1000])
@pytest.mark.parametrize("size", [1.0, 10.0])
def test_a_batch_is_right_to_1e_5_up_to_a_temperature_of_20(classes: int, size: float) -> None:
    s, t = size * torch.randn(128, classes), size * torch.randn(128, classes)
    for T in (0.5, 1.0, 4.0, 20.0):
        right = reference(s.double(), t.double(), None, T=T)
        torch.testing.assert_close(kd_loss(s, t, T=T).double(), right, rtol=1e-5, atol=0)


@pytest.mark.parametrize("T", [5e-324, 1e-5, 1e30, 1.7e308])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_finite_for_any_temperature(T: float, dtype: torch.dtype) -> None:
    s = torch.tensor([[1e4, -1e4, 0.0, 1.0], [1e4, 1e4, -1e4, 9e3]], dtype=dtype)
    x, y = s.requires_grad_(), s.detach().roll(1, 1).requires_grad_()
    loss = kd_loss(x, y, torch.tensor([1, 3]), T=T)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (x, y)))


@pytest.mark.parametrize("T", [0.5, 4.0])
def test_masked_classes(T: float) -> None:
    """Classes that the teacher excludes, that both exclude, that only the student excludes."""
    s, t = logits(3, 9), logits(3, 9)
    t[:, 2] = s[:, 5] = t[:, 5] = -torch.inf
    x, y = s.clone().requires_grad_(), t.clone().requires_grad_()
    loss = kd_loss(x, y, T=T, alpha=1.0)
    u, v = s.double().requires_grad_(), t.double().requires_grad_()
    log_p, log_q = F.log_softmax(u / T, 1), F.log_softmax(v / T, 1)
    known = log_q > -torch.inf
    terms = torch.where(known, log_q.exp() * torch.where(known, log_q - log_p, 0.0), 0.0)
    right = T * T * terms.sum() / 3
    torch.testing.assert_close(loss.double(), right, rtol=1e-5, atol=0)
    gradients = torch.autograd.grad(loss, (x, y)), torch.autograd.grad(right, (u, v))
    for g, r in zip(*gradients, strict=True):
        torch.testing.assert_close(g.double(), r.nan_to_num(), rtol=1e-5, atol=1e-6)
    s[0, 4] = -torch.inf
    assert kd_loss(s, t, T=T).item() == torch.inf


# ---- other programs ------------------------------------------------------------------------------


def softened(s: Tensor, t: Tensor, T: float, reduction: str) -> Tensor:
    return F.kl_div(F.log_softmax(s / T, 1), F.softmax(t / T, 1), reduction=reduction) * T**2


def authors(s: Tensor, t: Tensor, y: Tensor, T: float, alpha: float) -> Tensor:
    return softened(s, t, T, "sum") / len(s) * alpha + F.cross_entropy(s, y) * (1.0 - alpha)


def authors_first(s: Tensor, t: Tensor, y: Tensor, T: float, alpha: float) -> Tensor:
    soft = softened(s, t, T, "none").mean() * 2.0
    return soft * alpha + F.cross_entropy(s, y) * (1.0 - alpha)


def repdistiller(s: Tensor, t: Tensor, y: Tensor, T: float, alpha: float, gamma: float) -> Tensor:
    return gamma * F.cross_entropy(s, y) + alpha * softened(s, t, T, "sum") / len(s)


def mdistiller(
    s: Tensor, t: Tensor, y: Tensor, T: float, kd_weight: float, ce_weight: float
) -> Tensor:
    return ce_weight * F.cross_entropy(s, y) + kd_weight * softened(s, t, T, "none").sum(1).mean()


def torchdistill(s: Tensor, t: Tensor, y: Tensor, T: float, alpha: float) -> Tensor:
    from torchdistill.losses.mid_level import KDLoss  # here: a GPU's tests do without

    loss = KDLoss("logits", "output", "logits", "output", temperature=T, alpha=alpha)
    found: Tensor = loss({"logits": {"output": s}}, {"logits": {"output": t}}, y)
    return found


# Their lines, and the call in README.md that is the same.
PROGRAMS: list[tuple[Callable[..., Tensor], str]] = [
    (authors, "kd_loss(s, t, y, T, alpha)"),
    (
        authors_first,
        "2 / K * alpha * kd_loss(s, t, T=T, alpha=1.0) + (1 - alpha) * cross_entropy(s, y)",
    ),
    (repdistiller, "gamma * cross_entropy(s, y) + alpha * kd_loss(s, t, T=T, alpha=1.0)"),
    (mdistiller, "ce_weight * cross_entropy(s, y) + kd_weight * kd_loss(s, t, T=T, alpha=1.0)"),
    (torchdistill, "kd_loss(s, t, y, T, 1 - alpha)"),
    (lambda s, t, y, T: torchdistill(s, t, y, T, 0.0), "kd_loss(s, t, T=T, alpha=1.0) / T**2"),
]


@pytest.mark.parametrize(("theirs", "call"), PROGRAMS, ids=[call for _, call in PROGRAMS])
def test_the_calls_for_other_programs(theirs: Callable[..., Tensor], call: str) -> None:
    assert f"`{call}`" in (Path(__file__).parents[2] / "README.md").read_text()
    s, t, y = logits(8, 10).requires_grad_(), logits(8, 10), torch.randint(10, (8,))
    known = {"s": s, "t": t, "y": y, "T": 3.0, "alpha": 0.4, "gamma": 0.3}
    known |= {"kd_weight": 0.7, "ce_weight": 0.2, "K": 10}
    names = {"kd_loss": kd_loss, "cross_entropy": F.cross_entropy}
    ours = eval(call, names | known)
    wanted = theirs.__code__.co_varnames[: theirs.__code__.co_argcount]
    right = theirs(**{n: known[n] for n in wanted})
    torch.testing.assert_close(ours, right)
    torch.testing.assert_close(torch.autograd.grad(ours, s), torch.autograd.grad(right, s))


# ---- inside PyTorch ------------------------------------------------------------------------------


def test_labels_of_inference_mode() -> None:
    s, t = logits(4, 6).requires_grad_(), logits(4, 6)
    for labels in (torch.tensor([1, 2, -100, 3]), t.softmax(1)):
        with torch.inference_mode():
            targets = labels.clone()
        loss, right = kd_loss(s, t, targets), kd_loss(s, t, labels)
        torch.testing.assert_close(loss, right)
        torch.testing.assert_close(torch.autograd.grad(loss, s), torch.autograd.grad(right, s))


def test_module_is_the_function() -> None:
    module = at_fused.KDLoss(2.0, 0.5, label_smoothing=0.1, ignore_index=3)
    s, t, labels = logits(4, 6), logits(4, 6), torch.tensor([3, 0, 1, 5])
    right = kd_loss(s, t, labels, 2.0, 0.5, label_smoothing=0.1, ignore_index=3)
    for same in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(same(s, t, labels), right, rtol=0, atol=0)
    assert "T=2.0, alpha=0.5" in repr(module)
    assert not list(module.parameters())


# ---- errors --------------------------------------------------------------------------------------

S, Y = torch.randn(4, 6), torch.tensor([0, 1, 2, 3])
IMAGES = {"student_logits": torch.randn(4, 6, 3), "teacher_logits": torch.randn(4, 6, 3)}
# Others are in test_errors.py.
ERRORS: dict[str, dict[str, Any]] = {
    r"student_logits must have a batch dimension, got shape \(6,\)": {"student_logits": S[0]},
    r"must have the same shape, got \(4, 6\) and \(4, 5\)": {"teacher_logits": S[:, :5]},
    "teacher_logits of pair 0 is on meta": {"teacher_logits": S.to("meta")},
    r"must be int64.*or class probabilities.*\(4, 6": {"labels": S[:, :5]},
    "label_smoothing is for labels, got 0.1": {"labels": None, "label_smoothing": 0.1},
    "ignore_index is for .*got 3": {"labels": S, "ignore_index": 3},
    "labels must be on.*cpu, got meta": {"labels": S.to("meta")},
    r"labels must be \(B, \*spatial\), here \(4, 3\), got shape \(4,\)": IMAGES,
    r"labels must be from 0 to 5 or ignore_index \(-100\): Target 6 is": {
        **IMAGES,
        "labels": torch.full((4, 3), 6),
    },
    "ignore_index must be an int64": {"ignore_index": 2**63},
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message: str) -> None:
    arguments = {"student_logits": S, "teacher_logits": S, "labels": Y} | ERRORS[message]
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        kd_loss(**arguments)
