"""The benchmarks: PARTS, each with its settings; ``Comparison.rows`` times them all.

A row says what the programs worked on, which back end ran at_fused, and the median milliseconds (or
bytes) of all programs, which took turns in the same rounds: "at_fused" and its likes, "eager" (the
popular lines), "compile" (torch.compile of them), "floor" (one read of the same bytes), on a GPU
"copy" (of the bytes that have to move). There all run in CUDA graphs; "uncaptured" says which could
not, and why.
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
from at_fused.train.speed import peak
from benchmarks import steps as training
from benchmarks.cases import (
    CANONICAL,
    KINDS,
    PASSES,
    Inputs,
    backends,
    rivals,
)

Program = Callable[[], object]
Row = dict[str, Any]

OTHER_BYTES = 256 << 20  # several times any second-level cache
REPEATS = 8  # of a program in its graph
HOST_CYCLES = 2_000_000  # about a millisecond of a GPU's clock
TWO_PASSES = PASSES[:2]  # that the others have


# ---- the timer -----------------------------------------------------------------------------------


class Clock:
    """Milliseconds of a run, by the host's clock; before it the device ends what it has to do."""

    unit, least, most = "ms", 8, 200

    def __init__(self, device: str = "cpu") -> None:
        self._device = device

    def copies(self, count: int) -> dict[str, Program]:
        """Programs that have to move so many bytes, by name."""
        return {}

    def prepare(self, program: Program) -> tuple[Program, str]:
        """Return what ``take`` runs for a program, and why that is not a graph, or ""."""
        return program, ""

    def take(self, run: Program) -> float:
        """One run of a program."""
        if self._device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        result = run()
        end = time.perf_counter()
        # Not timed: with its memory the allocator gives back what other programs left.
        del result
        return 1e3 * (end - begin)


