"""Tapped networks: hooks in a user's modules, and the maps that they made in the last pass.

A module is copied and pickled with its hooks. Ours are dead without their AttentionTransfer: a dict
of hooks is copied without them, and an AttentionTransfer that is copied puts its own into the
copies of the modules.

torch.compile does not look whether a module has hooks that had none when its class was compiled
(``torch._dynamo.config.skip_nnmodule_hook_guards``), but at its class: a hooked module is of a
subclass with the same name, until its hooks are taken away. In place of a layer without children,
whose type programs look up (quantization), that is the module which has it. A setting of torch
would not reach what is compiled already, and would reach programs that are none of ours.
"""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import is_fake
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.hooks import RemovableHandle

from at_fused import _maps
from at_fused._arguments import check_feature
from at_fused._models import (
    Arguments,
    Hook,
    arguments_of,
    only_hooks_of,
    precision,
    tensors_in,
    unwrap,
    version_of,
)
from at_fused._numbers import kind
from at_fused._observe import (
    GivenLayout,
    NeedsAnotherRunError,
    ObservedRun,
    observe,
    rank_of_maps,
)
from at_fused._options import CHANNELS_FIRST, FeatureLayout

# ---- hooks that are no part of copies, and that torch.compile never misses -----------------------


class AttachedHook:
    """A hook in a module; a copy of it, and of the module, has the hook in the module's copy."""

    def __init__(self, module: nn.Module, handle: RemovableHandle, network: nn.Module) -> None:
        self.module, self.handle = module, handle
        parents = [each for each in network.modules() if module in each.children()]
        self.subclassed = parents if _guarded_by_parent(module) and parents else [module]
        self._install(self.hook_dicts().values())

    def hook_dicts(self) -> dict[str, OrderedDict[int, Any]]:
        """Return the module's dicts that have something of the hook, by their names."""
        dicts = _hook_dicts(self.module)
        return {name: hooks for name, hooks in dicts.items() if self.handle.id in hooks}

    def _install(self, dicts: Iterable[OrderedDict[int, Any]]) -> None:
        for hooks in dicts:
            _leave_ours_out_of_copies(hooks, self.module)
        for each in self.subclassed:
            # Some modules have a class that is theirs alone, and ways of their own to change it.
            alone = isinstance(each, fx.GraphModule) or is_parametrized(each)
            if not (alone or isinstance(each, _Hooked) or _asks_for_its_class(type(each))):
                own: Any = type(each)
                _set_class(each, _hooked_class(own))

    def is_guarded(self) -> bool:
        """Return True where code that was compiled for the module without hooks does not run."""
        return all(_own_class(type(each)) is not type(each) for each in self.subclassed)

    def __getstate__(self) -> dict[str, Any]:
        dicts, key = [], self.handle.id
        for name, hooks in self.hook_dicts().items():
            keys = list(hooks)
            dicts.append((name, hooks, hooks[key], keys[keys.index(key) + 1 :]))
        return {**vars(self), "dicts": dicts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        dicts = state.pop("dicts")
        vars(self).update(state)
        installed = []
        for name, copied, hook, later in dicts:
            # A module that holds what holds this object has no attributes yet.
            hooks = vars(self.module).get(name, copied)
            hooks[self.handle.id] = hook
            for key in filter(hooks.__contains__, later):
                hooks.move_to_end(key)
            installed.append(hooks)
        self._install(installed)

    def remove(self) -> None:
        """Take the hook away."""
        _take_out(self.module, self.handle.id)
        _restore_classes(self.subclassed)


def remove_hooks(module: nn.Module) -> None:
    """Take the hooks of every :class:`AttentionTransfer` out of a module and all within it.

    For a network whose ``at`` is lost, so that ``at.remove()`` cannot be called, and for whole
    modules that an early version pickled with the hooks. Other hooks stay.

    Args:
        module: any module, hooked or not.

    Raises:
        TypeError: ``module`` is no ``nn.Module``.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {kind(module)}")
    for each in module.modules():
        for key in _ours(each):
            _take_out(each, key)
    _restore_classes(module.modules())


def _ours(module: nn.Module) -> list[int]:
    found = (vars(module).get(name, {}) for name in ("_forward_hooks", "_forward_pre_hooks"))
    return [key for hooks in found for key, hook in hooks.items() if isinstance(hook, Hook)]


def _hook_dicts(module: nn.Module) -> dict[str, OrderedDict[int, Any]]:
    items = vars(module).items()
    return {k: v for k, v in items if k.startswith("_forward_") and isinstance(v, OrderedDict)}


def _take_out(module: nn.Module, key: int) -> None:
    for hooks in _hook_dicts(module).values():
        hooks.pop(key, None)
    if not _ours(module):
        for hooks in _hook_dicts(module).values():
            vars(hooks).clear()


def _leave_ours_out_of_copies(hooks: OrderedDict[int, Any], module: nn.Module) -> None:
    """Make copies and pickles of one of a module's dicts of hooks do without those of ours."""
    this, owner = weakref.ref(hooks), weakref.ref(module)

    def others() -> OrderedDict[int, Any]:
        holder = owner()
        ours = [] if holder is None else _ours(holder)
        return OrderedDict((k, hook) for k, hook in (this() or {}).items() if k not in ours)

    vars(hooks)["__deepcopy__"] = lambda memo: copy.deepcopy(others(), memo)
    vars(hooks)["__reduce_ex__"] = lambda protocol: others().__reduce_ex__(protocol)


def _guarded_by_parent(module: nn.Module) -> bool:
    return is_parametrized(module) or not list(module.children())


def _restore_classes(modules: Iterable[nn.Module]) -> None:
    for each in modules:
        if not any(map(_ours, (each, *filter(_guarded_by_parent, each.children())))):
            _set_class(each, _own_class(type(each)))


def _asks_for_its_class(cls: type) -> bool:
    """Return True where forward() may compute something else for a subclass."""
    forwards = (vars(each).get("forward") for each in cls.__mro__ if each is not nn.Module)
    codes = [f.__code__ for f in forwards if isinstance(f, FunctionType)]
    return any({"type", "__class__"} & {*code.co_names} for code in codes)


class _Hooked:
    """A mark of classes: that of a hooked module has this one and the module's own for bases."""

    def __init_subclass__(cls) -> None:
        """Keep a class from what its base does to subclasses, such as to register them."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The copy is no hooked one. Later protocols insist on the class of the object.
        reduced: Any = super().__reduce_ex__(1)
        function, arguments, *rest = reduced
        return _own_class(function), tuple(map(_own_class, arguments)), *rest


def _own_class(cls: Any) -> Any:
    """Return the module's own class for that of a hooked module, anything else as it is."""
    return cls.__bases__[1] if _Hooked in getattr(cls, "__bases__", ()) else cls


def _set_class(module: nn.Module, cls: type) -> None:
    if type(module) is not cls:
        object.__setattr__(module, "__class__", cls)


@cache  # or what was compiled for one student would not serve the next
def _hooked_class(own: Any) -> type:
    names: dict[str, Any] = {n: getattr(own, n) for n in ("__module__", "__qualname__", "__doc__")}

    def deepcopy(self: Any, memo: Any) -> Any:
        cls = type(self)
        _set_class(self, own)
        try:
            return own.__deepcopy__(self, memo)
        finally:
            _set_class(self, cls)

    if hasattr(own, "__deepcopy__"):
        names["__deepcopy__"] = deepcopy
    return type(own)(own.__name__, (_Hooked, own), names)


# ---- the hooks of a tapped network ---------------------------------------------------------------


class MapOptions(NamedTuple):
    """The options that make maps."""

    p: float
    collapse: str
    absolute: bool
    attend: str


class TappedLayer(NamedTuple):
    """A layer to be tapped; its layout is None until a pass shows it."""

    name: str
    module: nn.Module
    layout: FeatureLayout | None = None


class LastPass:
    """The remains of a network's last pass; maps and features by layer and replica."""

    def __init__(self) -> None:
        self.maps: dict[tuple[int, int], Tensor] = {}
        self.grad_mode = True  # the one in which the network was called
        # The inputs of the last passes, of those since maps were taken.
        self.inputs: list[list[weakref.ref[Tensor]]] = []
        # Until layouts are known: features, with their versions, and what shows the layouts. A pass
        # is observed, or its arguments and autocast are kept for another run.
        self.undecided = False
        self.features: dict[tuple[int, int], tuple[Tensor, int]] = {}
        self.run: ObservedRun | None = None
        self.arguments: dict[int, tuple[Arguments, tuple[str, torch.dtype, bool]]] = {}
        self.error: ValueError | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Maps and features belong to a graph, which a copy has no part in.
        return {**vars(LastPass()), "undecided": self.undecided}

    def ignores_pass(self) -> bool:
        """Return True in an export, and in passes that are for another's hooks."""
        return not (Hook.acting is None or Hook.acting is self) or _exporting()

    def end_observation(self) -> ObservedRun | None:
        run, self.run = self.run, None
        if run and not run.ended:
            run.stop()
        return run


def _replica(x: Tensor) -> int:
    """Return which of DataParallel's replicas of a network a feature belongs to."""
    return x.device.index or 0


def _in_backward() -> bool:
    """Return True where a checkpoint runs a part of the network once more."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _exporting() -> bool:
    """Return True while torch.jit.trace or torch.export takes a network down, without taps."""
    # is_exporting() is True in whatever older releases compile.
    return torch.jit.is_tracing() or getattr(torch.compiler, "_is_exporting_flag", False)


def _can_be_observed(module: nn.Module, inputs: list[Tensor]) -> bool:
    """Return False for passes that are not plain ones of tensors in the network itself."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or getattr(module, "_is_replica", False)
        or any(is_fake(x) for x in inputs)
        or all(x.dim() == 0 for x in inputs)
        or any(each._compiled_call_impl is not None for each in module.modules())
    )


