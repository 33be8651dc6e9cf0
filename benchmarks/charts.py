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

from benchmarks.measure import Row
from benchmarks.results import Result

# Of Okabe & Ito, told apart by colour-blind readers too; a program has the same in all pictures.
COLOURS = {"at_fused": "#0072b2", "compile": "#e69f00", "eager": "#9a9a9a", "floor": "#000000"}
NAMES = {"at_fused": "at_fused", "compile": "torch.compile", "eager": "eager PyTorch"}


def digest(source: Any) -> str:
    """Name the figures that a picture was drawn from; it carries that name."""
    return hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()[:16]


def save(figure: Figure, path: Path, source: Any) -> None:
    """Write a picture and what it was drawn from."""
    figure.savefig(path, dpi=110, metadata={"Description": digest(source)})


def panels(
    width: float, height: float, *titles: str, grid: str = "both", **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure with plots beside each other, of one look."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(1, len(titles), squeeze=False, **options)[0])
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis=grid, color="0.92", lw=0.8)
        ax.set_axisbelow(True)
        ax.tick_params(which="both", length=0)
    return figure, axes


def programs_of(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Program, back end, label: ours on each back end of a GPU, the others once."""
    names = list(dict.fromkeys(row["backend"] for row in rows))
    ours = [("at_fused", n, "at_fused" if n == "cpu" else f"at_fused ({n})") for n in names]
    return ours + [(rival, names[0], NAMES[rival]) for rival in ("compile", "eager")]


def cases(result: Result) -> Figure:
    """Every case's time over one read of its bytes, and what the bytes that have to move take."""
    rows = result["parts"]["cases"]
    settings = list(dict.fromkeys((r["case"], r["dtype"], r["layout"]) for r in rows))
    look: dict[str, Any] = {"grid": "x", "sharey": True, "width_ratios": (2, 3)}
    titles = "forward", "forward and backward"
    figure, axes = panels(9, 1.6 + 0.3 * len(settings), *titles, **look)
    for ax in axes:
        ax.set(xscale="log", xlabel="time, in reads of the same bytes")
    drawn = programs_of(rows)
    labels: dict[Any, str] = {"floor": "floor", "value and gradient": "value and gradient"}
    labels |= {(program, backend): label for program, backend, label in drawn}
    for row in rows:
        ax = axes[int(row["pass"] != "forward")]
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
    for ax in axes:
        low, high = ax.get_xlim()
        ticks = [n for n in (0.2, 0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100) if low <= n <= high]
        ax.set_xticks(ticks, map(str, ticks))
        ax.minorticks_off()
    axes[0].set_yticks(range(len(settings)), [" ".join(setting) for setting in settings])
    axes[0].set_ylim(len(settings) - 0.5, -0.5)
    close = {"columnspacing": 1.2, "handletextpad": 0.3, "frameon": False}
    figure.legend(loc="outside upper center", ncols=9, **close)
    return figure


def sizes(result: Result) -> Figure:
    """Time against size, log-log, with one read of the bytes."""
    rows = result["parts"]["sizes"]
    figure, (ax,) = panels(8, 4.4, "Forward and backward of one pair, fp32 NCHW")
    drawn = programs_of(rows)
    for program, backend, label in drawn:
        mine = [row for row in rows if row["backend"] == backend]
        points = [row["bytes"] for row in mine], [row["ms"][program] / 1e3 for row in mine]
        marker = "o-" if backend == drawn[0][1] else "D-"
        order = 2 + (program == "at_fused")
        ax.plot(*points, marker, color=COLOURS[program], ms=5, lw=2, label=label, zorder=order)
    floor = {row["bytes"]: row["ms"]["floor"] / 1e3 for row in rows}
    ax.plot(*zip(*floor.items(), strict=True), "--", color=COLOURS["floor"], label="one read")
    if cache := result["cache"]:
        ax.axvline(cache, color="0.6", ls=":", lw=1.2)
        place = {"xy": (cache, 0.02), "xycoords": ("data", "axes fraction"), "ha": "right"}
        ax.annotate("last-level cache ", color="0.4", fontsize=9, **place)
    ax.set(xscale="log", yscale="log", xlabel="bytes of both features", ylabel="time")
    ax.xaxis.set_major_formatter(EngFormatter("B"))
    ax.yaxis.set_major_formatter(EngFormatter("s"))
    ax.minorticks_off()
    ax.legend(frameon=False)
    return figure
