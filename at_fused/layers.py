"""Pairs of layers, a student's and a teacher's: named, or found."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from at_fused._checks import check_choice
from at_fused._inputs import check_for_tokens
from at_fused._match import PAIRS_OF_ONE_SIZE, Found, Stage
from at_fused._models import arguments_of, unwrap
from at_fused._numbers import as_python, is_whole, kind
from at_fused._observe import Call, Given, Layout, observed, written

SIDES = ("student", "teacher")


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
    channel_dim: int | tuple[int | None, int | None] | None = None,
    skip_tokens: int | tuple[int | None, int | None] | None = None,
    resize: str | None = None,
    verbose: bool = True,
) -> list[Pair]:
    """The layers of two networks that belong together: the last block of each stage both have.

    Both run on ``example``, in eval mode and without gradients, and are left as they were. A stage
    is all that a network does at one map size; its blocks are modules that keep to one size, such
    as ``layer1`` of a ResNet. Stems, heads and decoders are none; tokens count as the grid that
    their patches were cut in. Where both networks have one size only, as ViTs, up to four pairs of
    blocks are taken, at proportional depth, the last block of both among them.

    How features lie is not guessed but seen in the run: where the operators put channels, which
    tokens were put before the patches, whether maps change where the image does. A layer that does
    not show it is left out.

    Args:
        student, teacher: any networks.
        example: what both take, such as two images of the size to come: a mapping gives keyword
            arguments, a tuple several.
        channel_dim, skip_tokens, resize: as in :class:`AttentionTransfer`; with resize="maps" ViTs
            of other grids are paired, too.
        verbose: whether to print the pairs, how their features lie, and why other layers that
            are as large as a block were left out.

    Returns:
        A list of (student's, teacher's) names, in the order of running.

    Raises:
        ValueError: an option is not as above; no stage in common, stages in another order, or a
            network that comes back to a size: the message says what stages there are, and why
            others are none.

    Source: Zagoruyko & Komodakis, ICLR 2017, section 3.1 (figure 5: one loss for each group).
    """
    given = check_given(student, teacher, channel_dim, skip_tokens)
    check_choice("resize", resize, (None, "maps"))
    return [
        Pair(s.name, t.name) for s, t in matched(student, teacher, example, given, resize, verbose)
    ]


def matched(
    student: nn.Module,
    teacher: nn.Module,
    example: Any,
    given: tuple[Given, Given],
    resize: str | None,
    verbose: bool,
) -> list[tuple[Call, Call]]:
    """The layers that :func:`match_layers` finds, as they ran."""
    arguments = arguments_of(example)
    found = [
        Found(observed(unwrap(model), arguments, of_side))
        for model, of_side in zip((student, teacher), given, strict=True)
    ]
    pairs = _pair(found[0].stages, found[1].stages, resize)
    if isinstance(pairs, str):
        said = "; ".join(f"{side} {each.said()}" for side, each in zip(SIDES, found, strict=True))
        raise ValueError(f"layers: {pairs}: {said}; name the pairs")
    if verbose:
        _print(pairs, found)
    return pairs


def _pair(
    students: list[Stage], teachers: list[Stage], resize: str | None
) -> list[tuple[Call, Call]] | str:
    """The blocks that belong together, or why there are none."""
    sizes = [stage.size for stage in teachers]
    common = [stage.size for stage in students if stage.size in sizes]
    if len(students) == len(teachers) == 1 and (common or resize == "maps"):
        sides = students[0].parts(), teachers[0].parts()
        count = min(PAIRS_OF_ONE_SIZE, *map(len, sides))
        # At proportional depth, the last of both among them.
        depths = range(1, count + 1)
        s, t = ([side[i * len(side) // count - 1] for i in depths] for side in sides)
        return list(zip(s, t, strict=True))
    if not common:
        return "no stage of the student has a map size of one of the teacher's"
    if common != [size for size in sizes if size in common]:
        return "student and teacher go through the sizes in another order"
    last = [{stage.size: stage.last for stage in side} for side in (students, teachers)]
    return [(last[0][size], last[1][size]) for size in common]


def _print(pairs: list[tuple[Call, Call]], found: list[Found]) -> None:
    """Print the pairs as a table, and what was left out."""
    rows = [("map", "student", "features", "teacher", "features")]
    for s, t in pairs:
        size = " / ".join(dict.fromkeys(written(call.size or ()) for call in (s, t)))
        rows.append((size, s.name, s.described(), t.name, t.described()))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())
    for side, name, taken in zip(found, SIDES, zip(*pairs, strict=True), strict=True):
        for why, names in side.reasons({call.size for call in taken}).items():
            print(f"left out of the {name}: {', '.join(names)} ({why})")


def layouts_of(
    side: str, network: nn.Module, example: Any, names: list[str], given: Given
) -> list[Layout | None]:
    """Find how the features of layers lie, in a run on an example."""
    run = observed(network, arguments_of(example), given)
    return [run.layout_of_layer(side, name) for name in names]


def check_given(
    student: nn.Module, teacher: nn.Module, channel_dim: Any, skip_tokens: Any
) -> tuple[Given, Given]:
    """Check the networks, and what is said of their features."""
    for name, network in zip(SIDES, (student, teacher), strict=True):
        if not isinstance(network, nn.Module):
            raise TypeError(f"{name} must be an nn.Module, got {kind(network)}")
    channel_dim = as_python("channel_dim", channel_dim)
    skip_tokens = as_python("skip_tokens", skip_tokens)
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
    return Given(dims[0], skips[0]), Given(dims[1], skips[1])
