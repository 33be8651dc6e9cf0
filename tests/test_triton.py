"""The Triton back end's own ways: how it cuts work, launches it, and copies nothing.

On a GPU, or else under the interpreter. What it computes is the contract's, of every back end.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import use
from reference import assert_matches_reference
from test_map_operators import assert_map_loss_matches, assert_maps_match, raw_maps
from test_method import LAYOUTS, feature
from test_tap_operators import FEW, Options, assert_is_the_formula, inputs
from test_triton_compile import printed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import at_fused
from at_fused.backends import triton as backend

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton
import triton.language as tl

from at_fused.backends.triton import launch, loss
from at_fused.backends.triton.scalars import double, double_of, number, number_of

DEVICE = "cpu" if backend.interpreted() else "cuda"


@pytest.fixture(autouse=True)
def on_triton() -> Iterator[None]:
    """Runs the test on Triton."""
    with use("triton"), torch.device(DEVICE):
        yield


@pytest.fixture(params=["whole", "pieces"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists longer than a launch takes, of samples that one program has, or several share."""
    monkeypatch.setattr(launch, "MAX_ENTRIES", 2)
    if request.param == "pieces":
        monkeypatch.setattr(launch, "_PIECE_BYTES", 1024)
        monkeypatch.setattr(launch, "processors", lambda _: 10**6)
        monkeypatch.setattr(loss, "_WHOLE_BYTES", 1024)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [
        {"weights": [1.0, 0.5, -2.0]},
        {"form": "paper", "p": 3.0, "collapse": "sum", "reduction": "none"},
        {"mask": True, "reduction": "sample", "eps_mode": "add", "eps": 0.3},
    ],
    ids=str,
)
def test_losses(options: dict[str, Any], layout: str) -> None:
    sizes, dtypes = ((11, 13), (3, 5), (4, 4)), (torch.float32, torch.float64, torch.bfloat16)
    pairs = zip(sizes, dtypes, strict=True)
    students = [feature(2, 12, *size, layout=layout, dtype=dtype) for size, dtype in pairs]
    teachers = [feature(2, 9, *size, dtype=torch.float32) for size in sizes]
    masks = [torch.rand(2, *size) for size in sizes]
    options = options | ({"mask": masks} if "mask" in options else {})
    assert_matches_reference(students, teachers, **options)
    once, again = (at_fused.at_value_and_grad(students, teachers, **options) for _ in range(2))
    assert all(map(torch.equal, (once[0], *once[1]), (again[0], *again[1])))


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("collapse", ["mean", "max"])
def test_maps(collapse: str, layout: str) -> None:
    xs = [
        feature(2, 12, 11, 13, layout=layout, dtype=torch.float32),
        feature(3, 5, 6, dtype=torch.float16),
        feature(2, 8, 16, 16, dtype=torch.float32)[:, 1:7, ::2],
    ]
    assert_maps_match(xs, 2.0, collapse)


@pytest.mark.parametrize("options", FEW, ids=str)
def test_taps(options: Options) -> None:
    tensors = inputs(2, 24, 9, 31, collapse=options[1])
    assert_is_the_formula(*tensors, options)


@pytest.mark.usefixtures("cut")
def test_losses_of_maps() -> None:
    sizes = (3, 37), (3, 700), (3, 5), (3, 8)
    for options in (("code", "sum", "max", 1e-6), ("paper", "sample", "add", 1e-6)):
        assert_map_loss_matches(
            raw_maps(*sizes), raw_maps(*sizes), [1.0, -2.0, 0.25, 3.0], *options
        )


class Allocated(TorchDispatchMode):
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
    base, x = (feature(2, 12, 5, 6, layout=layout, dtype=torch.float32) for _ in range(2))
    q = torch.ones(2, 30)
    channels = [q.to(torch.int32)] if collapse == "max" else []
    arguments = x[:, 2:9], q, 2.0, collapse, *channels
    with Allocated() as allocated:
        backend.attention_tap_backward_(base[:, 3:10], *arguments)
    assert allocated.sizes == []
    with Allocated() as allocated:
        backend.attention_tap_backward(base[:, 3:10], *arguments)
    assert allocated.sizes == [420]
    assert len(launches) == 2
    # That the mode sees copies, where they are needed.
    other = torch.randn(2, 7, 6, 5).transpose(2, 3)
    with Allocated() as allocated:
        backend.attention_tap_backward_(other, *arguments)
    assert 420 in allocated.sizes


@triton.jit
def _unpack(record, whole, real):  # type: ignore[no-untyped-def]
    tl.store(whole, number(record[0]))
    tl.store(real, double(record[1]))


@pytest.mark.parametrize("n", [0, 1, 16, 2**31 - 1])
@pytest.mark.parametrize("x", [0.0, 1.0, -1 / 3, 5e-324, -1.7e308, float("inf")])
def test_scalars_arrive_as_they_are(n: int, x: float) -> None:
    whole, real = torch.zeros((), dtype=torch.int32), torch.zeros((), dtype=torch.float64)
    launch.start(_unpack, 1, (number_of(n), double_of(x)), whole, real)
    assert (whole.item(), real.item()) == (n, x)


def test_one_kernel_for_all_batch_sizes() -> None:
    kernels = printed("--kernels")
    assert len(kernels) >= 18  # six operators, three lists
    # One for whole samples, and one for samples that are cut.
    assert {name: n for name, n in kernels.items() if n > 2} == {}


def test_triton_is_not_imported_with_the_package() -> None:
    code = "import sys, torch; had = 'triton' in sys.modules; import at_fused; " + (
        "from at_fused.backends import triton; assert had or 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_cpu_tensors_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert not backend.interpreted()
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        backend.attention_map([torch.randn(1, 2, 3, device="cpu")], 2.0, "mean")
