"""Attention maps of any model's layers, drawn over the images. Needs matplotlib.

    from at_fused import visualize

    models = {"student": student, "student + AT": student_at, "teacher": teacher}
    visualize.compare(models, images, ["layer2", "layer3"], path="maps.png")

``python -m at_fused.visualize runs/DATE-TIME`` draws those of a run of at-fused-train.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from at_fused import attention_map
from at_fused._figure import check_path, figure, need_matplotlib, save
from at_fused._models import evaluating, modules_named
from at_fused._numbers import as_python

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["attention_maps", "compare", "figure", "save"]


def _names(layers: str | Sequence[str]) -> list[str]:
    layers = as_python("layers", layers)
    names = [layers] if isinstance(layers, str) else layers
    if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
        raise TypeError(f"layers must be a name or a list or tuple of names, got {layers!r}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"layers must name at least one layer, and each once, got {layers!r}")
    return list(names)


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
        model: called as ``model(images)``, what it returns does not matter. One that
            ``torch.compile`` wrapped is taken from before that, since compiled code skips hooks.
        images: what the model takes, of any dtype.
        layers: a name, or a list of names, from ``model.named_modules()``. The output of each must
            be one tensor, and each must run once in a forward pass.
        normalize: False for the raw Q.
        map_options: p, collapse, channel_dim, eps and whatever else :func:`at_fused.attention_map`
            takes, for all layers alike.

    Returns:
        By name, in the order of ``layers``: (B, H, W), float64 for float64 features, else float32.

    Raises:
        TypeError: ``model`` is no module, a name is none, a layer's output is not one tensor.
        ValueError: an unknown name, a layer that does not run or runs more than once, a feature or
            an option that :func:`at_fused.attention_map` refuses.

    Source: Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR 2017, section 3.1.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be an nn.Module, got {type(model).__name__}; for features made in another "
            "way, give at_fused.attention_map of them to visualize.figure"
        )
    names = _names(layers)
    maps: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                raise TypeError(
                    f"layer {name!r} ({type(module).__name__}) must give one tensor, got "
                    f"{type(output).__name__}; name a module within it that does"
                )
            # Now, not after the pass: what follows may write into this tensor (ReLU in place).
            try:
                maps[name].append(attention_map(output, normalize=normalize, **map_options))
            except (TypeError, ValueError) as error:
                raise type(error)(f"layer {name!r}: {error}") from error

        return hook

    with ExitStack() as stack:
        for name, module in zip(names, modules_named(model, names), strict=True):
            stack.callback(module.register_forward_hook(keep(name)).remove)
        stack.enter_context(evaluating(model))
        model(images)
    for name, found in maps.items():
        if len(found) != 1:
            raise ValueError(
                f"layer {name!r} must run once in a forward pass, it ran {len(found)} times"
            )
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

    :func:`attention_maps` of each model, then :func:`figure` of them.

    Args:
        models: by title, in the order of the columns.
        images: what the models take, (B, 1, H, W) or (B, 3, H, W), floating point.
        layers: a name or a list of names, or these by the models' titles, where they differ.
        path: where to write the picture, as .png or .svg.
        options: those of :func:`figure`; all others are :func:`attention_maps`'s, for every model
            alike (where they differ, as for a CNN and a ViT, call the two functions).

    Returns:
        The matplotlib Figure.

    Raises:
        ImportError, TypeError, ValueError: as the two functions do, and for a ``path`` of another
            kind or titles in ``layers`` that are not those of ``models``.
    """
    need_matplotlib()
    if path is not None:
        check_path(path)
    if not isinstance(models, Mapping) or not models:
        raise TypeError(f"models must be a mapping of titles to modules, got {models!r:.80}")
    if isinstance(layers, Mapping) and set(layers) != set(models):
        raise ValueError(
            f"layers must have the titles of models, {list(models)}, got {list(layers)}"
        )
    figure_options = {k: options.pop(k) for k in list(options) if k in signature(figure).parameters}
    maps = {
        title: attention_maps(
            model, images, layers[title] if isinstance(layers, Mapping) else layers, **options
        )
        for title, model in models.items()
    }
    fig = figure(images, maps, **figure_options)
    if path is not None:
        save(fig, path)
    return fig


if __name__ == "__main__":
    from at_fused.train.visualize_cli import main

    main()
