"""Tapped networks: hooks on a user's modules, and the maps that they computed in the last pass.

Copies and pickles of a module leave these hooks out, because a copied hook would have lost its
AttentionTransfer. An AttentionTransfer that is copied with its networks adds hooks to the copies.
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
from at_fused._numbers import type_name
from at_fused._observe import LayoutOverrides, channels_first_rank, observe
from at_fused._options import LossArguments


class TappedLayer(NamedTuple):
    """A layer to tap; its layout is None until a run reveals it."""

    name: str
    module: nn.Module
    layout: FeatureLayout | None = None


class LastPass:
    """The state of a network's last pass, written by its hooks."""

    def __init__(self) -> None:
        self.maps: dict[str, Tensor] = {}  # by layer
        self.grad_mode = True
        # The inputs of the last two passes, if they began after the maps were last taken.
        self.inputs: list[list[weakref.ref[Tensor]]] = []
        # While layouts are unknown: features, with their maps if channels come first, and the
        # arguments of the pass, for a run that infers the layouts.
        self.needs_layouts = False
        self.features: dict[str, tuple[Tensor, Tensor]] = {}
        self.arguments: Arguments | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Maps and features belong to a graph, which copies do not share.
        return {**vars(LastPass()), "needs_layouts": self.needs_layouts}

    def ignores_pass(self) -> bool:
        """Return True in passes for another owner's hooks, and in a trace or an export."""
        if torch.jit.is_tracing() or getattr(torch.compiler, "_is_exporting_flag", False):
            return True  # in older releases is_exporting() is also True while compiling
        return not (Hook.acting is None or Hook.acting is self)


def _in_backward() -> bool:
    """Return True during a backward pass, in which checkpointing recomputes layers."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


# ---- the two hooks -------------------------------------------------------------------------------


class BeginPass(Hook):
    """A forward pre-hook of the network that clears the state of the previous pass."""

    def __init__(self, last: LastPass) -> None:
        self.last_pass = last

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        last = self.last_pass
        if last.ignores_pass() or _in_backward():
            return
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "AttentionTransfer does not work in nn.DataParallel with several devices; use "
                "nn.parallel.DistributedDataParallel, with one process per device"
            )
        last.maps.clear()
        last.features.clear()
        last.grad_mode = torch.is_grad_enabled()
        last.arguments = (args, kwargs) if last.needs_layouts else None
        if torch.compiler.is_compiling():  # it cannot trace weak references
            last.inputs = []
        else:
            inputs = [weakref.ref(x) for x in tensors_in((args, kwargs))]
            last.inputs = [*last.inputs[-1:], inputs]


class LayerTap(Hook):
    """A forward hook of a layer that taps its output.

    A convolution evicts Python's code from the CPU caches, so each line here is slow: the options
    are checked when the hook is made, not in each pass.
    """

    def __init__(
        self, layer: TappedLayer, last: LastPass, overrides: LayoutOverrides, options: LossArguments
    ) -> None:
        self.name, self.layout, self.last_pass = layer.name, layer.layout, last
        self.collapse, self.absolute = options.collapse, options.absolute
        self.channelwise = options.attend == "channel"
        is_channels_last = overrides.channel_dim == -1
        self.channels_first_rank = None if is_channels_last else channels_first_rank(layer.module)
        # torch.compile with dynamic=True makes a variable of a float, a constant of a string.
        self.p = repr(float(options.p))
        self.grad_mode = True  # during the layer's last run

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        last = self.last_pass
        if last.ignores_pass():
            return None
        x = output[0] if isinstance(output, (tuple, list)) and output else output
        if not isinstance(x, Tensor):
            if isinstance(x, fx.Proxy):
                return None  # symbolic_trace records the network without taps
            raise TypeError(
                f"layer {self.name!r} ({type(module).__name__}) must return a tensor, or a tuple "
                f"that begins with one, got {type_name(output)}; name a module inside it that does"
            )
        check_feature(f"the output of layer {self.name!r}", x)
        # A feature of unknown layout is tapped as well, because a checkpoint taps it when it
        # recomputes the layer in the backward pass, after the map was used.
        y, q = self.tap(x)
        if not _in_backward():
            self.grad_mode = torch.is_grad_enabled()
            if self.layout is None and x.dim() != self.channels_first_rank:
                # Clone a constant, which the next layer may change in place.
                last.features[self.name] = y if y.requires_grad else y.clone(), q
            else:
                last.maps[self.name] = q
        if y is x or x is output:
            return None if y is x else y
        rest = (y, *output[1:])
        return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)

    def tap(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the feature that replaces x, and its map."""
        layout = FeatureLayout(*self.layout[:2]) if self.layout else CHANNELS_FIRST
        feature = layout.to_channels_first(x, f"layer {self.name!r}")
        size = feature.shape[1:2] if self.channelwise else feature.shape[2:]
        y, q = _maps.attention_tap(
            x, float(self.p), self.collapse, self.absolute, layout, self.channelwise
        )
        return y, q.view(x.shape[0], *size)


