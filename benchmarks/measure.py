"""Timers, comparisons, and PARTS: the benchmarks and their settings.

A row holds the setting, the back end that ran at_fused, and the median of each program in
milliseconds (or bytes), all measured in the same rounds. The programs:

at_fused   at_loss, or the steps of steps.py that use the package
eager      the loss in eager PyTorch
compile    torch.compile of it
floor      one read of the same bytes
copy       a copy of as many bytes as at_fused must move (only on a GPU)

On a GPU every program runs in a CUDA graph. "uncaptured" names those that could not be captured,
with the reason.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any, NamedTuple

import torch

import at_fused
from at_fused.train.speed import peak_memory
from benchmarks import steps as training
from benchmarks.cases import PASSES, SETTINGS, TIMED_CASES, Inputs, backends, baselines

Program = Callable[[], object]
Row = dict[str, Any]

FLUSH_BYTES = 256 << 20  # several times any GPU's L2 cache
REPEATS = 8  # runs of a program in its CUDA graph
SLEEP_CYCLES = 2_000_000  # about a millisecond of a GPU's clock
SIZES = [(1, 1), (4, 1), (4, 4), *((32, c) for c in (2, 8, 32, 128, 512, 1024))]  # batch, channels
BASELINE_PASSES = PASSES[:2]  # the baselines have no single call for value and gradient


# ---- timers --------------------------------------------------------------------------------------


class Timer:
    """Timer by the host's clock, in milliseconds; the device is idle when a run starts."""

    unit, min_rounds, max_rounds = "ms", 8, 200

    def __init__(self, device: str = "cpu") -> None:
        self._device = device

    def copies(self, count: int) -> dict[str, Program]:
        """Return copies that move ``count`` bytes, by name; a CPU has none."""
        return {}

    def prepare(self, program: Program) -> tuple[Program, str]:
        """Return the callable for ``measure``, and why it is not a CUDA graph ("" if it is)."""
        return program, ""

    def measure(self, run: Program) -> float:
        """Return the time of one run."""
        if self._device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        result = run()
        end = time.perf_counter()
        # Outside the timing: this also returns memory that other programs left to the allocator.
        del result
        return 1e3 * (end - begin)


