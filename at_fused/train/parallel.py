"""Distributed training: rank, collectives, synchronised BatchNorm and launching of processes."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from inspect import signature
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel

from at_fused.train.config import ConfigError

# For ranks that hang: the end of a rank is noticed at once.
_TIMEOUT = timedelta(minutes=30)

T = TypeVar("T")


class RankZeroError(ConfigError):
    """An error of rank 0, which reports it for all ranks."""


class ProcessInfo(NamedTuple):
    """Ranks and sizes of a process, as torchrun numbers them; ``node`` is its GROUP_RANK."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node: int = 0


# torchrun's environment variables, in the order of ProcessInfo.
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")


def process_info() -> ProcessInfo:
    """Return this process, from torchrun's environment; without it, a world of one."""
    fields = zip(VARIABLES, ProcessInfo(), strict=True)
    return ProcessInfo(*(int(os.environ.get(name, default)) for name, default in fields))


def init_process_group() -> None:
    """Join the process group, unless this is the only process."""
    if process_info().world_size > 1 and not dist.is_initialized():
        nccl = torch.cuda.is_available() and dist.is_nccl_available()
        backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
        dist.init_process_group(backend, init_method="env://", timeout=_TIMEOUT)
        atexit.register(destroy_process_group)


def destroy_process_group() -> None:
    """Leave the process group."""
    gc.collect()  # DistributedDataParallel modules keep references to the group
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    """Return the number of processes that share a batch."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_rank_0() -> bool:
    """Return True on rank 0, which writes all files."""
    return process_info().rank == 0


# ---- collectives ---------------------------------------------------------------------------------


def shard(rows: Tensor) -> Tensor:
    """Return this rank's rows of a batch; the shards of all ranks partition it."""
    return rows if world_size() == 1 else rows.tensor_split(world_size())[dist.get_rank()]


def all_reduce_sum(values: Sequence[float]) -> list[float]:
    """Return the sum of each value over all ranks."""
    return [sum(each) for each in zip(*all_gather(list(values)), strict=True)]


def all_reduce_mean(x: Tensor) -> Tensor:
    """Return the mean of a tensor over all ranks."""
    if world_size() > 1:
        dist.all_reduce(x := x / world_size())
    return x


def all_reduce_max(*values: int) -> list[int]:
    """Return the maximum of each value over all ranks."""
    result = torch.tensor(values)
    if world_size() > 1:
        dist.all_reduce(result, dist.ReduceOp.MAX)
    return list(map(int, result))


