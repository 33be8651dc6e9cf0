"""Pairs of layers, a student's and a teacher's: named, or found."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from at_fused._checks import is_whole, kind
from at_fused._inputs import check_for_tokens
from at_fused._match import Layout, Stage, stages, written
from at_fused._models import unwrap


class Pair(NamedTuple):
    """The names of two layers whose maps are compared."""

    student: str
    teacher: str


def named_pairs(layers: object) -> list[Pair]:
    """Checks the pairs that were given by names."""
    if not isinstance(layers, (list, tuple)) or not layers:
        raise TypeError(
            "layers must be a list or tuple of names, or of (student's, teacher's) names, "
            f"got {layers!r:.80}"
        )
    pairs = []
    for i, each in enumerate(layers):
        names = (each, each) if isinstance(each, str) else each
        if (
            not isinstance(names, (list, tuple))
            or len(names) != 2
            or not all(isinstance(name, str) for name in names)
        ):
            raise TypeError(
                f"layers[{i}] must be a name or a pair of names (student's, teacher's), "
                f"got {each!r:.80}"
            )
        pairs.append(Pair(*names))
    for side in ("student", "teacher"):
        names = [getattr(pair, side) for pair in pairs]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"layers: each of a {side}'s layers once, got {min(twice)!r} again")
    return pairs


def match_layers(
    student: nn.Module,
    teacher: nn.Module,
    example: Any,
    *,
    channel_dim: int | tuple[int, int] | None = None,
    skip_tokens: int | tuple[int, int] | None = None,
    verbose: bool = True,
) -> list[Pair]:
    """The layers of two networks that belong together: the last block of each stage both have.

    Both run once on ``example``, in eval mode and without gradients, and are left as they were. A
    stage is all that a network does at one map size; its blocks are the modules whose insides keep
    to their input's and output's sizes, such as ``layer1`` of a ResNet. Stems and heads of conv,
    norm and ReLU are none where there are larger blocks; tokens count as the square map that they
    fill.

    Args:
        student, teacher: any networks, called with ``example`` alone.
        example: what both take, such as two images of the size to come.
        channel_dim, skip_tokens: as in :class:`AttentionTransfer`.
        verbose: whether to print the pairs.

    Returns:
        A list of (student's, teacher's) names, in the order of running.

    Raises:
        ValueError: no stage in common, stages in another order, or a network that comes back to a
            size: the message says what stages there are.

    Source: Zagoruyko & Komodakis, ICLR 2017, section 3.1 (figure 5: one loss for each group).
    """
    found: list[list[Stage]] = []
    for model, layout in zip(
        (student, teacher), layouts_of(student, teacher, channel_dim, skip_tokens), strict=True
    ):
        found.append(stages(unwrap(model), example, layout))
    students, teachers = ({stage.size: stage for stage in side} for side in found)
    common = [size for size in students if size in teachers]
    said = [", ".join(f"{s.name} {written(s.size)}" for s in side) or "none" for side in found]
    if not common:
        raise ValueError(
            "layers: no stage of the student has a map size of one of the teacher's: student "
            f"{said[0]}; teacher {said[1]}; name the pairs, with resize='maps'"
        )
    if common != [size for size in teachers if size in students]:
        raise ValueError(
            "layers: student and teacher go through the sizes in another order: student "
            f"{said[0]}; teacher {said[1]}; name the pairs"
        )
    if verbose:
        rows = [("map", "student", "channels", "teacher", "channels")]
        for size in common:
            s, t = students[size], teachers[size]
            rows.append((written(size), s.name, str(s.channels), t.name, str(t.channels)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print("  ".join(map(str.ljust, row, widths)).rstrip())
    return [Pair(students[size].name, teachers[size].name) for size in common]


def layouts_of(
    student: nn.Module, teacher: nn.Module, channel_dim: Any, skip_tokens: Any
) -> list[Layout]:
    """How each side's features lie: as given, or as the network says of itself."""
    for name, network in (("student", student), ("teacher", teacher)):
        if not isinstance(network, nn.Module):
            raise TypeError(f"{name} must be an nn.Module, got {kind(network)}")
    dims = channel_dim if isinstance(channel_dim, (tuple, list)) else (channel_dim,) * 2
    skips = skip_tokens if isinstance(skip_tokens, (tuple, list)) else (skip_tokens,) * 2
    for name, values, allowed in (
        ("channel_dim", dims, lambda v: is_whole(v) and v in (1, -1)),
        ("skip_tokens", skips, lambda v: is_whole(v) and v >= 0),
    ):
        if len(values) != 2 or not all(v is None or allowed(v) for v in values):
            ask = "1 or -1" if name == "channel_dim" else "a whole number >= 0"
            raise ValueError(
                f"{name} must be None, {ask}, or a pair of these (student's, teacher's), "
                f"got {channel_dim if name == 'channel_dim' else skip_tokens!r}"
            )
    last, rule = [dim != 1 for dim in dims], f"take channel_dim=-1 (here {channel_dim!r})"
    check_for_tokens("skip_tokens", skip_tokens, skips, last, rule)
    layouts = []
    for model, dim, skip in zip((student, teacher), dims, skips, strict=True):
        network = unwrap(model)
        if dim is None and getattr(network, "output_fmt", None) == "NHWC":  # timm's Swin
            dim = -1
        if skip is None:
            # timm says how many; torchvision's ViT has a class token.
            skip = getattr(network, "num_prefix_tokens", int(hasattr(network, "class_token")))
        layouts.append(Layout(dim, skip))
    return layouts
