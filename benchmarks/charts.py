"""The pictures of the report. Needs matplotlib."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.cases import CASES, PASSES, Inputs
from benchmarks.results import COMPARED, Result, rows_of
from benchmarks.roofline_model import BANDWIDTH, DEVICE, Count, Model
from benchmarks.timing import Row

# Of Okabe & Ito, told apart by colour-blind readers too; a program has the same in all pictures.
COLOURS = {"at_fused": "#0072b2", "compile": "#e69f00", "eager": "#9a9a9a", "floor": "#000000"}
NAMES = {"at_fused": "at_fused", "compile": "torch.compile", "eager": "eager PyTorch"}
MARKERS = {"forward": "o", "forward+backward": "s", "value and gradient": "^"}
BYTES = {1e3: "1 kB", 1e4: "10 kB", 1e5: "100 kB", 1e6: "1 MB", 1e7: "10 MB", 1e8: "100 MB"}
TIMES = {1e-2: "10 us", 1e-1: "100 us", 1: "1 ms", 10: "10 ms", 100: "100 ms", 1000: "1 s"}
DPI = 110


def digest(source: Any) -> str:
    """Names the figures that a picture was drawn from; it carries that name."""
    return hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()[:16]


def save(figure: Figure, path: Path, source: Any) -> None:
    """Writes a picture and what it was drawn from."""
    figure.savefig(path, dpi=DPI, metadata={"Description": digest(source)})


def plain(ax: Axes, grid: str = "both") -> None:
    """The look of all of them."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis=grid, color="0.92", lw=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(which="both", length=0)


def label_of(program: str, backend: str) -> str:
    """Ours with its back end on a GPU, where there may be two."""
    return f"at_fused ({backend})" if program == "at_fused" and backend != "cpu" else NAMES[program]


def backends_of(rows: Sequence[Row]) -> list[str]:
    """In the order of the rows."""
    return list(dict.fromkeys(row["backend"] for row in rows))


# ---- the pictures of a device --------------------------------------------------------------------


def cases(result: Result) -> Figure:
    """Every case's time over one read of its bytes, and what the bytes that have to move take."""
    rows = rows_of(result, "cases")
    names = backends_of(rows)
    settings = list(dict.fromkeys((r["case"], r["dtype"], r["layout"]) for r in rows))
    figure = Figure(figsize=(9, 1.6 + 0.3 * len(settings)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True, width_ratios=(2, 3))
    for row in rows:
        ax = panels[int(row["pass"] != "forward")]
        y = settings.index((row["case"], row["dtype"], row["layout"]))
        ratios = {name: ms / row["ms"]["floor"] for name, ms in row["ms"].items()}
        marker = "oD"[names.index(row["backend"])]
        one_pass = row["pass"] == "value and gradient"
        floor = row["bytes"]["at_fused"] / row["bytes"]["floor"]
        ends = {"ls": ":" if one_pass else "-", "lw": 1.6, "color": COLOURS["floor"]}
        ax.vlines(floor, y - 0.5, y + 0.5, **ends)
        style: dict[str, Any] = {"color": COLOURS["at_fused"], "ms": 6.5, "zorder": 3}
        if one_pass:
            style |= {"mfc": "white", "mew": 1.6}
        else:
            ax.hlines(y, floor, ratios["eager"], color="0.85", lw=1, zorder=0)
            for program in ("eager", "compile"):
                ax.plot(ratios[program], y, "o", color=COLOURS[program], ms=6.5)
        ax.plot(ratios["at_fused"], y, marker, **style)
    for ax, title in zip(panels, ("forward", "forward and backward"), strict=True):
        plain(ax, "x")
        ax.set(xscale="log", xlabel="time, in reads of the same bytes", title=title)
        low, high = ax.get_xlim()
        ticks = [n for n in (0.2, 0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100) if low <= n <= high]
        ax.set_xticks(ticks, map(str, ticks))
        ax.minorticks_off()
    panels[0].set_yticks(range(len(settings)), [" ".join(setting) for setting in settings])
    panels[0].set_ylim(len(settings) - 0.5, -0.5)

    def dot(label: str, program: str, marker: str = "o", **style: Any) -> Line2D:
        colour = COLOURS[program]
        return Line2D([], [], color=colour, marker=marker, ls="", ms=6.5, label=label, **style)

    handles = [dot(label_of("at_fused", n), "at_fused", "oD"[i]) for i, n in enumerate(names)]
    handles += [dot("value and gradient", "at_fused", mfc="white", mew=1.6)]
    handles += [dot(NAMES[program], program) for program in ("compile", "eager")]
    floor_line = Line2D([], [], color=COLOURS["floor"], lw=1.6, label="floor")
    close = {"columnspacing": 1.2, "handletextpad": 0.3, "frameon": False}
    handles.append(floor_line)
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), **close)
    return figure


