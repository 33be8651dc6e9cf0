"""The tap's backward: G + scale * p * dL/dQ * |A|^(p-1) * sign(A), new and in place.

Against the formula in float64, on every back end.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import EVERY, SIMT, opcheck, slow, use
from test_map_operators import DTYPES, assert_gradient_matches
from torch import Tensor

from at_fused import _ops

CHECKED = [pytest.param(n, marks=[pytest.mark.long] * slow(n)) for n in EVERY]
# (p, collapse)
Options = tuple[float, str]
KINDS: list[Options] = [(p, c) for p in (2.0, 1.0, 3.5, 4.0) for c in ("mean", "sum", "max")]
FEW: list[Options] = [(2.0, "mean"), (3.5, "sum"), (2.0, "max")]


def padded(x: Tensor, *pads: int, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    """The values of ``x`` inside a larger tensor: ``pads`` of C, H and W, before and behind."""
    sizes = [n + a + b for n, a, b in zip(x.shape[1:], pads[::2], pads[1::2], strict=True)]
    view = x.new_full((len(x), *sizes), 7.0).contiguous(memory_format=layout)
    for d, (n, a) in enumerate(zip(x.shape[1:], pads[::2], strict=True)):
        view = view.narrow(1 + d, a, n)
    return view.copy_(x)


def unaligned(x: Tensor) -> Tensor:
    return x.new_zeros(x.numel() + 1)[1:].view(x.shape).copy_(x)


LAST = torch.channels_last
PLACES: dict[str, Callable[[Tensor], Tensor]] = {
    "planar": lambda x: x.contiguous(),
    "interleaved": lambda x: x.contiguous(memory_format=LAST),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "channel slice": lambda x: padded(x, 2, 1, 0, 0, 0, 0),
    "channels apart": lambda x: padded(x, 0, 0, 0, 1, 0, 0),
    "crop": lambda x: padded(x, 0, 0, 1, 2, 2, 0),
    "interleaved slice": lambda x: padded(x, 1, 3, 0, 0, 0, 0, layout=LAST),
    "aligned slice": lambda x: padded(x, 8, 8, 0, 0, 0, 0, layout=LAST),
    "unaligned": unaligned,
    "batch innermost": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
}


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def inputs(
    *shape: int, collapse: str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """A gradient, a feature, its map's gradient and, for a maximum, the channels that have it."""
    gradient, x = numbers(*shape, dtype=dtype), numbers(*shape, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    k = numbers(shape[0], math.prod(shape[2:]), dtype=wide)
    channels = x.flatten(2).abs().max(1).indices.int() if collapse == "max" else None
    return gradient, x, k, channels


def reference(
    gradient: Tensor, x: Tensor, k: Tensor, channels: Tensor | None, options: Options
) -> Tensor:
    p, collapse = options
    a = x.double()
    slope = a.abs().pow(p - 1) * a.sign()
    scale = 1 / x.shape[1] if collapse == "mean" else 1.0
    added = scale * p * k.double().view(x.shape[0], 1, *x.shape[2:]) * slope
    if channels is not None:
        number = torch.arange(x.shape[1], device=x.device).view(1, -1, *[1] * (x.dim() - 2))
        added = torch.where(number == channels.view(len(x), 1, *x.shape[2:]), added, 0.0)
    return gradient.double() + added


def assert_is_the_formula(
    gradient: Tensor, x: Tensor, k: Tensor, channels: Tensor | None, options: Options
) -> None:
    """Both operators; and nothing but the gradient in place is written."""
    p, collapse = options
    kept = [t.clone() for t in (gradient, x, k)]
    expected = reference(gradient, x, k, channels, options)
    found = _ops.attention_tap_backward(gradient, x, k, p, collapse, channels)
    assert_gradient_matches(found, expected, x)
    assert all(map(torch.equal, kept, (gradient, x, k)))
    strides = gradient.stride()
    _ops.attention_tap_backward_(gradient, x, k, p, collapse, channels)
    assert gradient.stride() == strides
    assert torch.equal(gradient, found)
    assert all(map(torch.equal, kept[1:], (x, k)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("place", ["planar", "interleaved"])
def test_options(backend: str, options: Options, dtype: torch.dtype, place: str) -> None:
    for shape in ((2, 3, 7, 7), (3, 16, 7, 7), (2, 24, 8, 6)):
        gradient, x, *rest = inputs(*shape, collapse=options[1], dtype=dtype)
        assert_is_the_formula(PLACES[place](gradient), PLACES[place](x), *rest, options)


SHAPES = [
    (1, 1, 1, 1),
    (3, 5, 1, 1),
    (2, 1, 3, 5),
    (4, 8, 1, 2),
    (2, 70, 7, 7),
    (2, 300, 1, 5),
    (70, 4, 3, 3),  # several samples in a task
    (1, 24, 64, 80),  # one sample in several tasks
    (2, 512, 14, 14),
    (1, 2048, 7, 7),  # rows of several channels in several tasks
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("place", ["planar", "interleaved"])
def test_shapes(backend: str, shape: tuple[int, ...], dtype: torch.dtype, place: str) -> None:
    for options in FEW:
        gradient, x, *rest = inputs(*shape, collapse=options[1], dtype=dtype)
        assert_is_the_formula(PLACES[place](gradient), PLACES[place](x), *rest, options)


@pytest.mark.parametrize("shape", [(3, 5, 29), (2, 7, 5, 6, 7), (2, 3, 2, 3, 2, 2)], ids=str)
def test_ranks(backend: str, shape: tuple[int, ...]) -> None:
    for options in FEW:
        gradient, x, *rest = inputs(*shape, collapse=options[1])
        tokens = gradient.movedim(1, -1).contiguous().movedim(-1, 1)
        for g in (gradient, tokens):
            assert_is_the_formula(g.clone(), x, *rest, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gradient_place", PLACES)
@pytest.mark.parametrize("place", PLACES)
def test_places(backend: str, place: str, gradient_place: str, dtype: torch.dtype) -> None:
    for options, size in itertools.product(FEW, ((4, 6), (7, 7))):
        gradient, x, *rest = inputs(2, 16, *size, collapse=options[1], dtype=dtype)
        g, y = PLACES[gradient_place](gradient), PLACES[place](x)
        base = g if g._base is None else g._base
        outside = torch.ones_like(base, dtype=torch.bool)
        outside.as_strided(g.shape, g.stride(), g.storage_offset()).fill_(False)
        around = base[outside]
        assert_is_the_formula(g, y, *rest, options)
        assert torch.equal(base[outside], around)


def test_a_strided_map_and_strided_channels(backend: str) -> None:
    gradient, x, k, channels = inputs(3, 8, 5, 4, collapse="max")
    k, channels = k.t().contiguous().t(), channels.repeat(1, 2)[:, :20]
    assert_is_the_formula(gradient, x, k, channels, (2.0, "max"))
    assert_is_the_formula(gradient, x, k, None, (2.0, "mean"))


def test_an_expanded_gradient_becomes_a_new_one(backend: str) -> None:
    for options in FEW:
        _, x, k, channels = inputs(2, 8, 4, 4, collapse=options[1])
        p, collapse = options
        for gradient in (torch.randn(8, 4, 4).expand(2, 8, 4, 4), torch.ones(()).expand(x.shape)):
            found = _ops.attention_tap_backward(gradient, x, k, p, collapse, channels)
            assert_gradient_matches(found, reference(gradient, x, k, channels, options), x)


@pytest.mark.parametrize("collapse", ["mean", "max"])
@pytest.mark.parametrize("skip", [1, 4])
def test_in_place_on_a_view_of_tokens(backend: str, skip: int, collapse: str) -> None:
    whole, tokens = torch.randn(2, 13, 24), torch.randn(2, 13, 24)
    before = whole.clone()
    view, x = (t[:, skip:].transpose(1, 2) for t in (whole, tokens))
    k = torch.randn(2, 13 - skip)
    channels = x.abs().max(1).indices.int() if collapse == "max" else None
    expected = reference(view, x, k, channels, (2.0, collapse))
    _ops.attention_tap_backward_(view, x, k, 2.0, collapse, channels)
    assert torch.equal(whole[:, :skip], before[:, :skip])
    torch.testing.assert_close(view.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("place", ["planar", "interleaved", "transposed", "unaligned"])
def test_special_values_of_a_square(backend: str, place: str) -> None:
    x, k = torch.ones(1, 4, 3, 4), torch.ones(1, 12)
    gradient = torch.full_like(x, -0.0)
    x[0, 0, 0] = torch.tensor([math.inf, -math.inf, math.nan, -0.0])
    gradient[0, 1, 0] = torch.tensor([math.inf, -math.inf, math.nan, 0.0])
    k[0, 7] = math.inf
    k[0, 8] = 0
    expected = torch.full_like(x, 0.5)
    expected[0, 0, 0] = torch.tensor([math.inf, -math.inf, math.nan, -0.0])
    expected[0, 1, 0] = torch.tensor([math.inf, -math.inf, math.nan, 0.5])
    expected[0, :, 1, 3] = math.inf
    expected[0, :, 2, 0] = 0
    g, y = PLACES[place](gradient), PLACES[place](x)
    found = _ops.attention_tap_backward(g, y, k, 2.0, "mean")
    _ops.attention_tap_backward_(g, y, k, 2.0, "mean")
    for result in (found, g):
        torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.signbit(result[0, 0, 0, 3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", ["planar", "interleaved", "transposed", "unaligned"])
@pytest.mark.parametrize("name", [n for n in CHECKED if n.values != ("eager",)])  # it adds zeros
def test_what_a_maximum_leaves_alone_keeps_its_bits(
    name: str, place: str, dtype: torch.dtype
) -> None:
    gradient, x, k, channels = inputs(2, 16, 4, 6, collapse="max", dtype=dtype)
    gradient[:, ::3] = math.nan
    gradient[:, 1::3] = -0.0
    k[0] = math.nan
    channels[:, ::2] = torch.tensor([-1, -16, 16, 2**31 - 1]).repeat(6)[:12].int()
    won = torch.zeros(2, 16, 24, dtype=torch.bool)
    named = channels.view(2, 1, 24).long()
    won.scatter_(1, named.clamp(0, 15), (named >= 0) & (named < 16))
    g, y = PLACES[place](gradient), PLACES[place](x)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    with use(name):
        found = _ops.attention_tap_backward(g, y, k, 2.0, "max", channels)
        _ops.attention_tap_backward_(g, y, k, 2.0, "max", channels)
    for result in (found, g):
        flat, before = result.flatten(2), gradient.flatten(2)
        same = flat.contiguous().view(bits) == before.contiguous().view(bits)
        assert same[~won].all()
        assert torch.isnan(flat[0][won[0]]).all()


@pytest.mark.parametrize("collapse", ["mean", "max"])
def test_where_features_are_zero(backend: str, collapse: str) -> None:
    gradient, x, k, channels = inputs(1, 3, 4, 4, collapse=collapse)
    x.zero_()
    for p in (1.0, 2.0, 3.0, 2.5):
        found = _ops.attention_tap_backward(gradient, x, k, p, collapse, channels)
        assert torch.equal(found, gradient)


# ---- PyTorch's machinery -------------------------------------------------------------------------


@pytest.mark.parametrize("options", FEW, ids=str)
def test_opcheck(backend: str, options: Options) -> None:
    gradient, x, k, channels = inputs(2, 3, 4, 5, collapse=options[1])
    x = x.contiguous(memory_format=LAST)
    for t in (gradient, x, k):
        t.requires_grad_()
    arguments = (gradient, x, k, *options, channels)
    opcheck(backend, torch.ops.at_fused.attention_tap_backward, arguments)


@pytest.mark.parametrize("options", FEW, ids=str)
def test_opcheck_in_place(backend: str, options: Options) -> None:
    gradient, x, k, channels = inputs(2, 3, 4, 5, collapse=options[1])
    torch.library.opcheck(
        torch.ops.at_fused.attention_tap_backward_,
        (gradient, x, k, *options, channels),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("options", FEW, ids=str)
def test_derivatives_of_the_new_gradient(backend: str, options: Options) -> None:
    gradient, x, k, channels = inputs(1, 3, 3, 4, collapse=options[1], dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (gradient, x, k)]

    def tapped(*tensors: Tensor) -> Tensor:
        return _ops.attention_tap_backward(*tensors, *options, channels)

    assert torch.autograd.gradcheck(tapped, leaves, fast_mode=True)


# ---- errors --------------------------------------------------------------------------------------

OPERATORS = "attention_tap_backward", "attention_tap_backward_"
SAME = "must have the shape, dtype and device of its feature"
MAP = r"must be \(B, N\)"
BELONGS = "a map of channels belongs to collapse 'max', and to no other"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradient": torch.ones(2, 3, 4, 5)}, SAME),
        ({"gradient": torch.ones(2, 3, 16)}, SAME),
        ({"gradient": torch.ones(2, 3, 4, 4).half()}, SAME),
        ({"gradient": torch.ones(2, 3, 4, 4).double()}, SAME),
        ({"gradient": torch.ones(2, 3), "feature": torch.ones(2, 3)}, r"\(B, C, \*spatial\)"),
        ({"gradient": torch.ones(0, 3, 4, 4), "feature": torch.ones(0, 3, 4, 4)}, "be empty"),
        ({"gradient": torch.ones(2, 3, 4, 4).int(), "feature": torch.ones(2, 3, 4, 4).int()}, "be"),
        ({"map_gradient": torch.ones(2, 15)}, MAP),
        ({"map_gradient": torch.ones(1, 16)}, MAP),
        ({"map_gradient": torch.ones(2, 4, 4)}, MAP),
        ({"map_gradient": torch.ones(2, 16).double()}, MAP),
        ({"map_gradient": torch.ones(2, 16).half()}, MAP),
        ({"p": 0.5}, "p must be a finite number >= 1, got 0.5"),
        ({"p": math.inf}, "p must be a finite number >= 1, got inf"),
        ({"p": math.nan}, "p must be a finite number >= 1, got nan"),
        ({"collapse": "median"}, "collapse must be 'mean', 'sum' or 'max', got 'median'"),
        ({"collapse": "max"}, BELONGS),
        ({"channels": torch.zeros(2, 16).int()}, BELONGS),
        ({"collapse": "max", "channels": torch.zeros(2, 16).long()}, "of int32"),
        ({"collapse": "max", "channels": torch.zeros(2, 15).int()}, "of int32"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", CHECKED)
@pytest.mark.parametrize("operator", OPERATORS)
def test_direct_calls_are_checked(
    operator: str, name: str, change: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {
        "gradient": torch.ones(2, 3, 4, 4),
        "feature": torch.ones(2, 3, 4, 4),
        "map_gradient": torch.ones(2, 16),
        "p": 2.0,
        "collapse": "mean",
        "channels": None,
    }
    with use(name), pytest.raises(RuntimeError, match=message):
        getattr(_ops, operator)(*(arguments | change).values())


@pytest.mark.parametrize("name", CHECKED)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("elsewhere", range(4))
def test_tensors_elsewhere_are_refused(operator: str, name: str, elsewhere: int) -> None:
    gradient, x, k, channels = inputs(2, 3, 4, 4, collapse="max")
    tensors = [gradient, x, k, channels]
    tensors[elsewhere] = tensors[elsewhere].to("meta")
    *three, channels = tensors
    # The dispatcher itself would go where any of the tensors is.
    cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    with use(name):
        namespace = torch.ops.at_fused_simt if name in SIMT else torch.ops.at_fused
        call = getattr(namespace, operator).default
        with pytest.raises(RuntimeError, match=(SAME, SAME, MAP, "of int32")[elsewhere]):
            call.redispatch(cpu, *three, 2.0, "max", channels)


def test_channels_that_are_none_have_no_gradient(backend: str) -> None:
    gradient, x, k, _ = inputs(2, 8, 4, 4, collapse="max")
    channels = torch.tensor([-1, 8, -8, 2**31 - 1]).repeat(2, 4).int()
    for y in (x, x.contiguous(memory_format=LAST)):
        g = torch.empty_like(y).copy_(gradient)
        found = _ops.attention_tap_backward(g, y, k, 2.0, "max", channels)
        _ops.attention_tap_backward_(g, y, k, 2.0, "max", channels)
        assert torch.equal(found, gradient)
        assert torch.equal(g, gradient)


def test_an_expanded_gradient_is_not_written(backend: str) -> None:
    x, k = torch.randn(2, 3, 4, 4), torch.randn(2, 16)
    ones = torch.ones(3, 4, 4)
    wrong = ones.expand(2, 3, 4, 4), ones[:, :1, :1].expand(2, 3, 4, 4)
    for gradient in (*wrong, ones.repeat(2, 1, 1, 1).as_strided((2, 3, 4, 4), (24, 8, 2, 1))):
        with pytest.raises(RuntimeError, match="in place must not be expanded, nor ov"):
            _ops.attention_tap_backward_(gradient, x, k, 2.0, "mean")
    assert (ones == 1).all()
    # A stride that is never taken may be 0.
    gradient, x, k, _ = inputs(2, 1, 1, 3, collapse="mean")
    assert_is_the_formula(gradient.as_strided(x.shape, (3, 0, 0, 1)), x, k, None, (2.0, "mean"))


@pytest.mark.parametrize("collapse", ["mean", "max"])
@pytest.mark.parametrize("shift", [0, 1, 40])
def test_what_lies_where_the_gradient_is_written(backend: str, collapse: str, shift: int) -> None:
    """As if it lay elsewhere."""
    memory = torch.cat([torch.randn(140), torch.zeros(40)])
    x, gradient = memory[:96].view(2, 3, 4, 4), memory[shift : shift + 96].view(2, 3, 4, 4)
    k = memory[shift + 60 : shift + 92].view(2, 16)
    channels = memory.view(torch.int32)[148:180].view(2, 16) if collapse == "max" else None
    apart = [None if y is None else y.clone() for y in (gradient, x, k, channels)]
    *three, last = apart
    right = _ops.attention_tap_backward(*three, 2.0, collapse, last)
    _ops.attention_tap_backward_(gradient, x, k, 2.0, collapse, channels)
    torch.testing.assert_close(gradient, right, rtol=1e-6, atol=1e-6)


def test_the_operator_in_place_has_no_derivative() -> None:
    gradient, x, k, _ = inputs(2, 3, 4, 4, collapse="mean")
    with pytest.raises(RuntimeError, match="attention_tap_backward_ has no derivative"):
        _ops.attention_tap_backward_(gradient, x.requires_grad_(), k, 2.0, "mean")


def test_a_gradient_written_in_place_is_known_to_have_changed(backend: str) -> None:
    gradient, feature = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    version = gradient._version
    torch.ops.at_fused.attention_tap_backward_(gradient, feature, torch.rand(2, 16), 2.0, "mean")
    assert gradient._version > version
