"""A network that is watched: hooks that tap its layers, and what they found in the last pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import is_fake

from at_fused import _maps
from at_fused._attached import Attached, Hook, acting
from at_fused._checks import kind
from at_fused._inputs import is_feature, refuse_feature
from at_fused._models import arguments_of, modules_named, precision, tensors_in, unwrap
from at_fused._observe import (
    Arguments,
    DoubtError,
    Given,
    Layout,
    Run,
    observed,
    rank_of_maps,
    version_of,
)
from at_fused._ops import Place


class MapOptions(NamedTuple):
    """The options that make maps."""

    p: float
    collapse: str
    absolute: bool
    attend: str


_PLAIN = Place()


class Maps:
    """The remains of a network's last pass, of each device where replicas of it ran."""

    def __init__(self) -> None:
        self.found: dict[tuple[int, int], Tensor] = {}
        self.grad_mode = True  # the one in which the network was called
        # The inputs of the last passes, of those since maps were taken.
        self.inputs: list[list[weakref.ref[Tensor]]] = []
        # Until layouts are known: features, with their versions, and what shows the layouts. A pass
        # is watched, or its arguments and autocast are kept for another run.
        self.undecided = False
        self.features: dict[tuple[int, int], tuple[Tensor, int]] = {}
        self.watched: Run | None = None
        self.arguments: dict[int, tuple[Arguments, tuple[str, torch.dtype, bool]]] = {}
        self.error: ValueError | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Maps and features belong to a graph, which a copy has no part in.
        return {**vars(Maps()), "undecided": self.undecided}

    def asleep(self) -> bool:
        return not (Hook.acting is None or Hook.acting is self) or _exporting()

    def end_watch(self) -> Run | None:
        run, self.watched = self.watched, None
        if run and not run.ended:
            run.stop()
        return run

    def take(self, names: Sequence[str], replicas: Sequence[int]) -> list[Tensor]:
        """The map of each layer, that of replicas put together; they are kept no longer."""
        found, self.found = self.found, {}
        self.inputs = []
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


def _in_backward() -> bool:
    """Return True where a checkpoint runs a part of the network once more."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class _Begin(Hook):
    """A forward pre-hook of the whole network: what an earlier pass left is not this one's."""

    def __init__(self, maps: Maps, given: Given) -> None:
        self.maps, self.given = maps, given

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        maps, tensors = self.maps, list(tensors_in((args, kwargs)))
        if maps.asleep() or _in_backward():
            return
        replica = _replica(tensors[0]) if tensors else -1
        for kept in (maps.found, maps.features):
            for key in [key for key in kept if replica in (-1, key[1])]:
                del kept[key]
        maps.grad_mode = torch.is_grad_enabled()
        if torch.compiler.is_compiling():  # which cannot trace weak references
            maps.inputs = []
        else:
            maps.inputs = [*maps.inputs[-7:], [weakref.ref(x) for x in tensors]]
        stale = maps.end_watch()  # of a pass that was interrupted, or is around this one
        device = tensors[0].device.type if tensors else "meta"
        if maps.undecided and device != "meta":
            enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
            maps.arguments[replica] = (args, kwargs), (device, dtype, enabled)
            if stale is None and _can_be_watched(module, tensors):
                maps.watched = Run(module, (args, kwargs), self.given)
                maps.watched.start()


class _End(Hook):
    """A forward hook of the whole network: how features lie was seen in the pass."""

    def __init__(self, watched: Watched) -> None:
        self.watched = watched

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        run = self.watched.maps.watched
        if run and not self.watched.maps.asleep():
            run.stop()
            if output is None:  # as after an error
                self.watched.maps.watched = None
                return
            with suppress(DoubtError):  # as long as the pass of the user goes on
                self.watched.decide(run)


