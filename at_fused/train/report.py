"""What a run comes to: the table, and report.md with its figures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from at_fused.train import checkpoints
from at_fused.train.config import TITLES, Config, resolve, to_toml
from at_fused.train.experiment import Experiment, Result
from at_fused.train.figures import draw_curves, draw_maps
from at_fused.train.loop import Curve
from at_fused.train.presets import preset

Array = NDArray[np.float64]
Table = list[list[str]]


def finals(curves: Sequence[Curve], name: str = "accuracy") -> Array:
    """(seeds,) the last value of a quantity."""
    return np.array([curve.last(name) for curve in curves])


def paired_difference(a: Array, b: Array) -> tuple[float, float]:
    """Mean of a - b over the seeds and the half width of its 95 % Student-t interval."""
    from scipy import stats

    d = a - b
    half = stats.t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / math.sqrt(len(d))
    return float(d.mean()), float(half)


def shortened(config: Config) -> str:
    """What of a preset was cut, in words; empty where nothing was."""
    whole = resolve({"preset": config.preset})
    parts = []
    if config.epochs != whole.epochs:
        parts.append(f"{config.epochs} of {whole.epochs} epochs")
    if config.fraction != whole.fraction:
        parts.append(f"{100 * config.fraction:g} % of the training images")
    if config.seeds < whole.seeds:
        parts.append(f"{config.seeds} of {whole.seeds} seeds")
    return ", ".join(parts)


def _error(values: Sequence[float]) -> str:
    return " / ".join(f"{value:.2f}" for value in values)


def table_of(result: Result, config: Config) -> Table:
    """The rows of the table, its head first."""
    published = preset(config.preset).published
    several = config.seeds > 1
    five = any("top5" in point for curves in result.students.values() for point in curves[0].points)
    base = config.compare[0]
    head = ["", "accuracy", *["std"] * several, *["top-5"] * five]
    head += [f"to {TITLES[base]}"] * (several and len(config.compare) > 1)
    head += ["test error", "published"] * bool(published) + ["ms/step", "MB/step"]

    def errors(method: str, accuracies: list[float]) -> list[str]:
        if not published:
            return []
        wanted = published.get(method, ())
        found = [100 - a for a in accuracies][: len(wanted) or None]
        return [_error(found), _error(wanted)]

    rows = [head]
    if result.teacher is not None:
        shown = list(result.teacher if five else result.teacher[:1])
        cells = ["teacher", f"{shown[0]:.2f}", *[""] * several, *(f"{x:.2f}" for x in shown[1:])]
        cells += [""] * (several and len(config.compare) > 1)
        rows.append([*cells, *errors("teacher", shown), "", ""])
    for method, curves in result.students.items():
        accuracy = finals(curves)
        cells = [TITLES[method], f"{accuracy.mean():.2f}"]
        cells += [f"{accuracy.std(ddof=1):.2f}"] if several else []
        means = [float(accuracy.mean())]
        if five:
            means.append(float(finals(curves, "top5").mean()))
            cells.append(f"{means[1]:.2f}")
        if several and len(config.compare) > 1:
            mean, half = paired_difference(accuracy, finals(result.students[base]))
            cells.append("" if method == base else f"{mean:+.2f} +- {half:.2f}")
        ms = statistics.median(point["ms"] for curve in curves for point in curve.points)
        peak = max(curve.peak_bytes for curve in curves)
        cells += [*errors(method, means), f"{ms:.1f}", f"{peak / 1e6:.1f}" if peak else ""]
        rows.append(cells)
    return rows


def notes(config: Config) -> list[str]:
    """What the table is of, and what its columns mean."""
    images = {"test": "test", "val": "validation"}[config.evaluate]
    labels = f"{config.labels} labelled images" if config.labels else "all labels"
    lines = [
        f"{images} accuracy, %, of {config.student} from {config.teacher} on {config.data}: "
        f"{labels}, {config.seeds} seed{'s' * (config.seeds > 1)}, {config.epochs} epochs"
    ]
    if cut := shortened(config):
        lines.append(f"shortened, {cut}: no figures of the preset {config.preset}")
    return lines


def _columns(config: Config) -> list[str]:
    base = TITLES[config.compare[0]]
    lines = []
    if config.seeds > 1 and len(config.compare) > 1:
        lines.append(
            f"to {base}: mean over seeds of (method - {base}), with its 95 % interval; same "
            "images, first weights and batches."
        )
    if preset(config.preset).published:
        lines.append(f"published: test error, %, in {preset(config.preset).source}.")
    return [
        *lines,
        "ms/step: median, with the reading of images. MB/step: what a step allocates at its peak.",
    ]


def text(result: Result, config: Config) -> str:
    """The table for a terminal."""
    rows = table_of(result, config)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([*notes(config), "", *lines, "", *_columns(config)])


def _markdown(rows: Table) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---" + "|--:" * (len(rows[0]) - 1) + "|")
    return "\n".join(lines)


def write_report(result: Result, experiment: Experiment) -> None:
    """Writes report.md and its figures into the run's folder."""
    config, out = experiment.config, experiment.out
    draw_curves(result, config, out / "curves.png")
    parts = [
        f"# {config.student} from {config.teacher} on {config.data}",
        *(line[0].upper() + line[1:] + "." for line in notes(config)),
        _markdown(table_of(result, config)),
        *_columns(config),
        "![Loss and accuracy over the run](curves.png)",
        "Bands are one standard deviation over the seeds; seconds are those of the steps alone.",
    ]
    if drawn := draw_maps(experiment, out / "attention.png"):
        parts += ["![Attention maps](attention.png)", drawn]
    ways = "\n".join(f"- {m}: {w}" for m, w in result.facts["steps_run_in"].items())
    parts += [
        "## How the steps ran",
        ways,
        f"torch {result.facts['torch']}, at_fused {result.facts['at_fused']}, "
        f"{result.facts['processes']} process(es).",
        "## Configuration",
        f"```toml\n{to_toml(config)}```",
    ]
    checkpoints.write(out / "report.md", ("\n\n".join(parts) + "\n").encode())
