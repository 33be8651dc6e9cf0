"""The report's charts. Needs matplotlib."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from benchmarks.cases import TIMED_CASES
from benchmarks.measure import Row
from benchmarks.results import Result, machine_of

# Okabe & Ito's palette, which colour-blind readers can distinguish.
COLOURS = {"at_fused": "#0072b2", "compile": "#e69f00", "eager": "#9a9a9a", "floor": "#000000"}
NAMES = {"at_fused": "at_fused", "compile": "torch.compile", "eager": "eager PyTorch"}


def digest(source: Any) -> str:
    """Return a hash of the measurements that a chart shows; its metadata has the same."""
    return hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()[:16]


def save(figure: Figure, path: Path, source: Any) -> None:
    """Write a chart, and the digest of its source in its metadata."""
    figure.savefig(path, dpi=110, metadata={"Description": digest(source)})


def panels(
    width: float, height: float, *titles: str, grid: str = "both", **options: Any
) -> tuple[Figure, list[Axes]]:
    """Make a figure with one plot per title, side by side."""
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
    """Return program, back end and label: the baselines once, at_fused once per back end."""
    names = list(dict.fromkeys(row["backend"] for row in rows))
    ours = [("at_fused", n, "at_fused" if n == "cpu" else f"at_fused ({n})") for n in names]
    return [(name, names[0], NAMES[name]) for name in ("eager", "compile")] + ours


def cases(result: Result) -> Figure:
    """Draw the time of each pass over the time of one read of its input, and the lower bounds."""
    rows = result["parts"]["cases"]
    # A case has a line for its title, then one for each dtype and layout.
    keys = [key for r in rows for key in ((r["case"],), (r["case"], r["dtype"], r["layout"]))]
    lines = {key: y for y, key in enumerate(dict.fromkeys(keys))}
    look: dict[str, Any] = {"grid": "x", "sharey": True, "width_ratios": (2, 3)}
    figure, axes = panels(9, 1.8 + 0.27 * len(lines), "forward", "forward and backward", **look)
    machine = machine_of(result)
    figure.suptitle(f"Time of the attention-transfer loss on {machine} (lower is better)")
    programs = programs_of(rows)
    labels: dict[Any, str] = {"-": "lower bound", ":": "lower bound of at_value_and_grad"}
    labels |= {(program, backend): label for program, backend, label in programs}
    labels |= {"value and gradient": "at_value_and_grad"}
    handles: dict[Any, Any] = {}
    for row in rows:
        ax = axes[int(row["pass"] != "forward")]
        y, backend = lines[row["case"], row["dtype"], row["layout"]], row["backend"]
        is_one_call = row["pass"] == "value and gradient"
        bound = row["bytes"]["at_fused"] / row["bytes"]["floor"]
        kind = ":" if is_one_call else "-"
        handles[kind] = ax.vlines(bound, y - 0.5, y + 0.5, COLOURS["floor"], kind, lw=1.6)
        times = {name: row["ms"][name] / row["ms"]["floor"] for name in NAMES}
        style: dict[str, Any] = {"ms": 6.5, "zorder": 3, "ls": ""}
        if is_one_call:
            times = {"at_fused": times["at_fused"]}
            style |= {"mfc": "white", "mew": 1.6}
        else:
            ax.hlines(y, bound, times["eager"], color="0.85", lw=1, zorder=0)
        for program, x in reversed(times.items()):
            marker = "D" if program == "at_fused" and backend != programs[0][1] else "o"
            key = row["pass"] if is_one_call else (program, backend)
            (point,) = ax.plot(x, y, marker, color=COLOURS[program], **style)
            handles.setdefault(key, point)
    for ax in axes:
        ax.set(xscale="log", xlabel="time (1x = one read of the input)")
        low, high = ax.get_xlim()
        ticks = [n for n in (0.2, 0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100) if low <= n <= high]
        ax.set_xticks(ticks, [f"{n}x" for n in ticks])
        ax.minorticks_off()
    for title in TIMED_CASES:
        if (key := (title[0],)) in lines:
            position = {"xy": (0.01, lines[key]), "xycoords": ("axes fraction", "data")}
            axes[0].annotate(title, va="center", weight="bold", **position)
    axes[0].set_yticks(range(len(lines)), [" ".join(key[1:]) for key in lines])
    axes[0].set_ylim(len(lines) - 0.5, -0.5)
    shown = [key for key in labels if key in handles]
    legend = {"loc": "outside lower center", "ncols": (len(shown) + 1) // 2, "frameon": False}
    figure.legend([handles[key] for key in shown], [labels[key] for key in shown], **legend)
    return figure


def sizes(result: Result) -> Figure:
    """Draw time against size, with one read of the bytes."""
    rows = result["parts"]["sizes"]
    figure, (ax,) = panels(8, 4.4, f"Loss of one fp32 NCHW pair on {machine_of(result)}")
    programs = programs_of(rows)
    for program, backend, label in programs:
        own = [row for row in rows if row["backend"] == backend]
        points = [row["bytes"] for row in own], [row["ms"][program] / 1e3 for row in own]
        marker = "o-" if backend == programs[0][1] else "D-"
        order = 2 + (program == "at_fused")
        ax.plot(*points, marker, color=COLOURS[program], ms=5, lw=2, label=label, zorder=order)
    floor = {row["bytes"]: row["ms"]["floor"] / 1e3 for row in rows}
    label = "memory floor: one read of the input"
    ax.plot(*zip(*floor.items(), strict=True), "--", color=COLOURS["floor"], label=label)
    if cache := result["cache"]:
        ax.axvline(cache, color="0.6", ls=":", lw=1.2)
        position = {"xy": (cache, 0.02), "xycoords": ("data", "axes fraction"), "ha": "right"}
        ax.annotate("last-level cache ", color="0.4", fontsize=9, **position)
    ax.set(xscale="log", xlabel="size of student and teacher features (bytes)")
    ax.set(yscale="log", ylabel="time of forward and backward (seconds)")
    ax.xaxis.set_major_formatter(EngFormatter("B"))
    ax.yaxis.set_major_formatter(EngFormatter("s"))
    ax.minorticks_off()
    ax.legend(frameon=False)
    return figure
