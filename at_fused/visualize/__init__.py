"""Attention maps of any model's layers, drawn over images. Needs matplotlib.

    from at_fused import visualize

    models = {"student": student, "student + AT": student_at, "teacher": teacher}
    visualize.compare(models, images, ["layer2", "layer3"], path="maps.png")

``python -m at_fused.visualize runs/DATE-TIME`` draws the maps of a run of at-fused-train.
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
    """Return the attention maps of named layers, from one forward pass in eval mode.

    ``Q[b, n] = (1/C) sum_c |A[b, c, n]|^p`` of each output A, divided by ``max(||Q[b]||_2, eps)``.
    The model does not change: hooks are removed, and each module keeps its training mode and its
    statistics. No graph is made.

    Args:
        model: any module, called as ``model(images)``. The original of a module that
            ``torch.compile`` wrapped is called, because compiled code skips hooks.
        images: the model's input, (B, ...), of any dtype.
        layers: a name, or a list of names, from ``model.named_modules()``. Each layer must return
            one tensor, and run once in a forward pass.
        normalize: False returns Q itself.
        map_options: options of :func:`at_fused.attention_map`, the same for all layers.

    Returns:
        Maps (B, H, W) by name, in the order given: float64 for float64 features, else float32.

    Raises:
        TypeError: ``model`` is not a module, or a layer's output is not one tensor.
        ValueError: there is no name or an unknown one; a layer does not run, or runs more than
            once; :func:`at_fused.attention_map` refuses a feature or an option.

    Source: Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR 2017, section 3.1.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type_name(model)}")
    layers = as_python("layers", layers)
    names = [layers] if isinstance(layers, str) else layers
    is_list = isinstance(names, (list, tuple)) and len(names) > 0
    if not is_list or not all(isinstance(n, str) and names.count(n) == 1 for n in names):
        raise ValueError(f"layers must be a name or a list of different names, got {layers!r}")
    maps: dict[str, list[Tensor]] = {name: [] for name in names}

    def make_hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                raise TypeError(
                    f"layer {name!r} ({type_name(module)}) must return one tensor, got "
                    f"{type_name(output)}; name a module inside it that does"
                )
            # During the pass, because the next layer may change the output in place.
            try:
                maps[name].append(attention_map(output, normalize=normalize, **map_options))
            except (TypeError, ValueError) as error:
                raise type(error)(f"layer {name!r}: {error}") from error

        return hook

    with ExitStack() as stack:
        for name, module in zip(names, modules_named(model, list(names)), strict=True):
            stack.callback(module.register_forward_hook(make_hook(name)).remove)
        stack.enter_context(evaluating(model))
        model(images)
    for name, runs in maps.items():
        if len(runs) != 1:
            count = f"but ran {len(runs)} times"
            raise ValueError(f"layer {name!r} must run once in a forward pass, {count}")
    return {name: runs[0] for name, runs in maps.items()}


def compare(
    models: Mapping[str, nn.Module],
    images: Tensor,
    layers: str | Sequence[str] | Mapping[str, str | Sequence[str]],
    *,
    path: str | Path | None = None,
    **options: Any,
) -> Figure:
    """Draw the attention maps of several models on the same images, one column per model.

    Calls :func:`attention_maps` for each model, :func:`figure`, and with a path :func:`save`.

    Args:
        models: modules by title, in the order of the columns.
        images: the models' input, (B, 1, H, W) or (B, 3, H, W), floating point.
        layers: a name or a list of names. If models differ, a mapping of their titles to these.
        path: the file to write, .png, .svg or another suffix that matplotlib supports.
        options: options of :func:`figure` and :func:`attention_maps`. If models need different
            options, such as a CNN and a ViT, call these functions instead.

    Returns:
        The matplotlib Figure.

    Raises:
        ImportError, TypeError, ValueError, OSError: as the three functions.
    """
    if not isinstance(models, Mapping):
        raise TypeError(f"models must be a mapping of titles to modules, got {models!r:.80}")
    by_model = layers if isinstance(layers, Mapping) else dict.fromkeys(models, layers)
    if set(by_model) != set(models):
        titles = f"{list(models)}, got {list(by_model)}"
        raise ValueError(f"layers must have the titles of models, {titles}")
    figure_options = {k: options.pop(k) for k in list(options) if k in signature(figure).parameters}
    maps = {t: attention_maps(models[t], images, by_model[t], **options) for t in models}
    fig = figure(images, maps, **figure_options)
    if path is not None:
        save(fig, path)
    return fig


def save(fig: Figure, path: str | Path, dpi: float = 120) -> None:
    """Write a figure as PNG, SVG or another format, chosen by the suffix of ``path``.

    Args:
        fig: a figure from :func:`figure` or :func:`at_fused.visualize.compare`.
        path: the file.
        dpi: pixels per inch of a PNG.

    Raises:
        ValueError, OSError: matplotlib does not support the suffix, or the file cannot be written.
    """
    # Without a date, the same figure gives the same file.
    metadata = {"Date": None} if Path(path).suffix.lower() == ".svg" else None
    fig.savefig(path, dpi=dpi, metadata=metadata)


# ---- the picture ---------------------------------------------------------------------------------


