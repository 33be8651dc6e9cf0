"""How long a program takes, on the CPU by the clock, on a GPU by its events."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch

import at_fused
from benchmarks.cases import backends

Program = Callable[[], object]
Row = dict[str, Any]

COPY_BYTES = 256 << 20  # several times any second-level cache
HOST_CYCLES = 2_000_000  # about a millisecond of a GPU's clock


class CpuTimer:
    """Wall-clock time."""

    least_rounds, most_rounds = 8, 200

    def seconds(self, program: Program) -> float:
        """The time of one run."""
        begin = time.perf_counter()
        result = program()
        end = time.perf_counter()
        # Not timed: with its memory the allocator gives back what other programs left.
        del result
        return end - begin

    def blocking(self, program: Program) -> Program:
        """The program, and all that it started."""
        return program

    def floors(self) -> dict[str, Program]:
        """What else is timed beside the programs."""
        return {}


class CudaTimer:
    """Time between two events, of a device whose second-level cache holds other data.

    The device is kept busy while the host queues the program, so that the host's time for up to a
    millisecond's worth of launches does not count.
    """

    least_rounds, most_rounds = 20, 200

    def __init__(self) -> None:
        self._source = torch.zeros(COPY_BYTES // 4, device="cuda", dtype=torch.int32)
        self._target = torch.empty_like(self._source)

    def seconds(self, program: Program) -> float:
        """The time of one run on the device."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self._source.max()  # by reading: nothing is left to be written back
        torch.cuda._sleep(HOST_CYCLES)
        begin.record()
        program()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def blocking(self, program: Program) -> Program:
        """The program, and all that it started."""

        def run() -> None:
            program()
            torch.cuda.synchronize()

        return run

    def floors(self) -> dict[str, Program]:
        """A copy of COPY_BYTES, which reads and writes them: the device's bandwidth."""
        return {"copy": lambda: self._target.copy_(self._source)}


Key = TypeVar("Key")


def medians(
    programs: dict[Key, Program],
    clock: CpuTimer | CudaTimer,
    seconds: float,
    scope: Callable[[Key], AbstractContextManager[object]] = lambda _: nullcontext(),
) -> tuple[dict[Key, float], int]:
    """Median milliseconds of each program, and in how many rounds.

    Every round times all of them, each within its ``scope``, in random order: whatever else the
    machine does falls on all alike, and so does what the one before left in the caches.
    """

    def once(key: Key) -> float:
        with scope(key):
            return clock.seconds(programs[key])

    for key in programs:
        once(key)  # compiles, and fills the allocator
    total = sum(map(once, programs))
    rounds = max(clock.least_rounds, min(clock.most_rounds, int(seconds / total)))
    measured: dict[Key, list[float]] = {key: [] for key in programs}
    order, shuffle = list(programs), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for key in order:
            measured[key].append(once(key))
    found = {key: statistics.median(values) for key, values in measured.items()}
    return {key: round(1e3 * seconds, 6) for key, seconds in found.items()}, rounds


@cache
def timer(device: str) -> CpuTimer | CudaTimer:
    """The one for a device type."""
    return CudaTimer() if device == "cuda" else CpuTimer()


class Comparison(NamedTuple):
    """Programs that take turns; ``ours`` run on each back end, ``others`` once a round."""

    device: str
    clock: CpuTimer | CudaTimer
    seconds: float  # of measuring, about
    what: Row
    others: dict[str, Program]
    ours: dict[str, Program]

    def rows(self) -> list[Row]:
        """A row for each back end."""
        on = backends(self.device)
        others = self.others | self.clock.floors()
        timed = {(name, "auto"): program for name, program in others.items()}
        timed |= {(name, backend): self.ours[name] for backend in on for name in self.ours}
        ms, rounds = medians(
            timed, self.clock, self.seconds, lambda key: at_fused.use_backend(key[1])
        )
        return [
            {
                **self.what,
                "backend": backend,
                "rounds": rounds,
                "ms": {name: ms[name, ran] for name, ran in ms if ran in ("auto", backend)},
            }
            for backend in on
        ]
