"""An observed run of a network: which modules ran, and how their features lie.

A shape alone does not say where the channels of a feature are, nor which of N tokens are patches.
The operators that ran do: a convolution or a batch norm has its channels first, a linear layer or a
layer norm last; a convolution makes the grid that N tokens may fill; a concatenation says how many
tokens were put before and after these.
"""

from __future__ import annotations

import copy
import math
import re
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from at_fused._layouts import FeatureLayout
from at_fused._models import Arguments, evaluating, only_hooks_of, tensors_in, version_of

Size = tuple[int, ...]
Shape = tuple[int, ...]

SEVERAL_SIZES = "it gives maps of several sizes"
NOT_IN_ORDER = "its tokens do not lie as the image does (if they do, give skip_tokens)"

_CHANNELS_FIRST = re.compile(
    r"_?(conv(_transpose)?\dd|\w*pool\dd|(batch|instance|group)_norm|interpolate|upsample"
    r"|pixel_(un)?shuffle)"
)
_CHANNELS_LAST = re.compile(r"linear|(layer|rms)_norm|embedding")
_MOVES = ("flip", "fliplr", "flipud", "rot90", "roll", "einsum", "stack", "unbind")
_OF_ANY_RANK = ("GroupNorm", "SyncBatchNorm", "PReLU")
# More than class, distillation and register tokens: another level of features, or a prompt.
_MOST_EXTRA_TOKENS = 16
# Places where an image is changed to see a map follow, in parts of its time, height and width.
_PLACES, _HALF = ((0.2, 0.3, 0.8), (0.8, 0.6, 0.2)), 1 / 16


class GivenLayout(NamedTuple):
    """A user's word on the features of a side; None is to be found out."""

    channel_dim: int | None = None
    skip_tokens: int | None = None
    map_size: Size | None = None


@dataclass(eq=False)
class ModuleCall:
    """A module that ran: its inputs and outputs, and the modules that ran inside."""

    name: str
    module: nn.Module
    inside: list[ModuleCall] = field(default_factory=list)
    shapes_in: list[Shape] = field(default_factory=list)
    shapes: list[Shape] = field(default_factory=list)
    output: Callable[[], Tensor | None] = lambda: None
    layout: FeatureLayout | None = None
    size_in: Size | None = None
    reason: str = ""
    handed_on: bool = False  # its output is an input, unchanged
    takes_same_input: bool = False  # as the module around it
    ends_in_layer_norm: bool = False
    times: int = 1

    def all_inside(self) -> Iterator[ModuleCall]:
        for each in self.inside:
            yield each
            yield from each.all_inside()

    @property
    def size(self) -> Size | None:
        return self.layout.size(self.shapes[0]) if self.layout else None

    def described(self, channels: str = "") -> str:
        """Return the feature's shape, with the number of its channels or another word for it."""
        assert self.layout
        channel_dim, skip, tokens = self.layout
        sides = ["L"] if len(self.shapes[0]) == 3 else ["T", "H", "W"][5 - len(self.shapes[0]) :]
        if tokens:
            sides = [f"{skip}+{math.prod(tokens)}" if skip else "N"]
        channels = channels or str(self.shapes[0][channel_dim])
        dims = [channels, *sides] if channel_dim == 1 else [*sides, channels]
        return f"(B, {', '.join(dims)})"

    def weighs(self) -> bool:
        """Return True for a convolution, a linear layer, or a layer with a weight like theirs."""
        if isinstance(self.module, (nn.Linear, nn.modules.conv._ConvNd)):
            return True
        return not self.inside and any(p.dim() > 1 for p in self.module.parameters(recurse=False))

    def layers(self) -> int:
        """Count the convolutions and linear layers."""
        return sum(each.weighs() for each in self.all_inside()) or self.weighs()

    def learned(self) -> bool:
        return bool(list(self.module.parameters()))

    def depth(self) -> int:
        """Count the levels of layers with parameters inside: 0 for a layer, 1 for conv and norm."""
        return max((1 + each.depth() for each in self.inside if each.learned()), default=0)


