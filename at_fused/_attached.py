"""Hooks in modules of others: no part of copies and pickles, and never missed by torch.compile.

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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from types import FunctionType
from typing import Any, ClassVar

from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.hooks import RemovableHandle


class Hook:
    """A hook of this package."""

    # Whose hooks alone act, in a pass that is not the user's; None where all do.
    acting: ClassVar[object] = None

    @property
    def __name__(self) -> str:
        # torch.jit.script asks a hook for its name, in order to compile it.
        raise AttributeError(
            "torch.jit.script cannot compile the hooks of AttentionTransfer: call at.remove() "
            "before, or script copy.deepcopy(network), which has no hooks"
        )


@contextmanager
def acting(owner: object) -> Iterator[None]:
    """Let the hooks of one owner act alone."""
    before, Hook.acting = Hook.acting, owner
    try:
        yield
    finally:
        Hook.acting = before


class Attached:
    """A hook in a module; a copy of it, and of the module, has the hook in the module's copy."""

    def __init__(self, module: nn.Module, handle: RemovableHandle, network: nn.Module) -> None:
        self.module, self.handle = module, handle
        parents = [each for each in network.modules() if module in each.children()]
        self.marked = parents if _by_parent(module) and parents else [module]
        self._settle(self.places().values())

    def places(self) -> dict[str, OrderedDict[int, Any]]:
        """Return the module's dicts that have something of the hook, by their names."""
        return _places(self.module, self.handle.id)

    def _settle(self, places: Iterable[OrderedDict[int, Any]]) -> None:
        for hooks in places:
            _leave_out(hooks, self.handle.id)
        for each in self.marked:
            # Some modules have a class that is theirs alone, and ways of their own to change it.
            alone = isinstance(each, fx.GraphModule) or is_parametrized(each)
            if not (alone or isinstance(each, _Hooked) or _asks_for_its_class(type(each))):
                own: Any = type(each)
                _set_class(each, _hooked_class(own))

    def is_guarded(self) -> bool:
        """Return True where code that was compiled for the module without hooks does not run."""
        return all(_own_class(each) is not type(each) for each in self.marked)

    def __getstate__(self) -> dict[str, Any]:
        places = []
        for name, hooks in self.places().items():
            keys, key = list(hooks), self.handle.id
            places.append((name, hooks, hooks[key], keys[keys.index(key) + 1 :]))
        return {**vars(self), "places": places}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.module, self.handle, self.marked = (state[n] for n in ("module", "handle", "marked"))
        settled = []
        for name, copied, hook, later in state["places"]:
            # A module that holds what holds this object has no attributes yet.
            hooks = vars(self.module).get(name, copied)
            hooks[self.handle.id] = hook
            for key in later:
                if key in hooks:
                    hooks.move_to_end(key)
            settled.append(hooks)
        self._settle(settled)

    def remove(self) -> None:
        """Take the hook away."""
        _take_out(self.module, self.handle.id)
        _unmark(self.marked)


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
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    for each in module.modules():
        for key in _ours(each):
            _take_out(each, key)
    _unmark(module.modules())


def _ours(module: nn.Module) -> list[int]:
    found = (vars(module).get(name, {}) for name in ("_forward_hooks", "_forward_pre_hooks"))
    return [key for hooks in found for key, hook in hooks.items() if isinstance(hook, Hook)]


def _places(module: nn.Module, key: int) -> dict[str, OrderedDict[int, Any]]:
    items = vars(module).items()
    return {name: d for name, d in items if name.startswith("_forward_") and key in d}


def _take_out(module: nn.Module, key: int) -> None:
    for hooks in _places(module, key).values():
        del hooks[key]
        left_out = vars(hooks).get("left_out", set())
        left_out.discard(key)
        if not left_out:
            vars(hooks).clear()


def _by_parent(module: nn.Module) -> bool:
    return is_parametrized(module) or not list(module.children())


def _unmark(modules: Iterable[nn.Module]) -> None:
    for each in modules:
        if not any(map(_ours, (each, *filter(_by_parent, each.children())))):
            _set_class(each, _own_class(each))


def _leave_out(hooks: OrderedDict[int, Any], key: int) -> None:
    """Make copies and pickles of a dict of hooks do without one of them."""
    mine, this = vars(hooks), weakref.ref(hooks)

    def rest() -> OrderedDict[int, Any]:
        return OrderedDict((k, h) for k, h in (this() or {}).items() if k not in mine["left_out"])

    if not mine:
        mine["left_out"] = set()
        mine["__deepcopy__"] = lambda memo: copy.deepcopy(rest(), memo)
        mine["__reduce_ex__"] = lambda protocol: rest().__reduce_ex__(protocol)
    mine["left_out"].add(key)


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
        function, *arguments = map(_plain, (function, *arguments))
        return function, tuple(arguments), *rest


def _plain(cls: Any) -> Any:
    """Return the module's own class for that of a hooked module, anything else as it is."""
    return cls.__bases__[1] if _Hooked in getattr(cls, "__bases__", ()) else cls


def _own_class(module: nn.Module) -> type:
    found: type = _plain(type(module))
    return found


def _set_class(module: nn.Module, cls: type) -> None:
    if type(module) is not cls:
        object.__setattr__(module, "__class__", cls)


@cache  # or what was compiled for one student would not serve the next
def _hooked_class(own: type) -> type:
    names: dict[str, Any] = {n: getattr(own, n) for n in ("__module__", "__qualname__", "__doc__")}

    def deepcopy(self: Any, memo: Any) -> Any:
        cls = type(self)
        _set_class(self, _plain(cls))
        try:
            return own.__deepcopy__(self, memo)  # type: ignore[attr-defined]
        finally:
            _set_class(self, cls)

    if hasattr(own, "__deepcopy__"):
        names["__deepcopy__"] = deepcopy
    return type(own)(own.__name__, (_Hooked, own), names)
