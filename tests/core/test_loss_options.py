"""Options of ``at_loss``, in cases that generated calls (test_properties.py) would miss."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from layouts import DTYPES, LAYOUTS
from matrix import crossed
from reference import UNFUSED, assert_matches_reference, expected_loss, feature, reference_loss
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import at_fused

# ---- options of maps and resizing ----------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = UNFUSED | {
    "max, p=1": {"collapse": "max", "p": 1.0},
    "signed, p=1": {"absolute": False, "p": 1.0, "collapse": "sum"},
    "signed, p=5": {"absolute": False, "p": 5.0, "form": "paper"},
    "channel": {"attend": "channel"},
    "channel, max": {"attend": "channel", "collapse": "max"},
    "both": {"attend": "both"},
}


@crossed(name=OPTIONS, dtype=DTYPES, layout=LAYOUTS)
def test_options_of_maps(backend: str, name: str, dtype: torch.dtype, layout: str) -> None:
    options = OPTIONS[name]
    s = feature(3, 20, 5, 7, layout=layout, dtype=dtype)
    any_size = "resize" in options or options.get("attend") == "channel"
    size = (8, 4) if any_size else (5, 7)
    t = feature(3, 20 if "attend" in options else 33, *size, dtype=dtype)
    assert_matches_reference([s], [t], **options)


RESIZE_SHAPES = [
    ((3, 4, 8, 8), (3, 6, 4, 4)),
    ((2, 5, 13, 9), (2, 3, 7, 5)),  # overlapping windows
    ((2, 5, 8, 3), (2, 3, 4, 6)),  # each side is larger in one dimension
    ((2, 3, 4, 6, 5), (2, 4, 2, 5, 5)),
    ((1, 3, 9000), (1, 2, 3)),  # large windows
    ((1, 3, 75, 80), (1, 2, 74, 79)),  # many windows
    ((1, 3, 20, 22, 20), (1, 2, 10, 21, 10)),
]


@crossed(shapes=RESIZE_SHAPES, resize=["maps", "features"], dtype=DTYPES)
def test_resizing(
    fast_backend: str, resize: str, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype
) -> None:
    s, t = (feature(*x, layout=y, dtype=dtype) for x, y in zip(shapes, LAYOUTS, strict=True))
    assert_matches_reference([s], [t], resize=resize)
    assert_matches_reference([s], [t], resize=resize, collapse="max", p=1.0, form="paper")


@pytest.mark.parametrize(
    ("size", "other"),
    [((371,), (15,)), ((15,), (371,)), ((371, 3), (15, 5)), ((90, 71), (31, 7))],
    ids=str,
)
def test_gradients_through_wide_maps(
    fast_backend: str, size: tuple[int, ...], other: tuple[int, ...]
) -> None:
    """Weights computed from positions in fp32 would have errors up to 2e-5."""
    pair = feature(2, 3, *size, dtype=torch.float32), feature(2, 4, *other, dtype=torch.float32)
    leaves = [x.requires_grad_() for x in pair]
    doubles = [x.detach().double().requires_grad_() for x in pair]
    actual = torch.autograd.grad(at_fused.at_loss(*leaves, resize="maps"), leaves)
    expected = torch.autograd.grad(expected_loss(*doubles, resize="maps").mean(), doubles)
    for g, e in zip(actual, expected, strict=True):
        assert (g - e).abs().max() < 2e-6 * e.abs().max()


def test_nan_and_infinity_stay_in_their_samples(backend: str) -> None:
    s, t = torch.randn(3, 4, 6, 6, requires_grad=True), torch.randn(3, 5, 3, 3)
    with torch.no_grad():
        s[0, 1, 2, 2], s[1, 1, 2, 2] = float("nan"), float("inf")
    loss = at_fused.at_loss(s, t, resize="features", reduction="sample")
    assert loss.isnan().tolist() == [[True, True, False]]
    (gradient,) = torch.autograd.grad(loss.nansum(), s)
    assert gradient[2].isfinite().all()
    assert gradient[2].any()


def test_special_values_of_signed_powers(backend: str) -> None:
    x = torch.zeros(1, 3, 5)
    x[0, 0] = torch.tensor([float("nan"), float("inf"), -float("inf"), -2.0, 0.0])
    for p in (1.0, 3.0, 2.0**24 + 1):
        q = at_fused.attention_map(x, p=p, collapse="sum", absolute=False)
        assert q[0, 0].isnan()
        assert q[0, 1:3].tolist() == [float("inf"), -float("inf")]
        assert q[0, 3] == (-(2.0**p) if p < 4 else -float("inf"))


# ---- tokens, masks, sample weights ---------------------------------------------------------------


@pytest.mark.parametrize("resize", ["maps", "features"])
def test_tokens_with_channels_first_features(backend: str, resize: str) -> None:
    tokens, maps = [feature(2, 1 + 12, 8)], [feature(2, 5, 6, 8)]
    in_teacher = {"channel_dim": (1, -1), "skip_tokens": 1, "map_size": (3, 4)}
    assert_matches_reference(maps, tokens, resize=resize, **in_teacher)
    in_student = {"channel_dim": (-1, 1), "skip_tokens": (1, 0), "map_size": ((3, 4), None)}
    assert_matches_reference(tokens, maps, resize=resize, **in_student)


@pytest.mark.parametrize("resize", ["maps", "features"])
def test_masks_of_any_size(backend: str, resize: str) -> None:
    s, t = feature(3, 4, 8, 6), feature(3, 5, 4, 9)
    for size in ((8, 6), (4, 6), (32, 24), (7, 5)):
        for mask in (torch.rand(3, *size), torch.rand(3, *size) > 0.3):
            assert_matches_reference([s], [t], mask=[mask], resize=resize, form="paper")


def test_masked_positions_have_no_gradient(backend: str) -> None:
    mask = torch.ones(2, 4, 4)
    mask[:, :, 3] = 0
    s, t = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
    at_fused.at_loss(s, t, mask=mask).backward()
    assert not s.grad[..., 3].any()
    assert s.grad[..., :3].all()
    changed = t.clone()
    changed[..., 3] = 7
    assert torch.equal(at_fused.at_loss(s, t, mask=mask), at_fused.at_loss(s, changed, mask=mask))


# ---- options of the fused operator ---------------------------------------------------------------

# Map size, student channels and teacher channels of two pairs.
PAIRS = [((5, 7), 20, 9), ((4, 3), 6, 17)]
ALL_LAYOUTS = ("planar", "interleaved", "tokens")
SKIPS = 2, 1  # skip_tokens of students and teachers
FUSED_OPTIONS: dict[str, dict[str, Any]] = {
    "sample": {"reduction": "sample", "weights": [2.0, -0.5]},
    "sample_weights": {"reduction": "none", "sample_weights": True, "p": 1.0},
    "added": {"eps_mode": "add", "eps": 0.3},
    "mask": {"mask": "bool"},
    "float masks, sample": {"mask": "float", "reduction": "sample", "eps_mode": "add", "eps": 0.3},
    "all": {"mask": "bool", "sample_weights": True, "weights": [0.5, -2.0], "collapse": "sum"},
    "all, p=3": {"mask": "bool", "sample_weights": True, "weights": [-1.0, 2.0], "p": 3.0},
}


def make_features(
    layout: str, dtype: torch.dtype, pairs: Any = PAIRS
) -> tuple[list[Tensor], list[Tensor]]:
    """Make features of students and teachers: (B, C, H, W), or tokens."""
    sides: tuple[list[Tensor], list[Tensor]] = [], []
    for (h, w), *channels in pairs:
        for side, c, skip in zip(sides, channels, SKIPS, strict=True):
            if layout == "tokens":
                side.append(feature(3, skip + h * w, c, dtype=dtype))
            else:
                side.append(feature(3, c, h, w, layout=layout, dtype=dtype))
    return sides


def make_masks(kind: str, layout: str, pairs: Any = PAIRS) -> list[Tensor]:
    """Make a mask per pair, with all of the second sample masked."""
    masks = [torch.rand(3, *size) for size, *_ in pairs]
    masks = [mask > 0.3 if kind == "bool" else mask for mask in masks]
    for mask in masks:
        mask[1] = 0
    return [mask.flatten(1) for mask in masks] if layout == "tokens" else masks


def token_options(layout: str) -> dict[str, Any]:
    return {"channel_dim": -1, "skip_tokens": SKIPS} if layout == "tokens" else {}


def make_options(name: str, layout: str) -> dict[str, Any]:
    """Replace the mask and sample_weights in FUSED_OPTIONS by tensors."""
    options = FUSED_OPTIONS[name] | token_options(layout)
    if "mask" in options:
        options["mask"] = make_masks(options["mask"], layout)
    if "sample_weights" in options:
        options["sample_weights"] = torch.tensor([1.0, 0.0, 0.25])
    return options


@crossed(name=FUSED_OPTIONS, dtype=DTYPES, layout=ALL_LAYOUTS)
def test_fused_options(backend: str, dtype: torch.dtype, layout: str, name: str) -> None:
    pairs = make_features(layout, dtype)
    for form in ("code", "paper"):
        assert_matches_reference(*pairs, form=form, **make_options(name, layout))


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_masks_of_large_samples(backend: str, layout: str) -> None:
    """Several tasks, thread blocks or Triton programs share the large sample."""
    pairs = [*PAIRS[:1], ((64, 80), 24, 40)]
    students, teachers = make_features(layout, torch.float32, pairs)
    masks = make_masks("float", layout, pairs)
    students[1], teachers[1], masks[1] = students[1][:1], teachers[1][:1], masks[1][:1]
    masks[1].view(1, -1)[:, : 7 * 80] = 0
    options = {"mask": masks, "reduction": "none", "form": "paper"}
    assert_matches_reference(students, teachers, **options, **token_options(layout))


class OperatorRecorder(TorchDispatchMode):
    """A mode that records each operator and the number of elements that it allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        outputs = result if isinstance(result, tuple) else (result,)
        elements = sum(x.numel() for x in outputs if isinstance(x, Tensor))
        self.calls.append((str(function), 0 if function.is_view else elements))
        return result

    def fused(self) -> list[str]:
        return [name.split(".")[1] for name, _ in self.calls if name.startswith("at_fused")]


