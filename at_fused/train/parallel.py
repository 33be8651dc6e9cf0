"""Several processes that share each batch: who one is, sums over all, and starting them."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# A rank that is gone is noticed at once; this is for one that hangs.
_TIMEOUT = timedelta(minutes=30)


class Place(NamedTuple):
    """A process among those of a run, as torchrun numbers them."""

    rank: int = 0
    size: int = 1
    local: int = 0


def place() -> Place:
    """This process, by torchrun's environment; alone where there is none."""
    default = Place()
    return Place(
        int(os.environ.get("RANK", default.rank)),
        int(os.environ.get("WORLD_SIZE", default.size)),
        int(os.environ.get("LOCAL_RANK", default.local)),
    )


def join(device: torch.device) -> None:
    """Joins the process group, where there are several processes."""
    if place().size > 1 and not dist.is_initialized():
        cuda = device.type == "cuda"
        dist.init_process_group("nccl" if cuda else "gloo", timeout=_TIMEOUT)


def leave() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def size() -> int:
    """How many processes share a batch."""
    return dist.get_world_size() if dist.is_initialized() else 1


def first() -> bool:
    """Whether this process writes the files."""
    return not dist.is_initialized() or dist.get_rank() == 0


def share(rows: Tensor) -> Tensor:
    """This process's part of a batch: of all parts together each row is in one."""
    if size() == 1:
        return rows
    return rows.tensor_split(size())[dist.get_rank()]


def total(values: Sequence[float], device: torch.device) -> list[float]:
    """Sums over all processes."""
    if size() == 1:
        return list(values)
    found = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(found)
    sums: list[float] = found.tolist()
    return sums


def greatest(value: int, device: torch.device) -> int:
    """The largest over all processes."""
    if size() == 1:
        return value
    found = torch.tensor(value, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def gather(value: Any) -> list[Any]:
    """Each process's value, in the order of ranks."""
    if size() == 1:
        return [value]
    found: list[Any] = [None] * size()
    dist.all_gather_object(found, value)
    return found


def wait() -> None:
    """Returns once all processes are here."""
    if size() > 1:
        dist.barrier()


# ---- --nproc -------------------------------------------------------------------------------------


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def announce(rank: int, count: int, port: int) -> None:
    """Tells this process its place, by torchrun's environment."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )


def _member(rank: int, count: int, port: int, run: Callable[..., int], *arguments: Any) -> None:
    # Out of the terminal's process group: Ctrl-C reaches the parent, which passes it on once.
    os.setpgrp()
    announce(rank, count, port)
    code = run(*arguments)
    if code:
        sys.exit(code)


def launch(count: int, run: Callable[..., int], *arguments: Any) -> int:
    """Runs ``run(*arguments)`` in ``count`` processes of this machine; returns the exit status.

    The first that fails ends the others; its error is printed. Signals are passed on.
    """
    from torch.multiprocessing import ProcessExitedException, ProcessRaisedException
    from torch.multiprocessing.spawn import start_processes

    context = start_processes(
        _member, (count, free_port(), run, *arguments), count, join=False, start_method="spawn"
    )

    def forward(number: int, _: object) -> None:
        for process in context.processes:
            if process.is_alive() and process.pid:
                os.kill(process.pid, number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        while not context.join():
            pass
    except ProcessRaisedException as error:
        print(error, file=sys.stderr)
        return 1
    except ProcessExitedException as error:
        if error.signal_name is None:
            return error.exit_code
        print(f"at-fused-train: {error}; the others were ended", file=sys.stderr)
        return 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0
