"""The bytes that the CUDA kernels move, against the least that must move: counted, without a GPU.

    python -m benchmarks.roofline

The kernels run in tests/kernels/emulator, whose instrumented loads and stores count bytes and
launches; on a quarter of each batch and of an H100's multiprocessors, which cuts every sample as
the whole device would, times four. The eager lines are counted operator by operator (inputs read,
outputs written, views free). Writes results/roofline.json and .md.
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import at_fused
from benchmarks import ROOT
from benchmarks.cases import (
    CANONICAL,
    DTYPES,
    LARGE,
    LAYOUTS,
    TOKEN_OPTIONS,
    TOKENS,
    TRANSFORMER,
    Inputs,
    popular_losses,
    popular_token_losses,
)
from benchmarks.results import FOLDER, ResultError, write
from benchmarks.tables import markdown

sys.path.append(str(ROOT / "tests/support"))
from cuda_emulator import Emulator, emulated
from plan_library import H100

FILE = FOLDER / "roofline.json"

PASSES = ("forward", "backward", "value and gradient")
SHARE = 4  # divides the batches and the multiprocessors
SETTINGS = [
    *itertools.product((*CANONICAL, LARGE), DTYPES, LAYOUTS),
    *itertools.product([TRANSFORMER], DTYPES, [TOKENS]),
]


class Count(NamedTuple):
    """Bytes and kernels."""

    bytes: int
    launches: int

    def __add__(self, other: Count) -> Count:  # type: ignore[override]
        return Count(self.bytes + other.bytes, self.launches + other.launches)


# A pass of a case: the floor in bytes, and bytes and launches of at_fused ("counted") and "eager".
Row = dict[str, Any]


def count(emulator: Emulator, run: Callable[[], Any], share: int) -> tuple[Any, Count]:
    """Return what a program returns, and its distinct bytes and launches on the whole device."""
    result, c = emulator.counted(run)
    if emulator.error():
        raise RuntimeError(emulator.error())
    return result, Count(share * (c.distinct_load_bytes + c.distinct_store_bytes), c.launches)


def count_passes(inputs: Inputs, share: int, **options: Any) -> dict[str, Count]:
    """at_fused's passes, on 1/share of the device."""
    loss_of = partial(at_fused.at_loss, **options)
    students = [x.detach() for x in inputs.students]
    both = partial(at_fused.at_value_and_grad, students, inputs.teachers, **options)
    with emulated(multiprocessors=H100.multiprocessors // share) as emulator:
        loss, forward = count(emulator, inputs.step(loss_of, backward=False), share)
        _, backward = count(emulator, lambda: torch.autograd.grad(loss, inputs.students), share)
        _, in_one = count(emulator, both, share)
    return dict(zip(PASSES, (forward, backward, in_one), strict=True))


class Operators(TorchDispatchMode):
    """Takes each operator as one kernel that reads its inputs and writes its outputs."""

    count = Count(0, 0)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if not function.is_view and "empty" not in function.name():
            found = {id(x): x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)}
            # An expanded tensor counts as it lies in memory.
            sizes = [
                x.itemsize * math.prod(n for n, s in zip(x.shape, x.stride(), strict=True) if s)
                for x in found.values()
            ]
            self.count += Count(sum(sizes), 1)
        return out


def count_eager(inputs: Inputs, loss_of: Callable[..., Tensor]) -> dict[str, Count]:
    """The popular lines' operators on tensors without data; value and gradient is both passes."""
    with Operators() as forward:
        loss = inputs.step(loss_of, backward=False)()
    with Operators() as backward:
        torch.autograd.grad(loss, inputs.students)
    counts = forward.count, backward.count, forward.count + backward.count
    return dict(zip(PASSES, counts, strict=True))


def rows_of(case: str, dtype: str, layout: str, share: int = SHARE) -> list[Row]:
    """The three passes of a case; at_fused's bytes are counted on 1/share of it."""
    inputs = Inputs.make(case, dtype, layout, share=share)
    options, popular = {}, popular_losses
    if layout == TOKENS:
        options, popular = TOKEN_OPTIONS, popular_token_losses
    counted = count_passes(inputs, share, **options)
    eager = count_eager(Inputs.make(case, dtype, layout, "meta"), popular)
    if layout == TOKENS:  # that of the class need not be read
        inputs = Inputs(*([x[:, 1:].mT for x in side] for side in inputs))
    setting = {"case": case[0] if case in CANONICAL else case, "dtype": dtype, "layout": layout}
    return [
        {**setting, "direction": name, "floor": share * inputs.floors()[name]}
        | {"counted": counted[name], "eager": eager[name]}
        for name in PASSES
    ]


def load(path: Path = FILE) -> list[Row]:
    """The rows that were saved."""
    try:
        found = json.loads(path.read_text())["parts"]["rows"]
        text(found)
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise ResultError(f"{path}: not the counts of roofline.py: {error!r}") from error
    return found


def sentence(rows: Sequence[Row]) -> str:
    """Say in short what was counted."""

    def span(program: str) -> str:
        to_floor = [row[program][0] / row["floor"] for row in rows]
        launches = [row[program][1] for row in rows]
        several = f"{min(launches)} to {max(launches)} launches"
        return f"{min(to_floor):.2f} to {max(to_floor):.2f} in {several}"

    return (
        "Bytes moved, over those that a pass (forward, backward, or value and gradient, of any "
        f"case) has to read and write: at_fused {span('counted')}, eager {span('eager')}."
    )


def table(rows: Sequence[Row]) -> str:
    """Bytes and launches as Markdown."""
    lines = []
    for r in rows:
        setting = (r[key] for key in ("case", "dtype", "layout", "direction"))
        (ours, launches), (eager, eager_launches) = r["counted"], r["eager"]
        cells = [f"{count / 1e6:.2f}" for count in (r["floor"], ours)]
        cells += [f"{ours / r['floor']:.4f}x", str(launches)]
        lines.append(("cpu", *setting, *cells, f"{eager / 1e6:.2f}", str(eager_launches)))
    heads = "case | dtype | layout | pass | floor, MB | distinct, MB | to floor | launches"
    return "\n".join(markdown(f"{heads} | eager, MB | launches", 4, lines))


def text(rows: Sequence[Row]) -> str:
    """Everything, as roofline.md has it."""
    return f"""\
# Roofline: bytes and launches, counted without a GPU

`python -m benchmarks.roofline`. MB of 10^6 bytes; cases as in cases.py. The CUDA kernels in the
emulator, as on an H100: {SHARE} times what a share of 1/{SHARE} of each batch takes on as many of
the multiprocessors.

{table(rows)}

- *floor*: forward reads S and T and writes the two maps that are kept; backward reads S and k and
  writes dS; value and gradient reads S and T and writes dS.
- *distinct*: each byte once per launch, read or written. Beyond the floor are up to 4 % of maps: of
  samples that several blocks share the last block reads back what the others have just written.
  A second launch of value and gradient reads students again that are too large to stay on chip, and
  their coefficients.
- *launches* are kernels; before a loss the counters are zeroed, which is not counted.
- *eager*: operators of the popular lines, each one launch that reads its inputs and writes its
  outputs.
"""


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    rows = [row for setting in SETTINGS for row in rows_of(*setting)]
    write(FILE, {"device": "H100", "parts": {"rows": rows}})
    FILE.with_suffix(".md").write_text(text(rows))
    print(FILE.with_suffix(".md"))


if __name__ == "__main__":
    main()