@crossed(name=FUSED_OPTIONS, layout=ALL_LAYOUTS)
def test_forward_and_backward_are_one_operator_each(backend: str, layout: str, name: str) -> None:
    students, teachers = make_features(layout, torch.float32)
    students = [x.requires_grad_() for x in students]
    options = make_options(name, layout)
    largest = max(size[0] * size[1] * 3 for size, *_ in PAIRS)
    with OperatorRecorder() as forward:
        loss = at_fused.at_loss(students, teachers, **options).sum()
    with OperatorRecorder() as backward:
        torch.autograd.grad(loss, students)
    with OperatorRecorder() as both:
        at_fused.at_value_and_grad(students, teachers, **options)
    assert forward.fused() == ["at_loss"]
    assert backward.fused() == ["attention_map_backward"]
    assert both.fused() == ["at_value_and_grad"]
    # Other operators allocate no more than a map.
    for name, elements in forward.calls + backward.calls + both.calls:
        assert name.startswith("at_fused") or elements <= largest, name


# ---- teachers under inference_mode ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["one operator", *UNFUSED])
def test_teachers_under_inference_mode(backend: str, name: str) -> None:
    options = UNFUSED.get(name, {})
    s = feature(2, 5, 4, 4).requires_grad_()
    with torch.inference_mode():
        t = feature(2, 5, *((3, 5) if "resize" in options else (4, 4)))
        # They have the maps' dtype and size, so at_loss does not copy them.
        mask, weights = torch.rand(2, 4, 4).double(), torch.rand(2).double()
    more: list[dict[str, Any]] = [{}, {"mask": mask}, {"sample_weights": weights}]
    calls: list[tuple[Any, Any, dict[str, Any]]] = [(s, t, options | extra) for extra in more]
    if "resize" not in options and "absolute" not in options:
        calls.append((s, t, options | {"attend": "both"}))
        # A student's feature may come from inference mode, too.
        calls.append(([s, t], [t, t], options))
        calls.append((s[..., 0], t[..., 0], options | {"channel_dim": -1, "skip_tokens": 1}))
    for call in calls:
        plain = tree_map_only(Tensor, lambda x: x.clone() if x.is_inference() else x, call)
        losses = [at_fused.at_loss(x, y, **o).sum() for x, y, o in (call, plain)]
        torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
        gradients = (torch.autograd.grad(loss, s)[0] for loss in losses)
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-15)
        value, _ = at_fused.at_value_and_grad(*call[:2], **call[2])
        torch.testing.assert_close(value.sum(), losses[1].detach())


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
            expected = at_fused.at_loss(s, t.clone(), **options).sum()
            torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
            (g,) = torch.autograd.grad(loss, s, create_graph=True)
            torch.testing.assert_close(g, *torch.autograd.grad(expected, s), rtol=1e-9, atol=1e-15)
            # The double backward reads the saved tensors.
            assert torch.autograd.grad(g.square().sum(), s)[0].any()


