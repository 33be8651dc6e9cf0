"""The bytes that the CUDA kernels move, against the least that must move; a model of the time.

    python -m benchmarks.roofline

No GPU is needed. The kernels run in the tests' harness (tests/simt), whose instrumented loads and
stores count bytes and launches; on a quarter of each batch and of an H100's multiprocessors, which
cuts every sample as the whole device would, times four. The eager lines are counted operator by
operator (inputs read, outputs written, views free), torch.compile by the kernels of inductor's
scheduler. Times are a model's (model.py), not measured: at_fused's by the plan (kernels.py), the
others' as ideal kernels of their bytes. The host's time for a call is measured, on this machine's
CPU. Writes results/roofline.json and .md.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import math
import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import at_fused
from benchmarks import ROOT, kernels, model
from benchmarks.cases import (
    AT_LOSS,
    CANONICAL,
    CASES,
    DTYPES,
    LARGE,
    LAYOUTS,
    TOKENS,
    TRANSFORMERS,
    VARIANTS,
    Inputs,
    Variant,
    rivals,
)
from benchmarks.measure import Clock, Comparison, on
from benchmarks.model import Cache
from benchmarks.results import FOLDER, MODEL, ResultError, write
from benchmarks.tables import markdown

sys.path.append(str(ROOT / "tests"))
from plan_library import BYTES, H100, INTERLEAVED, PLANAR, Feature, dense, plan_pairs
from simt_backend import Counters, simt

FILE = FOLDER / f"{MODEL}.json"

PASSES = ("forward", "backward", "value and gradient")
SHARE = 4  # divides the batches and the multiprocessors
SETTINGS = [
    *itertools.product((*CANONICAL, LARGE), DTYPES, LAYOUTS),
    *itertools.product(TRANSFORMERS[:1], DTYPES, TOKENS),
]
PAIRS = (1, 3, 4)  # of the calls whose time on the host is taken: those of the cases
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


class Row(NamedTuple):
    """A pass of a case, or a variant's forward and backward, which "direction" then names."""

    case: str
    dtype: str
    layout: str
    direction: str
    floor: int
    counted: Count  # distinct bytes of each launch
    again: int  # of these, of students that a second launch reads again
    eager: Count
    compiled: Count
    us: dict[str, dict[str, float]]  # modelled: device -> program, or the floor

    @property
    def ratio(self) -> float:
        """Distinct bytes to the floor."""
        return self.counted.bytes / self.floor


class Host(NamedTuple):
    """The time of calls of tiny features on this machine's CPU."""

    pairs: int
    us: dict[str, float]


class Model(NamedTuple):
    """All that is counted: the cases, and the rest of the method; and the host's times."""

    rows: list[Row]
    methods: list[Row]
    host: list[Host]


# ---- at_fused: run in the harness ----------------------------------------------------------------


def counted(harness: ctypes.CDLL, run: Callable[[], Any]) -> tuple[Any, Counters]:
    """Return what a program returns, and its counters."""
    harness.simt_reset_counters()
    result, counters = run(), Counters()
    if harness.simt_last_error():
        raise RuntimeError(harness.simt_last_error().decode())
    harness.simt_counters(ctypes.byref(counters))
    return result, counters


