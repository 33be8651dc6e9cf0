"""Ways to run a step: precision, layout, compilation, and a teacher without its BatchNorm."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from at_fused.train.config import Config

# Double backward goes through neither compiled graphs nor, with use, 8 bits of mantissa.
SECOND_ORDER = ("gradient-at", "flip-symmetry")


@dataclass(frozen=True)
class Way:
    """A way to run steps: ``speed`` on one device."""

    dtype: torch.dtype | None = None  # of autocast
    channels_last: bool = False
    fold: bool = False
    fused: bool = False
    compile: bool = False

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """The context that a forward pass runs in."""
        return torch.autocast(device.type, self.dtype, enabled=self.dtype is not None)

    def layout(self, model: nn.Module) -> nn.Module:
        """The model in the layout of this way."""
        if not self.channels_last:
            return model
        untyped: Any = model  # not every torch declares this overload
        moved: nn.Module = untyped.to(memory_format=torch.channels_last)
        return moved

    def compiled(self, model: nn.Module, device: torch.device, batch: int) -> Callable[..., Any]:
        """Return the model, or torch.compile of it, on a GPU as CUDA graphs.

        Compiled for batches of one size: an epoch's last, of another, goes to the model itself.
        """
        if not self.compile:
            return model
        mode = "reduce-overhead" if device.type == "cuda" else "default"
        compiled = torch.compile(model, dynamic=False, mode=mode)

        def run(x: Tensor) -> Any:
            return compiled(x) if len(x) == batch else model(x)

        return run

    def __str__(self) -> str:
        parts = [str(self.dtype or torch.float32).removeprefix("torch.")]
        names = ("channels_last", "compile")
        parts += [name for name in names if getattr(self, name)]
        return ", ".join([*parts, *["folded BatchNorm"] * self.fold, *["fused SGD"] * self.fused])


def bf16_is_fast(device: torch.device) -> bool:
    """Tell devices that have instructions for bfloat16 matrix products."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def way(config: Config, device: torch.device, method: str, processes: int) -> Way:
    """Return the way in which the steps of a method run."""
    if config.speed == "exact":
        return Way()
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = dtypes.get(config.speed)
    if config.speed == "auto" and bf16_is_fast(device):
        dtype = torch.bfloat16
    second = method in SECOND_ORDER
    # Collectives within a graph, as shared statistics have them, break it into pieces.
    compiles = config.compile and not second and not (processes > 1 and config.sync_norm)
    return Way(None if second else dtype, True, True, True, compiles)


def folded(model: nn.Module, keep: list[str]) -> tuple[nn.Module, int]:
    """A copy in eval mode whose BatchNorms are in the convolutions before them, and how many.

    Not those of the layers in ``keep``, whose output is looked at, nor any of a network that
    torch.fx cannot read: that comes back as a plain copy.
    """
    model = copy.deepcopy(model).eval()
    try:
        graph = fx.symbolic_trace(model).graph
    except Exception:  # whatever a foreign forward does to a tracer
        return model, 0
    modules = dict(model.named_modules())
    calls = [node for node in graph.nodes if node.op == "call_module"]
    runs = [node.target for node in calls]
    count = 0
    for node in calls:
        norm = modules[str(node.target)]
        before = node.args[0] if node.args else None
        if not isinstance(norm, nn.BatchNorm2d) or not isinstance(before, fx.Node):
            continue
        conv = modules.get(str(before.target)) if before.op == "call_module" else None
        if type(conv) is not nn.Conv2d or len(before.users) > 1:
            continue
        names = [str(before.target), str(node.target)]
        within = [[f"{name}.".startswith(f"{layer}.") for layer in keep] for name in names]
        if any(runs.count(name) > 1 or name in keep for name in names) or within[0] != within[1]:
            continue
        for name, module in zip(names, (fuse_conv_bn_eval(conv, norm), nn.Identity()), strict=True):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module)
        count += 1
    return model, count
