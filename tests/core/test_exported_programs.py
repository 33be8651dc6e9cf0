"""Programs that were exported or traced without ``requires_grad`` and are run with it.

What such a program holds is an operator that was not asked for gradients: it has them all the same,
or the loss would have a gradient of 0, without a word. And ``at_value_and_grad`` in graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from matrix import crossed
from reference import THROUGH_MAPS
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import at_fused

Function = Callable[[Tensor, Tensor], Tensor]


def tapped(s: Tensor, t: Tensor) -> Tensor:
    y, q = at_fused.attention_tap(s)
    return at_fused.map_loss(q, at_fused.attention_map(t), form="paper") + y.square().mean()


def of_tokens(s: Tensor, t: Tensor) -> Tensor:
    s, t = (x.flatten(2).transpose(1, 2) for x in (s, t))
    return at_fused.at_loss(s, t, channel_dim=-1, skip_tokens=2)


PROGRAMS: dict[str, Function] = {
    "plain": lambda s, t: at_fused.at_loss(s, t),
    "a list": lambda s, t: at_fused.at_loss([s, s * 2], [t, t], form="paper"),
    "mask": lambda s, t: at_fused.at_loss(s, t, mask=t[:, 0] > 0, eps_mode="add"),
    "samples": lambda s, t: at_fused.at_loss(s, t, reduction="sample").square().sum(),
    "tokens": of_tokens,
    "max": lambda s, t: at_fused.at_loss(s, t, collapse="max"),
    "maps": lambda s, t: at_fused.map_loss(at_fused.attention_map(s), at_fused.attention_map(t)),
    "map_loss": lambda s, t: at_fused.map_loss(s.square().mean(1), t.square().mean(1)),
    "at": lambda s, t: (at_fused.at(s) - at_fused.at(t)).square().mean(),
    "tap": tapped,
}


class Module(nn.Module):
    """A program as a module, for torch.export."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, s: Tensor, t: Tensor) -> Tensor:
        return self.function(s, t)


def exported(function: Function, s: Tensor, t: Tensor) -> Any:
    return torch.export.export(Module(function), (s, t)).module()


TRACERS: dict[str, Callable[[Function, Tensor, Tensor], Any]] = {
    "export": exported,
    "make_fx": lambda function, s, t: make_fx(function)(s, t),
    "make_fx fake": lambda function, s, t: make_fx(function, tracing_mode="fake")(s, t),
}


@crossed(name=PROGRAMS, tracer=TRACERS)
def test_gradients_of_what_was_traced_without(name: str, tracer: str) -> None:
    function = PROGRAMS[name]
    program = TRACERS[tracer](function, torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4))
    s, t = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    for wanted in ((True, False), (False, True), (True, True)):
        leaves = [x.detach().requires_grad_(w) for x, w in zip((s, t), wanted, strict=True)]
        asked = [x for x in leaves if x.requires_grad]
        loss, right = program(*leaves), function(*leaves)
        torch.testing.assert_close(loss, right)
        found, expected = (torch.autograd.grad(each, asked) for each in (loss, right))
        for g, r in zip(found, expected, strict=True):
            assert r.any()
            torch.testing.assert_close(g, r)
    with torch.no_grad():
        assert not program(s, t).requires_grad


@pytest.mark.parametrize("name", PROGRAMS)
def test_gradients_of_a_gradient_that_was_traced_without(name: str) -> None:
    """The trace holds the backward, whose maps have a derivative as well."""

    def gradient(s: Tensor, t: Tensor) -> Tensor:
        leaf = s * 1 if s.requires_grad else (s * 1).requires_grad_()
        return torch.autograd.grad(PROGRAMS[name](leaf, t), leaf, create_graph=s.requires_grad)[0]

    s, t = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    program = make_fx(gradient)(s, t)
    torch.testing.assert_close(program(s, t), gradient(s, t))
    s.requires_grad_()
    found, right = program(s, t), gradient(s, t)
    torch.testing.assert_close(found, right)
    found, right = (torch.autograd.grad(g.square().sum(), s)[0] for g in (found, right))
    torch.testing.assert_close(found, right)


# ---- at_value_and_grad ---------------------------------------------------------------------------

