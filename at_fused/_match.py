"""Which layers of two networks belong together: the last block of each stage that both have.

A stage is all that a network does at one map size. What ends one is found by running the network
once, on an example: the modules that ran are a tree, and a module whose insides pass through other
sizes than its own input's and output's (a whole trunk) is looked into, any other is a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from at_fused._models import evaluating

Size = tuple[int, ...]


class Stage(NamedTuple):
    """The last block at a map size."""

    name: str
    size: Size
    channels: int


@dataclass
class _Call:
    """A module that ran: what went in and came out, and what ran inside."""

    name: str
    kind: type[nn.Module]
    has_parameters: bool
    size_in: Size | None = None
    size: Size | None = None
    channels: int = 0
    inside: list[_Call] = field(default_factory=list)

    def depth(self) -> int:
        """How deep layers with parameters are nested: 0 for a layer, 1 for conv, norm and ReLU."""
        return max((1 + call.depth() for call in self.inside if call.has_parameters), default=0)

    def sizes_inside(self) -> set[Size]:
        sizes = set[Size]()
        for call in self.inside:
            sizes |= call.sizes_inside() | ({call.size} if call.size else set())
        return sizes

    def is_block(self) -> bool:
        """Whether nothing inside has a size between the input's and the output's.

        Other sizes are those of rearranged features and of pooled ones that go back in as weights.
        A block that ends in a LayerNorm hides what is wanted: behind it all positions are alike.
        """
        if not self.inside:
            return True
        if self.size is None or self.inside[-1].kind is nn.LayerNorm:
            return False
        first, last = self.size_in or self.size, self.size
        if len(first) != len(last):
            return True
        return not any(
            len(size) == len(last)
            and all(min(a, b) <= n <= max(a, b) for n, a, b in zip(size, first, last, strict=True))
            for size in self.sizes_inside() - {first, last}
        )

    def blocks(self) -> list[_Call]:
        """What the insides are made of, in the order of running, as coarse as sizes allow."""
        return [
            block
            for call in self.inside
            for block in ([call] if call.is_block() else call.blocks())
        ]


def first_tensor(value: Any) -> Tensor | None:
    """A tensor, or the first thing in a tuple or list if that is one."""
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    return value if isinstance(value, Tensor) else None


class Layout(NamedTuple):
    """How a network's features lie: see ``at_fused.at_loss``; None is found out from the rank."""

    channel_dim: int | None
    skip_tokens: int

    def of(self, x: Tensor) -> int:
        """1 or -1 for this feature."""
        return self.channel_dim or (-1 if x.dim() == 3 else 1)

    def size(self, value: Any) -> Size | None:
        """The size of the map that a feature has; None for what is none, or a single position."""
        x = first_tensor(value)
        if x is None or not 3 <= x.dim() <= 5:
            return None
        size = tuple(x.shape[2:] if self.of(x) == 1 else x.shape[1:-1])
        if x.dim() == 3 and self.of(x) != 1:
            tokens = size[0] - self.skip_tokens
            side = math.isqrt(max(tokens, 0))
            size = (side, side) if side * side == tokens else (tokens,)
        return size if math.prod(size) > 1 else None


def _run(model: nn.Module, example: Any, layout: Layout) -> _Call:
    """The tree of what ran; modules that run more than once are left out, insides and all."""
    root = _Call("", type(model), True)
    stack = [root]
    count: dict[str, int] = {}
    handles = []

    def size_in(args: Any) -> Size | None:
        # An image is (B, C, H, W) also where the network's features are not.
        image = first_tensor(args) is example and isinstance(example, Tensor) and example.dim() > 3
        return tuple(example.shape[2:]) if image else layout.size(args)

    def before(name: str, parameters: bool) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            count[name] = count.get(name, 0) + 1
            call = _Call(name, type(module), parameters, size_in(args))
            stack[-1].inside.append(call)
            stack.append(call)

        return hook

    def after(module: nn.Module, args: Any, output: Any) -> None:
        call = stack.pop()
        call.size = layout.size(output)
        x = first_tensor(output)
        if call.size and x is not None:
            call.channels = x.shape[layout.of(x)]

    for name, module in model.named_modules():
        if name:
            parameters = any(True for _ in module.parameters())
            handles.append(module.register_forward_pre_hook(before(name, parameters)))
            handles.append(module.register_forward_hook(after))
    try:
        with evaluating(model):
            model(example)
    finally:
        for handle in handles:
            handle.remove()

    def prune(call: _Call) -> None:
        call.inside = [each for each in call.inside if count[each.name] == 1]
        for each in call.inside:
            prune(each)

    prune(root)
    return root


def stages(model: nn.Module, example: Any, layout: Layout) -> list[Stage]:
    """The last block of each stage of a network, in the order of running."""
    blocks = [call for call in _run(model, example, layout).blocks() if call.size]
    # A stem or a head of conv, norm and ReLU is no stage of a network that has blocks of these; a
    # plain Sequential has nothing but layers, of which those without parameters belong to others.
    deepest = min(2, max((call.depth() for call in blocks), default=0))
    learned = {call.size for call in blocks if call.has_parameters}
    last: dict[Size, _Call] = {}
    for call in blocks:
        if call.size is None or call.size not in learned or call.depth() < deepest:
            continue
        _check_aspect(model, call, example, layout)
        if call.size in last and list(last)[-1] != call.size:
            raise ValueError(
                f"layers: {type(model).__name__} comes back to maps of {written(call.size)} "
                f"({last[call.size].name!r}, then {call.name!r}): which layers belong together "
                "cannot be told, name them"
            )
        last[call.size] = call
    return [Stage(call.name, size, call.channels) for size, call in last.items()]


def _check_aspect(model: nn.Module, call: _Call, example: Any, layout: Layout) -> None:
    """Refuses a map of another shape than the image's: channels that were taken for a side."""
    if layout.channel_dim is not None or not isinstance(example, Tensor) or example.dim() != 4:
        return
    if call.size is None or len(call.size) != 2:
        return
    (h, w), (height, width) = call.size, example.shape[2:]
    if max(h * width, w * height) > 1.5 * min(h * width, w * height) + height + width:
        raise ValueError(
            f"layers: {call.name!r} of {type(model).__name__} has maps of {written(call.size)} for "
            f"an image of {height}x{width}: if its channels are last, give channel_dim=-1, else "
            "name the layers"
        )


def written(size: Size) -> str:
    """A map size, for messages."""
    return "x".join(map(str, size))