def sizes(result: Result) -> Figure:
    """Time against size, log-log, with one read of the bytes."""
    rows = rows_of(result, "sizes")
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    ax = figure.subplots()
    for place, backend in enumerate(backends_of(rows)):
        mine = [row for row in rows if row["backend"] == backend]
        size = [row["bytes"] for row in mine]
        for program in COMPARED if place == 0 else ("at_fused",):
            ms = [row["ms"][program] for row in mine]
            style = {"color": COLOURS[program], "ms": 5, "lw": 2}
            style |= {"label": label_of(program, backend), "zorder": 2 + (program == "at_fused")}
            ax.plot(size, ms, "oD"[place] + "-", **style)
    floor = {row["bytes"]: row["ms"]["floor"] for row in rows}
    ax.plot(*zip(*floor.items(), strict=True), "--", color=COLOURS["floor"], label="one read")
    if result["cache"]:
        ax.axvline(result["cache"], color="0.6", ls=":", lw=1.2)
        ax.annotate(
            "last-level cache ", (result["cache"], 0.02), xycoords=("data", "axes fraction"),
            ha="right", color="0.4", fontsize=9,
        )  # fmt: skip
    plain(ax)
    ax.set(xscale="log", yscale="log", xlabel="bytes of both features", ylabel="time")
    ax.set_title("Forward and backward of one pair, fp32 NCHW")
    for axis, names in ((ax.xaxis, BYTES), (ax.yaxis, TIMES)):
        low, high = axis.get_view_interval()
        shown = [tick for tick in names if low <= tick <= high]
        axis.set_ticks(shown, [names[tick] for tick in shown])
    ax.minorticks_off()
    ax.legend(frameon=False)
    return figure


def memory(result: Result) -> Figure:
    """Memory against batch, with the gradient's own."""
    rows = rows_of(result, "memory")
    names = backends_of(rows)
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    bars = [("at_fused", name) for name in names]
    bars += [(program, names[0]) for program in COMPARED[1:]]
    width = 0.8 / len(bars)
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    ax = figure.subplots()
    for place, (program, backend) in enumerate(bars):
        mine = [row for row in rows if row["backend"] == backend]
        x = [batches.index(row["batch"]) + (place + 0.5) * width - 0.4 for row in mine]
        height = [row["bytes"][program] / 1e6 for row in mine]
        second = {"alpha": 0.6} if program == "at_fused" and place else {}
        label = label_of(program, backend)
        ax.bar(x, height, 0.9 * width, color=COLOURS[program], label=label, **second)
    for place, batch in enumerate(batches):
        own = next(row["gradient"] for row in rows if row["batch"] == batch) / 1e6
        label = "" if place else "the gradient itself"
        ax.hlines(own, place - 0.45, place + 0.45, color=COLOURS["floor"], lw=1.6, label=label)
    plain(ax, "y")
    ax.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
    ax.set(ylabel="MB allocated at the most")
    ax.set_title("Forward and backward of case b, fp32 NCHW: memory beside the features")
    floor, *others = ax.get_legend_handles_labels()[0]
    ax.legend(handles=[*others, floor], frameon=False)
    return figure


# ---- the roofline --------------------------------------------------------------------------------


