"""The Triton back end's taps against eager, on a GPU or else under the interpreter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_triton import DEVICE, DTYPES, LAYOUTS, assert_near, features, strided_views
from test_triton_maps import long
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from at_fused.backends import eager
from at_fused.backends import triton as backend
from at_fused.backends.results import accumulate_dtype
from at_fused.backends.triton import launch


def assert_matches_eager(gradient: Tensor, x: Tensor, p: float, collapse: str = "mean") -> None:
    """Out of place, and in place the same bits."""
    q, *channels = eager.attention_map([x], p, collapse)
    arguments = x, torch.randn_like(q), p, collapse, *channels
    before = [x.clone(), gradient.clone()]
    found = backend.attention_tap_backward(gradient, *arguments)
    assert_near([found], [eager.attention_tap_backward(gradient, *arguments)])
    assert gradient.equal(before[1])
    assert backend.attention_tap_backward_(gradient, *arguments) is None
    assert gradient.equal(found)
    assert x.equal(before[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [(2.0,), (1.0, "sum"), (2.0, "max"), *long((2.5,), (4.0, "sum"), (2.5, "max"))],
    ids=str,
)
def test_dtypes_and_layouts(options: Any, dtype: torch.dtype, layout: str) -> None:
    # 2 / 19 in fp32 would be seen in fp64, and more than one tile in every direction is.
    x, gradient = (features(2, 19, 9, 31, layout=layout, dtype=dtype) for _ in range(2))
    assert_matches_eager(gradient, x, *options)


def gradients(x: Tensor) -> dict[str, Tensor]:
    """For a feature: of both layouts, with rests between their lines, and of none."""
    b, c, h, *more = x.shape
    return {
        "planar": features(*x.shape),
        "interleaved": features(*x.shape, layout="interleaved"),
        "channels of more": features(b, c + 4, h, *more)[:, 3:-1],
        "interleaved channels of more": features(b, c + 3, h, *more, layout="interleaved")[:, 2:-1],
        "turned": features(*reversed(x.shape)).permute(*reversed(range(x.dim()))),
    }


@pytest.mark.parametrize("view", strided_views())
def test_strides(view: str) -> None:
    x = strided_views()[view]
    for gradient in gradients(x).values():
        for collapse in ("mean", "max"):
            assert_matches_eager(gradient, x, 2.0, collapse)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("collapse", ["sum", "max"])
def test_only_the_view_is_written(collapse: str, layout: str) -> None:
    for place in (
        (slice(1, 3), slice(2, 9)),
        (slice(None), slice(2, 9), slice(None), slice(1, 5)),
        (slice(None), slice(None), slice(None, None, 2)),
    ):
        base = features(4, 12, 6, 7, layout=layout)
        rest = torch.ones_like(base, dtype=torch.bool)
        rest[place] = False
        before = base.clone()
        assert_matches_eager(base[place], features(*base[place].shape), 2.0, collapse)
        assert base[rest].equal(before[rest])
        assert not base.equal(before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_did_not_win_keeps_its_bits(dtype: torch.dtype, layout: str) -> None:
    x = features(2, 75, 9, 5, layout=layout, dtype=dtype)
    x[:, 40] = math.nan
    gradient = torch.full_like(x, -0.0)
    gradient[:, 7] = math.nan
    channels = torch.arange(90, dtype=torch.int32, device=DEVICE).view(2, 45)
    channels[0] -= 5  # five that are none before the first, and in the other sample 15 behind
    won = torch.zeros_like(x, dtype=torch.bool).flatten(2)
    inside = (channels >= 0) & (channels < 75)
    won.scatter_(1, channels.clamp(0, 74).long().unsqueeze(1), inside.unsqueeze(1))
    won = won.view(x.shape)
    arguments = x, torch.full((2, 45), 3.0, device=DEVICE).to(accumulate_dtype(x))
    found = backend.attention_tap_backward(gradient, *arguments, 2.0, "max", channels)
    whole = torch.int64 if dtype == torch.float64 else torch.int32
    bits = [y[~won].to(accumulate_dtype(x)).view(whole) for y in (found, gradient)]
    assert bits[0].equal(bits[1])
    right = gradient.double() + 6 * x.double()
    torch.testing.assert_close(found[won].double(), right[won], rtol=0.02, atol=0, equal_nan=True)
    assert won.sum() == 70


@pytest.mark.parametrize("collapse", ["mean", "max"])
@pytest.mark.parametrize("p", [1.0, 2.0, *long(2.5)])
def test_zero_infinity_and_nan(p: float, collapse: str) -> None:
    values = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1.0], device=DEVICE)
    x = values.repeat_interleave(36).view(1, 1, -1)
    gradient = values.repeat_interleave(6).repeat(6).view(1, 1, -1)
    k = values.repeat(36).view(1, -1)
    channels = [torch.zeros_like(k, dtype=torch.int32)] if collapse == "max" else []
    arguments = x, k, p, collapse, *channels
    found = backend.attention_tap_backward(gradient, *arguments)
    right = eager.attention_tap_backward(gradient, *arguments)
    known = ~x.isnan() if p == 1 else x == x  # the sign of NaN is NaN here, 0 in torch
    torch.testing.assert_close(found[known], right[known], equal_nan=True)


@pytest.mark.parametrize("collapse", ["mean", "max"])
def test_expanded_gradients_and_maps(collapse: str) -> None:
    x = features(3, 5, 2, 4)
    winners = torch.arange(24, dtype=torch.int32, device=DEVICE).view(8, 3).T % 5
    channels = [winners] if collapse == "max" else []
    k = torch.full((), 0.5, device=DEVICE).expand(3, 8)
    for gradient in (features(1, 1, 1, 1).expand_as(x), features(3, 1, 2, 4).expand_as(x)):
        arguments = gradient, x, k, 2.0, collapse, *channels
        found = backend.attention_tap_backward(*arguments)
        assert_near([found], [eager.attention_tap_backward(*arguments)])
        with pytest.raises(RuntimeError, match="written in place must not be expanded"):
            backend.attention_tap_backward_(*arguments)
    # A stride that is never taken may be 0.
    one = features(2, 1, 1, 3).as_strided((2, 1, 1, 3), (3, 0, 0, 1))
    assert_matches_eager(one, features(2, 1, 1, 3), 2.0, collapse)


@pytest.mark.parametrize("order", LAYOUTS)
@pytest.mark.parametrize("collapse", ["sum", "max"])
def test_offsets_beyond_31_bits(collapse: str, order: str) -> None:
    # Samples, or lines of one, 2^32 bytes apart; what is between them is never touched.
    far = 2**31 + 16
    memory = [torch.empty(far + 64, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
    inner = (16, 1) if order == "planar" else (1, 3)
    outer = (far, 1) if order == "planar" else (1, far)
    for shape, strides in (((2, 3, 16), (far, *inner)), ((1, 2, 2), (0, *outer))):
        x, gradient = (m.as_strided(shape, strides).copy_(features(*shape)) for m in memory)
        assert_matches_eager(gradient, x, 2.0, collapse)


class _Allocated(TorchDispatchMode):
    """The sizes of what is allocated, while nothing is launched."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        if not found.is_meta and found.untyped_storage().data_ptr() not in known:
            self.sizes.append(found.numel())
        return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("collapse", ["mean", "max"])