TOKENS = {"channel_dim": -1, "skip_tokens": 1}
MASK, WEIGHTS = torch.rand(2, 12), torch.tensor([0.5, 3.0])
# Options of one operator; the others are at_loss and its backward, which no graph holds.
FUSED: dict[str, dict[str, Any]] = {
    "plain": {},
    "tokens": TOKENS,
    "tokens, masks": TOKENS | {"mask": MASK, "reduction": "none"},
    "weights": {"sample_weights": WEIGHTS},
    "weights, none": {"sample_weights": WEIGHTS, "reduction": "none", "weights": [0.5, 2.0]},
    "none": {"reduction": "none", "eps_mode": "add", "eps": 0.1},
    "sample": {"reduction": "sample", "form": "paper"},
}
OTHERS: dict[str, dict[str, Any]] = THROUGH_MAPS | {
    "channel": {"attend": "channel"},
    "both, maps": {"attend": "both", "resize": "maps"},
    "tokens, max": TOKENS | {"collapse": "max"},
    "tokens, both": TOKENS | {"attend": "both"},
    "weights, max": {"sample_weights": WEIGHTS, "collapse": "max"},
}
VALUES = FUSED | OTHERS


def features_of(options: dict[str, Any]) -> list[Tensor]:
    """Two students and two teachers."""
    if "channel_dim" in options:
        return [*torch.randn(4, 2, 13, 5)]
    sizes = (4, 4, 3, 3) if "resize" in options else (4, 4, 4, 4)
    return [torch.randn(2, 5, n, 4) for n in sizes]


def values(options: dict[str, Any], scale: Any = 3.0) -> Callable[..., Any]:
    def compute(*features: Tensor) -> Any:
        times = scale(features[0]) if callable(scale) else scale
        return at_fused.at_value_and_grad(features[:2], features[2:], scale=times, **options)

    return compute


def assert_values(found: Any, features: list[Tensor], options: dict[str, Any]) -> None:
    value, gradients = found
    leaves = [x.detach().clone().requires_grad_() for x in features[:2]]
    loss = at_fused.at_loss(leaves, features[2:], **options)
    torch.testing.assert_close(value, loss.detach())
    assert not value.requires_grad
    right = torch.autograd.grad(3 * loss.sum(), leaves)
    for g, r in zip(gradients, right, strict=True):
        assert g.stride() == r.stride()
        torch.testing.assert_close(g, r, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", VALUES)
def test_value_and_grad_with_a_tensor_and_in_inference_mode(name: str) -> None:
    options, features = VALUES[name], features_of(VALUES[name])
    assert_values(values(options)(*features), features, options)
    assert_values(values(options, torch.tensor(3.0))(*features), features, options)
    with torch.inference_mode():
        value, gradients = values(options)(*[x.clone() for x in features])
    assert_values((value.clone(), [g.clone() for g in gradients]), features, options)


def three(x: Tensor) -> Tensor:
    """A scale that is traced."""
    return x.abs().sum() * 0 + 3


@crossed(name=FUSED, scale=[3.0, three])
def test_value_and_grad_in_one_graph(name: str, scale: Any) -> None:
    options, features = FUSED[name], features_of(FUSED[name])
    function = values(options, scale)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_values(compiled(*features), features, options)

    class Program(nn.Module):
        def forward(self, features: tuple[Tensor, ...]) -> Any:
            return function(*features)

    inputs = (tuple(features),)
    exported = torch.export.export(Program(), inputs).module()
    assert_values(exported(*inputs), features, options)


@pytest.mark.parametrize("name", ["max", "both, maps"])
def test_value_and_grad_beside_graphs(name: str) -> None:
    """Options that one operator does not take: compiled around, and not exported."""
    options, features = OTHERS[name], features_of(OTHERS[name])
    torch._dynamo.reset()
    compiled = torch.compile(values(options), backend="aot_eager")
    assert_values(compiled(*features), features, options)
    program = Module(lambda s, t: at_fused.at_value_and_grad(s, t, **options)[0])
    with pytest.raises(RuntimeError, match="export at_loss instead"):
        torch.export.export(program, (features[0], features[2]))
