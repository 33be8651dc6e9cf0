"""Distances and full-activation transfer against the formulas in float64."""

from __future__ import annotations

import copy
from typing import Any

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
    torch.float32: 1e-6,
    torch.float16: 2**-10,
    torch.bfloat16: 2**-7,
}


def assert_matches(
    a: list[Tensor], b: list[Tensor], root: bool = True, reduction: str = "none"
) -> None:
    """Losses and squares, and the gradients of both sides."""
    leaves = [x.detach().requires_grad_() for x in (*a, *b)]
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    n = len(a)
    weights = [0.5 + i for i in range(n)]
    found, squares = _ops.distance_loss(leaves[:n], leaves[n:], weights, root, reduction)
    pairs = zip(doubles[:n], doubles[n:], strict=True)
    square = torch.stack([(x - y).flatten(1).square().sum(1) for x, y in pairs])
    right = (square.sqrt() if root else square).mean(1) * torch.tensor(weights)
    above = torch.linspace(1, 2, n, dtype=torch.float64)
    if reduction == "sum":
        right, above = right.sum(), above[0] * 2
    assert squares.dtype == torch.float64
    torch.testing.assert_close(squares, square, rtol=1e-6, atol=0)
    wide = any(x.dtype == torch.float64 for x in leaves)
    assert found.dtype == (torch.float64 if wide else torch.float32)
    torch.testing.assert_close(found.double(), right.detach(), rtol=1e-6, atol=0)
    above = above.to(found.dtype)
    gradients = torch.autograd.grad(found, leaves, above)
    expected = torch.autograd.grad(right, doubles, above.double())
    for x, g, r in zip(leaves, gradients, expected, strict=True):
        assert g.dtype == x.dtype
        assert g.stride() == torch.empty_like(x).stride()
        assert (g.double() - r).abs().max() <= ROUNDING[g.dtype] * r.abs().max()


@pytest.mark.parametrize(
    "shape", [(3, 1), (1, 7), (4, 3, 8, 8), (2, 5, 9), (2, 3, 2, 3, 2, 2), (1, 70001)], ids=str
)
def test_shapes(backend: str, shape: tuple[int, ...]) -> None:
    assert_matches([torch.randn(shape)], [torch.randn(shape)])


@pytest.mark.parametrize("first", DTYPES, ids=str)
@pytest.mark.parametrize("second", DTYPES, ids=str)
def test_dtypes(backend: str, first: torch.dtype, second: torch.dtype) -> None:
    assert_matches([torch.randn(3, 5, 11).to(first)], [torch.randn(3, 5, 11).to(second)])


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_list(backend: str, root: bool, reduction: str) -> None:
    shapes = [(2, 3, 8, 8), (2, 40), (2, 5, 7), (2, 16, 4, 4)]
    a = [torch.randn(s) for s in shapes]
    a[3] = a[3].half().to(memory_format=torch.channels_last)
    b = [torch.randn_like(x) for x in a]
    b[1] = b[1].double()
    assert_matches(a, b, root, reduction)
    many = [torch.randn(2, 3 + i) for i in range(40)]
    assert_matches(many, [x * 2 for x in many], root, reduction)


def test_a_list_of_samples_that_several_blocks_share(backend: str) -> None:
    a = [torch.randn(2, n) for n in (70001, 20000, 40003)]
    assert_matches(a, [torch.randn_like(x) for x in a])


def views() -> dict[str, Tensor]:
    base = torch.randn(4, 12, 9, 10)
    return {
        "channels_last": base.to(memory_format=torch.channels_last),
        "channel slice": base[:, 2:9],
        "batch step": base[::2],
        "cropped": base[:, :, 1:7, 2:9],
        "transposed": base.transpose(2, 3),
        "batch innermost": torch.randn(12, 9, 10, 4).permute(3, 0, 1, 2),
        "expanded batch": base[:1].expand(4, -1, -1, -1),
        "expanded channels": base[:, :1].expand(-1, 12, -1, -1),
        "unaligned": torch.randn(4 * 12 * 90 + 3)[3:].view(4, 12, 9, 10),
    }


