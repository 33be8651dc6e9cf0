"""Hinton's loss against the formula written out, in float64 and in mpmath, on every back end."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import mpmath
import pytest
import torch
import torch.nn.functional as F
from conftest import EVERY, opcheck, use
from torch import Tensor, nn

import at_fused
from at_fused import _ops

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
    """The loss as people write it."""
    log_p, log_q = F.log_softmax(s / T, 1), F.log_softmax(t / T, 1)
    loss = alpha * T * T * F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
    if labels is None or alpha == 1:
        return loss
    ce = F.cross_entropy(s, labels, label_smoothing=label_smoothing, ignore_index=ignore_index)
    return (ce if alpha == 0 else loss + (1 - alpha) * ce) if alpha < 1 else loss


def error(found: Tensor, right: Tensor) -> float:
    """The largest error in a row, as a share of the row's largest element."""
    bound = right.abs().amax(1, keepdim=True).clamp(min=1e-30)
    return float(((found.double() - right).abs() / bound).max())


def assert_matches(
    s: Tensor, t: Tensor, labels: Tensor | None = None, *, scale: float = 1.0, **options: Any
) -> None:
    s, t = s.detach().requires_grad_(), t.detach().requires_grad_()
    doubles = [x.detach().double().requires_grad_() for x in (s, t)]
    loss = at_fused.kd_loss(s, t, labels, **options)
    right = reference(*doubles, labels, **options)
    fp64 = torch.float64 in (s.dtype, t.dtype)
    assert loss.dtype == (torch.float64 if fp64 else torch.float32)
    exact = s.dtype == t.dtype == torch.float64
    torch.testing.assert_close(
        loss.double(), right, rtol=1e-11 if exact else 1e-5, atol=1e-12, equal_nan=True
    )
    found = torch.autograd.grad(loss * scale, (s, t))
    expected = torch.autograd.grad(right * scale, doubles, allow_unused=True)
    for x, g, r in zip((s, t), found, expected, strict=True):
        assert g.dtype == x.dtype
        assert g.stride() == torch.empty_like(x).stride()
        r = torch.zeros_like(g).double() if r is None else r
        tolerance = max(ROUNDING[g.dtype], 0 if fp64 and exact else 1e-5)
        smallest = 2**-24 if g.dtype == torch.float16 else 1e-12
        assert (g.double() - r).abs().max() <= tolerance * r.abs().max() + smallest


def logits(b: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(b, k, dtype=torch.float64)).to(dtype)


# ---- values and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 10, 63, 100, 1000])
def test_numbers_of_classes(backend: str, k: int) -> None:
    labels = torch.randint(k, (5,))
    labels[1] = -100
    assert_matches(logits(5, k), logits(5, k), labels, T=3.0, alpha=0.4)
    assert_matches(logits(5, k), logits(5, k))


@pytest.mark.parametrize("k", [21841, 50257])
def test_many_classes(fast_backend: str, k: int) -> None:
    labels = torch.tensor([k - 1, 0])
    assert_matches(logits(2, k, torch.bfloat16), logits(2, k), labels, label_smoothing=0.1)


@pytest.mark.parametrize("student", DTYPES, ids=str)
@pytest.mark.parametrize("teacher", DTYPES, ids=str)
def test_dtypes(backend: str, student: torch.dtype, teacher: torch.dtype) -> None:
    labels = torch.randint(37, (4,))
    for smoothing in (0.0, 0.2):
        assert_matches(
            logits(4, 37, student), logits(4, 37, teacher), labels, label_smoothing=smoothing
        )


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("T", [0.5, 1.0, 20.0])
def test_options(backend: str, alpha: float, T: float) -> None:
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
def test_every_stride_pattern(backend: str, view: str) -> None:
    x = views()[view]
    other = torch.randn(x.shape)
    labels = torch.randint(x.shape[1], (x.shape[0],))
    assert_matches(x, other, labels)
    assert_matches(other, x, labels)
    wide = torch.randint(x.shape[1], (2 * x.shape[0],))
    assert_matches(x, x.clone() * 2, wide[::2])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_all_labels_ignored(backend: str, smoothing: float) -> None:
    s, t = logits(3, 5).requires_grad_(), logits(3, 5)
    labels = torch.full((3,), -100)
    loss = at_fused.kd_loss(s, t, labels, label_smoothing=smoothing)
    assert loss.isnan()  # as F.cross_entropy
    (g,) = torch.autograd.grad(loss, s)
    right = reference(s.double(), t.double(), labels, label_smoothing=smoothing)
    assert right.isnan()
    (only_kl,) = torch.autograd.grad(reference(s.double(), t.double(), None), s)
    torch.testing.assert_close(g, only_kl)
    assert at_fused.kd_loss(s, t, labels, alpha=1.0).isfinite()


