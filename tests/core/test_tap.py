"""The tap: what passes is unchanged, its gradient is the sum; in place only where nobody sees."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from back_ends import ALL_BACKENDS, is_slow, use
from layouts import LAYOUTS, features
from matrix import crossed
from reference import raw_map
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import at_fused
from at_fused._ops import ownership

OTHERS = [name for name in ALL_BACKENDS if name != "cpu" and not is_slow(name)]


@pytest.fixture(params=["cpu", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in OTHERS)])
def fast_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on one back end: test_tap_operators.py has what they compute."""
    with use(request.param) as name:
        yield name


SHAPE = (3, 4, 6, 5)
CASES: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    (SHAPE, {}),
    (SHAPE, {"normalize": True, "eps": 0.1, "eps_mode": "add"}),
    (SHAPE, {"p": 1.0, "collapse": "sum"}),
    (SHAPE, {"p": 3.0, "absolute": False}),
    (SHAPE, {"p": 4.0, "collapse": "max"}),
    (SHAPE, {"attend": "channel"}),
    ((2, 3, 2, 4, 5), {}),
    ((2, 10, 8), {"channel_dim": -1, "skip_tokens": 1, "map_size": (3, 3)}),
    ((2, 10, 8), {"channel_dim": -1, "skip_tokens": 2, "collapse": "max"}),
    ((2, 10, 8), {"channel_dim": -1, "skip_tokens": 1, "attend": "channel"}),
    ((2, 5, 4, 8), {"channel_dim": -1}),
]


@crossed(case=CASES, layout=["dense", "transposed", "sliced"])
def test_map_and_gradients(
    fast_backend: str, case: tuple[tuple[int, ...], dict[str, Any]], layout: str
) -> None:
    shape, options = case
    x = torch.randn(shape, dtype=torch.float64)
    if layout == "transposed":
        x = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "sliced":
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (1, 1))[:, 1:-1]
    x.requires_grad_()
    y, q = at_fused.attention_tap(x, **options)
    assert torch.equal(y, x)
    torch.testing.assert_close(q, at_fused.attention_map(x, **options))
    # Of both outputs, and of one alone: the other has no gradient.
    for loss in (
        lambda y, q: (y.sin() * 3).sum() + q.cos().sum(),
        lambda y, q: q.cos().sum(),
        lambda y, q: y.sum(),
    ):
        found = torch.autograd.grad(loss(*at_fused.attention_tap(x, **options)), x)
        right = torch.autograd.grad(loss(x, at_fused.attention_map(x, **options)), x)
        torch.testing.assert_close(found, right)


@pytest.mark.parametrize("options", [{}, {"p": 3.0}, {"collapse": "max"}, {"normalize": True}])
def test_any_order(fast_backend: str, options: dict[str, Any]) -> None:
    x = torch.randn(2, 3, 3, 2, dtype=torch.float64, requires_grad=True)

    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        y, q = at_fused.attention_tap(x, **options)
        return y * y.exp(), q

    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x)


@crossed(dtype=[torch.float32, torch.float16, torch.bfloat16], layout=LAYOUTS)
def test_rounded_once(fast_backend: str, dtype: torch.dtype, layout: str) -> None:
    # Rounded once: nearer to the exact sum than two gradients of this dtype are.
    x = features(4, 6, 7, 7, layout=layout, dtype=dtype).requires_grad_()
    y, q = at_fused.attention_tap(x)
    wide = x.detach().double().requires_grad_()
    ((y * 1.5).float().square().sum() + (q * 3).sum()).backward()
    (1.5 * 1.5 * wide.square().sum() + 3 * wide.square().mean(1).sum()).backward()
    assert x.grad.dtype == dtype
    assert q.dtype == torch.float32
    error = (x.grad.double() - wide.grad).abs() / wide.grad.abs().clamp(min=1e-3)
    assert error.max() < 4 * torch.finfo(dtype).eps


# ---- whose gradient it is ------------------------------------------------------------------------
#
# A net x -> 2x -> tap -> rest. Hooks note where the gradient lies in memory on both sides of the
# tap: one place only where it was changed in place. What somebody else holds must keep its value.

kept: list[Any] = []


