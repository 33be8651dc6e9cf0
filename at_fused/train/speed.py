"""Step modes: device, precision, layout, compilation, folded BatchNorm; and a step's memory."""

from __future__ import annotations

import copy
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.profiler import ProfilerActivity, profile

from at_fused.train import parallel
from at_fused.train.config import Config, ConfigError

# Double backward goes through neither compiled graphs nor, with use, 8 bits of mantissa.
SECOND_ORDER = ("gradient-at", "flip-symmetry")


def prepare(config: Config) -> torch.device:
    """Return the device of a configuration, with PyTorch's threads and cuDNN set for it."""
    me, name = parallel.process(), config.device
    if name == "cuda" and me.size > 1:
        name = f"cuda:{me.local_rank}"
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            there = ", ".join(["cpu", *(f"cuda:{i}" for i in range(count))])
            raise ConfigError(
                f"device: got {name!r}, but PyTorch sees {count} CUDA devices; allowed is {there}"
            )
        torch.cuda.set_device(device)
        exact = config.speed == "exact"
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = exact, not exact
    if config.threads:
        torch.set_num_threads(config.threads)
    elif me.local_size > 1 and device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // me.local_size))
    return device


@dataclass(frozen=True)
class StepMode:
    """The mode that steps run in: ``speed`` on one device."""

    dtype: torch.dtype | None = None  # of autocast
    fast: bool = False  # channels_last, the teacher's BatchNorm folded, torch's fused optimizers
    compile: bool = False

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """Return the context that a forward pass runs in."""
        return torch.autocast(device.type, self.dtype, enabled=self.dtype is not None)

    def layout(self, model: nn.Module) -> nn.Module:
        """Return the model in the memory layout of this mode."""
        if not self.fast:
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
        parts += ["channels_last"] * self.fast + ["compile"] * self.compile
        return ", ".join(parts + ["folded BatchNorm", "fused SGD"] * self.fast)


def bf16_is_fast(device: torch.device) -> bool:
    """Tell devices that have instructions for bfloat16 matrix products."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def step_mode(config: Config, device: torch.device, method: str, processes: int) -> StepMode:
    """Return the mode that the steps of a method run in."""
    if config.speed == "exact":
        return StepMode()
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = dtypes.get(config.speed)
    if config.speed == "auto" and bf16_is_fast(device):
        dtype = torch.bfloat16
    second = method in SECOND_ORDER
    # Collectives within a graph, as shared statistics have them, break it into pieces.
    compiles = config.compile and not second and not (processes > 1 and config.sync_norm)
    return StepMode(None if second else dtype, True, compiles)


def folded(model: nn.Module, keep: list[str]) -> tuple[nn.Module, int]:
    """Return a copy in eval mode, BatchNorms folded into the convolutions before, and their count.

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


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the profiler's C++ says of itself off the terminal; Python's errors come later."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def peak(device: torch.device, work: Callable[[], object]) -> int:
    """Return the most bytes that ``work()`` allocates on a device, beyond what was there before."""
    collects = gc.isenabled()
    gc.disable()  # which frees what was there before, and that would be taken off
    try:
        if device.type == "cuda":
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            work()
            return torch.cuda.max_memory_allocated(device) - before
        with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
            work()
    finally:
        if collects:
            gc.enable()
    records = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [record.nbytes() for record in sorted(records, key=lambda e: e.start_ns())]
    return max(accumulate(sizes), default=0)
