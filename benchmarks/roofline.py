"""What the CUDA kernels move, counted, against the least that has to move; and a model of the time.

    python -m benchmarks.roofline [--quick]

No GPU is needed. The kernels run in the tests' harness (tests/simt), whose instrumented loads and
stores count bytes and launches. The eager lines are counted operator by operator (inputs read,
outputs written, views free), torch.compile by the kernels of inductor's scheduler. Times are bytes
over bandwidth plus launches: a model, not a measurement. The rest of the method is counted in
roofline_methods.py. Writes results/roofline.json and .md.

``--quick`` counts a quarter of each batch on a quarter of an H100's multiprocessors, which cuts
every sample as the whole device would, and takes the counts times four.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from at_fused import _ops
from benchmarks import ROOT, roofline_model
from benchmarks.cases import CASES, DTYPES, LAYOUTS, Inputs, popular_losses
from benchmarks.roofline_model import L2_BYTES, Count, Row

sys.path.append(str(ROOT / "tests"))
from plan_library import H100, INTERLEAVED, PLANAR, dense, plan
from simt_backend import Counters, simt

PASSES = ("forward", "backward", "value and gradient")
QUICK_SHARE = 4  # divides the batches and the multiprocessors
SETTINGS = list(itertools.product(CASES, DTYPES, LAYOUTS))
QUICK = [s for s in SETTINGS if (s[0][0], s[1]) in (("a", "fp32"), ("b", "bf16"))]


# ---- at_fused: run in the harness ----------------------------------------------------------------


def count_kernels(inputs: Inputs, share: int) -> dict[str, Counters]:
    """The counters of each pass, on 1/share of the device."""
    students, teachers = [x.detach() for x in inputs.students], inputs.teachers
    pairs = list(range(len(students)))
    options = [], [], [], 2.0, "mean", "code", "sum", "max", 1e-12
    found: dict[str, Counters] = {}

    def counted(direction: str, run: Callable[[], Any]) -> Any:
        harness.simt_reset_counters()
        result = run()
        if harness.simt_last_error():
            raise RuntimeError(harness.simt_last_error().decode())
        found[direction] = Counters()
        harness.simt_counters(ctypes.byref(found[direction]))
        return result

    with simt(multiprocessors=H100.multiprocessors // share) as harness:
        at_loss = torch.ops.at_fused.at_loss.default
        _, maps = counted("forward", lambda: at_loss(students, teachers, *options, True, False))
        k, one = maps[: len(pairs)], torch.ones(())
        counted("backward", lambda: _ops.attention_map_backward(students, k, one, pairs, 2.0))
        counted(
            "value and gradient",
            lambda: _ops.at_value_and_grad(students, teachers, *options, 1.0, None),
        )
    return found


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


def count_eager(inputs: Inputs) -> dict[str, Count]:
    """The popular lines' operators, forward and backward, on tensors without data."""
    with Operators() as forward:
        loss = popular_losses(inputs.students, inputs.teachers)
    with Operators() as backward:
        torch.autograd.grad(loss, inputs.students)
    return {"forward": forward.count, "backward": backward.count}


def count_compiled(inputs: Inputs) -> dict[str, Count]:
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

    pairs = len(inputs.students)
    compiled = aot_function(
        lambda *x: popular_losses(list(x[:pairs]), list(x[pairs:])),
        counter("forward"),
        counter("backward"),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    with config.patch(cpu_backend="triton"):
        torch.autograd.grad(compiled(*inputs.students, *inputs.teachers), inputs.students)
    return found


def count_others(case: str, dtype: str, layout: str) -> tuple[dict[str, Count], dict[str, Count]]:
    """Eager and compiled; value and gradient is forward and backward one after the other."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    eager = count_eager(Inputs.make(case, dtype, layout, device="meta"))
    with FakeTensorMode():
        compiled = count_compiled(Inputs.make(case, dtype, layout))
    for count in (eager, compiled):
        count["value and gradient"] = count["forward"] + count["backward"]
    return eager, compiled


# ---- rows ----------------------------------------------------------------------------------------


def rows_of(case: str, dtype: str, layout: str, share: int = 1) -> list[Row]:
    """The three passes of a case; at_fused is counted on 1/share of it."""
    inputs = Inputs.make(case, dtype, layout, share=share)
    eager, compiled = count_others(case, dtype, layout)
    rows = []
    for direction, c in count_kernels(inputs, share).items():
        read, written = (share * n for n in inputs.floors()[direction])
        again, served = (
            second_reads(case, dtype, layout) if direction == "value and gradient" else (0, 0)
        )
        rows.append(
            Row(
                case[0],
                dtype,
                layout,
                direction,
                read + written,
                Count(share * (c.distinct_load_bytes + c.distinct_store_bytes), c.launches),
                share * (c.load_bytes + c.store_bytes + c.atomic_bytes),
                share * c.distinct_load_bytes - read,
                again,
                served,
                again == 0,
                eager[direction],
                compiled[direction],
            )
        )
    return rows


def count(quick: bool = False) -> list[Row]:
    """All rows, or those of --quick."""
    settings, share = (QUICK, QUICK_SHARE) if quick else (SETTINGS, 1)
    return [row for setting in settings for row in rows_of(*setting, share=share)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="a quarter of cases a (fp32) and b (bf16)"
    )
    if parser.parse_args().quick:
        sys.stdout.write(roofline_model.table(count(quick=True), QUICK_SHARE))
        return
    from benchmarks import roofline_methods

    model = roofline_model.Model(count(), list(roofline_methods.rows()), roofline_methods.SHARE)
    roofline_model.save(model)
    sys.stdout.write(roofline_model.text(model))


if __name__ == "__main__":
    main()