def count_passes(inputs: Inputs, share: int, variant: Variant = AT_LOSS) -> dict[str, Counters]:
    """The counters of each pass of at_loss, on 1/share of the device."""
    both = partial(at_fused.at_value_and_grad, **variant.options)
    students = [x.detach() for x in inputs.students]
    with simt(multiprocessors=H100.multiprocessors // share) as harness:
        loss, forward = counted(harness, inputs.step(variant.ours(), backward=False))
        _, backward = counted(harness, lambda: torch.autograd.grad(loss, inputs.students))
        _, in_one = counted(harness, lambda: both(students, inputs.teachers))
    return dict(zip(PASSES, (forward, backward, in_one), strict=True))


def features_of(case: str, dtype: str, layout: str) -> tuple[list[Feature], list[Feature]]:
    """The students and teachers of a case as the plan is given them."""
    batch, stages = CASES[case]
    number = {torch.float32: 0, torch.bfloat16: 3}[DTYPES[dtype]]  # csrc/feature.h: Dtype
    places = itertools.count(1)

    def feature(c: int, h: int) -> Feature:
        x = dense(batch, c, h * h, number, PLANAR if layout == "NCHW" else INTERLEAVED)
        x = x._replace(address=next(places) << 40)
        if layout in TOKENS:  # that of the class is skipped
            x = x._replace(batch=x.batch + c, address=x.address + c * BYTES[number])
        return x

    return [feature(c, h) for c, _, h in stages], [feature(d, h) for _, d, h in stages]


# ---- the others: operators and schedules ---------------------------------------------------------


def touched(x: Tensor) -> int:
    """Bytes that an operator reads or writes of a tensor, which may be expanded."""
    sizes = [n for n, stride in zip(x.shape, x.stride(), strict=True) if stride]
    return math.prod(sizes) * x.itemsize


# Bytes that a kernel reads and writes, by the name of a buffer.
Touched = list[dict[Hashable, int]]


def count_of(touched: Touched) -> Count:
    """The bytes and the kernels."""
    return Count(sum(sum(each.values()) for each in touched), len(touched))


class Operators(TorchDispatchMode):
    """Takes each operator as one kernel that reads its inputs and writes its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.touched: Touched = []
        self._alive: list[Tensor] = []  # so that every buffer keeps a name of its own

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if not function.is_view and "empty" not in function.name():
            found: dict[Hashable, int] = {}
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
            for x in {id(x): x for x in tensors}.values():
                name = x.untyped_storage()._cdata
                found[name] = found.get(name, 0) + touched(x)
            self.touched.append(found)
            self._alive += tensors
        return out


def count_eager(inputs: Inputs, variant: Variant) -> dict[str, Touched]:
    """The popular lines' operators, forward and backward, on tensors without data."""
    with Operators() as operators:
        loss = inputs.step(variant.popular, backward=False)()
        split = len(operators.touched)
        torch.autograd.grad(loss.sum() if loss.dim() else loss, inputs.students)
    return {"forward": operators.touched[:split], "backward": operators.touched[split:]}


def count_compiled(inputs: Inputs, variant: Variant) -> dict[str, Touched]:
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

    found: dict[str, Touched] = {}

    def counter(direction: str) -> Callable[[Any, Any], Any]:
        def count(module: Any, examples: Any) -> Any:
            graph = GraphLowering(module, example_inputs=examples)
            with V.set_graph_handler(graph), V.set_debug_handler(DebugContext()):
                graph.run(*examples)
                graph.init_wrapper_code()
                graph._update_scheduler()
                # The features have the same names in both directions, other buffers have not.
                found[direction] = [
                    {
                        name if name.startswith("primals") else (direction, name): size
                        for name, size in node.get_read_write_buffer_accesses(True, True).items()
                    }
                    for node in graph.scheduler.nodes
                ]
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
) -> tuple[dict[str, Touched], dict[str, Touched]]:
    """Eager and compiled; both passes one after the other are those of value and gradient."""
    eager = count_eager(Inputs.make(case, dtype, layout, "meta", variant=variant), variant)
    with FakeTensorMode():
        compiled = count_compiled(Inputs.make(case, dtype, layout, variant=variant), variant)
    for found in (eager, compiled):
        found["value and gradient"] = found["forward"] + found["backward"]
    return eager, compiled


# ---- rows ----------------------------------------------------------------------------------------


def moved(c: Counters, share: int) -> Count:
    """Distinct bytes and launches of the whole device."""
    return Count(share * (c.distinct_load_bytes + c.distinct_store_bytes), c.launches)


def total_us(device: model.Device, launches: Iterable[model.Kernel]) -> float:
    """Add up launches one after the other."""
    return round(sum(model.microseconds(device, launch) for launch in launches), 2)


def others_us(device: model.Device, touched: Touched) -> float:
    """Time ideal kernels, without what the second-level cache still has from those before."""
    cache = Cache(device.cache)
    return total_us(device, [model.ideal(device, cache.misses(k.items())) for k in touched])


