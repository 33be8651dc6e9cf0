"""Programs exported or traced without ``requires_grad`` and run with it, and ``at_value_and_grad``.

Such a program calls the operator with no gradients requested. The operator must compute them
anyway, or the loss would silently have a gradient of 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from matrix import crossed
from reference import UNFUSED
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import at_fused

Function = Callable[[Tensor, Tensor], Tensor]


def tap_loss(s: Tensor, t: Tensor) -> Tensor:
    y, q = at_fused.attention_tap(s)
    return at_fused.map_loss(q, at_fused.attention_map(t), form="paper") + y.square().mean()


def token_loss(s: Tensor, t: Tensor) -> Tensor:
    s, t = (x.flatten(2).transpose(1, 2) for x in (s, t))
    return at_fused.at_loss(s, t, channel_dim=-1, skip_tokens=2)


PROGRAMS: dict[str, Function] = {
    "plain": lambda s, t: at_fused.at_loss(s, t),
    "a list": lambda s, t: at_fused.at_loss([s, s * 2], [t, t], form="paper"),
    "mask": lambda s, t: at_fused.at_loss(s, t, mask=t[:, 0] > 0, eps_mode="add"),
    "samples": lambda s, t: at_fused.at_loss(s, t, reduction="sample").square().sum(),
    "tokens": token_loss,
    "max": lambda s, t: at_fused.at_loss(s, t, collapse="max"),
    "maps": lambda s, t: at_fused.map_loss(at_fused.attention_map(s), at_fused.attention_map(t)),
    "map_loss": lambda s, t: at_fused.map_loss(s.square().mean(1), t.square().mean(1)),
    "at": lambda s, t: (at_fused.at(s) - at_fused.at(t)).square().mean(),
    "tap": tap_loss,
}


class Module(nn.Module):
    """A function as a module for torch.export."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, s: Tensor, t: Tensor) -> Tensor:
        return self.function(s, t)


def export(function: Function, s: Tensor, t: Tensor) -> Any:
    return torch.export.export(Module(function), (s, t)).module()


TRACERS: dict[str, Callable[[Function, Tensor, Tensor], Any]] = {
    "export": export,
    "make_fx": lambda function, s, t: make_fx(function)(s, t),
    "make_fx fake": lambda function, s, t: make_fx(function, tracing_mode="fake")(s, t),
}


@crossed(name=PROGRAMS, tracer=TRACERS)
def test_gradients_of_programs_traced_without_gradients(name: str, tracer: str) -> None:
    function = PROGRAMS[name]
    program = TRACERS[tracer](function, torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4))
    s, t = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    for flags in ((True, False), (False, True), (True, True)):
        leaves = [x.detach().requires_grad_(flag) for x, flag in zip((s, t), flags, strict=True)]
        inputs = [x for x in leaves if x.requires_grad]
        losses = program(*leaves), function(*leaves)
        torch.testing.assert_close(*losses)
        actual, expected = (torch.autograd.grad(loss, inputs) for loss in losses)
        for g, e in zip(actual, expected, strict=True):
            assert e.any()
            torch.testing.assert_close(g, e)
    with torch.no_grad():
        assert not program(s, t).requires_grad


@pytest.mark.parametrize("name", PROGRAMS)
def test_second_derivative_of_a_traced_gradient(name: str) -> None:
    """The trace contains the backward pass, which must be differentiable too."""

    def gradient(s: Tensor, t: Tensor) -> Tensor:
        leaf = s * 1 if s.requires_grad else (s * 1).requires_grad_()
        return torch.autograd.grad(PROGRAMS[name](leaf, t), leaf, create_graph=s.requires_grad)[0]

    s, t = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    program = make_fx(gradient)(s, t)
    torch.testing.assert_close(program(s, t), gradient(s, t))
    s.requires_grad_()
    gradients = program(s, t), gradient(s, t)
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(*(torch.autograd.grad(g.square().sum(), s)[0] for g in gradients))


# ---- at_value_and_grad ---------------------------------------------------------------------------

