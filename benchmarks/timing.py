"""How long a program takes, on the CPU by the clock, on a GPU by its events."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

Program = Callable[[], object]

COPY_BYTES = 256 << 20  # several times any second-level cache
HOST_CYCLES = 2_000_000  # about a millisecond of a GPU's clock


class CpuTimer:
    """Wall-clock time."""

    least_rounds, most_rounds = 8, 200

    def seconds(self, program: Program) -> float:
        """The time of one run."""
        begin = time.perf_counter()
        program()
        return time.perf_counter() - begin

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


def timer(device: str) -> CpuTimer | CudaTimer:
    """The one for a device type."""
    return CudaTimer() if device == "cuda" else CpuTimer()