def test_one_launch_and_no_memory_in_place(
    collapse: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches: list[Any] = []
    monkeypatch.setattr(launch, "start", lambda *_, **__: launches.append(None))
    base, x = (features(2, 12, 5, 6, layout=layout) for _ in range(2))
    q = torch.ones(2, 30, device=DEVICE)
    channels = [q.to(torch.int32)] if collapse == "max" else []
    arguments = x[:, 2:9], q, 2.0, collapse, *channels
    with _Allocated() as allocated:
        backend.attention_tap_backward_(base[:, 3:10], *arguments)
    assert allocated.sizes == []
    with _Allocated() as allocated:
        backend.attention_tap_backward(base[:, 3:10], *arguments)
    assert allocated.sizes == [420]
    assert len(launches) == 2
    # That the mode sees copies, where they are needed.
    with _Allocated() as allocated:
        backend.attention_tap_backward_(features(2, 7, 6, 5).transpose(2, 3), *arguments)
    assert 420 in allocated.sizes[1:]


def test_arguments_are_checked() -> None:
    x, k = features(2, 3, 4), torch.ones(2, 4, device=DEVICE)
    q = torch.zeros(2, 4, dtype=torch.int32, device=DEVICE)

    def fails(match: str, gradient: Tensor = x, feature: Tensor = x, **changed: Any) -> None:
        options = {"k": k, "p": 2.0, "collapse": "sum", "channels": None}
        options |= changed
        for operator in (backend.attention_tap_backward, backend.attention_tap_backward_):
            with pytest.raises(RuntimeError, match=f"at_fused: {match}"):
                operator(gradient, feature, *options.values())

    for p in (0.5, math.inf, math.nan):
        fails("p must be a finite number >= 1", p=p)
    fails("collapse must be 'mean', 'sum' or 'max', got 'min'", collapse="min")
    fails(r"features must be \(B, C, \*spatial\)", x[0], x[0])
    fails("features must not be empty", x[:0], x[:0], k=k[:0])
    fails("features must be float16, bfloat16, float32 or", x.long(), x.long())
    for other in (x[:1], x.unsqueeze(3), x.mT, x.double()):
        fails("a gradient must have the shape, dtype and device of its feature", other)
    fails("a map of channels belongs to collapse 'max', and to no other", channels=q)
    fails("a map of channels belongs to collapse 'max', and to no other", collapse="max")
    for other in (k[:1], k[:, :3], k.double(), k.half(), k.unsqueeze(2)):
        fails(r"a coefficient map must be \(B, N\), float64 for float64 features", k=other)
    for other in (q[:1], q[:, :3], q.long()):
        fails(r"a map of channels must be \(B, N\) of int32", collapse="max", channels=other)
