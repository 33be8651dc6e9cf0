"""``kd_loss`` against the formula in float64 and against other programs."""

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
    """Compute the loss as programs write it, with each position of an image as a sample."""
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
    expected = reference(*doubles, labels, **options)
    fp64 = torch.float64 in (s.dtype, t.dtype)
    assert loss.dtype == (torch.float64 if fp64 else torch.float32)
    rounding = 2**-53 if fp64 else 2**-24
    T = options.get("T", 4.0)
    torch.testing.assert_close(
        loss.double(), expected, rtol=16 * rounding, atol=2 * rounding * T * T, equal_nan=True
    )
    actual = torch.autograd.grad(loss * scale, (s, t), allow_unused=True)
    gradients = torch.autograd.grad(expected * scale, doubles, allow_unused=True)
    for x, g, e in zip((s, t), actual, gradients, strict=True):
        if g is None:  # alpha=0 omits the term with the teacher
            assert e is None or not e.any()
            continue
        assert g.dtype == x.dtype
        rows = x.numel() / x.shape[1]
        tolerance = max(gradient_tolerance(g.dtype, 1e-5), 16 * rounding)
        atol = 16 * rounding * T / rows * scale + (2**-24 if g.dtype == torch.float16 else 1e-12)
        assert (g.double() - e).abs().max() <= tolerance * e.abs().max() + atol


def logits(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(*shape, dtype=torch.float64)).to(dtype)


# ---- values and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_classes(dtype: torch.dtype) -> None:
    """fp16 gradients of so many classes underflow without a loss scale."""
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
    """Like F.cross_entropy, return NaN, but keep the gradient of the KL divergence."""
    s, t = logits(3, 5).requires_grad_(), logits(3, 5)
    (kl_gradient,) = torch.autograd.grad(reference(s.double(), t.double(), None), s)
    for smoothing in (0.0, 0.1):
        loss = kd_loss(s, t, torch.full((3,), -100), label_smoothing=smoothing)
        assert loss.isnan()
        torch.testing.assert_close(torch.autograd.grad(loss, s)[0], kl_gradient)


def test_loss_of_equal_logits_is_exactly_zero() -> None:
    for T in (1e-3, 1.0, 1e6):
        for size in (1e-3, 1.0, 1e4):
            s = (torch.randn(4, 33) * size).requires_grad_()
            t = s.detach().clone().requires_grad_()
            loss = kd_loss(s, t, T=T, alpha=1.0)
            assert loss.item() == 0
            for g in torch.autograd.grad(loss, (s, t)):
                assert g.abs().max() <= 2**-22 * T / 4


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (3, 4, 7), (2, 3, 2, 3, 2)], ids=str)
def test_logits_of_images(shape: tuple[int, ...]) -> None:
    """For segmentation both terms are means over samples and positions."""
    s, t = logits(*shape), logits(*shape, dtype=torch.float16)
    labels = torch.randint(shape[1], (shape[0], *shape[2:]))
    labels[0, 0] = -100
    assert_matches(s, t, labels, T=3.0, alpha=0.4, label_smoothing=0.1)
    assert_matches(s, t)
    channels_last = s.movedim(1, -1).contiguous().movedim(-1, 1)
    assert_matches(channels_last, t, labels)


