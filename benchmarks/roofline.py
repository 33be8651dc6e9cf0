"""Count the bytes that the CUDA kernels move, without a GPU, and compare them with the minimum.

    python -m benchmarks.roofline

The kernels run in the CUDA emulator (tests/kernels/emulator), which counts bytes and launches. It
runs 1/4 of each batch on 1/4 of an H100's multiprocessors, so every sample is split as on the whole
device, and the counts are multiplied by 4. Eager PyTorch is counted by operator: inputs are read,
outputs are written, views are free. Writes results/roofline.json and roofline.md.
"""

from __future__ import annotations

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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import at_fused
from benchmarks import ROOT, argument_parser
from benchmarks.cases import (
    DTYPES,
    LARGE,
    LAYOUTS,
    TIMED_CASES,
    TOKEN_OPTIONS,
    TOKENS,
    TRANSFORMER,
    Inputs,
    eager_losses,
    eager_token_losses,
)
from benchmarks.results import FOLDER, ResultError, write
from benchmarks.tables import markdown

sys.path.append(str(ROOT / "tests/support"))
from cuda_emulator import Emulator, emulated
from plan_library import H100

FILE = FOLDER / "roofline.json"

PASSES = ("forward", "backward", "value and gradient")
DIVISOR = 4  # of batches and multiprocessors
SETTINGS = [
    *itertools.product((*TIMED_CASES, LARGE), DTYPES, LAYOUTS),
    *itertools.product([TRANSFORMER], DTYPES, [TOKENS]),
]


class Count(NamedTuple):
    """Bytes and kernel launches."""

    bytes: int
    launches: int

    def __add__(self, other: Count) -> Count:  # type: ignore[override]
        return Count(self.bytes + other.bytes, self.launches + other.launches)


# A pass of a case: minimum bytes ("floor"), and the counts of at_fused ("counted") and "eager".
Row = dict[str, Any]


def count(emulator: Emulator, run: Callable[[], Any], factor: int) -> tuple[Any, Count]:
    """Return the result of a program, its distinct bytes times ``factor``, and its launches."""
    result, c = emulator.counted(run)
    if emulator.error():
        raise RuntimeError(emulator.error())
    return result, Count(factor * (c.distinct_load_bytes + c.distinct_store_bytes), c.launches)


def count_passes(inputs: Inputs, divisor: int, **options: Any) -> dict[str, Count]:
    """Count the passes of at_fused, on 1/divisor of the device."""
    loss_of = partial(at_fused.at_loss, **options)
    students = [x.detach() for x in inputs.students]
    call = partial(at_fused.at_value_and_grad, students, inputs.teachers, **options)
    with emulated(multiprocessors=H100.multiprocessors // divisor) as emulator:
        loss, forward = count(emulator, inputs.step(loss_of, backward=False), divisor)
        _, backward = count(emulator, lambda: torch.autograd.grad(loss, inputs.students), divisor)
        _, value_and_grad = count(emulator, call, divisor)
    return dict(zip(PASSES, (forward, backward, value_and_grad), strict=True))


class OperatorCounter(TorchDispatchMode):
    """Counter that takes each operator as a kernel that reads its inputs and writes its outputs."""

    count = Count(0, 0)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if not function.is_view and "empty" not in function.name():
            tensors = {id(x): x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)}
            # Dimensions of stride 0 (expanded) take no memory.
            sizes = [
                x.itemsize * math.prod(n for n, s in zip(x.shape, x.stride(), strict=True) if s)
                for x in tensors.values()
            ]
            self.count += Count(sum(sizes), 1)
        return out


def count_eager(inputs: Inputs, loss_of: Callable[..., Tensor]) -> dict[str, Count]:
    """Count the operators of eager PyTorch on meta tensors; value and gradient is both passes."""
    with OperatorCounter() as forward:
        loss = inputs.step(loss_of, backward=False)()
    with OperatorCounter() as backward:
        torch.autograd.grad(loss, inputs.students)
    counts = forward.count, backward.count, forward.count + backward.count
    return dict(zip(PASSES, counts, strict=True))


