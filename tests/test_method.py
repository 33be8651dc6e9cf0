"""The whole method through the public functions, against its formulas written out in float64."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import assert_matches_reference, expected_loss, raw_map, spatial_loss
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import at_fused
from at_fused import _problem

LAYOUTS = ("planar", "interleaved")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def feature(*shape: int, layout: str = "planar", dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(*shape, dtype=torch.float64).to(dtype)
    return x if layout == "planar" else x.movedim(1, -1).contiguous().movedim(-1, 1)


GENERAL: dict[str, dict[str, Any]] = {
    "max": {"collapse": "max"},
    "maps": {"resize": "maps", "form": "paper"},
    "features": {"resize": "features", "p": 3.0},
    "signed": {"absolute": False, "p": 3.0},
    "signed features": {"absolute": False, "p": 3.0, "resize": "features"},
    "added": {"eps_mode": "add", "eps": 0.1, "resize": "maps"},
    "sample": {"reduction": "sample", "resize": "features", "collapse": "max"},
}


# ---- every option --------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", GENERAL)
def test_the_method(backend: str, options: str, dtype: torch.dtype, layout: str) -> None:
    sizes = ((6, 3), (4, 5)) if "resize" in GENERAL[options] else ((4, 5), (4, 5))
    s = feature(2, 3, *sizes[0], layout=layout, dtype=dtype)
    assert_matches_reference([s], [feature(2, 5, *sizes[1], dtype=dtype)], **GENERAL[options])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [1.0, 2.0, 2.5, 4.0])
def test_max_maps(backend: str, p: float, dtype: torch.dtype, layout: str) -> None:
    s, t = feature(3, 20, 5, 7, layout=layout, dtype=dtype), feature(3, 33, 5, 7, dtype=dtype)
    for form in ("code", "paper"):
        # The largest of rounded features: the same ones, whatever the power.
        assert_matches_reference([s], [t], collapse="max", p=p, form=form)


def test_the_gradient_of_a_maximum_goes_to_the_first_channel(backend: str) -> None:
    x = torch.zeros(2, 5, 3, 4)
    x[:, 1], x[:, 3] = -2.0, 2.0
    x[1, 4] = 2.0
    x.requires_grad_()
    q = at_fused.attention_map(x, collapse="max")
    assert torch.equal(q, torch.full((2, 3, 4), 4.0))
    q.sum().backward()
    expected = torch.zeros(2, 5, 3, 4)
    expected[:, 1] = -4.0
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_maximum_of_nan_is_nan(backend: str, layout: str) -> None:
    x = feature(2, 6, 3, 5, layout=layout, dtype=torch.float32)
    x[1, 4, 2, 1] = float("nan")
    q = at_fused.attention_map(x, collapse="max")
    assert torch.isnan(q).nonzero().tolist() == [[1, 2, 1]]


RESIZES = [
    ((3, 4, 8, 8), (3, 6, 4, 4)),
    ((3, 4, 4, 4), (3, 6, 8, 8)),
    ((2, 5, 13, 9), (2, 3, 7, 5)),  # windows that overlap
    ((2, 5, 8, 3), (2, 3, 4, 6)),  # each side has the larger one of the sizes
    ((2, 5, 1, 6), (2, 3, 5, 6)),
    ((2, 5, 11), (2, 3, 4)),
    ((2, 3, 4, 6, 5), (2, 4, 2, 5, 5)),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shapes", RESIZES, ids=str)
@pytest.mark.parametrize("resize", ["maps", "features"])
def test_resizing(
    backend: str, resize: str, shapes: tuple[tuple[int, ...], tuple[int, ...]], layout: str
) -> None:
    for dtype in (torch.float32, torch.float64):
        s, t = (feature(*shape, layout=layout, dtype=dtype) for shape in shapes)
        assert_matches_reference([s], [t], resize=resize)
        assert_matches_reference([s], [t], resize=resize, collapse="max", p=1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("resize", ["maps", "features"])
def test_resizing_half_precision(backend: str, resize: str, dtype: torch.dtype) -> None:
    for larger, smaller in (((9, 12), (6, 6)), ((40,), (7,)), ((5, 6, 9), (2, 3, 4))):
        for layout in LAYOUTS:
            s = feature(3, 20, *larger, layout=layout, dtype=dtype)
            t = feature(3, 12, *smaller, layout=layout, dtype=dtype)
            assert_matches_reference([s], [t], resize=resize, form="paper")


@pytest.mark.parametrize(
    ("larger", "smaller"),
    [((9000,), (3,)), ((9000,), (8999,)), ((75, 80), (74, 79)), ((20, 22, 20), (10, 21, 10))],
    ids=str,
)
def test_pooling_by_many_and_by_large_windows(
    fast_backend: str, larger: tuple[int, ...], smaller: tuple[int, ...]
) -> None:
    for layout in LAYOUTS:
        s, t = feature(1, 3, *larger, layout=layout), feature(1, 2, *smaller, layout=layout)
        assert_matches_reference([s.float()], [t.float()], resize="features", p=3.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pooling_leaves_channels_innermost(dtype: torch.dtype) -> None:
    """And a feature as it lies that has the smaller size already."""
    x = torch.randn(2, 8, 6, 9).to(dtype, memory_format=torch.channels_last)
    pooled = _problem._pool(x, [3, 4])
    assert pooled.shape == (2, 8, 3, 4)
    assert pooled.is_contiguous(memory_format=torch.channels_last)
    tokens = torch.randn(2, 54, 8).to(dtype).transpose(1, 2)
    assert _problem._pool(tokens, [9]).stride(1) == 1
    assert _problem._pool(tokens.unflatten(2, (6, 9)), [3, 4]).stride(1) == 1
    assert _problem._pool(x, [6, 9]) is x


def test_nan_and_infinity_stay_in_their_windows(backend: str) -> None:
    s, t = torch.randn(3, 4, 6, 6, requires_grad=True), torch.randn(3, 5, 3, 3)
    with torch.no_grad():
        s[0, 1, 2, 2], s[1, 1, 2, 2] = float("nan"), float("inf")
    loss = at_fused.at_loss(s, t, resize="features", reduction="sample")
    assert loss.isnan().tolist() == [[True, True, False]]
    (gradient,) = torch.autograd.grad(loss.nansum(), s)
    assert gradient[2].isfinite().all()
    assert gradient[2].any()


def test_a_list_whose_pairs_differ_in_what_is_resized(backend: str) -> None:
    students = [feature(2, 3, 8, 8), feature(2, 5, 4, 4), feature(2, 4, 3, 5)]
    teachers = [feature(2, 4, 4, 4), feature(2, 5, 4, 4), feature(2, 6, 6, 10)]
    for resize in ("maps", "features"):
        found = at_fused.at_loss(students, teachers, resize=resize, reduction="none")
        right = [
            spatial_loss(s, t, resize=resize).mean()
            for s, t in zip(students, teachers, strict=True)
        ]
        torch.testing.assert_close(found, torch.stack(right), rtol=1e-11, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("attend", ["channel", "both"])
def test_channel_attention(backend: str, attend: str, dtype: torch.dtype, layout: str) -> None:
    s = feature(3, 20, 5, 7, layout=layout, dtype=dtype)
    t = feature(3, 20, 5, 7, dtype=dtype)
    for options in ({}, {"form": "paper", "p": 1.0}, {"collapse": "max"}):
        assert_matches_reference([s], [t], attend=attend, **options)


def test_channel_attention_of_different_sizes(backend: str) -> None:
    s, t = feature(3, 10, 8, 6), feature(3, 10, 5, 7)
    assert_matches_reference([s], [t], attend="channel")
    assert_matches_reference([s], [t], attend="both", resize="maps")
    q = at_fused.attention_map(s, attend="channel", normalize=True)
    right = F.normalize(s.square().mean((2, 3)))
    torch.testing.assert_close(q, right, rtol=1e-11, atol=0)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, 5.0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_powers_without_the_absolute_value(backend: str, layout: str, p: float) -> None:
    for dtype in (torch.float32, torch.float64):
        s = feature(3, 20, 5, 7, layout=layout, dtype=dtype)
        t = feature(3, 11, 5, 7, dtype=dtype) + 1
        for collapse in ("mean", "sum"):
            assert_matches_reference([s], [t], absolute=False, p=p, collapse=collapse)
    assert_matches_reference([s], [feature(3, 4, 3, 4)], absolute=False, p=p, resize="features")
    assert_matches_reference([s], [feature(3, 20, 5, 7)], absolute=False, p=p, attend="both")


@pytest.mark.parametrize("p", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_signed_maps(backend: str, dtype: torch.dtype, p: float) -> None:
    for layout in LAYOUTS:
        x = feature(3, 20, 5, 7, layout=layout, dtype=dtype)
        size = x.double().abs().pow(p).sum(1).max()
        for collapse in ("mean", "sum"):
            q = at_fused.attention_map(x, p=p, collapse=collapse, absolute=False)
            assert q.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            right = raw_map(x.double(), p, collapse, False)
            bound = (1e-14 if dtype == torch.float64 else 1e-6) * size
            assert ((q.double() - right).abs() <= bound).all()
            right = raw_map(x.double().flatten(2).transpose(1, 2), p, collapse, False)
            q = at_fused.attention_map(x, p=p, collapse=collapse, absolute=False, attend="channel")
            assert ((q.double() - right).abs() <= 7 * bound).all()
        y, q = at_fused.attention_tap(x, p=p, absolute=False)
        assert torch.equal(q, at_fused.attention_map(x, p=p, absolute=False))
        assert torch.equal(y, x)


def test_even_powers_have_no_sign(backend: str) -> None:
    x = feature(2, 5, 4, 4).requires_grad_()
    for p in (2, 4.0, 6.0):
        found, right = (at_fused.attention_map(x, p=p, absolute=a) for a in (False, True))
        assert torch.equal(found, right)
        found, right = (torch.autograd.grad(q.sum(), x)[0] for q in (found, right))
        assert torch.equal(found, right)


def test_special_values_of_signed_powers(backend: str) -> None:
    x = torch.zeros(1, 3, 5)
    x[0, 0] = torch.tensor([float("nan"), float("inf"), -float("inf"), -2.0, 0.0])
    x[0, 1, 2] = 1
    x.requires_grad_()
    for p in (1.0, 3.0, 2.0**24 + 1):
        q = at_fused.attention_map(x, p=p, collapse="sum", absolute=False)
        assert q[0, 0].isnan()
        assert q[0, 1:3].tolist() == [float("inf"), -float("inf")]
        assert q[0, 3] == (-(2.0**p) if p < 4 else -float("inf"))
        (gradient,) = torch.autograd.grad(q[0, 4], x)
        assert (gradient[0, :, 4] == (p == 1)).all()


def test_a_zero_map_with_an_epsilon_that_is_added(backend: str) -> None:
    s, t = torch.zeros(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
    at_fused.at_loss(s, t, eps_mode="add", eps=1e-6, p=1.0).backward()
    assert torch.equal(s.grad, torch.zeros_like(s))


# ---- tokens --------------------------------------------------------------------------------------


def test_tokens_against_a_convolution(backend: str) -> None:
    tokens, maps = torch.randn(2, 1 + 12, 8).double(), feature(2, 5, 6, 8)
    square = tokens[:, 1:].transpose(1, 2).unflatten(2, (3, 4))
    for resize in ("maps", "features"):
        found = at_fused.at_loss(
            maps, tokens, channel_dim=(1, -1), skip_tokens=1, map_size=(3, 4), resize=resize
        )
        right = spatial_loss(maps, square, resize=resize).mean()
        torch.testing.assert_close(found, right, rtol=1e-11, atol=0)
        found = at_fused.at_loss(
            tokens,
            maps,
            channel_dim=(-1, 1),
            skip_tokens=(1, 0),
            map_size=((3, 4), None),
            resize=resize,
        )
        right = spatial_loss(square, maps, resize=resize).mean()
        torch.testing.assert_close(found, right, rtol=1e-11, atol=0)
    q = at_fused.attention_map(tokens, channel_dim=-1, skip_tokens=1, map_size=(3, 4))
    torch.testing.assert_close(q, square.square().mean(1), rtol=1e-11, atol=0)


# ---- masks, weights of samples, one loss each ----------------------------------------------------


@pytest.mark.parametrize("resize", ["maps", "features"])
def test_a_mask_of_any_size(backend: str, resize: str) -> None:
    s, t = feature(3, 4, 8, 6), feature(3, 5, 4, 9)
    for mask in (
        torch.rand(3, 8, 6) > 0.4,
        torch.rand(3, 4, 6),
        torch.rand(3, 32, 24) > 0.3,
        torch.rand(3, 7, 5),
    ):
        assert_matches_reference([s], [t], mask=[mask], resize=resize, form="paper")
    assert_matches_reference([s], [feature(3, 2, 8, 6)], mask=[torch.rand(3, 8, 6)])


def test_what_a_mask_leaves_out_has_no_gradient(backend: str) -> None:
    mask = torch.ones(2, 4, 4)
    mask[:, :, 3] = 0
    s, t = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
    at_fused.at_loss(s, t, mask=mask).backward()
    assert not s.grad[..., 3].any()
    assert s.grad[..., :3].all()
    changed = t.clone()
    changed[..., 3] = 7
    assert torch.equal(at_fused.at_loss(s, t, mask=mask), at_fused.at_loss(s, changed, mask=mask))


@pytest.mark.parametrize("reduction", ["sum", "none", "sample"])
@pytest.mark.parametrize("attend", ["spatial", "channel", "both"])
def test_weights_of_samples(backend: str, attend: str, reduction: str) -> None:
    s, t = feature(4, 3, 5, 5), feature(4, 3, 5, 5)
    weights = torch.tensor([1.0, 0.0, 0.5, 2.0])
    found = at_fused.at_loss(
        [s, s], [t, t], sample_weights=weights, reduction=reduction, attend=attend
    )
    one = expected_loss(s, t, attend=attend) * weights
    right = {"sum": 2 * one.mean(), "none": one.mean().expand(2), "sample": one.expand(2, 4)}
    torch.testing.assert_close(found, right[reduction], rtol=1e-11, atol=0)


# ---- all of it in one operator -------------------------------------------------------------------

# Two pairs: sizes of their maps, channels of both sides.
PAIRS = [((5, 7), 20, 9), ((4, 3), 6, 17)]
PLACES = ("planar", "interleaved", "tokens")
SKIPS = 2, 1  # tokens of students and teachers
FACTORS: dict[str, dict[str, Any]] = {
    "sample": {"reduction": "sample", "weights": [2.0, -0.5]},
    "weights of samples": {"reduction": "none", "sample_weights": True},
    "added": {"eps_mode": "add", "eps": 0.3},
    "mask": {"mask": "bool"},
    "float masks, sample": {"mask": "float", "reduction": "sample", "eps_mode": "add", "eps": 0.3},
    "all": {
        "mask": "bool",
        "sample_weights": True,
        "weights": [0.5, -2.0],
        "collapse": "sum",
        "p": 3.0,
    },
    "mask, none": {"mask": "float", "reduction": "none", "p": 1.0},
}


def placed_pairs(place: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Students and teachers as at_loss takes them: of four dimensions, or tokens."""
    sides: tuple[list[Tensor], list[Tensor]] = [], []
    for (h, w), *channels in PAIRS:
        for side, c, skip in zip(sides, channels, SKIPS, strict=True):
            if place == "tokens":
                side.append(feature(3, skip + h * w, c, dtype=dtype))
            else:
                side.append(feature(3, c, h, w, layout=place, dtype=dtype))
    return sides


