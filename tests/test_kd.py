"""Hinton's loss against the formula written out, in float64 and in mpmath, and other programs'."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mpmath
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchdistill.losses.mid_level import KDLoss as TorchdistillKDLoss

import at_fused
from at_fused import kd_loss

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
ROUNDING = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2**-10,
    torch.bfloat16: 2**-7,
}


def reference(
    s: Tensor,
    t: Tensor,
    labels: Tensor | None,
    T: float = 4.0,
    alpha: float = 0.9,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """The loss as people write it; rows of images are made rows of a batch."""
    if s.dim() > 2:
        s, t = (x.movedim(1, -1).flatten(0, -2) for x in (s, t))
        if labels is not None and not labels.is_floating_point():
            labels = labels.flatten()
        elif labels is not None:
            labels = labels.movedim(1, -1).flatten(0, -2)
    log_p, log_q = F.log_softmax(s / T, 1), F.log_softmax(t / T, 1)
    loss = alpha * T * T * F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
    if labels is None or alpha == 1:
        return loss
    ce = F.cross_entropy(s, labels, label_smoothing=label_smoothing, ignore_index=ignore_index)
    return ce if alpha == 0 else loss + (1 - alpha) * ce


def assert_matches(
    s: Tensor, t: Tensor, labels: Tensor | None = None, *, scale: float = 1.0, **options: Any
) -> None:
    s, t = s.detach().requires_grad_(), t.detach().requires_grad_()
    doubles = [x.detach().double().requires_grad_() for x in (s, t)]
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
        tolerance = max(ROUNDING[g.dtype], 16 * rounding)
        least = 16 * rounding * T / rows * scale + (2**-24 if g.dtype == torch.float16 else 1e-12)
        assert (g.double() - r).abs().max() <= tolerance * r.abs().max() + least


def logits(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(*shape, dtype=torch.float64)).to(dtype)


# ---- values and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 10, 63, 100, 1000])
def test_numbers_of_classes(k: int) -> None:
    labels = torch.randint(k, (5,))
    labels[1] = -100
    assert_matches(logits(5, k), logits(5, k), labels, T=3.0, alpha=0.4)
    assert_matches(logits(5, k), logits(5, k))


@pytest.mark.parametrize("k", [21841, 50257])
def test_many_classes(k: int) -> None:
    labels = torch.tensor([k - 1, 0])
    assert_matches(logits(2, k, dtype=torch.bfloat16), logits(2, k), labels, label_smoothing=0.1)


@pytest.mark.parametrize("student", DTYPES, ids=str)
@pytest.mark.parametrize("teacher", DTYPES, ids=str)
def test_dtypes(student: torch.dtype, teacher: torch.dtype) -> None:
    labels = torch.randint(37, (4,))
    for smoothing in (0.0, 0.2):
        assert_matches(
            logits(4, 37, dtype=student),
            logits(4, 37, dtype=teacher),
            labels,
            label_smoothing=smoothing,
        )


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("T", [0.5, 1.0, 20.0])
def test_options(alpha: float, T: float) -> None:
    s, t = logits(6, 11), logits(6, 11)
    labels = torch.tensor([3, 0, 10, 5, 3, 7])
    for smoothing in (0.0, 0.3):
        for ignored in (-100, 3, 10):
            options = {"label_smoothing": smoothing, "ignore_index": ignored}
            assert_matches(s, t, labels, T=T, alpha=alpha, **options)
    if alpha > 0:
        assert_matches(s, t, None, T=T, alpha=alpha)


def views() -> dict[str, Tensor]:
    base = torch.randn(8, 48)
    return {
        "rows of a wider tensor": base[:, 3:20],
        "every second row": base[::2],
        "transposed": base.t(),
        "every second class": base[:, ::2],
        "one row for all": base[:1].expand(8, 48),
        "one class for all": base[:, :1].expand(8, 48),
        "unaligned": torch.randn(8 * 48 + 1)[1:].view(8, 48),
    }


@pytest.mark.parametrize("view", views())
def test_every_stride_pattern(view: str) -> None:
    x = views()[view]
    other = torch.randn(x.shape)
    labels = torch.randint(x.shape[1], (x.shape[0],))
    assert_matches(x, other, labels)
    assert_matches(other, x, labels)
    wide = torch.randint(x.shape[1], (2 * x.shape[0],))
    assert_matches(x, x.clone() * 2, wide[::2])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_all_labels_ignored(smoothing: float) -> None:
    s, t = logits(3, 5).requires_grad_(), logits(3, 5)
    labels = torch.full((3,), -100)
    loss = kd_loss(s, t, labels, label_smoothing=smoothing)
    assert loss.isnan()  # as F.cross_entropy
    (g,) = torch.autograd.grad(loss, s)
    right = reference(s.double(), t.double(), labels, label_smoothing=smoothing)
    assert right.isnan()
    (only_kl,) = torch.autograd.grad(reference(s.double(), t.double(), None), s)
    torch.testing.assert_close(g, only_kl)
    assert kd_loss(s, t, labels, alpha=1.0).isfinite()


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
    for smoothing in (0.0, 0.1):
        assert_matches(s, t, labels, T=3.0, alpha=0.4, label_smoothing=smoothing)
    assert_matches(s, t)
    last = s.movedim(1, -1).contiguous().movedim(-1, 1)
    assert_matches(last, t, labels)
    torch.testing.assert_close(kd_loss(last, t, labels), kd_loss(s, t, labels))


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
    classes = torch.randint(6, (shape[0], *shape[2:]))
    one_hot = F.one_hot(classes, 6).movedim(-1, 1).to(dtype)
    torch.testing.assert_close(kd_loss(s, t, one_hot), kd_loss(s, t, classes))
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


# ---- against mpmath ------------------------------------------------------------------------------


def exact(s: Tensor, t: Tensor, T: float) -> tuple[float, list[float], list[float]]:
    """T^2 * KL of one row, and its gradients, to 60 digits and more."""
    with mpmath.workdps(120):
        temperature = mpmath.mpf(T)

        def log_softmax(x: Tensor) -> list[Any]:
            scaled = [mpmath.mpf(v) / temperature for v in x.tolist()]
            top = max(scaled)
            total = mpmath.log(sum(mpmath.exp(v - top) for v in scaled))
            return [v - top - total for v in scaled]

        log_p, log_q = log_softmax(s), log_softmax(t)
        p, q = [mpmath.exp(v) for v in log_p], [mpmath.exp(v) for v in log_q]
        rows = list(zip(p, q, log_p, log_q, strict=True))
        kl = sum(b * (d - c) for _, b, c, d in rows)
        student = [float(temperature * (a - b)) for a, b, _, _ in rows]
        teacher = [float(temperature * b * (d - c - kl)) for _, b, c, d in rows]
        return float(temperature**2 * kl), student, teacher


def cases() -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)

    def draw(k: int = 6) -> Tensor:
        return torch.randn(k, generator=generator)

    found = {}
    for size in (1e-3, 1.0, 30.0, 4000.0):
        found[f"logits of {size:g}"] = draw() * size, draw() * size
        base = draw() * size
        found[f"near each other, {size:g}"] = base, base + draw() * size * 1e-3
        found[f"apart by a constant, {size:g}"] = base, base + draw() * 1e-3 + 1000.0
    one = torch.zeros(40)
    one[7] = 1.0
    found["one class apart"] = torch.zeros(40), one
    sure = torch.full((6,), -20.0)
    sure[2] = 5.0
    found["both sure"] = sure, sure * 1.1
    found["a sure teacher"] = draw() * 0.1, sure
    found["a sure student"] = sure, draw() * 0.1
    found["sure of something else"] = sure, sure.roll(1)
    found["the ends"] = torch.tensor([1e4, -1e4, 0.0, 1.0]), torch.tensor([-1e4, 1e4, 0.5, 0.0])
    return found


@pytest.mark.parametrize("T", [1e-3, 0.1, 1.0, 4.0, 20.0, 100.0, 1e4, 1e6])
def test_errors_against_mpmath(T: float) -> None:
    """The bounds of docs/numerics.md: of the loss, and of the gradients."""
    for name, (s, t) in cases().items():
        right, *gradients = exact(s, t, T)
        x, y = s[None].requires_grad_(), t[None].requires_grad_()
        loss = kd_loss(x, y, T=T, alpha=1.0)
        size = float(torch.maximum(s.abs(), t.abs()).max())
        error = 1e-6 * right + 2e-7 * T * T + 2e-7 * T * size
        assert abs(loss.item() - right) <= error, (T, name, loss.item(), right)
        for g, r in zip(torch.autograd.grad(loss, (x, y)), gradients, strict=True):
            off = (g.double() - torch.tensor([r], dtype=torch.float64)).abs().max()
            assert off <= 1e-6 * max(map(abs, r)) + 1e-6 * (T + size), (T, name, g, r)


@pytest.mark.parametrize("classes", [10, 100, 1000])
@pytest.mark.parametrize("size", [1.0, 3.0, 10.0])
def test_a_batch_is_right_to_1e_5_up_to_a_temperature_of_20(classes: int, size: float) -> None:
    s, t = size * torch.randn(128, classes), size * torch.randn(128, classes)
    for T in (0.5, 1.0, 2.0, 4.0, 8.0, 20.0):
        right = reference(s.double(), t.double(), None, T=T)
        torch.testing.assert_close(kd_loss(s, t, T=T).double(), right, rtol=1e-5, atol=0)


@pytest.mark.parametrize("T", [5e-324, 1e-300, 1e-30, 1e-5, 1e5, 1e30, 1e300])
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
    t[:, 2] = -torch.inf
    s[1:, 5] = t[1:, 5] = -torch.inf
    labels = torch.tensor([0, 1, 3])
    x, y = s.clone().requires_grad_(), t.clone().requires_grad_()
    loss = kd_loss(x, y, labels, T=T)
    u, v = s.double().requires_grad_(), t.double().requires_grad_()
    log_p, log_q = F.log_softmax(u / T, 1), F.log_softmax(v / T, 1)
    known = log_q > -torch.inf
    terms = torch.where(known, log_q.exp() * torch.where(known, log_q - log_p, 0.0), 0.0)
    right = 0.9 * T * T * terms.sum() / 3 + 0.1 * F.cross_entropy(u, labels)
    torch.testing.assert_close(loss.double(), right, rtol=1e-5, atol=0)
    for g, r in zip(
        torch.autograd.grad(loss, (x, y)), torch.autograd.grad(right, (u, v)), strict=True
    ):
        assert g.isfinite().all()
        torch.testing.assert_close(g.double(), r.nan_to_num(), rtol=1e-5, atol=1e-6)
    s[0, 4] = -torch.inf
    assert kd_loss(s, t, T=T).item() == torch.inf


def test_nan_is_not_hidden() -> None:
    for side in (0, 1):
        pair = [logits(2, 20), logits(2, 20)]
        pair[side][1, 13] = float("nan")
        assert kd_loss(*pair).isnan()


# ---- other programs ------------------------------------------------------------------------------


def authors(s: Tensor, t: Tensor, y: Tensor, T: float, alpha: float) -> Tensor:
    soft = F.kl_div(F.log_softmax(s / T, 1), F.softmax(t / T, 1), reduction="sum") * T**2 / len(s)
    return soft * alpha + F.cross_entropy(s, y) * (1.0 - alpha)


def authors_first(s: Tensor, t: Tensor, y: Tensor, T: float, alpha: float) -> Tensor:
    each = F.kl_div(F.log_softmax(s / T, 1), F.softmax(t / T, 1), reduction="none")
    return each.mean() * (T * T * 2.0 * alpha) + F.cross_entropy(s, y) * (1.0 - alpha)


def repdistiller(
    s: Tensor, t: Tensor, y: Tensor, T: float, alpha: float, gamma: float = 0.3
) -> Tensor:
    soft = F.kl_div(F.log_softmax(s / T, 1), F.softmax(t / T, 1), reduction="sum") * T**2 / len(s)
    return gamma * F.cross_entropy(s, y) + alpha * soft


def mdistiller(
    s: Tensor, t: Tensor, y: Tensor, T: float, kd_weight: float = 0.7, ce_weight: float = 0.2
) -> Tensor:
    each = F.kl_div(F.log_softmax(s / T, 1), F.softmax(t / T, 1), reduction="none")
    return ce_weight * F.cross_entropy(s, y) + kd_weight * (each.sum(1).mean() * T**2)


def torchdistill(s: Tensor, t: Tensor, y: Tensor, T: float, alpha: float) -> Tensor:
    loss = TorchdistillKDLoss("logits", "output", "logits", "output", temperature=T, alpha=alpha)
    found: Tensor = loss({"logits": {"output": s}}, {"logits": {"output": t}}, y)
    return found


def torchdistill_alone(s: Tensor, t: Tensor, y: Tensor, T: float) -> Tensor:
    return torchdistill(s, t, y, T, 0.0)


# Their lines, and the call in README.md that is the same.
PROGRAMS: list[tuple[Callable[..., Tensor], str]] = [
    (authors, "kd_loss(s, t, y, T, alpha)"),
    (
        authors_first,
        "2 / K * alpha * kd_loss(s, t, T=T, alpha=1.0) + (1 - alpha) * cross_entropy(s, y)",
    ),
    (
        repdistiller,
        "gamma * cross_entropy(s, y) + alpha * kd_loss(s, t, T=T, alpha=1.0)",
    ),
    (
        mdistiller,
        "ce_weight * cross_entropy(s, y) + kd_weight * kd_loss(s, t, T=T, alpha=1.0)",
    ),
    (torchdistill, "kd_loss(s, t, y, T, 1 - alpha)"),
    (torchdistill_alone, "kd_loss(s, t, T=T, alpha=1.0) / T**2"),
]


@pytest.mark.parametrize(("theirs", "call"), PROGRAMS, ids=[f.__name__ for f, _ in PROGRAMS])
def test_the_calls_for_other_programs(theirs: Callable[..., Tensor], call: str) -> None:
    assert f"`{call}`" in (Path(__file__).parents[1] / "README.md").read_text()
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


def test_fp16_with_a_loss_scale() -> None:
    """Gradients that would vanish in fp16 are there with a loss scale, which comes from above."""
    s = logits(8, 1000, dtype=torch.float16).requires_grad_()
    t = logits(8, 1000, dtype=torch.float16)
    loss = kd_loss(s, t, torch.randint(1000, (8,)), T=1.0)
    (g,) = torch.autograd.grad(loss * 2.0**14, s, retain_graph=True)
    (small,) = torch.autograd.grad(loss, s)
    assert g.isfinite().all()
    assert (g != 0).float().mean() > 0.99 > (small != 0).float().mean()


def test_autocast() -> None:
    net, x, t = nn.Linear(8, 10), torch.randn(4, 8), logits(4, 10)
    labels = torch.randint(10, (4,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        s = net(x)
        loss = kd_loss(s, t, labels)
    assert s.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss.double(), reference(s.double(), t.double(), labels), rtol=1e-5, atol=0
    )
    loss.backward()
    assert net.weight.grad.isfinite().all()


@pytest.mark.parametrize("alpha", [0.6, 0.0, 1.0])
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 2, 2)], ids=str)
def test_gradcheck(alpha: float, shape: tuple[int, ...]) -> None:
    """To second order, and in forward mode."""
    s, t = (logits(*shape, dtype=torch.float64).requires_grad_() for _ in range(2))
    labels = torch.randint(shape[1], (shape[0], *shape[2:]))
    labels[1] = -100
    sides = (s, t) if alpha > 0 else (s,)

    def loss(s: Tensor, t: Tensor = t) -> Tensor:
        return kd_loss(s, t, labels, T=2.0, alpha=alpha, label_smoothing=0.1)

    assert torch.autograd.gradcheck(loss, sides, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, sides, check_fwd_over_rev=True)


def test_torch_func() -> None:
    s, t, v = (logits(3, 6, dtype=torch.float64) for _ in range(3))
    labels = torch.tensor([1, 2, 3])

    def ours(x: Tensor) -> Tensor:
        return kd_loss(x, t, labels)

    def right(x: Tensor) -> Tensor:
        return reference(x, t, labels)

    gradient = torch.func.grad(right)
    torch.testing.assert_close(torch.func.grad(ours)(s), gradient(s))
    (value, tangent) = torch.func.jvp(ours, (s,), (v,))
    torch.testing.assert_close(value, right(s))
    torch.testing.assert_close(tangent, (gradient(s) * v).sum())
    _, product = torch.func.jvp(torch.func.grad(ours), (s,), (v,))
    torch.testing.assert_close(product, torch.func.hessian(right)(s).flatten(2) @ v.flatten())
    batches = [torch.stack([x, x.roll(1, 0)]) for x in (s, t)]
    each = torch.func.vmap(kd_loss)(*batches, torch.stack([labels, labels.roll(1)]))
    torch.testing.assert_close(each, ours(s).expand(2))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_fullgraph(compiler: str) -> None:
    s, t, labels = logits(4, 10).requires_grad_(), logits(4, 10), torch.randint(10, (4,))

    def step(s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return 3 * kd_loss(s * 2, t, labels, T=2.0, alpha=0.5)

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    loss, right = compiled(s, t, labels), step(s, t, labels)
    torch.testing.assert_close(loss, right)
    torch.testing.assert_close(torch.autograd.grad(loss, s), torch.autograd.grad(right, s))


def test_an_exported_program_has_the_gradient() -> None:
    s, t, labels = logits(4, 10), logits(4, 10), torch.randint(10, (4,))
    program = torch.export.export(at_fused.KDLoss(), (s, t, labels)).module()
    s.requires_grad_()
    loss, right = program(s, t, labels), kd_loss(s, t, labels)
    torch.testing.assert_close(loss, right)
    torch.testing.assert_close(torch.autograd.grad(loss, s), torch.autograd.grad(right, s))


@pytest.mark.parametrize("T", [1.0, 4.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_teacher_under_inference_mode(T: float, dtype: torch.dtype) -> None:
    s, t = logits(4, 6).requires_grad_(), logits(4, 6, dtype=dtype)
    labels = {"classes": torch.tensor([1, 2, -100, 3]), "probabilities": t.float().softmax(1)}
    for y in labels.values():
        with torch.inference_mode():
            teacher, targets = t.clone(), y.clone()
        loss = kd_loss(s, teacher, targets, T=T)
        right = kd_loss(s, t, y, T=T)
        torch.testing.assert_close(loss, right)
        torch.testing.assert_close(torch.autograd.grad(loss, s), torch.autograd.grad(right, s))


def test_only_what_is_asked_for() -> None:
    s, t = logits(3, 6), logits(3, 6).requires_grad_()
    (g,) = torch.autograd.grad(kd_loss(s, t), t)
    u = t.detach().double().requires_grad_()
    (r,) = torch.autograd.grad(reference(s.double(), u, None), u)
    torch.testing.assert_close(g.double(), r, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert not kd_loss(s, t).requires_grad


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

ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "student": ({"student_logits": [1.0]}, TypeError, "student_logits must be a tensor, got list"),
    "teacher": ({"teacher_logits": None}, TypeError, "teacher_logits must be a tensor, got None"),
    "integers": ({"student_logits": S.long()}, TypeError, "student_logits.*got torch.int64"),
    "sparse": ({"teacher_logits": S.to_sparse()}, TypeError, "teacher_logits.*dense"),
    "rank": ({"student_logits": S[0]}, ValueError, r"student_logits must be \(B, K\) or.*\(6,\)"),
    "shapes": ({"teacher_logits": S[:, :5]}, ValueError, r"teacher_logits.*\(4, 6\), got \(4, 5\)"),
    "batch": ({"teacher_logits": S[:1]}, ValueError, r"teacher_logits.*got \(1, 6\)"),
    "empty": ({"student_logits": S[:0]}, ValueError, "student_logits must not be empty"),
    "device": ({"teacher_logits": S.to("meta")}, ValueError, "device of student.*cpu, got meta"),
    "labels": ({"labels": [0, 1, 2, 3]}, TypeError, "labels must be a tensor or None, got list"),
    "label dtype": ({"labels": Y.int()}, TypeError, "labels must be int64.*got torch.int32"),
    "soft labels": (
        {"labels": S[:, :5]},
        TypeError,
        r"labels must be int64.*or class prob.*\(4, 6",
    ),
    "soft labels of rows": (
        {"labels": Y.float()},
        TypeError,
        "labels must be int64.*torch.float32",
    ),
    "soft labels, ignored": (
        {"labels": S.softmax(1), "ignore_index": 3},
        ValueError,
        "ignore_index is for labels that are class numbers.*got 3",
    ),
    "soft label device": (
        {"labels": S.to("meta")},
        ValueError,
        "labels must be on.*cpu, got meta",
    ),
    "labels of an image": (
        {"student_logits": S[..., None], "teacher_logits": S[..., None]},
        ValueError,
        r"labels must be \(B, \*spatial\), here \(4, 1\), got shape \(4,\)",
    ),
    "label shape": ({"labels": Y[:3]}, ValueError, r"labels must be \(B,\), here \(4,\).*\(3,\)"),
    "label rank": ({"labels": Y[:, None]}, ValueError, r"labels must be.*\(4, 1\)"),
    "label device": ({"labels": Y.to("meta")}, ValueError, "labels must be on.*cpu, got meta"),
    "T zero": ({"T": 0.0}, ValueError, "T must be a finite number > 0, got 0.0"),
    "T negative": ({"T": -1}, ValueError, "T must be.*got -1"),
    "T nan": ({"T": float("nan")}, ValueError, "T must be.*got nan"),
    "T inf": ({"T": float("inf")}, ValueError, "T must be.*got inf"),
    "T text": ({"T": "4"}, TypeError, "T must be a number, got str"),
    "alpha": ({"alpha": 1.5}, ValueError, "alpha must be from 0 to 1, got 1.5"),
    "alpha nan": ({"alpha": float("nan")}, ValueError, "alpha must be.*got nan"),
    "alpha None": ({"alpha": None}, TypeError, "alpha must be a number, got NoneType"),
    "smoothing": ({"label_smoothing": 1.0}, ValueError, "label_smoothing must be >= 0 and < 1"),
    "smoothing below 0": ({"label_smoothing": -0.1}, ValueError, "label_smoothing must be"),
    "ignore_index": ({"ignore_index": 1.0}, TypeError, "ignore_index must be an int, got float"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    change, kind, message = ERRORS[case]
    arguments = {"student_logits": S, "teacher_logits": S, "labels": Y} | change
    with pytest.raises(kind, match=message):
        kd_loss(**arguments)


@pytest.mark.parametrize("label", [6, -1, 2**40])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_label_out_of_range(label: int, smoothing: float) -> None:
    labels = torch.tensor([0, 1, label, 3])
    with pytest.raises(RuntimeError, match=rf"from 0 to 5 or.*got {label} in row 2"):
        kd_loss(S, S, labels, label_smoothing=smoothing)
    image = torch.zeros(2, 3, 4, dtype=torch.int64)
    image[1, 0, 2] = label
    x = torch.randn(2, 6, 3, 4)
    with pytest.raises(RuntimeError, match=rf"from 0 to 5 or.*got {label} in row \(1, 0, 2\)"):
        kd_loss(x, x, image, label_smoothing=smoothing)