def rows_of(case: str, dtype: str, layout: str, divisor: int = DIVISOR) -> list[Row]:
    """Return a row for each pass of a case; at_fused is counted on 1/divisor of the batch."""
    inputs = Inputs.make(case, dtype, layout, divisor=divisor)
    options, eager_loss = {}, eager_losses
    if layout == TOKENS:
        options, eager_loss = TOKEN_OPTIONS, eager_token_losses
    counted = count_passes(inputs, divisor, **options)
    eager = count_eager(Inputs.make(case, dtype, layout, "meta"), eager_loss)
    if layout == TOKENS:  # no pass has to read the class token
        inputs = Inputs(*([x[:, 1:].mT for x in side] for side in inputs))
    setting = {"case": case[0] if case in TIMED_CASES else case, "dtype": dtype, "layout": layout}
    return [
        {**setting, "direction": name, "floor": divisor * inputs.minimum_bytes()[name]}
        | {"counted": counted[name], "eager": eager[name]}
        for name in PASSES
    ]


def load(path: Path = FILE) -> list[Row]:
    """Read the saved rows."""
    try:
        rows = json.loads(path.read_text())["parts"]["rows"]
        text(rows)
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise ResultError(f"{path}: not counts of benchmarks.roofline: {error!r}") from error
    return rows


def sentence(rows: Sequence[Row]) -> str:
    """Return a summary of the counts."""

    def span(program: str) -> str:
        ratios = [row[program][0] / row["floor"] for row in rows]
        launches = [row[program][1] for row in rows]
        return (
            f"{min(ratios):.2f}x to {max(ratios):.2f}x in {min(launches)} to {max(launches)} "
            "launches"
        )

    return (
        "Bytes moved, relative to the bytes that a pass must read and write (forward, backward, or "
        f"value and gradient): at_fused {span('counted')}, eager PyTorch {span('eager')}."
    )


def table(rows: Sequence[Row]) -> str:
    """Return bytes and launches in Markdown."""
    lines = []
    for r in rows:
        setting = (r[key] for key in ("case", "dtype", "layout", "direction"))
        (ours, launches), (eager, eager_launches) = r["counted"], r["eager"]
        cells = [f"{count / 1e6:.2f}" for count in (r["floor"], ours)]
        cells += [f"{ours / r['floor']:.4f}x", str(launches)]
        lines.append(("cpu", *setting, *cells, f"{eager / 1e6:.2f}", str(eager_launches)))
    heads = "case | dtype | layout | pass | minimum, MB | at_fused, MB | over minimum | launches"
    return "\n".join(markdown(f"{heads} | eager, MB | eager launches", 4, lines))


def text(rows: Sequence[Row]) -> str:
    """Return the content of roofline.md."""
    return f"""\
# Roofline: bytes and launches, counted without a GPU

`python -m benchmarks.roofline` counts them, and writes this page. MB are 10^6 bytes. `cases.py`
defines the cases. The CUDA emulator runs the kernels as on an H100: 1/{DIVISOR} of each batch on
1/{DIVISOR} of the multiprocessors. All counts are then multiplied by {DIVISOR}.

{table(rows)}

- *minimum*: forward reads S and T and writes both maps. Backward reads S and k and writes dS. Value
  and gradient reads S and T and writes dS. S and T are the features, k the coefficients dL/dQ.
- *at_fused*: bytes read or written, each byte once per launch. The excess over the minimum has two
  causes. If several blocks share a sample, the last block reads the maps that the others wrote. In
  value and gradient, a second launch rereads students that are too large to stay on chip, with
  their coefficients. Apart from these students, the excess is below 4 %.
- *launches* are kernels. The memset that zeroes the counters of a loss is not counted.
- *eager*: each operator of eager PyTorch is a launch that reads its inputs and writes its outputs.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    argument_parser("roofline", __doc__).parse_args(arguments)
    rows = [row for setting in SETTINGS for row in rows_of(*setting)]
    write(FILE, {"device": "H100", "parts": {"rows": rows}})
    FILE.with_suffix(".md").write_text(text(rows))
    print(FILE.with_suffix(".md"))


if __name__ == "__main__":
    main()
