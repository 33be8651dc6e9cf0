"""Attention maps of any model's layers, drawn over the images. Needs matplotlib.

    from at_fused import visualize

    models = {"student": student, "student + AT": student_at, "teacher": teacher}
    visualize.compare(models, images, ["layer2", "layer3"], path="maps.png")

``python -m at_fused.visualize runs/DATE-TIME`` draws those of a run of at-fused-train.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from at_fused import attention_map
from at_fused._models import evaluating, modules_named
from at_fused._numbers import as_python, check_finite, is_int, type_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["attention_maps", "compare", "figure", "save"]

Maps = Mapping[str, Tensor] | Sequence[Tensor] | Tensor


def attention_maps(
    model: nn.Module,
    images: Tensor,
    layers: str | Sequence[str],
    *,
    normalize: bool = True,
    **map_options: Any,
) -> dict[str, Tensor]:
    """Attention maps of the named layers' outputs, from one forward pass in eval mode.

    ``Q[b, n] = (1/C) sum_c |A[b, c, n]|^p`` of each output A, divided by ``max(||Q[b]||_2, eps)``.
    The model is left as it was: no hook stays, each module's training mode and the statistics of
    BatchNorm are kept, no graph is made.

    Args:
        model: called as ``model(images)``. One that ``torch.compile`` wrapped is taken from before
            that, since compiled code skips hooks.
        images: what the model takes, of any dtype.
        layers: a name, or a list of names, from ``model.named_modules()``. The output of each must
            be one tensor, and each must run once in a forward pass.
        normalize: False for the raw Q.
        map_options: those of :func:`at_fused.attention_map`, for all layers the same.

    Returns:
        By name, in the order of ``layers``: (B, H, W), float64 for float64 features, else float32.

    Raises:
        TypeError: ``model`` is no module, a layer's output is not one tensor.
        ValueError: no names, or an unknown one, a layer that does not run or runs more than once, a
            feature or an option that :func:`at_fused.attention_map` refuses.

    Source: Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR 2017, section 3.1.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type_name(model)}")
    layers = as_python("layers", layers)
    names = [layers] if isinstance(layers, str) else layers
    several = isinstance(names, (list, tuple)) and len(names) > 0
    if not several or not all(isinstance(n, str) and names.count(n) == 1 for n in names):
        raise ValueError(f"layers must be a name or a list of names, each once, got {layers!r}")
    maps: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                raise TypeError(
                    f"layer {name!r} ({type_name(module)}) must give one tensor, got "
                    f"{type_name(output)}; name a module within it that does"
                )
            # Now, not after the pass: what follows may write into this tensor (ReLU in place).
            try:
                maps[name].append(attention_map(output, normalize=normalize, **map_options))
            except (TypeError, ValueError) as error:
                raise type(error)(f"layer {name!r}: {error}") from error

        return hook

    with ExitStack() as stack:
        for name, module in zip(names, modules_named(model, list(names)), strict=True):
            stack.callback(module.register_forward_hook(keep(name)).remove)
        stack.enter_context(evaluating(model))
        model(images)
    for name, found in maps.items():
        if len(found) != 1:
            ran = f"it ran {len(found)} times"
            raise ValueError(f"layer {name!r} must run once in a forward pass, {ran}")
    return {name: found[0] for name, found in maps.items()}


