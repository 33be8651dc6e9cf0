"""Which layers of two networks belong together: the last block of each stage that both have.

A stage is all that a network does at one map size. The modules that ran on an example are a tree; a
module that works at several sizes is looked into, any other is a block.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from at_fused._observe import NOT_IN_ORDER, SEVERAL_SIZES, Call, Run, Size, written

# Names that networks give to layers before their first stage and after their last.
_ENDS = re.compile(r".*(stem|embed|head|classif|final|logits|decod|aux).*")
# As many pairs as most networks have stages, where all blocks have one size.
PAIRS_OF_ONE_SIZE = 4


@dataclass
class Stage:
    """The blocks of a network at a map size, in the order of running."""

    size: Size
    blocks: list[Call]

    @property
    def last(self) -> Call:
        return self.blocks[-1]

    def parts(self) -> list[Call]:
        return _parts(self.blocks)


class Found:
    """The stages of a network, and why other layers are none."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.left_out: list[tuple[Call, str]] = []
        self._before_downsampling = set[Call]()
        self.stages = self._stages(run)

    def _stages(self, run: Run) -> list[Stage]:
        blocks = list(self._blocks(run.root))
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
            blocks = self._without(blocks, _outside(trunk), "outside of the stages")
        if shallow or self.left_out or not all(map(_named_an_end, blocks)):
            blocks = self._without(blocks, _named_an_end, "a stem or a head, by its name")
        tokens = [call for call in blocks if call.layout and call.layout.of_tokens()]
        # The first stage shows the order of all, unless tokens are chosen on the way.
        firsts = {call.size: call for call in reversed(tokens)}
        shows = list(firsts.values()) if run.gathered else tokens[:1]
        for i, call in enumerate(tokens):
            if call in shows and not run.in_order(_parts([call])[0]):
                blocks = [each for each in blocks if each not in tokens[i:]]
                self._leave_out(tokens[i:], NOT_IN_ORDER)
                break
        learned = {call.size for call in blocks if call.learned()}
        changed = [call for call in blocks if call.changed_in_place and call.size in learned]
        self._leave_out(changed, "what follows changes its output in place")
        stages: dict[Size, Stage] = {}
        for call in blocks:
            if call.size is None or call.size not in learned or call.changed_in_place:
                continue
            last = list(stages.values())[-1] if stages else None
            if last and last.size != call.size and (call.size in stages or _larger(call, last)):
                before = stages.get(call.size, last).last.name
                raise ValueError(
                    f"layers: {type(run.root.module).__name__} comes back to maps of "
                    f"{written(call.size)} ({before!r}, then {call.name!r}): which layers belong "
                    "together cannot be told, name them"
                )
            stages.setdefault(call.size, Stage(call.size, [])).blocks.append(call)
        for size in dict.fromkeys(call.size for call in shallow if call.size not in stages):
            lost = [call for call in shallow if call.size == size]
            if sum(map(_layers, lost)) > 1:
                self._leave_out(lost[-1:], "smaller than the blocks")
        return list(stages.values())

    def said(self) -> str:
        """The stages, for messages, or why there are none."""
        if self.stages:
            return ", ".join(f"{stage.last.name} {written(stage.size)}" for stage in self.stages)
        reasons = self.reasons(set())
        if not reasons:
            return "none (no layer that runs once gives features)"
        return f"none ({'; '.join(f'{n[-1]}: {why}' for why, n in reasons.items())})"

    def reasons(self, used: set[Size | None]) -> dict[str, list[str]]:
        """Why layers were left out, with their names: those that are as large as a block."""
        found = dict[str, list[str]]()
        for stage in self.stages:
            if stage.size not in used:
                why = f"the other network has no stage of {written(stage.size)}"
                found.setdefault(why, []).append(stage.last.name)
        for call, why in self.left_out:
            found.setdefault(why, []).append(call.name)
        return found

    def _leave_out(self, calls: list[Call], why: str = "") -> None:
        self.left_out += [(call, why or call.reason) for call in calls]

    def _without(self, blocks: list[Call], refused: Callable[[Call], bool], why: str) -> list[Call]:
        self._leave_out([c for c in blocks if refused(c) and c.learned()], why)
        return [call for call in blocks if not refused(call)]

    def _blocks(self, call: Call) -> Iterator[Call]:
        """The blocks inside, in the order of running, as coarse as sizes allow."""
        for each in call.inside:
            if self.run.calls[each.name].times > 1:
                if each.times == 1 and each.layout and each.depth() > 0:
                    self._leave_out([each], "it runs several times in a pass")
                continue
            if self._opened(each):
                yield from self._blocks(each)
            else:
                yield each

    def _opened(self, call: Call) -> bool:
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
        if not groups or branches > 1 or 2 * sum(map(_layers, groups)) < weighing:
            return False
        self._before_downsampling.update(groups)
        return True