def masks_of_pairs(kind: str, place: str) -> list[Tensor]:
    """One of each pair; of the second sample nothing is left."""
    masks = [torch.rand(3, *size) for size, *_ in PAIRS]
    masks = [mask > 0.3 if kind == "bool" else mask for mask in masks]
    for mask in masks:
        mask[1] = 0
    return [mask.flatten(1) for mask in masks] if place == "tokens" else masks


def made(factors: str, place: str) -> dict[str, Any]:
    """Options of FACTORS, with tensors."""
    options = dict(FACTORS[factors])
    if place == "tokens":
        options |= {"channel_dim": -1, "skip_tokens": SKIPS}
    if "mask" in options:
        options["mask"] = masks_of_pairs(options["mask"], place)
    if "sample_weights" in options:
        options["sample_weights"] = torch.tensor([1.0, 0.0, 0.25])
    return options


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_factors(backend: str, dtype: torch.dtype, place: str, factors: str) -> None:
    pairs = placed_pairs(place, dtype)
    for form in ("code", "paper"):
        assert_matches_reference(*pairs, form=form, **made(factors, place))


@pytest.mark.parametrize("side", ["student_grad", "teacher_grad"])
@pytest.mark.parametrize("place", PLACES)
def test_factors_with_a_gradient_of_one_side(backend: str, place: str, side: str) -> None:
    for factors in ("added", "float masks, sample", "all"):
        without = {"student_grad": False, "teacher_grad": False} | {side: True}
        pairs = placed_pairs(place, torch.float32)
        assert_matches_reference(*pairs, **without, **made(factors, place))