def test_equal_logits_are_exactly_0(backend: str) -> None:
    for T in (1e-3, 1.0, 1e6):
        for size in (1e-3, 1.0, 1e4):
            s = (torch.randn(4, 33) * size).requires_grad_()
            t = s.detach().clone().requires_grad_()
            loss = at_fused.kd_loss(s, t, T=T, alpha=1.0)
            assert loss.item() == 0
            for g in torch.autograd.grad(loss, (s, t)):
                assert not g.any()


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


TEMPERATURES = (1e-3, 0.1, 1.0, 4.0, 100.0, 1e4, 1e6)


@functools.cache
def answers() -> list[tuple[float, str, Tensor, Tensor, float, list[float], list[float]]]:
    return [
        (T, name, *pair, *exact(*pair, T)) for T in TEMPERATURES for name, pair in cases().items()
    ]


def test_extremes_against_mpmath(backend: str) -> None:
    """To 1e-4 wherever logits go to 1e4 and temperatures from 1e-3 to 1e6; 1e-5 in ordinary use."""
    for T, name, s, t, right, *gradients in answers():
        x, y = s[None].requires_grad_(), t[None].requires_grad_()
        loss = at_fused.kd_loss(x, y, T=T, alpha=1.0)
        found = torch.autograd.grad(loss, (x, y))
        tolerance = 1e-5 if T in (1.0, 4.0) and "of 1" in name else 1e-4
        # Below fp32's smallest number there is nothing to be right about.
        floor = 1e-34 * max(1.0, T * T)
        assert abs(loss.item() - right) <= tolerance * right + floor, (T, name)
        for g, r in zip(found, gradients, strict=True):
            wide = torch.tensor([r], dtype=torch.float64)
            allowed = tolerance * wide.abs().max() + floor
            assert (g.double() - wide).abs().max() <= allowed, (T, name, g, wide)


def test_cross_entropy_of_a_sure_student(backend: str) -> None:
    """Where 1 - p would leave nothing of fp32."""
    s = torch.tensor([[20.0, 0.0, -3.0], [0.0, 30.0, 1.0]]).requires_grad_()
    labels = torch.tensor([0, 1])
    loss = at_fused.kd_loss(s, s.detach(), labels, alpha=0.0)
    right = F.cross_entropy(s.double(), labels)
    torch.testing.assert_close(loss.double(), right, rtol=1e-5, atol=0)
    (g,) = torch.autograd.grad(loss, s)
    (r,) = torch.autograd.grad(right, s)
    assert error(g, r.double()) < 1e-5


@pytest.mark.parametrize("T", [0.5, 4.0])
def test_masked_classes(backend: str, T: float) -> None:
    """Classes that the teacher excludes, that both exclude, that only the student excludes."""
    s, t = logits(3, 9), logits(3, 9)
    t[:, 2] = -torch.inf
    s[1:, 5] = t[1:, 5] = -torch.inf
    labels = torch.tensor([0, 1, 3])
    x, y = s.clone().requires_grad_(), t.clone().requires_grad_()
    loss = at_fused.kd_loss(x, y, labels, T=T)
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
        assert error(g, r.nan_to_num()) < 1e-5
    s[0, 4] = -torch.inf
    assert at_fused.kd_loss(s, t, T=T).item() == torch.inf


def test_nan_is_not_hidden(backend: str) -> None:
    for side in (0, 1):
        pair = [logits(2, 20), logits(2, 20)]
        pair[side][1, 13] = float("nan")
        assert at_fused.kd_loss(*pair).isnan()


# ---- inside PyTorch ------------------------------------------------------------------------------


def test_fp16_with_a_loss_scale(backend: str) -> None:
    """Gradients that would vanish in fp16 are there with a loss scale, which comes from above."""
    s, t = logits(8, 1000, torch.float16).requires_grad_(), logits(8, 1000, torch.float16)
    loss = at_fused.kd_loss(s, t, torch.randint(1000, (8,)), T=1.0)
    (g,) = torch.autograd.grad(loss * 2.0**14, s, retain_graph=True)
    (small,) = torch.autograd.grad(loss, s)
    assert g.isfinite().all()
    assert (g != 0).float().mean() > 0.99 > (small != 0).float().mean()


