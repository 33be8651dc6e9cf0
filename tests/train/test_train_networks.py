"""Networks of at-fused-train, folded BatchNorm, and step modes."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from image_data import needs_torchvision
from torch import Tensor, nn

from at_fused.train import speed
from at_fused.train.config import ConfigError, resolve
from at_fused.train.networks import WRN, build, count_parameters
from at_fused.train.speed import StepMode, fold_batchnorm, step_mode
from at_fused.visualize import attention_maps

CPU = torch.device("cpu")


# ---- WRN


@pytest.mark.parametrize(
    ("depth", "width", "millions"), [(16, 1, 0.18), (16, 2, 0.69), (40, 1, 0.56), (40, 2, 2.24)]
)
def test_wrn_has_the_published_size(depth: int, width: int, millions: float) -> None:
    assert count_parameters(WRN(depth, width)) / 1e6 == pytest.approx(millions, abs=0.006)


def test_wrn_shapes() -> None:
    logits, features = build("wrn-16-2-b4", classes=7, channels=1)(torch.randn(2, 1, 16, 16))
    assert logits.shape == (2, 7)
    assert [tuple(g.shape[1:]) for g in features] == [(8, 16, 16), (16, 8, 8), (32, 4, 4)]
    assert all(g.min() < 0 < g.max() for g in features)
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(logits.sum(), features))


# ---- other networks


@pytest.mark.parametrize(
    ("name", "size", "millions"),
    [
        ("resnet-18", 64, 11.69),
        ("resnet-50", 64, 25.56),
        ("resnet-18-cifar", 32, 11.68),
        ("mobilenet_v3_small", 64, 2.54),
    ],
)
@needs_torchvision
def test_torchvision_networks_are_built_by_name(name: str, size: int, millions: float) -> None:
    model = build(name, 1000, 3)
    assert count_parameters(model) / 1e6 == pytest.approx(millions, abs=0.006)
    x = torch.randn(2, 3, size, size)
    assert model.eval()(x).shape == (2, 1000)
    if name.endswith("-cifar"):  # no downsampling in the stem
        maps = attention_maps(model, x, [f"layer{i}" for i in range(1, 5)])
        assert [len(q[0]) for q in maps.values()] == [32, 16, 8, 4]


@needs_torchvision
@pytest.mark.parametrize(
    ("name", "channels", "message"),
    [
        ("resnet-19", 3, r"student: got 'resnet-19', expected wrn-DEPTH"),
        ("mobilenet_v7", 3, "did you mean mobilenet_v2"),
        ("resnet-18", 1, "takes images with 3 channels, not 1"),
        ("resnet-50-paper", 3, "expected .*MODULE:FUNCTION; did you mean resnet-50"),
        ("no_module:f", 3, "student: cannot import 'no_module:f': ModuleNotFoundError: No"),
        ("own_stops:net", 3, "cannot import 'own_stops:net': SystemExit: 3"),
        ("own_networks:raises", 3, r"raises\(num_classes=7\) raises KeyError: 'x'"),
        ("own_networks:dict", 3, r"must return a torch.nn.Module, got dict"),
    ],
)
def test_unknown_names_and_failing_functions_are_one_line(
    name: str, channels: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_networks(tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match=message) as error:
        build(name, 7, channels, "student")
    assert "\n" not in str(error.value)


def test_missing_torchvision_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ConfigError, match=r"requires torchvision.*at_fused\[train\]"):
        build("resnet-18", 10, 3)


@needs_torchvision
def test_paper_resnet_has_no_batchnorm_in_shortcuts() -> None:
    plain, paper = build("resnet-18", 10, 3).state_dict(), build("resnet-18-paper", 10, 3)
    removed = {k for k in plain if "downsample.1" in k}
    kept = {k: x.shape for k, x in plain.items() if k not in removed}
    expected = {k.replace("downsample.0", "downsample"): shape for k, shape in kept.items()}
    assert len(removed) == 15
    assert {k: x.shape for k, x in paper.state_dict().items()} == expected
    assert paper(torch.randn(2, 3, 64, 64)).shape == (2, 10)


@pytest.mark.parametrize(
    "name", ["wrn-16-2", pytest.param("resnet-18-paper", marks=needs_torchvision)]
)
def test_init_paper_draws_the_authors_initial_weights(name: str) -> None:
    """Compare with utils.py of their program, and the default with torch."""
    torch.manual_seed(0)
    paper, plain = build(name, 100, 3, init="paper"), build(name, 100, 3)
    norms = [[m for m in n.modules() if isinstance(m, nn.BatchNorm2d)] for n in (paper, plain)]
    assert all((m.weight == 1).all() for m in norms[1])
    assert all(not m.bias.any() and (m.momentum, m.eps) == (0.1, 1e-5) for m in norms[0])
    weights = torch.cat([m.weight for m in norms[0]])
    # Uniform in [0, 1]: mean, variance, minimum.
    tolerance = 4 / math.sqrt(len(weights))
    assert weights.mean().item() == pytest.approx(1 / 2, abs=tolerance / math.sqrt(12))
    assert weights.var().item() == pytest.approx(1 / 12, abs=tolerance * 0.075)
    assert 0 <= weights.min() < 0.02
    layers = [m for m in paper.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    for m in layers:  # He initialisation: normal with variance 2 / fan_in
        w = m.weight.detach() / math.sqrt(2 / m.weight[0].numel())
        n = w.numel()
        assert w.std().item() == pytest.approx(1, rel=4 / math.sqrt(2 * n))
        assert abs(w.mean().item()) < 4 / math.sqrt(n)
        if n > 4000:
            assert (w.abs() > 2).double().mean().item() == pytest.approx(0.0455, abs=0.014)
    assert not layers[-1].bias.any()


@pytest.mark.parametrize(
    ("name", "type_name"),
    [
        pytest.param("torchvision.models:resnet18", "ResNet", marks=needs_torchvision),
        ("timm.models:resnet10t", "ResNet"),
        ("own_networks:Tiny.of", "Tiny"),
        ("own_networks:Tiny", "Tiny"),
    ],
)
def test_network_is_imported_by_its_path(
    name: str, type_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm")
    own_networks(tmp_path, monkeypatch)
    model = build(name, 7, 3)
    assert type(model).__name__ == type_name
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def own_networks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a user's modules to the working folder, which only the program adds to sys.path."""
    folder.joinpath("own_networks.py").write_text(
        "from torch import nn\nfrom builtins import dict\n"
        "class Tiny(nn.Sequential):\n"
        "    def __init__(self, num_classes):\n"
        "        super().__init__(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),\n"
        "                         nn.Linear(4, num_classes))\n"
        "    of = classmethod(lambda cls, num_classes: cls(num_classes))\n"
        "def raises(num_classes): return {}['x']\n"
    )
    folder.joinpath("own_stops.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("own_networks", "own_stops"):
        monkeypatch.delitem(sys.modules, name, raising=False)


# ---- folded BatchNorm


def with_random_norms(model: nn.Module, x: Tensor) -> nn.Module:
    """Return the model with BatchNorm parameters and statistics that are not the initial ones."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    with torch.no_grad():
        for _ in range(3):
            model.train()(x)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "layers", "before", "after"),
    [
        # Only the second norm of each block follows a convolution.
        ("wrn-16-2", ["groups.0", "groups.1", "groups.2"], 13, 7),
        pytest.param("resnet-18", ["layer1", "layer4"], 20, 0, marks=needs_torchvision),
    ],
)
def test_folding_changes_only_rounding(
    name: str, layers: list[str], before: int, after: int
) -> None:
    x = torch.randn(4, 3, 64, 64)
    model = with_random_norms(build(name, 10, 3), x)
    folded, count = fold_batchnorm(model, layers)
    norms = [sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) for net in (model, folded)]
    assert (norms, count) == ([before, after], before - after)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x), rtol=1e-3, atol=1e-3)


def test_folding_keeps_the_output_of_kept_layers() -> None:
    x = torch.randn(4, 3, 8, 8)
    inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3))
    model = with_random_norms(nn.Sequential(inner, nn.BatchNorm2d(5), nn.ReLU()), x)
    for keep, expected in ([], 2), (["0.0"], 1), (["0"], 1), (["0.1"], 1), (["1"], 1):
        folded, count = fold_batchnorm(model, keep)
        assert count == expected, keep
        torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
        for name in keep:
            a, b = (attention_maps(m, x, name, normalize=False)[name] for m in (model, folded))
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


class Shared(nn.Module):
    """Network with a convolution called twice, one with two users, and optionally a branch."""

    def __init__(self, branch: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.n, self.m, self.branch = nn.BatchNorm2d(3), nn.BatchNorm2d(3), branch

    def forward(self, x: Tensor) -> Tensor:
        if self.branch:  # torch.fx cannot trace it
            return self.n(self.a(x)) if x.sum() > 0 else x
        y = self.b(self.n(self.a(self.a(x))))
        return y + self.m(y)


@pytest.mark.parametrize("branch", [False, True])
def test_shared_convolutions_and_untraceable_networks_are_not_folded(branch: bool) -> None:
    model, x = Shared(branch).eval(), torch.randn(2, 3, 6, 6)
    folded, count = fold_batchnorm(model, [])
    assert count == 0
    assert torch.equal(folded(x), model(x))


# ---- step modes


def test_speed_determines_the_step_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    def mode(method: str = "at", processes: int = 1, **options: Any) -> StepMode:
        return step_mode(resolve(options), CPU, method, processes)

    monkeypatch.setattr(speed, "has_fast_bf16", lambda device: True)
    assert mode(speed="auto") == StepMode(torch.bfloat16, True, True)
    text = "bfloat16, channels_last, compile, folded BatchNorm, fused SGD"
    assert str(mode(speed="auto")) == text
    monkeypatch.setattr(speed, "has_fast_bf16", lambda device: False)
    dtypes = {"auto": None, "fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    assert {name: mode(speed=name).dtype for name in dtypes} == dtypes
    assert mode(speed="exact") == StepMode()
    # Double backward needs eager mode and fp32.
    second_order = mode("gradient-at", speed="bf16")
    assert (second_order.dtype, second_order.compile, second_order.fast) == (None, False, True)
    assert not mode(speed="fp32", compile=False).compile
    assert not mode(processes=2, speed="fp32").compile
    assert mode(processes=2, speed="fp32", sync_norm=False).compile