class ObservedRun(TorchFunctionMode):
    """The calls of a network's modules in a run, and the evidence of its operators."""

    def __init__(self, model: nn.Module, arguments: Arguments, given: GivenLayout) -> None:
        super().__init__()
        self.arguments, self.given = arguments, given
        # The shapes that operators made, with their channels first or last.
        self.channels_first, self.channels_last = set[Shape](), set[Shape]()
        self.grids: dict[int, Size] = {}  # by their number of positions
        self.finest: Size = ()
        self.concatenated: dict[int, list[list[int]]] = {}  # the lengths of the parts, by their sum
        # A channel of the first sample's maps, by the number of positions; the numbers of tokens
        # that were seen to be one, row by row; and what may have brought them into another order.
        self.planes: dict[int, list[Tensor]] = {}
        self.row_by_row = set[int]()
        self.permuted: list[Shape] = []
        self.gathered = self.moved = False
        inputs = [x for x in tensors_in(arguments) if x.dim() > 0]
        if not inputs:
            raise TypeError("example, or a batch in its place, must hold a tensor, got none")
        main = max(inputs, key=lambda x: (x.dim() > 1, x.numel()))
        # Images, as detectors take them.
        listed = len(arguments[0]) > 0 and isinstance(arguments[0][0], list) and main.dim() == 3
        self.batch = len(inputs) if listed else main.shape[0]
        images = [x for x in inputs if x.dim() > 3]
        self.image: Size = tuple(images[0].shape[2:]) if images else ()
        self.inputs = {tuple(x.shape) for x in images}
        self.lengths = {n for x in inputs if 2 <= x.dim() <= 3 and not listed for n in x.shape[1:]}
        self.convolved = False
        self.root = ModuleCall("", model)
        self.calls: dict[str, ModuleCall] = {}

    # ---- while it runs ---------------------------------------------------------------------------

    def hook_modules(self) -> list[RemovableHandle]:
        """Note the calls of all modules, until these handles are removed."""
        stack = [(self.root, dict[int, int]())]

        def before(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
            inputs = list(tensors_in([args, kwargs]))
            made = ModuleCall(name, module, shapes_in=[tuple(x.shape) for x in inputs])
            made.times = self.calls[name].times + 1 if name in self.calls else 1
            self.calls[name] = made
            parent, of_parent = stack[-1]
            made.takes_same_input = any(id(x) in of_parent for x in inputs)
            parent.inside.append(made)
            stack.append((made, {id(x): version_of(x) for x in inputs}))

        def after(module: nn.Module, args: Any, output: Any) -> None:
            made, versions = stack.pop()
            outputs = list(tensors_in(output)) if isinstance(output, (Tensor, tuple, list)) else []
            made.shapes = [tuple(x.shape) for x in outputs]
            if outputs:
                made.handed_on = versions.get(id(outputs[0])) == version_of(outputs[0])
                last = made.inside[-1] if made.inside else None
                if last and (last.ends_in_layer_norm or isinstance(last.module, nn.LayerNorm)):
                    made.ends_in_layer_norm = last.output() is outputs[0]
                made.output = weakref.ref(outputs[0])

        handles = []
        for name, module in self.root.module.named_modules():
            if name and not isinstance(module, torch.jit.ScriptModule):
                begin = module.register_forward_pre_hook(partial(before, name), with_kwargs=True)
                handles += [begin, module.register_forward_hook(after)]
        return handles

    def find_layouts(self) -> None:
        """Find how the features of all modules lie."""
        for each in self.root.all_inside():
            each.layout, each.reason = self._layout(each)
            sizes = (y.size(s) for s in each.shapes_in if (y := self.layout_of(s)[0]))
            each.size_in = next(sizes, None)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if isinstance(result, Tensor) and result.dim() > 2:
            shape = tuple(result.shape)
            if _CHANNELS_FIRST.fullmatch(name):
                self._note_image(name, args)
                self.channels_first.add(shape)
                self._note_grid(result)
            elif _CHANNELS_LAST.fullmatch(name):
                self.channels_last.add(shape)
            elif name in ("cat", "concat", "concatenate"):
                self._note_concatenation(args, kwargs or {}, shape)
            self._note_order(name, args, result)
        return result

    def _note_image(self, name: str, args: Any) -> None:
        # A network may resize what it is given, or take it from a list.
        if not self.convolved and name.startswith("conv") and args:
            self.convolved = True
            if args[0].dim() > 3:
                self.image = tuple(args[0].shape[2:])
                self.inputs.add(tuple(args[0].shape))

    def _note_grid(self, made: Tensor) -> None:
        size = tuple(made.shape[2:])
        count = math.prod(size)
        if count > max(1, math.prod(self.finest)):
            self.finest = size
        if made.shape[0] != self.batch:
            return
        if len(size) == 1:
            self.lengths.add(count)
        elif count > 1 and self.like_image(size):
            self.grids.setdefault(count, size)
            plane = made.detach()[0, 0].flatten().clone()
            if plane.min() != plane.max():  # of a blank image any order is the same
                self.planes[count] = [*self.planes.get(count, [])[-2:], plane]

    def _note_order(self, name: str, args: Any, result: Tensor) -> None:
        shape = tuple(result.shape)
        if name in ("permute", "movedim", "transpose", "swapaxes") and len(shape) > 3:
            self.permuted.append(shape)
        index = args[1] if name == "__getitem__" else ()
        parts = index if type(index) is tuple else [index]
        steps = any(isinstance(i, slice) and i.step not in (None, 1) for i in parts)
        fancy = any(hasattr(i, "__len__") for i in parts)
        if fancy or name in ("gather", "index_select", "take_along_dim"):
            self.gathered |= shape[0] == self.batch
        elif steps or name in _MOVES:
            self.moved |= shape[0] == self.batch
        for x in tensors_in(list(args[:2])):
            if x.dim() == 3 and x.shape[1] in self.planes and x.shape[1] not in self.row_by_row:
                row = x.detach()[0, :, 0]
                if any(torch.equal(row, plane) for plane in self.planes[x.shape[1]]):
                    self.row_by_row.add(x.shape[1])

    def _note_concatenation(self, args: Any, kwargs: dict[str, Any], shape: Shape) -> None:
        parts = args[0] if args else kwargs["tensors"]
        dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
        dim %= len(shape)
        of_one_rank = all(part.dim() == len(shape) for part in parts)
        if shape[0] == self.batch and 0 < dim < len(shape) - 1 and of_one_rank:
            sizes = [part.shape[dim] for part in parts]
            self.concatenated.setdefault(shape[dim], []).append(sizes)
            self.moved |= len(shape) == 3 and sorted(sizes)[-2:][0] > _MOST_EXTRA_TOKENS

    # ---- layouts ---------------------------------------------------------------------------------

    def like_image(self, size: Size) -> bool:
        """Return False for a map of another shape than the image's: channels taken for a side."""
        if len(self.image) < 2 or len(size) < 2:
            return True
        (h, w), (height, width) = size[-2:], self.image[-2:]
        return abs(h * width - w * height) <= max(height, width)

    def layout_of_layer(self, side: str, name: str) -> FeatureLayout:
        """Return the layout of a layer that was named; a ValueError for one that is not known."""
        made = self.calls.get(name)
        if made is None:
            why = "it did not run"
        elif made.layout is None:
            shapes = ", ".join(map(str, made.shapes)) or "no tensor"
            why = made.reason or f"it gives {shapes}, which is no feature"
        elif not self.in_order(made):
            why = NOT_IN_ORDER
        else:
            return made.layout
        raise ValueError(f"layers: the {side}'s {name!r} has no map that is known: {why}")

    def _layout(self, made: ModuleCall) -> tuple[FeatureLayout | None, str]:
        """Return the layout of the first of a module's outputs, or why it is not known."""
        found = [self.layout_of(shape) for shape in made.shapes]
        each = zip(found, made.shapes, strict=True)
        if len({layout.size(shape) for (layout, _), shape in each if layout}) > 1:
            return None, SEVERAL_SIZES
        return found[0] if found else (None, "")

    def layout_of(self, shape: Shape) -> tuple[FeatureLayout | None, str]:
        """Return the layout of a feature of this shape, or why it is not known."""
        if not 3 <= len(shape) <= 5 or shape[0] != self.batch:
            turned = len(shape) == 3 and shape[1] == self.batch and shape in self.channels_last
            return None, f"its batch does not come first in {shape}" if turned else ""
        if shape in self.inputs:
            return FeatureLayout(), ""
        channel_dim = self.given.channel_dim or self._channel_dim(shape)
        if channel_dim is None:
            return None, f"where its channels are, of shape {shape}, is not known: give channel_dim"
        size = shape[2:] if channel_dim == 1 else shape[1:-1]
        if math.prod(size) == 1:
            return None, "it has a single position"
        if channel_dim == -1 and len(shape) == 3:
            return self._tokens(size[0])
        if len(size) == 1 and self._patches(size[0])[0]:
            return None, f"its {size[0]} tokens come after its channels"
        if not self.like_image(size):
            sizes = f"{written(size)} for an image of {written(self.image)}"
            return None, f"its maps would be {sizes}, with channel_dim={channel_dim}"
        return FeatureLayout(channel_dim), ""

    def _channel_dim(self, shape: Shape) -> int | None:
        """Return it as operators made the shape, else its channels and positions, or these."""
        if len(shape) == 4 and len(set(shape[1:])) == 1 and shape in self.channels_last:
            return None  # it may have been turned since
        lies = [(s[1], s[2:]) for s in self.channels_first] + [
            (s[-1], s[1:-1]) for s in self.channels_last
        ]
        counts = {(channels, math.prod(size)) for channels, size in lies}
        sizes = {size for _, size in lies} if len(shape) > 3 else set[Size]()
        first, last = (shape[1], shape[2:]), (shape[-1], shape[1:-1])
        joined = (
            len(shape) == 3 and shape[1] in self.concatenated and bool(self._patches(shape[1])[1])
        )
        for is_first, is_last in (
            (shape in self.channels_first, shape in self.channels_last),
            ((first[0], math.prod(first[1])) in counts, (last[0], math.prod(last[1])) in counts),
            (first[1] in sizes, last[1] in sizes),
            (False, joined),
        ):
            if is_first or is_last:
                return None if is_first and is_last else 1 if is_first else -1
        return None

    def _tokens(self, count: int) -> tuple[FeatureLayout | None, str]:
        """Return the layout of N tokens: which of them are patches, and the map of these."""
        given = self.given.skip_tokens
        if given is None:
            before, size, after = self._patches(count)
        elif given < count:
            before, size, after = given, self._grid(count - given) or (count - given,), 0
        else:
            return None, f"skip_tokens={given} leaves none of its {count} tokens"
        if size is None:
            return None, f"which of its {count} tokens are patches is not known: give skip_tokens"
        if after:
            return None, f"the last {after} of its {count} tokens are no patches"
        return (FeatureLayout(-1, before, size), "") if math.prod(size) > 1 else (None, "")

    def _patches(self, count: int) -> tuple[int, Size | None, int]:
        """Return the number of tokens before the patches, the grid of these, the number after."""
        if count in self.grids:
            return 0, self.grids[count], 0
        for sizes in self.concatenated.get(count, ()):
            most = max(sizes)
            where = sizes.index(most)
            before, after = sum(sizes[:where]), sum(sizes[where + 1 :])
            if before + after <= _MOST_EXTRA_TOKENS and most < count:
                inner, size, rest = self._patches(most)
                if size:
                    return before + inner, size, rest + after
        return 0, self._grid(count), 0

    def _grid(self, count: int) -> Size | None:
        """Return the grid of so many positions, or a coarser one of the same proportions."""
        if not self.image:  # words, or a signal
            return (count,) if count in self.lengths else None
        if count in self.grids or len(self.image) != 2 or self.gathered:
            return self.grids.get(count)
        height, width = self.finest if len(self.finest) == 2 else self.image
        for step in range(1, min(height, width)):
            h, w = -(-height // step), -(-width // step)
            if h * w == count:
                return h, w
        return None

    # ---- the order of tokens ---------------------------------------------------------------------

    def in_order(self, made: ModuleCall) -> bool:
        """Return False for tokens that do not lie as the image does.

        Some networks have as many tokens as patches, but in an order of their own. If the operators
        leave a doubt, the map has to change most where the image does.
        """
        size = made.layout.map_size if made.layout else None
        if self.given.skip_tokens is not None or not made.layout or not size or len(size) == 1:
            return True
        count, sides = math.prod(size), set(size)
        own = {count, count + made.layout.skip_tokens}
        others = [shape for shape in self.permuted if own.isdisjoint(shape)]
        turned = any(len(shape) > 4 or sides <= set(shape[1:]) for shape in others)
        if count in self.row_by_row and not (turned or self.gathered or self.moved):
            return True
        before = self.feature(made, self.arguments).float()
        for place in _PLACES:
            after = self.feature(made, _changed(self.arguments, place)).float()
            change = (after - before).square().sum((0, 2))[made.layout.skip_tokens :].view(size)
            most = torch.unravel_index(change.argmax(), size)
            places = zip(most, size, place[-len(size) :], strict=True)
            near = [abs((int(i) + 0.5) / n - part) <= _HALF + 0.6 / n for i, n, part in places]
            if change.any() and not all(near):
                return False
        return True

    def feature(self, made: ModuleCall, arguments: Arguments) -> Tensor:
        """Return the feature of a module in another run."""
        found: list[Tensor] = []
        handle = made.module.register_forward_hook(
            lambda module, args, output: found.append(next(tensors_in(output)).clone())
        )
        try:
            run(self.root.module, arguments)
        finally:
            handle.remove()
        return found[-1]


def _changed(arguments: Arguments, place: tuple[float, ...]) -> Arguments:
    """Return a network's arguments with other pixels at a place of the images."""
    copies: dict[int, Any] = {id(x): x.detach().clone() for x in tensors_in(arguments)}
    changed = copy.deepcopy(arguments, copies)
    for pixels in tensors_in(changed):
        if pixels.dim() > 3 and pixels.is_floating_point():
            if pixels.dim() == 5 and pixels.shape[2] in (1, 3) and pixels.shape[1] not in (1, 3):
                pixels = pixels.transpose(1, 2)  # a video whose time comes before the colours
            for dim, part in zip(range(2, pixels.dim()), place[2 - pixels.dim() :], strict=True):
                n = pixels.shape[dim]
                first, last = int((part - _HALF) * n), math.ceil((part + _HALF) * n)
                pixels = pixels.narrow(dim, first, last - first)
            pixels.mul_(-1).add_(1)
            break
    return changed


def observe(model: nn.Module, arguments: Arguments, given: GivenLayout) -> ObservedRun:
    """Run a network on an example, and find how its features lie."""
    observed = ObservedRun(model, arguments, given)
    handles = observed.hook_modules()
    try:
        with observed:
            run(model, arguments)
    finally:
        for handle in handles:
            handle.remove()
    observed.find_layouts()
    return observed


def run(model: nn.Module, arguments: Arguments) -> None:
    """Run a network, in eval mode, without gradients and torch.compile, and leave it as it was."""
    devices = {x.device for x in tensors_in(arguments) if x.is_cuda}
    buffers = [(x, x.clone(), version_of(x)) for x in model.buffers()]
    with (
        torch.random.fork_rng(devices),
        torch.compiler.set_stance("force_eager"),
        evaluating(model),
        only_hooks_of(model),  # which has none of ours
    ):
        model(*arguments[0], **arguments[1])
        for x, before, version in buffers:
            if version_of(x) != version:
                x.copy_(before)


def rank_of_maps(module: nn.Module) -> int | None:
    """Return the rank of features that certainly have their channels first, None for others.

    Those of torch's own convolutions, norms and poolings, but for the ones of one dimension,
    through which tokens go as well. A forward of one's own may put channels last.
    """
    ranks = set[int]()
    for each in module.modules():
        if not type(each).forward.__module__.startswith("torch.nn.modules"):
            return None
        # Torch's own class that the module is of, or is made from.
        classes = (c for c in type(each).__mro__ if c.__module__.startswith("torch.nn.modules"))
        name = next(classes, nn.Module).__name__
        if spatial := re.match(r"(?:Lazy)?\w*(?:Conv|Norm|Pool)\w*?([123])d", name):
            ranks.add(int(spatial[1]) + 2)
        elif name not in _OF_ANY_RANK and list(each.parameters(recurse=False)):
            return None
    return ranks.pop() if len(ranks) == 1 and 3 not in ranks else None


def written(size: Size) -> str:
    """Write a map size, for messages."""
    return "x".join(map(str, size))