def test_autocast(backend: str) -> None:
    net, x, t = nn.Linear(8, 10), torch.randn(4, 8), logits(4, 10)
    labels = torch.randint(10, (4,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        s = net(x)
        loss = at_fused.kd_loss(s, t, labels)
    assert s.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss.double(), reference(s.double(), t.double(), labels), rtol=1e-5, atol=0
    )
    loss.backward()
    assert net.weight.grad.isfinite().all()


@pytest.mark.parametrize(("labelled", "teacher_grad"), [(True, True), (False, False)])
def test_opcheck(backend: str, labelled: bool, teacher_grad: bool) -> None:
    s, t = logits(3, 7).requires_grad_(), logits(3, 7).requires_grad_(teacher_grad)
    labels = torch.tensor([2, -100, 6]) if labelled else None
    options = 4.0, 0.7, 0.1, -100
    opcheck(backend, torch.ops.at_fused.kd_loss, (s, t, labels, *options))
    _, stats, valid = _ops.kd_loss(s.detach(), t.detach(), labels, *options)
    gradient = torch.tensor(2.0, requires_grad=True)
    arguments = s, t, labels, stats, valid, gradient, *options, True, teacher_grad
    opcheck(backend, torch.ops.at_fused.kd_loss_backward, arguments)


@pytest.mark.parametrize(
    ("name", "alpha"), [("cpu", 0.6), ("eager", 0.6), ("cpu", 0.0), ("cpu", 1.0)]
)
def test_gradcheck(name: str, alpha: float) -> None:
    s, t = (
        logits(3, 5, torch.float64).requires_grad_(),
        logits(3, 5, torch.float64).requires_grad_(),
    )
    labels = torch.tensor([1, -100, 4])

    def loss(s: Tensor, t: Tensor) -> Tensor:
        return at_fused.kd_loss(s, t, labels, T=2.0, alpha=alpha, label_smoothing=0.1)

    with use(name):
        assert torch.autograd.gradcheck(loss, (s, t))
        assert torch.autograd.gradgradcheck(loss, (s, t))


def test_torch_func(backend: str) -> None:
    s, t = logits(3, 6), logits(3, 6)
    labels = torch.tensor([1, 2, 3])
    found = torch.func.grad(lambda x: at_fused.kd_loss(x, t, labels))(s)
    right = torch.func.grad(lambda x: reference(x, t, labels))(s)
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_fullgraph(compiler: str) -> None:
    s, t, labels = logits(4, 10).requires_grad_(), logits(4, 10), torch.randint(10, (4,))

    def step(s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return 3 * at_fused.kd_loss(s * 2, t, labels, T=2.0, alpha=0.5)

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    loss, right = compiled(s, t, labels), step(s, t, labels)
    torch.testing.assert_close(loss, right)
    torch.testing.assert_close(torch.autograd.grad(loss, s), torch.autograd.grad(right, s))


def test_only_what_is_asked_for(backend: str) -> None:
    s, t = logits(3, 6), logits(3, 6).requires_grad_()
    (g,) = torch.autograd.grad(at_fused.kd_loss(s, t), t)
    u = t.detach().double().requires_grad_()
    (r,) = torch.autograd.grad(reference(s.double(), u, None), u)
    assert error(g, r) < 1e-5
    with torch.no_grad():
        assert not at_fused.kd_loss(s, t).requires_grad


def test_module_is_the_function() -> None:
    module = at_fused.KDLoss(2.0, 0.5, label_smoothing=0.1, ignore_index=3)
    s, t, labels = logits(4, 6), logits(4, 6), torch.tensor([3, 0, 1, 5])
    right = at_fused.kd_loss(s, t, labels, 2.0, 0.5, label_smoothing=0.1, ignore_index=3)
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
    "rank": ({"student_logits": S[0]}, ValueError, r"student_logits must be \(B, K\).*\(6,\)"),
    "shapes": ({"teacher_logits": S[:, :5]}, ValueError, r"teacher_logits.*\(4, 6\), got \(4, 5\)"),
    "batch": ({"teacher_logits": S[:1]}, ValueError, r"teacher_logits.*got \(1, 6\)"),
    "empty": ({"student_logits": S[:0]}, ValueError, "student_logits must not be empty"),
    "device": ({"teacher_logits": S.to("meta")}, ValueError, "device of student.*cpu, got meta"),
    "labels": ({"labels": [0, 1, 2, 3]}, TypeError, "labels must be a tensor or None, got list"),
    "label dtype": ({"labels": Y.int()}, TypeError, "labels must be int64.*got torch.int32"),
    "soft labels": ({"labels": S}, TypeError, "labels must be int64.*got torch.float32"),
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
    "ignore_index wide": ({"ignore_index": 2**63}, ValueError, "ignore_index must be an int64"),
    "ignore_index": ({"ignore_index": 1.0}, TypeError, "ignore_index must be an int, got float"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    change, kind, message = ERRORS[case]
    arguments = {"student_logits": S, "teacher_logits": S, "labels": Y} | change
    with pytest.raises(kind, match=message):
        at_fused.kd_loss(**arguments)


FORWARD: dict[str, Any] = {
    "student": S,
    "teacher": S,
    "labels": Y,
    "temperature": 4.0,
    "alpha": 0.5,
    "label_smoothing": 0.1,
    "ignore_index": -100,
}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"student": S[None], "teacher": S[None]}, r"logits must be \(B, K\)"),
    "shapes": ({"teacher": S[:, :5]}, "both of the same shape"),
    "empty": ({"student": S[:0], "teacher": S[:0], "labels": None}, "not empty"),
    "integers": ({"student": S.long()}, "float16, bfloat16, float32 or float64"),
    "label dtype": ({"labels": Y.int()}, r"labels must be \(B,\) of int64"),
    "label shape": ({"labels": Y[:3]}, r"labels must be \(B,\) of int64"),
    "temperature": ({"temperature": 0.0}, "temperature must be a finite number > 0, got 0"),
    "no temperature": ({"temperature": float("nan")}, "temperature must be a finite number > 0"),
    "alpha": ({"alpha": 1.5}, "alpha must be from 0 to 1, got 1.5"),
    "smoothing": ({"label_smoothing": 1.0}, "label_smoothing must be >= 0 and < 1, got 1"),
}
STATS, COUNT, ONE = torch.ones(4, 8).double(), torch.ones(()).double(), torch.ones(())
WRONG_BACK: dict[str, tuple[dict[str, Any], str]] = {
    "rows": ({"stats": STATS[:3]}, "stats must be what kd_loss returned"),
    "columns": ({"stats": STATS[:, :7]}, "stats must be what kd_loss returned"),
    "stats dtype": ({"stats": STATS.float()}, "stats must be what kd_loss returned"),
    "valid": ({"valid": COUNT.expand(2)}, "valid must be what kd_loss returned"),
    "valid dtype": ({"valid": ONE}, "valid must be what kd_loss returned"),
    "gradient": ({"gradient": ONE.expand(4)}, "the gradient must be a scalar"),
    "gradient dtype": ({"gradient": ONE.half()}, "gradient must be float32 or float64"),
}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("case", WRONG)
def test_direct_calls_are_checked(name: str, case: str) -> None:
    change, message = WRONG[case]
    with use(name), pytest.raises(RuntimeError, match=message):
        torch.ops.at_fused.kd_loss(**FORWARD | change)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("case", WRONG | WRONG_BACK)
