"""The pictures of the report. Needs matplotlib."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from benchmarks.cases import CANONICAL, CASES, PASSES
from benchmarks.measure import Row
from benchmarks.model import H100
from benchmarks.results import Result
from benchmarks.roofline import Count, Model

# Of Okabe & Ito, told apart by colour-blind readers too; a program has the same in all pictures.
COLOURS = {"at_fused": "#0072b2", "compile": "#e69f00", "eager": "#9a9a9a", "floor": "#000000"}
NAMES = {"at_fused": "at_fused", "compile": "torch.compile", "eager": "eager PyTorch"}
MARKERS = {"forward": "o", "forward+backward": "s", "value and gradient": "^"}
DPI = 110


def digest(source: Any) -> str:
    """Names the figures that a picture was drawn from; it carries that name."""
    return hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()[:16]


def save(figure: Figure, path: Path, source: Any) -> None:
    """Writes a picture and what it was drawn from."""
    figure.savefig(path, dpi=DPI, metadata={"Description": digest(source)})


def panel(width: float, height: float, title: str, grid: str = "both") -> tuple[Figure, Axes]:
    """A figure with one plot."""
    figure = Figure(figsize=(width, height), layout="constrained")
    ax = figure.subplots()
    ax.set_title(title)
    plain(ax, grid)
    return figure, ax


def plain(ax: Axes, grid: str) -> None:
    """The look of all of them."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis=grid, color="0.92", lw=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(which="both", length=0)