# ---- a network with its hooks --------------------------------------------------------------------


class TappedNetwork:
    """A network with hooks on its layers.

    The layouts of named layers are inferred in one more run, on the arguments of the first pass.
    Convolutions and their norms need no such run, because their channels come first.
    """

    def __init__(
        self,
        side: str,
        model: nn.Module,
        layers: Sequence[TappedLayer],
        overrides: LayoutOverrides,
        options: LossArguments,
    ) -> None:
        self.side, self.model, self.layers, self.overrides = side, model, layers, overrides
        network, self.last_pass = unwrap(model), LastPass()
        self.taps = [LayerTap(layer, self.last_pass, overrides, options) for layer in layers]
        self.last_pass.needs_layouts = any(
            tap.layout is None and tap.channels_first_rank is None for tap in self.taps
        )
        begin = BeginPass(self.last_pass)
        self.hooks: list[Hook] = [begin, *self.taps]
        self.handles = [network.register_forward_pre_hook(begin, with_kwargs=True)]
        for tap, layer in zip(self.taps, layers, strict=True):
            self.handles.append(layer.module.register_forward_hook(tap))
        for handle in self.handles:
            _hide_from_copies(handle)

    def __getstate__(self) -> dict[str, Any]:
        # A copied handle refers to the copies of its hook dicts, which the copied modules share.
        orders = [list(next(_hook_dicts(handle), ())) for handle in self.handles]
        return {**vars(self), "orders": orders}

    def __setstate__(self, state: dict[str, Any]) -> None:
        orders = state.pop("orders")
        vars(self).update(state)
        for handle, hook, order in zip(self.handles, self.hooks, orders, strict=True):
            if handle.id not in order:  # the hook was removed
                continue
            hooks, with_kwargs, *_ = _hook_dicts(handle)
            hooks[handle.id] = hook
            if isinstance(hook, BeginPass):
                with_kwargs[handle.id] = True
            for key in filter(hooks.__contains__, order[order.index(handle.id) + 1 :]):
                hooks.move_to_end(key)
            _hide_from_copies(handle)

    def take_maps(self, batch: Any) -> list[Tensor]:
        """Return the maps of the last forward pass, on this batch, and clear them."""
        last = self.last_pass
        if last.features:
            self._infer_layouts(batch)
        maps, last.maps = last.maps, {}
        (*earlier, latest), last.inputs = last.inputs or [[]], []
        # A tensor that no pass received is ignored: networks get moved, cropped or resized copies.
        missing = {id(x) for x in tensors_in(batch)} - {id(ref()) for ref in latest}
        if any(id(ref()) in missing for inputs in earlier for ref in inputs):
            raise RuntimeError(
                f"AttentionTransfer: x must be the input of the {self.side}'s last pass, got the "
                f"input of an earlier one; call at(x) after each {self.side}(x)"
            )
        for name, module, _ in self.layers:
            if name not in maps:
                raise RuntimeError(self._explain_missing_map(name, module))
            if maps[name].shape[1:].numel() == 1:
                raise ValueError(
                    f"layers: the map of the {self.side}'s layer {name!r} has a single element, "
                    "which is always 1; name an earlier layer"
                )
        return [maps[layer.name] for layer in self.layers]

    def _infer_layouts(self, batch: Any) -> None:
        """Infer the layouts from another run, and compute the maps of the stored features."""
        last = self.last_pass
        features, last.features = last.features, {}
        arguments, last.arguments = last.arguments or arguments_of(batch), None
        run = observe(unwrap(self.model), arguments, self.overrides)
        layouts = [run.layout_of_layer(self.side, tap.name) for tap in self.taps]
        for tap, layout in zip(self.taps, layouts, strict=True):
            tap.layout = layout
            if tap.name in features:
                feature, q = features[tap.name]
                last.maps[tap.name] = q if layout.channel_dim == 1 else tap.tap(feature)[1]
        last.needs_layouts = False

    def _explain_missing_map(self, name: str, module: nn.Module) -> str:
        message = f"AttentionTransfer: the {self.side}'s layer {name!r} returned no map: "
        if dict(unwrap(self.model).named_modules()).get(name) is not module:
            return message + "it was replaced after AttentionTransfer was created; do so before"
        if not any(hook in self.hooks for hook in module._forward_hooks.values()):
            return message + "its hook was removed, for example by at.remove()"
        return message + (
            f"it did not run. Call the {self.side} itself, not its forward, before each at(x). In "
            "a GraphModule, name a layer that its graph calls. If torch.compile compiled it or a "
            "copy before it had hooks, set torch._dynamo.config.skip_nnmodule_hook_guards = False "
            "and call torch._dynamo.reset()"
        )

    def token_size(self, i: int) -> Sequence[int]:
        """Return the map size of a layer's tokens, or () if its features are not tokens."""
        layout = self.taps[i].layout
        return (layout and layout.map_size) or ()

    def skip_tokens(self) -> int:
        """Return the largest number of tokens that a layer's map leaves out."""
        return max(tap.layout.skip_tokens if tap.layout else 0 for tap in self.taps)

    def check_graph(self, maps: list[Tensor]) -> None:
        """Raise if a layer ran without gradients, but its part of the network is trained."""
        network = unwrap(self.model)
        for tap, q in zip(self.taps, maps, strict=True):
            if torch.is_grad_enabled() and not (q.requires_grad or tap.grad_mode):
                part = tap.name.partition(".")[0] if self.last_pass.grad_mode else ""
                if any(p.requires_grad for p in network.get_submodule(part).parameters()):
                    raise RuntimeError(
                        f"AttentionTransfer: the map of the {self.side}'s layer {tap.name!r} has "
                        "no graph, because it ran under no_grad or in a checkpoint. Checkpoint "
                        "with use_reentrant=False; to evaluate, call at(x) under no_grad too"
                    )

    def remove(self) -> None:
        """Remove the hooks, their maps and their features."""
        for handle in self.handles:
            for hooks in _hook_dicts(handle):
                _delete_hooks(hooks, [handle.id])
        self.last_pass.maps, self.last_pass.features, self.last_pass.arguments = {}, {}, None


