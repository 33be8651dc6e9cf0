"""Forward-mode AD and ``torch.func``, also mixed with autograd, against finite differences.

at_fused runs plain PyTorch under these, so most tests need one back end only. Without a rule for
them a custom operator would silently have a derivative of 0. The last test therefore calls every
operator on every back end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from matrix import crossed
from reference import feature
from torch import Tensor
from torch.autograd import forward_ad

import at_fused
from at_fused import compat

# A function of one feature (2, 3, 4, 4).
Function = Callable[[Tensor], Tensor]
GENERATOR = torch.Generator().manual_seed(1)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


T, SMALL, TOKENS, Q = randn(2, 3, 4, 4), randn(2, 3, 3, 2), randn(2, 17, 5), randn(2, 4, 4).abs()


def loss(teacher: Tensor = T, **options: Any) -> Function:
    return lambda x: at_fused.at_loss(x, teacher, **options)


def map_of(**options: Any) -> Function:
    return lambda x: at_fused.attention_map(x, **options)


def tap(**options: Any) -> Function:
    def tapped(x: Tensor) -> Tensor:
        y, q = at_fused.attention_tap(x * 1, **options)
        return (q.square() * 3).sum() + (y * T).sum()

    return tapped


def loss_of_tokens(x: Tensor) -> Tensor:
    student = torch.cat([x[:, :, 0, :1].mT, x.flatten(2).mT], 1)
    return at_fused.at_loss(student, TOKENS, channel_dim=-1, skip_tokens=1)


FUNCTIONS: dict[str, Function] = {
    "plain": loss(),
    "paper": loss(form="paper", collapse="sum", p=3.0),
    "max": loss(collapse="max"),
    "sample": loss(reduction="sample", eps_mode="add", eps=0.2),
    "mask": loss(mask=Q > 0.4),
    "maps": loss(SMALL, resize="maps"),
    "features": loss(SMALL, resize="features"),
    "signed": loss(absolute=False, p=3.0),
    "tokens": loss_of_tokens,
    "a list": lambda x: at_fused.at_loss([x, x * x], [T, x + T], reduction="none"),
    "map of maxima": map_of(collapse="max", p=4.0),
    "map": map_of(attend="channel", p=1.5),
    "normalised map": map_of(normalize=True, eps_mode="add"),
    "map_loss": lambda x: at_fused.map_loss(x.square().mean(1), Q, form="paper"),
    "tap": tap(),
    "tap of channels": tap(attend="channel"),
    "paper's": lambda x: compat.paper_at_loss(x, T, beta=3.0),
    "mdistiller": lambda x: compat.mdistiller_at_loss([x], [T]),
}
# These return gradients without a graph, so they have no second derivative.
WITHOUT_GRAPH: dict[str, Function] = {
    "value": lambda x: at_fused.at_value_and_grad(x, T, form="paper")[0],
    "gradient": lambda x: at_fused.at_value_and_grad(x, T)[1],
    "value by autograd": lambda x: at_fused.at_value_and_grad(x, T, collapse="max")[0],
    "gradient by autograd": lambda x: at_fused.at_value_and_grad(x, T, attend="channel")[1],
}
ALL = FUNCTIONS | WITHOUT_GRAPH


def finite_difference(f: Function, x: Tensor, v: Tensor) -> Tensor:
    """Compute the derivative along v up to 1e-9."""
    step = 1e-5
    return (f(x + step * v) - f(x - step * v)) / (2 * step)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert expected.any()
    assert (actual - expected).abs().max() <= 1e-6 * expected.abs().max()


def point_and_direction() -> tuple[Tensor, Tensor]:
    return feature(2, 3, 4, 4), feature(2, 3, 4, 4)


@pytest.mark.parametrize("name", ALL)
def test_jacobian_vector_products(name: str) -> None:
    f, (x, v) = ALL[name], point_and_direction()
    expected = finite_difference(f, x, v)
    value, tangent = torch.func.jvp(f, (x,), (v,))
    torch.testing.assert_close(value, f(x), rtol=1e-11, atol=1e-14)
    assert_close(tangent, expected)
    with forward_ad.dual_level():
        dual = f(forward_ad.make_dual(x, v))
        assert_close(forward_ad.unpack_dual(dual).tangent, expected)
    _, linear = torch.func.linearize(f, x)
    assert_close(linear(v), expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_hessian_vector_products(name: str) -> None:
    """Check forward over reverse, reverse over forward and over reverse, and double backward."""
    x, v = point_and_direction()
    weight = torch.linspace(1, 2, FUNCTIONS[name](x).numel(), dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        return (FUNCTIONS[name](x).flatten() * weight).sum()

    def by_autograd(x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(f(leaf), leaf)[0]

    grad = torch.func.grad(f)
    expected = finite_difference(by_autograd, x, v)
    torch.testing.assert_close(grad(x), by_autograd(x), rtol=1e-9, atol=1e-13)
    assert_close(torch.func.jvp(grad, (x,), (v,))[1], expected)
    assert_close(torch.func.grad(lambda y: torch.func.jvp(f, (y,), (v,))[1])(x), expected)
    assert_close(torch.func.grad(lambda y: (grad(y) * v).sum())(x), expected)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
    assert_close(torch.autograd.grad(gradient, leaf, v)[0], expected)
    # Forward mode over autograd's reverse mode.
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone().requires_grad_(), v)
        (gradient,) = torch.autograd.grad(f(dual), dual)
        assert_close(forward_ad.unpack_dual(gradient).tangent, expected)


@pytest.mark.parametrize("name", ALL)
def test_vmap(name: str) -> None:
    f = ALL[name]
    xs = feature(3, 2, 3, 4, 4)
    expected = torch.stack([f(x) for x in xs])
    torch.testing.assert_close(torch.func.vmap(f)(xs), expected, rtol=1e-11, atol=1e-14)
    if name in WITHOUT_GRAPH:
        return
    gradients = torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(xs)
    for x, gradient in zip(xs, gradients, strict=True):
        leaf = x.clone().requires_grad_()
        expected = torch.autograd.grad(f(leaf).sum(), leaf)[0]
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-13)


COMPILED = ("plain", "map", "map_loss", "tap")
COMPILERS = ("aot_eager", "eager")


@crossed(name=(*COMPILED, *WITHOUT_GRAPH), compiler=COMPILERS)
def test_transforms_and_torch_compile(name: str, compiler: str) -> None:
    """Compile transforms, and transform compiled functions."""
    f, (x, v) = ALL[name], point_and_direction()
    expected, xs = finite_difference(f, x, v), torch.stack([x, v])
    torch._dynamo.reset()
    mapped = torch.compile(torch.func.vmap(f), backend=compiler, fullgraph=True)
    torch.testing.assert_close(mapped(xs), torch.stack([f(x) for x in xs]))
    if name in COMPILED:
        compiled = torch.compile(f, backend=compiler)
        assert_close(torch.func.jvp(compiled, (x,), (v,))[1], expected)
        compiled = torch.compile(lambda x, v: torch.func.jvp(f, (x,), (v,))[1], backend=compiler)
        assert_close(compiled(x, v), expected)


# ---- every operator of every back end ------------------------------------------------------------


def test_operators_in_forward_mode(backend: str) -> None:
    """Compiled and exported graphs call torch.ops.at_fused.* directly."""
    x, v = point_and_direction()
    t, k = feature(2, 5, 4, 4), feature(2, 16)
    ops, options = torch.ops.at_fused, ("code", "sum", "max", 1e-12)
    q = at_fused.attention_map(t).flatten(1)
    loss_arguments = [t], [], [], [], 2.0, "mean", *options

    def map_loss(x: Tensor) -> Tensor:
        raw = [x.square().mean(1).flatten(1)]
        return ops.map_loss(raw, [q], [], *options, False, False)[0]

    functions: list[Function] = [
        lambda x: ops.at_loss([x], *loss_arguments, False, False)[0],
        lambda x: ops.at_value_and_grad([x], *loss_arguments, 1.0, None)[1][0],
        lambda x: ops.attention_map([x], 3.0, "sum")[0],
        lambda x: ops.attention_map_backward([x], [k], None, [0], 3.0, [], [])[0],
        lambda x: ops.attention_tap_backward(x * 2, x, k, 3.0, "mean"),
        map_loss,
    ]
    for f in functions:
        assert_close(torch.func.jvp(f, (x,), (v,))[1], finite_difference(f, x, v))
        xs = torch.stack([x, v])
        torch.testing.assert_close(torch.func.vmap(f)(xs), torch.stack([f(x), f(v)]))
    # The in-place operator has no rule, so it must raise.
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no derivative"):
        ops.attention_tap_backward_(forward_ad.make_dual(x, v), x, k, 3.0, "mean")