class Graphs(Clock):
    """Milliseconds of a program in a CUDA graph, with other data in the second-level cache.

    Each of the graph's repeats follows a read of that other data; the reads' own time, that of a
    graph without a program, is taken off. So what the host does does not count, nor the start of a
    graph, but what a program leaves to be written back does.
    """

    least = 20

    def __init__(self, device: str = "cuda") -> None:
        super().__init__(device)
        self._other = torch.zeros(OTHER_BYTES // 4, device=device, dtype=torch.int32)
        self._failed: list[torch.cuda.CUDAGraph] = []
        self._reads, _ = self.prepare(lambda: None)

    def copies(self, count: int) -> dict[str, Program]:
        """A copy that reads half of the bytes and writes the other."""
        source = torch.zeros(count // 2, device=self._device, dtype=torch.uint8)
        return {"copy": partial(torch.empty_like(source).copy_, source)}

    def prepare(self, program: Program) -> tuple[Program, str]:
        """The replay of its graph; where it cannot be captured its launches, one by one."""

        def repeated() -> None:
            for _ in range(REPEATS):
                self._other.max()
                program()

        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            repeated()  # compiles, loads and allocates what a capture may not
        torch.cuda.current_stream().wait_stream(side)
        try:
            # A capture that fails does not leave its stream.
            own = torch.cuda.stream(torch.cuda.current_stream())
            with own, torch.cuda.graph(graph):
                repeated()
        except RuntimeError as error:
            self._failed.append(graph)  # the allocator goes on to ask it
            # Older torch's generator else stays in the capture, and lets no graph be replayed.
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                self._other.max()
            return repeated, str(error.__context__ or error).partition("\n")[0]
        return graph.replay, ""

    def take(self, run: Program) -> float:
        """One run of a program, of the mean of its repeats."""
        before, begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        torch.cuda.synchronize()
        torch.cuda._sleep(HOST_CYCLES)  # for the host to have launched all of it
        before.record()
        self._reads()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return (begin.elapsed_time(end) - before.elapsed_time(begin)) / REPEATS


class Allocations(Clock):
    """Bytes that a run holds at the most, beyond what was there before."""

    unit, least, most = "bytes", 1, 1

    def take(self, program: Program) -> int:
        """The most of a run."""
        # Twice: the profiler knows the sizes of what it has seen allocated. Only so do the
        # gradients that the first run leaves count as freed in the second, every time.
        device = torch.device(self._device)
        peak(device, program)
        return peak(device, program)


@cache
def clock(device: str) -> Clock:
    """The one for a device type."""
    return Graphs() if device == "cuda" else Clock()


class Comparison(NamedTuple):
    """Programs that take turns: ``ours`` on each back end, ``others`` once a round."""

    what: Row
    others: dict[str, Program]
    ours: dict[str, Program]
    meter: Clock
    backends: dict[str, Callable[[], AbstractContextManager[object]]]
    seconds: float = 1.0  # of measuring, about

    def rows(self) -> list[Row]:
        """A row for each back end, with the medians of some rounds.

        Every round runs all programs in random order: whatever else the machine does falls on all
        alike, and so does what the one before left in the caches.
        """
        programs = {(name, ""): run for name, run in self.others.items()}
        programs |= {(name, on): run for on in self.backends for name, run in self.ours.items()}
        uncaptured: dict[tuple[str, str], str] = {}
        found: dict[tuple[str, str], list[float]] = {each: [] for each in programs}

        def chosen(backend: str) -> AbstractContextManager[object]:
            return self.backends[backend]() if backend else nullcontext()

        def once(name: str, backend: str) -> float:
            with chosen(backend):
                return self.meter.take(programs[name, backend])

        for name, backend in programs:
            with chosen(backend):
                programs[name, backend], why = self.meter.prepare(programs[name, backend])
            if why:
                uncaptured[name, backend] = why
            once(name, backend)  # compiles, and fills the allocator
        order, shuffle, rounds = list(programs), random.Random(0).shuffle, 0
        end = time.perf_counter() + self.seconds
        while rounds < self.meter.least or (time.perf_counter() < end and rounds < self.meter.most):
            shuffle(order)
            for each in order:
                found[each].append(once(*each))
            rounds += 1
        medians = {each: round(statistics.median(values), 6) for each, values in found.items()}

        def row(backend: str) -> Row:
            def its(found: dict[tuple[str, str], Any]) -> dict[str, Any]:
                return {name: value for (name, on), value in found.items() if on in ("", backend)}

            head = {**self.what, "backend": backend, "rounds": rounds}
            head[self.meter.unit] = its(medians)
            return head | ({"uncaptured": its(uncaptured)} if its(uncaptured) else {})

        return [row(backend) for backend in self.backends]


def on(device: str) -> dict[str, Callable[[], AbstractContextManager[object]]]:
    """The back ends there; a single one needs no choice, which would cool the caches."""
    names = backends(device)
    several = len(names) > 1
    return {name: partial(at_fused.use_backend, name) if several else nullcontext for name in names}


# ---- the parts: tables.py says what they are -----------------------------------------------------


def compared(
    device: str,
    what: Row,
    inputs: Inputs,
    *floor: str,
    backward: bool = True,
    meter: Clock | None = None,
    seconds: float = 1.0,
) -> Comparison:
    """at_fused, its rivals, and "floor" if it is asked for."""
    others = {name: inputs.step(loss, backward) for name, loss in rivals().items()}
    others |= {name: inputs.read_all(device == "cuda") for name in floor}
    ours = {"at_fused": inputs.step(at_fused.at_loss, backward)}
    return Comparison(what, others, ours, meter or clock(device), on(device), seconds)


def at_loss(device: str, case: str, dtype: str, layout: str, direction: str) -> Comparison:
    inputs = Inputs.make(case, dtype, layout, device)
    floors, backward = inputs.floors(), direction != "forward"
    moved = {"floor": floors["read"], "at_fused": floors[direction]}
    what = {"case": case[0], "dtype": dtype, "layout": layout, "pass": direction, "bytes": moved}
    found = compared(device, what, inputs, "floor", backward=backward, seconds=2.0)
    if direction not in TWO_PASSES:
        both = partial(at_fused.at_value_and_grad, inputs.students, inputs.teachers)
        found.ours["at_fused"] = both
    copies = found.meter.copies(floors[direction])
    found.others.update(copies)
    moved |= dict.fromkeys(copies, floors[direction])
    return found


def size(device: str, batch: int, channels: int) -> Comparison:
    inputs = Inputs.make((batch, [(channels, channels, 28)]), device=device)
    what = {"shape": [batch, channels, 28, 28], "bytes": inputs.floors()["read"]}
    return compared(device, what, inputs, "floor")


def memory(device: str, share: int) -> Comparison:
    inputs = Inputs.make(CANONICAL[1], device=device, share=share)
    gradient = sum(x.nbytes for x in inputs.students)
    what = {"case": "b", "batch": len(inputs.students[0]), "gradient": gradient}
    return compared(device, what, inputs, meter=Allocations(device))


def call(device: str, pairs: int, direction: str) -> Comparison:
    """The host's time, by its clock."""
    inputs = Inputs.make((4, [(8, 8, 4)] * pairs), device=device)
    what = {"pairs": pairs, "shape": [4, 8, 4, 4], "pass": direction}
    return compared(device, what, inputs, backward=direction != "forward", meter=Clock(device))


def step(device: str, name: str) -> Comparison:
    """Compare whole training steps, and their memory."""
    torch.manual_seed(0)
    with torch.device(device):
        programs = training.programs(training.NETWORKS[name]())
    held = Allocations(device)
    what: Row = {"networks": name, "bytes": {key: held.take(run) for key, run in programs.items()}}
    fused = {key: programs.pop(key) for key in ("drop-in", "tap", "prepared")}
    return Comparison(what, programs, fused, clock(device), on(device), 20.0)


# Name -> what is compared, and its settings.
PARTS: dict[str, tuple[Callable[..., Comparison], Sequence[Sequence[Any]]]] = {
    "cases": (at_loss, [(*kind, direction) for kind in KINDS for direction in PASSES]),
    # Batch and channels: from 6 kB to 206 MB.
    "sizes": (size, [(1, 1), (4, 1), (4, 4), *((32, c) for c in (2, 8, 32, 128, 512, 1024))]),
    "memory": (memory, [(8,), (4,), (2,), (1,)]),
    "calls": (call, list(itertools.product((1, 3), TWO_PASSES))),
    "steps": (step, [(name,) for name in training.NETWORKS]),
}
