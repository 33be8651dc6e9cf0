"""``at_value_and_grad``: what the contract (reference.py) does not say of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import opcheck
from reference import loss_arguments
from torch import Tensor

import at_fused


def pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    b, c, *spatial = shape
    return torch.randn(shape, dtype=dtype), torch.randn(b, c + 2, *spatial, dtype=dtype)


def by_autograd(student: Tensor, teacher: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    x = student.detach().requires_grad_()
    loss = at_fused.at_loss(x, teacher, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]


@pytest.mark.parametrize("scale", [3.0, -2, torch.tensor(0.5), torch.tensor([2.0]).double()])
def test_scale_is_the_gradients(backend: str, scale: float | Tensor) -> None:
    s, t = pair(2, 3, 5, 4)
    value, gradient = at_fused.at_value_and_grad(s, t, scale=scale)
    loss, expected = by_autograd(s, t)
    torch.testing.assert_close(value, loss)
    torch.testing.assert_close(gradient, expected * float(scale), rtol=1e-5, atol=1e-9)


def test_a_list_gives_a_list_with_weights(backend: str) -> None:
    (s0, t0), (s1, t1) = pair(2, 3, 4, 4), pair(3, 5, 2, 6)
    value, gradients = at_fused.at_value_and_grad(
        [s0, s1], (t0, t1), weights=[2.0, -1.0], reduction="none", form="paper"
    )
    assert isinstance(gradients, list)
    for i, (s, t, weight) in enumerate(((s0, t0, 2.0), (s1, t1, -1.0))):
        loss, expected = by_autograd(s, t, form="paper")
        torch.testing.assert_close(value[i], weight * loss)
        torch.testing.assert_close(gradients[i], weight * expected, rtol=1e-5, atol=1e-9)


def test_features_keep_their_dtype_and_place_of_channels(backend: str) -> None:
    s, t = pair(2, 3, 4, 5, dtype=torch.bfloat16)
    value, gradient = at_fused.at_value_and_grad(
        s.movedim(1, -1), t.movedim(1, -1), channel_dim=-1, scale=64.0
    )
    assert value.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    _, expected = by_autograd(s, t)
    torch.testing.assert_close(gradient.movedim(-1, 1), 64 * expected, rtol=0.02, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{}, {"resize": "features"}, {"resize": "maps"}, {"p": 3.0, "absolute": False}],
    ids=str,
)
def test_gradients_lie_as_empty_like_does(backend: str, options: dict[str, Any]) -> None:
    planes, volumes = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 4, 6, 2)
    for s in (
        planes,
        planes.to(memory_format=torch.channels_last),
        planes.transpose(2, 3),
        planes[:, :, ::2],
        planes[:1].expand(2, 3, 4, 6),
        volumes.to(memory_format=torch.channels_last_3d),
    ):
        t = torch.randn(s.shape)[:, :2, : 2 if "resize" in options else None]
        value, gradient = at_fused.at_value_and_grad(s, t, **options)
        assert gradient.stride() == torch.empty_like(s).stride()
        loss, right = by_autograd(s, t, **options)
        torch.testing.assert_close(value, loss)
        torch.testing.assert_close(gradient, right, rtol=1e-5, atol=1e-9)


def test_nothing_is_part_of_a_graph(backend: str) -> None:
    s, t = pair(2, 3, 4, 4)
    s.requires_grad_(), t.requires_grad_()
    value, gradient = at_fused.at_value_and_grad(s, t)
    assert not value.requires_grad
    assert not gradient.requires_grad
    # The use that the docstring shows: the rest of the network goes on from the features.
    w = torch.randn(2, 3, 4, 4, requires_grad=True)
    features, task = w * 2, w.sum()
    _, gradient = at_fused.at_value_and_grad(features, t.detach(), scale=10.0)
    torch.autograd.backward([task, features], [None, gradient])
    expected = torch.autograd.grad(w.sum() + 10 * at_fused.at_loss(w * 2, t.detach()), w)[0]
    torch.testing.assert_close(w.grad, expected, rtol=1e-5, atol=1e-6)


def test_samples_larger_than_a_cache_or_a_block(backend: str) -> None:
    """Cut samples (several tasks, or blocks) beside whole ones in one list."""
    shapes = [(2, 24, 40, 64), (5, 4, 6, 6), (1, 130, 33, 31)]
    students, teachers = zip(*(pair(*shape) for shape in shapes), strict=True)
    value, gradients = at_fused.at_value_and_grad(students, teachers, reduction="none")
    for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
        loss, expected = by_autograd(s, t)
        torch.testing.assert_close(value[i], loss)
        error = (gradients[i] - expected).abs().max()
        assert error <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_fullgraph(compiler: str) -> None:
    s, t = pair(2, 3, 8, 8)

    def step(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = at_fused.at_value_and_grad(s * 2, t, scale=3.0)
        return value + 1, gradient.square().sum()

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    torch.testing.assert_close(compiled(s, t), step(s, t))


@pytest.mark.parametrize("gradient", [None, torch.tensor(2.0), torch.tensor([2.0, 3.0])], ids=str)
def test_opcheck(backend: str, gradient: Tensor | None) -> None:
    (s0, t0), (s1, t1) = pair(2, 3, 4, 4), pair(2, 5, 2, 2)
    s1 = s1.to(memory_format=torch.channels_last)
    arguments = *loss_arguments([s0, s1], [t0, t1], reduction="none"), 1.5, gradient
    opcheck(backend, torch.ops.at_fused.at_value_and_grad, arguments)
    _, gradients = torch.ops.at_fused.at_value_and_grad(*arguments)
    factors = (gradient if gradient is not None else torch.ones(())).expand(2) * 1.5
    for found, factor, s, t in zip(gradients, factors, (s0, s1), (t0, t1), strict=True):
        expected = factor * by_autograd(s, t)[1]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        ("2", TypeError, "scale must be a number, got str"),
        (True, TypeError, "scale must be a number, got bool"),
        (float("inf"), ValueError, "scale must be finite, got inf"),
        (-1e39, ValueError, "scale must be finite in torch.float32, the gradient's, got -1e"),
        (10**39, ValueError, "scale must be finite in torch.float32, the gradient's, got 1000"),
        (torch.ones(1).to_sparse(), TypeError, "scale must be a dense tensor"),
        (
            torch.ones(1).to(torch.float8_e5m2),
            ValueError,
            "tensor of one element, got torch.float8",
        ),
        (torch.ones(2), ValueError, "tensor of one element, got torch.float32 of shape"),
        (torch.ones((), dtype=torch.int64), ValueError, "floating-point tensor"),
        (torch.ones((), device="meta"), ValueError, "scale must be on the features' device, cpu"),
    ],
    ids=str,
)
def test_a_scale_that_is_none(scale: Any, error: type[Exception], message: str) -> None:
    s, t = pair(2, 3, 4, 4)
    with pytest.raises(error, match=message):
        at_fused.at_value_and_grad(s, t, scale=scale)


def test_a_scale_beyond_fp32_for_float64() -> None:
    s, t = pair(2, 3, 4, 4, dtype=torch.float64)
    _, gradient = at_fused.at_value_and_grad(s, t, scale=1e39)
    torch.testing.assert_close(gradient, by_autograd(s, t)[1] * 1e39, rtol=1e-9, atol=0)


def test_other_arguments_are_checked_as_the_losses() -> None:
    s, t = pair(2, 3, 4, 4)
    with pytest.raises(ValueError, match="same map size"):
        at_fused.at_value_and_grad(s, t[:, :, :2])
    with pytest.raises(TypeError, match="both be tensors or both be sequences"):
        at_fused.at_value_and_grad([s], t)
    with pytest.raises(RuntimeError, match="as many teachers"):
        torch.ops.at_fused.at_value_and_grad(*loss_arguments([s], []), 1.0, None)
    for above, message in ((torch.ones(1, 1), "batch size"), (torch.ones(1, 2, 1), "a scalar, ")):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.at_fused.at_value_and_grad(*loss_arguments([s], [t]), 1.0, above)


def test_vmap_over_students() -> None:
    s, t = torch.randn(3, 2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    found = torch.func.vmap(lambda x: at_fused.at_value_and_grad(x, t))(s)
    for i, (loss, gradient) in enumerate(zip(*found, strict=True)):
        torch.testing.assert_close((loss, gradient), at_fused.at_value_and_grad(s[i], t))


def test_an_unknown_option_is_named() -> None:
    s = torch.randn(2, 3, 4, 4)
    with pytest.raises(TypeError, match="at_value_and_grad takes no option 'power'"):
        at_fused.at_value_and_grad(s, s, power=2)


@pytest.mark.parametrize("name", ["form", "reduction", "eps_mode", "collapse"])
def test_bytes_are_no_option(name: str) -> None:
    s = torch.randn(2, 3, 4, 4)
    value = {"form": b"code", "reduction": b"sum", "eps_mode": b"max", "collapse": b"mean"}[name]
    for function in (at_fused.at_loss, at_fused.at_value_and_grad):
        with pytest.raises(ValueError, match=f"{name} must be"):
            function(s, s, **{name: value})