def programs_of(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Program, back end, label: ours on each back end of a GPU, the others once."""
    names = list(dict.fromkeys(row["backend"] for row in rows))
    ours = [("at_fused", n, "at_fused" if n == "cpu" else f"at_fused ({n})") for n in names]
    return ours + [(rival, names[0], NAMES[rival]) for rival in ("compile", "eager")]


# ---- the pictures of a device --------------------------------------------------------------------


def cases(result: Result) -> Figure:
    """Every case's time over one read of its bytes, and what the bytes that have to move take."""
    rows = result["parts"]["cases"]
    settings = list(dict.fromkeys((r["case"], r["dtype"], r["layout"]) for r in rows))
    figure = Figure(figsize=(9, 1.6 + 0.3 * len(settings)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True, width_ratios=(2, 3))
    for ax, title in zip(panels, ("forward", "forward and backward"), strict=True):
        plain(ax, "x")
        ax.set(xscale="log", xlabel="time, in reads of the same bytes", title=title)
    drawn = programs_of(rows)
    labels: dict[Any, str] = {"floor": "floor", "value and gradient": "value and gradient"}
    labels |= {(program, backend): label for program, backend, label in drawn}
    for row in rows:
        ax = panels[int(row["pass"] != "forward")]
        y = settings.index((row["case"], row["dtype"], row["layout"]))
        one_pass = row["pass"] == "value and gradient"
        floor = row["bytes"]["at_fused"] / row["bytes"]["floor"]
        line = {"color": COLOURS["floor"], "ls": ":" if one_pass else "-", "lw": 1.6}
        ax.vlines(floor, y - 0.5, y + 0.5, label=labels.pop("floor", "_"), **line)
        times = {name: row["ms"][name] / row["ms"]["floor"] for name in NAMES}
        style: dict[str, Any] = {"ms": 6.5, "zorder": 3}
        if one_pass:
            times = {"at_fused": times["at_fused"]}
            style |= {"mfc": "white", "mew": 1.6}
        else:
            ax.hlines(y, floor, times["eager"], color="0.85", lw=1, zorder=0)
        for program, x in reversed(times.items()):
            on = row["backend"]
            marker = "D" if program == "at_fused" and on != drawn[0][1] else "o"
            label = labels.pop(row["pass"] if one_pass else (program, on), "_")
            ax.plot(x, y, marker, color=COLOURS[program], label=label, **style)
    for ax in panels:
        low, high = ax.get_xlim()
        ticks = [n for n in (0.2, 0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100) if low <= n <= high]
        ax.set_xticks(ticks, map(str, ticks))
        ax.minorticks_off()
    panels[0].set_yticks(range(len(settings)), [" ".join(setting) for setting in settings])
    panels[0].set_ylim(len(settings) - 0.5, -0.5)
    close = {"columnspacing": 1.2, "handletextpad": 0.3, "frameon": False}
    figure.legend(loc="outside upper center", ncols=9, **close)
    return figure


def sizes(result: Result) -> Figure:
    """Time against size, log-log, with one read of the bytes."""
    rows = result["parts"]["sizes"]
    figure, ax = panel(8, 4.4, "Forward and backward of one pair, fp32 NCHW")
    drawn = programs_of(rows)
    for program, backend, label in drawn:
        mine = [row for row in rows if row["backend"] == backend]
        points = [row["bytes"] for row in mine], [row["ms"][program] / 1e3 for row in mine]
        marker = "o-" if backend == drawn[0][1] else "D-"
        order = 2 + (program == "at_fused")
        ax.plot(*points, marker, color=COLOURS[program], ms=5, lw=2, label=label, zorder=order)
    floor = {row["bytes"]: row["ms"]["floor"] / 1e3 for row in rows}
    ax.plot(*zip(*floor.items(), strict=True), "--", color=COLOURS["floor"], label="one read")
    if result["cache"]:
        ax.axvline(result["cache"], color="0.6", ls=":", lw=1.2)
        ax.annotate(
            "last-level cache ", (result["cache"], 0.02), xycoords=("data", "axes fraction"),
            ha="right", color="0.4", fontsize=9,
        )  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel="bytes of both features", ylabel="time")
    ax.xaxis.set_major_formatter(EngFormatter("B"))
    ax.yaxis.set_major_formatter(EngFormatter("s"))
    ax.minorticks_off()
    ax.legend(frameon=False)
    return figure


def memory(result: Result) -> Figure:
    """Memory against batch, with the gradient's own."""
    rows = result["parts"]["memory"]
    title = "Forward and backward of case b, fp32 NCHW: memory beside the features"
    figure, ax = panel(8, 4.2, title, "y")
    own = {row["batch"]: row["gradient"] / 1e6 for row in rows}
    drawn = programs_of(rows)
    width = 0.8 / len(drawn)
    for place, (program, backend, label) in enumerate(drawn):
        height = [row["bytes"][program] / 1e6 for row in rows if row["backend"] == backend]
        x = [group + (place + 0.5) * width - 0.4 for group in range(len(own))]
        faint = 1 if backend == drawn[0][1] else 0.6
        ax.bar(x, height, 0.9 * width, color=COLOURS[program], label=label, alpha=faint)
    for group, height in enumerate(own.values()):
        label = "" if group else "the gradient itself"
        line = {"color": COLOURS["floor"], "lw": 1.6, "label": label}
        ax.hlines(height, group - 0.45, group + 0.45, **line)
    ax.set_xticks(range(len(own)), [f"batch {batch}" for batch in own])
    ax.set(ylabel="MB allocated at the most")
    floor, *others = ax.get_legend_handles_labels()[0]
    ax.legend(handles=[*others, floor], frameon=False)
    return figure


# ---- the roofline --------------------------------------------------------------------------------


def operations(case: str, direction: str) -> int:
    """A square and an addition for each element, a product for each of the gradient's."""
    batch, stages = CASES[case]
    students, teachers = (sum(batch * s[side] * s[2] ** 2 for s in stages) for side in (0, 1))
    return 2 * (students + teachers) + (direction != "forward") * students


# Of a program's pass of a case: operations for each byte, operations a second.
Points = dict[tuple[str, str, str], tuple[float, float]]


def points(model: Model, measured: Sequence[Row]) -> Points:
    """All passes, fp32 NCHW; the seconds are the model's where none were measured."""
    kind = ("fp32", "NCHW")
    ms = {
        (row["case"], row["pass"]): row["ms"]
        for row in measured
        if (row["dtype"], row["layout"]) == kind
    }
    counted = {(r.case, r.direction): r for r in model.rows if (r.dtype, r.layout) == kind}
    found: Points = {}
    for case in CANONICAL:
        for direction in PASSES:
            rows = [counted[case[0], name] for name in direction.split("+")]
            counts = {"at_fused": [row.counted for row in rows]}
            if direction != "value and gradient":  # the others have no such pass
                counts |= {"compile": [row.compiled for row in rows]}
                counts |= {"eager": [row.eager for row in rows]}
            for program, each in counts.items():
                count = sum(each, Count(0, 0))
                seconds = sum(row.us[H100.name][program] for row in rows) / 1e6
                if ms:
                    seconds = ms[case[0], direction][program] / 1e3
                work = operations(case, direction)
                found[program, direction, case[0]] = work / count.bytes, work / seconds
    return found


def roofline(model: Model, result: Result | None = None) -> Figure:
    """Operations a second over operations a byte: modelled, or with a GPU's times."""
    rows = result["parts"]["cases"] if result else []
    rows = [row for row in rows if row["backend"] == rows[0]["backend"]]
    bandwidth, where = 1e6 * H100.bandwidth, f"a model of an {H100.name}, not measured"
    if result:
        bandwidth = 1e3 * max(row["bytes"]["copy"] / row["ms"]["copy"] for row in rows)
        where = f"measured on {result['device']}, {rows[0]['backend']}"
    figure, ax = panel(8, 5, f"Roofline, fp32 NCHW: {where}")
    drawn = list(points(model, rows).items())
    for order, ((program, direction, case), (x, rate)) in enumerate(reversed(drawn), 1):
        hollow, colour = direction == "value and gradient", COLOURS[program]
        inside, edge = ("white", colour) if hollow else (colour, "white")
        style = {"mfc": inside, "mec": edge, "mew": 1.6, "ms": 12, "zorder": order}
        ax.plot(x, rate / 1e9, MARKERS[direction], **style)
        middle = {"ha": "center", "va": "center_baseline", "fontsize": 9, "zorder": order}
        ax.annotate(case, (x, rate / 1e9), color=edge, **middle)
    ax.set(ylabel="useful operations a second, billions", ylim=(0, None), xlim=(0, None))
    ax.set(xlabel="useful operations for each byte moved")
    end = ax.get_xlim()[1]
    roof = {"color": COLOURS["floor"], "lw": 1.6, "label": f"memory, {bandwidth / 1e12:.2f} TB/s"}
    (line,) = ax.plot([0, end], [0, bandwidth * end / 1e9], zorder=0, **roof)
    ax.set_xlim(0, end)
    handles = [
        ax.plot([], [], "o", color=COLOURS[name], ms=7.5, label=label)[0]
        for name, label in NAMES.items()
    ]
    handles += [
        ax.plot([], [], marker, color="0.3", ms=7.5, mfc="white", label=name)[0]
        for name, marker in MARKERS.items()
    ]
    ax.legend(handles=[*handles, line], frameon=False, loc="upper left")
    return figure
