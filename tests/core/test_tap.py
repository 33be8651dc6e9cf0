"""``attention_tap``: values, gradients, and in-place updates of gradients without other owners."""

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

OTHER_BACKENDS = [name for name in ALL_BACKENDS if name != "cpu" and not is_slow(name)]


@pytest.fixture(
    params=["cpu", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in OTHER_BACKENDS)]
)
def fast_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run on one back end by default, because test_tap_operators.py tests all of them."""
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
    # Use both outputs, and only one, so that the other has no gradient.
    for loss in (
        lambda y, q: (y.sin() * 3).sum() + q.cos().sum(),
        lambda y, q: q.cos().sum(),
        lambda y, q: y.sum(),
    ):
        actual = torch.autograd.grad(loss(*at_fused.attention_tap(x, **options)), x)
        expected = torch.autograd.grad(loss(x, at_fused.attention_map(x, **options)), x)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("options", [{}, {"p": 3.0}, {"collapse": "max"}, {"normalize": True}])
def test_tap_gradcheck_and_gradgradcheck(fast_backend: str, options: dict[str, Any]) -> None:
    x = torch.randn(2, 3, 3, 2, dtype=torch.float64, requires_grad=True)

    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        y, q = at_fused.attention_tap(x, **options)
        return y * y.exp(), q

    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x)


@crossed(dtype=[torch.float32, torch.float16, torch.bfloat16], layout=LAYOUTS)
def test_gradient_is_rounded_once(fast_backend: str, dtype: torch.dtype, layout: str) -> None:
    # One rounding has a smaller error than the sum of two gradients of this dtype.
    x = features(4, 6, 7, 7, layout=layout, dtype=dtype).requires_grad_()
    y, q = at_fused.attention_tap(x)
    double = x.detach().double().requires_grad_()
    ((y * 1.5).float().square().sum() + (q * 3).sum()).backward()
    (1.5 * 1.5 * double.square().sum() + 3 * double.square().mean(1).sum()).backward()
    assert x.grad.dtype == dtype
    assert q.dtype == torch.float32
    error = (x.grad.double() - double.grad).abs() / double.grad.abs().clamp(min=1e-3)
    assert error.max() < 4 * torch.finfo(dtype).eps


# ---- in-place updates ----------------------------------------------------------------------------
#
# The network is x -> 2x -> tap -> rest. Hooks record the gradient's address on both sides of the
# tap. The addresses are equal only if the tap updated the gradient in place. It must not do that if
# the gradient has another owner.

held: list[Any] = []


class HoldGradient(torch.autograd.Function):
    """An identity with a gradient of 2 in a NumPy array's memory or in a tensor held elsewhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, as_array: bool) -> Tensor:
        ctx.as_array = as_array
        return x * 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        held.append(np.full(SHAPE, 2.0, np.float32) if ctx.as_array else torch.full(SHAPE, 2.0))
        return torch.as_tensor(held[-1]), None


def with_hook(hold: Callable[[Tensor], Any]) -> Callable[[Tensor, Tensor], Tensor]:
    def hooked(y: Tensor, w: Tensor) -> Tensor:
        y.register_hook(lambda gradient: held.append(hold(gradient)))
        return y * y

    return hooked


def with_multi_grad_hook(y: Tensor, w: Tensor) -> Tensor:
    torch.autograd.graph.register_multi_grad_hook([y, w], held.append)
    return y * y


def with_node_hook(register: str, hold: Callable[..., Any]) -> Callable[[Tensor, Tensor], Tensor]:
    def hooked(y: Tensor, w: Tensor) -> Tensor:
        getattr(y.grad_fn, register)(lambda *gradients: held.append(hold(*gradients)))
        return y * y

    return hooked


def other_strides(y: Tensor, w: Tensor) -> Tensor:
    weight = torch.randn(SHAPE).to(memory_format=torch.channels_last)
    return y.to(memory_format=torch.channels_last) * weight * weight


