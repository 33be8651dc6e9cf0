"""at_fused.visualize: the maps it takes from a model, and what its picture shows."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from at_fused import attention_map, visualize


class Net(nn.Module):
    """Outputs known in closed form: of images x, "a" gives x - 1, "b" its 2x2 means."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.a = Minus1()
        self.relu = nn.ReLU(inplace=True)
        self.norm = nn.BatchNorm2d(3)
        self.b = nn.AvgPool2d(2)
        self.pair = Pair()
        self.unused = nn.Identity()
        self.fails = fails

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        self.b(y)
        self.relu(y)
        self.norm(y)
        if self.fails:
            raise ArithmeticError("on the way")
        return self.relu(self.pair(y)[0])


class Minus1(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - 1


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


X, Q = torch.rand(2, 3, 4, 4), torch.rand(2, 2, 2)


def unit(q: Tensor) -> Tensor:
    return q / q.flatten(1).norm(dim=1)[:, None, None]


# ---- the maps


def test_maps_are_those_of_the_named_outputs() -> None:
    x = torch.randn(4, 3, 6, 8)
    maps = visualize.attention_maps(Net(), x, ["b", "a"])
    assert list(maps) == ["b", "a"]
    # Before the ReLU that then writes into the same tensor.
    torch.testing.assert_close(maps["a"], unit((x - 1).square().mean(1)))
    torch.testing.assert_close(
        maps["b"], unit((nn.functional.avg_pool2d(x, 2) - 1).square().mean(1))
    )
    only = visualize.attention_maps(Net(), x, "a", normalize=False, p=3, collapse="sum")
    torch.testing.assert_close(only["a"], (x - 1).abs().pow(3).sum(1))


def test_options_reach_attention_map() -> None:
    """Of tokens behind a class token; of a model that is compiled, as it was before."""
    tokens, model = torch.randn(2, 1 + 6, 5), nn.Sequential(nn.Identity())
    options: dict[str, Any] = {"channel_dim": -1, "skip_tokens": 1, "map_size": (2, 3)}
    for each in (model, torch.compile(model)):
        got = visualize.attention_maps(each, tokens, "0", **options)["0"]
        torch.testing.assert_close(got, attention_map(tokens, normalize=True, **options))


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool) -> None:
    net = Net(fails)
    net.b.eval()  # a mixture, as where a part is frozen
    modes = [m.training for m in net.modules()]
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    if fails:
        with pytest.raises(ArithmeticError):
            visualize.attention_maps(net, x, ["a", "b"])
    else:
        maps = visualize.attention_maps(net, x, ["a", "b"])
        assert not any(q.requires_grad for q in maps.values())
        with pytest.raises(TypeError):
            visualize.attention_maps(net, x, ["a", "pair"])  # its hook fails
        with pytest.raises(ValueError, match="no module"):
            visualize.attention_maps(net, x, ["a", "no such"])
    assert not any(m._forward_hooks for m in net.modules())
    assert [m.training for m in net.modules()] == modes
    assert torch.is_grad_enabled()
    for k, v in net.state_dict().items():
        assert torch.equal(v, before[k]), k


@pytest.mark.parametrize(
    ("layers", "kind", "message"),
    [
        ("aa", ValueError, r"layers: Net has no module 'aa'; near: a; all 6 are in"),
        ([], ValueError, r"at least one layer, and each once, got \[\]"),
        (["a", "a"], ValueError, r"each once, got \['a', 'a'\]"),
        (3, TypeError, r"layers must be a name or a list or tuple of names, got 3"),
        ("pair", TypeError, r"layer 'pair' \(Pair\) must give one tensor, got tuple; name a mod"),
        ("relu", ValueError, r"layer 'relu' must run once in a forward pass, it ran 2 times"),
        ("unused", ValueError, r"layer 'unused' must run once in a forward pass, it ran 0 times"),
    ],
)
def test_a_layer_that_gives_no_map(layers: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        visualize.attention_maps(Net(), torch.randn(1, 3, 4, 4), layers)


def test_other_refusals_of_maps() -> None:
    x, flat = torch.randn(1, 3, 4, 4), nn.Sequential(nn.Flatten())
    for model, layer, options, message in (
        (unit, "a", {}, r"model must be an nn.Module, got function"),
        (Net(), "a", {"p": 0.5}, r"layer 'a': p must be a finite number >= 1, got 0.5"),
        (Net(), "a", {"q": 1}, r"layer 'a': .*unexpected keyword argument 'q'"),
        (flat, "0", {}, r"layer '0': x must be .*got shape \(1, 48\)"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            visualize.attention_maps(model, x, layer, **options)


# ---- models side by side


def test_compare_draws_each_model_in_its_column(tmp_path: Path) -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x)

    x = torch.rand(2, 3, 4, 6)
    models = {"one": Net(), "two": Twice()}
    fig = visualize.compare(models, x, ["a", "b"], path=tmp_path / "maps.png", p=4, panel=1)
    axes = np.array(fig.axes[:12]).reshape(4, 3)
    for n in range(2):
        for k in (1, 2):
            q = (k * x[n] - 1).pow(4).mean(0)
            expected = q / q.square().mean().sqrt()
            np.testing.assert_allclose(axes[2 * n][k].images[1].get_array(), expected, rtol=1e-4)
    by_model = visualize.compare(models, x, {"one": "a", "two": ["b"]})
    assert [ax.images[1].get_array().shape for ax in by_model.axes[1:3]] == [(4, 6), (2, 3)]
    for bad in ({"one": "a"}, {"one": "a", "three": "a"}):
        with pytest.raises(ValueError, match=r"layers must have the titles of models, \['one'"):
            visualize.compare(models, x, bad)
    with pytest.raises(TypeError, match="models must be a mapping of titles to modules"):
        visualize.compare(Net(), x, "a")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["maps.pdf", "maps", "png"])
def test_another_suffix_is_refused_before_anything_runs(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"path must end in .png or .svg, got '.*{name}'"):
        visualize.compare({"m": Net(fails=True)}, X, "a", path=tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "at_fused._figure.find_spec", lambda m: None if m == "matplotlib" else find_spec(m)
    )
    for call in (
        lambda: visualize.figure(X, {"m": Q}),
        lambda: visualize.compare({"m": Net(fails=True)}, X, "a"),
    ):
        with pytest.raises(ImportError, match=r'pip install "at_fused\[train\]"'):
            call()
    assert visualize.attention_maps(Net(), X, "a")
