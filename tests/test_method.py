"""The whole method through the public functions, against its formulas written out in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import at_fused
from at_fused import _problem

LAYOUTS = ("planar", "interleaved")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
TOLERANCE = {
    torch.float64: 1e-11,
    torch.float32: 2e-5,
    torch.float16: 2**-9,
    torch.bfloat16: 2**-6,
}


def feature(*shape: int, layout: str = "planar", dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(*shape, dtype=torch.float64).to(dtype)
    return x if layout == "planar" else x.movedim(1, -1).contiguous().movedim(-1, 1)


# ---- the formulas --------------------------------------------------------------------------------

POOL = {3: F.adaptive_avg_pool1d, 4: F.adaptive_avg_pool2d, 5: F.adaptive_avg_pool3d}
MODE = {3: "linear", 4: "bilinear", 5: "trilinear"}


def raw_map(x: Tensor, p: float, collapse: str, absolute: bool) -> Tensor:
    powered = x.abs().pow(p) if absolute else x.pow(int(p))
    if collapse == "max":
        return powered.max(1).values  # its gradient goes to one of several, that of amax to all
    return powered.mean(1) if collapse == "mean" else powered.sum(1)


def normalized(q: Tensor, eps: float, eps_mode: str) -> Tensor:
    q = q.flatten(1)
    norm = q.norm(dim=1, keepdim=True)
    return q / (norm.clamp(min=eps) if eps_mode == "max" else norm + eps)


def spatial_loss(
    s: Tensor,
    t: Tensor,
    *,
    p: float = 2.0,
    collapse: str = "mean",
    form: str = "code",
    resize: str | None = None,
    mask: Tensor | None = None,
    absolute: bool = True,
    eps: float = 1e-12,
    eps_mode: str = "max",
) -> Tensor:
    """The loss of each sample of a pair."""
    if resize == "features":
        least = [min(sizes) for sizes in zip(s.shape[2:], t.shape[2:], strict=True)]
        s, t = (x if list(x.shape[2:]) == least else POOL[x.dim()](x, least) for x in (s, t))
    qs, qt = (raw_map(x, p, collapse, absolute) for x in (s, t))
    if resize == "maps" and qs.shape != qt.shape:
        qt = F.interpolate(qt[:, None], size=qs.shape[1:], mode=MODE[s.dim()])[:, 0]
    if mask is not None:
        factor = F.interpolate(mask.double()[:, None], size=qs.shape[1:], mode="area")[:, 0]
        qs, qt = qs * factor, qt * factor
    d = normalized(qs, eps, eps_mode) - normalized(qt, eps, eps_mode)
    return d.square().mean(1) if form == "code" else d.norm(dim=1)


def expected_loss(s: Tensor, t: Tensor, *, attend: str = "spatial", **options: Any) -> Tensor:
    loss = spatial_loss(s, t, **options) if attend != "channel" else torch.zeros(len(s)).double()
    if attend != "spatial":
        options.pop("resize", None)
        views = (x.flatten(2).transpose(1, 2) for x in (s, t))
        loss = loss + spatial_loss(*views, **options)
    return loss


def assert_is_the_formula(s: Tensor, t: Tensor, **options: Any) -> None:
    """Value and both gradients; in half precision times 256, so that fp16 holds them."""
    s, t = s.detach().requires_grad_(), t.detach().requires_grad_()
    loss = at_fused.at_loss(s, t, **options)
    sd, td = (x.detach().double().requires_grad_() for x in (s, t))
    right = expected_loss(sd, td, **options).mean()
    exact = s.dtype == t.dtype == torch.float64
    torch.testing.assert_close(loss.double(), right, rtol=1e-11 if exact else 2e-5, atol=1e-12)
    scale = 256.0
    found = torch.autograd.grad(loss * scale, (s, t))
    for g, r in zip(found, torch.autograd.grad(right * scale, (sd, td)), strict=True):
        error = (g.double() - r).abs().max()
        bound = TOLERANCE[g.dtype] * r.abs().max() + (2**-24 if g.dtype == torch.float16 else 1e-12)
        assert error <= bound, f"error {error:.3g}, allowed {bound:.3g}"


# ---- every option --------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [1.0, 2.0, 2.5, 4.0])
def test_max_maps(backend: str, p: float, dtype: torch.dtype, layout: str) -> None:
    s, t = feature(3, 20, 5, 7, layout=layout, dtype=dtype), feature(3, 33, 5, 7, dtype=dtype)
    for form in ("code", "paper"):
        # The largest of rounded features: the same ones, whatever the power.
        assert_is_the_formula(s, t, collapse="max", p=p, form=form)


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
        assert_is_the_formula(s, t, resize=resize)
        assert_is_the_formula(s, t, resize=resize, collapse="max", p=1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("resize", ["maps", "features"])
def test_resizing_half_precision(backend: str, resize: str, dtype: torch.dtype) -> None:
    for larger, smaller in (((9, 12), (6, 6)), ((40,), (7,)), ((5, 6, 9), (2, 3, 4))):
        for layout in LAYOUTS:
            s = feature(3, 20, *larger, layout=layout, dtype=dtype)
            t = feature(3, 12, *smaller, layout=layout, dtype=dtype)
            assert_is_the_formula(s, t, resize=resize, form="paper")


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
        assert_is_the_formula(s.float(), t.float(), resize="features", p=3.0)


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
        assert_is_the_formula(s, t, attend=attend, **options)


def test_channel_attention_of_different_sizes(backend: str) -> None:
    s, t = feature(3, 10, 8, 6), feature(3, 10, 5, 7)
    assert_is_the_formula(s, t, attend="channel")
    assert_is_the_formula(s, t, attend="both", resize="maps")
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
            assert_is_the_formula(s, t, absolute=False, p=p, collapse=collapse)
    assert_is_the_formula(s, feature(3, 4, 3, 4), absolute=False, p=p, resize="features")
    assert_is_the_formula(s, feature(3, 20, 5, 7), absolute=False, p=p, attend="both")


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


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_an_epsilon_that_is_added(backend: str, form: str, eps: float) -> None:
    s, t = feature(3, 4, 5, 6), feature(3, 7, 5, 6)
    assert_is_the_formula(s, t, eps_mode="add", eps=eps, form=form)


def test_a_zero_map_with_an_epsilon_that_is_added(backend: str) -> None:
    s, t = torch.zeros(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
    at_fused.at_loss(s, t, eps_mode="add", eps=1e-6, p=1.0).backward()
    assert torch.equal(s.grad, torch.zeros_like(s))


# ---- tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_against_tokens(backend: str, dtype: torch.dtype) -> None:
    s, t = (torch.randn(3, 18, c).to(dtype).requires_grad_() for c in (8, 11))
    loss = at_fused.at_loss(s, t, channel_dim=-1, skip_tokens=2)
    sd, td = (x.detach().double().requires_grad_() for x in (s, t))
    right = expected_loss(*(x[:, 2:].transpose(1, 2) for x in (sd, td))).mean()
    torch.testing.assert_close(loss.double(), right, rtol=2e-5, atol=0)
    found = torch.autograd.grad(loss * 256, (s, t))
    for g, r in zip(found, torch.autograd.grad(right * 256, (sd, td)), strict=True):
        assert not g[:, :2].any()
        assert (g - r).abs().max() <= TOLERANCE[dtype] * r.abs().max() + 2**-24


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
        assert_is_the_formula(s, t, mask=mask, resize=resize, form="paper")
    assert_is_the_formula(s, feature(3, 2, 8, 6), mask=torch.rand(3, 8, 6))


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


@pytest.mark.parametrize("form", ["code", "paper"])
def test_one_loss_for_each_sample(backend: str, form: str) -> None:
    pairs = [(feature(4, 3, 5, 5), feature(4, 6, 5, 5)), (feature(4, 2, 3, 2), feature(4, 2, 3, 2))]
    students, teachers = ([pair[i].requires_grad_() for pair in pairs] for i in (0, 1))
    options = {"form": form, "weights": [2.0, -0.5]}
    found = at_fused.at_loss(students, teachers, reduction="sample", **options)
    right = torch.stack(
        [w * spatial_loss(*pair, form=form) for w, pair in zip((2.0, -0.5), pairs, strict=True)]
    )
    torch.testing.assert_close(found, right, rtol=1e-11, atol=0)
    means = at_fused.at_loss(students, teachers, reduction="none", **options)
    torch.testing.assert_close(found.mean(1), means, rtol=1e-11, atol=0)
    above = torch.randn(2, 4).double()
    for g, r in zip(
        torch.autograd.grad(found, students + teachers, above),
        torch.autograd.grad(right, students + teachers, above),
        strict=True,
    ):
        torch.testing.assert_close(g, r, rtol=1e-9, atol=1e-14)


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


# ---- derivatives, other callers ------------------------------------------------------------------

GENERAL: dict[str, dict[str, Any]] = {
    "max": {"collapse": "max"},
    "maps": {"resize": "maps", "form": "paper"},
    "features": {"resize": "features", "p": 3.0},
    "signed": {"absolute": False, "p": 3.0},
    "signed features": {"absolute": False, "p": 3.0, "resize": "features"},
    "added": {"eps_mode": "add", "eps": 0.1, "resize": "maps"},
    "sample": {"reduction": "sample", "resize": "features", "collapse": "max"},
}


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
def test_value_and_grad(backend: str, options: str) -> None:
    s, t = feature(2, 3, 4, 4), feature(2, 5, 4, 4)
    value, gradient = at_fused.at_value_and_grad(s, t, scale=3.0, **GENERAL[options])
    x = s.requires_grad_()
    loss = at_fused.at_loss(x, t, **GENERAL[options])
    torch.testing.assert_close(value, loss.detach())
    torch.testing.assert_close(gradient, 3 * torch.autograd.grad(loss.sum(), x)[0])
    assert not gradient.requires_grad


def test_value_and_grad_of_tokens(backend: str) -> None:
    s, t = torch.randn(2, 10, 4), torch.randn(2, 10, 6)
    options: dict[str, Any] = {"channel_dim": -1, "skip_tokens": 1}
    value, gradient = at_fused.at_value_and_grad([s], [t], **options)
    x = s.requires_grad_()
    loss = at_fused.at_loss(x, t, **options)
    torch.testing.assert_close(value, loss.detach())
    torch.testing.assert_close(gradient[0], torch.autograd.grad(loss, x)[0])


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


def test_a_resized_teachers_features_are_not_kept_alive(backend: str) -> None:
    import weakref

    s, t = torch.randn(2, 3, 6, 6, requires_grad=True), torch.randn(2, 5, 3, 3)
    for resize in ("maps", "features"):
        for collapse in ("mean", "max"):
            u = t.clone()
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
