"""The operators inside PyTorch's machinery: opcheck, compile, export, autocast, torch.func."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from conftest import EVERY, opcheck, use
from outside import output_of
from reference import loss_arguments, reference_loss
from torch import Tensor, nn

import at_fused
from at_fused import _ops


def pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    b, c, *spatial = shape
    s = torch.randn(b, c, *spatial, dtype=dtype).requires_grad_()
    return s, torch.randn(b, c + 1, *spatial, dtype=dtype)


def at_loss_arguments(
    student_grad: bool, teacher_grad: bool, form: str, reduction: str, p: float
) -> tuple[Any, ...]:
    students = [
        torch.randn(2, 3, 4, 5),
        torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last),
    ]
    teachers = [torch.randn(2, 4, 4, 5), torch.randn(2, 6, 2, 2)]
    for x in students:
        x.requires_grad_(student_grad)
    for x in teachers:
        x.requires_grad_(teacher_grad)
    options = {"weights": [1.0, 0.5], "p": p, "form": form, "reduction": reduction}
    return *loss_arguments(students, teachers, **options), student_grad, teacher_grad


@pytest.mark.parametrize("student_grad", [True, False])
@pytest.mark.parametrize("teacher_grad", [True, False])
@pytest.mark.parametrize(("form", "reduction", "p"), [("code", "sum", 2.0), ("paper", "none", 3.0)])
def test_opcheck_at_loss(
    backend: str, student_grad: bool, teacher_grad: bool, form: str, reduction: str, p: float
) -> None:
    arguments = at_loss_arguments(student_grad, teacher_grad, form, reduction, p)
    opcheck(backend, torch.ops.at_fused.at_loss, arguments)


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_fullgraph(compiler: str) -> None:
    (s0, t0), (s1, t1) = pair(2, 3, 8, 8), pair(2, 6, 4, 4)

    def step(s0: Tensor, s1: Tensor, t0: Tensor, t1: Tensor) -> Tensor:
        # Non-leaf inputs, an expression around the loss, and maps beside it.
        loss = at_fused.at_loss([s0 * 2, s1 + 1], [t0, t1], weights=[1.0, 2.0])
        return 3 * loss + at_fused.at(s0).square().mean() + at_fused.attention_map(s1).mean()

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    loss, expected = compiled(s0, s1, t0, t1), step(s0, s1, t0, t1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, s0, s1), gradients(expected, s0, s1))
    with torch.no_grad():
        torch.testing.assert_close(step(s0, s1, t0, t1), compiled(s0, s1, t0, t1))


def test_compile_dynamic_shapes_without_a_new_graph() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(at_fused.at_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in [(2, 3, 8, 8), (4, 5, 6, 6), (3, 9, 7, 7)]:
            s, t = pair(*shape)
            loss, expected = compiled(s, t), at_fused.at_loss(s, t)
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(gradients(loss, s), gradients(expected, s))


def test_compile_channels_last() -> None:
    s, t = pair(2, 3, 8, 8)
    s = s.detach().to(memory_format=torch.channels_last).requires_grad_()
    compiled = torch.compile(at_fused.at_loss, fullgraph=True)
    (g,) = gradients(compiled(s, t), s)
    torch.testing.assert_close(g, *gradients(at_fused.at_loss(s, t), s))
    assert g.is_contiguous(memory_format=torch.channels_last)


def test_export_and_dynamic_batch(tmp_path: Any) -> None:
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
    (found,) = torch.autograd.grad(loss * 1024, student.weight, retain_graph=True)
    (right,) = torch.autograd.grad(expected * 1024, student.weight)
    assert (found - right).norm() < 0.02 * right.norm()


def test_no_grad_and_inference_mode(backend: str) -> None:
    s, t = pair(2, 3, 4, 4)
    expected = at_fused.at_loss(s, t).detach()
    with torch.no_grad():
        loss = at_fused.at_loss(s, t)
        assert not loss.requires_grad
        torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    with torch.inference_mode():
        loss = at_fused.at_loss(s * 1, t)
        torch.testing.assert_close(loss, expected, rtol=0, atol=0)
        torch.testing.assert_close(at_fused.at(s * 1), at_fused.at(s), rtol=0, atol=0)


def test_gradients_accumulate_and_graphs_are_reusable(backend: str) -> None:
    s, t = pair(2, 3, 4, 4)
    loss = at_fused.at_loss(s, t)
    loss.backward(retain_graph=True)
    once = s.grad.clone()
    loss.backward()
    torch.testing.assert_close(s.grad, 2 * once)
    at_fused.at_loss(s, t).backward()
    torch.testing.assert_close(s.grad, 3 * once)


def test_a_feature_changed_before_backward_is_an_error(backend: str) -> None:
    s, t = pair(2, 3, 4, 4)
    x = s * 1
    loss = at_fused.at_loss(x, t)
    with torch.no_grad():
        x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- memory --------------------------------------------------------------------------------------


@pytest.fixture(params=["cpu", "simt-wide"])
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


def test_no_feature_sized_temporary(compiled: None) -> None:
    s, t = torch.randn(2, 64, 24, 24, requires_grad=True), torch.randn(2, 64, 24, 24)

    size = s.nbytes
    loss, forward = allocated(lambda: at_fused.at_loss(s, t))
    assert 0 < forward < size / 16
    _, backward = allocated(loss.backward)
    assert size <= backward < size * 1.02
    _, both = allocated(lambda: at_fused.at_value_and_grad(s, t))
    assert size <= both < size * 1.05


def test_no_feature_sized_temporary_of_maxima(compiled: None) -> None:
    x = torch.randn(2, 64, 24, 24)
    (q, channels), forward = allocated(lambda: _ops.attention_map([x], 2.0, "max"))
    assert 0 < forward < x.nbytes / 16
    for won in ([], [channels]):
        call = partial(_ops.attention_map_backward, [x], [q], None, [0], 2.0, [], won)
        assert x.nbytes <= allocated(call)[1] < x.nbytes * 1.02


@pytest.mark.parametrize("collapse", ["mean", "max"])
def test_a_tap_in_place_allocates_nothing(compiled: None, collapse: str) -> None:
    x, g = torch.randn(2, 64, 24, 24), torch.randn(2, 64, 24, 24)
    q, *channels = _ops.attention_map([x], 2.0, collapse)
    rest = g, x, q, 2.0, collapse, *channels
    assert allocated(lambda: _ops.attention_tap_backward(*rest))[1] == x.nbytes
    assert allocated(lambda: _ops.attention_tap_backward_(*rest))[1] == 0


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    script = Path(__file__).with_name("kept.py")
    return dict(json.loads(output_of(tmp_path_factory.mktemp("kept"), str(script))))


@pytest.mark.parametrize("name", EVERY)
def test_nothing_allocated_outlives_a_call_but_its_outputs(kept: Any, name: str) -> None:
    # In a CUDA graph's pool what is kept would be used by another graph too.
    assert not any(kept[name].values()), kept[name]


@pytest.mark.parametrize("place", ["samples", "lines", "interleaved samples", "interleaved lines"])
@pytest.mark.parametrize("collapse", ["mean", "max"])
def test_elements_beyond_2_to_the_31(backend: str, collapse: str, place: str) -> None:
    """Memory that nobody touches costs nothing: a tensor may lie far apart."""
    far = 2**31 + 64
    shape, strides = {
        "samples": ((2, 2, 16), (far, 16, 1)),
        "lines": ((2, 2, 16), (16, far, 1)),
        "interleaved samples": ((2, 3, 16), (far, 1, 3)),
        "interleaved lines": ((1, 2, 2), (0, 1, far)),
    }[place]
    if torch.get_default_device().type == "cuda" and torch.cuda.mem_get_info()[0] < 10 << 30:
        pytest.skip("less than 10 GB of free memory")
    near, teacher = [torch.randn(shape).bfloat16() for _ in range(2)], torch.randn(shape)
    g, x = (torch.empty(far + 64, dtype=y.dtype).as_strided(shape, strides) for y in near)
    g.copy_(near[0])
    x.copy_(near[1])
    results = []
    for gradient, y in ((g, x), near):
        q, *channels = _ops.attention_map([y], 2.0, collapse)
        (swept,) = _ops.attention_map_backward([y], [q], None, [0], 3.0, [], channels)
        rest = y, q, 2.0, collapse, *channels
        added = _ops.attention_tap_backward(gradient, *rest)
        _ops.attention_tap_backward_(gradient, *rest)
        loss, direct = _ops.at_value_and_grad(*loss_arguments([y], [teacher]), 1.0, None)
        results.append((q, *channels, swept, added, gradient, loss, *direct))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_map_whose_feature_needs_no_gradient(backend: str) -> None:
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


TOKENS = [torch.randn(2, 3, 5)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": []}, "as many teachers"),
        ({"masks": [torch.ones(2, 16)] * 2}, "a mask per pair"),
        ({"masks": [torch.ones(2, 15)]}, r"a mask must be \(B, N\)"),
        ({"masks": [torch.ones(1, 16)]}, r"a mask must be \(B, N\)"),
        ({"masks": [torch.ones(2, 16).double()]}, "a mask must be .* float32 otherwise"),
        ({"masks": [torch.ones(2, 16).bool()]}, "a mask must be .* float32 otherwise"),
        ({"skip_tokens": [1, 1]}, r"leave a token of a feature \(B, C, N\), got 1"),
        ({"skip_tokens": [0]}, "one number per feature"),
        ({"student": TOKENS, "teacher": TOKENS, "skip_tokens": [5, 5]}, "leave a token.*got 5"),
        ({"student": TOKENS, "teacher": TOKENS, "skip_tokens": [0, -1]}, "leave a token.*got -1"),
        ({"student": TOKENS, "teacher": TOKENS, "skip_tokens": [0, 1]}, "same B and positions"),
        ({"eps_mode": "min"}, "eps_mode must be"),
        ({"collapse": "max"}, "'mean' or 'sum' here"),
        ({"student": [torch.randn(2, 3)]}, r"\(B, C, \*spatial\)"),
        ({"student": [torch.randn(0, 3, 4, 4)]}, "empty"),
        ({"student": [torch.randint(5, (2, 3, 4, 4))]}, "float16, bfloat16, float32 or float64"),
        ({"teacher": [torch.randn(2, 3, 4, 5)]}, "same B and positions"),
        ({"teacher": [torch.randn(1, 3, 4, 4)]}, "same B and positions"),
        ({"weights": [1.0, 2.0]}, "a weight per pair"),
        ({"p": float("nan")}, "p must be"),
        ({"p": 0.5}, "p must be"),
        ({"collapse": "median"}, "collapse must be"),
        ({"form": "book"}, "form must be"),
        ({"reduction": "mean"}, "reduction must be"),
        ({"eps": 0.0}, "eps must be"),
    ],
)
@pytest.mark.parametrize("name", EVERY)
def test_direct_calls_of_an_operator_are_checked(
    name: str, change: dict[str, Any], message: str
) -> None:
    pair = {"student": [torch.randn(2, 3, 4, 4)], "teacher": [torch.randn(2, 3, 4, 4)]}
    arguments = loss_arguments(**(pair | change))
    operators = torch.ops.at_fused
    with use(name):
        with pytest.raises(RuntimeError, match=message):
            operators.at_loss(*arguments, False, False)
        with pytest.raises(RuntimeError, match=message):
            operators.at_value_and_grad(*arguments, 1.0, None)


@pytest.mark.parametrize(
    ("coefficients", "pairs", "gradient"),
    [
        (torch.randn(2, 15), [0], None),
        (torch.randn(16, 2), [0], None),
        (torch.randn(2, 16).double(), [0], None),
        (torch.randn(2, 16), [1], torch.randn(1)),
        (torch.randn(2, 16), [-1], torch.randn(3)),
        (torch.randn(2, 16), [0, 1], None),
        (torch.randn(2, 16), [0], torch.randn(2, 3)),
        (torch.randn(2, 16), [2], torch.randn(2, 2)),
        (torch.randn(2, 16), [0], torch.randn(2, 2, 1)),
        (torch.randn(2, 16), [0], torch.ones((), dtype=torch.int64)),
    ],
)
@pytest.mark.parametrize("name", EVERY)
def test_direct_calls_of_the_backward_are_checked(
    name: str, coefficients: Tensor, pairs: list[int], gradient: Tensor | None
) -> None:
    x = torch.randn(2, 3, 4, 4)
    with use(name), pytest.raises(RuntimeError, match="at_fused"):
        _ops.attention_map_backward([x], [coefficients], gradient, pairs, 2.0)


def test_module_is_the_function() -> None:
    module = at_fused.ATLoss(p=4, form="paper", collapse="sum", weights=[1, 2], reduction="none")
    s, t = pair(2, 3, 4, 4)
    expected = at_fused.at_loss(
        [s, s], [t, t], p=4, form="paper", collapse="sum", weights=[1, 2], reduction="none"
    )
    for same in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(same([s, s], [t, t]), expected, rtol=0, atol=0)
    assert "form='paper'" in repr(module)
    assert not list(module.parameters())
    assert not module.state_dict()
