"""Several processes that share each batch: who one is, sums over all, and starting them."""

from __future__ import annotations

import functools
import gc
import json
import logging
import os
import pickle
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from at_fused.train.rules import ConfigError

# A rank that is gone is noticed at once; this is for one that hangs.
_TIMEOUT = timedelta(minutes=30)

Found = TypeVar("Found")


class Place(NamedTuple):
    """A process among those of a run, and among those of its machine, as torchrun numbers them."""

    rank: int = 0
    size: int = 1
    local: int = 0
    local_size: int = 1
    machine: int = 0


def place() -> Place:
    """This process, by torchrun's environment; alone where there is none."""
    default = Place()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
    return Place(*(int(os.environ.get(n, d)) for n, d in zip(names, default, strict=True)))


@functools.cache
def _store() -> Any:
    """The store that the launcher has told of, by which the processes find each other."""
    here = place()
    store, _, _ = next(dist.rendezvous("env://", here.rank, here.size, timeout=_TIMEOUT))
    return store


def text_of_first(read: Callable[[], str]) -> str:
    """The text that the first process reads; it serves before the process group is there.

    Raises:
        ConfigError: that of the first process, in all of them.
    """
    if place().size == 1:
        return read()
    if place().rank == 0:
        try:
            _tell({"text": read()})
        except ConfigError as error:
            _tell({"error": str(error)})
    answer = json.loads(_store().get("text"))
    if "error" in answer:
        raise ConfigError(answer["error"])
    return answer["text"]


def _tell(answer: dict[str, str]) -> None:
    if not _store().check(["text"]):
        _store().set("text", json.dumps(answer))


def start(error: str) -> None:
    """Let all processes know that this one starts, or why it does not.

    Raises:
        ConfigError: that of another process.
    """
    here = place()
    if here.rank == 0:
        _tell({"error": error or "the first process has neither --config nor --resume"})
    _store().set(f"start{here.rank}", error)
    if error:
        return
    for rank in range(here.size):
        if found := _store().get(f"start{rank}").decode():
            raise ConfigError(f"process {rank}: {found}")


def join(device: torch.device) -> None:
    """Joins the process group, where there are several processes."""
    if place().size > 1 and not dist.is_initialized():
        here, backend = place(), "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=_store(), rank=here.rank, world_size=here.size, timeout=_TIMEOUT
        )


def leave() -> None:
    """Leaves the process group."""
    gc.collect()  # of wrapped networks, which hold it
    if dist.is_initialized():
        dist.destroy_process_group()
    _store.cache_clear()


def size() -> int:
    """Return the number of processes that share a batch."""
    return dist.get_world_size() if dist.is_initialized() else 1


def first() -> bool:
    """Tell the process that writes the files."""
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


def from_first(function: Callable[[], Found]) -> Found:
    """Run a function in the first process alone; all return its result, or raise its error.

    For what is read from or written to the run's folder, which is that of the first machine.
    """
    if size() == 1:
        return function()
    answer: list[Any] = [None, None]  # the result, the error
    if first():
        try:
            answer[0] = function()
        except Exception as error:
            answer[1] = _sendable(error)
    dist.broadcast_object_list(answer)
    if answer[1] is not None:
        answer[1].of_first = True  # which says it for all
        raise answer[1]
    found: Found = answer[0]
    return found


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


def _sendable(error: Exception) -> Exception:
    """The error, or one with its words where it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def wait() -> None:
    """Returns once all processes are here."""
    if size() > 1:
        dist.barrier()


def end(status: int) -> NoReturn:
    """Ends this process.

    One of several goes at once: a thread of torch that still asks for Python's lock while the
    interpreter is taken down would abort it, with all its work done.
    """
    if place().size == 1:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


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
        LOCAL_WORLD_SIZE=str(count),
        GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )


def _member(rank: int, count: int, port: int, run: Callable[..., int], *arguments: Any) -> None:
    # Out of the terminal's process group: Ctrl-C reaches the parent, which passes it on once.
    os.setpgrp()
    announce(rank, count, port)
    end(run(*arguments))


def launch(count: int, run: Callable[..., int], *arguments: Any) -> int:
    """Runs ``run(*arguments)`` in ``count`` processes of this machine; returns the exit status.

    The first that fails ends the others; its error is printed. Signals are passed on.
    """
    from torch.multiprocessing import ProcessExitedException, ProcessRaisedException
    from torch.multiprocessing.spawn import start_processes

    # One line of error is enough: not also that the others are ended.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)

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
