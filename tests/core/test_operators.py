"""The operators with opcheck, torch.compile, torch.export, autocast and inference mode."""

from __future__ import annotations

import copy
import json
import pickle
import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo
from back_ends import ALL_BACKENDS, use
from hostile import tensors_of, valid_call
from matrix import crossed
from outside import SUPPORT, output_of
from reference import loss_arguments, reference_loss
from torch import Tensor, nn

import at_fused
from at_fused import _ops
from at_fused.backends import OPERATORS


def pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    b, c, *spatial = shape
    s = torch.randn(b, c, *spatial, dtype=dtype).requires_grad_()
    return s, torch.randn(b, c + 1, *spatial, dtype=dtype)


@crossed(operator=OPERATORS, seed=range(2))
def test_opcheck(backend: str, operator: str, seed: int) -> None:
    arguments = valid_call(operator, random.Random(seed))
    differentiated = operator not in ("attention_tap_backward_", "at_value_and_grad")
    for x in tensors_of(arguments[:2]) if differentiated else ():
        x.requires_grad_()
    # Autograd does not depend on the back end, and does not support the in-place operator.
    skip_autograd = backend not in ("cpu", "cuda") or operator == "attention_tap_backward_"
    checks = {"test_utils": ("test_schema", "test_faketensor")} if skip_autograd else {}
    torch.library.opcheck(getattr(torch.ops.at_fused, operator), tuple(arguments), **checks)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_fullgraph(compiler: str) -> None:
    (s0, t0), (s1, t1) = pair(2, 3, 8, 8), pair(2, 6, 4, 4)
    s1 = s1.detach().to(memory_format=torch.channels_last).requires_grad_()

    def step(s0: Tensor, s1: Tensor, t0: Tensor, t1: Tensor) -> Tensor:
        # Non-leaf inputs, arithmetic with the loss, and maps in the same graph.
        loss = at_fused.at_loss([s0 * 2, s1 + 1], [t0, t1], weights=[1.0, 2.0])
        return 3 * loss + at_fused.at(s0).square().mean() + at_fused.attention_map(s1).mean()

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    loss, expected = compiled(s0, s1, t0, t1), step(s0, s1, t0, t1)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(x, (s0, s1)) for x in (loss, expected)]
    torch.testing.assert_close(*gradients)
    assert gradients[0][1].is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(step(s0, s1, t0, t1), compiled(s0, s1, t0, t1))