def all_gather(value: Any) -> list[Any]:
    """Return the values of all ranks, in the order of ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def run_on_all_ranks(function: Callable[[], T]) -> T:
    """Run a function on all ranks; if it fails on one, raise a ConfigError on all."""
    result, text = None, ""
    error: ConfigError | SystemExit | None = None
    try:
        result = function()
    except ConfigError as caught:
        error, text = caught, str(caught)
    except SystemExit as caught:  # argparse has printed the reason
        error, text = caught, "invalid options" * bool(caught.code)
    texts = all_gather(text)
    if error:
        raise error
    for rank, text in enumerate(texts):
        if text:
            raise ConfigError(f"rank {rank}: {text}")
    return result  # type: ignore[return-value]


def run_on_rank_0(function: Callable[[], T]) -> T:
    """Run a function on rank 0 and return its result on all ranks.

    Needed to read or write the run's folder, which is on the first machine. If the function
    fails, rank 0 raises its error and the others raise RankZeroError.
    """
    result, error = None, None
    if is_rank_0():
        try:
            result = function()
        except Exception as caught:
            error = caught
    if world_size() > 1:
        message: list[Any] = [result, error and str(error)]
        dist.broadcast_object_list(message)
        result = message[0]
        if message[1] is not None and not is_rank_0():
            raise RankZeroError(message[1])
    if error:
        raise error
    return result  # type: ignore[return-value]


def check_same_on_all_ranks(values: Mapping[str, object]) -> None:
    """Raise ConfigError if ranks, for example on different machines, differ in a value."""
    by_rank = all_gather(dict(values))
    for name, value in by_rank[0].items():
        for rank, other in enumerate(by_rank):
            if other[name] != value:
                raise ConfigError(
                    f"{name}: rank {rank} has {other[name]!r}, rank 0 has {value!r}; all ranks "
                    "must have the same value"
                )


# ---- gradients and BatchNorm ---------------------------------------------------------------------


def wrap_ddp(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model in DistributedDataParallel, unless it runs in one process or is frozen."""
    if world_size() == 1 or not any(p.requires_grad for p in model.parameters()):
        return model
    options: dict[str, Any] = {"device_ids": [device]} if device.type == "cuda" else {}
    # BatchNorm statistics are either synchronised already or meant to differ between ranks.
    new = "forward_sync_buffers" in signature(DistributedDataParallel).parameters
    options["forward_sync_buffers" if new else "broadcast_buffers"] = False
    return DistributedDataParallel(model, **options)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d with statistics over the images of all ranks in training mode.

    Like torch.nn.SyncBatchNorm, which does not support CPU tensors.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, H, W); B may differ between ranks."""
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        y = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        count = torch.tensor(float(x.numel() // x.shape[1]), dtype=y.dtype)
        dist.all_reduce(count)
        mean = all_reduce(y.sum(dim=(0, 2, 3))) / count
        centred = y - mean[:, None, None]
        # Uses centred values, because E[x^2] - E[x]^2 would cancel.
        variance = all_reduce(centred.square().sum(dim=(0, 2, 3))) / count
        running: Any = (self.num_batches_tracked, self.running_mean, self.running_var)
        running[0].add_(1)
        weight = 1.0 / float(running[0]) if self.momentum is None else self.momentum
        running[1].lerp_(mean.detach(), weight)
        running[2].lerp_(variance.detach() * (count / (count - 1).clamp_min(1)), weight)
        scale = torch.rsqrt(variance + self.eps) * self.weight
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def convert_sync_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model with synchronised BatchNorm layers that keep their tensors."""
    if device.type == "cuda":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return converted
    for module in model.modules():
        if type(module) is nn.BatchNorm2d and module.affine and module.track_running_stats:
            module.__class__ = SyncBatchNorm2d  # keeps parameters, buffers and hooks
    return model


# ---- --nproc -------------------------------------------------------------------------------------


def exit_process(status: int) -> NoReturn:
    """Exit this process.

    In a process group, skip the interpreter's shutdown: a thread of torch that acquires the GIL
    meanwhile would abort a finished process.
    """
    if process_info().world_size == 1:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def free_port() -> int:
    """Return an unused port of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


def set_environment(rank: int, count: int, port: int) -> None:
    """Set torchrun's environment variables for a process of this machine."""
    os.environ.update(zip(VARIABLES, map(str, (rank, count, rank, count, 0)), strict=True))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def _worker(rank: int, count: int, port: int, run: Callable[..., int], *arguments: Any) -> None:
    # Leaves the terminal's process group: Ctrl-C reaches the parent only, which forwards it once.
    os.setpgrp()
    set_environment(rank, count, port)
    exit_process(run(*arguments))


def launch(count: int, run: Callable[..., int], *arguments: Any) -> int:
    """Run ``run(*arguments)`` in ``count`` processes of this machine; return the exit status.

    If a process fails, terminate the others and print its error. Forward SIGINT and SIGTERM.
    """
    from torch.multiprocessing import ProcessExitedException
    from torch.multiprocessing.spawn import start_processes

    # Only the first error matters, not that the other processes were terminated.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    worker_arguments = (count, free_port(), run, *arguments)
    context = start_processes(_worker, worker_arguments, count, join=False, start_method="spawn")

    def forward(number: int, _: object) -> None:
        for worker in context.processes:
            if worker.is_alive() and worker.pid:
                os.kill(worker.pid, number)

    before = {n: signal.signal(n, forward) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not context.join():
            pass
    except ProcessExitedException as error:
        if error.signal_name is None:
            return error.exit_code
        print(f"at-fused-train: {error}; the other processes were terminated", file=sys.stderr)
        return 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0