def compare(
    models: Mapping[str, nn.Module],
    images: Tensor,
    layers: str | Sequence[str] | Mapping[str, str | Sequence[str]],
    *,
    path: str | Path | None = None,
    **options: Any,
) -> Figure:
    """Attention maps of several models on the same images, side by side: a column per model.

    :func:`attention_maps` of each model, then :func:`figure` of them, and with a path :func:`save`.

    Args:
        models: by title, in the order of the columns.
        images: what the models take, (B, 1, H, W) or (B, 3, H, W), floating point.
        layers: a name or a list of names, or these by the models' titles, where they differ.
        path: where to write the picture, .png, .svg or another that matplotlib writes.
        options: those of :func:`figure` and of :func:`attention_maps`. Where these differ from
            model to model, as for a CNN and a ViT, call the two functions.

    Returns:
        The matplotlib Figure.

    Raises:
        ImportError, TypeError, ValueError, OSError: as the three functions do.
    """
    if not isinstance(models, Mapping):
        raise TypeError(f"models must be a mapping of titles to modules, got {models!r:.80}")
    by_model = layers if isinstance(layers, Mapping) else dict.fromkeys(models, layers)
    if set(by_model) != set(models):
        got = f"{list(models)}, got {list(by_model)}"
        raise ValueError(f"layers must have the titles of models, {got}")
    of_figure = {k: options.pop(k) for k in list(options) if k in signature(figure).parameters}
    maps = {t: attention_maps(models[t], images, by_model[t], **options) for t in models}
    fig = figure(images, maps, **of_figure)
    if path is not None:
        save(fig, path)
    return fig


def save(fig: Figure, path: str | Path, dpi: float = 120) -> None:
    """Write a figure as PNG, SVG or what else matplotlib writes, by the suffix of ``path``.

    Args:
        fig: what :func:`figure` or :func:`at_fused.visualize.compare` gave.
        path: the file.
        dpi: pixels per inch of a PNG.

    Raises:
        ValueError, OSError: a suffix that matplotlib does not know, a file that cannot be written.
    """
    # Without the date, the same picture is the same file.
    metadata = {"Date": None} if Path(path).suffix.lower() == ".svg" else None
    fig.savefig(path, dpi=dpi, metadata=metadata)


# ---- the picture ---------------------------------------------------------------------------------


def _per_channel(name: str, value: float | Sequence[float], channels: int) -> Tensor:
    several = as_python(name, value)
    several = several if isinstance(several, (list, tuple)) else [several]
    if len(several) not in (1, channels):
        raise ValueError(f"{name} must be a number or one per channel, got {value!r}")
    numbers = [check_finite(name, number) for number in several]
    return torch.tensor(numbers, dtype=torch.float64)[:, None, None]


def _pictures(
    images: Tensor, mean: float | Sequence[float] | None, std: float | Sequence[float] | None
) -> Tensor:
    """Return images as (B, H, W, 1 or 3) in [0, 1]."""
    got = tuple(images.shape) if isinstance(images, Tensor) else type_name(images)
    if not isinstance(got, tuple) or len(got) != 4 or got[1] not in (1, 3) or 0 in got:
        raise ValueError(f"images must be a tensor (B, 1, H, W) or (B, 3, H, W), got {got}")
    x = images.detach().cpu().double() / (255 if images.dtype is torch.uint8 else 1)
    if mean is not None or std is not None:
        x = x * _per_channel("std", 1.0 if std is None else std, got[1])
        x = x + _per_channel("mean", 0.0 if mean is None else mean, got[1])
    elif not 0 <= x.min() <= x.max() <= 1:
        x = (x - x.min()) / (x.max() - x.min()).clamp_min(torch.finfo(x.dtype).tiny)
    return x.clamp(0, 1).movedim(1, -1)


def _relative(name: str, attention: Tensor, batch: int) -> Tensor:
    """Return a map (B, h, w) over its root mean square: sqrt(h w) q, 1 everywhere if it is flat."""
    got = tuple(attention.shape) if isinstance(attention, Tensor) else type_name(attention)
    if not isinstance(got, tuple) or len(got) != 3 or got[0] != batch or 0 in got:
        raise ValueError(f"{name} must be maps (B, H, W) of the {batch} images, got {got}")
    attention = attention.detach().cpu().double()
    if not attention.isfinite().all():
        raise ValueError(f"{name} must be finite, got inf or nan in it")
    rms = attention.square().mean(dim=(1, 2), keepdim=True).sqrt()
    return attention / rms.clamp_min(torch.finfo(torch.float64).tiny)