@pytest.mark.parametrize("place", PLACES)
def test_masks_of_samples_that_are_cut(backend: str, place: str) -> None:
    """Samples that several tasks, blocks or programs share, beside whole ones."""
    size, skips = (64, 80), SKIPS if place == "tokens" else (0, 0)
    students, teachers = placed_pairs(place, torch.float32)
    for side, c, skip in ((students, 24, skips[0]), (teachers, 40, skips[1])):
        if place == "tokens":
            side[1] = feature(1, skip + 64 * 80, c, dtype=torch.float32)
        else:
            side[1] = feature(1, c, *size, layout=place, dtype=torch.float32)
    masks = masks_of_pairs("float", place)
    masks[1] = torch.rand(1, *size)
    masks[1][:, :7] = 0
    masks[1] = masks[1].flatten(1) if place == "tokens" else masks[1]
    tokens = {"channel_dim": -1, "skip_tokens": SKIPS} if place == "tokens" else {}
    options = {"mask": masks, "reduction": "none", "form": "paper"} | tokens
    assert_matches_reference(students, teachers, **options)


def test_tokens_of_one_side_and_without_a_list(backend: str) -> None:
    """Numbers of skipped tokens that differ, or are of one side alone."""
    s, t = feature(3, 14, 5, dtype=torch.float32), feature(3, 12, 8, dtype=torch.float32)
    s.requires_grad_()
    mask = torch.rand(3, 3, 4) > 0.3
    loss = at_fused.at_loss(
        s, t, channel_dim=-1, skip_tokens=(2, 0), map_size=(3, 4), mask=mask, form="paper"
    )
    sd = s.detach().double().requires_grad_()
    square = [x.transpose(1, 2).unflatten(2, (3, 4)) for x in (sd[:, 2:], t.double())]
    right = spatial_loss(*square, mask=mask, form="paper").mean()
    torch.testing.assert_close(loss.double(), right, rtol=2e-5, atol=0)
    (g,), (r,) = torch.autograd.grad(loss, s), torch.autograd.grad(right, sd)
    assert not g[:, :2].any()
    assert (g - r).abs().max() <= 2e-5 * r.abs().max()


