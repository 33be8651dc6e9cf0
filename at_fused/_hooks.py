"""A network that is watched: hooks that tap its layers, and what they found in the last pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from at_fused import _maps
from at_fused._checks import kind
from at_fused._inputs import is_feature, refuse_feature
from at_fused._match import Layout, first_tensor
from at_fused._models import modules_named, unwrap
from at_fused._ops import Place


class MapOptions(NamedTuple):
    """The options that make maps."""

    p: float
    collapse: str
    absolute: bool
    attend: str


_PLAIN = Place()


class Maps:
    """The maps of a network's last forward pass, of each device where replicas of it ran."""

    def __init__(self) -> None:
        self.found: dict[tuple[int, int], Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A network is copied and saved with its hooks; what they found last belongs to a graph.
        return {"found": {}}

    def take(self, names: Sequence[str], replicas: Sequence[int]) -> list[Tensor]:
        """The map of each layer, that of replicas put together; they are kept no longer."""
        found, self.found = self.found, {}
        order = {replica: i for i, replica in enumerate(replicas)}
        maps = []
        for i, name in enumerate(names):
            parts = [key for key in found if key[0] == i]
            if not parts:
                raise RuntimeError(f"layer {name!r} has given no map: it did not run")
            parts.sort(key=lambda key: order.get(key[1], key[1]))
            several = [found[key].to(found[parts[0]].device) for key in parts]
            maps.append(several[0] if len(several) == 1 else torch.cat(several))
        return maps


def _replica(x: Tensor) -> int:
    """Which of DataParallel's replicas of a network a feature belongs to."""
    return x.device.index or 0


class _Clear:
    """A forward pre-hook of the whole network: what an earlier pass left is not this one's."""

    def __init__(self, maps: Maps) -> None:
        self.maps = maps

    def __call__(self, module: nn.Module, args: Any) -> None:
        x = first_tensor(args)
        replica = -1 if x is None else _replica(x)
        for key in [key for key in self.maps.found if replica in (-1, key[1])]:
            del self.maps.found[key]


class _Hook:
    """A forward hook that taps a layer's output.

    Between two convolutions no cache has Python's code any more, which makes each line dear: the
    options were checked when the hook was made, and go to the operator as they are.
    """

    def __init__(
        self, number: int, name: str, maps: Maps, layout: Layout, options: MapOptions
    ) -> None:
        self.number, self.name, self.maps = number, name, maps
        self.layout, self.options = layout, options

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        x = output if isinstance(output, Tensor) else first_tensor(output)
        if x is None:
            raise TypeError(
                f"layer {self.name!r} ({type(module).__name__}) must give a tensor, or a tuple "
                f"that begins with one, got {kind(output)}; name a module within it that does"
            )
        p, collapse, absolute, attend = self.options
        channel_attention = attend == "channel"
        place, size = _PLAIN, tuple(x.shape[2:])
        if x.dim() != 4 or self.layout.channel_dim == -1 or channel_attention:
            place, size = self._place(x, channel_attention)
        if not is_feature(x):
            refuse_feature(f"the output of layer {self.name!r}", x)
        y, q = _maps.attention_tap(x, p, collapse, absolute, place)
        # While a checkpoint runs the layer once more, in the backward, its map has long been used.
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            self.maps.found[self.number, _replica(x)] = q.view(x.shape[0], *size)
        if y is x or x is output:
            return None if y is x else y
        rest = (y, *output[1:])
        return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)

    def _place(self, x: Tensor, channel_attention: bool) -> tuple[Place, tuple[int, ...]]:
        """Where the channels are, and the size of the map."""
        channel_dim = self.layout.of(x)
        last = channel_dim == -1
        skip = self.layout.skip_tokens if last and x.dim() == 3 else 0
        if skip >= x.shape[1] and skip:
            raise ValueError(
                f"skip_tokens must leave a token of layer {self.name!r}, which has {x.shape[1]}, "
                f"got {skip}"
            )
        channels = x.shape[-1] if last else x.shape[1]
        size = tuple(x.shape[1:-1] if last else x.shape[2:])
        size = (size[0] - skip, *size[1:]) if skip else size
        place = Place(channel_dim, skip, channel_attention)
        return place, (channels,) if channel_attention else size


class Watched:
    """A network whose layers are hooked, and how to undo that."""

    def __init__(
        self, model: nn.Module, names: list[str], layout: Layout, options: MapOptions
    ) -> None:
        self.model, self.names, self.maps = model, names, Maps()
        network = unwrap(model)
        self.handles = [network.register_forward_pre_hook(_Clear(self.maps))]
        for i, (name, module) in enumerate(zip(names, modules_named(network, names), strict=True)):
            hook = _Hook(i, name, self.maps, layout, options)
            self.handles.append(module.register_forward_hook(hook))

    def take(self) -> list[Tensor]:
        """The maps of the last forward pass, which are given once."""
        devices = self.model.device_ids if isinstance(self.model, nn.DataParallel) else []
        return self.maps.take(self.names, devices)

    def remove(self) -> None:
        """Takes the hooks away, and what they have found."""
        for handle in self.handles:
            handle.remove()
        self.maps.found = {}
