"""``at_fused.visualize``: maps of a model's layers, and figures of them."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import interpolate

from at_fused import attention_map, visualize


class Minus1(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - 1


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Net(nn.Module):
    """A network with outputs in closed form: layer a returns x - 1, layer b its 2x2 means."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.a, self.relu, self.norm = Minus1(), nn.ReLU(inplace=True), nn.BatchNorm2d(3)
        self.b, self.pair, self.unused = nn.AvgPool2d(2), Pair(), nn.Identity()
        self.fails = fails

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        self.b(y)
        self.norm(self.relu(y))
        if self.fails:
            raise ArithmeticError("in the forward pass")
        return self.relu(self.pair(y)[0])


X, Q = torch.rand(2, 3, 4, 4), torch.rand(2, 2, 2)
MAPS = {"m": {"a": Q}}


def normalize(q: Tensor) -> Tensor:
    return q / q.flatten(1).norm(dim=1)[:, None, None]


# ---- the maps ------------------------------------------------------------------------------------


def test_maps_of_named_layers() -> None:
    x = torch.randn(4, 3, 6, 8)
    maps = visualize.attention_maps(Net(), x, ["b", "a"])
    assert list(maps) == ["b", "a"]
    # The in-place ReLU changes the output of "a" after its map is computed.
    torch.testing.assert_close(maps["a"], normalize((x - 1).square().mean(1)))
    torch.testing.assert_close(
        maps["b"], normalize((nn.functional.avg_pool2d(x, 2) - 1).square().mean(1))
    )
    maps = visualize.attention_maps(Net(), x, "a", normalize=False, p=3, collapse="sum")
    torch.testing.assert_close(maps["a"], (x - 1).abs().pow(3).sum(1))


def test_options_are_passed_to_attention_map() -> None:
    """Use tokens after a class token, and a model before and after torch.compile."""
    tokens, model = torch.randn(2, 1 + 6, 5), nn.Sequential(nn.Identity())
    options: dict[str, Any] = {"channel_dim": -1, "skip_tokens": 1, "map_size": (2, 3)}
    for m in (model, torch.compile(model)):
        q = visualize.attention_maps(m, tokens, "0", **options)["0"]
        torch.testing.assert_close(q, attention_map(tokens, normalize=True, **options))


