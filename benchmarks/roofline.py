"""What the CUDA kernels move, counted, against the least that has to move; and a model of the time.

    python -m benchmarks.roofline

No GPU is needed. The kernels run in the tests' harness (tests/simt), whose instrumented loads and
stores count bytes and launches. The eager lines are counted operator by operator (inputs read,
outputs written, views free), torch.compile by the kernels of inductor's scheduler. Times are bytes
over bandwidth plus launches: a model, not a measurement. Writes results/roofline.json and .md.

The rest of the method is counted on a quarter of each batch and of an H100's multiprocessors, which
cuts every sample as the whole device would, times four.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from at_fused import _ops
from benchmarks import ROOT
from benchmarks.cases import (
    AT_LOSS,
    CANONICAL,
    CASES,
    DTYPES,
    LAYOUTS,
    TOKENS,
    VARIANTS,
    Inputs,
    Variant,
)
from benchmarks.results import FOLDER, MODEL, ResultError, write
from benchmarks.tables import markdown

sys.path.append(str(ROOT / "tests"))
from plan_library import H100, INTERLEAVED, PLANAR, dense, plan
from simt_backend import Counters, simt

# An H100 SXM; the launch overhead is an assumption (a queue that is kept full).
DEVICE, BANDWIDTH, L2_BYTES, LAUNCH_SECONDS = "H100", 3.35e12, 50e6, 2e-6
FILE = FOLDER / f"{MODEL}.json"

PASSES = ("forward", "backward", "value and gradient")
SHARE = 4  # divides the batches and the multiprocessors
SETTINGS = list(itertools.product(CANONICAL, DTYPES, LAYOUTS))
# The first case of each. Features are pooled by torch's own operator, whose bytes do not count.
METHODS = [
    (name, variant.cases[0], "fp32", variant.layouts[0])
    for name, variant in VARIANTS.items()
    if not name.startswith("resize features")
]


class Count(NamedTuple):
    """Bytes and kernels."""

    bytes: int
    launches: int

    def __add__(self, other: Count) -> Count:  # type: ignore[override]
        return Count(self.bytes + other.bytes, self.launches + other.launches)

    def model_us(self) -> float:
        """The modelled time."""
        return 1e6 * (self.bytes / BANDWIDTH + self.launches * LAUNCH_SECONDS)


class Row(NamedTuple):
    """A pass of a case, or a variant's forward and backward, which "direction" then names."""

    case: str
    dtype: str
    layout: str
    direction: str
    floor: int
    counted: Count  # distinct bytes per launch
    threads: int  # bytes over all accesses of all threads
    again: int  # bytes of students that are read a second time
    served: int  # of these, by the second-level cache
    eager: Count
    compiled: Count

    @property
    def ratio(self) -> float:
        """Distinct bytes to the floor."""
        return self.counted.bytes / self.floor

    def at_fused(self) -> Count:
        """What goes through the device's memory: second reads that the cache misses as well."""
        return self.counted + Count(self.again - self.served, 0)


class Model(NamedTuple):
    """All that is counted: the canonical cases, and the rest of the method."""

    rows: list[Row]
    methods: list[Row]


# ---- at_fused: run in the harness ----------------------------------------------------------------


def counted(harness: ctypes.CDLL, run: Callable[[], Any]) -> tuple[Any, Counters]:
    """What a program returns, and its counters."""
    harness.simt_reset_counters()
    result, counters = run(), Counters()
    if harness.simt_last_error():
        raise RuntimeError(harness.simt_last_error().decode())
    harness.simt_counters(ctypes.byref(counters))
    return result, counters


