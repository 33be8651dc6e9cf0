"""Forward-mode AD, ``torch.func`` and its mixtures with autograd, against finite differences.

torch's rules for these are those of its own operators: plain PyTorch runs there, so that one back
end serves for the numbers. A custom operator without such a rule would have a derivative of 0,
without a word: the last two tests call every operator on every back end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from matrix import crossed
from reference import expected_loss, feature
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

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
    "channel": loss(attend="channel"),
    "signed": loss(absolute=False, p=3.0),
    "tokens": loss_of_tokens,
    "a list": lambda x: at_fused.at_loss([x, x * x], [T, x + T], reduction="none"),
    "map": map_of(),
    "map of maxima": map_of(collapse="max", p=4.0),
    "map of channels": map_of(attend="channel", p=1.5),
    "normalised map": map_of(normalize=True, eps_mode="add"),
    "at": at_fused.at,
    "map_loss": lambda x: at_fused.map_loss(x.square().mean(1), Q, form="paper"),
    "map_loss of samples": lambda x: at_fused.map_loss(
        at_fused.attention_map(x), Q, reduction="sample"
    ),
    "tap": tap(),
    "tap of maxima": tap(collapse="max"),
    "tap of channels": tap(attend="channel"),
    "authors": lambda x: compat.authors_at_loss(x, T),
    "paper's": lambda x: compat.paper_at_loss(x, T, beta=3.0),
    "mdistiller": lambda x: compat.mdistiller_at_loss([x], [T]),
}
# Without a graph: these have no second derivative.
GIVEN_GRADIENTS: dict[str, Function] = {
    "value": lambda x: at_fused.at_value_and_grad(x, T, form="paper")[0],
    "gradient": lambda x: at_fused.at_value_and_grad(x, T)[1],
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


@pytest.mark.parametrize("name", FUNCTIONS)
def test_checkpoint(name: str) -> None:
    x = feature(2, 3, 4, 4).requires_grad_()
    y, again = FUNCTIONS[name](x), checkpoint(FUNCTIONS[name], x, use_reentrant=False)
    right, found = (torch.autograd.grad(z.sum(), x)[0] for z in (y, again))
    assert torch.equal(found, right)


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


def test_gradients_of_samples() -> None:
    """As for per-sample gradients of parameters: a batch of one in each."""
    layer = nn.Conv2d(3, 5, 3).double()
    images, t = feature(4, 3, 6, 6), feature(4, 7, 4, 4)
    parameters = dict(layer.named_parameters())

    def loss(parameters: dict[str, Tensor], image: Tensor, teacher: Tensor) -> Tensor:
        y = torch.func.functional_call(layer, parameters, (image[None],))
        return at_fused.at_loss(y, teacher[None])

    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, images, t)
    for i in range(4):
        one = at_fused.at_loss(layer(images[i : i + 1]), t[i : i + 1])
        right = torch.autograd.grad(one, [*layer.parameters()])
        for name, r in zip(parameters, right, strict=True):
            torch.testing.assert_close(found[name][i], r, rtol=1e-9, atol=1e-13)


def test_a_tangent_of_the_losss_gradient() -> None:
    """The gradient of a graph made before is linear in what comes from above."""
    x, t = feature(2, 3, 4, 4).requires_grad_(), feature(2, 3, 4, 4)
    loss = at_fused.at_loss(x, t, reduction="none")
    (right,) = torch.autograd.grad(loss, x, torch.ones_like(loss), retain_graph=True)
    with forward_ad.dual_level():
        above = forward_ad.make_dual(torch.ones_like(loss), torch.full_like(loss, -3.0))
        (found,) = torch.autograd.grad(loss, x, above)
        assert_close(forward_ad.unpack_dual(found).tangent, -3 * right)


def test_a_network_with_attention_transfer() -> None:
    """Through the taps of AttentionTransfer, along a direction of the parameters."""
    student, teacher = nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Sequential(nn.Conv2d(3, 6, 3))
    student.double().requires_grad_(False), teacher.double()
    x = feature(2, 3, 6, 6)
    transfer = at_fused.AttentionTransfer(student, teacher, ["0"], beta=10.0)

    def f(weight: Tensor) -> Tensor:
        torch.func.functional_call(student, {"0.weight": weight}, (x,))
        return transfer(x)

    weight = student[0].weight.detach()
    v = torch.randn_like(weight)
    right = differences(f, weight, v)
    assert_close(torch.func.jvp(f, (weight,), (v,))[1], right)
    with forward_ad.dual_level():
        dual = f(forward_ad.make_dual(weight, v))
        assert_close(forward_ad.unpack_dual(dual).tangent, right)


COMPILED = ("plain", "map", "map_loss", "tap")
COMPILERS = ("aot_eager", "eager")


@crossed(name=COMPILED, compiler=COMPILERS)
def test_compiled(name: str, compiler: str) -> None:
    """torch.compile of a transform, and a transform of what was compiled."""
    f, (x, v) = FUNCTIONS[name], point()
    right = differences(f, x, v)
    torch._dynamo.reset()
    compiled = torch.compile(f, backend=compiler)
    assert_close(torch.func.jvp(compiled, (x,), (v,))[1], right)
    whole = torch.compile(lambda x, v: torch.func.jvp(f, (x,), (v,))[1], backend=compiler)
    assert_close(whole(x, v), right)


@crossed(name=(*COMPILED, *GIVEN_GRADIENTS), compiler=COMPILERS)
def test_compiled_vmap(name: str, compiler: str) -> None:
    f, xs = ALL[name], torch.stack(point())
    torch._dynamo.reset()
    mapped = torch.compile(torch.func.vmap(f), backend=compiler, fullgraph=True)
    torch.testing.assert_close(mapped(xs), torch.stack([f(x) for x in xs]))


# ---- every operator of every back end ------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"form": "paper", "p": 1.5}, {"collapse": "max"}], ids=str)
def test_the_formula_itself(backend: str, options: dict[str, Any]) -> None:
    """Whole Jacobians and Hessians against those of the formula written out."""
    x, t = feature(2, 2, 3, 2), feature(2, 3, 3, 2)

    def ours(x: Tensor) -> Tensor:
        return at_fused.at_loss(x, t, reduction="sample", **options)[0]

    def lines(x: Tensor) -> Tensor:
        return expected_loss(x, t, **options)

    close = {"rtol": 1e-9, "atol": 1e-13}
    jacfwd, jacrev, hessian = torch.func.jacfwd, torch.func.jacrev, torch.func.hessian
    torch.testing.assert_close(jacfwd(ours)(x), jacrev(lines)(x), **close)
    torch.testing.assert_close(jacrev(ours)(x), jacfwd(lines)(x), **close)
    torch.testing.assert_close(hessian(ours)(x), jacrev(jacrev(lines))(x), **close)


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
