"""A network that is watched: hooks that tap its layers, and what they found in the last pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from at_fused import _maps
from at_fused._attached import Attached, Hook
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
        # What the hooks found last belongs to a graph.
        return {"found": {}}

    def take(self, names: Sequence[str], replicas: Sequence[int]) -> list[Tensor]:
        """The map of each layer, that of replicas put together; they are kept no longer."""
        found, self.found = self.found, {}
        order = {replica: i for i, replica in enumerate(replicas)}
        maps = []
        for i, name in enumerate(names):
            parts = [key for key in found if key[0] == i]
            if not parts:
                raise LookupError(name)
            parts.sort(key=lambda key: order.get(key[1], key[1]))
            several = [found[key].to(found[parts[0]].device) for key in parts]
            maps.append(several[0] if len(several) == 1 else torch.cat(several))
        return maps


def _replica(x: Tensor) -> int:
    """Which of DataParallel's replicas of a network a feature belongs to."""
    return x.device.index or 0


class _Clear(Hook):
    """A forward pre-hook of the whole network: what an earlier pass left is not this one's."""

    def __init__(self, maps: Maps) -> None:
        self.maps = maps

    def __call__(self, module: nn.Module, args: Any) -> None:
        x = first_tensor(args)
        replica = -1 if x is None else _replica(x)
        for key in [key for key in self.maps.found if replica in (-1, key[1])]:
            del self.maps.found[key]


def _exporting() -> bool:
    """Return True while torch.jit.trace or torch.export takes a network down, without taps."""
    # is_exporting() is True in whatever older releases compile.
    return torch.jit.is_tracing() or getattr(torch.compiler, "_is_exporting_flag", False)


class _Hook(Hook):
    """A forward hook that taps a layer's output.

    Between two convolutions no cache has Python's code any more, which makes each line dear: the
    options were checked when the hook was made, and go to the operator as they are.
    """

    def __init__(
        self, number: int, name: str, maps: Maps, layout: Layout, options: MapOptions
    ) -> None:
        self.number, self.name, self.maps = number, name, maps
        self.layout, self.options = layout, options
        # torch.compile with dynamic=True takes a float for a variable, a text for a constant.
        self.p = repr(options.p)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if _exporting():
            return None
        x = output if isinstance(output, Tensor) else first_tensor(output)
        if x is None:
            if isinstance(output[0] if isinstance(output, tuple) else output, fx.Proxy):
                return None  # symbolic_trace: the graph is the network's
            raise TypeError(
                f"layer {self.name!r} ({type(module).__name__}) must give a tensor, or a tuple "
                f"that begins with one, got {kind(output)}; name a module within it that does"
            )
        _, collapse, absolute, attend = self.options
        channel_attention = attend == "channel"
        place, size = _PLAIN, tuple(x.shape[2:])
        if x.dim() != 4 or self.layout.channel_dim == -1 or channel_attention:
            place, size = self._place(x, channel_attention)
        if not is_feature(x):
            refuse_feature(f"the output of layer {self.name!r}", x)
        y, q = _maps.attention_tap(x, float(self.p), collapse, absolute, place)
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
        self, side: str, model: nn.Module, names: list[str], layout: Layout, options: MapOptions
    ) -> None:
        self.side, self.model, self.names, self.maps = side, model, names, Maps()
        network = unwrap(model)
        modules = modules_named(network, names)
        pre_hook = network.register_forward_pre_hook(_Clear(self.maps))
        self.attached = [Attached(network, pre_hook, network)]
        for i, (name, module) in enumerate(zip(names, modules, strict=True)):
            hook = _Hook(i, name, self.maps, layout, options)
            self.attached.append(Attached(module, module.register_forward_hook(hook), network))

    def take(self) -> list[Tensor]:
        """The maps of the last forward pass, which are given once."""
        devices = self.model.device_ids if isinstance(self.model, nn.DataParallel) else []
        try:
            return self.maps.take(self.names, devices)
        except LookupError as error:
            name = error.args[0]
        raise RuntimeError(
            f"AttentionTransfer: the {self.side}'s layer {name!r} has given no map: "
            + self._why_missing(name)
        )

    def _why_missing(self, name: str) -> str:
        network, attached = unwrap(self.model), self.attached[1 + self.names.index(name)]
        anew = "make AttentionTransfer after the network has got its last form"
        now = dict(network.named_modules()).get(name)
        if now is not attached.module:
            return f"it was replaced after AttentionTransfer was made; {anew}"
        if not attached.places():
            return "its hook was removed, as by at.remove()"
        if isinstance(network, fx.GraphModule):
            called = [str(n.target) for n in network.graph.nodes if n.op == "call_module"]
            if name not in called:
                within = [each for each in called if each.startswith(f"{name}.")] or called
                return (
                    "the graph of a GraphModule does not call it; name a module that it calls, "
                    f"such as {', '.join(map(repr, within[-3:]))}"
                )
        when = " before each at(x)" if self.side == "student" else ""
        why = (
            f"it did not run; {self.side}(x) must run{when}, and call this module, not its forward "
            "or its weights alone"
        )
        if not attached.is_guarded():
            why += "; if torch.compile has run it without hooks, call torch._dynamo.reset()"
        return why

    def remove(self) -> None:
        """Takes the hooks away, and what they have found."""
        for each in reversed(self.attached):
            each.remove()
        self.maps.found = {}