def _per_channel(name: str, value: float | Sequence[float], channels: int) -> Tensor:
    items = as_python(name, value)
    items = items if isinstance(items, (list, tuple)) else [items]
    if len(items) not in (1, channels):
        raise ValueError(f"{name} must be a number or one per channel, got {value!r}")
    numbers = [check_finite(name, item) for item in items]
    return torch.tensor(numbers, dtype=torch.float64)[:, None, None]


def _to_pictures(
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


def _divide_by_rms(name: str, attention: Tensor, batch: int) -> Tensor:
    """Return a map (B, h, w) divided by its root mean square: sqrt(h w) q, 1 for a flat map."""
    got = tuple(attention.shape) if isinstance(attention, Tensor) else type_name(attention)
    if not isinstance(got, tuple) or len(got) != 3 or got[0] != batch or 0 in got:
        raise ValueError(f"{name} must be maps (B, H, W) of the {batch} images, got {got}")
    attention = attention.detach().cpu().double()
    if not attention.isfinite().all():
        raise ValueError(f"{name} must be finite, got inf or nan in it")
    rms = attention.square().mean(dim=(1, 2), keepdim=True).sqrt()
    return attention / rms.clamp_min(torch.finfo(torch.float64).tiny)


def _read_columns(columns: Mapping[str, Maps], batch: int) -> tuple[list[str], list[list[Tensor]]]:
    """Return the names of the stages, and each column's maps by stage."""

    def by_name(maps: Maps) -> Mapping[str, Tensor]:
        maps = [maps] if isinstance(maps, Tensor) else maps
        if isinstance(maps, Mapping):
            return maps
        items = maps if isinstance(maps, (list, tuple)) else ()
        return {f"stage {i + 1}": x for i, x in enumerate(items)}

    named = [by_name(maps) for maps in columns.values()] if isinstance(columns, Mapping) else []
    if len({len(maps) for maps in named} | {0}) != 2:
        raise ValueError(
            "columns must be a mapping of titles to maps, or to mappings or lists of maps, the "
            f"same number for each title, got {columns!r:.80}"
        )
    drawn = [
        [_divide_by_rms(f"columns[{title!r}][{name!r}]", x, batch) for name, x in maps.items()]
        for title, maps in zip(columns, named, strict=True)
    ]
    stages = []
    for i, names in enumerate(zip(*named, strict=True)):
        # Names and sizes are shown only if all columns agree on them.
        stage = names[0] if len(set(names)) == 1 else f"stage {i + 1}"
        sizes = {tuple(maps[i].shape[1:]) for maps in drawn}
        stages.append(stage + ("\n{}x{}".format(*sizes.pop()) if len(sizes) == 1 else ""))
    return stages, drawn


def _check_labels(name: str, labels: Sequence[str] | None, default: list[str]) -> list[str]:
    if labels is None:
        return default
    if not isinstance(labels, (list, tuple)) or len(labels) != len(default):
        raise ValueError(f"{name} must be a list of {len(default)} strings, got {labels!r}")
    return [str(label) for label in labels]


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
    """Draw maps over their images: one row per image and stage, one column per model.

    Each row shows the image, and then the image under the map of each column. A map is drawn as
    ``sqrt(h w) q = Q / rms(Q)``, which is 1 everywhere for a flat map of any size. All maps of a
    row therefore share one colour scale, from 0 to the row's maximum. A cell of an (h, w) map
    covers H/h x W/w pixels, as in ``torch.nn.functional.interpolate`` with ``align_corners=False``.

    Args:
        images: (B, 1, H, W) or (B, 3, H, W), floating point or uint8.
        columns: the maps (B, h, w) of each title, raw or normalised, of any size: a result of
            :func:`attention_maps`, a list of maps, or one map.
        stages: names of the rows. None: the maps' names and sizes if all columns agree on them,
            else numbers.
        names: titles of the images.
        across: number of images next to each other in a row.
        mean, std: those that the images were normalised with, a number or one per channel. Without
            both, images outside [0, 1] (uint8: [0, 255]) are rescaled to it, all in the same way.
        alpha: opacity of the maps, 0 to 1.
        cmap: name of a matplotlib colour map.
        interpolation: "bilinear" between the centres of the cells, or "nearest", which shows cells.
        panel: width of an image in inches.

    Returns:
        A matplotlib Figure that pyplot does not manage; write it with :func:`save`.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: an argument is invalid or does not fit the images.

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
    pictures = _to_pictures(images, mean, std)
    batch, height, width = pictures.shape[:3]
    rows, maps = _read_columns(columns, batch)
    rows = _check_labels("stages", stages, rows)
    names = _check_labels("names", names, ["image"] * batch)
    letters = max(8, int(panel * 13))  # in the width of a panel, at 9 points
    heads, titles = ([textwrap.fill(str(x), letters) for x in texts] for texts in (names, columns))
    if not is_int(across) or across < 1:
        raise ValueError(f"across must be a whole number >= 1, got {across!r}")
    across = min(across, batch)

    lines, block = -(-batch // across), 1 + len(maps)
    # A narrow empty column separates the images.
    ratios = ([1.0] * block + [0.12]) * across
    shape = (lines * len(rows), len(ratios) - 1)
    # In inches at 9 points: names on the left, titles above, and 0.8 for the colour bar.
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
                # Half the contrast below a map, where brightness would look like attention.
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
        bar.ax.set_facecolor("0.5")  # the mean grey below the maps
        bar.ax.tick_params(labelsize=8)
        bar.set_label("attention\n/ its rms", fontsize=8)
    return fig
