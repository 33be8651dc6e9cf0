"""Pairs of layers, a student's and a teacher's: named, or found.

Found ones are the last block of each stage that both networks have. A stage is all that a network
does at one map size. The modules that ran on an example are a tree; a module that works at several
sizes is looked into, any other is a block.
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
from at_fused._layouts import both, feature_layouts, layout_options
from at_fused._models import arguments_of, modules_named, unwrap
from at_fused._numbers import kind
from at_fused._observe import (
    NOT_IN_ORDER,
    SEVERAL_SIZES,
    GivenLayout,
    ModuleCall,
    ObservedRun,
    Size,
    observe,
    written,
)

SIDES = ("student", "teacher")
# As many pairs as most networks have stages, where all blocks have one size.
PAIRS_OF_ONE_SIZE = 4
# Names that networks give to layers before their first stage and after their last.
_ENDS = re.compile(r".*(stem|embed|head|classif|final|logits|decod|aux).*")


class Pair(NamedTuple):
    """The names of two layers whose maps are compared."""

    student: str
    teacher: str


def named_pairs(layers: object) -> list[Pair]:
    """Check the pairs that were given by names."""
    if not isinstance(layers, (list, tuple)) or not layers:
        raise TypeError(
            "layers must be a list or tuple of names, or of (student's, teacher's) names, "
            f"got {layers!r:.80}"
        )
    pairs = []
    for i, each in enumerate(layers):
        names = (each, each) if isinstance(each, str) else each
        pair = isinstance(names, (list, tuple)) and len(names) == 2
        if not pair or not all(isinstance(name, str) for name in names):
            raise TypeError(
                f"layers[{i}] must be a name or a pair of names (student's, teacher's), "
                f"got {each!r:.80}"
            )
        pairs.append(Pair(*names))
    for side, given in zip(SIDES, zip(*pairs, strict=True), strict=True):
        if twice := {name for name in given if given.count(name) > 1}:
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
    """Return the layers of two networks that belong together: the last block of each stage of both.

    Both run on ``example``, in eval mode and without gradients, and are left as they were. Blocks
    are modules that keep to one map size, such as ``layer1`` of a ResNet; stems, heads and decoders
    are none, and tokens count as the grid of their patches. Where both networks have one size only,
    as ViTs, up to four pairs are taken, at proportional depth, the last block of both among them.

    How features lie is seen in the run: where the operators put channels, which tokens were put
    before the patches, whether maps change where the image does. Layers that hide it are left out.

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
        TypeError, ValueError: an option is not as above; no stage in common, stages in another
            order, or a network that comes back to a size: the message says what stages there are,
            and why others are none.

    Source: Zagoruyko & Komodakis, ICLR 2017, section 3.1 (figure 5: one loss for each group).
    """
    check_networks(student, teacher)
    given = given_layouts(channel_dim, skip_tokens, None)
    check_choice("resize", resize, (None, "maps"))
    calls = _matched((unwrap(student), unwrap(teacher)), example, given, resize, verbose)
    return [Pair(s.name, t.name) for s, t in calls]


def layers_to_tap(
    networks: list[nn.Module],
    pairs: list[Pair] | None,
    example: Any,
    given: list[GivenLayout],
    resize: str | None,
    verbose: bool,
) -> list[list[TappedLayer]]:
    """Return the layers of both networks, named or found; their layouts if there is an example."""
    if pairs is None:
        calls = zip(*_matched(networks, example, given, resize, verbose), strict=True)
        return [[TappedLayer(each.name, each.module, each.layout) for each in c] for c in calls]
    found = []
    for side, network, names, known in zip(
        SIDES, networks, zip(*pairs, strict=True), given, strict=True
    ):
        modules = dict(zip(names, modules_named(network, names, side), strict=True))
        for name, module in modules.items():
            if isinstance(module, torch.jit.ScriptModule):
                raise TypeError(
                    f"layers: the {side}'s {name!r} is a TorchScript module, which takes no hooks; "
                    "give the nn.Module that it was made of"
                )
        layers = [TappedLayer(*each) for each in modules.items()]
        if example is not None:
            run = observe(network, arguments_of(example), known)
            layers = [x._replace(layout=run.layout_of_layer(side, x.name)) for x in layers]
        found.append(layers)
    return found


def check_networks(*networks: object) -> None:
    """Refuse what is no module."""
    for side, network in zip(SIDES, networks, strict=True):
        if not isinstance(network, nn.Module):
            raise TypeError(f"{side} must be an nn.Module, got {kind(network)}")


def given_layouts(channel_dim: Any, skip_tokens: Any, map_size: Any) -> list[GivenLayout]:
    """Check what a user says of both sides' features; None is to be found out."""
    given = layout_options(channel_dim, skip_tokens, map_size)

    def known(value: Any, default: int) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(default if each is None else each for each in value)
        return default if value is None else value

    dims, skips, sizes = given.values()
    feature_layouts(known(dims, -1), known(skips, 0), sizes)
    return list(map(GivenLayout, *(both(*each) for each in given.items())))


# ---- pairs that are found ------------------------------------------------------------------------


