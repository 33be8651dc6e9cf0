"""Programs that were exported or traced without ``requires_grad`` and are run with it.

What such a program holds is an operator that was not asked for gradients: it has them all the same,
or the loss would have a gradient of 0, without a word. And ``at_value_and_grad`` in graphs.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from functools import partial
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


def loaded(function: Function, s: Tensor, t: Tensor) -> Any:
    memory = io.BytesIO()
    torch.export.save(torch.export.export(Module(function), (s, t)), memory)
    memory.seek(0)
    return torch.export.load(memory).module()


def decomposed(function: Function, s: Tensor, t: Tensor) -> Any:
    program = torch.export.export(Module(function), (s, t))
    return program.run_decompositions().module()


def traced_by_jit(function: Function, s: Tensor, t: Tensor) -> Any:
    with warnings.catch_warnings():
        # Of torch.jit being deprecated, and of sizes that become constants.
        warnings.simplefilter("ignore")
        return torch.jit.trace(function, (s, t), check_trace=False)


TRACERS: dict[str, Callable[[Function, Tensor, Tensor], Any]] = {
    "export": exported,
    "saved": loaded,
    "decomposed": decomposed,
    "make_fx": lambda function, s, t: make_fx(function)(s, t),
    "make_fx fake": lambda function, s, t: make_fx(function, tracing_mode="fake")(s, t),
    "jit": traced_by_jit,
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
VALUES: dict[str, dict[str, Any]] = THROUGH_MAPS | {
    "plain": {},
    "smaller student": {"resize": "features", "smaller": True},
    "smaller student, maps": {"resize": "maps", "smaller": True, "form": "paper"},
    "channel": {"attend": "channel"},
    "both": {"attend": "both"},
    "both, maps": {"attend": "both", "resize": "maps"},
    "tokens": TOKENS,
    "tokens, max": TOKENS | {"collapse": "max"},
    "tokens, both": TOKENS | {"attend": "both"},
    "tokens, masks": TOKENS | {"mask": True, "reduction": "none"},
    "mask": {"mask": True},
    "mask, max": {"mask": True, "collapse": "max"},
    "mask, maps": {"mask": True, "resize": "maps"},
    "weights": {"sample_weights": True},
    "weights, none": {"sample_weights": True, "reduction": "none", "weights": [0.5, 2.0]},
    "weights, sample": {"sample_weights": True, "reduction": "sample", "collapse": "max"},
    "none": {"reduction": "none", "eps_mode": "add", "eps": 0.1},
    "sample of one operator": {"reduction": "sample", "form": "paper"},
}


class Values:
    """A call of at_value_and_grad, and what it must give."""

    def __init__(self, name: str) -> None:
        options = dict(VALUES[name])
        small = 3 if "resize" in options else 4
        sizes = (small, 4) if options.pop("smaller", False) else (4, small)
        if options.get("channel_dim"):
            sides = torch.randn(2, 2, 2, 13, 5)
            mask = torch.rand(2, 12)
        else:
            sides = [torch.randn(2, 2, 5, n, 4) for n in sizes]
            mask = torch.rand(2, sizes[0], 4)
        self.features = tuple(x for side in sides for x in side)
        if options.pop("mask", False):
            options["mask"] = mask
        if options.pop("sample_weights", False):
            options["sample_weights"] = torch.tensor([0.5, 3.0])
        self.options = options

    def compute(self, *features: Tensor) -> Any:
        return at_fused.at_value_and_grad(features[:2], features[2:], scale=3.0, **self.options)

    def compute_with_a_tensor(self, *features: Tensor) -> Any:
        scale = features[0].abs().sum() * 0 + 3  # made in the graph
        return at_fused.at_value_and_grad(features[:2], features[2:], scale=scale, **self.options)

    def check(self, value: Tensor, gradients: Any) -> None:
        leaves = [x.detach().clone().requires_grad_() for x in self.features[:2]]
        loss = at_fused.at_loss(leaves, self.features[2:], **self.options)
        torch.testing.assert_close(value, loss.detach())
        assert not value.requires_grad
        right = torch.autograd.grad(3 * loss.sum(), leaves)
        for g, r in zip(gradients, right, strict=True):
            assert g.stride() == r.stride()
            torch.testing.assert_close(g, r, rtol=1e-5, atol=1e-8)


def exported_call(function: Any, *features: Tensor) -> Any:
    class Program(nn.Module):
        def forward(self, features: tuple[Tensor, ...]) -> Any:
            return function(*features)

    return torch.export.export(Program(), (features,)).module()(features)


def compiled_call(function: Any, *features: Tensor) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")(*features)


GRAPHS: dict[str, tuple[Any, Any]] = {
    "compiled": (compiled_call, Values.compute),
    "compiled, scale is a tensor": (compiled_call, Values.compute_with_a_tensor),
    "exported": (exported_call, Values.compute),
}


@crossed(name=VALUES, graph=GRAPHS)
def test_value_and_grad_in_graphs(name: str, graph: str) -> None:
    call, (run, compute) = Values(name), GRAPHS[graph]
    function = partial(compute, call)
    call.check(*function(*call.features))
    call.check(*run(function, *call.features))
    with torch.inference_mode():
        value, gradients = function(*[x.clone() for x in call.features])
    call.check(value.clone(), [g.clone() for g in gradients])


@pytest.mark.parametrize("name", ["maps", "tokens, masks"])
def test_value_and_grad_with_inductor(name: str) -> None:
    call = Values(name)
    torch._dynamo.reset()
    call.check(*torch.compile(call.compute, fullgraph=True)(*call.features))