class Point(NamedTuple):
    """A program's pass of a case: useful operations, the bytes that they took, and the seconds."""

    program: str
    direction: str
    case: str
    operations: int
    bytes: int
    seconds: float


def operations(case: str, direction: str) -> int:
    """A square and an addition for each element, a product for each of the gradient's."""
    inputs = Inputs.make(case, "fp32", "NCHW", device="meta")
    students, teachers = (sum(x.numel() for x in side) for side in inputs)
    return 2 * (students + teachers) + (direction != "forward") * students


def points(model: Model, measured: Sequence[Row]) -> list[Point]:
    """All passes, fp32 NCHW; the seconds are the model's where none were measured."""
    kind = ("fp32", "NCHW")
    ms = {
        (row["case"], row["pass"]): row["ms"]
        for row in measured
        if (row["dtype"], row["layout"]) == kind
    }
    found = []
    for case in CASES:
        of = {r.direction: r for r in model.rows if (r.case, r.dtype, r.layout) == (case[0], *kind)}
        for direction in PASSES:
            rows = [of[name] for name in direction.split("+")]
            counts = {"at_fused": [row.at_fused() for row in rows]}
            if direction != "value and gradient":  # the others have no such pass
                counts |= {"compile": [row.compiled for row in rows]}
                counts |= {"eager": [row.eager for row in rows]}
            for program, each in counts.items():
                count = sum(each, Count(0, 0))
                seconds = count.model_us() / 1e6
                if ms:
                    seconds = ms[case[0], direction][program] / 1e3
                work = operations(case, direction)
                found.append(Point(program, direction, case[0], work, count.bytes, seconds))
    return found


def roofline(model: Model, result: Result | None = None) -> Figure:
    """Operations a second over operations a byte: modelled, or with a GPU's times."""
    rows = rows_of(result, "cases") if result else []
    rows = [row for row in rows if row["backend"] == rows[0]["backend"]]
    bandwidth, where = BANDWIDTH, f"a model of an {DEVICE}, not measured"
    if result:
        bandwidth = 1e3 * rows[0]["bytes"]["copy"] / rows[0]["ms"]["copy"]
        where = f"measured on {result['device']}, {rows[0]['backend']}"
    figure = Figure(figsize=(8, 5), layout="constrained")
    ax = figure.subplots()
    for order, point in enumerate(reversed(points(model, rows)), 1):  # ours on top
        x, y = point.operations / point.bytes, point.operations / point.seconds / 1e9
        hollow = point.direction == "value and gradient"
        colour = COLOURS[point.program]
        ax.plot(
            x, y, MARKERS[point.direction], color=colour, ms=12, mew=1.6, zorder=order,
            mfc="white" if hollow else colour, mec=colour if hollow else "white",
        )  # fmt: skip
        ax.annotate(
            point.case, (x, y), ha="center", va="center_baseline", fontsize=9, zorder=order,
            color=colour if hollow else "white",
        )  # fmt: skip
    plain(ax)
    ax.set(ylabel="useful operations a second, billions", title=f"Roofline, fp32 NCHW: {where}")
    ax.set(xlabel="useful operations for each byte moved", xlim=(0, None), ylim=(0, None))
    ends = ax.get_xlim()
    ax.plot(ends, [bandwidth * x / 1e9 for x in ends], color=COLOURS["floor"], lw=1.6, zorder=0)
    ax.set_xlim(ends)
    handles = [
        Line2D([], [], color=COLOURS[name], marker="o", ls="", ms=7.5, label=label)
        for name, label in NAMES.items()
    ]
    handles += [
        Line2D([], [], color="0.3", marker=marker, ls="", ms=7.5, mfc="white", label=name)
        for name, marker in MARKERS.items()
    ]
    roof = f"memory, {bandwidth / 1e12:.2f} TB/s"
    handles += [Line2D([], [], color=COLOURS["floor"], lw=1.6, label=roof)]
    ax.legend(handles=handles, frameon=False, loc="upper left")
    return figure
