"""Several processes that share each batch: who one is, what they agree on, and starting them."""

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

# A rank that is gone is noticed at once; this is for one that hangs.
_TIMEOUT = timedelta(minutes=30)

Found = TypeVar("Found")


class FirstFailedError(ConfigError):
    """The error of the first process, which says it for all."""


class Process(NamedTuple):
    """A process among those of a run, and among those of its machine, as torchrun numbers them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    machine: int = 0


NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")  # torchrun's


def process() -> Process:
    """Return this process, by torchrun's environment; alone where there is none."""
    return Process(*(int(os.environ.get(n, d)) for n, d in zip(NAMES, Process(), strict=True)))


def join() -> None:
    """Join the process group, where there are several processes."""
    if process().size > 1 and not dist.is_initialized():
        nccl = torch.cuda.is_available() and dist.is_nccl_available()
        backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
        dist.init_process_group(backend, init_method="env://", timeout=_TIMEOUT)
        atexit.register(leave)


def leave() -> None:
    """Leave the process group."""
    gc.collect()  # of wrapped networks, which hold it
    if dist.is_initialized():
        dist.destroy_process_group()


def size() -> int:
    """Return the number of processes that share a batch."""
    return dist.get_world_size() if dist.is_initialized() else 1


def first() -> bool:
    """Tell the process that writes the files."""
    return process().rank == 0


# ---- what they agree on --------------------------------------------------------------------------


def share(rows: Tensor) -> Tensor:
    """Return this process's part of a batch: of all parts together each row is in one."""
    return rows if size() == 1 else rows.tensor_split(size())[dist.get_rank()]


def total(values: Sequence[float]) -> list[float]:
    """Return the sums over all processes."""
    return [sum(each) for each in zip(*gather(list(values)), strict=True)]


def mean(x: Tensor) -> Tensor:
    """Return the mean of a tensor over all processes."""
    if size() > 1:
        dist.all_reduce(x := x / size())
    return x


def greatest(*values: int) -> list[int]:
    """Return the largest of each over all processes."""
    found = torch.tensor(values)
    if size() > 1:
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return list(map(int, found))


def gather(value: Any) -> list[Any]:
    """Return each process's value, in the order of ranks."""
    if size() == 1:
        return [value]
    found: list[Any] = [None] * size()
    dist.all_gather_object(found, value)
    return found


def in_all(function: Callable[[], Found]) -> Found:
    """Run a function in all processes; where it fails in one, all raise a ConfigError."""
    found, text = None, ""
    error: ConfigError | SystemExit | None = None
    try:
        found = function()
    except ConfigError as wrong:
        error, text = wrong, str(wrong)
    except SystemExit as stop:  # argparse has said why
        error, text = stop, "wrong options" * bool(stop.code)
    texts = gather(text)
    if error:
        raise error
    for rank, text in enumerate(texts):
        if text:
            raise ConfigError(f"process {rank}: {text}")
    return found  # type: ignore[return-value]


def from_first(function: Callable[[], Found]) -> Found:
    """Run a function in the first process alone; all return its result.

    For what is read from or written to the run's folder, which is that of the first machine.
    Where it fails, the first raises its error, and the others FirstFailedError.
    """
    found, error = None, None
    if first():
        try:
            found = function()
        except Exception as caught:
            error = caught
    if size() > 1:
        answer: list[Any] = [found, error and str(error)]
        dist.broadcast_object_list(answer)
        found = answer[0]
        if answer[1] is not None and not first():
            raise FirstFailedError(answer[1])
    if error:
        raise error
    return found  # type: ignore[return-value]


def same_in_all(values: Mapping[str, object]) -> None:
    """Raise ConfigError where processes, of several machines, differ in a value."""
    found = gather(dict(values))
    for name, value in found[0].items():
        for rank, other in enumerate(found):
            if other[name] != value:
                raise ConfigError(
                    f"{name}: process {rank} has {other[name]!r}, process 0 has {value!r}; all "
                    "processes of a run need the same"
                )


# ---- gradients and statistics --------------------------------------------------------------------


def distribute(model: nn.Module, device: torch.device) -> nn.Module:
    """Wrap a network whose batches several processes share: its gradients are averaged."""
    if size() == 1 or not any(p.requires_grad for p in model.parameters()):
        return model
    where: dict[str, Any] = {"device_ids": [device]} if device.type == "cuda" else {}
    # Statistics are shared; or each process's own, and then rank 0's are as good as the rest's.
    new = "forward_sync_buffers" in signature(DistributedDataParallel).parameters
    where["forward_sync_buffers" if new else "broadcast_buffers"] = False
    return DistributedDataParallel(model, **where)


class SharedBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d whose statistics in training mode are those of all processes' images.

    torch.nn.SyncBatchNorm does this on GPUs; it refuses CPU tensors.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same; B may differ between the processes."""
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        y = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        count = torch.tensor(float(x.numel() // x.shape[1]), dtype=y.dtype)
        dist.all_reduce(count)
        mean = all_reduce(y.sum(dim=(0, 2, 3))) / count
        centred = y - mean[:, None, None]
        # From centred values: the mean of squares less the squared mean would cancel.
        variance = all_reduce(centred.square().sum(dim=(0, 2, 3))) / count
        running: Any = (self.num_batches_tracked, self.running_mean, self.running_var)
        running[0].add_(1)
        weight = 1.0 / float(running[0]) if self.momentum is None else self.momentum
        running[1].lerp_(mean.detach(), weight)
        running[2].lerp_(variance.detach() * (count / (count - 1).clamp_min(1)), weight)
        scale = torch.rsqrt(variance + self.eps) * self.weight
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def share_statistics(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model with every BatchNorm over all processes, its tensors the same."""
    if device.type == "cuda":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return converted
    for module in model.modules():
        if type(module) is nn.BatchNorm2d and module.affine and module.track_running_stats:
            module.__class__ = SharedBatchNorm  # with all that it has
    return model


# ---- --nproc -------------------------------------------------------------------------------------


def end(status: int) -> NoReturn:
    """End this process.

    One of several goes at once: a thread of torch that still asks for Python's lock while the
    interpreter is taken down would abort it, with all its work done.
    """
    if process().size == 1:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


def announce(rank: int, count: int, port: int) -> None:
    """Tell this process who it is, by torchrun's environment."""
    os.environ.update(zip(NAMES, map(str, (rank, count, rank, count, 0)), strict=True))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def _member(rank: int, count: int, port: int, run: Callable[..., int], *arguments: Any) -> None:
    # Out of the terminal's process group: Ctrl-C reaches the parent, which passes it on once.
    os.setpgrp()
    announce(rank, count, port)
    end(run(*arguments))


def launch(count: int, run: Callable[..., int], *arguments: Any) -> int:
    """Run ``run(*arguments)`` in ``count`` processes of this machine; return the exit status.

    The first that fails ends the others; its error is printed. Signals are passed on.
    """
    from torch.multiprocessing import ProcessExitedException
    from torch.multiprocessing.spawn import start_processes

    # One line of error is enough: not also that the others are ended.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    given = (count, free_port(), run, *arguments)
    context = start_processes(_member, given, count, join=False, start_method="spawn")

    def forward(number: int, _: object) -> None:
        for member in context.processes:
            if member.is_alive() and member.pid:
                os.kill(member.pid, number)

    before = {n: signal.signal(n, forward) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not context.join():
            pass
    except ProcessExitedException as error:
        if error.signal_name is None:
            return error.exit_code
        print(f"at-fused-train: {error}; the others were ended", file=sys.stderr)
        return 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0
