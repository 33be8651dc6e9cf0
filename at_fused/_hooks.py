"""Tapped networks: hooks in a user's modules, and the maps that they made in the last pass.

Hooks are no part of copies and pickles of a module, which would keep them without their
AttentionTransfer; one that is copied together with its networks puts its own into the copies.
"""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from at_fused import _maps
from at_fused._arguments import check_feature
from at_fused._layouts import CHANNELS_FIRST, FeatureLayout
from at_fused._models import Arguments, Hook, arguments_of, tensors_in, unwrap
from at_fused._numbers import kind
from at_fused._observe import GivenLayout, observe, rank_of_maps
from at_fused._options import LossArguments


class TappedLayer(NamedTuple):
    """A layer to be tapped; its layout is None until a run shows it."""

    name: str
    module: nn.Module
    layout: FeatureLayout | None = None


class LastPass:
    """State that the hooks of a network keep of its last pass."""

    def __init__(self) -> None:
        self.maps: dict[str, Tensor] = {}  # by layer
        self.grad_mode = True  # the one in which the network was called
        # The inputs of the last two passes, of those since maps were taken.
        self.inputs: list[list[weakref.ref[Tensor]]] = []
        # Until layouts are known: features with their maps if channels come first, and the
        # arguments for a run to see.
        self.undecided = False
        self.features: dict[str, tuple[Tensor, Tensor]] = {}
        self.arguments: Arguments | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Maps and features belong to a graph, which a copy has no part in.
        return {**vars(LastPass()), "undecided": self.undecided}

    def ignores_pass(self) -> bool:
        """Return True in passes that are for another's hooks, and in a trace or an export."""
        if torch.jit.is_tracing() or getattr(torch.compiler, "_is_exporting_flag", False):
            return True  # is_exporting() is True in whatever older releases compile
        return not (Hook.acting is None or Hook.acting is self)


def _in_backward() -> bool:
    """Return True where a checkpoint runs a part of the network once more."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


# ---- the two hooks -------------------------------------------------------------------------------


class BeginPass(Hook):
    """A forward pre-hook of the network: forget the pass before."""

    def __init__(self, last: LastPass) -> None:
        self.last = last

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        last = self.last
        if last.ignores_pass() or _in_backward():
            return
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "AttentionTransfer does not work in nn.DataParallel with several devices: use "
                "nn.parallel.DistributedDataParallel, a process for each"
            )
        last.maps.clear()
        last.features.clear()
        last.grad_mode = torch.is_grad_enabled()
        last.arguments = (args, kwargs) if last.undecided else None
        if torch.compiler.is_compiling():  # which cannot trace weak references
            last.inputs = []
        else:
            inputs = [weakref.ref(x) for x in tensors_in((args, kwargs))]
            last.inputs = [*last.inputs[-1:], inputs]


class LayerTap(Hook):
    """A forward hook of a layer: tap its output.

    Between two convolutions no cache has Python's code any more, which makes each line dear: the
    options were checked when the hook was made, and go to the operator as they are.
    """

    def __init__(
        self, layer: TappedLayer, last: LastPass, given: GivenLayout, options: LossArguments
    ) -> None:
        self.name, self.layout, self.last = layer.name, layer.layout, last
        self.collapse, self.absolute = options.collapse, options.absolute
        self.of_channels = options.attend == "channel"
        # The rank of a feature whose channels certainly come first.
        self.rank = rank_of_maps(layer.module) if given.channel_dim != -1 else None
        # torch.compile with dynamic=True takes a float for a variable, a text for a constant.
        self.p = repr(float(options.p))
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
            if self.layout is None and x.dim() != self.rank:
                # A clone, as the next layer may change a constant in place.
                last.features[self.name] = y if y.requires_grad else y.clone(), q
            else:
                last.maps[self.name] = q
        if y is x or x is output:
            return None if y is x else y
        rest = (y, *output[1:])
        return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)

    def tap(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the feature, to be used in its own place, and its map."""
        layout = FeatureLayout(*self.layout[:2]) if self.layout else CHANNELS_FIRST
        feature = layout.to_channels_first(x, f"layer {self.name!r}")
        size = feature.shape[1:2] if self.of_channels else feature.shape[2:]
        y, q = _maps.attention_tap(
            x, float(self.p), self.collapse, self.absolute, layout, self.of_channels
        )
        return y, q.view(x.shape[0], *size)