def rows_of(case: str, dtype: str, layout: str, share: int = SHARE) -> list[Row]:
    """The three passes of a case; at_fused's bytes are counted on 1/share of it."""
    variant = VARIANTS["tokens"] if layout in TOKENS else AT_LOSS
    inputs = Inputs.make(case, dtype, layout, share=share, variant=variant)
    others = count_others(case, dtype, layout, variant)
    students, teachers = features_of(case, dtype, layout)
    cut = plan_pairs(students, teachers, H100, outs=students)
    again = sum(x.B * x.bytes for x in kernels.read_again(students, cut))
    ours = {device: kernels.passes(device, students, teachers) for device in model.DEVICES}
    rows = []
    for name, counters in count_passes(inputs, share, variant).items():
        floor = share * floors(inputs, layout)[name]
        eager, compiled = (found[name] for found in others)
        us = {
            device.name: {
                "floor": round(floor / device.bandwidth, 2),
                "at_fused": total_us(device, launches[name]),
                "compile": others_us(device, compiled),
                "eager": others_us(device, eager),
            }
            for device, launches in ours.items()
        }
        label = case[0] if case in CANONICAL else case
        twice = again if name == "value and gradient" else 0
        counts = moved(counters, share), twice, count_of(eager), count_of(compiled)
        rows.append(Row(label, dtype, layout, name, floor, *counts, us))
    return rows


def floors(inputs: Inputs, layout: str) -> dict[str, int]:
    """Those of the inputs; a class's token need not be read."""
    if layout in TOKENS:
        sides = [[x[:, 1:].mT for x in side] for side in (inputs.students, inputs.teachers)]
        inputs = Inputs(*sides, {})
    return inputs.floors()