class BeginPass(Hook):
    """A forward pre-hook of the network: forget the pass before, observe this one if need be."""

    def __init__(self, last: LastPass, given: GivenLayout) -> None:
        self.last, self.given = last, given

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        last, tensors = self.last, list(tensors_in((args, kwargs)))
        if last.ignores_pass() or _in_backward():
            return
        replica = _replica(tensors[0]) if tensors else -1
        for kept in (last.maps, last.features):
            for key in [key for key in kept if replica in (-1, key[1])]:
                del kept[key]
        last.grad_mode = torch.is_grad_enabled()
        if torch.compiler.is_compiling():  # which cannot trace weak references
            last.inputs = []
        else:
            last.inputs = [*last.inputs[-7:], [weakref.ref(x) for x in tensors]]
        stale = last.end_observation()  # of a pass that was interrupted, or is around this one
        device = tensors[0].device.type if tensors else "meta"
        if last.undecided and device != "meta":
            enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
            last.arguments[replica] = (args, kwargs), (device, dtype, enabled)
            if stale is None and _can_be_observed(module, tensors):
                last.run = ObservedRun(module, (args, kwargs), self.given)
                last.run.start()


class EndPass(Hook):
    """A forward hook of the network: take the layouts from the pass that was observed."""

    def __init__(self, network: TappedNetwork) -> None:
        self.network = network

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        run = self.network.last.run
        if run and not self.network.last.ignores_pass():
            run.stop()
            if output is None:  # as after an error
                self.network.last.run = None
                return
            with suppress(NeedsAnotherRunError):  # as long as the pass of the user goes on
                self.network.decide_layouts(run)