# ---- a network with its hooks --------------------------------------------------------------------


class TappedNetwork:
    """A network whose layers are hooked, and how to undo that.

    Layers that were named have no layout until a run on the arguments of their first pass shows it,
    but for convolutions and their norms, whose features can lie in one way only.
    """

    def __init__(
        self,
        side: str,
        model: nn.Module,
        layers: Sequence[TappedLayer],
        given: GivenLayout,
        options: LossArguments,
    ) -> None:
        self.side, self.model, self.layers, self.given = side, model, layers, given
        network, self.last = unwrap(model), LastPass()
        self.taps = [LayerTap(layer, self.last, given, options) for layer in layers]
        self.last.undecided = any(tap.layout is None and tap.rank is None for tap in self.taps)
        begin = BeginPass(self.last)
        self.hooks: list[Hook] = [begin, *self.taps]
        self.handles = [network.register_forward_pre_hook(begin, with_kwargs=True)]
        for tap, layer in zip(self.taps, layers, strict=True):
            self.handles.append(layer.module.register_forward_hook(tap))
        for handle in self.handles:
            _hide_from_copies(handle)

    def __getstate__(self) -> dict[str, Any]:
        # A handle is copied with its dicts of hooks, which the copies of modules share.
        orders = [list(next(_dicts_of(handle), ())) for handle in self.handles]
        return {**vars(self), "orders": orders}

    def __setstate__(self, state: dict[str, Any]) -> None:
        orders = state.pop("orders")
        vars(self).update(state)
        for handle, hook, order in zip(self.handles, self.hooks, orders, strict=True):
            if handle.id not in order:  # it was removed
                continue
            hooks, with_kwargs, *_ = _dicts_of(handle)
            hooks[handle.id] = hook
            if isinstance(hook, BeginPass):
                with_kwargs[handle.id] = True
            for key in filter(hooks.__contains__, order[order.index(handle.id) + 1 :]):
                hooks.move_to_end(key)
            _hide_from_copies(handle)

    def take_maps(self, batch: Any) -> list[Tensor]:
        """Return the maps of the last forward pass, on this batch, and keep them no longer."""
        last = self.last
        if last.features:
            self._find_layouts(batch)
        found, last.maps = last.maps, {}
        (*before, own), last.inputs = last.inputs or [[]], []
        # A tensor that no pass was given is no evidence: inputs are moved, cut up and resized.
        given = {id(x) for x in tensors_in(batch)} - {id(ref()) for ref in own}
        if any(id(ref()) in given for each in before for ref in each):
            raise RuntimeError(
                f"AttentionTransfer: x was the input of an earlier pass of the {self.side}, whose "
                f"last had another; call at(x) after each {self.side}(x)"
            )
        for name, module, _ in self.layers:
            if name not in found:
                raise RuntimeError(self._why_missing(name, module))
            if found[name].shape[1:].numel() == 1:
                raise ValueError(
                    f"layers: the {self.side}'s layer {name!r} has a single position, or channel, "
                    "whose attention is always 1: name a layer before it"
                )
        return [found[layer.name] for layer in self.layers]

    def _find_layouts(self, batch: Any) -> None:
        """Run the network once more to see how features lie, and make the maps of those kept."""
        last = self.last
        features, last.features = last.features, {}
        arguments, last.arguments = last.arguments or arguments_of(batch), None
        run = observe(unwrap(self.model), arguments, self.given)
        layouts = [run.layout_of_layer(self.side, tap.name) for tap in self.taps]
        for tap, layout in zip(self.taps, layouts, strict=True):
            tap.layout = layout
            if tap.name in features:
                feature, q = features[tap.name]
                last.maps[tap.name] = q if layout.channel_dim == 1 else tap.tap(feature)[1]
        last.undecided = False

    def _why_missing(self, name: str, module: nn.Module) -> str:
        message = f"AttentionTransfer: the {self.side}'s layer {name!r} has given no map: "
        if dict(unwrap(self.model).named_modules()).get(name) is not module:
            return message + "it was replaced after AttentionTransfer was made; make that last"
        if not any(hook in self.hooks for hook in module._forward_hooks.values()):
            return message + "its hook was removed, as by at.remove()"
        return message + (
            f"it did not run; call the {self.side} itself, not its forward, before each at(x). Of "
            "a GraphModule name a layer that its graph calls. If torch.compile compiled it, or a "
            "copy, without hooks: set torch._dynamo.config.skip_nnmodule_hook_guards = False, and "
            "call torch._dynamo.reset()"
        )

    def token_size(self, i: int) -> Sequence[int]:
        """Return the size of the map of a layer's tokens; features of other layers have none."""
        layout = self.taps[i].layout
        return (layout and layout.map_size) or ()

    def skip_tokens(self) -> int:
        """Return the most tokens that are left out of a layer's map."""
        return max(tap.layout.skip_tokens if tap.layout else 0 for tap in self.taps)

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
                        "no graph: it ran under no_grad, or in a checkpoint, which has to be one "
                        "with use_reentrant=False. To evaluate, call at(x) under no_grad too"
                    )

    def remove(self) -> None:
        """Take the hooks away, and what they have found."""
        for handle in self.handles:
            for hooks in _dicts_of(handle):
                _take_out(hooks, [handle.id])
        self.last.maps, self.last.features, self.last.arguments = {}, {}, None