SOLE_OWNER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda y, w: y * y,
    "convolution": lambda y, w: F.conv2d(y, torch.ones(2, 4, 3, 3)).square(),
    "residual": lambda y, w: (torch.relu(y) * 2 + y).square(),
    "concatenated": lambda y, w: torch.cat([y, y * 2], 1).square(),
    "a hook that holds nothing": with_hook(lambda g: None),
    "retain_grad": lambda y, w: (y.retain_grad(), y * y)[1],
    "a hook that replaces": lambda y, w: (y.register_hook(lambda g: g * 2), y * y)[1],
}
OTHER_OWNERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hook": with_hook(lambda g: g),
    "hook, detached": with_hook(lambda g: g.detach()),
    "hook, view": with_hook(lambda g: g[0]),
    "hook, storage": with_hook(lambda g: g.untyped_storage()),
    "hook, numpy": with_hook(lambda g: g.numpy()),
    "hook, weak": with_hook(weakref.ref),
    "multi-gradient hook": with_multi_grad_hook,
    "node's prehook": with_node_hook("register_prehook", lambda g: g),
    "node's hook": with_node_hook("register_hook", lambda inputs, outputs: outputs),
    "held by another function": lambda y, w: HoldGradient.apply(y, False),
    "memory from outside": lambda y, w: HoldGradient.apply(y, True),
    "expanded": lambda y, w: y.sum() * 2,
    "other strides": other_strides,
}


GRADIENT_OF_2 = ("held by another function", "memory from outside")


def run(rest: Callable[[Tensor, Tensor], Tensor], tap: bool, last: bool = False) -> dict[str, Any]:
    """Return gradients, the feature, and True if the tap updated its gradient in place."""
    held.clear()
    torch.manual_seed(1)
    layout = torch.channels_last if last else torch.contiguous_format
    x, w = (torch.randn(SHAPE).to(memory_format=layout).requires_grad_() for _ in range(2))
    addresses: list[int] = []
    h = x * 2
    h.register_hook(lambda gradient: addresses.append(gradient.data_ptr()))
    y, q = at_fused.attention_tap(h) if tap else (h * 1, raw_map(h))
    out = rest(y, w)
    y.register_hook(lambda gradient: addresses.append(gradient.data_ptr()))
    loss = out.sum() + (q * torch.linspace(1, 2, q.numel()).reshape(q.shape)).sum()
    loss.backward()
    return {
        "x": x.grad,
        "w": w.grad,
        "y": y.detach(),
        "in place": tap and len(addresses) == 2 and addresses[0] == addresses[1],
    }


@pytest.mark.parametrize("name", SOLE_OWNER)
def test_gradients_without_other_owners_are_updated_in_place(fast_backend: str, name: str) -> None:
    for last in (False, name == "product"):
        actual, expected = run(SOLE_OWNER[name], True, last), run(SOLE_OWNER[name], False, last)
        assert actual["in place"]
        torch.testing.assert_close(actual["x"], expected["x"])


def to_tensor(value: Any) -> Tensor:
    if isinstance(value, torch.UntypedStorage):
        return torch.empty(0).set_(value).reshape(SHAPE)
    return torch.as_tensor(value[0] if isinstance(value, (list, tuple)) else value)


@pytest.mark.parametrize("name", OTHER_OWNERS)
def test_gradients_with_other_owners_do_not_change(fast_backend: str, name: str) -> None:
    expected, actual = run(OTHER_OWNERS[name], False), run(OTHER_OWNERS[name], True)
    assert not actual["in place"]
    torch.testing.assert_close(actual["x"], expected["x"])
    if name == "hook, weak":
        held.clear()  # the backward pass freed the gradient
    assert len(held) == (0 if name in ("hook, weak", "expanded", "other strides") else 1)
    for value in held:
        gradient = torch.full(SHAPE, 2.0) if name in GRADIENT_OF_2 else 2 * actual["y"]
        assert torch.equal(to_tensor(value), gradient[0] if name == "hook, view" else gradient)


def test_addition_passes_one_gradient_to_both_terms(fast_backend: str) -> None:
    # Both terms get the same tensor, so the tap must not change it in place.
    for rest in (
        lambda y, w: ((y + w) * 3).square(),
        lambda y, w: ((w + y) * 3).square(),
        lambda y, w: ((w * 1 + y) * 3).square(),
        lambda y, w: ((y + (w * 1)) * 3).square(),
    ):
        actual, expected = run(rest, True), run(rest, False)
        torch.testing.assert_close(actual["x"], expected["x"])
        torch.testing.assert_close(actual["w"], expected["w"])


def test_two_taps_share_one_gradient(fast_backend: str) -> None:
    a, b = (torch.randn(SHAPE, dtype=torch.float64, requires_grad=True) for _ in range(2))
    gradients = []
    for tap in (at_fused.attention_tap, lambda x: (x, raw_map(x))):
        (ya, qa), (yb, qb) = tap(a * 2), tap(b * 3)
        loss = ((ya + yb) * 1.5).square().sum() + qa.sum() + (qb * 2).sum()
        gradients.append(torch.autograd.grad(loss, [a, b]))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_gradients_that_the_caller_captures_or_passes(fast_backend: str) -> None:
    x, grad_output = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    y, q = at_fused.attention_tap(x * 2)
    dy, dx = torch.autograd.grad((y * y).sum() + q.sum(), [y, x], retain_graph=True)
    assert torch.equal(dy, 2 * y)
    torch.testing.assert_close(dx, 2 * (2 * y + 2 * y / SHAPE[1]))
    before = grad_output.clone()
    torch.autograd.backward([y, q], [grad_output, torch.ones_like(q)])
    assert torch.equal(grad_output, before)
    torch.testing.assert_close(x.grad, 2 * (grad_output + 2 * y.detach() / SHAPE[1]))


