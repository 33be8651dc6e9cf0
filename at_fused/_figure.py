"""The picture of attention maps over their images; at_fused.visualize has it. Needs matplotlib."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from at_fused._numbers import as_python, check_finite, is_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")

Maps = Mapping[str, Tensor] | Sequence[Tensor] | Tensor


def need_matplotlib() -> None:
    """Raises the ImportError that says how to get matplotlib, where there is none."""
    if find_spec("matplotlib") is None:
        raise ImportError('at_fused.visualize needs matplotlib: pip install "at_fused[train]"')


def check_path(path: str | Path) -> Path:
    """The path of a picture; ValueError if its suffix is neither .png nor .svg."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"path must end in .png or .svg, got {str(path)!r}")
    return path


def check_range(name: str, value: object, low: float, high: float) -> float:
    """Return the number; an error for what is none from low to high."""
    number = check_finite(name, value)
    if not low <= number <= high:
        raise ValueError(f"{name} must be from {low} to {high}, got {value!r}")
    return number


def save(fig: Figure, path: str | Path, dpi: float = 120) -> None:
    """Writes a figure as PNG or SVG, by the suffix of ``path``.

    Args:
        fig: what :func:`figure` or :func:`at_fused.visualize.compare` gave.
        path: ends in .png or .svg.
        dpi: pixels per inch of a PNG, from 10 to 10,000.

    Raises:
        TypeError, ValueError: another suffix, no such number.
        OSError: the file cannot be written.
    """
    path = check_path(path)
    dpi = check_range("dpi", dpi, 10, 10_000)
    # Without the date, the same picture is the same file.
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
    fig.savefig(path, dpi=dpi, metadata=metadata)


def _pictures(
    images: Tensor, mean: float | Sequence[float] | None, std: float | Sequence[float] | None
) -> Tensor:
    """Images as (B, H, W, 1 or 3) in [0, 1]."""
    if not isinstance(images, Tensor) or images.dim() != 4 or images.shape[1] not in (1, 3):
        got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images must be a tensor (B, 1, H, W) or (B, 3, H, W), got {got}")
    if 0 in images.shape:
        raise ValueError(f"images must not be empty, got shape {tuple(images.shape)}")
    x = images.detach().cpu().double()
    if images.dtype is torch.uint8:
        x = x / 255
    for name, value in (("std", std), ("mean", mean)):
        if value is not None:
            for number in value if isinstance(value, Sequence) else [value]:
                if not hasattr(number, "dtype"):  # as torch's and NumPy's have
                    check_finite(name, number)
            factor = torch.as_tensor(as_python(name, value), dtype=x.dtype).flatten()
            if not factor.isfinite().all():
                raise ValueError(f"{name} must be finite, got {value!r}")
            if len(factor) not in (1, x.shape[1]):
                raise ValueError(
                    f"{name} must be a number or one per channel, got {value!r} "
                    f"for {x.shape[1]} channels"
                )
            factor = factor[:, None, None]
            x = x * factor if name == "std" else x + factor
    if mean is None and std is None and not 0 <= x.min() <= x.max() <= 1:
        x = (x - x.min()) / (x.max() - x.min()).clamp_min(torch.finfo(x.dtype).tiny)
    return x.clamp(0, 1).movedim(1, -1)


def _relative(name: str, attention: Tensor, batch: int) -> Tensor:
    """A map (B, h, w) over its own root mean square: sqrt(h w) q, 1 everywhere if it is flat."""
    if (
        not isinstance(attention, Tensor)
        or attention.dim() != 3
        or len(attention) != batch
        or 0 in attention.shape
    ):
        got = tuple(attention.shape) if isinstance(attention, Tensor) else type(attention).__name__
        raise ValueError(f"{name} must be maps (B, H, W) of the {batch} images, got {got}")
    attention = attention.detach().cpu().double()
    if not attention.isfinite().all():
        raise ValueError(f"{name} must be finite, got inf or nan in it")
    rms = attention.square().mean(dim=(1, 2), keepdim=True).sqrt()
    return attention / rms.clamp_min(torch.finfo(torch.float64).tiny)


def _columns(columns: Mapping[str, Maps], batch: int) -> tuple[list[str], list[list[Tensor]]]:
    """Names of the stages, and of each column its maps stage by stage."""
    if not isinstance(columns, Mapping) or not columns:
        raise ValueError(f"columns must be a mapping of titles to maps, got {columns!r:.80}")
    stages: list[str] = []
    result: list[list[Tensor]] = []
    for title, given in columns.items():
        if not isinstance(given, (Tensor, Mapping, list, tuple)):
            raise TypeError(
                f"columns[{title!r}] must be maps, or a mapping or list of them, "
                f"got {type(given).__name__}"
            )
        named = given if isinstance(given, Mapping) else {}
        maps: list[Tensor]
        if isinstance(given, Tensor):
            maps = [given]
        else:
            maps = list(given.values() if isinstance(given, Mapping) else given)
        result.append([_relative(f"columns[{title!r}][{i}]", x, batch) for i, x in enumerate(maps)])
        if len(maps) != len(result[0]) or not maps:
            raise ValueError(
                "columns must each have one map per stage, got "
                f"{len(maps)} for {title!r}, {len(result[0])} in the first"
            )
        # One name if all columns agree on it, else only the number; and so for the maps' sizes.
        own = [str(n) for n in named] or [f"stage {i + 1}" for i in range(len(maps))]
        pairs = enumerate(zip(stages or own, own, strict=True))
        stages = [a if a == b else f"stage {i + 1}" for i, (a, b) in pairs]
    for i, maps_of_stage in enumerate(zip(*result, strict=True)):
        sizes = {tuple(x.shape[1:]) for x in maps_of_stage}
        if len(sizes) == 1:
            stages[i] += "\n{}x{}".format(*sizes.pop())
    return stages, result