@pytest.mark.parametrize("view", views())
def test_every_stride_pattern(backend: str, view: str) -> None:
    x = views()[view]
    assert_matches([x], [torch.randn(x.shape)])
    assert_matches([torch.randn(x.shape)], [x])
    assert_matches([x], [views()[view] * 2])


def test_nothing_overflows(backend: str) -> None:
    a = torch.full((2, 100), 1e30).requires_grad_()
    b = torch.full((2, 100), -1e30)
    found, squares = _ops.distance_loss([a], [b], [2e-12], True, "sum")
    torch.testing.assert_close(squares, torch.full((1, 2), 4e62, dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor(4e19))
    # Factors too small for fp32 times differences too large for it.
    (g,) = torch.autograd.grad(found, a)
    torch.testing.assert_close(g, torch.full_like(g, 1e-13))
    options = [0], [1e-55], False, "sum"
    (g,) = _ops.distance_loss_backward([a.detach()], [b], squares, torch.ones(()), *options)
    torch.testing.assert_close(g, torch.full_like(g, 2e-25))


def test_the_norm_at_0_has_gradient_0(backend: str) -> None:
    a = torch.randn(3, 40).requires_grad_()
    b = a.detach().clone()
    b[1] += 1
    loss, squares = _ops.distance_loss([a], [b], [], True, "sum")
    assert squares[0, 0] == squares[0, 2] == 0
    torch.testing.assert_close(loss, squares[0, 1].sqrt().float() / 3)
    (g,) = torch.autograd.grad(loss, a)
    assert not g[[0, 2]].any()
    torch.testing.assert_close(g[1], torch.full((40,), -1 / 3 / 40**0.5))


@pytest.mark.parametrize("which", ["second", "both"])
def test_opcheck(backend: str, which: str) -> None:
    a = [torch.randn(2, 3, 4), torch.randn(2, 5).half()]
    b = [torch.randn(2, 3, 4), torch.randn(2, 5)]
    for x in b if which == "second" else a + b:
        x.requires_grad_()
    options = [2.0, 1.0], True, "none"
    opcheck(backend, torch.ops.at_fused.distance_loss, (a, b, *options))
    squares = torch.rand(2, 2, dtype=torch.float64)
    above = torch.randn(2, requires_grad=True)
    arguments = a, b, squares, above, [1, 0], *options
    opcheck(backend, torch.ops.at_fused.distance_loss_backward, arguments)


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradcheck(fast_backend: str, root: bool, reduction: str) -> None:
    tensors = [torch.randn(2, n, dtype=torch.float64, requires_grad=True) for n in (3, 4, 3, 4)]

    def distance(*x: Tensor) -> Tensor:
        loss, _ = _ops.distance_loss(list(x[:2]), list(x[2:]), [2.0, 0.5], root, reduction)
        return loss

    assert torch.autograd.gradcheck(distance, tensors)
    assert torch.autograd.gradgradcheck(distance, tensors)


X = torch.randn(2, 3, 4)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([], [], "as many tensors on both sides"),
        ([X], [X, X], "as many tensors on both sides"),
        ([X], [X[:, :2]], "same shape"),
        ([X], [X[:1]], "same shape"),
        ([X, X[:1]], [X, X[:1]], "same batch size"),
        ([X[:0]], [X[:0]], "empty"),
        ([X.long()], [X], "float16, bfloat16, float32 or float64"),
    ],
)
@pytest.mark.parametrize("name", EVERY)
def test_direct_calls_are_checked(
    name: str, a: list[Tensor], b: list[Tensor], message: str
) -> None:
    with use(name), pytest.raises(RuntimeError, match=message):
        torch.ops.at_fused.distance_loss(a, b, [], True, "sum")
    saved = torch.randn(1, 2, dtype=torch.float64), torch.ones(())
    with use(name), pytest.raises(RuntimeError, match="at_fused"):
        torch.ops.at_fused.distance_loss_backward(a, b, *saved, [0], [], True, "sum")


