"""The Triton back end: launches, copies, scalar arguments, bounds, and a few calls of the contract.

Runs on a GPU, or in the interpreter, which takes minutes for the whole contract.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from back_ends import use
from layouts import LAYOUTS
from operator_reference import (
    assert_map_loss_matches,
    assert_maps_match,
    assert_tap_matches,
    raw_maps,
    tap_inputs,
)
from outside import SUPPORT, output_of
from reference import assert_matches_reference, loss_arguments
from torch import Tensor

from at_fused.backends import triton as backend

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton
import triton.language as tl

from at_fused.backends.triton import launch, loss
from at_fused.backends.triton.tiles import decode_double, decode_int, encode_double, encode_int


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with torch.device("cpu" if backend.interpreted() else "cuda"):
        yield


def feature(*shape: int, layout: str = "planar", dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(shape).to(dtype)
    return x if layout == "planar" else x.movedim(1, -1).contiguous().movedim(-1, 1)


def all_results(layout: str) -> list[Tensor]:
    """Return the results of the list operators for pairs of different sizes and dtypes."""
    torch.manual_seed(0)
    sizes, dtypes = ((11, 13), (3, 5), (2, 4)), (torch.float32, torch.float64, torch.bfloat16)
    s = [feature(2, 12, *n, layout=layout, dtype=d) for n, d in zip(sizes, dtypes, strict=True)]
    t = [feature(2, 9, *n) for n in sizes]
    maps = backend.attention_map([*s, *t], 2.0, "mean")
    masks = [torch.rand_like(q) for q in maps[:3]]
    argmax = backend.attention_map(s, 2.0, "max")[3:]
    loss_of_maps, ks = backend.map_loss(
        maps[:3], maps[3:], [], "code", "sum", "max", 1e-6, True, True
    )
    results = [*maps, *argmax, loss_of_maps, *ks]
    for channels in ([], argmax):
        results += backend.attention_map_backward(s, ks[:3], None, [0, 1, 2], 2.0, (), channels)
    for arguments in (
        loss_arguments(s, t, form="paper", p=3.0, collapse="sum", weights=[1.0, 0.5, -2.0]),
        loss_arguments(s, t, masks=masks, reduction="sample", eps_mode="add", eps=0.3),
    ):
        value, gradients = backend.at_value_and_grad(*arguments, 8.0, None)
        total, coefficients = backend.at_loss(*arguments, True, True)
        results += [value, *gradients, total, *coefficients]
    return results


@pytest.mark.parametrize(
    ("layout", "p", "form", "eps_mode"),
    [("planar", 2.0, "code", "max"), ("interleaved", 3.0, "paper", "add")],
)
def test_values_and_gradients(layout: str, p: float, form: str, eps_mode: str) -> None:
    """Check a few calls of the contract, for the default run of the tests."""
    features = [
        feature(2, 20, 3, 5, layout=layout),
        feature(3, 5, 2, 3, layout=layout, dtype=torch.bfloat16),
        feature(2, 3, 4, 4, layout=layout, dtype=torch.float64),
    ]
    teachers = [feature(len(x), 4, *x.shape[2:]) for x in features]
    options = {"p": p, "form": form, "eps_mode": eps_mode, "eps": 0.3, "weights": [1.0, 0.5, -2.0]}
    with use("triton"):
        assert_matches_reference(features, teachers, **options)
        assert_map_loss_matches(
            *(raw_maps((3, 7), (2, 9)) for _ in range(2)), [], form, "none", eps_mode, 0.3
        )
        for collapse in ("mean", "max"):
            assert_maps_match(features, p, collapse)
            inputs = tap_inputs(2, 20, 3, 5, collapse=collapse, layout=layout)
            assert_tap_matches(*inputs, p, collapse)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_splitting_lists_and_samples_keeps_results(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = all_results(layout)
    monkeypatch.setattr(launch, "MAX_ENTRIES", 2)
    monkeypatch.setattr(launch, "_PIECE_BYTES", 1024)
    monkeypatch.setattr(loss, "_MAX_UNSPLIT_BYTES", 1024)
    pieces = all_results(layout)
    torch.testing.assert_close(pieces, whole)
    # Atomics do not make results depend on the order of programs.
    assert all(map(torch.equal, all_results(layout), pieces))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("collapse", ["mean", "max"])
def test_taps_take_one_launch_without_copies(
    collapse: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches: list[Any] = []
    monkeypatch.setattr(launch, "start", lambda *call, **_: launches.append(call[2]))
    gradient, x = (feature(2, 12, 5, 6, layout=layout)[:, 2:9] for _ in range(2))
    q = torch.ones(2, 30)
    arguments = x, q, 2.0, collapse, q.int() if collapse == "max" else None
    backend.attention_tap_backward_(gradient, *arguments)
    result = backend.attention_tap_backward(gradient, *arguments)
    ((in_place, *_),), ((new, *_),) = launches
    assert in_place.feature.data is x
    assert in_place.coefficients is q
    assert in_place.gradient.data is in_place.addend.data is gradient
    # With "max", the gradient is copied first, then its argmax channels change.
    assert new.gradient.data is result
    assert new.addend.data is (result if collapse == "max" else gradient)


def test_accesses_stay_within_tensors(tmp_path: Path) -> None:
    arguments = str(SUPPORT / "guarded.py"), "42", "triton"
    assert "no access out of bounds" in output_of(tmp_path, *arguments, TRITON_INTERPRET="1")


@triton.jit
def _unpack(record, integer, real):  # type: ignore[no-untyped-def]
    tl.store(integer, decode_int(record[0]))
    tl.store(real, decode_double(record[1]))


@pytest.mark.parametrize("n", [0, 1, 16, 2**31 - 1])
def test_scalar_arguments_keep_their_value(n: int) -> None:
    integer, real = torch.zeros((), dtype=torch.int32), torch.zeros((), dtype=torch.float64)
    for x in (0.0, 1.0, -1 / 3, 5e-324, -1.7e308, float("inf")):
        launch.start(_unpack, 1, (encode_int(n), encode_double(x)), integer, real)
        assert (integer.item(), real.item()) == (n, x)


def test_import_of_the_package_does_not_import_triton() -> None:
    code = "import sys, torch; had = 'triton' in sys.modules; import at_fused; " + (
        "from at_fused.backends import triton; assert had or 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_cpu_tensors_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert not backend.interpreted()
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        backend.attention_map([torch.randn(1, 2, 3, device="cpu")], 2.0, "mean")
