"""The CUDA kernels as tasks of the model: how plan.h cuts a list, and the loops of csrc/cuda."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from functools import cache

from benchmarks import ROOT
from benchmarks.model import THREADS, Cache, Device, Kernel, Round, Task, slots

sys.path.append(str(ROOT / "tests"))
from plan_library import (
    BYTES,
    H100,
    PLANAR,
    Access,
    Feature,
    Launch,
    plan_pairs,
    plan_sweeps,
)

IN_FLIGHT = 4  # rows of a thread: power.cuh, Square::rows_in_flight; of single elements twice
COPIED = 4  # elements of each of two maps that a thread reads back at a time: loss.cuh, copy_maps
REGISTERS = 80  # of a thread, at the most: tests/test_cuda_compile.py

Rounds = tuple[Round, ...]


def turns(count: int, step: int) -> list[int]:
    """Split a loop over ``count`` into turns of ``step`` at the most."""
    return [min(step, count - begin) for begin in range(0, count, step)]


def extent(x: Feature, access: Access, positions: int) -> tuple[int, int]:
    """Rows, and columns of loads, of some positions: plan.h, rows_of and columns_of."""
    if x.layout == PLANAR:
        return x.C // access.fold, positions * access.fold // access.vector
    return positions, x.C // access.vector


def loops(
    x: Feature, access: Access, lanes: int, extent: tuple[int, int]
) -> tuple[list[int], list[int]]:
    """The turns of the outer loop, and of the inner, which is the one over channels."""
    planar = x.layout == PLANAR
    in_flight = IN_FLIGHT * (2 if planar and access.vector == 1 else 1)
    rows, columns = turns(extent[0], THREADS // lanes * in_flight), turns(extent[1], lanes)
    return (columns, rows) if planar else (rows, columns)


@cache
def map_rounds(device: Device, x: Feature, access: Access, positions: int) -> Rounds:
    """attention_map.cuh: the map of some positions, in tiles whose threads meet."""
    meet = device.shuffle * math.log2(access.lanes)
    if x.layout == PLANAR:
        meet = device.sum if access.lanes < THREADS or access.fold > 1 else 0
    size = access.vector * BYTES[x.dtype]
    outer, inner = loops(x, access, access.lanes, extent(x, access, positions))
    tiles = ([*(Round(a * b * size) for b in inner), Round(wait=meet)] for a in outer)
    return tuple(itertools.chain.from_iterable(tiles))


@cache
def sweep_rounds(
    device: Device, x: Feature, access: Access, lanes: int, span: tuple[int, int], cached: bool
) -> Rounds:
    """sweep.cuh: the gradient of some rows and columns; coefficients come with a tile's first."""
    size = access.vector * BYTES[x.dtype]
    outer, inner = loops(x, access, lanes, span)
    if cached:
        return tuple(Round(0, a * b * size, device.cached) for a in outer for b in inner)
    coefficients = [min(x.N, a * access.vector) if x.layout == PLANAR else a for a in outer]
    return tuple(
        Round(a * b * size + (0 if i else 4 * k), a * b * size)
        for a, k in zip(outer, coefficients, strict=True)
        for i, b in enumerate(inner)
    )


def losses(
    device: Device,
    launch: Launch,
    students: Sequence[Feature],
    teachers: Sequence[Feature],
    maps: int,
    l2: Cache,
) -> Kernel:
    """at_loss.cu and at_value_and_grad.cu: losses, ``maps`` of them left for a backward pass.

    And the gradients of what is kept on chip.
    """
    tasks: list[Task] = []
    begin, arrive = Round(wait=device.start), Round(wait=device.atomic)
    for member in launch.members:
        s, t = students[member.number], teachers[member.number]
        sides = [(s, member.student), (t, member.teacher)]
        l2.misses(((x.address, b), x.bytes) for b in range(s.B) for x in (s, t))
        of_maps = 2 * device.sum + 3 * math.ceil(s.N / THREADS) * device.turn
        if member.samples:
            sample = [r for x, access in sides for r in map_rounds(device, x, access, x.N)]
            if member.sweep:
                sample.append(Round(writes=s.bytes, wait=of_maps + s.bytes / device.port))
            else:
                sample.append(Round(writes=maps * 4 * s.N, wait=of_maps))
            counts = turns(s.B, member.samples)
            tasks += [Task([begin, *sample * count, arrive]) for count in counts]
            continue
        back = [Round(wait=device.cached)] * math.ceil(s.N / (THREADS * COPIED))
        last = [*back, Round(writes=4 * s.N, wait=of_maps), arrive]
        pieces = [
            [begin, *map_rounds(device, x, access, n), Round(writes=4 * n, wait=device.atomic)]
            for x, access in sides
            for n in turns(s.N, member.positions)
        ]
        tasks += [Task(piece, (member.number, b), last) for b in range(s.B) for piece in pieces]
    # The last block of all adds the samples' losses, a warp for each pair.
    end = Round(wait=device.cached + 2 * device.sum)
    return Kernel(tasks, slots(device, REGISTERS, launch.shared), [end])


def sweep(device: Device, launch: Launch, features: Sequence[Feature], l2: Cache) -> Kernel:
    """attention_map_backward.cu: gradients, of samples that the cache may still have."""
    tasks = []
    for member in launch.members:
        x, access, cut = features[member.number], member.student, member.sweep
        rows, columns = extent(x, access, x.N)
        spans = list(itertools.product(turns(rows, cut.rows), turns(columns, cut.columns)))
        for begin in range(0, x.B, member.samples):
            held = []
            for b in range(begin, min(begin + member.samples, x.B)):
                held.append(not l2.misses([((x.address, b), x.bytes)]))
                l2.misses([((x.address, b, "gradient"), x.bytes)])
            for span in spans:
                rounds = [Round(wait=device.start)]
                for cached in held:
                    rounds += sweep_rounds(device, x, access, cut.lanes, span, cached)
                tasks.append(Task(rounds))
    return Kernel(tasks, slots(device, REGISTERS, launch.shared))


def zeroed(device: Device, size: int) -> Kernel:
    """The counters of a launch."""
    return Kernel([Task([Round(writes=size, wait=device.start)])], 1)


def read_again(students: Sequence[Feature], cut: Launch) -> list[Feature]:
    """The students whose samples value and gradient does not keep on chip."""
    numbers = sorted(member.number for member in cut.members if not member.sweep)
    return [students[number] for number in numbers]


def passes(
    device: Device, students: Sequence[Feature], teachers: Sequence[Feature]
) -> dict[str, list[Kernel]]:
    """The launches of each pass; only the second of value and gradient finds any in the cache."""
    counters, l2 = zeroed(device, 4 * sum(x.B for x in students)), Cache(device.cache)
    cut = plan_pairs(students, teachers, H100, outs=students)
    both = [counters, losses(device, cut, students, teachers, 1, l2)]
    if again := read_again(students, cut):
        both.append(sweep(device, plan_sweeps(again, again, H100), again, l2))
    cut = plan_pairs(students, teachers, H100)
    loss = losses(device, cut, students, teachers, 2, Cache(0))
    gradient = sweep(device, plan_sweeps(students, students, H100), students, Cache(0))
    return {"forward": [counters, loss], "backward": [gradient], "value and gradient": both}