class GraphTimer(Timer):
    """Timer of programs in CUDA graphs, which start with other data in the L2 cache.

    A graph repeats its program, each time after a read of other data. The time of these reads is
    measured with an empty program and subtracted. So the host's work and the start of a graph do
    not count. Writes that a program leaves in the cache do.
    """

    min_rounds = 20

    def __init__(self, device: str = "cuda") -> None:
        super().__init__(device)
        self._other = torch.zeros(FLUSH_BYTES // 4, device=device, dtype=torch.int32)
        self._failed: list[torch.cuda.CUDAGraph] = []
        self._reads, _ = self.prepare(lambda: None)

    def copies(self, count: int) -> dict[str, Program]:
        """Return a copy that reads half of the bytes and writes the other half."""
        source = torch.zeros(count // 2, device=self._device, dtype=torch.uint8)
        return {"copy": partial(torch.empty_like(source).copy_, source)}

    def prepare(self, program: Program) -> tuple[Program, str]:
        """Return the replay of the program's graph, or its launches if it cannot be captured."""

        def repeat() -> None:
            for _ in range(REPEATS):
                self._other.max()
                program()

        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            repeat()  # a capture may not compile, load modules or allocate
        torch.cuda.current_stream().wait_stream(side)
        try:
            # A failed capture does not restore the current stream.
            restore = torch.cuda.stream(torch.cuda.current_stream())
            with restore, torch.cuda.graph(graph):
                repeat()
        except RuntimeError as error:
            self._failed.append(graph)  # the allocator still queries it
            # In older torch the generator stays in capture mode, which blocks every replay, until
            # another capture succeeds.
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                self._other.max()
            return repeat, str(error.__context__ or error).partition("\n")[0]
        return graph.replay, ""

    def measure(self, run: Program) -> float:
        """Return the mean time of the repeats of one run."""
        before, begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        torch.cuda.synchronize()
        torch.cuda._sleep(SLEEP_CYCLES)  # the host launches everything before the device starts
        before.record()
        self._reads()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return (begin.elapsed_time(end) - before.elapsed_time(begin)) / REPEATS


class PeakMemory(Timer):
    """Meter of the peak memory that a run allocates on top of existing memory, in bytes."""

    unit, min_rounds, max_rounds = "bytes", 1, 1

    def measure(self, run: Program) -> int:
        """Return the peak of a second run."""
        # The profiler knows the sizes of allocations that it has seen. Gradients that the first
        # run leaves count as freed in the second one.
        device = torch.device(self._device)
        peak_memory(device, run)
        return peak_memory(device, run)


@cache
def timer_for(device: str) -> Timer:
    """Return the timer of a device type."""
    return GraphTimer() if device == "cuda" else Timer()


class Comparison(NamedTuple):
    """Programs to measure in the same rounds: ``ours`` on each back end, ``others`` once."""

    setting: Row
    others: dict[str, Program]
    ours: dict[str, Program]
    meter: Timer
    backends: dict[str, Callable[[], AbstractContextManager[object]]]
    seconds: float = 1.0  # approximate total

    def rows(self) -> list[Row]:
        """Measure all programs, and return a row of medians for each back end.

        A round runs every program once, in random order. Other load on the machine, and caches
        that the previous program filled, then affect all programs equally.
        """
        programs = {(name, ""): run for name, run in self.others.items()}
        programs |= {
            (name, backend): run for backend in self.backends for name, run in self.ours.items()
        }
        uncaptured: dict[tuple[str, str], str] = {}
        samples: dict[tuple[str, str], list[float]] = {key: [] for key in programs}

        def use(backend: str) -> AbstractContextManager[object]:
            return self.backends[backend]() if backend else nullcontext()

        def measure(name: str, backend: str) -> float:
            with use(backend):
                return self.meter.measure(programs[name, backend])

        for name, backend in programs:
            with use(backend):
                programs[name, backend], reason = self.meter.prepare(programs[name, backend])
            if reason:
                uncaptured[name, backend] = reason
            measure(name, backend)  # warm-up: compiles, and fills the allocator
        order, shuffle, rounds = list(programs), random.Random(0).shuffle, 0
        least, most = self.meter.min_rounds, self.meter.max_rounds
        end = time.perf_counter() + self.seconds
        while rounds < least or (rounds < most and time.perf_counter() < end):
            shuffle(order)
            for key in order:
                samples[key].append(measure(*key))
            rounds += 1
        medians = {key: round(statistics.median(values), 6) for key, values in samples.items()}

        def row(backend: str) -> Row:
            def select(values: dict[tuple[str, str], Any]) -> dict[str, Any]:
                return {name: value for (name, b), value in values.items() if b in ("", backend)}

            head = {**self.setting, "backend": backend, "rounds": rounds}
            head[self.meter.unit] = select(medians)
            return head | ({"uncaptured": select(uncaptured)} if select(uncaptured) else {})

        return [row(backend) for backend in self.backends]


def backend_contexts(device: str) -> dict[str, Callable[[], AbstractContextManager[object]]]:
    """Return a context manager for each back end; a single one needs no switch."""
    names = backends(device)
    several = len(names) > 1  # a switch runs Python code, which evicts data from caches
    return {name: partial(at_fused.use_backend, name) if several else nullcontext for name in names}


# ---- parts: tables.py has their titles and tables ------------------------------------------------


def compare(
    device: str,
    setting: Row,
    inputs: Inputs,
    has_floor: bool = False,
    backward: bool = True,
    meter: Timer | None = None,
    seconds: float = 1.0,
) -> Comparison:
    """Compare at_loss with the baselines, and with one read of the bytes if ``has_floor``."""
    others = {name: inputs.step(loss, backward) for name, loss in baselines().items()}
    if has_floor:
        others["floor"] = inputs.reader(joined=device == "cuda")
    ours, meter = {"at_fused": inputs.step(at_fused.at_loss, backward)}, meter or timer_for(device)
    return Comparison(setting, others, ours, meter, backend_contexts(device), seconds)


def compare_case(device: str, case: str, dtype: str, layout: str, pass_name: str) -> Comparison:
    inputs = Inputs.make(case, dtype, layout, device)
    minimum, backward = inputs.minimum_bytes(), pass_name != "forward"
    moved = {"floor": minimum["read"], "at_fused": minimum[pass_name]}
    setting = {"case": case[0], "dtype": dtype, "layout": layout, "pass": pass_name, "bytes": moved}
    comparison = compare(device, setting, inputs, True, backward=backward, seconds=2.0)
    if pass_name not in BASELINE_PASSES:
        call = partial(at_fused.at_value_and_grad, inputs.students, inputs.teachers)
        comparison.ours["at_fused"] = call
    copies = comparison.meter.copies(minimum[pass_name])
    comparison.others.update(copies)
    moved |= dict.fromkeys(copies, minimum[pass_name])
    return comparison


def compare_size(device: str, batch: int, channels: int) -> Comparison:
    inputs = Inputs.make((batch, [(channels, channels, 28)]), device=device)
    setting = {"shape": [batch, channels, 28, 28], "bytes": inputs.minimum_bytes()["read"]}
    return compare(device, setting, inputs, has_floor=True)


def compare_memory(device: str, divisor: int) -> Comparison:
    inputs = Inputs.make(TIMED_CASES[1], device=device, divisor=divisor)
    gradient = sum(x.nbytes for x in inputs.students)
    setting = {"case": "b", "batch": len(inputs.students[0]), "gradient": gradient}
    return compare(device, setting, inputs, meter=PeakMemory(device))


def compare_call(device: str, pairs: int, pass_name: str) -> Comparison:
    """Compare calls on tiny features, by the host's clock."""
    inputs = Inputs.make((4, [(8, 8, 4)] * pairs), device=device)
    setting = {"pairs": pairs, "shape": [4, 8, 4, 4], "pass": pass_name}
    return compare(device, setting, inputs, backward=pass_name != "forward", meter=Timer(device))


def compare_steps(device: str, name: str) -> Comparison:
    """Compare whole training steps, and their peak memory."""
    torch.manual_seed(0)
    with torch.device(device):
        programs = training.programs(training.NETWORKS[name]())
    memory = PeakMemory(device)
    peaks = {key: memory.measure(run) for key, run in programs.items()}
    fused = {key: programs.pop(key) for key in ("drop-in", "tap", "prepared")}
    setting, contexts = {"networks": name, "bytes": peaks}, backend_contexts(device)
    return Comparison(setting, programs, fused, timer_for(device), contexts, 20.0)


# Name -> comparison, and its settings.
PARTS: dict[str, tuple[Callable[..., Comparison], Sequence[Sequence[Any]]]] = {
    "cases": (compare_case, [(*setting, name) for setting in SETTINGS for name in PASSES]),
    "sizes": (compare_size, SIZES),
    "memory": (compare_memory, [(8,), (4,), (2,), (1,)]),
    "calls": (compare_call, list(itertools.product((1, 3), BASELINE_PASSES))),
    "steps": (compare_steps, [(name,) for name in training.NETWORKS]),
}