def tapped_loss(x: Tensor) -> Tensor:
    """Compute a loss with gradient (8 + 8 / C) x."""
    y, q = at_fused.attention_tap(x * 2)
    return (y * y).sum() + q.sum()


def assert_gradient_of_tapped_loss(x: Tensor) -> None:
    torch.testing.assert_close(x.grad, (8 + 8 / x.shape[1]) * x.detach())


def test_module_backward_hooks_see_unchanged_gradients(fast_backend: str) -> None:
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


def test_retained_graph_and_saved_tensor_hooks(fast_backend: str) -> None:
    x = torch.randn(SHAPE, requires_grad=True)
    with torch.autograd.graph.save_on_cpu():
        loss = tapped_loss(x)
    gradients = [torch.autograd.grad(loss, x, retain_graph=i < 2)[0].clone() for i in range(3)]
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])
    torch.testing.assert_close(gradients[0], (8 + 8 / SHAPE[1]) * x.detach())


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


def test_in_place_changes_of_the_feature_raise(fast_backend: str) -> None:
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
def test_no_calibration_under_a_debugger() -> None:
    before = sys.gettrace()
    sys.settrace(lambda *_: None)
    try:
        assert not run(SOLE_OWNER["product"], True)["in place"]
    finally:
        sys.settrace(before)
    assert not ownership._calibrated
    assert run(SOLE_OWNER["product"], True)["in place"]


@pytest.mark.usefixtures("uncalibrated")
def test_calibration_under_a_default_device() -> None:
    with torch.device("cpu"):
        assert run(SOLE_OWNER["product"], True)["in place"]
        assert not run(OTHER_OWNERS["hook"], True)["in place"]


class HoldAllArguments(TorchFunctionMode):
    def __torch_function__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        held.append(args)
        return call(*args, **(kwargs or {}))


@pytest.mark.usefixtures("uncalibrated")
def test_calibration_in_anomaly_mode_and_checkpoints() -> None:
    x = torch.randn(SHAPE, requires_grad=True)
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        tapped_loss(x).backward()
    assert not ownership._calibrated
    x.grad = None
    checkpoint(tapped_loss, x, use_reentrant=False).backward()
    assert ownership._calibrated
    assert_gradient_of_tapped_loss(x)


@pytest.mark.usefixtures("uncalibrated")
def test_no_calibration_in_a_torch_function_mode() -> None:
    x = torch.randn(SHAPE, requires_grad=True)
    with HoldAllArguments():
        tapped_loss(x).backward()
    assert not ownership._calibrated
    assert_gradient_of_tapped_loss(x)


@pytest.mark.usefixtures("uncalibrated")
def test_no_in_place_updates_without_usable_reference_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ownership.sys, "getrefcount", lambda _: 1)
    assert not run(SOLE_OWNER["product"], True)["in place"]
    result = run(OTHER_OWNERS["hook"], True)
    assert torch.equal(held[0], 2 * result["y"])


# ---- memory and torch.compile --------------------------------------------------------------------


def test_feature_is_freed_without_gradients() -> None:
    x = torch.randn(SHAPE)
    y, q = at_fused.attention_tap(x)
    assert y is x
    assert not q.requires_grad
    reference = weakref.ref(x)
    del x, y
    assert reference() is None


@crossed(options=[{"p": 1.0}, {"collapse": "max"}], dynamic=[True, False])
def test_compile_fullgraph(options: dict[str, Any], dynamic: bool) -> None:
    torch._dynamo.reset()
    conv = torch.nn.Conv2d(3, 4, 3, padding=1)

    def step(x: Tensor, t: Tensor) -> Tensor:
        h, q = at_fused.attention_tap(conv(x), **options)
        return h.relu().square().mean() + 100 * at_fused.map_loss(q, at_fused.attention_map(t))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 3):
        x, t = torch.randn(batch, 3, 6, 6), torch.randn(batch, 5, 6, 6)
        losses = compiled(x, t), step(x, t)
        gradients = (torch.autograd.grad(loss, list(conv.parameters())) for loss in losses)
        torch.testing.assert_close(*gradients)