def _labels(name: str, given: Sequence[str] | None, default: list[str]) -> list[str]:
    if given is None:
        return default
    if not isinstance(given, (list, tuple)) or len(given) != len(default):
        raise ValueError(f"{name} must be a list of {len(default)} texts, got {given!r}")
    return [str(text) for text in given]


def _wrap(title: str, panel: float) -> str:
    """A title in lines as wide as its panel, at 9 points; what follows a plus stays with it."""
    glued = str(title).replace("+ ", "+\N{NO-BREAK SPACE}")
    lines = textwrap.fill(glued, max(8, int(panel * 13)))
    return lines.replace("\N{NO-BREAK SPACE}", " ")


def figure(
    images: Tensor,
    columns: Mapping[str, Maps],
    *,
    stages: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    across: int = 1,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    alpha: float = 0.7,
    cmap: str = "viridis",
    interpolation: str = "bilinear",
    panel: float = 1.3,
) -> Figure:
    """A picture of maps over their images: a row per image and stage, a column per model.

    Each row has the image, then it again under the map of each column. A map is drawn as
    ``sqrt(h w) q = Q / rms(Q)``, which is 1 everywhere for a flat map whatever its size, so that
    one colour scale, from 0 to the row's maximum, serves a row. A map's outer edges are the
    image's: a cell of an (h, w) map covers the H/h x W/w pixels that it stands for, as
    ``torch.nn.functional.interpolate`` has it with ``align_corners=False``.

    Args:
        images: (B, 1, H, W) or (B, 3, H, W), floating point or uint8.
        columns: for each title the maps (B, h, w) of its stages, raw or normalised, any size: what
            :func:`attention_maps` returns, or a list, or one map.
        stages: names of the rows; None is the maps' names and sizes where all columns agree, else
            numbers.
        names: titles of the images.
        across: images next to each other; a row is then a stage of that many images.
        mean, std: what the images were normalised by, a number or one per channel. Without both,
            images outside [0, 1] (uint8: [0, 255]) are stretched to it, all alike.
        alpha: opacity of the maps, 0 to 1.
        cmap: name of a matplotlib colour map.
        interpolation: "bilinear" between the centres of the cells, or "nearest", which shows them.
        panel: width of an image in inches, from 0.01 to 100.

    Returns:
        A matplotlib Figure, unknown to pyplot; :func:`save` writes it.

    Raises:
        ImportError: no matplotlib.
        TypeError, ValueError: an argument that is not as above, or does not fit the images.

    Source: the layout of figure 2 of Zagoruyko & Komodakis, ICLR 2017.
    """
    need_matplotlib()
    from matplotlib.figure import Figure

    alpha, panel = check_range("alpha", alpha, 0, 1), check_range("panel", panel, 0.01, 100)
    across = as_python("across", across)
    pictures = _pictures(images, mean, std)
    batch, height, width = pictures.shape[:3]
    found, maps = _columns(columns, batch)
    rows = _labels("stages", stages, found)
    heads = [_wrap(text, panel) for text in _labels("names", names, ["image"] * batch)]
    titles = [_wrap(title, panel) for title in columns]
    if not is_whole(across) or across < 1:
        raise ValueError(f"across must be a whole number >= 1, got {across!r}")
    across = min(across, batch)

    lines, block = -(-batch // across), 1 + len(maps)
    # A narrow empty column keeps images apart from each other.
    ratios = ([1.0] * block + [0.12]) * across
    shape = (lines * len(rows), len(ratios) - 1)
    # Inches that text of 9 points takes: names on the left, titles above; 0.8 for the colour bar.
    left = 0.08 * max(len(part) for text in rows for part in text.split("\n"))
    above = 0.16 * max(text.count("\n") + 1 for text in heads + titles) + 0.1
    size = (
        panel * sum(ratios) + left + 0.8,
        (panel * height / width + 0.1) * shape[0] + above * lines,
    )
    fig = Figure(figsize=size)
    fig.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    axes = fig.subplots(*shape, squeeze=False, width_ratios=ratios[:-1])
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[], frame_on=False)

    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    for row, line in enumerate(axes):
        first, stage = row // len(rows) * across, row % len(rows)
        shown = range(first, min(first + across, batch))
        drawn = [column[stage][first : first + across] for column in maps]
        vmax = max(float(attention.max()) for attention in drawn) or 1.0
        line[0].set_ylabel(rows[stage], rotation=0, ha="right", va="center", fontsize=9)
        for n in shown:
            cells = line[(n - first) * (block + 1) :][:block]
            for ax in cells:
                # At half its contrast below a map, else its brightness would pass for attention.
                picture = pictures[n] if ax is cells[0] else 0.25 + 0.5 * pictures[n]
                ax.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1, extent=extent)
            for ax, column in zip(cells[1:], maps, strict=True):
                top = ax.imshow(
                    column[stage][n].numpy(), extent=extent, interpolation=interpolation,
                    cmap=cmap, vmin=0, vmax=vmax, alpha=alpha,
                )  # fmt: skip
            if stage == 0:
                for ax, title in zip(cells, [heads[n], *titles], strict=True):
                    ax.set_title(title, fontsize=9)
        bar = fig.colorbar(top, ax=line, aspect=12, pad=0.01)
        bar.ax.set_facecolor("0.5")  # as below the maps
        bar.ax.tick_params(labelsize=8)
        bar.set_label("attention\n/ its rms", fontsize=8)
    return fig