@pytest.mark.parametrize(
    ("fails", "layers", "error"),
    [
        (False, ["a", "b"], None),
        (True, ["a", "b"], ArithmeticError),
        (False, ["a", "pair"], TypeError),  # "pair" returns a tuple, so its hook raises
        (False, ["a", "no such"], ValueError),
    ],
)
def test_model_is_unchanged_even_after_errors(fails: bool, layers: list[str], error: Any) -> None:
    net = Net(fails)
    net.b.eval()  # mixed modes, as in a model with frozen parts
    modes = [m.training for m in net.modules()]
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    with pytest.raises(error) if error else nullcontext():
        maps = visualize.attention_maps(net, x, layers)
        assert not any(q.requires_grad for q in maps.values())
    assert not any(m._forward_hooks for m in net.modules())
    assert [m.training for m in net.modules()] == modes
    assert torch.is_grad_enabled()
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("model", "layers", "options", "message"),
    [
        (Net(), "aa", {}, r"layers: Net has no module 'aa'; some of its modules: a; .* all 6"),
        (Net(), [], {}, r"layers must be a name or a list of different names, got \[\]"),
        (Net(), ["a", "a"], {}, r"different names, got \['a', 'a'\]"),
        (Net(), 3, {}, r"layers must be a name or a list of different names, got 3"),
        (Net(), "pair", {}, r"layer 'pair' \(Pair\) must return one tensor, got tuple; name a mod"),
        (Net(), "relu", {}, r"layer 'relu' must run once in a forward pass, but ran 2 times"),
        (Net(), "unused", {}, r"layer 'unused' must run once in a forward pass, but ran 0 times"),
        (Net(), "a", {"p": 0.5}, r"layer 'a': p must be a finite number >= 1, got 0.5"),
        (Net(), "a", {"q": 1}, r"layer 'a': .*unexpected keyword argument 'q'"),
        (normalize, "a", {}, r"model must be an nn.Module, got function"),
    ],
)
def test_errors_of_attention_maps(
    model: Any, layers: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        visualize.attention_maps(model, torch.randn(1, 3, 4, 4), layers, **options)


# ---- compare -------------------------------------------------------------------------------------


def test_compare_draws_one_column_per_model(tmp_path: Path) -> None:
    class DoubledInput(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x)

    x = torch.rand(2, 3, 4, 6)
    models = {"one": Net(), "two": DoubledInput()}
    fig = visualize.compare(models, x, ["a", "b"], path=tmp_path / "maps.png", p=4, panel=1)
    axes = np.array(fig.axes[:12]).reshape(4, 3)
    for n in range(2):
        for k in (1, 2):
            q = (k * x[n] - 1).pow(4).mean(0)
            expected = q / q.square().mean().sqrt()
            np.testing.assert_allclose(axes[2 * n][k].images[1].get_array(), expected, rtol=1e-4)
    assert (tmp_path / "maps.png").exists()
    by_model = visualize.compare(models, x, {"one": "a", "two": ["b"]})
    assert [ax.images[1].get_array().shape for ax in by_model.axes[1:3]] == [(4, 6), (2, 3)]
    for layers in ({"one": "a"}, {"one": "a", "three": "a"}):
        with pytest.raises(ValueError, match=r"layers must have the titles of models, \['one'"):
            visualize.compare(models, x, layers)
    with pytest.raises(TypeError, match="models must be a mapping of titles to modules"):
        visualize.compare(Net(), x, "a")  # type: ignore[arg-type]


def test_error_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "at_fused\[train\]"'):
        visualize.figure(X, MAPS)
    assert visualize.attention_maps(Net(), X, "a")


# ---- figure --------------------------------------------------------------------------------------


def panels(fig: Figure, shape: tuple[int, int]) -> np.ndarray:
    """Return the figure's axes as a grid, including the empty ones between images."""
    return np.array(fig.axes[: shape[0] * shape[1]]).reshape(shape)


def image_arrays(ax: Any) -> list[np.ndarray]:
    return [np.asarray(image.get_array()) for image in ax.images]


@pytest.mark.parametrize(("across", "lines", "width"), [(1, 3, 3), (2, 2, 7)])
def test_each_map_is_drawn_over_its_image(across: int, lines: int, width: int) -> None:
    images = torch.rand(3, 3, 6, 8)
    columns = {"one": torch.rand(2, 3, 3, 4), "two": torch.rand(2, 3, 6, 8)}
    maps = {title: dict(zip("ab", column, strict=True)) for title, column in columns.items()}
    fig = visualize.figure(images, maps, across=across, names=["x", "y", "z"])
    axes = panels(fig, (2 * lines, width))
    for n in range(3):
        line, column = divmod(n, across)
        for stage in range(2):
            image_axes, *map_axes = axes[2 * line + stage][4 * column :][:3]
            (image,) = image_arrays(image_axes)
            np.testing.assert_allclose(image, images[n].movedim(0, -1), atol=1e-6)
            for ax, maps in zip(map_axes, columns.values(), strict=True):
                background, overlay = image_arrays(ax)
                np.testing.assert_allclose(background, 0.25 + 0.5 * image, atol=1e-6)
                q = maps[stage, n]
                np.testing.assert_allclose(overlay, q / q.square().mean().sqrt(), rtol=1e-5)
                assert ax.images[1].get_extent() == image_axes.images[0].get_extent()
        titles = [ax.get_title() for ax in axes[2 * line][4 * column :][:3]]
        assert titles == ["xyz"[n], "one", "two"]
    empty = sum(not ax.images and ax not in axes[:, 3::4] for ax in axes.flat)
    assert empty == (6 if across == 2 else 0)


def test_each_row_has_one_scale_from_zero_to_its_maximum() -> None:
    maps = {str(n): {stage: torch.rand(4, n, n) for stage in "ab"} for n in (2, 5)}
    fig = visualize.figure(torch.rand(4, 1, 4, 4), maps, across=2)
    for row, bar in zip(panels(fig, (4, 7)), fig.axes[28:], strict=True):
        drawn = [ax.images[1] for ax in row if len(ax.images) == 2]
        maximum = max(float(np.max(image.get_array())) for image in drawn)
        assert len(drawn) == 4
        assert {image.get_clim() for image in drawn} == {(0.0, maximum)}
        assert bar.get_ylim() == (0.0, maximum)


def test_maps_are_scaled_so_that_a_flat_map_is_1() -> None:
    q = torch.rand(1, 3, 3)
    maps = {"raw": q * 1e6, "unit": q / q.norm(), "flat": torch.full((1, 7, 7), 3.0), "zero": q * 0}
    fig = visualize.figure(X[:1, :1], {title: {"a": q} for title, q in maps.items()})
    raw, normalised, flat, zero = (image_arrays(ax)[1] for ax in fig.axes[1:5])
    np.testing.assert_allclose(raw, normalised, rtol=1e-5)
    np.testing.assert_allclose(flat, 1.0)
    np.testing.assert_allclose(zero, 0.0)
    only_zero = visualize.figure(X[:1, :1], {"zero": {"a": q * 0}})
    assert only_zero.axes[1].images[1].get_clim() == (0, 1)


def render(fig: Figure, ax: Any) -> Tensor:
    """Render the figure, and return the red channel of an axes in [0, 1], (h, w)."""
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())
    box = ax.get_window_extent()
    left, right = round(box.x0), round(box.x1)
    top, bottom = round(pixels.shape[0] - box.y1), round(pixels.shape[0] - box.y0)
    return torch.from_numpy(pixels[top:bottom, left:right, 0] / 255.0)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("position", [(0, 0), (1, 2)])
