"""What is timed, as rows.

A row says what the programs worked on, which back end ran at_fused, and the median milliseconds of
all programs, which took turns in the same rounds: "at_fused" and its likes, "eager" (the popular
lines), "compile" (torch.compile of them), "floor" (one read of the same bytes), on a GPU "copy".
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

import torch

import at_fused
from at_fused import _ops
from benchmarks import steps as training
from benchmarks.cases import (
    CASES,
    DTYPES,
    LAYOUTS,
    PASSES,
    Inputs,
    backends,
    ours,
    popular_losses,
    rivals,
)
from benchmarks.methods import VARIANTS, differentiable
from benchmarks.timing import COPY_BYTES, Comparison, CpuTimer, Program, Row, medians, timer

KINDS = [(dtype, layout) for dtype in DTYPES for layout in LAYOUTS]
METHODS = [
    (name, case, dtype, layout)
    for name, variant in VARIANTS.items()
    for case in variant.cases
    for dtype in DTYPES
    for layout in variant.layouts
]
# Batch and channels of a pair with maps of 28x28, from 6 kB to 206 MB.
SIZES = [(1, 1), (4, 1), (4, 4), (32, 2), (32, 8), (32, 32), (32, 128), (32, 512), (32, 1024)]
MEMORY_CASE, MEMORY_SHARES = list(CASES)[1], (8, 4, 2, 1)
OWN_ROUNDS = 12
*TWO_PASSES, ONE_PASS = PASSES


# ---- at_loss -------------------------------------------------------------------------------------


def at_loss(device: str, case: str, dtype: str, layout: str) -> dict[str, Comparison]:
    """The passes of a case; ``at_value_and_grad`` takes part in forward and backward, its rival."""
    torch.manual_seed(0)
    inputs = Inputs.make(case, dtype, layout, device)
    losses = rivals()
    least = {name: read + written for name, (read, written) in inputs.floors().items()}
    read = sum(x.nbytes for side in inputs for x in side)
    found = {}
    for direction in TWO_PASSES:
        backward = direction == "forward+backward"
        fused = {"at_fused": inputs.step(ours, backward)}
        bytes_ = {"floor": read, "at_fused": least["forward"] + backward * least["backward"]}
        bytes_ |= {"copy": 2 * COPY_BYTES} if device == "cuda" else {}
        if backward:
            fused[ONE_PASS] = inputs.value_and_gradient()
            bytes_[ONE_PASS] = least[ONE_PASS]
        found[direction] = Comparison(
            device,
            timer(device),
            2.5,
            {"case": case[0], "dtype": dtype, "layout": layout, "pass": direction, "bytes": bytes_},
            {name: inputs.step(loss, backward) for name, loss in losses.items()}
            | {"floor": inputs.read_all()},
            fused,
        )
    return found


def passes_of(rows: list[Row]) -> list[Row]:
    """``at_loss``'s rows, value and gradient in rows of its own, as another pass of at_fused."""
    found = []
    for row in rows:
        figures = {key: dict(row[key]) for key in ("bytes", "ms")}
        one_pass = {key: values.pop(ONE_PASS, None) for key, values in figures.items()}
        found.append(row | figures)
        if one_pass["ms"]:
            figures = {key: figures[key] | {"at_fused": one_pass[key]} for key in figures}
            found.append(row | figures | {"pass": ONE_PASS})
    return found


def cases(device: str) -> Iterator[Row]:
    """The canonical cases."""
    for case in CASES:
        for kind in KINDS:
            for comparison in at_loss(device, case, *kind).values():
                yield from passes_of(comparison.rows())


def forward_and_backward(
    device: str, inputs: Inputs
) -> tuple[dict[str, Program], dict[str, Program]]:
    """Of the others, and ours."""
    others = {name: inputs.step(loss, True) for name, loss in rivals().items()}
    return others, {"at_fused": inputs.step(ours, True)}


def sizes(device: str) -> Iterator[Row]:
    """Forward and backward of one pair, from next to nothing to more than any cache holds."""
    for batch, channels in SIZES:
        inputs = Inputs.random(batch, [(channels, channels, 28)], device=device)
        others, fused = forward_and_backward(device, inputs)
        others["floor"] = inputs.read_all()
        read = sum(x.nbytes for side in inputs for x in side)
        what = {"shape": [batch, channels, 28, 28], "bytes": read}
        yield from Comparison(device, timer(device), 1.0, what, others, fused).rows()


def memory(device: str) -> Iterator[Row]:
    """The most that forward and backward allocate, at several batches."""
    for share in MEMORY_SHARES:
        inputs = Inputs.make(MEMORY_CASE, "fp32", "NCHW", device, share)
        others, fused = forward_and_backward(device, inputs)
        for backend in backends(device):
            found = {}
            with at_fused.use_backend(backend):
                for name, program in (others | fused).items():
                    program()  # what compiling allocates is not the program's
                    found[name] = training.peak_bytes(program, device)
            yield {
                "case": MEMORY_CASE[0],
                "batch": len(inputs.students[0]),
                "backend": backend,
                "gradient": sum(x.nbytes for x in inputs.students),
                "bytes": found,
            }


