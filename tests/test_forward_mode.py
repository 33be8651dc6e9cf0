"""Forward-mode AD, ``torch.func`` and its mixtures with autograd, against finite differences.

torch's rules for these are those of its own operators: plain PyTorch runs there, on every back end.
A custom operator without such a rule would have a derivative of 0, without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import EVERY, slow, use
from reference import expected_loss
from test_method import feature
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import at_fused
from at_fused import compat

# The package's functions of one feature (B, C, H, W) with C = 3, H = W = 4.
Function = Callable[[Tensor], Tensor]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "paper": {"form": "paper", "collapse": "sum", "p": 3.0},
    "max": {"collapse": "max"},
    "sample": {"reduction": "sample", "eps_mode": "add", "eps": 0.2},
    "mask": {"mask": True},
    "maps": {"resize": "maps"},
    "features": {"resize": "features"},
    "channel": {"attend": "channel"},
    "signed": {"absolute": False, "p": 3.0},
}


def functions() -> dict[str, Function]:
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    t, small, tokens = randn(2, 3, 4, 4), randn(2, 3, 3, 2), randn(2, 17, 5)
    mask = torch.rand(2, 4, 4, generator=generator) > 0.3
    q = randn(2, 4, 4).abs()
    found: dict[str, Function] = {}
    for name, options in OPTIONS.items():
        given = dict(options)
        if "mask" in given:
            given["mask"] = mask
        teacher = small if "resize" in given else t
        found[name] = lambda x, y=teacher, o=given: at_fused.at_loss(x, y, **o)

    def of_tokens(x: Tensor) -> Tensor:
        student = torch.cat([x[:, :, 0, :1].mT, x.flatten(2).mT], 1)
        return at_fused.at_loss(student, tokens, channel_dim=-1, skip_tokens=1)

    def tap(x: Tensor, **options: Any) -> Tensor:
        y, q = at_fused.attention_tap(x * 1, **options)
        return (q.square() * 3).sum() + (y * t).sum()

    return found | {
        "tokens": of_tokens,
        "a list": lambda x: at_fused.at_loss([x, x * x], [t, x + t], reduction="none"),
        "map": at_fused.attention_map,
        "map of maxima": lambda x: at_fused.attention_map(x, collapse="max", p=4.0),
        "map of channels": lambda x: at_fused.attention_map(x, attend="channel", p=1.5),
        "normalised map": lambda x: at_fused.attention_map(x, normalize=True, eps_mode="add"),
        "at": at_fused.at,
        "map_loss": lambda x: at_fused.map_loss(x.square().mean(1), q, form="paper"),
        "map_loss of samples": lambda x: at_fused.map_loss(
            at_fused.attention_map(x), q, reduction="sample"
        ),
        "tap": tap,
        "tap of maxima": lambda x: tap(x, collapse="max"),
        "tap of channels": lambda x: tap(x, attend="channel"),
        "authors": lambda x: compat.authors_at_loss(x, t),
        "paper's": lambda x: compat.paper_at_loss(x, t, beta=3.0),
        "mdistiller": lambda x: compat.mdistiller_at_loss([x], [t]),
        "value": lambda x: at_fused.at_value_and_grad(x, t, form="paper")[0],
        "gradient": lambda x: at_fused.at_value_and_grad(x, t)[1],
    }


FUNCTIONS = functions()


def differences(f: Function, x: Tensor, v: Tensor) -> Tensor:
    """The derivative along v, to 1e-9."""
    step = 1e-5
    return (f(x + step * v) - f(x - step * v)) / (2 * step)


def assert_close(found: Tensor, right: Tensor) -> None:
    assert right.any()
    assert (found - right).abs().max() <= 1e-6 * right.abs().max()


def point() -> tuple[Tensor, Tensor]:
    return feature(2, 3, 4, 4), feature(2, 3, 4, 4)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_jacobian_vector_products(backend: str, name: str) -> None:
    f, (x, v) = FUNCTIONS[name], point()
    right = differences(f, x, v)
    value, found = torch.func.jvp(f, (x,), (v,))
    torch.testing.assert_close(value, f(x), rtol=1e-11, atol=1e-14)
    assert_close(found, right)
    with forward_ad.dual_level():
        dual = f(forward_ad.make_dual(x, v))
        assert_close(forward_ad.unpack_dual(dual).tangent, right)
    if not slow(backend):
        _, linear = torch.func.linearize(f, x)
        assert_close(linear(v), right)


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n not in ("value", "gradient")])
def test_hessian_vector_products(backend: str, name: str) -> None:
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


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n not in ("value", "gradient")])
def test_checkpoint(backend: str, name: str) -> None:
    x = feature(2, 3, 4, 4).requires_grad_()
    y, again = FUNCTIONS[name](x), checkpoint(FUNCTIONS[name], x, use_reentrant=False)
    right, found = (torch.autograd.grad(z.sum(), x)[0] for z in (y, again))
    assert torch.equal(found, right)


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


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vmap(backend: str, name: str) -> None:
    f = FUNCTIONS[name]
    xs = feature(3, 2, 3, 4, 4)
    right = torch.stack([f(x) for x in xs])
    torch.testing.assert_close(torch.func.vmap(f)(xs), right, rtol=1e-11, atol=1e-14)
    if name in ("value", "gradient"):
        return
    gradients = torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(xs)
    for x, found in zip(xs, gradients, strict=True):
        leaf = x.clone().requires_grad_()
        (right,) = torch.autograd.grad(f(leaf).sum(), leaf)
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-13)


def test_gradients_of_samples(backend: str) -> None:
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


def test_a_tangent_of_the_losss_gradient(backend: str) -> None:
    """The gradient of a graph made before is linear in what comes from above."""
    x, t = feature(2, 3, 4, 4).requires_grad_(), feature(2, 3, 4, 4)
    loss = at_fused.at_loss(x, t, reduction="none")
    (right,) = torch.autograd.grad(loss, x, torch.ones_like(loss), retain_graph=True)
    with forward_ad.dual_level():
        above = forward_ad.make_dual(torch.ones_like(loss), torch.full_like(loss, -3.0))
        (found,) = torch.autograd.grad(loss, x, above)
        assert_close(forward_ad.unpack_dual(found).tangent, -3 * right)


def test_a_network_with_attention_transfer(backend: str) -> None:
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


@pytest.mark.parametrize("backend_of_dynamo", ["eager", "aot_eager"])
def test_compiled(backend_of_dynamo: str) -> None:
    """torch.compile of a transform, and a transform of what was compiled."""
    x, v = point()
    for name in ("plain", "map", "map_loss", "tap"):
        f = FUNCTIONS[name]
        right = differences(f, x, v)
        torch._dynamo.reset()
        compiled = torch.compile(f, backend=backend_of_dynamo)
        assert_close(torch.func.jvp(compiled, (x,), (v,))[1], right)
        torch._dynamo.reset()

        def whole(x: Tensor, v: Tensor, f: Function = f) -> Tensor:
            return torch.func.jvp(f, (x,), (v,))[1]

        assert_close(torch.compile(whole, backend=backend_of_dynamo)(x, v), right)
    xs = torch.stack([x, v])
    for name in ("plain", "map", "map_loss", "tap", "value", "gradient"):
        torch._dynamo.reset()
        options = {"backend": backend_of_dynamo, "fullgraph": True}
        compiled = torch.compile(torch.func.vmap(FUNCTIONS[name]), **options)
        torch.testing.assert_close(compiled(xs), torch.stack([FUNCTIONS[name](x) for x in xs]))


@pytest.mark.parametrize("name", EVERY)
def test_the_operators_themselves(name: str) -> None:
    """torch.ops.at_fused.*, as a compiled or exported graph calls them."""
    x, v = point()
    t, k = feature(2, 5, 4, 4), feature(2, 16)
    ops, rest = torch.ops.at_fused, ("code", "sum", "max", 1e-12)
    q = at_fused.attention_map(t).flatten(1)

    def at_loss(x: Tensor) -> Tensor:
        options = [], [], [], 2.0, "mean", *rest
        return ops.at_loss([x], [t], *options, False, False)[0]

    called: dict[str, Function] = {
        "at_loss": at_loss,
        "attention_map": lambda x: ops.attention_map([x], 3.0, "sum")[0],
        "attention_map_backward": lambda x: ops.attention_map_backward(
            [x], [k], None, [0], 3.0, [], []
        )[0],
        "attention_tap_backward": lambda x: ops.attention_tap_backward(x * 2, x, k, 3.0, "mean"),
        "map_loss": lambda x: ops.map_loss(
            [x.square().mean(1).flatten(1)], [q], [], *rest, False, False
        )[0],
    }
    with use(name):
        for f in called.values():
            assert_close(torch.func.jvp(f, (x,), (v,))[1], differences(f, x, v))
            xs = torch.stack([x, v])
            torch.testing.assert_close(torch.func.vmap(f)(xs), torch.stack([f(x), f(v)]))
    # Written in place, a gradient has no rule: it says so.
    with use(name), forward_ad.dual_level(), pytest.raises(RuntimeError, match="no derivative"):
        ops.attention_tap_backward_(forward_ad.make_dual(x, v), x, k, 3.0, "mean")