def _matched(
    networks: Any, example: Any, given: list[GivenLayout], resize: str | None, verbose: bool
) -> list[tuple[ModuleCall, ModuleCall]]:
    arguments = arguments_of(example)
    runs = [observe(*each) for each in zip(networks, [arguments] * 2, given, strict=True)]
    found = [NetworkStages(run) for run in runs]
    students, teachers = (each.blocks for each in found)
    common = [size for size in students if size in teachers]
    if len(students) == len(teachers) == 1 and (common or resize == "maps"):
        sides = [parts(*each.values()) for each in (students, teachers)]
        count = min(PAIRS_OF_ONE_SIZE, *map(len, sides))
        # At proportional depth, the last of both among them.
        depths = range(1, count + 1)
        s, t = ([side[i * len(side) // count - 1] for i in depths] for side in sides)
        pairs = list(zip(s, t, strict=True))
    else:
        pairs = [(students[size][-1], teachers[size][-1]) for size in common]
    if not pairs or common != [size for size in teachers if size in common]:
        why = "student and teacher go through the sizes in another order"
        if not pairs:
            why = "no stage of the student has a map size of one of the teacher's"
        stages = [f"{side} {each.described()}" for side, each in zip(SIDES, found, strict=True)]
        raise ValueError(f"layers: {why}: {'; '.join(stages)}; name the pairs")
    if verbose:
        _print(pairs, found)
    return pairs


def _print(pairs: list[tuple[ModuleCall, ModuleCall]], found: list[NetworkStages]) -> None:
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


class NetworkStages:
    """A network's blocks by map size, in the order of running, and why other layers are none."""

    def __init__(self, run: ObservedRun) -> None:
        self.run = run
        self.left_out: list[tuple[ModuleCall, str]] = []
        self._before_downsampling = set[ModuleCall]()
        self.blocks = self._by_size(self._chosen())

    def _chosen(self) -> list[ModuleCall]:
        """Return the blocks in the order of running, and note why others are left out."""
        run = self.run
        blocks = every = list(self._blocks(run.root))
        depths = {call: call.depth() + (call in self._before_downsampling) for call in blocks}
        groups = [call for call in blocks if depths[call] and call.layout]
        trunk = _trunk(groups or blocks)
        # A stem or a head of conv, norm and ReLU is no stage of a network that has blocks of these;
        # a plain Sequential has nothing but layers, whose activations belong to them.
        deepest = min(2, max((depths[call] for call in trunk or blocks), default=0))
        self._leave_out([c for c in blocks if c.reason and depths[c] >= deepest])
        shallow = [c for c in blocks if c.layout and c.learned() and depths[c] < deepest]
        blocks = [call for call in blocks if call.layout and depths[call] >= deepest]
        if trunk:
            blocks = self._without(blocks, _outside(trunk, every), "outside of the stages")
        if shallow or self.left_out or not all(map(_named_an_end, blocks)):
            blocks = self._without(blocks, _named_an_end, "a stem or a head, by its name")
        tokens = [call for call in blocks if call.layout and call.layout.map_size]
        if tokens and not run.in_order(tokens[0]):  # the first stage shows the order of all
            blocks = [call for call in blocks if call not in tokens]
            self._leave_out(tokens, NOT_IN_ORDER)
        learned = {call.size for call in blocks if call.learned()}
        blocks = [call for call in blocks if call.size and call.size in learned]
        sizes = {call.size for call in blocks}
        for size in dict.fromkeys(call.size for call in shallow if call.size not in sizes):
            lost = [call for call in shallow if call.size == size]
            if sum(each.layers() for each in lost) > 1:
                self._leave_out(lost[-1:], "smaller than the blocks")
        return blocks

    def _by_size(self, blocks: list[ModuleCall]) -> dict[Size, list[ModuleCall]]:
        """Return the stages; a ValueError for a network that comes back to a size."""
        stages: dict[Size, list[ModuleCall]] = {}
        last: Size | None = None
        for call in blocks:
            size = call.size or ()
            if last and size != last and (size in stages or math.prod(size) > math.prod(last)):
                before = stages.get(size, stages[last])[-1]
                raise ValueError(
                    f"layers: {type(self.run.root.module).__name__} comes back to maps of "
                    f"{written(size)} ({before.name!r}, then {call.name!r}): which layers belong "
                    "together cannot be told, name them"
                )
            stages.setdefault(size, []).append(call)
            last = size
        return stages

    def described(self) -> str:
        """Write the stages, for messages, or why there are none."""
        if self.blocks:
            return ", ".join(f"{b[-1].name} {written(size)}" for size, b in self.blocks.items())
        reasons = [f"{names[-1]}: {why}" for why, names in self.reasons(set()).items()]
        return f"none ({'; '.join(reasons) or 'no layer that runs once gives features'})"

    def reasons(self, used: set[Size | None]) -> dict[str, list[str]]:
        """Return the names of layers as large as a block, by why they were left out."""
        found = dict[str, list[str]]()
        for size, blocks in self.blocks.items():
            if size not in used:
                found[f"the other network has no stage of {written(size)}"] = [blocks[-1].name]
        for call, why in self.left_out:
            found.setdefault(why, []).append(call.name)
        return found

    def _leave_out(self, calls: list[ModuleCall], why: str = "") -> None:
        self.left_out += [(call, why or call.reason) for call in calls]

    def _without(
        self, blocks: list[ModuleCall], refused: Callable[[ModuleCall], bool], why: str
    ) -> list[ModuleCall]:
        self._leave_out([c for c in blocks if refused(c) and c.learned()], why)
        return [call for call in blocks if not refused(call)]

    def _blocks(self, call: ModuleCall) -> Iterator[ModuleCall]:
        """Yield the blocks inside, in the order of running, as coarse as sizes allow."""
        for each in call.inside:
            if self.run.calls[each.name].times > 1:
                if each.times == 1 and each.layout and each.depth() > 0:
                    self._leave_out([each], "it runs several times in a pass")
                continue
            yield from self._blocks(each) if self._opened(each) else [each]

    def _opened(self, call: ModuleCall) -> bool:
        """Return True for a module that is made of blocks, False for a block."""
        if call.handed_on:
            call.layout, call.reason = None, ""
        if not call.inside:
            return False
        inside = [each for each in call.all_inside() if each.layout and not each.handed_on]
        if call.ends_in_layer_norm and call.layout:
            call.layout, call.reason = None, "it ends in a LayerNorm: all positions are alike"
            return any(each.depth() > 1 for each in inside)
        if call.layout is None:
            # A feature that is not understood is looked into if it is one of a whole trunk.
            deep = {each.size for each in inside if each.depth() > 1}
            return call.reason in ("", SEVERAL_SIZES) or len(deep) > 1
        away = [each for each in inside if _on_the_way(each.size, call)]
        if any(each.size != call.size_in for each in away):
            return True
        groups = [each for each in call.inside if each in away and each.depth() > 0]
        if isinstance(call.module, nn.Sequential) and any(each.depth() > 1 for each in groups):
            return True
        # Half of the work in a chain before the size changes: a stage that ends smaller.
        weighing = sum(each.weighs() for each in inside)
        branches = sum(each.takes_same_input for each in call.inside)
        if not groups or branches > 1 or 2 * sum(each.layers() for each in groups) < weighing:
            return False
        self._before_downsampling.update(groups)
        return True


def parts(blocks: list[ModuleCall]) -> list[ModuleCall]:
    """Return the blocks, or those that a single one is made of."""
    inside = [call for call in blocks[0].inside if call.learned()]
    of_one_kind = len(inside) > 1 and len({type(call.module) for call in inside}) == 1
    if len(blocks) > 1 or not of_one_kind:
        return blocks
    alike = all(call.size == blocks[0].size and call.depth() > 1 for call in inside)
    return parts(inside) if alike else blocks


def _trunk(blocks: list[ModuleCall]) -> list[ModuleCall]:
    """Return the blocks in the module that holds most stages, if it holds several."""
    held: dict[str, list[ModuleCall]] = {}
    for call in blocks:
        parents = call.name.split(".")[:-1]
        for name in accumulate(parents, "{}.{}".format):
            held.setdefault(name, []).append(call)
    sizes = {name: {call.size for call in inside} for name, inside in held.items()}
    most = max(map(len, sizes.values()), default=0)
    if most < 2:
        return []
    name = min((n for n in sizes if len(sizes[n]) == most), key=lambda name: name.count("."))
    trunk = held[name]
    layers = {n: sum(call.layers() for call in inside) for n, inside in held.items()}
    for other, inside in held.items():
        same = sizes[other] == sizes[name] and inside[0] not in trunk
        if same and 2 * layers[other] >= layers[name]:
            raise ValueError(
                f"layers: {name!r} and {other!r} have the same stages: which of them belong "
                "together cannot be told, name them"
            )
    half = 2 * layers[name] >= sum(call.layers() for call in blocks)
    return trunk if half or max(call.depth() for call in trunk) > 1 else []


def _outside(trunk: list[ModuleCall], blocks: list[ModuleCall]) -> Callable[[ModuleCall], bool]:
    """Return a test for stems and heads, and for what goes back to larger maps, as a decoder."""
    least = min((call.layers() for call in trunk if call.learned()), default=0)
    after = blocks[blocks.index(trunk[-1]) :]
    last = math.prod(trunk[-1].size or ())
    decoders = [call for call in after if math.prod(call.size or ()) > last]
    return lambda call: call not in trunk and (call.layers() <= least or call in decoders)


def _named_an_end(call: ModuleCall) -> bool:
    names = [part for part in call.name.split(".") if not part.isdigit()]
    return bool(names and _ENDS.fullmatch(names[-1]))


def _on_the_way(size: Size | None, call: ModuleCall) -> bool:
    """Return True for another size than the output's, between it and the input's.

    Others are those of rearranged features, and of pooled ones that go back in as weights.
    """
    first, last = call.size_in or size, call.size
    if not (size and first and last and len(size) == len(first) == len(last)) or size == last:
        return False
    return all(min(a, b) <= n <= max(a, b) for n, a, b in zip(size, first, last, strict=True))