@pytest.mark.parametrize("shape", [(4, 6), (2, 6, 3, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_class_probabilities(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """mixup and CutMix turn labels into class probabilities."""
    s, t = logits(*shape), logits(*shape)
    mixed = logits(*shape).softmax(1).to(dtype)
    for smoothing in (0.0, 0.2):
        for alpha in (0.0, 0.4):
            assert_matches(s, t, mixed.double(), alpha=alpha, label_smoothing=smoothing)
            actual = kd_loss(s, t, mixed, alpha=alpha, label_smoothing=smoothing)
            expected = reference(s, t, mixed.float(), alpha=alpha, label_smoothing=smoothing)
            torch.testing.assert_close(actual, expected)
    mixed.requires_grad_()
    (g,) = torch.autograd.grad(kd_loss(s, t, mixed, alpha=0.5), mixed)
    assert g.any()


def test_terms_with_zero_weight_are_not_computed() -> None:
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

    pairs = {}
    for size in (1e-3, 1.0, 30.0, 4000.0):
        base = draw() * size
        pairs[f"logits of {size:g}"] = draw() * size, base
        pairs[f"close, {size:g}"] = base, base + draw() * size * 1e-3
        pairs[f"a constant apart, {size:g}"] = base, base + draw() * 1e-3 + 1000.0
    confident = torch.full((6,), -20.0)
    confident[2] = 5.0
    pairs["both confident"] = confident, confident * 1.1
    pairs["confident teacher"] = draw() * 0.1, confident
    pairs["confident student"] = confident, draw() * 0.1
    pairs["confident of different classes"] = confident, confident.roll(1)
    pairs["extreme"] = torch.tensor([1e4, -1e4, 0.0, 1.0]), torch.tensor([-1e4, 1e4, 0.5, 0.0])
    return pairs


@pytest.mark.parametrize("T", [1e-3, 0.1, 1.0, 4.0, 20.0, 100.0, 1e4, 1e6])
def test_documented_rounding_bounds(T: float) -> None:
    """docs/numerics.md states these bounds for the loss and its gradients."""
    for name, sides in cases().items():
        x, y = (side[None].requires_grad_() for side in sides)
        u, v = (side[None].double().requires_grad_() for side in sides)
        loss, expected = kd_loss(x, y, T=T, alpha=1.0), reference(u, v, None, T, alpha=1.0)
        size = float(torch.stack(sides).abs().max())
        bound = 1e-6 * expected + 2e-7 * T * T + 2e-7 * T * size
        assert (loss - expected).abs() <= bound, (T, name, loss, expected)
        gradients = torch.autograd.grad(loss, (x, y)), torch.autograd.grad(expected, (u, v))
        for g, e in zip(*gradients, strict=True):
            bound = 1e-6 * e.abs().max() + 1e-6 * (T + size)
            assert (g.double() - e).abs().max() <= bound, (T, name, g, e)


@pytest.mark.parametrize("classes", [10, 1000])
@pytest.mark.parametrize("size", [1.0, 10.0])
def test_batch_error_is_below_1e_5_up_to_temperature_20(classes: int, size: float) -> None:
    s, t = size * torch.randn(128, classes), size * torch.randn(128, classes)
    for T in (0.5, 1.0, 4.0, 20.0):
        expected = reference(s.double(), t.double(), None, T=T)
        torch.testing.assert_close(kd_loss(s, t, T=T).double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("T", [5e-324, 1e-5, 1e30, 1.7e308])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_temperatures_give_finite_results(T: float, dtype: torch.dtype) -> None:
    s = torch.tensor([[1e4, -1e4, 0.0, 1.0], [1e4, 1e4, -1e4, 9e3]], dtype=dtype)
    x, y = s.requires_grad_(), s.detach().roll(1, 1).requires_grad_()
    loss = kd_loss(x, y, torch.tensor([1, 3]), T=T)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (x, y)))


@pytest.mark.parametrize("T", [0.5, 4.0])
def test_masked_classes(T: float) -> None:
    """Mask classes in the teacher, in both, and only in the student, where the loss is inf."""
    s, t = logits(3, 9), logits(3, 9)
    t[:, 2] = s[:, 5] = t[:, 5] = -torch.inf
    x, y = s.clone().requires_grad_(), t.clone().requires_grad_()
    loss = kd_loss(x, y, T=T, alpha=1.0)
    u, v = s.double().requires_grad_(), t.double().requires_grad_()
    log_p, log_q = F.log_softmax(u / T, 1), F.log_softmax(v / T, 1)
    kept = log_q > -torch.inf
    terms = torch.where(kept, log_q.exp() * torch.where(kept, log_q - log_p, 0.0), 0.0)
    expected = T * T * terms.sum() / 3
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    gradients = torch.autograd.grad(loss, (x, y)), torch.autograd.grad(expected, (u, v))
    for g, e in zip(*gradients, strict=True):
        torch.testing.assert_close(g.double(), e.nan_to_num(), rtol=1e-5, atol=1e-6)
    s[0, 4] = -torch.inf
    assert kd_loss(s, t, T=T).item() == torch.inf


# ---- other programs ------------------------------------------------------------------------------


def scaled_kl(s: Tensor, t: Tensor, T: float, reduction: str) -> Tensor:
    return F.kl_div(F.log_softmax(s / T, 1), F.softmax(t / T, 1), reduction=reduction) * T**2


def authors(s: Tensor, t: Tensor, y: Tensor, T: float, alpha: float) -> Tensor:
    return scaled_kl(s, t, T, "sum") / len(s) * alpha + F.cross_entropy(s, y) * (1.0 - alpha)


def authors_first(s: Tensor, t: Tensor, y: Tensor, T: float, alpha: float) -> Tensor:
    soft = scaled_kl(s, t, T, "none").mean() * 2.0
    return soft * alpha + F.cross_entropy(s, y) * (1.0 - alpha)


def repdistiller(s: Tensor, t: Tensor, y: Tensor, T: float, alpha: float, gamma: float) -> Tensor:
    return gamma * F.cross_entropy(s, y) + alpha * scaled_kl(s, t, T, "sum") / len(s)


def mdistiller(
    s: Tensor, t: Tensor, y: Tensor, T: float, kd_weight: float, ce_weight: float
) -> Tensor:
    return ce_weight * F.cross_entropy(s, y) + kd_weight * scaled_kl(s, t, T, "none").sum(1).mean()


def torchdistill(s: Tensor, t: Tensor, y: Tensor, T: float, alpha: float) -> Tensor:
    from torchdistill.losses.mid_level import KDLoss  # GPU machines may lack it

    loss = KDLoss("logits", "output", "logits", "output", temperature=T, alpha=alpha)
    result: Tensor = loss({"logits": {"output": s}}, {"logits": {"output": t}}, y)
    return result


# Losses of other programs, and the equal calls in docs/formulas.md.
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


@pytest.mark.parametrize(("program", "call"), PROGRAMS, ids=[call for _, call in PROGRAMS])
def test_documented_calls_match_other_programs(program: Callable[..., Tensor], call: str) -> None:
    assert f"`{call}`" in (Path(__file__).parents[2] / "docs/formulas.md").read_text()
    s, t, y = logits(8, 10).requires_grad_(), logits(8, 10), torch.randint(10, (8,))
    values = {"s": s, "t": t, "y": y, "T": 3.0, "alpha": 0.4, "gamma": 0.3}
    values |= {"kd_weight": 0.7, "ce_weight": 0.2, "K": 10}
    functions = {"kd_loss": kd_loss, "cross_entropy": F.cross_entropy}
    actual = eval(call, functions | values)
    names = program.__code__.co_varnames[: program.__code__.co_argcount]
    expected = program(**{name: values[name] for name in names})
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, s), torch.autograd.grad(expected, s))


# ---- inference mode and the module ---------------------------------------------------------------


def test_labels_made_in_inference_mode() -> None:
    s, t = logits(4, 6).requires_grad_(), logits(4, 6)
    for labels in (torch.tensor([1, 2, -100, 3]), t.softmax(1)):
        with torch.inference_mode():
            targets = labels.clone()
        losses = kd_loss(s, t, targets), kd_loss(s, t, labels)
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*(torch.autograd.grad(loss, s) for loss in losses))


def test_module_and_its_copies_match_the_function() -> None:
    module = at_fused.KDLoss(2.0, 0.5, label_smoothing=0.1, ignore_index=3)
    s, t, labels = logits(4, 6), logits(4, 6), torch.tensor([3, 0, 1, 5])
    expected = kd_loss(s, t, labels, 2.0, 0.5, label_smoothing=0.1, ignore_index=3)
    for loss in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(loss(s, t, labels), expected, rtol=0, atol=0)
    assert "T=2.0, alpha=0.5" in repr(module)
    assert not list(module.parameters())


# ---- errors --------------------------------------------------------------------------------------

S, Y = torch.randn(4, 6), torch.tensor([0, 1, 2, 3])
IMAGES = {"student_logits": torch.randn(4, 6, 3), "teacher_logits": torch.randn(4, 6, 3)}
# test_errors.py checks the other arguments.
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
    "ignore_index must fit in int64": {"ignore_index": 2**63},
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message: str) -> None:
    arguments = {"student_logits": S, "teacher_logits": S, "labels": Y} | ERRORS[message]
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        kd_loss(**arguments)