@pytest.mark.parametrize("name", EVERY)
def test_direct_calls_with_wrong_options(name: str) -> None:
    with use(name), pytest.raises(RuntimeError, match="a weight per pair, got 2 for 1"):
        torch.ops.at_fused.distance_loss([X], [X], [1.0, 2.0], True, "sum")
    with use(name), pytest.raises(RuntimeError, match="reduction must be 'sum' or 'none'"):
        torch.ops.at_fused.distance_loss([X], [X], [], True, "mean")


SQUARES, ONE = torch.rand(1, 2, dtype=torch.float64), torch.ones(())
WRONG: dict[str, tuple[tuple[Any, ...], str]] = {
    "batch": (
        (torch.rand(1, 3).double(), ONE, [0], [], True, "sum"),
        r"squares must be \(pairs, B",
    ),
    "rank": ((torch.rand(2).double(), ONE, [0], [], True, "sum"), r"squares must be \(pairs, B"),
    "dtype": ((torch.rand(1, 2), ONE, [0], [], True, "sum"), r"squares must be .* of float64"),
    "weights": ((SQUARES, ONE, [0], [1.0, 2.0], True, "sum"), "a weight per pair, got 2 for 1"),
    "reduction": ((SQUARES, ONE, [0], [], True, "mean"), "reduction must be"),
    "shape": ((SQUARES, ONE, [0], [], True, "none"), "gradient must have the shape of the loss"),
    "vector": ((SQUARES, ONE[None], [0], [], True, "sum"), "gradient must have the shape"),
    "half": ((SQUARES, ONE.half(), [0], [], True, "sum"), "gradient must be float32 or float64"),
    "count": ((SQUARES, ONE, [0, 0], [], True, "sum"), "a pair number per tensor, got 2 for 1"),
    "number": ((SQUARES, ONE, [1], [], True, "sum"), "pair number 1 is out of range"),
    "below": ((SQUARES, ONE, [-1], [], True, "sum"), "pair number -1 is out of range"),
}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("case", WRONG)
def test_direct_calls_of_the_backward_are_checked(name: str, case: str) -> None:
    arguments, message = WRONG[case]
    with use(name), pytest.raises(RuntimeError, match=message):
        torch.ops.at_fused.distance_loss_backward([X], [X], *arguments)