class LayerTap(Hook):
    """A forward hook that taps a layer's output.

    Between two convolutions no cache has Python's code any more, which makes each line dear: the
    options were checked when the hook was made, and go to the operator as they are.
    """

    def __init__(
        self, number: int, layer: TappedLayer, last: LastPass, given: GivenLayout, o: MapOptions
    ) -> None:
        self.number, self.name, self.last, self.options = number, layer.name, last, o
        self.layout = layer.layout
        # The rank of a feature whose channels certainly come first.
        self.rank = rank_of_maps(layer.module) if given.channel_dim != -1 else None
        # torch.compile with dynamic=True takes a float for a variable, a text for a constant.
        self.p = repr(o.p)
        self.grad_mode = True  # the one in which the layer ran last

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        last = self.last
        if last.ignores_pass():
            return None
        x = output[0] if isinstance(output, (tuple, list)) and output else output
        if not isinstance(x, Tensor):
            if isinstance(x, fx.Proxy):
                return None  # symbolic_trace: the graph is the network's
            raise TypeError(
                f"layer {self.name!r} ({type(module).__name__}) must give a tensor, or a tuple "
                f"that begins with one, got {kind(output)}; name a module within it that does"
            )
        check_feature(f"the output of layer {self.name!r}", x)
        # A feature whose layout is not known yet is tapped as well, as a checkpoint will do when it
        # runs the layer once more, in the backward, where its map has long been used.
        y, q = self.tap(x)
        if not _in_backward():
            self.grad_mode = torch.is_grad_enabled()
            key = self.number, _replica(x)
            if self.layout is None and x.dim() != self.rank:
                # A network without gradients may change it in place.
                kept = y if torch.is_grad_enabled() else y.clone()
                last.features[key] = kept, version_of(kept)
            else:
                last.maps[key] = q
        if y is x or x is output:
            return None if y is x else y
        rest = (y, *output[1:])
        return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)

    def tap(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the feature, to be used in its own place, and its map."""
        _, collapse, absolute, attend = self.options
        layout = FeatureLayout(*self.layout[:2]) if self.layout else CHANNELS_FIRST
        feature = layout.to_channels_first(x, f"layer {self.name!r}")
        of_channels = attend == "channel"
        size = feature.shape[1:2] if of_channels else feature.shape[2:]
        y, q = _maps.attention_tap(x, float(self.p), collapse, absolute, layout, of_channels)
        return y, q.view(x.shape[0], *size)


class TappedNetwork:
    """A network whose layers are hooked, and how to undo that.

    Layers that were named have no layout until it is found out with their first pass, but for
    convolutions and their norms, whose features can lie in one way only.
    """

    def __init__(
        self,
        side: str,
        model: nn.Module,
        layers: Sequence[TappedLayer],
        given: GivenLayout,
        options: MapOptions,
    ) -> None:
        self.side, self.model, self.given = side, model, given
        self.last, self._precisions = LastPass(), dict[str, str]()
        network, last = unwrap(model), self.last
        self.taps = [LayerTap(i, each, last, given, options) for i, each in enumerate(layers)]
        last.undecided = any(tap.layout is None and tap.rank is None for tap in self.taps)
        begin = network.register_forward_pre_hook(BeginPass(last, given), with_kwargs=True)
        handles: list[Any] = [(network, begin)]
        for tap, layer in zip(self.taps, layers, strict=True):
            handles.append((layer.module, layer.module.register_forward_hook(tap)))
        if last.undecided:
            end = network.register_forward_hook(EndPass(self), always_call=True)
            handles.append((network, end))
        self.attached = [AttachedHook(module, handle, network) for module, handle in handles]

    def take_maps(self, batch: Any) -> list[Tensor]:
        """Return the maps of the last forward pass, on this batch, and keep them no longer."""
        last = self.last
        run, arguments = last.end_observation(), last.arguments
        last.arguments = {}
        waiting = any(self.taps[number].layout is None for number, _ in last.features)
        if waiting and last.error is None:
            run = run or self._run_once(arguments, batch)
            run.may_run_again = True
            self.decide_layouts(run)
        error, last.error = last.error, None
        if error:
            last.features = {}
            raise error
        self._make_maps()
        found, last.maps, last.inputs = last.maps, {}, []
        return [self._whole_map(tap, found) for tap in self.taps]

    def _whole_map(self, tap: LayerTap, found: dict[tuple[int, int], Tensor]) -> Tensor:
        """Return the map of a layer, put together from those of replicas."""
        devices = self.model.device_ids if isinstance(self.model, nn.DataParallel) else []
        order = {replica: i for i, replica in enumerate(devices)}
        keys = [key for key in found if key[0] == tap.number]
        keys.sort(key=lambda key: order.get(key[1], key[1]))
        if not keys:
            raise RuntimeError(
                f"AttentionTransfer: the {self.side}'s layer {tap.name!r} has given no map: "
                + self._why_missing(tap)
            )
        parts = [found[key].to(found[keys[0]].device) for key in keys]
        if parts[0].shape[1:].numel() == 1:
            raise ValueError(
                f"layers: the {self.side}'s {tap.name!r} has a single position, or channel, whose "
                "attention is always 1: name a layer before it"
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def decide_layouts(self, run: ObservedRun) -> None:
        """Take the layouts of all layers from a pass; a network without gradients is done then."""
        try:
            run.find_layouts()
            layouts = [run.layout_of_layer(self.side, tap.name) for tap in self.taps]
        except ValueError as error:
            self.last.error = error
        else:
            for tap, layout in zip(self.taps, layouts, strict=True):
                tap.layout = layout
            self.last.undecided, self.last.arguments = False, {}
            if not torch.is_grad_enabled():
                self._make_maps()
        self.last.run = None

    def _run_once(self, arguments: dict[int, Any], batch: Any) -> ObservedRun:
        """Run the network once more, to observe it, in the precision of its pass."""
        given, autocast = arguments_of(batch), ("cpu", torch.bfloat16, False)
        if arguments:
            given, autocast = arguments[min(arguments)]
        if not any(x.dim() > 0 for x in tensors_in(given)):
            raise ValueError(
                f"layers: the {self.side} takes no tensor, which would show how the features of "
                f"{self.taps[0].name!r} lie: name layers of convolutions, or use at_loss"
            )
        with torch.autocast(*autocast):
            return observe(unwrap(self.model), given, self.given)

    def _make_maps(self) -> None:
        features, self.last.features = self.last.features, {}
        for key, (x, version) in features.items():
            tap = self.taps[key[0]]
            if version not in (-1, version_of(x)):
                raise ValueError(
                    f"layers: what follows the {self.side}'s {tap.name!r} changes its output in "
                    "place: name that layer instead"
                )
            self.last.maps[key] = tap.tap(x)[1]

    def _why_missing(self, tap: LayerTap) -> str:
        network, attached = unwrap(self.model), self.attached[1 + tap.number]
        if dict(network.named_modules()).get(tap.name) is not attached.module:
            return "it was replaced after AttentionTransfer was made; make that last"
        if not attached.hook_dicts():
            return "its hook was removed, as by at.remove()"
        if isinstance(network, fx.GraphModule):
            called = [str(n.target) for n in network.graph.nodes if n.op == "call_module"]
            if tap.name not in called:
                within = [each for each in called if each.startswith(f"{tap.name}.")] or called
                such = ", ".join(map(repr, within[-3:]))
                return f"the graph of a GraphModule does not call it; name a module such as {such}"
        when = " before each at(x)" if self.side == "student" else ""
        why = f"it did not run; {self.side}(x) must run{when}, and call it, not its forward alone"
        reset = "; if torch.compile has run it without hooks, call torch._dynamo.reset()"
        return why if attached.is_guarded() else why + reset

    def precision(self, x: Tensor, run: Callable[[Tensor], Any]) -> str:
        """Name the precision of the first layer; ``run`` runs the network on rows of ``x``.

        A ``forward`` that was put in the place of a module's own may enter autocast, as that of
        accelerate does: then one row is run to see it, once.
        """
        outside = precision(x)
        if not any("forward" in vars(each) for each in self.model.modules()):
            return outside
        if outside not in self._precisions:
            inside: list[str] = []
            handle = self.attached[1].module.register_forward_hook(
                lambda module, args, output: inside.append(precision(next(tensors_in(output))))
            )
            try:
                with only_hooks_of(handle):
                    run(x[:1])
            finally:
                handle.remove()
            self._precisions[outside] = ", ".join(inside)
        return self._precisions[outside]

    def gives_tokens(self, i: int, q: Tensor) -> bool:
        """Return True for the map of tokens; of a teacher that has not run its rank has to do."""
        layout = self.taps[i].layout
        return layout.map_size is not None if layout else q.dim() == 2 and not self.taps[i].rank

    def skip_tokens(self) -> int:
        """Return the most tokens that are left out of a layer's map."""
        return max(tap.layout.skip_tokens if tap.layout else 0 for tap in self.taps)

    def was_given_before(self, batch: Any) -> bool:
        """Return True where a tensor went into an earlier of the last passes, not into the last.

        That is evidence; another tensor is none, as inputs are moved, cut up and resized.
        """
        *earlier, last = self.last.inputs or [[]]
        given = {id(x) for x in tensors_in(batch)} - {id(ref()) for ref in last}
        return any(id(ref()) in given for each in earlier for ref in each)

    def check_graph(self, maps: list[Tensor]) -> None:
        """Refuse a map without a graph of a layer that is trained, or that such ones lead to.

        A part of the network may well run under ``no_grad``, if nothing in it is trained.
        """
        network = unwrap(self.model)
        for tap, q in zip(self.taps, maps, strict=True):
            if torch.is_grad_enabled() and not (q.requires_grad or tap.grad_mode):
                part = tap.name.partition(".")[0] if self.last.grad_mode else ""
                if any(p.requires_grad for p in network.get_submodule(part).parameters()):
                    raise RuntimeError(
                        f"AttentionTransfer: the map of the {self.side}'s layer {tap.name!r} has "
                        "no graph: it ran under no_grad, or in a checkpoint with "
                        "use_reentrant=True, which hides what is inside; use_reentrant=False does "
                        "not. To evaluate, call at(x) under no_grad too"
                    )

    def remove(self) -> None:
        """Take the hooks away, and what they have found."""
        for each in reversed(self.attached):
            each.remove()
        self.last.end_observation()
        self.last.maps, self.last.features, self.last.arguments = {}, {}, {}
