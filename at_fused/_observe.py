"""Inference of feature layouts: run a network once and read the evidence of its operators.

A shape alone does not show where the channels of a feature are, or which of N tokens are patches.
The operators show it. A convolution or a batch norm has its channels first; a linear layer or a
layer norm has them last. A convolution makes the grid that N tokens may fill. A concatenation shows
how many tokens were added before and after the patches.
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

SEVERAL_SIZES = "it returns maps of several sizes"
NOT_IN_ORDER = "its tokens are not in the image's order (if they are, pass skip_tokens in Python)"

_CHANNELS_FIRST = re.compile(
    r"_?(conv(_transpose)?\dd|\w*pool\dd|(batch|instance|group)_norm|interpolate|upsample"
    r"|pixel_(un)?shuffle)"
)
_CHANNELS_LAST = re.compile(r"linear|(layer|rms)_norm|embedding")
_REORDERING = ("flip", "fliplr", "flipud", "rot90", "roll", "einsum", "stack", "unbind")
_RANK_AGNOSTIC = ("GroupNorm", "SyncBatchNorm", "PReLU")
# More than class, distillation and register tokens: other features, or a prompt.
_MAX_EXTRA_TOKENS = 16
# Centres and half the side length of the changed patches, as fractions of time, height and width.
_PROBES, _PROBE_RADIUS = ((0.2, 0.3, 0.8), (0.8, 0.6, 0.2)), 1 / 16


class LayoutOverrides(NamedTuple):
    """The layout options that a user passed for one network; None is inferred from a run."""

    channel_dim: int | None = None
    skip_tokens: int | None = None
    map_size: Size | None = None


@dataclass(eq=False)
class ModuleCall:
    """A call of a module: its inputs and outputs, and the calls inside it."""

    name: str
    module: nn.Module
    children: list[ModuleCall] = field(default_factory=list)
    input_shapes: list[Shape] = field(default_factory=list)
    output_shapes: list[Shape] = field(default_factory=list)
    output: Callable[[], Tensor | None] = lambda: None
    layout: FeatureLayout | None = None
    input_size: Size | None = None
    reason: str = ""  # why there is no layout
    returns_its_input: bool = False
    shares_input_with_parent: bool = False
    ends_in_layer_norm: bool = False
    count: int = 1

    def descendants(self) -> Iterator[ModuleCall]:
        for child in self.children:
            yield child
            yield from child.descendants()

    @property
    def size(self) -> Size | None:
        return self.layout.size(self.output_shapes[0]) if self.layout else None

    def format_shape(self, channels: str = "") -> str:
        """Return the feature's shape as text; ``channels`` replaces the number of channels."""
        assert self.layout
        shape, (channel_dim, skip, tokens) = self.output_shapes[0], self.layout
        sides = ["L"] if len(shape) == 3 else ["T", "H", "W"][5 - len(shape) :]
        if tokens:
            sides = [f"{skip}+{math.prod(tokens)}" if skip else "N"]
        channels = channels or str(shape[channel_dim])
        dims = [channels, *sides] if channel_dim == 1 else [*sides, channels]
        return f"(B, {', '.join(dims)})"

    def is_weight_layer(self) -> bool:
        """Return True for a convolution, a linear layer, or a layer with a weight like theirs."""
        if isinstance(self.module, (nn.Linear, nn.modules.conv._ConvNd)):
            return True
        return not self.children and any(p.dim() > 1 for p in self.module.parameters(recurse=False))

    def weight_layers(self) -> int:
        """Count the convolutions and linear layers."""
        return sum(c.is_weight_layer() for c in self.descendants()) or self.is_weight_layer()

    def has_parameters(self) -> bool:
        return bool(list(self.module.parameters()))

    def depth(self) -> int:
        """Count the levels of layers with parameters inside: 0 for a layer, 1 for conv and norm."""
        return max((1 + c.depth() for c in self.children if c.has_parameters()), default=0)


