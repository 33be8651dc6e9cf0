"""The Triton back end's own functions against eager, on a GPU or else under the interpreter."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from reference import loss_arguments
from torch import Tensor

from at_fused.backends import eager
from at_fused.backends import triton as backend

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if not torch.cuda.is_available() and not backend.interpreted():
    # Triton reads it when it is imported.
    if "triton" in sys.modules:
        pytest.skip("triton was imported without TRITON_INTERPRET=1", allow_module_level=True)
    os.environ["TRITON_INTERPRET"] = "1"

from at_fused.backends.triton import launch, loss

DEVICE = "cpu" if backend.interpreted() else "cuda"
LAYOUTS = ("planar", "interleaved")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Of the largest element. The interpreter cuts bf16 off where a GPU rounds.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 3e-6,
    torch.float16: 2**-10,
    torch.bfloat16: 2**-7,
}


def features(*shape: int, layout: str = "planar", dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)
    return x if layout == "planar" else x.movedim(1, -1).contiguous().movedim(-1, 1)


def assert_near(found: Sequence[Tensor], right: Sequence[Tensor], loosest: float = 0.0) -> None:
    for i, (a, b) in enumerate(zip(found, right, strict=True)):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.stride() == b.stride()
        bound = max(TOLERANCE[b.dtype], loosest) * b.double().abs().max()
        error = (a.double() - b.double()).abs().max()
        assert error <= bound, f"tensor {i}: error {error:.3g}, allowed {bound:.3g}"


def assert_matches_eager(
    students: list[Tensor],
    teachers: list[Tensor],
    *,
    masks: Sequence[Tensor] = (),
    weights: Sequence[float] = (),
    skip_tokens: Sequence[int] = (),
    p: float = 2.0,
    collapse: str = "mean",
    form: str = "code",
    reduction: str = "sum",
    eps_mode: str = "max",
    eps: float = 1e-12,
    scale: float = 1.0,
    upstream: bool = True,
) -> None:
    """All four functions; ``upstream`` gives the backward pass a loss gradient."""
    arguments = loss_arguments(
        students,
        teachers,
        masks=masks,
        weights=weights,
        skip_tokens=skip_tokens,
        p=p,
        collapse=collapse,
        form=form,
        reduction=reduction,
        eps_mode=eps_mode,
        eps=eps,
    )
    both = students + teachers
    pairs = [*range(len(students)), *range(len(teachers))]
    mapped = both, p, collapse, skip_tokens
    assert_near(backend.attention_map(*mapped), eager.attention_map(*mapped))

    found, maps = backend.at_loss(*arguments, True, True)
    right_loss, right_maps = eager.at_loss(*arguments, True, True)
    # fp32 maps make an fp64 loss of a list of mixed dtypes no better.
    exact = all(x.dtype == torch.float64 for x in both)
    loosest = 0.0 if exact else 3e-6
    assert_near([found, *maps], [right_loss, *right_maps], loosest)

    gradient = torch.full_like(right_loss, 0.5 * scale).cumsum(0) if upstream else None
    if upstream and reduction == "sum":
        gradient = gradient[()]
    rest = gradient, pairs, p, skip_tokens
    right = eager.attention_map_backward(both, right_maps, *rest)
    assert_near(backend.attention_map_backward(both, maps, *rest), right, loosest)

    # A side without a gradient has its masked raw maps.
    for grads in ((True, False), (False, True)):
        _, maps = backend.at_loss(*arguments, *grads)
        assert_near(maps, eager.at_loss(*arguments, *grads)[1], loosest)

    again, gradients = backend.at_value_and_grad(*arguments, 2.0, gradient)
    assert_near([again], [right_loss], loosest)
    doubled = [2 * k for k in right_maps]
    right = eager.attention_map_backward(both, doubled, *rest)
    assert_near(gradients, right[: len(students)], loosest)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, 4.0, 1.5, 6.0])
def test_dtypes_layouts_exponents(p: float, dtype: torch.dtype, layout: str) -> None:
    s = features(2, 20, 5, 7, layout=layout, dtype=dtype)
    t = features(2, 11, 5, 7, dtype=dtype)
    if p in (1.0, 4.0, 1.5):
        assert_matches_eager([s], [t], p=p, scale=2.0**10)
    else:
        assert_matches_eager([s], [t], p=p, form="paper", collapse="sum", scale=2.0**10)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "size", [(1, 17, 9, 11), (3, 1, 4, 4), (2, 300, 1, 2), (2, 8, 1, 1), (5, 3, 3, 3)], ids=str
)
def test_sizes(size: tuple[int, ...], layout: str) -> None:
    b, c, h, w = size
    s, t = features(*size, layout=layout), features(b, c + 3, h, w)
    s[..., 0] *= 2  # not too near each other for fp32
    if h * w > 1:
        assert_matches_eager([s], [t])
        return
    loss, gradients = backend.at_value_and_grad(*loss_arguments([s], [t]), 1.0, None)
    assert loss.item() == 0
    assert gradients[0].abs().max() < 1e-6


def strided_views() -> dict[str, Tensor]:
    base = torch.randn(3, 12, 5, 6, device=DEVICE)
    interleaved = base.to(memory_format=torch.channels_last)
    return {
        "channel slice": base[:, 2:9],
        "batch step": base[::2],
        "cropped": base[:, :, 1:4, 2:5],
        "spatial step": base[:, :, ::2, ::3],
        "transposed maps": base.transpose(2, 3),
        "channels and height swapped": base.transpose(1, 2),
        "expanded batch": base[:1].expand(3, -1, -1, -1),
        "expanded channels": base[:, :1].expand(-1, 12, -1, -1),
        "unaligned start": torch.randn(3 * 12 * 30 + 3, device=DEVICE)[3:].view(3, 12, 5, 6),
        "interleaved slice": interleaved[:, 1:6],
        "interleaved crop": interleaved[:, :, 2:, :5],
        "batch innermost": torch.randn(12, 5, 6, 3, device=DEVICE).permute(3, 0, 1, 2),
        "one channel of many": interleaved[:, 3:4],
        "one row": base[:, :, 3:4, :],
        "one column": base[:, :, :, 3:4],
        "volumes": torch.randn(2, 3, 2, 3, 4, device=DEVICE),
    }


@pytest.mark.parametrize("view", strided_views())
def test_strides(view: str) -> None:
    x = strided_views()[view]
    assert_matches_eager([x], [features(x.shape[0], 5, *x.shape[2:])])


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_lists(monkeypatch: pytest.MonkeyPatch, reduction: str) -> None:
    students = [
        features(4, 8, 6, 6),
        features(3, 16, 4, 4, layout="interleaved", dtype=torch.float16),
        features(4, 32, 4, 4, dtype=torch.bfloat16),
        features(2, 7, 5, 5),
    ]
    teachers = [features(x.shape[0], 9, *x.shape[2:]) for x in students]
    teachers[3] = teachers[3].double()
    weights = [1.0, 0.1, -3.0, 0.0]
    options = {"weights": weights, "reduction": reduction, "scale": 64.0}
    assert_matches_eager(students, teachers, **options)
    # Longer than one launch can take.
    monkeypatch.setattr(launch, "MAX_ENTRIES", 3)
    assert_matches_eager(students, teachers, form="paper", **options)
    assert_matches_eager(students, teachers, form="paper", **options, upstream=False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_cut_into_pieces(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "_WHOLE_BYTES", 100_000)
    s = [features(2, 24, 29, 31, layout=layout), features(3, 4, 3, 5)]
    t = [features(2, 40, 29, 31), features(3, 4, 3, 5)]
    assert_matches_eager(s, t)
    arguments = loss_arguments(s, t, reduction="none")
    once = backend.at_value_and_grad(*arguments, 1.0, None)
    again = backend.at_value_and_grad(*arguments, 1.0, None)
    assert torch.equal(once[0], again[0])
    assert all(torch.equal(a, b) for a, b in zip(once[1], again[1], strict=True))
    assert all(not counters.any() for counters in launch._workspaces.values())


FACTORS: list[dict[str, Any]] = [
    {"reduction": "sample"},
    {"eps_mode": "add", "eps": 0.3},
    {"masked": True, "form": "paper"},
    {"masked": True, "reduction": "sample", "eps_mode": "add", "eps": 0.3, "weights": [0.5, -2.0]},
]


@pytest.mark.parametrize("options", FACTORS, ids=str)
@pytest.mark.parametrize("layout", [*LAYOUTS, "tokens", "cut"])
def test_factors(layout: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [(3, 20, 5, 7), (3, 6, 4, 3)]
    given = {name: value for name, value in options.items() if name != "masked"}
    if layout == "tokens":
        students = [features(3, 18, c).mT for c in (20, 6)]
        teachers = [features(3, 17, c).mT for c in (8, 24)]
        given["skip_tokens"] = [2, 2, 1, 1]
    else:
        if layout == "cut":
            monkeypatch.setattr(launch, "_PIECE_BYTES", 4096)
            monkeypatch.setattr(launch, "processors", lambda _: 10**6)
            monkeypatch.setattr(loss, "_WHOLE_BYTES", 4096)
            sizes = [(3, 8, 11, 13), (3, 6, 4, 3)]
        kind = layout if layout in LAYOUTS else "planar"
        students = [features(*size, layout=kind) for size in sizes]
        teachers = [features(b, c + 5, *size, dtype=torch.bfloat16) for b, c, *size in sizes]
    if options.get("masked"):
        positions = [16, 16] if layout == "tokens" else [math.prod(size[2:]) for size in sizes]
        masks = [torch.rand(n, 3, device=DEVICE).mT for n in positions]
        masks[0][1] = 0
        given["masks"] = masks
    assert_matches_eager(students, teachers, **given)
    monkeypatch.setattr(launch, "MAX_ENTRIES", 1)
    assert_matches_eager(students, teachers, **given, upstream=False)
    assert all(not counters.any() for counters in launch._workspaces.values())


@pytest.mark.parametrize("p", [1.1, 1.5, 2.7, 5.0, 6.0, 7.3, 31.3])
def test_powers_keep_their_digits(p: float) -> None:
    largest = 3e38 ** (1 / p)
    x = torch.logspace(-40, math.log10(largest) - 0.1, 1000, dtype=torch.float64, device=DEVICE)
    x = x.float().view(1, 1, -1)
    (found,) = backend.attention_map([x], p, "sum")
    right = x.double().pow(p).view(1, -1)
    normal = right > 1e-37
    rounding = 1e-7 * max(p, 10)
    assert ((found - right).abs() <= rounding * right)[normal].all()
    assert (found[~normal] <= 1.1e-37).all()

    (found,) = backend.attention_map_backward([-x], [torch.ones_like(found)], None, [0], p)
    right = -x.double().pow(p - 1)
    normal = right < -1e-37
    assert ((found - right).abs() <= -rounding * right)[normal].all()


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, 4.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_zero_infinity_and_nan(dtype: torch.dtype, p: float) -> None:
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0], dtype=dtype)
    x = x.to(DEVICE).view(1, 1, -1)
    (found,) = backend.attention_map([x], p, "sum")
    torch.testing.assert_close(found, eager.attention_map([x], p, "sum")[0], equal_nan=True)
    ones = torch.ones_like(found)
    (found,) = backend.attention_map_backward([x], [ones], None, [0], p)
    (right,) = eager.attention_map_backward([x], [ones], None, [0], p)
    # The sign of NaN is NaN here, 0 in torch; k is NaN then in any case.
    known = ~x.isnan()
    torch.testing.assert_close(found[known], right[known], equal_nan=True)

    s, t = features(2, 5, 3, 6, dtype=dtype), features(2, 5, 3, 6, dtype=dtype)
    for value in (math.inf, math.nan):
        s[1, 2, 1, 3] = value
        arguments = loss_arguments([s], [t], p=p, form="paper")
        loss, gradients = backend.at_value_and_grad(*arguments, 1.0, None)
        assert loss.isnan()
        assert gradients[0][1].isnan().any()
        assert gradients[0][0].isfinite().all()


@pytest.mark.parametrize("form", ["code", "paper"])
def test_extreme_maps(form: str) -> None:
    s, t = features(3, 8, 4, 4), features(3, 4, 4, 4)
    s[0] = 0
    s[1] *= 1e-8
    for eps in (1e-12, 0.5):
        assert_matches_eager([s], [t], form=form, eps=eps)
    assert_matches_eager([s * 1e12], [t * 1e15], form=form, scale=1e12)
    arguments = loss_arguments([s], [s], form=form)
    loss, gradients = backend.at_value_and_grad(*arguments, 1.0, None)
    assert loss.item() == 0
    assert not gradients[0].any()


@pytest.mark.parametrize("order", LAYOUTS)
def test_offsets_beyond_31_bits(order: str) -> None:
    # Samples, or lines of one, 2^32 bytes apart; what is between them is never touched.
    far = 2**31 + 16
    memory = torch.empty(far + 64, dtype=torch.bfloat16, device=DEVICE)
    inner = (16, 1) if order == "planar" else (1, 3)
    outer = (far, 1) if order == "planar" else (1, far)
    for shape, strides in (((2, 3, 16), (far, *inner)), ((1, 2, 2), (0, *outer))):
        x = memory.as_strided(shape, strides)
        x.copy_(features(*shape))
        (found,) = backend.attention_map([x], 2.0, "sum")
        assert_near([found], eager.attention_map([x], 2.0, "sum"))
        (gradient,) = backend.attention_map_backward([x], [found], None, [0], 2.0)
        assert_near([gradient], eager.attention_map_backward([x], [found], None, [0], 2.0))
        layout = launch.layout_of(x.shape, x.stride())
        assert layout is not None
        assert layout.wide == (x.shape[0] == 1)


def test_triton_is_not_imported_with_the_package() -> None:
    code = "import sys, torch; had = 'triton' in sys.modules; import at_fused; " + (
        "from at_fused.backends import triton; assert had or 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_cpu_tensors_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert not backend.interpreted()
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        backend.attention_map([torch.randn(1, 2, 3)], 2.0, "mean")