class Held(torch.autograd.Function):
    """An identity whose gradient of 2 is an array's memory, or a tensor that somebody keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, as_array: bool) -> Tensor:
        ctx.as_array = as_array
        return x * 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        kept.append(np.full(SHAPE, 2.0, np.float32) if ctx.as_array else torch.full(SHAPE, 2.0))
        return torch.as_tensor(kept[-1]), None


def keeping(make: Callable[[Tensor], Any]) -> Callable[[Tensor, Tensor], Tensor]:
    def hooked(y: Tensor, w: Tensor) -> Tensor:
        y.register_hook(lambda gradient: kept.append(make(gradient)))
        return y * y

    return hooked


def by_multi_grad_hook(y: Tensor, w: Tensor) -> Tensor:
    torch.autograd.graph.register_multi_grad_hook([y, w], kept.append)
    return y * y


def on_node(register: str, make: Callable[..., Any]) -> Callable[[Tensor, Tensor], Tensor]:
    def hooked(y: Tensor, w: Tensor) -> Tensor:
        getattr(y.grad_fn, register)(lambda *gradients: kept.append(make(*gradients)))
        return y * y

    return hooked


def other_strides(y: Tensor, w: Tensor) -> Tensor:
    weight = torch.randn(SHAPE).to(memory_format=torch.channels_last)
    return y.to(memory_format=torch.channels_last) * weight * weight


FREE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda y, w: y * y,
    "convolution": lambda y, w: F.conv2d(y, torch.ones(2, 4, 3, 3)).square(),
    "residual": lambda y, w: (torch.relu(y) * 2 + y).square(),
    "concatenated": lambda y, w: torch.cat([y, y * 2], 1).square(),
    "a hook that only looks": keeping(lambda g: None),
    "retain_grad": lambda y, w: (y.retain_grad(), y * y)[1],
    "a hook that replaces": lambda y, w: (y.register_hook(lambda g: g * 2), y * y)[1],
}
HELD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hook": keeping(lambda g: g),
    "hook, detached": keeping(lambda g: g.detach()),
    "hook, view": keeping(lambda g: g[0]),
    "hook, storage": keeping(lambda g: g.untyped_storage()),
    "hook, numpy": keeping(lambda g: g.numpy()),
    "hook, weak": keeping(weakref.ref),
    "multi-gradient hook": by_multi_grad_hook,
    "node's prehook": on_node("register_prehook", lambda g: g),
    "node's hook": on_node("register_hook", lambda inputs, outputs: outputs),
    "kept by another function": lambda y, w: Held.apply(y, False),
    "memory from outside": lambda y, w: Held.apply(y, True),
    "expanded": lambda y, w: y.sum() * 2,
    "other strides": other_strides,
}


OWN = ("kept by another function", "memory from outside")


def run(rest: Callable[[Tensor, Tensor], Tensor], tap: bool, last: bool = False) -> dict[str, Any]:
    """Gradients, the feature, and whether the tap wrote in place."""
    kept.clear()
    torch.manual_seed(1)
    layout = torch.channels_last if last else torch.contiguous_format
    x, w = (torch.randn(SHAPE).to(memory_format=layout).requires_grad_() for _ in range(2))
    places: list[int] = []
    h = x * 2
    h.register_hook(lambda gradient: places.append(gradient.data_ptr()))
    y, q = at_fused.attention_tap(h) if tap else (h * 1, raw_map(h))
    out = rest(y, w)
    y.register_hook(lambda gradient: places.append(gradient.data_ptr()))
    loss = out.sum() + (q * torch.linspace(1, 2, q.numel()).reshape(q.shape)).sum()
    loss.backward()
    return {
        "x": x.grad,
        "w": w.grad,
        "y": y.detach(),
        "in place": tap and len(places) == 2 and places[0] == places[1],
    }


@pytest.mark.parametrize("name", FREE)
def test_writes_in_place_where_it_may(fast_backend: str, name: str) -> None:
    for last in (False, name == "product"):
        found, right = run(FREE[name], True, last), run(FREE[name], False, last)
        assert found["in place"]
        torch.testing.assert_close(found["x"], right["x"])


def value_of(held: Any) -> Tensor:
    """The values of what somebody kept of a gradient."""
    if callable(held):
        held = held()
    if isinstance(held, torch.UntypedStorage):
        return torch.empty(0).set_(held).reshape(SHAPE)
    return torch.as_tensor(held[0] if isinstance(held, (list, tuple)) else held)


@pytest.mark.parametrize("name", HELD)
def test_what_others_hold_stays_as_it_was(fast_backend: str, name: str) -> None:
    right, found = run(HELD[name], False), run(HELD[name], True)
    assert not found["in place"]
    torch.testing.assert_close(found["x"], right["x"])
    if name == "hook, weak":
        kept.clear()  # has died with the pass
    assert len(kept) == (0 if name in ("hook, weak", "expanded", "other strides") else 1)
    for held in kept:
        gradient = torch.full(SHAPE, 2.0) if name in OWN else 2 * found["y"]
        assert torch.equal(value_of(held), gradient[0] if name == "hook, view" else gradient)


def test_the_other_branch_of_an_addition(fast_backend: str) -> None:
    # Both terms get one and the same tensor; whichever comes first must not change the other's.
    for rest in (
        lambda y, w: ((y + w) * 3).square(),
        lambda y, w: ((w + y) * 3).square(),
        lambda y, w: ((w * 1 + y) * 3).square(),
        lambda y, w: ((y + (w * 1)) * 3).square(),
    ):
        found, right = run(rest, True), run(rest, False)
        torch.testing.assert_close(found["x"], right["x"])
        torch.testing.assert_close(found["w"], right["w"])


def test_two_taps_of_one_gradient(fast_backend: str) -> None:
    a, b = (torch.randn(SHAPE, dtype=torch.float64, requires_grad=True) for _ in range(2))
    gradients = []
    for tap in (at_fused.attention_tap, lambda x: (x, raw_map(x))):
        (ya, qa), (yb, qb) = tap(a * 2), tap(b * 3)
        loss = ((ya + yb) * 1.5).square().sum() + qa.sum() + (qb * 2).sum()
        gradients.append(torch.autograd.grad(loss, [a, b]))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_captured_and_given_gradients(fast_backend: str) -> None:
    x, given = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    y, q = at_fused.attention_tap(x * 2)
    dy, dx = torch.autograd.grad((y * y).sum() + q.sum(), [y, x], retain_graph=True)
    assert torch.equal(dy, 2 * y)
    torch.testing.assert_close(dx, 2 * (2 * y + 2 * y / SHAPE[1]))
    before = given.clone()
    torch.autograd.backward([y, q], [given, torch.ones_like(q)])
    assert torch.equal(given, before)
    torch.testing.assert_close(x.grad, 2 * (given + 2 * y.detach() / SHAPE[1]))


def tapped_loss(x: Tensor) -> Tensor:
    """A loss whose gradient is (8 + 2) x."""
    y, q = at_fused.attention_tap(x * 2)
    return (y * y).sum() + q.sum()


def assert_has_its_gradient(x: Tensor) -> None:
    torch.testing.assert_close(x.grad, (8 + 8 / x.shape[1]) * x.detach())


def test_module_hooks_see_their_own_gradients(fast_backend: str) -> None:
    class Tapped(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y, self.q = at_fused.attention_tap(x)
            return y

    seen: list[Tensor] = []
    module = Tapped()
    module.register_full_backward_hook(lambda m, inputs, outputs: seen.extend(outputs))
    module.register_full_backward_pre_hook(lambda m, outputs: seen.extend(outputs))
    x = torch.randn(SHAPE, requires_grad=True)
    y = module(x * 2)
    ((y * y).sum() + module.q.sum()).backward()
    assert len(seen) == 2
    for gradient in seen:
        torch.testing.assert_close(gradient, 4 * x.detach())


def test_retained_and_with_tensors_saved_elsewhere(fast_backend: str) -> None:
    x = torch.randn(SHAPE, requires_grad=True)
    with torch.autograd.graph.save_on_cpu():
        loss = tapped_loss(x)
    found = [torch.autograd.grad(loss, x, retain_graph=i < 2)[0].clone() for i in range(3)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    torch.testing.assert_close(found[0], (8 + 8 / SHAPE[1]) * x.detach())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(fast_backend: str, reentrant: bool) -> None:
    x = torch.randn(SHAPE, requires_grad=True)

    def block(x: Tensor) -> tuple[Tensor, Tensor]:
        y, q = at_fused.attention_tap(torch.sin(x * 2))
        return torch.relu(y) * 2, q

    gradients = []
    for run_block in (block, lambda x: checkpoint(block, x, use_reentrant=reentrant)):
        y, q = run_block(x)
        x.grad = None
        ((y * y).sum() + q.sum()).backward()
        gradients.append(x.grad)
    assert torch.equal(gradients[0], gradients[1])


def test_changes_of_the_feature_are_refused(fast_backend: str) -> None:
    h = torch.randn(SHAPE, requires_grad=True) * 2
    y, q = at_fused.attention_tap(h)
    with pytest.raises(RuntimeError, match="view"):
        y.relu_()
    h.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        q.sum().backward()


# ---- calibration ---------------------------------------------------------------------------------


@pytest.fixture
def uncalibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "_calibrated", False)
    monkeypatch.setattr(ownership, "_sole_owner_counts", None)


@pytest.mark.usefixtures("uncalibrated")
def test_nothing_is_counted_under_a_debugger() -> None:
    before = sys.gettrace()
    sys.settrace(lambda *_: None)
    try:
        assert not run(FREE["product"], True)["in place"]
    finally:
        sys.settrace(before)
    assert not ownership._calibrated
    assert run(FREE["product"], True)["in place"]


@pytest.mark.usefixtures("uncalibrated")
def test_a_default_device_is_no_hindrance() -> None:
    with torch.device("cpu"):
        assert run(FREE["product"], True)["in place"]
        assert not run(HELD["hook"], True)["in place"]


class KeepsAll(TorchFunctionMode):
    def __torch_function__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kept.append(args)
        return call(*args, **(kwargs or {}))


@pytest.mark.usefixtures("uncalibrated")
def test_first_taps_inside_a_checkpoint_and_anomaly_mode() -> None:
    x = torch.randn(SHAPE, requires_grad=True)
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        tapped_loss(x).backward()
    assert not ownership._calibrated
    x.grad = None
    checkpoint(tapped_loss, x, use_reentrant=False).backward()
    assert ownership._calibrated
    assert_has_its_gradient(x)


@pytest.mark.usefixtures("uncalibrated")
def test_nothing_is_counted_in_a_mode_that_may_keep_tensors() -> None:
    x = torch.randn(SHAPE, requires_grad=True)
    with KeepsAll():
        tapped_loss(x).backward()
    assert not ownership._calibrated
    assert_has_its_gradient(x)


@pytest.mark.usefixtures("uncalibrated")
def test_counts_that_prove_nothing_switch_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    # A Python whose counts do not show a holder: then a gradient is never known to be free.
    monkeypatch.setattr(ownership.sys, "getrefcount", lambda _: 1)
    assert not run(FREE["product"], True)["in place"]
    found = run(HELD["hook"], True)
    assert torch.equal(kept[0], 2 * found["y"])


# ---- others --------------------------------------------------------------------------------------


def test_without_gradients_nothing_is_kept() -> None:
    x = torch.randn(SHAPE)
    y, q = at_fused.attention_tap(x)
    assert y is x
    assert not q.requires_grad
    dead = weakref.ref(x)
    del x, y
    assert dead() is None


@crossed(options=[{"p": 1.0}, {"collapse": "max"}], dynamic=[True, False])
def test_compiles_without_a_break(options: dict[str, Any], dynamic: bool) -> None:
    torch._dynamo.reset()
    conv = torch.nn.Conv2d(3, 4, 3, padding=1)

    def step(x: Tensor, t: Tensor) -> Tensor:
        h, q = at_fused.attention_tap(conv(x), **options)
        return h.relu().square().mean() + 100 * at_fused.map_loss(q, at_fused.attention_map(t))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 3):
        x, t = torch.randn(batch, 3, 6, 6), torch.randn(batch, 5, 6, 6)
        found, right = (
            torch.autograd.grad(each(x, t), list(conv.parameters())) for each in (compiled, step)
        )
        torch.testing.assert_close(found, right)