def test_map_cells_cover_their_part_of_the_image(
    interpolation: str, position: tuple[int, int]
) -> None:
    q = torch.zeros(1, 3, 4)
    q[0][position] = 1
    options: dict[str, Any] = {"interpolation": interpolation, "alpha": 1, "cmap": "gray"}
    fig = visualize.figure(torch.rand(1, 1, 24, 32), {"m": {"a": q}}, panel=3, **options)
    actual = render(fig, fig.axes[1])
    h, w = actual.shape
    assert h > 150
    mode = {"mode": "bilinear", "align_corners": False} if interpolation == "bilinear" else {}
    expected = interpolate(q[None], size=(h, w), **mode)[0, 0].double()
    # Allow an error of a pixel at an edge, but not of half a cell (a tenth of the panel).
    assert (actual - expected).abs().mean() < 0.012


def test_mean_and_std_undo_the_normalisation_of_images() -> None:
    original = torch.rand(2, 3, 4, 4)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    normalized = (original - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    def first(images: Tensor, **options: Any) -> np.ndarray:
        return image_arrays(visualize.figure(images, MAPS, **options).axes[0])[0]

    expected = original[0].movedim(0, -1).numpy()
    np.testing.assert_allclose(first(original), expected, atol=1e-6)
    np.testing.assert_allclose(first(normalized, mean=mean, std=std), expected, atol=1e-6)
    np.testing.assert_allclose(first(original / 2 - 1, mean=1, std=1), expected / 2, atol=1e-6)
    low, high = original.min(), original.max()
    stretched = ((original[0] - low) / (high - low)).movedim(0, -1).numpy()
    np.testing.assert_allclose(first(original * 5 - 2), stretched, atol=1e-5)
    grey = torch.tensor([0, 51, 255, 102], dtype=torch.uint8).reshape(1, 1, 2, 2).expand(2, 1, 2, 2)
    np.testing.assert_allclose(first(grey), [[0, 0.2], [1, 0.4]])


def test_row_labels() -> None:
    a, b = torch.rand(1, 4, 4), torch.rand(1, 2, 2)
    columns = {"s": {"u": a, "v": a, "w": b}, "t": {"u": a, "w": b, "x": b}}
    x = torch.rand(1, 1, 4, 4)
    axes = visualize.figure(x, columns).axes
    assert [axes[row].get_ylabel() for row in (0, 3, 6)] == ["u\n4x4", "stage 2", "stage 3\n2x2"]
    axes = visualize.figure(x, {"s": [a, b], "t": (b, b)}, stages=["early", "late"]).axes
    assert [axes[row].get_ylabel() for row in (0, 3)] == ["early", "late"]
    assert visualize.figure(x, {"s": a, "t": b}).axes[0].get_ylabel() == "stage 1"


@pytest.mark.parametrize(
    ("images", "columns", "options", "message"),
    [
        (X[0], MAPS, {}, r"images must be a tensor \(B, 1, H, W\) or .*got \(3, 4, 4\)"),
        ([X], MAPS, {}, r"images must be .*got list"),
        (X[:0], MAPS, {}, r"images must be .*got \(0, 3, 4, 4\)"),
        *((X, c, {}, "columns must be a mapping of titles to maps") for c in (Q, {"m": 3}, {})),
        (X, MAPS, {"stages": ["a", "b"]}, r"stages must be a list of 1 strings"),
        (X, {"m": {"a": Q}, "n": {"a": Q, "b": Q}}, {}, "same number for each title, got"),
        (X, {"m": {}}, {}, r"same number for each title, got \{'m': \{\}\}"),
        (X, {"m": {"a": Q[:1]}}, {}, r"columns\['m'\]\['a'\] must be maps \(B, H, W\) of the 2 im"),
        (X, {"m": {"a": None}}, {}, r"columns\['m'\]\['a'\] must be maps .*got NoneType"),
        (X, {"m": {"a": Q[:, :0]}}, {}, r"\['a'\] must be maps .*got \(2, 0, 2\)"),
        (X, {"m": {"a": Q / 0}}, {}, r"columns\['m'\]\['a'\] must be finite"),
        (X, MAPS, {"names": "ab"}, r"names must be a list of 2 strings, got 'ab'"),
        (X, MAPS, {"across": True}, r"across must be a whole number >= 1, got True"),
        *((X, MAPS, {n: "1"}, f"{n} must be a number") for n in ("mean", "std", "panel")),
        (X, MAPS, {"mean": torch.tensor(torch.inf)}, r"mean must be finite"),
        (X, MAPS, {"mean": [1, 2]}, r"mean must be a number or one per channel, got \[1, 2\]"),
        (X, MAPS, {"alpha": 1.5}, r"alpha \(1.5\) is outside 0-1 range"),
        (X, MAPS, {"panel": 0}, r"panel must be > 0, in inches, got 0"),
    ],
)
def test_errors_of_figure(images: Any, columns: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        visualize.figure(images, columns, **options)


def test_save_writes_png_and_svg(tmp_path: Path) -> None:
    fig = visualize.figure(X, MAPS, panel=1)
    with pytest.raises(ValueError, match="Format 'txt' is not supported"):
        visualize.save(fig, tmp_path / "maps.txt")
    visualize.save(fig, tmp_path / "maps.png")
    height, width, _ = matplotlib.image.imread(tmp_path / "maps.png").shape
    assert [width, height] == pytest.approx(fig.get_size_inches() * 120, abs=1)
    visualize.save(fig, str(tmp_path / "maps.SVG"))
    root = ElementTree.parse(tmp_path / "maps.SVG").getroot()
    assert root.tag.endswith("}svg")
    # The image twice, the map, and the colour bar.
    assert sum(e.tag.endswith("}image") for e in root.iter()) >= 2 * 3
