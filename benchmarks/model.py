"""A model of a GPU's time: blocks in slots, rounds of loads, one memory. Nothing here is measured.

A kernel's blocks take the slots that registers, shared memory and threads leave, and each takes the
next task, in order, when it is done with one. A task is rounds: a block asks the memory for a
round's bytes and goes on when it has them. The memory serves one after the other, first come, first
served, but none sooner than after the latency. What a round writes is booked with what it reads,
and nobody waits for it.

Left out: arithmetic in the loops over features (about a fifth of the issue slots, by the machine
code), the bandwidth of the second-level cache, parts of 32 bytes that are not used.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple

THREADS = 256  # of a block: csrc/cuda/params.h, kThreads


class Device(NamedTuple):
    """A GPU, in bytes and microseconds.

    Sizes are NVIDIA's, of compute capability 9.0 (CUDA C++ Programming Guide). Times are estimates
    at a clock of 1.7 GHz, from a review of the kernels: no GPU has confirmed them.
    """

    name: str
    bandwidth: float  # of a large copy
    multiprocessors: int = 132
    registers: int = 65536  # of a multiprocessor, as are threads, blocks and shared memory
    threads: int = 2048
    blocks: int = 32
    shared: int = 233472
    reserved: int = 1024  # shared memory of each block that is the system's
    cache: float = 25e6  # half of the second level's 50 MB: nobody knows what it evicts first
    launch: float = 1.5  # from the end of a graph's kernel to the first blocks of the next
    start: float = 0.3  # of a block: its parameters, and which task is its own
    latency: float = 0.55  # of a load from memory while others load
    cached: float = 0.3  # of one that the second-level cache serves
    atomic: float = 0.7  # a barrier, then an atomic operation's way there and back
    sum: float = 0.15  # a sum over a block: shuffles, barriers, shared memory
    shuffle: float = 0.015  # a shuffle and the addition that waits for it
    turn: float = 0.03  # of a loop over maps on chip, which computes in fp64
    port: float = 1.1e5  # bytes a us from a multiprocessor to memory: 64 a clock


H100 = Device("H100", 3.0e6)  # SXM: 90 % of 3.35 TB/s, as large copies reach
H200 = Device("H200", 4.3e6)  # likewise, of 4.8 TB/s
DEVICES = (H100, H200)


class Round(NamedTuple):
    """Loads of a block that are under way together, what is written then, and a wait after them."""

    reads: float = 0
    writes: float = 0
    wait: float = 0


class Task(NamedTuple):
    """The work of a block at a time; of those that share a sample the last to end does ``last``."""

    rounds: Sequence[Round]
    sample: Hashable = None
    last: Sequence[Round] = ()


class Kernel(NamedTuple):
    """A launch: tasks in order, how many run at a time, and what the last block of all adds."""

    tasks: Sequence[Task]
    slots: int
    end: Sequence[Round] = ()


def slots(device: Device, registers: int, shared: int) -> int:
    """Blocks that run at a time, by the registers of a thread and the shared memory of a block."""
    by_registers = device.registers // (registers * THREADS)
    by_shared = device.shared // (shared + device.reserved)
    return device.multiprocessors * min(
        by_registers, by_shared, device.threads // THREADS, device.blocks
    )


def microseconds(device: Device, kernel: Kernel) -> float:
    """From the end of the kernel before to the end of this one."""
    left = Counter(task.sample for task in kernel.tasks)
    tasks = iter(kernel.tasks)
    memory = 0.0  # when it has served all that was asked of it so far

    def block() -> Iterator[Round]:
        for task in tasks:
            yield from task.rounds
            left[task.sample] -= 1
            if not left[task.sample]:
                yield from task.last

    def after(now: float, step: Round) -> float:
        nonlocal memory
        if step.reads or step.writes:
            begin = max(memory, now)
            memory = begin + (step.reads + step.writes) / device.bandwidth
            if step.reads:
                now = max(begin + step.reads / device.bandwidth, now + device.latency)
        return now + step.wait

    blocks = [block() for _ in range(min(kernel.slots, len(kernel.tasks)))]
    running = [(device.launch, n) for n in range(len(blocks))]
    end = device.launch
    while running:
        now, n = running[0]
        if step := next(blocks[n], None):
            heapq.heapreplace(running, (after(now, step), n))
        else:
            end = max(end, heapq.heappop(running)[0])
    for step in kernel.end:
        end = after(end, step)
    return max(end, memory)


def ideal(device: Device, size: float) -> Kernel:
    """A kernel of equal blocks that fill the device, with four loads of a thread under way."""
    most = slots(device, 32, 0)
    under_way = 4 * 16 * THREADS
    count = max(1, min(most, math.ceil(size / under_way)))
    rounds = max(1, math.ceil(size / count / under_way))
    task = Task([Round(wait=device.start), *[Round(size / count / rounds)] * rounds])
    return Kernel([task] * count, most)


class Cache:
    """The second level: what was used last, up to its size, and nothing that alone is larger."""

    def __init__(self, size: float) -> None:
        self._free = size
        self._held: OrderedDict[Hashable, float] = OrderedDict()

    def misses(self, accesses: Iterable[tuple[Hashable, float]]) -> float:
        """The bytes of these, by their names, that come from memory."""
        missed = 0.0
        for name, size in accesses:
            held = self._held.pop(name, None)
            missed += size if held is None else 0
            self._free -= size - (held or 0)
            self._held[name] = size
            while self._free < 0:
                self._free += self._held.popitem(last=False)[1]
        return missed