def _has_memory(x: Any) -> bool:
    return isinstance(x, Tensor) and not x.is_meta


class Recorded(TorchDispatchMode):
    """The operators that the dispatcher runs, and the elements that each of them makes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        new = [x for x in (found if isinstance(found, tuple) else (found,)) if _has_memory(x)]
        made = 0 if function.is_view else sum(x.numel() for x in new)
        self.calls.append((str(function), made))
        return found

    def ours(self) -> list[str]:
        return [name.split(".")[1] for name, _ in self.calls if name.startswith("at_fused")]


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("place", PLACES)
def test_one_operator_each_way(backend: str, place: str, factors: str) -> None:
    students, teachers = placed_pairs(place, torch.float32)
    students = [x.requires_grad_() for x in students]
    options = made(factors, place)
    largest = max(size[0] * size[1] * 3 for size, *_ in PAIRS)
    with Recorded() as forward:
        loss = at_fused.at_loss(students, teachers, **options).sum()
    with Recorded() as backward:
        torch.autograd.grad(loss, students)
    with Recorded() as both:
        at_fused.at_value_and_grad(students, teachers, **options)
    assert forward.ours() == ["at_loss"]
    assert backward.ours() == ["attention_map_backward"]
    assert both.ours() == ["at_value_and_grad"]
    # Nothing else makes more than a map.
    for name, made_elements in forward.calls + backward.calls + both.calls:
        assert name.startswith("at_fused") or made_elements <= largest, name


# ---- teachers under inference_mode ---------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, *({**g} for g in GENERAL.values())], ids=str)
def test_teachers_under_inference_mode(backend: str, options: dict[str, Any]) -> None:
    s = feature(2, 5, 4, 4).requires_grad_()
    with torch.inference_mode():
        t = feature(2, 5, *((3, 5) if "resize" in options else (4, 4)))
        # Of the maps' dtype and size: used as they are.
        mask, weights = torch.rand(2, 4, 4).double(), torch.rand(2).double()
        tokens = feature(2, 17, 3)
    plain = t.clone()
    for more in ({}, {"mask": mask}, {"sample_weights": weights}):
        same = {name: x.clone() for name, x in more.items()}
        loss = at_fused.at_loss(s, t, **options, **more).sum()
        right = at_fused.at_loss(s, plain, **options, **same).sum()
        assert torch.equal(loss, right)
        assert torch.equal(*torch.autograd.grad(loss, s), *torch.autograd.grad(right, s))
        value, _ = at_fused.at_value_and_grad(s, t, **options, **more)
        torch.testing.assert_close(value.sum(), right.detach())
    if "resize" not in options and "absolute" not in options:
        attended = at_fused.at_loss(s, t, attend="both", **options)
        torch.testing.assert_close(attended, at_fused.at_loss(s, plain, attend="both", **options))
        # A list of which one student is nobody's to train.
        loss = at_fused.at_loss([s, t], [t, t], **options).sum()
        right = at_fused.at_loss([s, plain], [plain, plain], **options).sum()
        assert torch.equal(*torch.autograd.grad(loss, s), *torch.autograd.grad(right, s))
    x = feature(2, 17, 4).requires_grad_()
    sides = {"channel_dim": -1, "skip_tokens": 1}
    found, right = (at_fused.at_loss(x, y, **sides) for y in (tokens, tokens.clone()))
    assert torch.equal(*torch.autograd.grad(found, x), *torch.autograd.grad(right, x))


def test_maps_under_inference_mode(backend: str) -> None:
    s = feature(2, 5, 4, 4).requires_grad_()
    for size in ((4, 4), (3, 5)):
        with torch.inference_mode():
            t = feature(2, 5, *size)
            q = at_fused.attention_tap(t)[1]
            mask = torch.rand(2, 4, 4).double()
        for options in ({}, {"form": "paper", "reduction": "none"}, {"mask": mask}):
            options = {**options, "resize": "maps"}
            loss = at_fused.map_loss(at_fused.attention_tap(s)[1], q, **options).sum()
            if "mask" in options:
                options["mask"] = mask.clone()
            right = at_fused.at_loss(s, t.clone(), **options).sum()
            torch.testing.assert_close(loss, right, rtol=1e-12, atol=0)
            (g,) = torch.autograd.grad(loss, s, create_graph=True)
            torch.testing.assert_close(g, *torch.autograd.grad(right, s), rtol=1e-9, atol=1e-15)
            # Twice: the graph of the gradient reads what was saved.
            assert torch.autograd.grad(g.square().sum(), s)[0].any()


# ---- maps that are interpolated ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "other"),
    [
        ((371,), (15,)),
        ((15,), (371,)),
        ((371, 3), (15, 5)),
        ((3, 15), (4, 371)),
        ((90, 71), (31, 7)),
    ],
    ids=str,
)
def test_gradients_through_wide_maps(
    fast_backend: str, size: tuple[int, ...], other: tuple[int, ...]
) -> None:
    """In fp32 a position's weights would be off by the rounding of its number, to 2e-5."""
    s = feature(2, 3, *size, dtype=torch.float32).requires_grad_()
    t = feature(2, 4, *other, dtype=torch.float32).requires_grad_()
    loss = at_fused.at_loss(s, t, resize="maps")
    doubles = [x.detach().double().requires_grad_() for x in (s, t)]
    right = spatial_loss(*doubles, resize="maps").mean()
    for g, r in zip(
        torch.autograd.grad(loss, (s, t)), torch.autograd.grad(right, doubles), strict=True
    ):
        assert (g - r).abs().max() < 2e-6 * r.abs().max()