def _can_be_watched(module: nn.Module, inputs: list[Tensor]) -> bool:
    """Return False for passes that are not plain ones of tensors in the network itself."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or getattr(module, "_is_replica", False)
        or any(is_fake(x) for x in inputs)
        or all(x.dim() == 0 for x in inputs)
        or any(each._compiled_call_impl is not None for each in module.modules())
    )


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
        self, number: int, name: str, maps: Maps, layout: Layout | None, options: MapOptions
    ) -> None:
        self.number, self.name, self.maps, self.options = number, name, maps, options
        self.layout = layout
        self.rank: int | None = None  # that of features which certainly have channels first
        # torch.compile with dynamic=True takes a float for a variable, a text for a constant.
        self.p = repr(options.p)
        self.grad_mode = True  # the one in which the layer ran last

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        maps = self.maps
        if maps.asleep():
            return None
        x = output[0] if isinstance(output, (tuple, list)) and output else output
        if not isinstance(x, Tensor):
            if isinstance(x, fx.Proxy):
                return None  # symbolic_trace: the graph is the network's
            raise TypeError(
                f"layer {self.name!r} ({type(module).__name__}) must give a tensor, or a tuple "
                f"that begins with one, got {kind(output)}; name a module within it that does"
            )
        if not is_feature(x):
            refuse_feature(f"the output of layer {self.name!r}", x)
        # A feature whose layout is not known yet is tapped as well, as a checkpoint will do when it
        # runs the layer once more, in the backward, where its map has long been used.
        y, q = self.tap(x)
        if not _in_backward():
            self.grad_mode = torch.is_grad_enabled()
            key = self.number, _replica(x)
            if self.layout is None and x.dim() != self.rank:
                # A network without gradients may change it in place.
                kept = y if torch.is_grad_enabled() else y.clone()
                maps.features[key] = kept, version_of(kept)
            else:
                maps.found[key] = q
        if y is x or x is output:
            return None if y is x else y
        rest = (y, *output[1:])
        return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)

    def tap(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the feature, to be used in its own place, and its map."""
        _, collapse, absolute, attend = self.options
        place, size = _PLAIN, tuple(x.shape[2:])
        if attend == "channel" or (self.layout and self.layout.channel_dim == -1):
            place, size = self._place(x, attend == "channel")
        y, q = _maps.attention_tap(x, float(self.p), collapse, absolute, place)
        return y, q.view(x.shape[0], *size)

    def _place(self, x: Tensor, channel_attention: bool) -> tuple[Place, tuple[int, ...]]:
        """Where the channels are, and the size of the map."""
        channel_dim, skip = self.layout[:2] if self.layout else (1, 0)
        last = channel_dim == -1
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
    """A network whose layers are hooked, and how to undo that.

    Layers that were named have no layout until it is found out with their first pass, but for
    convolutions and their norms, whose features can lie in one way only.
    """

    def __init__(
        self,
        side: str,
        model: nn.Module,
        names: list[str],
        given: Given,
        layouts: Sequence[Layout | None],
        options: MapOptions,
    ) -> None:
        self.side, self.model, self.names, self.given = side, model, names, given
        self.maps, self._inside = Maps(), dict[str, str]()
        network = unwrap(model)
        modules = modules_named(network, names)
        self.hooks = [
            _Hook(i, name, self.maps, layout, options)
            for i, (name, layout) in enumerate(zip(names, layouts, strict=True))
        ]
        begin = network.register_forward_pre_hook(_Begin(self.maps, given), with_kwargs=True)
        handles: list[Any] = [(network, begin)]
        for hook, module in zip(self.hooks, modules, strict=True):
            if given.channel_dim != -1:
                hook.rank = rank_of_maps(module)
            self.maps.undecided |= hook.layout is None and hook.rank is None
            handles.append((module, module.register_forward_hook(hook)))
        if self.maps.undecided:
            end = network.register_forward_hook(_End(self), always_call=True)
            handles.append((network, end))
        self.attached = [Attached(module, handle, network) for module, handle in handles]

    def take(self, batch: Any) -> list[Tensor]:
        """The maps of the last forward pass, on this batch, which are given once."""
        maps = self.maps
        devices = self.model.device_ids if isinstance(self.model, nn.DataParallel) else []
        run, arguments = maps.end_watch(), maps.arguments
        maps.arguments = {}
        if maps.features and maps.error is None and self._waiting():
            if run is None:
                run = self._run_once(arguments, batch)
            run.may_run_again = True
            self.decide(run)
        error, maps.error = maps.error, None
        if error:
            maps.features = {}
            raise error
        self._make_maps()
        try:
            found = maps.take(self.names, devices)
        except LookupError as lacking:
            name = lacking.args[0]
            raise RuntimeError(
                f"AttentionTransfer: the {self.side}'s layer {name!r} has given no map: "
                + self._why_missing(name)
            ) from None
        for hook, q in zip(self.hooks, found, strict=True):
            if q.shape[1:].numel() == 1:
                raise ValueError(
                    f"layers: the {self.side}'s {hook.name!r} has a single position, or channel, "
                    "whose attention is always 1: name a layer before it"
                )
        return found

    def decide(self, run: Run) -> None:
        """Take the layouts of all layers from a pass; a network without gradients is done then."""
        try:
            run.find()
            layouts = [run.layout_of_layer(self.side, name) for name in self.names]
        except ValueError as error:
            self.maps.error = error
        else:
            for hook, layout in zip(self.hooks, layouts, strict=True):
                hook.layout = layout
            self.maps.undecided, self.maps.arguments = False, {}
            if not torch.is_grad_enabled():
                self._make_maps()
        self.maps.watched = None

    def _run_once(self, arguments: dict[int, Any], batch: Any) -> Run:
        """Run the network once more, to watch it, in the precision of its pass."""
        given, (device, dtype, enabled) = (
            arguments[min(arguments)]
            if arguments
            else (arguments_of(batch), ("cpu", torch.bfloat16, False))
        )
        if not any(x.dim() > 0 for x in tensors_in(given)):
            raise ValueError(
                f"layers: the {self.side} takes no tensor, which would show how the features of "
                f"{self.names[0]!r} lie: name layers of convolutions, or use at_loss"
            )
        with torch.autocast(device, dtype, enabled):
            return observed(unwrap(self.model), given, self.given)

    def _waiting(self) -> bool:
        return any(self.hooks[number].layout is None for number, _ in self.maps.features)

    def _make_maps(self) -> None:
        features, self.maps.features = self.maps.features, {}
        for key, (x, version) in features.items():
            hook = self.hooks[key[0]]
            if version not in (-1, version_of(x)):
                raise ValueError(
                    f"layers: what follows the {self.side}'s {hook.name!r} changes its output in "
                    "place: name that layer instead"
                )
            self.maps.found[key] = hook.tap(x)[1]

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

    def precision(self, x: Tensor, run: Callable[[Tensor], Any]) -> str:
        """The precision of the first layer; ``run`` runs the network on rows of ``x``.

        A ``forward`` that was put in the place of a module's own may enter autocast, as that of
        accelerate does: then one row is run to see it, once.
        """
        outside = precision(x)
        if not any("forward" in vars(each) for each in self.model.modules()):
            return outside
        if outside not in self._inside:
            inside: list[str] = []
            handle = modules_named(unwrap(self.model), self.names)[0].register_forward_hook(
                lambda module, args, output: inside.append(precision(next(tensors_in(output))))
            )
            try:
                with acting(handle):
                    run(x[:1])
            finally:
                handle.remove()
            self._inside[outside] = ", ".join(inside)
        return self._inside[outside]

    def layout(self, i: int) -> Layout | None:
        """The layout of a layer's features, as far as it was needed and found out."""
        return self.hooks[i].layout

    def gives_tokens(self, i: int, q: Tensor) -> bool:
        """Return True for the map of tokens; of a teacher that has not run its rank has to do."""
        layout = self.hooks[i].layout
        return layout.of_tokens() if layout else q.dim() == 2 and self.hooks[i].rank is None

    def skip_tokens(self) -> int:
        """The most tokens that are left out of a layer's map."""
        return max(hook.layout.skip_tokens if hook.layout else 0 for hook in self.hooks)

    def of_earlier_pass(self, batch: Any) -> bool:
        """Return True where a tensor went into an earlier of the last passes, not into the last.

        That is evidence; another tensor is none, as inputs are moved, cut up and resized.
        """
        *earlier, last = self.maps.inputs or [[]]
        given = {id(x) for x in tensors_in(batch)} - {id(ref()) for ref in last}
        return any(id(ref()) in given for each in earlier for ref in each)

    def lost_graph(self, maps: list[Tensor]) -> str | None:
        """Name a layer whose map has no graph, though it, or what leads to it, is trained.

        A part of the network may well run under ``no_grad``, if nothing in it is trained.
        """
        network = unwrap(self.model)
        for hook, q in zip(self.hooks, maps, strict=True):
            if not (q.requires_grad or hook.grad_mode):
                part = hook.name.partition(".")[0] if self.maps.grad_mode else ""
                if any(p.requires_grad for p in network.get_submodule(part).parameters()):
                    return hook.name
        return None

    def remove(self) -> None:
        """Takes the hooks away, and what they have found."""
        for each in reversed(self.attached):
            each.remove()
        self.maps.end_watch()
        self.maps.found, self.maps.features, self.maps.arguments = {}, {}, {}
