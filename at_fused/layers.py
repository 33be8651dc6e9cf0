"""Pairs of student and teacher layers: named by the user, or matched on an example.

A stage is the part of a network that works at one map size. Matched pairs are the last blocks of
the stages that both networks have. The module calls of a run form a tree. A module that works at
several sizes is split into the modules inside it; any other module is a block.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import nn

from at_fused._arguments import check_choice
from at_fused._hooks import TappedLayer
from at_fused._layouts import feature_layouts, layout_options, per_side
from at_fused._models import arguments_of, modules_named, unwrap
from at_fused._numbers import type_name
from at_fused._observe import (
    NOT_IN_ORDER,
    SEVERAL_SIZES,
    LayoutOverrides,
    ModuleCall,
    ObservedRun,
    Size,
    format_size,
    observe,
)

SIDES = ("student", "teacher")
# For networks of one map size: as many pairs as most other networks have stages.
MAX_PAIRS_OF_ONE_SIZE = 4
_STEM_OR_HEAD = re.compile(r".*(stem|embed|head|classif|final|logits|decod|aux).*")


class Pair(NamedTuple):
    """The names of two layers; the loss compares their maps."""

    student: str
    teacher: str


def parse_pairs(layers: object) -> list[Pair]:
    """Return the pairs in a list of names or of (student's, teacher's) names."""
    if not isinstance(layers, (list, tuple)) or not layers:
        raise TypeError(
            "layers must be a list or tuple of names, or of (student's, teacher's) names, "
            f"got {layers!r:.80}"
        )
    pairs = []
    for i, layer in enumerate(layers):
        names = (layer, layer) if isinstance(layer, str) else layer
        is_pair = isinstance(names, (list, tuple)) and len(names) == 2
        if not is_pair or not all(isinstance(name, str) for name in names):
            raise TypeError(
                f"layers[{i}] must be a name or a pair of names (student's, teacher's), "
                f"got {layer!r:.80}"
            )
        pairs.append(Pair(*names))
    for side, side_names in zip(SIDES, zip(*pairs, strict=True), strict=True):
        if repeated := {name for name in side_names if side_names.count(name) > 1}:
            raise ValueError(f"layers: {side} layer {min(repeated)!r} must be named only once")
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
    """Return pairs of layers to compare: the last block of each stage that both networks have.

    Runs both networks on ``example``, in eval mode and without gradients, and restores their state.
    A block is a module that keeps to one map size, such as ``layer1`` of a ResNet. A stage is all
    blocks of one size, without stems, heads and decoders. The size of tokens is that of their grid
    of patches. If both networks have a single size, as ViTs do, the result is up to four pairs at
    proportional depth; the last pair is the last blocks of both.

    The run shows how features are laid out: where operators have channels, which tokens were put
    before the patches, and whether maps change where the image does. Other layers are left out.

    Args:
        student, teacher: any networks.
        example: an input of both networks, such as two images of the size used in training. A
            mapping gives keyword arguments, a tuple positional ones.
        channel_dim, skip_tokens, resize: as in :class:`AttentionTransfer`. With resize="maps", ViTs
            with different grids are paired, too.
        verbose: whether to print the pairs and the layout of their features, and the reason why
            other layers as large as a block were left out.

    Returns:
        A list of (student's, teacher's) names in the order of execution.

    Raises:
        TypeError, ValueError: an option is invalid; the networks have no stage in common, or have
            the stages in different orders, or one returns to an earlier size. The message lists the
            stages, and the reasons why other layers are not stages.

    Source: Zagoruyko & Komodakis, ICLR 2017, section 3.1 (figure 5: one loss for each group).
    """
    check_networks(student, teacher)
    overrides = layout_overrides(channel_dim, skip_tokens, None)
    check_choice("resize", resize, (None, "maps"))
    calls = _match((unwrap(student), unwrap(teacher)), example, overrides, resize, verbose)
    return [Pair(s.name, t.name) for s, t in calls]


def layers_to_tap(
    networks: list[nn.Module],
    pairs: list[Pair] | None,
    example: Any,
    overrides: list[LayoutOverrides],
    resize: str | None,
    verbose: bool,
) -> list[list[TappedLayer]]:
    """Return both networks' layers, named or matched, with layouts if there is an example."""
    if pairs is None:
        matched = zip(*_match(networks, example, overrides, resize, verbose), strict=True)
        return [[TappedLayer(c.name, c.module, c.layout) for c in calls] for calls in matched]
    layers_of_sides = []
    for side, network, names, override in zip(
        SIDES, networks, zip(*pairs, strict=True), overrides, strict=True
    ):
        modules = dict(zip(names, modules_named(network, names, side), strict=True))
        for name, module in modules.items():
            if isinstance(module, torch.jit.ScriptModule):
                raise TypeError(
                    f"layers: the {side}'s {name!r} is a TorchScript module, which takes no hooks; "
                    "use the nn.Module that was scripted"
                )
        layers = [TappedLayer(*item) for item in modules.items()]
        if example is not None:
            run = observe(network, arguments_of(example), override)
            layers = [x._replace(layout=run.layout_of_layer(side, x.name)) for x in layers]
        layers_of_sides.append(layers)
    return layers_of_sides