# ---- derivatives, torch.compile, memory ----------------------------------------------------------


@pytest.mark.parametrize("options", UNFUSED)
def test_first_and_second_derivatives(fast_backend: str, options: str) -> None:
    s = feature(2, 3, 3, 4).requires_grad_()
    size = (2, 5) if "resize" in UNFUSED[options] else (3, 4)
    t = feature(2, 2, *size).requires_grad_()

    def loss(s: Tensor, t: Tensor) -> Tensor:
        return at_fused.at_loss([s, s], [t, t], **UNFUSED[options])

    assert torch.autograd.gradcheck(loss, (s, t), fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, (s, t), fast_mode=True)


@pytest.mark.parametrize("options", ["max", "added", "signed features", "sample"])
def test_compile_fullgraph_with_options(options: str) -> None:
    s = torch.randn(2, 3, 6, 6, requires_grad=True)
    t = torch.randn(2, 5, *((4, 3) if "resize" in UNFUSED[options] else (6, 6)))

    def step(s: Tensor, t: Tensor) -> Tensor:
        return at_fused.at_loss(s * 2, t, **UNFUSED[options]).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    losses = compiled(s, t), step(s, t)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, s) for loss in losses))


def test_teacher_features_are_freed_before_backward(backend: str) -> None:
    s, t = torch.randn(2, 3, 6, 6, requires_grad=True), torch.randn(2, 5, 3, 3)
    for resize in (None, "maps", "features"):
        for collapse in ("mean", "max"):
            u = t.clone() if resize else torch.randn_like(s)
            reference = weakref.ref(u)
            loss = at_fused.at_loss(s, u, resize=resize, collapse=collapse)
            del u
            assert reference() is None
            loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_second_derivative_with_a_mask_and_a_wider_teacher(
    backend: str, dtype: torch.dtype
) -> None:
    s, t, mask = feature(2, 3, 4, 4, dtype=dtype), feature(2, 5, 4, 4), torch.rand(2, 4, 4)
    results = []
    for x, loss_function in ((s.clone(), at_fused.at_loss), (s.double(), reference_loss)):
        x.requires_grad_()
        loss = loss_function([x, x], [t, t], mask=[mask, mask > 0.3])
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        results.append(torch.autograd.grad((g.double() * t[:, :3]).sum(), x)[0].double())
    tolerance = {torch.float32: 2e-5, torch.float16: 2**-8}[dtype]
    actual, expected = results
    assert (actual - expected).abs().max() < tolerance * expected.abs().max()


def test_mask_gradient_with_a_map_made_in_inference_mode(backend: str) -> None:
    s, t, mask = feature(2, 3, 4, 4), feature(2, 5, 4, 4), feature(2, 4, 4).abs()
    with torch.inference_mode():
        q = at_fused.attention_map(t)
    gradients = []
    for teacher_map in (q, q.clone()):
        m = mask.clone().requires_grad_()
        loss = at_fused.map_loss(at_fused.attention_map(s), teacher_map, mask=m)
        gradients += torch.autograd.grad(loss, m)
    assert torch.equal(*gradients)
    assert gradients[0].abs().max() > 0