def _columns(columns: Mapping[str, Maps], batch: int) -> tuple[list[str], list[list[Tensor]]]:
    """Return names of the stages, and of each column its maps stage by stage."""

    def by_name(maps: Maps) -> Mapping[str, Tensor]:
        maps = [maps] if isinstance(maps, Tensor) else maps
        if isinstance(maps, Mapping):
            return maps
        listed = maps if isinstance(maps, (list, tuple)) else ()
        return {f"stage {i + 1}": x for i, x in enumerate(listed)}

    named = [by_name(maps) for maps in columns.values()] if isinstance(columns, Mapping) else []
    if len({len(maps) for maps in named} | {0}) != 2:
        raise ValueError(
            "columns must be a mapping of titles to maps, or to mappings or lists of them, as many "
            f"for each title, got {columns!r:.80}"
        )
    drawn = [
        [_relative(f"columns[{title!r}][{name!r}]", x, batch) for name, x in maps.items()]
        for title, maps in zip(columns, named, strict=True)
    ]
    stages = []
    for i, names in enumerate(zip(*named, strict=True)):
        # One name if all columns agree on it, else only the number; and so for the maps' sizes.
        stage = names[0] if len(set(names)) == 1 else f"stage {i + 1}"
        sizes = {tuple(each[i].shape[1:]) for each in drawn}
        stages.append(stage + ("\n{}x{}".format(*sizes.pop()) if len(sizes) == 1 else ""))
    return stages, drawn


def _labels(name: str, given: Sequence[str] | None, default: list[str]) -> list[str]:
    if given is None:
        return default
    if not isinstance(given, (list, tuple)) or len(given) != len(default):
        raise ValueError(f"{name} must be a list of {len(default)} texts, got {given!r}")
    return [str(text) for text in given]


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
    ``sqrt(h w) q = Q / rms(Q)``, 1 everywhere for a flat map whatever its size, so that one colour
    scale, from 0 to the row's maximum, serves a row. A cell of an (h, w) map covers the
    H/h x W/w pixels that it stands for, as ``torch.nn.functional.interpolate`` has it with
    ``align_corners=False``.

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
        panel: width of an image in inches.

    Returns:
        A matplotlib Figure, unknown to pyplot; :func:`save` writes it.

    Raises:
        ImportError: no matplotlib.
        TypeError, ValueError: an argument that is not as above, or does not fit the images.

    Source: the layout of figure 2 of Zagoruyko & Komodakis, ICLR 2017.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        advice = 'at_fused.visualize needs matplotlib: pip install "at_fused[train]"'
        raise ImportError(advice) from error
    alpha, panel = check_finite("alpha", alpha), check_finite("panel", panel)
    if panel <= 0:
        raise ValueError(f"panel must be > 0, in inches, got {panel!r}")
    across = as_python("across", across)
    pictures = _pictures(images, mean, std)
    batch, height, width = pictures.shape[:3]
    rows, maps = _columns(columns, batch)
    rows, names = _labels("stages", stages, rows), _labels("names", names, ["image"] * batch)
    letters = max(8, int(panel * 13))  # as wide as a panel, at 9 points
    heads, titles = ([textwrap.fill(str(x), letters) for x in texts] for texts in (names, columns))
    if not is_int(across) or across < 1:
        raise ValueError(f"across must be a whole number >= 1, got {across!r}")
    across = min(across, batch)

    lines, block = -(-batch // across), 1 + len(maps)
    # A narrow empty column keeps images apart from each other.
    ratios = ([1.0] * block + [0.12]) * across
    shape = (lines * len(rows), len(ratios) - 1)
    # Inches that text of 9 points takes: names on the left, titles above; 0.8 for the colour bar.
    left = 0.08 * max(len(part) for text in rows for part in text.split("\n"))
    above = 0.16 * max(text.count("\n") + 1 for text in heads + titles) + 0.1
    tall = (panel * height / width + 0.1) * shape[0] + above * lines
    fig = Figure(figsize=(panel * sum(ratios) + left + 0.8, tall))
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