def test_compile_dynamic_shapes_without_recompilation() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(at_fused.at_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in [(2, 3, 8, 8), (4, 5, 6, 6), (3, 9, 7, 7)]:
            s, t = pair(*shape)
            losses = compiled(s, t), at_fused.at_loss(s, t)
            torch.testing.assert_close(*losses)
            torch.testing.assert_close(*(torch.autograd.grad(loss, s) for loss in losses))


def test_export_with_dynamic_batch(tmp_path: Any) -> None:
    s, t = pair(4, 3, 8, 8)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        at_fused.ATLoss(p=4.0), (s.detach(), t), dynamic_shapes=({0: batch}, {0: batch})
    )
    torch.export.save(program, tmp_path / "loss.pt2")
    loaded = torch.export.load(tmp_path / "loss.pt2").module()
    for size in (4, 7):
        s, t = pair(size, 3, 8, 8)
        torch.testing.assert_close(loaded(s.detach(), t), at_fused.at_loss(s.detach(), t, p=4.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_gives_low_precision_features_and_a_float32_loss(
    backend: str, dtype: torch.dtype
) -> None:
    student, teacher = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 16, 3)
    x = torch.randn(4, 3, 10, 10)
    with torch.autocast("cpu", dtype=dtype):
        s, t = student(x), teacher(x)
        loss = at_fused.at_loss(s, t)
    assert s.dtype == t.dtype == dtype
    assert loss.dtype == torch.float32
    expected = reference_loss([s.double()], [t.double()])
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    (actual,) = torch.autograd.grad(loss * 1024, student.weight, retain_graph=True)
    (expected,) = torch.autograd.grad(expected * 1024, student.weight)
    assert (actual - expected).norm() < 0.02 * expected.norm()


def test_no_grad_and_inference_mode(backend: str) -> None:
    s, t = pair(2, 3, 4, 4)
    expected = at_fused.at_loss(s, t).detach()
    with torch.no_grad():
        loss = at_fused.at_loss(s, t)
        assert not loss.requires_grad
        assert torch.equal(loss, expected)
    with torch.inference_mode():
        assert torch.equal(at_fused.at_loss(s * 1, t), expected)
        assert torch.equal(at_fused.at(s * 1), at_fused.at(s))


def test_features_changed_in_place_before_backward_raise(backend: str) -> None:
    s, t = pair(2, 3, 4, 4)
    x = s * 1
    loss = at_fused.at_loss(x, t)
    with torch.no_grad():
        x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- memory --------------------------------------------------------------------------------------


@pytest.fixture(params=["cpu", "emulator-wide"])
def compiled(request: pytest.FixtureRequest) -> Iterator[None]:
    """Use a compiled back end; test_gpu.py measures memory on a GPU."""
    with use(request.param):
        yield


def allocated(call: Any) -> tuple[Any, int]:
    """Return the result of a call, and the bytes that it allocates."""
    with torch.profiler.profile(profile_memory=True) as profile:
        result = call()
    memory = [event.self_cpu_memory_usage for event in profile.events()]
    return result, sum(m for m in memory if m > 0)


@pytest.mark.usefixtures("compiled")
def test_operators_allocate_no_feature_sized_temporaries() -> None:
    s, t = torch.randn(2, 64, 24, 24, requires_grad=True), torch.randn(2, 64, 24, 24)
    size = s.nbytes
    loss, forward = allocated(lambda: at_fused.at_loss(s, t))
    assert 0 < forward < size / 16
    _, backward = allocated(loss.backward)
    assert size <= backward < size * 1.02
    _, both = allocated(lambda: at_fused.at_value_and_grad(s, t))
    assert size <= both < size * 1.05
    (q, channels), forward = allocated(lambda: _ops.attention_map([t], 2.0, "max"))
    assert 0 < forward < size / 16
    for maxima in ([], [channels]):
        call = partial(_ops.attention_map_backward, [t], [q], None, [0], 2.0, [], maxima)
        assert size <= allocated(call)[1] < size * 1.02
    for rest in ([q, 2.0, "mean"], [q, 2.0, "max", channels]):
        gradient = torch.randn_like(t)
        new = partial(_ops.attention_tap_backward, gradient, t, *rest)
        in_place = partial(_ops.attention_tap_backward_, gradient, t, *rest)
        assert allocated(new)[1] == size
        assert allocated(in_place)[1] == 0


@pytest.fixture(scope="module")
def leaked_bytes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    script = str(SUPPORT / "hostile.py")
    return dict(json.loads(output_of(tmp_path_factory.mktemp("leaks"), script, "kept")))


@pytest.mark.parametrize("name", ALL_BACKENDS)
def test_only_outputs_outlive_a_call(leaked_bytes: Any, name: str) -> None:
    # Memory kept from a CUDA graph's pool could be overwritten by another graph.
    assert not any(leaked_bytes[name].values()), leaked_bytes[name]


HUGE = 2**31 + 64
HUGE_STRIDES = {
    "samples": ((2, 2, 16), (HUGE, 16, 1)),
    "rows": ((2, 2, 16), (16, HUGE, 1)),
    "interleaved samples": ((2, 3, 16), (HUGE, 1, 3)),
    "interleaved rows": ((1, 2, 2), (0, 1, HUGE)),
}


@crossed(layout=list(HUGE_STRIDES), collapse=["mean", "max"])
def test_offsets_beyond_int32(backend: str, collapse: str, layout: str) -> None:
    """Use tensors with huge strides; untouched memory is never allocated."""
    shape, strides = HUGE_STRIDES[layout]
    if torch.get_default_device().type == "cuda" and torch.cuda.mem_get_info()[0] < 10 << 30:
        pytest.skip("less than 10 GB of free memory")
    dense, teacher = [torch.randn(shape).bfloat16() for _ in range(2)], torch.randn(shape)
    g, x = (torch.empty(HUGE + 64, dtype=y.dtype).as_strided(shape, strides) for y in dense)
    g.copy_(dense[0])
    x.copy_(dense[1])
    results = []
    for gradient, y in ((g, x), dense):
        q, *channels = _ops.attention_map([y], 2.0, collapse)
        (map_gradient,) = _ops.attention_map_backward([y], [q], None, [0], 3.0, [], channels)
        rest = y, q, 2.0, collapse, *channels
        tap_gradient = _ops.attention_tap_backward(gradient, *rest)
        _ops.attention_tap_backward_(gradient, *rest)
        loss, gradients = _ops.at_value_and_grad(*loss_arguments([y], [teacher]), 1.0, None)
        results.append((q, *channels, map_gradient, tap_gradient, gradient, loss, *gradients))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_maps_of_features_without_gradients_have_none(backend: str) -> None:
    x, y = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
    maps = _ops.attention_map([x, y], 2.0, "mean")
    assert not maps[1].requires_grad
    (g,) = torch.autograd.grad(maps[0].sum() + maps[1].sum(), x)
    torch.testing.assert_close(g, 2 * x.detach() / 3)


def test_meta_tensors() -> None:
    s, t = torch.randn(2, 3, 4, 5, device="meta"), torch.randn(2, 7, 4, 5, device="meta")
    assert at_fused.at_loss(s, t).shape == ()
    assert at_fused.at_loss([s, s], [t, t], reduction="none").shape == (2,)
    assert at_fused.attention_map(s).shape == (2, 4, 5)


def test_module_and_its_copies_match_the_function() -> None:
    options = {"p": 4, "form": "paper", "collapse": "sum", "weights": [1, 2], "reduction": "none"}
    module = at_fused.ATLoss(**options)
    s, t = pair(2, 3, 4, 4)
    expected = at_fused.at_loss([s, s], [t, t], **options)
    for loss in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(loss([s, s], [t, t]), expected, rtol=0, atol=0)
    assert "form='paper'" in repr(module)
    assert not module.state_dict()
    # mask and sample_weights belong to a batch, so the call takes them.
    mask, weights = torch.rand(2, 4, 4), torch.rand(2)
    expected = at_fused.at_loss(s, t, mask=mask, sample_weights=weights, collapse="max")
    assert torch.equal(at_fused.ATLoss(collapse="max")(s, t, mask, weights), expected)
    for name in ("mask", "power"):
        with pytest.raises(TypeError, match=f"has no option '{name}'; it has absolute, "):
            at_fused.ATLoss(**{name: 1})