def check_networks(*networks: object) -> None:
    """Raise a TypeError for a network that is not a module."""
    for side, network in zip(SIDES, networks, strict=True):
        if not isinstance(network, nn.Module):
            raise TypeError(f"{side} must be an nn.Module, got {type_name(network)}")


def layout_overrides(channel_dim: Any, skip_tokens: Any, map_size: Any) -> list[LayoutOverrides]:
    """Check a user's layout options, and return them for each side; None is inferred later."""
    options = layout_options(channel_dim, skip_tokens, map_size)

    def with_default(value: Any, default: int) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(default if each is None else each for each in value)
        return default if value is None else value

    dims, skips, sizes = options.values()
    feature_layouts(with_default(dims, -1), with_default(skips, 0), sizes)
    return list(map(LayoutOverrides, *(per_side(*option) for option in options.items())))


# ---- the search for pairs ------------------------------------------------------------------------


def _match(
    networks: Any, example: Any, overrides: list[LayoutOverrides], resize: str | None, verbose: bool
) -> list[tuple[ModuleCall, ModuleCall]]:
    arguments = arguments_of(example)
    runs = [observe(*each) for each in zip(networks, [arguments] * 2, overrides, strict=True)]
    stages = [NetworkStages(run) for run in runs]
    students, teachers = (each.blocks for each in stages)
    common = [size for size in students if size in teachers]
    if len(students) == len(teachers) == 1 and (common or resize == "maps"):
        sides = [split_single_block(*blocks.values()) for blocks in (students, teachers)]
        count = min(MAX_PAIRS_OF_ONE_SIZE, *map(len, sides))
        steps = range(1, count + 1)
        s, t = ([side[i * len(side) // count - 1] for i in steps] for side in sides)
        pairs = list(zip(s, t, strict=True))
    else:
        pairs = [(students[size][-1], teachers[size][-1]) for size in common]
    if not pairs or common != [size for size in teachers if size in common]:
        why = "student and teacher have their map sizes in different orders"
        if not pairs:
            why = "student and teacher have no map size in common"
        texts = [f"{side}: {each.describe()}" for side, each in zip(SIDES, stages, strict=True)]
        raise ValueError(f"layers: {why}; name the pairs ({'; '.join(texts)})")
    if verbose:
        _print_pairs(pairs, stages)
    return pairs


def _print_pairs(pairs: list[tuple[ModuleCall, ModuleCall]], stages: list[NetworkStages]) -> None:
    """Print the pairs as a table, and the layers left out."""
    rows = [("map", "student", "features", "teacher", "features")]
    for s, t in pairs:
        size = " / ".join(dict.fromkeys(format_size(call.size or ()) for call in (s, t)))
        rows.append((size, s.name, s.format_shape(), t.name, t.format_shape()))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())
    for network, side, paired in zip(stages, SIDES, zip(*pairs, strict=True), strict=True):
        for why, names in network.reasons({call.size for call in paired}).items():
            print(f"left out of the {side}: {', '.join(names)} ({why})")


class NetworkStages:
    """The blocks of a network by map size, in execution order, and the layers left out."""

    def __init__(self, run: ObservedRun) -> None:
        self.run = run
        self.left_out: list[tuple[ModuleCall, str]] = []
        self._before_downsampling = set[ModuleCall]()
        self.blocks = self._group_by_size(self._choose_blocks())

    def _choose_blocks(self) -> list[ModuleCall]:
        """Return the blocks in execution order, and record the reasons for leaving others out."""
        run = self.run
        blocks = candidates = list(self._blocks_in(run.root))
        depths = {call: call.depth() + (call in self._before_downsampling) for call in blocks}
        groups = [call for call in blocks if depths[call] and call.layout]
        trunk = _find_trunk(groups or blocks)
        # In a network of blocks, a stem or a head of conv, norm and ReLU is not a stage. A plain
        # Sequential has only layers; an activation then belongs to the layer before it.
        deepest = min(2, max((depths[call] for call in trunk or blocks), default=0))
        self._leave_out([c for c in blocks if c.reason and depths[c] >= deepest])
        shallow = [c for c in blocks if c.layout and c.has_parameters() and depths[c] < deepest]
        blocks = [call for call in blocks if call.layout and depths[call] >= deepest]
        if trunk:
            blocks = self._without(blocks, _off_trunk(trunk, candidates), "outside the stages")
        if shallow or self.left_out or not all(map(_is_named_stem_or_head, blocks)):
            blocks = self._without(blocks, _is_named_stem_or_head, "named like a stem or a head")
        tokens = [call for call in blocks if call.layout and call.layout.map_size]
        if tokens and not run.is_in_image_order(tokens[0]):  # all stages share one order
            blocks = [call for call in blocks if call not in tokens]
            self._leave_out(tokens, NOT_IN_ORDER)
        trained_sizes = {call.size for call in blocks if call.has_parameters()}
        blocks = [call for call in blocks if call.size and call.size in trained_sizes]
        sizes = {call.size for call in blocks}
        for size in dict.fromkeys(call.size for call in shallow if call.size not in sizes):
            small = [call for call in shallow if call.size == size]
            if sum(call.weight_layers() for call in small) > 1:
                self._leave_out(small[-1:], "smaller than the blocks")
        return blocks

    def _group_by_size(self, blocks: list[ModuleCall]) -> dict[Size, list[ModuleCall]]:
        """Return the stages; raise a ValueError if the network returns to an earlier size."""
        stages: dict[Size, list[ModuleCall]] = {}
        last: Size | None = None
        for call in blocks:
            size = call.size or ()
            if last and size != last and (size in stages or math.prod(size) > math.prod(last)):
                before = stages.get(size, stages[last])[-1]
                raise ValueError(
                    f"layers: {type(self.run.root.module).__name__} returns to maps of "
                    f"{format_size(size)} ({before.name!r}, then {call.name!r}), so its stages are "
                    "ambiguous; name the layers"
                )
            stages.setdefault(size, []).append(call)
            last = size
        return stages

    def describe(self) -> str:
        """Return the stages as text, or the reasons why no layer is one."""
        if self.blocks:
            return ", ".join(f"{b[-1].name} {format_size(size)}" for size, b in self.blocks.items())
        reasons = [f"{names[-1]}: {why}" for why, names in self.reasons(set()).items()]
        return f"no stage ({'; '.join(reasons) or 'no layer that runs once returns a feature'})"

    def reasons(self, used: set[Size | None]) -> dict[str, list[str]]:
        """Return the names of unused layers as large as a block, by the reason."""
        names_by_reason = dict[str, list[str]]()
        for size, blocks in self.blocks.items():
            if size not in used:
                why = f"the other network has no maps of {format_size(size)}"
                names_by_reason[why] = [blocks[-1].name]
        for call, why in self.left_out:
            names_by_reason.setdefault(why, []).append(call.name)
        return names_by_reason

    def _leave_out(self, calls: list[ModuleCall], why: str = "") -> None:
        self.left_out += [(call, why or call.reason) for call in calls]

    def _without(
        self, blocks: list[ModuleCall], is_refused: Callable[[ModuleCall], bool], why: str
    ) -> list[ModuleCall]:
        self._leave_out([c for c in blocks if is_refused(c) and c.has_parameters()], why)
        return [call for call in blocks if not is_refused(call)]

    def _blocks_in(self, parent: ModuleCall) -> Iterator[ModuleCall]:
        """Yield the largest blocks inside a module, in execution order."""
        for call in parent.children:
            if self.run.calls[call.name].count > 1:
                if call.count == 1 and call.layout and call.depth() > 0:
                    self._leave_out([call], "it runs several times in a pass")
                continue
            yield from self._blocks_in(call) if self._contains_blocks(call) else [call]

    def _contains_blocks(self, call: ModuleCall) -> bool:
        """Return True for a module that is made of blocks, False for a block."""
        if call.returns_its_input:
            call.layout, call.reason = None, ""
        if not call.children:
            return False
        inside = [each for each in call.descendants() if each.layout and not each.returns_its_input]
        if call.ends_in_layer_norm and call.layout:
            call.layout, call.reason = None, "it ends in a LayerNorm, so its map is flat"
            return any(each.depth() > 1 for each in inside)
        if call.layout is None:
            # Without a layout of its own, a module with blocks of several sizes is a whole trunk.
            block_sizes = {each.size for each in inside if each.depth() > 1}
            return call.reason in ("", SEVERAL_SIZES) or len(block_sizes) > 1
        not_resized = [each for each in inside if _is_before_resizing(each.size, call)]
        if any(each.size != call.input_size for each in not_resized):
            return True
        groups = [each for each in call.children if each in not_resized and each.depth() > 0]
        if isinstance(call.module, nn.Sequential) and any(each.depth() > 1 for each in groups):
            return True
        # With half of its weight layers before the size changes: a stage, then downsampling.
        total = sum(each.is_weight_layer() for each in inside)
        branches = sum(each.shares_input_with_parent for each in call.children)
        if not groups or branches > 1 or 2 * sum(each.weight_layers() for each in groups) < total:
            return False
        self._before_downsampling.update(groups)
        return True


def split_single_block(blocks: list[ModuleCall]) -> list[ModuleCall]:
    """Return the blocks, or those inside a single block that repeats one class of module."""
    inside = [call for call in blocks[0].children if call.has_parameters()]
    is_repeated = len(inside) > 1 and len({type(call.module) for call in inside}) == 1
    if len(blocks) > 1 or not is_repeated:
        return blocks
    are_blocks = all(call.size == blocks[0].size and call.depth() > 1 for call in inside)
    return split_single_block(inside) if are_blocks else blocks


def _find_trunk(blocks: list[ModuleCall]) -> list[ModuleCall]:
    """Return the blocks in the module with the most stages, or [] if none has several."""
    by_parent: dict[str, list[ModuleCall]] = {}
    for call in blocks:
        parents = call.name.split(".")[:-1]
        for name in accumulate(parents, "{}.{}".format):
            by_parent.setdefault(name, []).append(call)
    sizes = {name: {call.size for call in inside} for name, inside in by_parent.items()}
    most = max(map(len, sizes.values()), default=0)
    if most < 2:
        return []
    name = min((n for n in sizes if len(sizes[n]) == most), key=lambda name: name.count("."))
    trunk = by_parent[name]
    layers = {n: sum(call.weight_layers() for call in inside) for n, inside in by_parent.items()}
    for other, inside in by_parent.items():
        is_rival = sizes[other] == sizes[name] and inside[0] not in trunk
        if is_rival and 2 * layers[other] >= layers[name]:
            raise ValueError(
                f"layers: {name!r} and {other!r} have stages of the same sizes, so the choice is "
                "ambiguous; name the layers"
            )
    is_half = 2 * layers[name] >= sum(call.weight_layers() for call in blocks)
    return trunk if is_half or max(call.depth() for call in trunk) > 1 else []


def _off_trunk(trunk: list[ModuleCall], blocks: list[ModuleCall]) -> Callable[[ModuleCall], bool]:
    """Return a predicate for stems, heads and decoders, which go back to larger maps."""
    least = min((call.weight_layers() for call in trunk if call.has_parameters()), default=0)
    after = blocks[blocks.index(trunk[-1]) :]
    last = math.prod(trunk[-1].size or ())
    decoders = [call for call in after if math.prod(call.size or ()) > last]
    return lambda call: call not in trunk and (call.weight_layers() <= least or call in decoders)


def _is_named_stem_or_head(call: ModuleCall) -> bool:
    names = [part for part in call.name.split(".") if not part.isdigit()]
    return bool(names and _STEM_OR_HEAD.fullmatch(names[-1]))


def _is_before_resizing(size: Size | None, call: ModuleCall) -> bool:
    """Return True for a size that differs from the output's and lies between it and the input's.

    Other sizes belong to rearranged features, or to pooled ones that become weights (SE).
    """
    first, last = call.input_size or size, call.size
    if not (size and first and last and len(size) == len(first) == len(last)) or size == last:
        return False
    return all(min(a, b) <= n <= max(a, b) for n, a, b in zip(size, first, last, strict=True))