# ---- derivatives, other callers ------------------------------------------------------------------


@pytest.mark.parametrize("options", GENERAL)
def test_first_and_second_derivatives(fast_backend: str, options: str) -> None:
    s = feature(2, 3, 3, 4).requires_grad_()
    size = (2, 5) if "resize" in GENERAL[options] else (3, 4)
    t = feature(2, 2, *size).requires_grad_()

    def loss(s: Tensor, t: Tensor) -> Tensor:
        return at_fused.at_loss([s, s], [t, t], **GENERAL[options])

    assert torch.autograd.gradcheck(loss, (s, t), fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, (s, t), fast_mode=True)


@pytest.mark.parametrize("options", GENERAL)
def test_compile_fullgraph_of_the_method(options: str) -> None:
    s = torch.randn(2, 3, 6, 6, requires_grad=True)
    t = torch.randn(2, 5, *((4, 3) if "resize" in GENERAL[options] else (6, 6)))

    def step(s: Tensor, t: Tensor) -> Tensor:
        return at_fused.at_loss(s * 2, t, **GENERAL[options]).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found, right = compiled(s, t), step(s, t)
    torch.testing.assert_close(found, right)
    torch.testing.assert_close(torch.autograd.grad(found, s), torch.autograd.grad(right, s))


def test_a_teachers_features_are_not_kept_alive(backend: str) -> None:
    s, t = torch.randn(2, 3, 6, 6, requires_grad=True), torch.randn(2, 5, 3, 3)
    for resize in (None, "maps", "features"):
        for collapse in ("mean", "max"):
            u = t.clone() if resize else torch.randn_like(s)
            alive = weakref.ref(u)
            loss = at_fused.at_loss(s, u, resize=resize, collapse=collapse)
            del u
            assert alive() is None
            loss.backward()