# ---- features_loss -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["mean", "sum"])
@pytest.mark.parametrize("weights", [None, [1.0, 0.25]], ids=str)
def test_features_loss(backend: str, form: str, weights: list[float] | None) -> None:
    s = [torch.randn(4, 3, 8, 8, requires_grad=True), torch.randn(4, 6, 4, 4, requires_grad=True)]
    t = [torch.randn_like(x) for x in s]
    found = at_fused.features_loss(s, t, weights=weights, form=form)
    parts = [
        F.mse_loss(a.double(), b.double()) * (a[0].numel() if form == "sum" else 1) * w
        for a, b, w in zip(s, t, weights or (1.0, 1.0), strict=True)
    ]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), sum(parts), rtol=1e-6, atol=0)
    for g, r in zip(torch.autograd.grad(found, s), torch.autograd.grad(sum(parts), s), strict=True):
        torch.testing.assert_close(g, r)
    each = at_fused.features_loss(s, t, weights=weights, form=form, reduction="none")
    torch.testing.assert_close(each.double(), torch.stack(parts), rtol=1e-6, atol=0)
    one = at_fused.features_loss(s[0], t[0], form=form)
    torch.testing.assert_close(one.double(), parts[0] / (weights or [1.0])[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_fullgraph(compiler: str) -> None:
    s, t = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)

    def step(s: Tensor, t: Tensor) -> Tensor:
        return 2 * at_fused.features_loss([s * 2, s], [t, t + 1])

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    found, right = compiled(s, t), step(s, t)
    torch.testing.assert_close(found, right)
    torch.testing.assert_close(torch.autograd.grad(found, s), torch.autograd.grad(right, s))


def test_the_module_projects_where_channels_differ() -> None:
    module = at_fused.FeaturesLoss([4, 8], [6, 8])
    s = [torch.randn(2, 4, 5, 5), torch.randn(2, 8, 3, 3)]
    t = [torch.randn(2, 6, 5, 5), torch.randn(2, 8, 3, 3)]
    (weight,) = module.parameters()
    assert weight.shape == (6, 4, 1, 1)
    right = F.mse_loss(F.conv2d(s[0], weight), t[0]) + F.mse_loss(s[1], t[1])
    torch.testing.assert_close(module(s, t), right)
    torch.testing.assert_close(copy.deepcopy(module)(s, t), right)
    module(s, t).backward()
    assert weight.grad.abs().sum() > 0
    single = at_fused.FeaturesLoss(4, 6, form="sum")
    assert single(s[0], t[0]).ndim == 0
    assert "form='sum'" in repr(single)


ERRORS: dict[str, tuple[Any, Any, dict[str, Any], type[Exception], str]] = {
    "not a tensor": (
        X,
        [X],
        {},
        TypeError,
        "both be tensors or both be sequences.*Tensor and list",
    ),
    "a number": (1, 1, {}, TypeError, "student must be a tensor or a list.*got int"),
    "empty list": ([], [], {}, ValueError, "student must not be an empty list"),
    "in the list": ([X, None], [X, X], {}, TypeError, r"student\[1\] must be a tensor.*NoneType"),
    "lengths": ([X, X], [X], {}, ValueError, "same number of tensors, got 2 and 1"),
    "shapes": (X, X[:, :2], {}, ValueError, r"pair 0.*same shape, got \(2, 3, 4\) and \(2, 2, 4\)"),
    "batches": ([X, X[:1]], [X, X[:1]], {}, ValueError, r"same batch size, got 2 and 1 \(pair 1\)"),
    "devices": (X, X.to("meta"), {}, ValueError, "on one device, got cpu, and cpu and meta"),
    "dtype": (X.int(), X, {}, TypeError, "student must be float32.*torch.int32"),
    "rank": (X[0, 0], X[0, 0], {}, ValueError, r"student must have a batch dimension.*\(4,\)"),
    "form": (X, X, {"form": "max"}, ValueError, "form must be 'mean' or 'sum', got 'max'"),
    "reduction": (X, X, {"reduction": 1}, ValueError, "reduction must be.*got 1"),
    "weights": (X, X, {"weights": [1, 2]}, ValueError, "weights.*got 2 for 1 pairs"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    student, teacher, options, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        at_fused.features_loss(student, teacher, **options)


@pytest.mark.parametrize(
    ("channels", "error", "message"),
    [
        ((4, [6]), TypeError, "both be ints or both be sequences, got int and list"),
        (([4], [6, 7]), ValueError, "same length, got 1 and 2"),
        (([], []), ValueError, "student_channels must not be an empty list"),
        ((0, 6), ValueError, "student_channels must be >= 1, got 0"),
        ((4, 6.0), TypeError, "teacher_channels must be an int.*got float"),
    ],
    ids=str,
)
def test_errors_of_the_module(channels: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        at_fused.FeaturesLoss(*channels)


def test_a_list_of_another_length_than_the_modules() -> None:
    with pytest.raises(ValueError, match=r"student must have 1 features.*got 2"):
        at_fused.FeaturesLoss([3], [3])([X[..., None]] * 2, [X[..., None]] * 2)
    assert isinstance(at_fused.FeaturesLoss(3, 3).projections[0], nn.Identity)
