"""What roofline.py counts, as rows and Markdown, and the time that it would take: a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.results import FOLDER, MODEL, ResultError, read_json, write

# An H100 SXM; the launch overhead is an assumption (a queue that is kept full).
DEVICE, BANDWIDTH, L2_BYTES, LAUNCH_SECONDS = "H100", 3.35e12, 50e6, 2e-6
FILE = FOLDER / f"{MODEL}.json"


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
    """A pass of a case; ``counted`` is distinct bytes per launch and the launches."""

    case: str
    dtype: str
    layout: str
    direction: str
    floor: int
    counted: Count
    threads: int  # bytes over all accesses of all threads
    extra_reads: int  # distinct bytes read that the floor does not know
    again: int  # bytes of students that are read a second time
    served: int  # of these, by the second-level cache
    whole: bool  # value and gradient: every sample fits on chip
    eager: Count
    compiled: Count

    @property
    def ratio(self) -> float:
        """Distinct bytes to the floor."""
        return self.counted.bytes / self.floor

    def at_fused(self) -> Count:
        """What goes through the device's memory: second reads that the cache misses as well."""
        return self.counted + Count(self.again - self.served, 0)


class MethodRow(NamedTuple):
    """A variant of methods.py, forward and backward; ``floor`` is what has to move."""

    variant: str
    case: str
    dtype: str
    layout: str
    floor: int
    counted: Count
    eager: Count


class Model(NamedTuple):
    """All that is counted; methods on 1/share of each batch and of the device."""

    rows: list[Row]
    methods: list[MethodRow]
    share: int


def save(model: Model) -> None:
    """Writes the counts and their table."""
    parts = {"rows": model.rows, "methods": model.methods}
    rows = {name: [row._asdict() for row in found] for name, found in parts.items()}
    write(FILE, {"device": DEVICE, "share": model.share, "parts": rows})
    FILE.with_suffix(".md").write_text(text(model))


def load(path: Path = FILE) -> Model:
    """The counts that were saved."""

    def row_of(kind: Any, fields: dict[str, Any]) -> Any:
        counts = {key: Count(*value) for key, value in fields.items() if isinstance(value, list)}
        return kind(**fields | counts)

    found = read_json(path)
    try:
        rows = [row_of(Row, fields) for fields in found["parts"]["rows"]]
        methods = [row_of(MethodRow, fields) for fields in found["parts"]["methods"]]
        return Model(rows, methods, found["share"])
    except (TypeError, KeyError, AttributeError) as error:
        raise ResultError(f"{path}: not the counts of roofline.py: {error!r}") from error


NOTES = f"""\
- *floor*: forward reads S and T and writes the two maps that are kept; backward reads S and k and
  writes dS; value and gradient reads S and T and writes dS.
- *distinct*: each byte once per launch, read or written: what has to cross the device's memory at
  least once. *all accesses*: summed over every thread, so a coefficient that 32 lanes read counts
  32 times: what goes through the first-level caches.
- *S again*: students too large to stay on chip, read a second time by value and gradient. In
  brackets, as a model, the share that an L2 cache of {L2_BYTES / 1e6:.0f} MB should still have: all
  of a pair's where what is read and written in between fits it, else none. What it does not have
  is added to the bytes of the model.
- *eager*: operators of the popular lines, each one launch that reads its inputs and writes its
  outputs. *compile*: what inductor's scheduler makes of them, from its Triton back end for the CPU;
  a GPU splits large reductions, which is a few launches more. For value and gradient, both are
  their forward and backward.
- *us (model, not measured)*: bytes / {BANDWIDTH / 1e12} TB/s + launches x
  {1e6 * LAUNCH_SECONDS:.0f} us (an assumption). As if every kernel's bytes came from memory, which
  is unfair to those who find them in the L2 cache, and as if every kernel reached the full
  bandwidth."""


def table(rows: Sequence[Row], share: int = 1) -> str:
    """The rows as Markdown."""
    how = (
        f"A share of 1/{share} of each batch on 1/{share} of the multiprocessors, times {share}."
        if share > 1
        else "Full batches."
    )
    lines = [
        "# Roofline: bytes counted, times a model, not measured",
        "",
        f"`python -m benchmarks.roofline`: the CUDA kernels in the harness, as on an H100. {how}",
        "MB of 10^6 bytes; cases as in cases.py.",
        "",
        "| case | dtype | layout | pass | floor, MB | distinct, MB | to floor | all accesses, MB "
        "| S again, MB | launches | eager, MB | launches | compile, MB | launches "
        "| us (model, not measured) | eager | compile |",
        "|---|---|---|---|" + "--:|" * 13,
    ]
    for r in rows:
        again = f"{r.again / 1e6:.2f} ({r.served / r.again:.0%} L2)" if r.again else ""
        cells = [
            *(r.case, r.dtype, r.layout, r.direction),
            *(f"{r.floor / 1e6:.2f}", f"{r.counted.bytes / 1e6:.2f}", f"{r.ratio:.4f}x"),
            *(f"{r.threads / 1e6:.2f}", again, str(r.counted.launches)),
        ]
        for other in (r.eager, r.compiled):
            cells += [f"{other.bytes / 1e6:.2f}", str(other.launches)]
        cells += [f"{c.model_us():.1f}" for c in (r.at_fused(), r.eager, r.compiled)]
        lines.append(f"| {' | '.join(cells)} |")
    above = [r for r in rows if r.ratio > 1.01]
    lines += ["", NOTES]
    if above:
        lines += [
            "- More than 1 % above the floor, by maps of samples that several blocks share: the",
            "  last block reads back, out of the L2 cache, what the others have just written. In",
            "  value and gradient, whose floor has no maps, the writing counts as well.",
        ]
    for r in above:
        lines.append(
            f"  - {r.case} {r.dtype} {r.layout}, {r.direction}: {r.ratio:.4f}x, "
            f"{r.counted.bytes - r.floor} bytes, {r.extra_reads} of them read."
        )
    return "\n".join(lines) + "\n"


def method_table(rows: Sequence[MethodRow], share: int) -> str:
    """The rest of the method as Markdown."""
    lines = [
        "## The rest of the method",
        "",
        f"Forward and backward, fp32, a share of 1/{share} of each batch on 1/{share} of the "
        f"multiprocessors, times {share}.",
        "The floor reads every input once, what the gradient needs a second time, and writes the",
        "gradient. Interpolation, masks and sums of maps by torch are not counted for at_fused.",
        "",
        "| variant | case | layout | floor, MB | distinct, MB | to floor | launches "
        "| eager, MB | to floor | launches |",
        "|---|---|---|" + "--:|" * 7,
    ]
    for r in rows:
        cells = [r.variant, r.case, r.layout, f"{r.floor / 1e6:.2f}"]
        for count in (r.counted, r.eager):
            cells += [f"{count.bytes / 1e6:.2f}", f"{count.bytes / r.floor:.2f}x"]
            cells += [str(count.launches)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def text(model: Model) -> str:
    """Everything, as roofline.md has it."""
    return f"{table(model.rows)}\n{method_table(model.methods, model.share)}"