TOKENS = {"channel_dim": -1, "skip_tokens": 1}
MASK, WEIGHTS = torch.rand(2, 12), torch.tensor([0.5, 3.0])
# Without a fused path at_value_and_grad cannot be part of a graph.
FUSED_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tokens": TOKENS,
    "tokens, masks": TOKENS | {"mask": MASK, "reduction": "none"},
    "weights": {"sample_weights": WEIGHTS},
    "weights, none": {"sample_weights": WEIGHTS, "reduction": "none", "weights": [0.5, 2.0]},
    "none": {"reduction": "none", "eps_mode": "add", "eps": 0.1},
    "sample": {"reduction": "sample", "form": "paper"},
}
UNFUSED_CASES: dict[str, dict[str, Any]] = UNFUSED | {
    "channel": {"attend": "channel"},
    "both, maps": {"attend": "both", "resize": "maps"},
    "tokens, max": TOKENS | {"collapse": "max"},
    "tokens, both": TOKENS | {"attend": "both"},
    "weights, max": {"sample_weights": WEIGHTS, "collapse": "max"},
}
CASES = FUSED_CASES | UNFUSED_CASES


def make_features(options: dict[str, Any]) -> list[Tensor]:
    """Make features of two students and two teachers."""
    if "channel_dim" in options:
        return [*torch.randn(4, 2, 13, 5)]
    sizes = (4, 4, 3, 3) if "resize" in options else (4, 4, 4, 4)
    return [torch.randn(2, 5, n, 4) for n in sizes]


def value_and_grad(options: dict[str, Any], scale: Any = 3.0) -> Callable[..., Any]:
    def compute(*features: Tensor) -> Any:
        factor = scale(features[0]) if callable(scale) else scale
        return at_fused.at_value_and_grad(features[:2], features[2:], scale=factor, **options)

    return compute


def assert_matches(result: Any, features: list[Tensor], options: dict[str, Any]) -> None:
    value, gradients = result
    leaves = [x.detach().clone().requires_grad_() for x in features[:2]]
    loss = at_fused.at_loss(leaves, features[2:], **options)
    torch.testing.assert_close(value, loss.detach())
    assert not value.requires_grad
    expected = torch.autograd.grad(3 * loss.sum(), leaves)
    for g, e in zip(gradients, expected, strict=True):
        assert g.stride() == e.stride()
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_value_and_grad_with_a_tensor_scale_and_in_inference_mode(name: str) -> None:
    options, features = CASES[name], make_features(CASES[name])
    assert_matches(value_and_grad(options)(*features), features, options)
    assert_matches(value_and_grad(options, torch.tensor(3.0))(*features), features, options)
    with torch.inference_mode():
        value, gradients = value_and_grad(options)(*[x.clone() for x in features])
    assert_matches((value.clone(), [g.clone() for g in gradients]), features, options)


def traced_scale(x: Tensor) -> Tensor:
    """Return 3 as a tensor computed inside the graph."""
    return x.abs().sum() * 0 + 3


@crossed(name=FUSED_CASES, scale=[3.0, traced_scale])
def test_value_and_grad_in_one_graph(name: str, scale: Any) -> None:
    options, features = FUSED_CASES[name], make_features(FUSED_CASES[name])
    function = value_and_grad(options, scale)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_matches(compiled(*features), features, options)

    class Program(nn.Module):
        def forward(self, features: tuple[Tensor, ...]) -> Any:
            return function(*features)

    inputs = (tuple(features),)
    exported = torch.export.export(Program(), inputs).module()
    assert_matches(exported(*inputs), features, options)


@pytest.mark.parametrize("name", ["max", "both, maps"])
def test_value_and_grad_with_other_options_breaks_graphs(name: str) -> None:
    """torch.compile breaks the graph, and torch.export raises."""
    options, features = UNFUSED_CASES[name], make_features(UNFUSED_CASES[name])
    torch._dynamo.reset()
    compiled = torch.compile(value_and_grad(options), backend="aot_eager")
    assert_matches(compiled(*features), features, options)
    program = Module(lambda s, t: at_fused.at_value_and_grad(s, t, **options)[0])
    with pytest.raises(RuntimeError, match="export at_loss instead"):
        torch.export.export(program, (features[0], features[2]))
