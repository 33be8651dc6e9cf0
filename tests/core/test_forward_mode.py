"""Forward-mode AD, ``torch.func`` and its mixtures with autograd, against finite differences.

torch's rules for these are those of its own operators: plain PyTorch runs there, so that one back
end serves for the numbers. A custom operator without such a rule would have a derivative of 0,
without a word: the last test calls every operator on every back end.
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

# The package's functions of one feature (B, C, H, W) with C = 3, H = W = 4.
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
# Without a graph: these have no second derivative.
GIVEN_GRADIENTS: dict[str, Function] = {
    "value": lambda x: at_fused.at_value_and_grad(x, T, form="paper")[0],
    "gradient": lambda x: at_fused.at_value_and_grad(x, T)[1],
    "value by autograd": lambda x: at_fused.at_value_and_grad(x, T, collapse="max")[0],
    "gradient by autograd": lambda x: at_fused.at_value_and_grad(x, T, attend="channel")[1],
}
ALL = FUNCTIONS | GIVEN_GRADIENTS


def differences(f: Function, x: Tensor, v: Tensor) -> Tensor:
    """The derivative along v, to 1e-9."""
    step = 1e-5
    return (f(x + step * v) - f(x - step * v)) / (2 * step)


def assert_close(found: Tensor, right: Tensor) -> None:
    assert right.any()
    assert (found - right).abs().max() <= 1e-6 * right.abs().max()


def point() -> tuple[Tensor, Tensor]:
    return feature(2, 3, 4, 4), feature(2, 3, 4, 4)


@pytest.mark.parametrize("name", ALL)
def test_jacobian_vector_products(name: str) -> None:
    f, (x, v) = ALL[name], point()
    right = differences(f, x, v)
    value, found = torch.func.jvp(f, (x,), (v,))
    torch.testing.assert_close(value, f(x), rtol=1e-11, atol=1e-14)
    assert_close(found, right)
    with forward_ad.dual_level():
        dual = f(forward_ad.make_dual(x, v))
        assert_close(forward_ad.unpack_dual(dual).tangent, right)
    _, linear = torch.func.linearize(f, x)
    assert_close(linear(v), right)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_hessian_vector_products(name: str) -> None:
    """Forward over reverse, reverse over forward, reverse over reverse, and autograd twice."""
    x, v = point()
    weight = torch.linspace(1, 2, FUNCTIONS[name](x).numel(), dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        return (FUNCTIONS[name](x).flatten() * weight).sum()

    def by_autograd(x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(f(leaf), leaf)[0]

    grad = torch.func.grad(f)
    right = differences(by_autograd, x, v)
    torch.testing.assert_close(grad(x), by_autograd(x), rtol=1e-9, atol=1e-13)
    assert_close(torch.func.jvp(grad, (x,), (v,))[1], right)
    assert_close(torch.func.grad(lambda y: torch.func.jvp(f, (y,), (v,))[1])(x), right)
    assert_close(torch.func.grad(lambda y: (grad(y) * v).sum())(x), right)
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
    assert_close(torch.autograd.grad(first, leaf, v)[0], right)
    # A gradient of duals: forward over autograd's reverse.
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone().requires_grad_(), v)
        (first,) = torch.autograd.grad(f(dual), dual)
        assert_close(forward_ad.unpack_dual(first).tangent, right)


@pytest.mark.parametrize("name", ALL)
def test_vmap(name: str) -> None:
    f = ALL[name]
    xs = feature(3, 2, 3, 4, 4)
    right = torch.stack([f(x) for x in xs])
    torch.testing.assert_close(torch.func.vmap(f)(xs), right, rtol=1e-11, atol=1e-14)
    if name in GIVEN_GRADIENTS:
        return
    gradients = torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(xs)
    for x, found in zip(xs, gradients, strict=True):
        leaf = x.clone().requires_grad_()
        (right,) = torch.autograd.grad(f(leaf).sum(), leaf)
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-13)


COMPILED = ("plain", "map", "map_loss", "tap")
COMPILERS = ("aot_eager", "eager")


@crossed(name=(*COMPILED, *GIVEN_GRADIENTS), compiler=COMPILERS)
def test_compiled(name: str, compiler: str) -> None:
    """torch.compile of transforms, and a transform of what was compiled."""
    f, (x, v) = ALL[name], point()
    right, xs = differences(f, x, v), torch.stack([x, v])
    torch._dynamo.reset()
    mapped = torch.compile(torch.func.vmap(f), backend=compiler, fullgraph=True)
    torch.testing.assert_close(mapped(xs), torch.stack([f(x) for x in xs]))
    if name in COMPILED:
        compiled = torch.compile(f, backend=compiler)
        assert_close(torch.func.jvp(compiled, (x,), (v,))[1], right)
        whole = torch.compile(lambda x, v: torch.func.jvp(f, (x,), (v,))[1], backend=compiler)
        assert_close(whole(x, v), right)


# ---- every operator of every back end ------------------------------------------------------------


def test_the_operators_themselves(backend: str) -> None:
    """torch.ops.at_fused.*, as a compiled or exported graph calls them."""
    x, v = point()
    t, k = feature(2, 5, 4, 4), feature(2, 16)
    ops, rest = torch.ops.at_fused, ("code", "sum", "max", 1e-12)
    q = at_fused.attention_map(t).flatten(1)
    of_loss = [t], [], [], [], 2.0, "mean", *rest

    def of_maps(x: Tensor) -> Tensor:
        raw = [x.square().mean(1).flatten(1)]
        return ops.map_loss(raw, [q], [], *rest, False, False)[0]

    called: list[Function] = [
        lambda x: ops.at_loss([x], *of_loss, False, False)[0],
        lambda x: ops.at_value_and_grad([x], *of_loss, 1.0, None)[1][0],
        lambda x: ops.attention_map([x], 3.0, "sum")[0],
        lambda x: ops.attention_map_backward([x], [k], None, [0], 3.0, [], [])[0],
        lambda x: ops.attention_tap_backward(x * 2, x, k, 3.0, "mean"),
        of_maps,
    ]
    for f in called:
        assert_close(torch.func.jvp(f, (x,), (v,))[1], differences(f, x, v))
        xs = torch.stack([x, v])
        torch.testing.assert_close(torch.func.vmap(f)(xs), torch.stack([f(x), f(v)]))
    # Written in place, a gradient has no rule: it says so.
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no derivative"):
        ops.attention_tap_backward_(forward_ad.make_dual(x, v), x, k, 3.0, "mean")