# ---- hook dicts, copied without our hooks --------------------------------------------------------


def _hook_dicts(handle: RemovableHandle) -> Iterator[OrderedDict[int, Any]]:
    """Yield a module's dicts with an entry for the hook; the first holds the hook itself."""
    for ref in (handle.hooks_dict_ref, *handle.extra_dict_ref):
        if (hooks := ref()) is not None:
            yield hooks


def _hide_from_copies(handle: RemovableHandle) -> None:
    """Leave the hook out of copies and pickles of its module."""
    for hooks in _hook_dicts(handle):
        hidden = vars(hooks).setdefault("hidden", set())
        hidden.add(handle.id)
        visible = partial(_visible, weakref.ref(hooks), hidden)
        vars(hooks)["__deepcopy__"] = lambda memo, f=visible: copy.deepcopy(f(), memo)
        vars(hooks)["__reduce_ex__"] = lambda protocol, f=visible: f().__reduce_ex__(protocol)


def _visible(hooks: weakref.ref[OrderedDict[int, Any]], hidden: set[int]) -> OrderedDict[int, Any]:
    return OrderedDict((k, hook) for k, hook in (hooks() or {}).items() if k not in hidden)


def _delete_hooks(hooks: OrderedDict[int, Any], keys: Iterable[int]) -> None:
    hidden = vars(hooks).get("hidden", set())
    for key in list(keys):
        hooks.pop(key, None)
        hidden.discard(key)
    if not hidden:
        vars(hooks).clear()


def remove_hooks(module: nn.Module) -> None:
    """Remove the hooks of every :class:`AttentionTransfer` from a module and all its submodules.

    Use it when ``at`` is lost and ``at.remove()`` cannot be called. Other hooks stay.

    Args:
        module: any module, with or without hooks.

    Raises:
        TypeError: ``module`` is not an ``nn.Module``.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type_name(module)}")
    for each in module.modules():
        for name, hooks in vars(each).items():
            if name.startswith("_forward_") and isinstance(hooks, OrderedDict):
                _delete_hooks(hooks, vars(hooks).get("hidden", ()))