def threads(device: str) -> Iterator[Row]:
    """From one thread to all of the CPU's."""
    most = torch.get_num_threads()
    counts = sorted({*(2**k for k in range(most.bit_length())), most})

    class On:
        """As many threads, awake."""

        def __init__(self, key: tuple[str, int]) -> None:
            self.count = key[1]

        def __enter__(self) -> None:
            torch.set_num_threads(self.count)
            torch.ones(1 << 20).sum()

        def __exit__(self, *error: object) -> None:
            torch.set_num_threads(most)

    for case in CASES:
        inputs = Inputs.make(case, "fp32", "NCHW")
        programs = {
            "floor": inputs.read_all(),
            "forward": inputs.step(ours, False),
            "forward+backward": inputs.step(ours, True),
        }
        timed = {(name, n): program for n in counts for name, program in programs.items()}
        ms, rounds = medians(timed, timer(device), 2.0, On)
        for count in counts:
            yield {
                "case": case[0],
                "threads": count,
                "backend": "cpu",
                "rounds": rounds,
                "ms": {name: ms[name, count] for name in programs},
            }


def calls(device: str) -> Iterator[Row]:
    """What a call costs: forward and backward of three pairs of 4x8x4x4, by the host's clock."""
    inputs = Inputs.random(4, [(8, 8, 4)] * 3, device=device)
    wait = timer(device).blocking
    programs = {"eager": popular_losses, "at_fused": ours}
    eager, fused = ({name: wait(inputs.step(programs[name], True))} for name in programs)
    what = {"pairs": 3, "shape": [4, 8, 4, 4]}
    yield from Comparison(device, CpuTimer(), 2.0, what, eager, fused).rows()


# ---- the rest of the method ----------------------------------------------------------------------


def method(device: str, name: str, case: str, dtype: str, layout: str) -> Comparison:
    """Forward and backward of a variant."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    variant = VARIANTS[name]
    with torch.device(device):
        inputs = variant.make(case, dtype, layout)
    wanted = differentiable(inputs)

    def step(loss: Callable[..., torch.Tensor]) -> Program:
        return lambda: torch.autograd.grad(loss(*inputs), wanted)

    compiled = torch.compile(variant.eager, dynamic=False)
    what = {"variant": name, "case": case, "dtype": dtype, "layout": layout}
    others = {"eager": step(variant.eager), "compile": step(compiled)}
    return Comparison(device, timer(device), 1.0, what, others, {"at_fused": step(variant.ours)})


def methods(device: str) -> Iterator[Row]:
    """Every variant."""
    for setting in METHODS:
        yield from method(device, *setting).rows()


# ---- whole steps ---------------------------------------------------------------------------------


def step(device: str, name: str) -> Comparison:
    """Training steps of a pair of networks; what they hold, and what in them is AT, is found here.

    The popular lines' and the drop-in's own time is that of their calls alone, on features like the
    networks'. AttentionTransfer's is taken within the step, by the host's clock: on the CPU.
    """
    torch.manual_seed(0)
    with torch.device(device):
        networks = training.NETWORKS[name]()
    programs = training.programs(networks)
    what: Row = {
        "networks": name,
        "bytes": {key: training.peak_bytes(run, device) for key, run in programs.items()},
    }
    features = Inputs(*training.features_of(networks))
    losses = {"eager": popular_losses, "drop-in": ours}
    alone = {key: features.step(loss, True) for key, loss in losses.items()}
    what["own"], _ = medians(alone, timer(device), 2.0)
    if device == "cpu":
        own = training.own_seconds(networks, OWN_ROUNDS)
        what["own"]["tap"] = statistics.median(seconds for _, seconds in own) * 1e3
        what["share"] = statistics.median(seconds / whole for whole, seconds in own)
    fused = {key: programs.pop(key) for key in ("drop-in", "tap", "prepared")}
    return Comparison(device, timer(device), 20.0, what, programs, fused)


def steps(device: str) -> Iterator[Row]:
    """Both pairs of networks."""
    for name in training.NETWORKS:
        yield from step(device, name).rows()


def tap(device: str, case: str, dtype: str, layout: str) -> Comparison:
    """The map's gradient added in place, against a gradient of its own that autograd adds."""
    torch.manual_seed(0)
    features = [x.detach() for x in Inputs.make(case, dtype, layout, device).students]
    gradients = [torch.randn_like(x) for x in features]
    of_maps = [torch.randn(len(x), x[0, 0].numel(), device=device) for x in features]

    def in_place() -> None:
        for g, x, q in zip(gradients, features, of_maps, strict=True):
            _ops.attention_tap_backward_(g, x, q, 2.0, "mean")

    def added(found: Callable[[], list[torch.Tensor]]) -> None:
        # The engine adds the later gradient into the earlier, AT's, which nobody else holds.
        for own, g in zip(found(), gradients, strict=True):
            own.add_(g)

    def drop_in() -> list[torch.Tensor]:
        pairs = list(range(len(features)))
        return _ops.attention_map_backward(features, of_maps, None, pairs, 2.0)

    def eager() -> list[torch.Tensor]:
        return [
            x * (q * (2 / x.shape[1])).view(len(x), 1, *x.shape[2:]).to(x.dtype)
            for x, q in zip(features, of_maps, strict=True)
        ]

    what = {"case": case[0], "dtype": dtype, "layout": layout}
    fused = {"tap": in_place, "drop-in": lambda: added(drop_in)}
    return Comparison(device, timer(device), 1.5, what, {"eager": lambda: added(eager)}, fused)


def taps(device: str) -> Iterator[Row]:
    """The backward of taps, of the canonical cases."""
    for case in CASES:
        for kind in KINDS:
            yield from tap(device, case, *kind).rows()


PARTS: dict[str, Callable[[str], Iterator[Row]]] = {
    "cases": cases,
    "sizes": sizes,
    "memory": memory,
    "threads": threads,
    "calls": calls,
    "methods": methods,
    "steps": steps,
    "taps": taps,
}
ON_CPU_ONLY = ("threads",)