def count_passes(inputs: Inputs, share: int) -> dict[str, Counters]:
    """The counters of each pass of at_loss, on 1/share of the device."""
    students, teachers = [x.detach() for x in inputs.students], inputs.teachers
    pairs = list(range(len(students)))
    options = [], [], [], 2.0, "mean", "code", "sum", "max", 1e-12
    at_loss = torch.ops.at_fused.at_loss.default
    with simt(multiprocessors=H100.multiprocessors // share) as harness:
        (_, maps), forward = counted(
            harness, lambda: at_loss(students, teachers, *options, True, False)
        )
        k, one = maps[: len(pairs)], torch.ones(())
        _, backward = counted(
            harness, lambda: _ops.attention_map_backward(students, k, one, pairs, 2.0)
        )
        _, both = counted(
            harness, lambda: _ops.at_value_and_grad(students, teachers, *options, 1.0, None)
        )
    return dict(zip(PASSES, (forward, backward, both), strict=True))


def second_reads(case: str, dtype: str, layout: str) -> tuple[int, int]:
    """Bytes of students that value-and-gradient reads again, and those that L2 should still have.

    csrc/cuda/plan.h itself says which samples do not fit on chip, and how many others begin before
    one is read again.
    """
    batch, stages = CASES[case]
    number = {torch.float32: 0, torch.bfloat16: 3}[DTYPES[dtype]]  # csrc/feature.h: Dtype
    kind = number, PLANAR if layout == "NCHW" else INTERLEAVED
    again = served = 0
    for c, d, h in stages:
        student, teacher = dense(batch, c, h * h, *kind), dense(batch, d, h * h, *kind)
        _, samples, *_, lag = plan("gradient", student, teacher, student, False, H100)[:7]
        if samples == 0:
            between = lag * (2 * student.bytes + teacher.bytes)
            again += batch * student.bytes
            served += batch * student.bytes if between <= L2_BYTES else 0
    return again, served


# ---- the others: operators and schedules ---------------------------------------------------------


def touched(x: Tensor) -> int:
    """Bytes that an operator reads or writes of a tensor, which may be expanded."""
    sizes = [n for n, stride in zip(x.shape, x.stride(), strict=True) if stride]
    return math.prod(sizes) * x.itemsize


class Operators(TorchDispatchMode):
    """Counts each operator as one kernel that reads its inputs and writes its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Count(0, 0)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if not function.is_view and "empty" not in function.name():
            leaves = tree_leaves((args, kwargs, out))
            tensors = {id(x): x for x in leaves if isinstance(x, Tensor)}
            self.count += Count(sum(touched(x) for x in tensors.values()), 1)
        return out


def count_eager(inputs: Inputs, variant: Variant) -> dict[str, Count]:
    """The popular lines' operators, forward and backward, on tensors without data."""
    with Operators() as forward:
        loss = inputs.step(variant.popular, backward=False)()
    with Operators() as backward:
        torch.autograd.grad(loss.sum() if loss.dim() else loss, inputs.students)
    return {"forward": forward.count, "backward": backward.count}


def count_compiled(inputs: Inputs, variant: Variant) -> dict[str, Count]:
    """The kernels into which inductor's scheduler fuses the popular lines, and their bytes.

    With its Triton back end, as on a GPU, but scheduled for the CPU: a GPU splits large reductions,
    which is a few launches more. Nothing is compiled.
    """
    from torch._functorch.aot_autograd import aot_function, make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor import config
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    found: dict[str, Count] = {}

    def counter(direction: str) -> Callable[[Any, Any], Any]:
        def count(module: Any, examples: Any) -> Any:
            graph = GraphLowering(module, example_inputs=examples)
            with V.set_graph_handler(graph), V.set_debug_handler(DebugContext()):
                graph.run(*examples)
                graph.init_wrapper_code()
                graph._update_scheduler()
                moved, kernels, _ = graph.count_bytes()
            found[direction] = Count(int(moved), len(kernels))
            return make_boxed_func(module.forward)

        return count

    compiled = aot_function(
        variant.popular,
        counter("forward"),
        counter("backward"),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    with config.patch(cpu_backend="triton"):
        inputs.step(compiled)()
    return found


def count_others(
    case: str, dtype: str, layout: str, variant: Variant = AT_LOSS
) -> tuple[dict[str, Count], dict[str, Count]]:
    """Eager and compiled; both passes one after the other are those of value and gradient."""
    eager = count_eager(Inputs.make(case, dtype, layout, "meta", variant=variant), variant)
    with FakeTensorMode():
        compiled = count_compiled(Inputs.make(case, dtype, layout, variant=variant), variant)
    for count in (eager, compiled):
        count["value and gradient"] = count["forward"] + count["backward"]
    return eager, compiled


# ---- rows ----------------------------------------------------------------------------------------


def moved(c: Counters, share: int) -> tuple[Count, int]:
    """Distinct bytes and launches, and the bytes of all accesses, of the whole device."""
    distinct = share * (c.distinct_load_bytes + c.distinct_store_bytes)
    accesses = share * (c.load_bytes + c.store_bytes + c.atomic_bytes)
    return Count(distinct, c.launches), accesses


def rows_of(case: str, dtype: str, layout: str, share: int = 1) -> list[Row]:
    """The three passes of a case; at_fused is counted on 1/share of it."""
    setting = case, dtype, layout
    inputs = Inputs.make(*setting, share=share)
    eager, compiled = count_others(*setting)
    rows = []
    for direction, counters in count_passes(inputs, share).items():
        floor = share * inputs.floors()[direction]
        twice = second_reads(*setting) if direction == "value and gradient" else (0, 0)
        others = eager[direction], compiled[direction]
        rows.append(
            Row(case[0], dtype, layout, direction, floor, *moved(counters, share), *twice, *others)
        )
    return rows


def method_row(name: str, case: str, dtype: str, layout: str) -> Row:
    """Forward and backward of a variant, on a share of the batch and of the device.

    What torch's own operators do to the maps between two of ours is not counted: a C-th of the
    bytes.
    """
    variant = VARIANTS[name]
    inputs = Inputs.make(case, dtype, layout, share=SHARE, variant=variant)
    with simt(multiprocessors=H100.multiprocessors // SHARE) as harness:
        _, counters = counted(harness, inputs.step(variant.ours()))
    both = [each["value and gradient"] for each in count_others(case, dtype, layout, variant)]
    floor = SHARE * method_floor(name, layout, inputs)
    return Row(case, dtype, layout, name, floor, *moved(counters, SHARE), 0, 0, *both)


def method_floor(name: str, layout: str, inputs: Inputs) -> int:
    """Bytes of all inputs, read once; of what the gradient reads again; and of the gradient.

    Skipped tokens need not be read. The gradient of a maximum reads the winners, which do not
    count.
    """
    students, teachers = (
        sum((x[:, 1:] if layout in TOKENS else x).nbytes for x in side)
        for side in (inputs.students, inputs.teachers)
    )
    extra = sum(x.nbytes for x in tree_leaves(inputs.extra))
    again = 0 if name == "max" else students
    return students + teachers + extra + again + sum(x.nbytes for x in inputs.students)


# ---- the files -----------------------------------------------------------------------------------


def save(model: Model) -> None:
    """Writes the counts and their table."""
    parts = {name: [row._asdict() for row in rows] for name, rows in model._asdict().items()}
    write(FILE, {"device": DEVICE, "parts": parts})
    FILE.with_suffix(".md").write_text(text(model))


def load(path: Path = FILE) -> Model:
    """The counts that were saved."""

    def row_of(fields: dict[str, Any]) -> Row:
        counts = {key: Count(*value) for key, value in fields.items() if isinstance(value, list)}
        return Row(**fields | counts)

    try:
        parts = json.loads(path.read_text())["parts"]
        return Model(*([row_of(fields) for fields in parts[name]] for name in Model._fields))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ResultError(f"{path}: not the counts of roofline.py: {error!r}") from error


NOTES = f"""\
- *floor*: forward reads S and T and writes the two maps that are kept; backward reads S and k and
  writes dS; value and gradient reads S and T and writes dS.
- *distinct*: each byte once per launch, read or written; *all accesses*: summed over every thread,
  which is what goes through the first-level caches. More than 1 % above the floor are maps of
  samples that several blocks share: the last block reads back what the others have just written.
- *S again*: students too large to stay on chip, read a second time. In brackets, as a model, the
  share that an L2 cache of {L2_BYTES / 1e6:.0f} MB should still have: all of a pair's where what is
  read and written in between fits it, else none. The model adds what it does not have.
- *eager*: operators of the popular lines, each one launch that reads its inputs and writes its
  outputs. *compile*: what inductor's scheduler makes of them, from its Triton back end for the CPU;
  a GPU splits large reductions, which is a few launches more.
- *us (model, not measured)*: bytes / {BANDWIDTH / 1e12} TB/s + launches x
  {1e6 * LAUNCH_SECONDS:.0f} us (an assumption), as if every kernel's bytes came from memory, at the
  full bandwidth.
"""


def table(rows: Sequence[Row], first: str = "pass") -> str:
    """The rows as Markdown."""
    lines = []
    for r in rows:
        again = f"{r.again / 1e6:.2f} ({r.served / r.again:.0%} L2)" if r.again else ""
        cells = [f"{r.floor / 1e6:.2f}", f"{r.counted.bytes / 1e6:.2f}", f"{r.ratio:.4f}x"]
        cells += [f"{r.threads / 1e6:.2f}", again, str(r.counted.launches)]
        for other in (r.eager, r.compiled):
            cells += [f"{other.bytes / 1e6:.2f}", str(other.launches)]
        cells += [f"{c.model_us():.1f}" for c in (r.at_fused(), r.eager, r.compiled)]
        lines.append(("cpu", r.case, r.dtype, r.layout, r.direction, *cells))
    heads = f"case | dtype | layout | {first} | floor, MB | distinct, MB | to floor"
    heads += " | all accesses, MB | S again, MB | launches | eager, MB | launches | compile, MB"
    heads += " | launches | us (model, not measured) | eager | compile"
    return "\n".join(markdown(heads, 4, lines))


def text(model: Model) -> str:
    """Everything, as roofline.md has it."""
    return f"""\
# Roofline: bytes counted, times a model, not measured

`python -m benchmarks.roofline`: the CUDA kernels in the harness, as on an H100. Full batches.
MB of 10^6 bytes; cases as in cases.py.

{table(model.rows)}

{NOTES}
## The rest of the method

Forward and backward, {SHARE} times what a share of 1/{SHARE} of each batch takes on as many of the
multiprocessors. The floor reads every input once, what the gradient needs a second time, and writes
the gradient. What torch does to maps (interpolation, a sum) is not counted for at_fused.

{table(model.methods, "variant")}
"""


def main() -> None:
    """Entry point."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    rows = [row for setting in SETTINGS for row in rows_of(*setting)]
    model = Model(rows, [method_row(*setting) for setting in METHODS])
    save(model)
    sys.stdout.write(text(model))


if __name__ == "__main__":
    main()
