"""Device, precision, memory layout, compilation and folded BatchNorm of steps; peak memory."""

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

# Double backward does not work through torch.compile, and needs more than bf16's 8 bits.
SECOND_ORDER = ("gradient-at", "flip-symmetry")


def setup_device(config: Config) -> torch.device:
    """Return the device of a configuration, and set threads and cuDNN for it."""
    info, name = parallel.process_info(), config.device
    if name == "cuda" and info.world_size > 1:
        name = f"cuda:{info.local_rank}"
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            available = ", ".join(["cpu", *(f"cuda:{i}" for i in range(count))])
            raise ConfigError(
                f"device: got {name!r}, but PyTorch has {count} CUDA devices; expected one of "
                f"{available}"
            )
        torch.cuda.set_device(device)
        exact = config.speed == "exact"
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = exact, not exact
    if config.threads:
        torch.set_num_threads(config.threads)
    elif info.local_world_size > 1 and device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // info.local_world_size))
    return device


@dataclass(frozen=True)
class StepMode:
    """Settings of steps: ``speed`` on one device."""

    dtype: torch.dtype | None = None  # of autocast
    fast: bool = False  # channels_last, folded BatchNorm in the teacher, torch's fused optimizers
    compile: bool = False

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """Return the context for a forward pass."""
        return torch.autocast(device.type, self.dtype, enabled=self.dtype is not None)

    def to_layout(self, model: nn.Module) -> nn.Module:
        """Return the model in the memory layout of this mode."""
        if not self.fast:
            return model
        untyped: Any = model  # some versions of torch do not declare this overload
        moved: nn.Module = untyped.to(memory_format=torch.channels_last)
        return moved

    def compiled(self, model: nn.Module, device: torch.device, batch: int) -> Callable[..., Any]:
        """Return the model, compiled (on a GPU with CUDA graphs) if the mode compiles.

        It is compiled for one batch size. An epoch's smaller last batch runs the model itself.
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


def has_fast_bf16(device: torch.device) -> bool:
    """Return True if the device has instructions for bfloat16 matrix products."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def step_mode(config: Config, device: torch.device, method: str, processes: int) -> StepMode:
    """Return the mode for the steps of a method."""
    if config.speed == "exact":
        return StepMode()
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = dtypes.get(config.speed)
    if config.speed == "auto" and has_fast_bf16(device):
        dtype = torch.bfloat16
    is_second_order = method in SECOND_ORDER
    # The collectives of synchronised BatchNorm would break the graph into pieces.
    compiles = config.compile and not (is_second_order or (processes > 1 and config.sync_norm))
    return StepMode(None if is_second_order else dtype, True, compiles)


def fold_batchnorm(model: nn.Module, keep: list[str]) -> tuple[nn.Module, int]:
    """Return a copy in eval mode with BatchNorm folded into preceding convolutions, and the count.

    Layers in ``keep`` keep their output. A network that torch.fx cannot trace is only copied.
    """
    model = copy.deepcopy(model).eval()
    try:
        graph = fx.symbolic_trace(model).graph
    except Exception:  # a user's forward may raise anything while it is traced
        return model, 0
    modules = dict(model.named_modules())
    calls = [node for node in graph.nodes if node.op == "call_module"]
    targets = [node.target for node in calls]
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
        if any(targets.count(n) > 1 or n in keep for n in names) or within[0] != within[1]:
            continue
        for name, module in zip(names, (fuse_conv_bn_eval(conv, norm), nn.Identity()), strict=True):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module)
        count += 1
    return model, count


@contextmanager
def _silence_stderr() -> Iterator[None]:
    """Discard what the profiler's C++ code prints to stderr."""
    sys.stderr.flush()
    saved, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(devnull)


def peak_memory(device: torch.device, function: Callable[[], object]) -> int:
    """Return the peak of the bytes that ``function()`` allocates on a device."""
    was_enabled = gc.isenabled()
    gc.disable()  # it would free older tensors and so lower the count
    try:
        if device.type == "cuda":
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            function()
            return torch.cuda.max_memory_allocated(device) - before
        activities = [ProfilerActivity.CPU]
        with _silence_stderr(), profile(activities=activities, profile_memory=True) as profiler:
            function()
    finally:
        if was_enabled:
            gc.enable()
    events = profiler.profiler.kineto_results.events()
    records = [event for event in events if event.name() == "[memory]"]
    sizes = [record.nbytes() for record in sorted(records, key=lambda e: e.start_ns())]
    return max(accumulate(sizes), default=0)