def method_row(name: str, case: str, dtype: str, layout: str) -> Row:
    """Forward and backward of a variant: bytes alone.

    What torch's own operators do to the maps between two of ours is not counted: a C-th of the
    bytes.
    """
    variant = VARIANTS[name]
    inputs = Inputs.make(case, dtype, layout, share=SHARE, variant=variant)
    with simt(multiprocessors=H100.multiprocessors // SHARE) as harness:
        _, counters = counted(harness, inputs.step(variant.ours()))
    others = count_others(case, dtype, layout, variant)
    both = [count_of(found["value and gradient"]) for found in others]
    floor = SHARE * method_floor(name, layout, inputs)
    return Row(case, dtype, layout, name, floor, moved(counters, SHARE), 0, *both, {})


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


def host_row(pairs: int) -> Host:
    """Calls of tiny features on the CPU, whose kernels take next to nothing."""
    inputs = Inputs.make((4, [(8, 8, 4)] * pairs))
    students = [x.detach() for x in inputs.students]
    ours = {
        "at_fused": inputs.step(at_fused.at_loss),
        "value and gradient": lambda: at_fused.at_value_and_grad(students, inputs.teachers),
    }
    others = {name: inputs.step(loss) for name, loss in rivals().items()}
    (row,) = Comparison({}, others, ours, Clock(), on("cpu")).rows()
    return Host(pairs, {name: round(1e3 * ms, 1) for name, ms in row["ms"].items()})


# ---- the files -----------------------------------------------------------------------------------


def save(found: Model) -> None:
    """Writes the counts and their table."""
    parts = {name: [row._asdict() for row in rows] for name, rows in found._asdict().items()}
    write(FILE, {"device": model.H100.name, "parts": parts})
    FILE.with_suffix(".md").write_text(text(found))


def load(path: Path = FILE) -> Model:
    """The counts that were saved."""

    def row_of(fields: dict[str, Any]) -> Row:
        counts = {key: Count(*value) for key, value in fields.items() if isinstance(value, list)}
        return Row(**fields | counts)

    try:
        parts = json.loads(path.read_text())["parts"]
        rows = [[row_of(fields) for fields in parts[name]] for name in ("rows", "methods")]
        return Model(*rows, [Host(**fields) for fields in parts["host"]])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ResultError(f"{path}: not the counts of roofline.py: {error!r}") from error


BYTES_NOTES = """\
- *floor*: forward reads S and T and writes the two maps that are kept; backward reads S and k and
  writes dS; value and gradient reads S and T and writes dS.
- *distinct*: each byte once per launch, read or written. Beyond the floor and *S again* are up to
  4 % of maps: of samples that several blocks share the last block reads back what the others have
  just written, and a second launch reads the coefficients.
- *S again*: students too large to stay on chip, which a second launch reads again.
- *launches* are kernels; before a loss the counters are zeroed, which the model counts as one more.
- *eager*: operators of the popular lines, each one launch that reads its inputs and writes its
  outputs. *compile*: what inductor's scheduler makes of them, from its Triton back end for the CPU;
  a GPU splits large reductions, which is a few launches more.
"""


def time_notes() -> str:
    """The constants of the devices in the model."""
    h100 = model.H100
    rates = " and ".join(f"{d.bandwidth / 1e6} TB/s ({d.name})" for d in model.DEVICES)
    return f"""\
- *floor*: the floor's bytes at the rate of a large copy, {rates}, without a launch.
- *at_fused*: the launches of the real plan, block by block (benchmarks/model.py, kernels.py): loads
  in rounds, each of at least {h100.latency} us, one memory for all, {h100.launch} us from launch to
  launch in a graph, the zeroing of counters, and the serial end.
- *compile*, *eager*: their launches likewise, each an ideal kernel of its bytes: all
  multiprocessors full to the end, nothing but loads.
- Half of the second-level cache is taken to hold what was used last: for at_fused's second launch,
  and for what the others' kernels read of those before. A pass begins with nothing in it.
- The times in that model are estimates. No GPU has confirmed them.
"""


def byte_table(rows: Sequence[Row], first: str = "pass") -> str:
    """Bytes and launches as Markdown."""
    lines = []
    for r in rows:
        again = f"{r.again / 1e6:.2f}" if r.again else ""
        cells = [f"{r.floor / 1e6:.2f}", f"{r.counted.bytes / 1e6:.2f}", f"{r.ratio:.4f}x", again]
        cells.append(str(r.counted.launches))
        for other in (r.eager, r.compiled):
            cells += [f"{other.bytes / 1e6:.2f}", str(other.launches)]
        lines.append(("cpu", r.case, r.dtype, r.layout, r.direction, *cells))
    heads = f"case | dtype | layout | {first} | floor, MB | distinct, MB | to floor | S again, MB"
    heads += " | launches | eager, MB | launches | compile, MB | launches"
    return "\n".join(markdown(heads, 4, lines))


def time_table(rows: Sequence[Row]) -> str:
    """Modelled microseconds as Markdown."""
    programs = "floor", "at_fused", "compile", "eager"
    lines = [
        ("cpu", *r[:4], *(f"{us[name]:.1f}" for us in r.us.values() for name in programs))
        for r in rows
    ]
    heads = [f"{device.name}: {name}" for device in model.DEVICES for name in programs]
    return "\n".join(markdown(" | ".join(["case | dtype | layout | pass", *heads]), 4, lines))


def host_table(rows: Sequence[Host]) -> str:
    """The host's microseconds as Markdown."""
    names = "at_fused", "compile", "eager", "value and gradient"
    lines = [("cpu", str(r.pairs), *(f"{r.us[name]:.0f}" for name in names)) for r in rows]
    heads = "pairs | `at_loss` | compile | eager | `at_value_and_grad`"
    return "\n".join(markdown(heads, 1, lines))


def text(found: Model) -> str:
    """Everything, as roofline.md has it."""
    return f"""\
# Roofline: bytes counted, times a model, not measured

`python -m benchmarks.roofline`. MB of 10^6 bytes; cases as in cases.py.

## Bytes and launches, counted

The CUDA kernels in the harness, as on an H100: {SHARE} times what a share of 1/{SHARE} of each
batch takes on as many of the multiprocessors.

{byte_table(found.rows)}

{BYTES_NOTES}
## Microseconds: a model, not measured

{time_table(found.rows)}

{time_notes()}
## The host's time for a call, measured without a GPU

Microseconds of calls of tiny features, 4x8x4x4, on the CPU that made this file: what the call takes
on the host, with the tiny kernels' arithmetic and without the driver's launches. Forward and
backward, but for `at_value_and_grad`.

{host_table(found.host)}

## The rest of the method

Forward and backward, counted likewise. The floor reads every input once, what the gradient needs a
second time, and writes the gradient. What torch does to maps (interpolation, a sum) is not counted
for at_fused.

{byte_table(found.methods, "variant")}
"""


def main() -> None:
    """Entry point."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    rows = [row for setting in SETTINGS for row in rows_of(*setting)]
    methods = [method_row(*setting) for setting in METHODS]
    found = Model(rows, methods, [host_row(pairs) for pairs in PAIRS])
    save(found)
    sys.stdout.write(text(found))


if __name__ == "__main__":
    main()