def test_direct_calls_of_the_backward_are_checked(name: str, case: str) -> None:
    change, message = (WRONG | WRONG_BACK)[case]
    saved = {"stats": STATS, "valid": COUNT, "gradient": ONE}
    wanted = {"student_grad": True, "teacher_grad": False}
    with use(name), pytest.raises(RuntimeError, match=message):
        torch.ops.at_fused.kd_loss_backward(**FORWARD | saved | wanted | change)


@pytest.mark.parametrize("name", ["cpu", "eager"])
@pytest.mark.parametrize("label", [6, -1, 2**40])
def test_a_label_out_of_range(name: str, label: int) -> None:
    labels = torch.tensor([0, 1, label, 3])
    with use(name), pytest.raises(RuntimeError, match=rf"from 0 to 5 or.*got {label} in row 2"):
        at_fused.kd_loss(S, S, labels)


@pytest.mark.parametrize("name", ["simt-wide", pytest.param("triton", marks=pytest.mark.long)])
@pytest.mark.parametrize("label", [6, -1, 2**40])
def test_a_label_out_of_range_on_a_gpu(name: str, label: int) -> None:
    """Nothing is read out of bounds: the row's results are NaN."""
    if name == "triton" and not at_fused.backends()["triton"].available:
        pytest.skip("no Triton")
    labels = torch.tensor([0, 1, label, 3])
    s = S.clone().requires_grad_()
    with use(name):
        loss = at_fused.kd_loss(s, S * 2, labels)
        (g,) = torch.autograd.grad(loss, s)
    assert loss.isnan()
    assert g[2].isnan().all()
    assert g[[0, 1, 3]].isfinite().all()