def test_module_takes_what_belongs_to_a_batch_in_its_call() -> None:
    s, t = feature(3, 4, 5, 6), feature(3, 5, 5, 6)
    module = at_fused.ATLoss(collapse="max", resize="maps")
    mask, weights = torch.rand(3, 5, 6), torch.rand(3)
    options = {"collapse": "max", "resize": "maps", "mask": mask, "sample_weights": weights}
    assert torch.equal(module(s, t, mask, weights), at_fused.at_loss(s, t, **options))
    for name in ("mask", "power"):
        with pytest.raises(TypeError, match=f"takes no option '{name}'"):
            at_fused.ATLoss(**{name: 1})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_second_derivative_with_a_mask_and_a_wider_teacher(
    backend: str, dtype: torch.dtype
) -> None:
    s, t = feature(2, 3, 4, 4, dtype=dtype), feature(2, 5, 4, 4)
    for mask in (torch.rand(2, 4, 4), torch.rand(2, 4, 4) > 0.3):
        found = []
        for x in (s.clone().requires_grad_(), s.double().requires_grad_()):
            loss = at_fused.at_loss(x, t, mask=mask)
            (g,) = torch.autograd.grad(loss, x, create_graph=True)
            found.append(torch.autograd.grad((g.double() * t[:, :3]).sum(), x)[0].double())
        share = {torch.float32: 2e-5, torch.float16: 2**-9}[dtype]
        assert (found[0] - found[1]).abs().max() < share * found[1].abs().max()


def test_a_masks_gradient_beside_a_map_of_inference_mode(backend: str) -> None:
    s, t, mask = feature(2, 3, 4, 4), feature(2, 5, 4, 4), feature(2, 4, 4).abs()
    with torch.inference_mode():
        q = at_fused.attention_map(t)
    gradients = []
    for other in (q, q.clone()):
        m = mask.clone().requires_grad_()
        loss = at_fused.map_loss(at_fused.attention_map(s), other, mask=m)
        gradients += torch.autograd.grad(loss, m)
    assert torch.equal(*gradients)
    assert gradients[0].abs().max() > 0
