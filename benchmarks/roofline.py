"""The bytes that the CUDA kernels move, against the least that must move: counted, without a GPU.

    python -m benchmarks.roofline

The kernels run in tests/kernels/emulator, whose instrumented loads and stores count bytes and
launches; on a quarter of each batch and of an H100's multiprocessors, which cuts every sample as
the whole device would, times four. The eager lines are counted operator by operator (inputs read,
outputs written, views free), torch.compile by the kernels of inductor's scheduler. Writes
results/roofline.json and .md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import at_fused
from benchmarks import ROOT
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
)
from benchmarks.results import FOLDER, ResultError, write
from benchmarks.tables import markdown

sys.path.append(str(ROOT / "tests/support"))
from cuda_emulator import Emulator, emulated
from plan_library import H100, INTERLEAVED, PLANAR, Feature, dense, plan_pairs

FILE = FOLDER / "roofline.json"

PASSES = ("forward", "backward", "value and gradient")
PROGRAMS = ("counted", "eager", "compiled")
SHARE = 4  # divides the batches and the multiprocessors
SETTINGS = [
    *itertools.product((*CANONICAL, LARGE), DTYPES, LAYOUTS),
    *itertools.product(TRANSFORMERS[:1], DTYPES, TOKENS),
]
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


# A pass of a case, or a variant's forward and backward, which "direction" then names: the floor in
# bytes, and for "counted" (at_fused), "eager" and "compiled" bytes and launches. "again" are bytes
# of students that a second launch reads again.
Row = dict[str, Any]
Counts = dict[str, list[Row]]  # "rows": the cases; "methods": the rest of the method


def count(emulator: Emulator, run: Callable[[], Any], share: int) -> tuple[Any, Count]:
    """Return what a program returns, and its distinct bytes and launches on the whole device."""
    result, c = emulator.counted(run)
    if emulator.error():
        raise RuntimeError(emulator.error())
    return result, Count(share * (c.distinct_load_bytes + c.distinct_store_bytes), c.launches)


def count_passes(inputs: Inputs, share: int, variant: Variant) -> dict[str, Count]:
    """at_fused's passes, on 1/share of the device."""
    both = partial(at_fused.at_value_and_grad, **variant.options, **inputs.extra)
    students = [x.detach() for x in inputs.students]
    with emulated(multiprocessors=H100.multiprocessors // share) as emulator:
        loss, forward = count(emulator, inputs.step(variant.ours(), backward=False), share)
        total = loss.sum() if loss.dim() else loss
        _, backward = count(emulator, lambda: torch.autograd.grad(total, inputs.students), share)
        _, in_one = count(emulator, lambda: both(students, inputs.teachers), share)
    return dict(zip(PASSES, (forward, backward, in_one), strict=True))


def read_again(case: str, dtype: str, layout: str) -> list[Feature]:
    """The students, as the plan is given them, that value and gradient does not keep on chip."""
    batch, stages = CASES[case]
    number = {torch.float32: 0, torch.bfloat16: 3}[DTYPES[dtype]]  # csrc/feature.h: Dtype
    kind = number, PLANAR if layout == "NCHW" else INTERLEAVED
    students = [dense(batch, c, h * h, *kind) for c, _, h in stages]
    teachers = [dense(batch, c, h * h, *kind) for _, c, h in stages]
    members = plan_pairs(students, teachers, H100, outs=students).members
    return [students[member.number] for member in members if not member.sweep]


class Operators(TorchDispatchMode):
    """Takes each operator as one kernel that reads its inputs and writes its outputs."""

    count = Count(0, 0)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if not function.is_view and "empty" not in function.name():
            found = {id(x): x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)}
            # Of an expanded tensor what there is in memory.
            sizes = [
                x.itemsize * math.prod(n for n, s in zip(x.shape, x.stride(), strict=True) if s)
                for x in found.values()
            ]
            self.count += Count(sum(sizes), 1)
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

    def scheduled(direction: str, module: Any, examples: Any) -> Any:
        graph = GraphLowering(module, example_inputs=examples)
        with V.set_graph_handler(graph), V.set_debug_handler(DebugContext()):
            graph.run(*examples)
            graph.init_wrapper_code()
            graph._update_scheduler()
            nodes = graph.scheduler.nodes
            sizes = [node.get_read_write_buffer_accesses(True, True).values() for node in nodes]
            found[direction] = Count(sum(map(sum, sizes)), len(nodes))
        return make_boxed_func(module.forward)

    compiled = aot_function(
        variant.popular,
        partial(scheduled, "forward"),
        partial(scheduled, "backward"),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    with config.patch(cpu_backend="triton"):
        inputs.step(compiled)()
    return found


def counts_of(
    case: str, dtype: str, layout: str, variant: Variant, share: int
) -> tuple[Inputs, dict[str, dict[str, Count]]]:
    """A share of the inputs; the passes of at_fused, eager and compiled, by their names.

    Value and gradient of the others is both passes one after the other.
    """
    inputs = Inputs.make(case, dtype, layout, share=share, variant=variant)
    eager = count_eager(Inputs.make(case, dtype, layout, "meta", variant=variant), variant)
    with FakeTensorMode():
        compiled = count_compiled(Inputs.make(case, dtype, layout, variant=variant), variant)
    for found in (eager, compiled):
        found["value and gradient"] = found["forward"] + found["backward"]
    counts = count_passes(inputs, share, variant), eager, compiled
    return inputs, dict(zip(PROGRAMS, counts, strict=True))


def rows_of(case: str, dtype: str, layout: str, share: int = SHARE) -> list[Row]:
    """The three passes of a case; at_fused's bytes are counted on 1/share of it."""
    variant = VARIANTS["tokens"] if layout in TOKENS else AT_LOSS
    inputs, programs = counts_of(case, dtype, layout, variant, share)
    if layout in TOKENS:  # that of the class need not be read
        sides = [[x[:, 1:].mT for x in side] for side in (inputs.students, inputs.teachers)]
        inputs = Inputs(*sides, {})
    twice = sum(x.B * x.bytes for x in read_again(case, dtype, layout))
    setting = {"case": case[0] if case in CANONICAL else case, "dtype": dtype, "layout": layout}
    return [
        {**setting, "direction": name, "floor": share * inputs.floors()[name]}
        | {"again": twice if name == "value and gradient" else 0}
        | {program: found[name] for program, found in programs.items()}
        for name in PASSES
    ]


def method_row(name: str, case: str, dtype: str, layout: str) -> Row:
    """Forward and backward of a variant.

    What torch's own operators do to the maps between two of ours is not counted: a C-th of the
    bytes. The floor: all inputs, read once; what the gradient reads again; and the gradient.
    """
    inputs, programs = counts_of(case, dtype, layout, VARIANTS[name], SHARE)
    counts = {program: found["forward"] + found["backward"] for program, found in programs.items()}
    read = [[x[:, 1:] if layout in TOKENS else x for x in side] for side in inputs[:2]]
    # The gradient of a maximum reads the winners, which do not count.
    again = [] if name == "max" else read[0]
    floor = SHARE * sum(x.nbytes for x in tree_leaves([read, inputs.extra, again, inputs.students]))
    setting = {"case": case, "dtype": dtype, "layout": layout, "direction": name}
    return {**setting, "floor": floor, "again": 0, **counts}


def load(path: Path = FILE) -> Counts:
    """The counts that were saved."""
    try:
        found = json.loads(path.read_text())["parts"]
        text(found)
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise ResultError(f"{path}: not the counts of roofline.py: {error!r}") from error
    return found


def sentence(found: Counts) -> str:
    """Say in short what was counted."""

    def span(program: str) -> str:
        to_floor = [row[program][0] / row["floor"] for row in found["rows"]]
        launches = sorted({row[program][1] for row in found["rows"]})
        several = f"{launches[0]} to {launches[-1]} launches" if launches[1:] else "one launch"
        return f"{min(to_floor):.2f} to {max(to_floor):.2f} in {several}"

    return (
        "Bytes moved, over those that a pass (forward, backward, or value and gradient, of any "
        f"case) has to read and write: at_fused {span('counted')}, torch.compile "
        f"{span('compiled')}, eager {span('eager')}."
    )


def table(rows: Sequence[Row], first: str = "pass") -> str:
    """Bytes and launches as Markdown."""
    lines = []
    for r in rows:
        setting = (r[key] for key in ("case", "dtype", "layout", "direction"))
        ours, *others = ((f"{r[key][0] / 1e6:.2f}", str(r[key][1])) for key in PROGRAMS)
        cells = [f"{r['floor'] / 1e6:.2f}", ours[0], f"{r['counted'][0] / r['floor']:.4f}x"]
        cells += [
            f"{r['again'] / 1e6:.2f}" if r["again"] else "",
            ours[1],
            *itertools.chain(*others),
        ]
        lines.append(("cpu", *setting, *cells))
    heads = f"case | dtype | layout | {first} | floor, MB | distinct, MB | to floor | S again, MB"
    heads += " | launches | eager, MB | launches | compile, MB | launches"
    return "\n".join(markdown(heads, 4, lines))


def text(found: Counts) -> str:
    """Everything, as roofline.md has it."""
    return f"""\
# Roofline: bytes and launches, counted without a GPU

`python -m benchmarks.roofline`. MB of 10^6 bytes; cases as in cases.py. The CUDA kernels in the
emulator, as on an H100: {SHARE} times what a share of 1/{SHARE} of each batch takes on as many of
the multiprocessors.

{table(found["rows"])}

- *floor*: forward reads S and T and writes the two maps that are kept; backward reads S and k and
  writes dS; value and gradient reads S and T and writes dS.
- *distinct*: each byte once per launch, read or written. Beyond the floor and *S again* are up to
  4 % of maps: of samples that several blocks share the last block reads back what the others have
  just written, and a second launch reads the coefficients.
- *S again*: students too large to stay on chip, which a second launch reads again.
- *launches* are kernels; before a loss the counters are zeroed, which is not counted.
- *eager*: operators of the popular lines, each one launch that reads its inputs and writes its
  outputs. *compile*: what inductor's scheduler makes of them, from its Triton back end for the CPU;
  a GPU splits large reductions, which is a few launches more.

## The rest of the method

Forward and backward, counted likewise. The floor reads every input once, what the gradient needs a
second time, and writes the gradient. What torch does to maps (interpolation, a sum) is not counted
for at_fused.

{table(found["methods"], "variant")}
"""


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    rows = [row for setting in SETTINGS for row in rows_of(*setting)]
    found = {"rows": rows, "methods": [method_row(*setting) for setting in METHODS]}
    write(FILE, {"device": "H100", "parts": found})
    FILE.with_suffix(".md").write_text(text(found))
    print(FILE.with_suffix(".md"))


if __name__ == "__main__":
    main()