class ObservedRun(TorchFunctionMode):
    """The module calls of one run of a network, and the evidence that its operators gave."""

    def __init__(self, model: nn.Module, arguments: Arguments, overrides: LayoutOverrides) -> None:
        super().__init__()
        self.arguments, self.overrides = arguments, overrides
        # Shapes that operators with channels first, and with channels last, returned.
        self.channels_first, self.channels_last = set[Shape](), set[Shape]()
        self.grids: dict[int, Size] = {}  # by their number of positions
        self.finest_grid: Size = ()
        self.concatenations: dict[int, list[list[int]]] = {}  # lengths of the parts, by their sum
        # The evidence for the order of tokens: one channel of the first sample's maps by number of
        # positions, the numbers of tokens that matched one row by row, and operators that reorder.
        self.planes: dict[int, list[Tensor]] = {}
        self.row_by_row = set[int]()
        self.permuted_shapes: list[Shape] = []
        self.has_gather = self.has_reorder = False
        inputs = [x for x in tensors_in(arguments) if x.dim() > 0]
        if not inputs:
            raise TypeError("example (or the first batch) must contain a tensor, got none")
        main = max(inputs, key=lambda x: (x.dim() > 1, x.numel()))
        # Detectors take a list of images.
        is_list = len(arguments[0]) > 0 and isinstance(arguments[0][0], list) and main.dim() == 3
        self.batch_size = len(inputs) if is_list else main.shape[0]
        images = [x for x in inputs if x.dim() > 3]
        self.image_size: Size = tuple(images[0].shape[2:]) if images else ()
        self.image_shapes = {tuple(x.shape) for x in images}
        sequences = [x for x in inputs if 2 <= x.dim() <= 3 and not is_list]
        self.lengths = {n for x in sequences for n in x.shape[1:]}
        self.has_convolved = False
        self.root = ModuleCall("", model)
        self.calls: dict[str, ModuleCall] = {}

    # ---- during the run --------------------------------------------------------------------------

    def hook_modules(self) -> list[RemovableHandle]:
        """Record the calls of all modules until the returned handles are removed."""
        stack = [(self.root, dict[int, int]())]

        def before(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
            inputs = list(tensors_in([args, kwargs]))
            call = ModuleCall(name, module, input_shapes=[tuple(x.shape) for x in inputs])
            call.count = self.calls[name].count + 1 if name in self.calls else 1
            self.calls[name] = call
            parent, versions = stack[-1]
            call.shares_input_with_parent = any(id(x) in versions for x in inputs)
            parent.children.append(call)
            stack.append((call, {id(x): version_of(x) for x in inputs}))

        def after(module: nn.Module, args: Any, output: Any) -> None:
            call, versions = stack.pop()
            outputs = list(tensors_in(output)) if isinstance(output, (Tensor, tuple, list)) else []
            call.output_shapes = [tuple(x.shape) for x in outputs]
            if outputs:
                call.returns_its_input = versions.get(id(outputs[0])) == version_of(outputs[0])
                last = call.children[-1] if call.children else None
                if last and (last.ends_in_layer_norm or isinstance(last.module, nn.LayerNorm)):
                    call.ends_in_layer_norm = last.output() is outputs[0]
                call.output = weakref.ref(outputs[0])

        handles = []
        for name, module in self.root.module.named_modules():
            if name and not isinstance(module, torch.jit.ScriptModule):
                begin = module.register_forward_pre_hook(partial(before, name), with_kwargs=True)
                handles += [begin, module.register_forward_hook(after)]
        return handles

    def infer_layouts(self) -> None:
        """Infer the layout of every module's features."""
        for call in self.root.descendants():
            call.layout, call.reason = self._layout_of_call(call)
            sizes = (layout.size(s) for s in call.input_shapes if (layout := self.layout_of(s)[0]))
            call.input_size = next(sizes, None)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if isinstance(result, Tensor) and result.dim() > 2:
            shape = tuple(result.shape)
            if _CHANNELS_FIRST.fullmatch(name):
                self._record_image(name, args)
                self.channels_first.add(shape)
                self._record_grid(result)
            elif _CHANNELS_LAST.fullmatch(name):
                self.channels_last.add(shape)
            elif name in ("cat", "concat", "concatenate"):
                self._record_concatenation(args, kwargs or {}, shape)
            self._record_order(name, args, result)
        return result

    def _record_image(self, name: str, args: Any) -> None:
        # The network may resize its input, or take it from a list: the first convolution counts.
        if not self.has_convolved and name.startswith("conv") and args:
            self.has_convolved = True
            if args[0].dim() > 3:
                self.image_size = tuple(args[0].shape[2:])
                self.image_shapes.add(tuple(args[0].shape))

    def _record_grid(self, feature: Tensor) -> None:
        size = tuple(feature.shape[2:])
        count = math.prod(size)
        if count > max(1, math.prod(self.finest_grid)):
            self.finest_grid = size
        if feature.shape[0] != self.batch_size:
            return
        if len(size) == 1:
            self.lengths.add(count)
        elif count > 1 and self.has_image_proportions(size):
            self.grids.setdefault(count, size)
            plane = feature.detach()[0, 0].flatten().clone()
            if plane.min() != plane.max():  # a constant plane looks the same in any order
                self.planes[count] = [*self.planes.get(count, [])[-2:], plane]

    def _record_order(self, name: str, args: Any, result: Tensor) -> None:
        shape = tuple(result.shape)
        if name in ("permute", "movedim", "transpose", "swapaxes") and len(shape) > 3:
            self.permuted_shapes.append(shape)
        index = args[1] if name == "__getitem__" else ()
        parts = index if type(index) is tuple else [index]
        has_steps = any(isinstance(i, slice) and i.step not in (None, 1) for i in parts)
        has_indices = any(hasattr(i, "__len__") for i in parts)
        if has_indices or name in ("gather", "index_select", "take_along_dim"):
            self.has_gather |= shape[0] == self.batch_size
        elif has_steps or name in _REORDERING:
            self.has_reorder |= shape[0] == self.batch_size
        for x in tensors_in(list(args[:2])):
            if x.dim() == 3 and x.shape[1] in self.planes and x.shape[1] not in self.row_by_row:
                row = x.detach()[0, :, 0]
                if any(torch.equal(row, plane) for plane in self.planes[x.shape[1]]):
                    self.row_by_row.add(x.shape[1])

    def _record_concatenation(self, args: Any, kwargs: dict[str, Any], shape: Shape) -> None:
        parts = args[0] if args else kwargs["tensors"]
        dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
        dim %= len(shape)
        same_rank = all(part.dim() == len(shape) for part in parts)
        if shape[0] == self.batch_size and 0 < dim < len(shape) - 1 and same_rank:
            sizes = [part.shape[dim] for part in parts]
            self.concatenations.setdefault(shape[dim], []).append(sizes)
            self.has_reorder |= len(shape) == 3 and sorted(sizes)[-2:][0] > _MAX_EXTRA_TOKENS

    # ---- layouts ---------------------------------------------------------------------------------

    def has_image_proportions(self, size: Size) -> bool:
        """Return False for a map of other proportions: one side is then the channels."""
        if len(self.image_size) < 2 or len(size) < 2:
            return True
        (h, w), (height, width) = size[-2:], self.image_size[-2:]
        return abs(h * width - w * height) <= max(height, width)

    def layout_of_layer(self, side: str, name: str) -> FeatureLayout:
        """Return the layout of a named layer; raise a ValueError if it is unknown."""
        call = self.calls.get(name)
        if call is None:
            why = "it did not run"
        elif call.layout is None:
            shapes = ", ".join(map(str, call.output_shapes)) or "no tensor"
            why = call.reason or f"it returns {shapes}, which is not a feature"
        elif not self.is_in_image_order(call):
            why = NOT_IN_ORDER
        else:
            return call.layout
        raise ValueError(f"layers: cannot make a map of the {side}'s layer {name!r}: {why}")

    def _layout_of_call(self, call: ModuleCall) -> tuple[FeatureLayout | None, str]:
        """Return the layout of a call's first output, or the reason why it is unknown."""
        layouts = [self.layout_of(shape) for shape in call.output_shapes]
        pairs = zip(layouts, call.output_shapes, strict=True)
        if len({layout.size(shape) for (layout, _), shape in pairs if layout}) > 1:
            return None, SEVERAL_SIZES
        return layouts[0] if layouts else (None, "")

    def layout_of(self, shape: Shape) -> tuple[FeatureLayout | None, str]:
        """Return the layout of features with this shape, or the reason why it is unknown."""
        if not 3 <= len(shape) <= 5 or shape[0] != self.batch_size:
            batch_second = shape[1:-1] == (self.batch_size,) and shape in self.channels_last
            return None, f"the batch is not the first dimension of {shape}" if batch_second else ""
        if shape in self.image_shapes:
            return FeatureLayout(), ""
        channel_dim = self.overrides.channel_dim or self._channel_dim(shape)
        if channel_dim is None:
            return None, f"its channel axis in {shape} is unknown (in Python, pass channel_dim)"
        size = shape[2:] if channel_dim == 1 else shape[1:-1]
        if math.prod(size) == 1:
            return None, "its map has a single position"
        if channel_dim == -1 and len(shape) == 3:
            return self._token_layout(size[0])
        if len(size) == 1 and self._split_tokens(size[0])[0]:
            return None, f"its {size[0]} tokens come after its channels"
        if not self.has_image_proportions(size):
            sizes = f"{format_size(size)} for an image of {format_size(self.image_size)}"
            return None, f"its map would be {sizes} with channel_dim={channel_dim}"
        return FeatureLayout(channel_dim), ""

    def _channel_dim(self, shape: Shape) -> int | None:
        """Return the channel dimension, or None if it is unknown.

        Compares the shape with those that operators returned: the whole shape, else the numbers of
        channels and positions, else the spatial size. Else, concatenated tokens have channels last.
        """
        if len(shape) == 4 and len(set(shape[1:])) == 1 and shape in self.channels_last:
            return None  # a permutation of equal dimensions would not show
        splits = [(s[1], s[2:]) for s in self.channels_first] + [
            (s[-1], s[1:-1]) for s in self.channels_last
        ]
        counts = {(channels, math.prod(size)) for channels, size in splits}
        sizes = {size for _, size in splits} if len(shape) > 3 else set[Size]()
        first, last = (shape[1], shape[2:]), (shape[-1], shape[1:-1])
        is_tokens = len(shape) == 3 and shape[1] in self.concatenations
        is_tokens = is_tokens and bool(self._split_tokens(shape[1])[1])
        for is_first, is_last in (
            (shape in self.channels_first, shape in self.channels_last),
            ((first[0], math.prod(first[1])) in counts, (last[0], math.prod(last[1])) in counts),
            (first[1] in sizes, last[1] in sizes),
            (False, is_tokens),
        ):
            if is_first or is_last:
                return None if is_first and is_last else 1 if is_first else -1
        return None

    def _token_layout(self, count: int) -> tuple[FeatureLayout | None, str]:
        """Return the layout of N tokens: the patches among them, and the size of their map."""
        skip = self.overrides.skip_tokens
        if skip is None:
            before, size, after = self._split_tokens(count)
        elif skip < count:
            before, size, after = skip, self._grid(count - skip) or (count - skip,), 0
        else:
            return None, f"skip_tokens={skip} leaves none of its {count} tokens"
        if size is None:
            why = f"cannot tell which of its {count} tokens are patches"
            return None, f"{why} (in Python, pass skip_tokens)"
        if after:
            return None, f"the last {after} of its {count} tokens are not patches"
        return (FeatureLayout(-1, before, size), "") if math.prod(size) > 1 else (None, "")

    def _split_tokens(self, count: int) -> tuple[int, Size | None, int]:
        """Return the number of tokens before the patches, the patches' grid, the number after."""
        if count in self.grids:
            return 0, self.grids[count], 0
        for sizes in self.concatenations.get(count, ()):
            largest = max(sizes)
            i = sizes.index(largest)
            before, after = sum(sizes[:i]), sum(sizes[i + 1 :])
            if before + after <= _MAX_EXTRA_TOKENS and largest < count:
                inner, size, rest = self._split_tokens(largest)
                if size:
                    return before + inner, size, rest + after
        return 0, self._grid(count), 0

    def _grid(self, count: int) -> Size | None:
        """Return the grid with this many positions: a recorded one, or a coarser one."""
        if not self.image_size:  # text or a signal
            return (count,) if count in self.lengths else None
        if count in self.grids or len(self.image_size) != 2 or self.has_gather:
            return self.grids.get(count)
        height, width = self.finest_grid if len(self.finest_grid) == 2 else self.image_size
        for step in range(1, min(height, width)):
            h, w = -(-height // step), -(-width // step)
            if h * w == count:
                return h, w
        return None

    # ---- the order of tokens ---------------------------------------------------------------------

    def is_in_image_order(self, call: ModuleCall) -> bool:
        """Return False for tokens that are not in the row-major order of the image.

        Some networks have as many tokens as patches, but in another order. If the operators leave
        a doubt, the image is changed in two places: the map must change most there.
        """
        size = call.layout.map_size if call.layout else None
        if self.overrides.skip_tokens is not None or not call.layout or not size or len(size) == 1:
            return True
        count, sides = math.prod(size), set(size)
        token_counts = {count, count + call.layout.skip_tokens}
        others = [shape for shape in self.permuted_shapes if token_counts.isdisjoint(shape)]
        is_permuted = any(len(shape) > 4 or sides <= set(shape[1:]) for shape in others)
        if count in self.row_by_row and not (is_permuted or self.has_gather or self.has_reorder):
            return True
        before = self.run_again(call, self.arguments).float()
        for centre in _PROBES:
            after = self.run_again(call, _with_changed_patch(self.arguments, centre)).float()
            change = (after - before).square().sum((0, 2))[call.layout.skip_tokens :].view(size)
            most = torch.unravel_index(change.argmax(), size)
            axes = zip(most, size, centre[-len(size) :], strict=True)
            is_near = [abs((int(i) + 0.5) / n - c) <= _PROBE_RADIUS + 0.6 / n for i, n, c in axes]
            if change.any() and not all(is_near):
                return False
        return True

    def run_again(self, call: ModuleCall, arguments: Arguments) -> Tensor:
        """Return the feature of a module in another run."""
        features: list[Tensor] = []
        handle = call.module.register_forward_hook(
            lambda module, args, output: features.append(next(tensors_in(output)).clone())
        )
        try:
            run_without_traces(self.root.module, arguments)
        finally:
            handle.remove()
        return features[-1]


def _with_changed_patch(arguments: Arguments, centre: tuple[float, ...]) -> Arguments:
    """Return a network's arguments with one patch of the images changed."""
    copies: dict[int, Any] = {id(x): x.detach().clone() for x in tensors_in(arguments)}
    changed = copy.deepcopy(arguments, copies)
    for pixels in tensors_in(changed):
        if pixels.dim() > 3 and pixels.is_floating_point():
            if pixels.dim() == 5 and pixels.shape[2] in (1, 3) and pixels.shape[1] not in (1, 3):
                pixels = pixels.transpose(1, 2)  # a video (B, T, C, H, W)
            for dim, c in zip(range(2, pixels.dim()), centre[2 - pixels.dim() :], strict=True):
                n = pixels.shape[dim]
                first, last = int((c - _PROBE_RADIUS) * n), math.ceil((c + _PROBE_RADIUS) * n)
                pixels = pixels.narrow(dim, first, last - first)
            pixels.mul_(-1).add_(1)
            break
    return changed


def observe(model: nn.Module, arguments: Arguments, overrides: LayoutOverrides) -> ObservedRun:
    """Run a network on an example, and infer the layouts of its features."""
    observed = ObservedRun(model, arguments, overrides)
    handles = observed.hook_modules()
    try:
        with observed:
            run_without_traces(model, arguments)
    finally:
        for handle in handles:
            handle.remove()
    observed.infer_layouts()
    return observed


def run_without_traces(model: nn.Module, arguments: Arguments) -> None:
    """Run a network in eval mode, without gradients or torch.compile, and restore its state."""
    devices = {x.device for x in tensors_in(arguments) if x.is_cuda}
    buffers = [(x, x.clone(), version_of(x)) for x in model.buffers()]
    with (
        torch.random.fork_rng(devices),
        torch.compiler.set_stance("force_eager"),
        evaluating(model),
        only_hooks_of(model),  # so none of AttentionTransfer's hooks act
    ):
        model(*arguments[0], **arguments[1])
        for x, before, version in buffers:
            if version_of(x) != version:
                x.copy_(before)


def channels_first_rank(module: nn.Module) -> int | None:
    """Return the rank of the module's features if their channels certainly come first, else None.

    That is so in torch's own convolutions, norms and poolings, except one-dimensional ones, which
    tokens go through as well. A ``forward`` from elsewhere may put channels last.
    """
    ranks = set[int]()
    for each in module.modules():
        if not type(each).forward.__module__.startswith("torch.nn.modules"):
            return None
        bases = (c for c in type(each).__mro__ if c.__module__.startswith("torch.nn.modules"))
        name = next(bases, nn.Module).__name__
        if spatial := re.match(r"(?:Lazy)?\w*(?:Conv|Norm|Pool)\w*?([123])d", name):
            ranks.add(int(spatial[1]) + 2)
        elif name not in _RANK_AGNOSTIC and list(each.parameters(recurse=False)):
            return None
    return ranks.pop() if len(ranks) == 1 and 3 not in ranks else None


def format_size(size: Size) -> str:
    """Return a map size as text, such as 14x14."""
    return "x".join(map(str, size))