# ---- dicts of hooks, which are copied without ours -----------------------------------------------


def _dicts_of(handle: RemovableHandle) -> Iterator[OrderedDict[int, Any]]:
    """Yield the dicts of a module that have something of a hook, the hook itself in the first."""
    for ref in (handle.hooks_dict_ref, *handle.extra_dict_ref):
        if (hooks := ref()) is not None:
            yield hooks


def _hide_from_copies(handle: RemovableHandle) -> None:
    """Make copies and pickles of a module do without a hook of ours."""
    for hooks in _dicts_of(handle):
        hidden = vars(hooks).setdefault("hidden", set())
        hidden.add(handle.id)
        shown = partial(_shown, weakref.ref(hooks), hidden)
        vars(hooks)["__deepcopy__"] = lambda memo, shown=shown: copy.deepcopy(shown(), memo)
        vars(hooks)["__reduce_ex__"] = lambda protocol, shown=shown: shown().__reduce_ex__(protocol)


def _shown(hooks: weakref.ref[OrderedDict[int, Any]], hidden: set[int]) -> OrderedDict[int, Any]:
    return OrderedDict((k, hook) for k, hook in (hooks() or {}).items() if k not in hidden)


def _take_out(hooks: OrderedDict[int, Any], keys: Iterable[int]) -> None:
    hidden = vars(hooks).get("hidden", set())
    for key in list(keys):
        hooks.pop(key, None)
        hidden.discard(key)
    if not hidden:
        vars(hooks).clear()


def remove_hooks(module: nn.Module) -> None:
    """Take the hooks of every :class:`AttentionTransfer` out of a module and all within it.

    For a network whose ``at`` is lost, so that ``at.remove()`` cannot be called. Other hooks stay.

    Args:
        module: any module, hooked or not.

    Raises:
        TypeError: ``module`` is no ``nn.Module``.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {kind(module)}")
    for each in module.modules():
        for name, hooks in vars(each).items():
            if name.startswith("_forward_") and isinstance(hooks, OrderedDict):
                _take_out(hooks, vars(hooks).get("hidden", ()))