def _parts(blocks: list[Call]) -> list[Call]:
    """The blocks, or those that a single one is made of."""
    while len(blocks) == 1:
        inside = [call for call in blocks[0].inside if call.learned()]
        kinds = {type(call.module) for call in inside}
        if len(inside) < 2 or len(kinds) > 1:
            break
        if any(call.size != blocks[0].size or call.depth() < 2 for call in inside):
            break
        blocks = inside
    return blocks


def _trunk(blocks: list[Call]) -> list[Call]:
    """The blocks in the module that holds most stages, if it holds several."""
    held: dict[str, list[Call]] = {}
    for call in blocks:
        parts = call.name.split(".")
        for i in range(1, len(parts)):
            held.setdefault(".".join(parts[:i]), []).append(call)
    sizes = {name: {call.size for call in inside} for name, inside in held.items()}
    most = max(map(len, sizes.values()), default=0)
    if most < 2:
        return []
    name = min((n for n in sizes if len(sizes[n]) == most), key=lambda name: name.count("."))
    trunk = held[name]
    own = sum(map(_layers, trunk))
    twins = [
        other
        for other, inside in held.items()
        if sizes[other] == sizes[name] and inside[0] not in trunk
        if 2 * sum(map(_layers, inside)) >= own
    ]
    if twins:
        raise ValueError(
            f"layers: {name!r} and {twins[0]!r} have the same stages: which of them belong "
            "together cannot be told, name them"
        )
    half = 2 * own >= sum(map(_layers, blocks))
    return trunk if half or max(call.depth() for call in trunk) > 1 else []


def _outside(trunk: list[Call]) -> Callable[[Call], bool]:
    """Return a test for stems and heads, and for what goes back to larger maps, as a decoder."""
    least = min((_layers(call) for call in trunk if call.learned()), default=0)

    def outside(call: Call) -> bool:
        decodes = call.started > trunk[-1].started and _larger(call, trunk[-1])
        return call not in trunk and (_layers(call) <= least or decodes)

    return outside


def _larger(call: Call, other: Call | Stage) -> bool:
    return math.prod(call.size or ()) > math.prod(other.size or ())


def _named_an_end(call: Call) -> bool:
    return bool(_ENDS.fullmatch(_own_name(call.name)))


def _own_name(name: str) -> str:
    parts = [part for part in name.split(".") if not part.isdigit()]
    return parts[-1] if parts else ""


def _layers(call: Call) -> int:
    """The number of convolutions and linear layers."""
    return sum(each.weighs() for each in call.all_inside()) or call.weighs()


def _on_the_way(size: Size | None, call: Call) -> bool:
    """Return True for another size than the output's, between it and the input's.

    Others are those of rearranged features, and of pooled ones that go back in as weights.
    """
    first, last = call.size_in or size, call.size
    if size is None or first is None or last is None:
        return False
    return (
        len(size) == len(first) == len(last)
        and size != last
        and all(min(a, b) <= n <= max(a, b) for n, a, b in zip(size, first, last, strict=True))
    )
