"""Results of a run as people see them: on the terminal, in the table, report.md and its figures."""

from __future__ import annotations

import io
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from at_fused import visualize
from at_fused.balance import AUTO_STEPS
from at_fused.layers import Pair
from at_fused.train import checkpoints, parallel
from at_fused.train.config import (
    METHOD_OPTIONS,
    TITLES,
    Config,
    drawn,
    published,
    readers,
    to_toml,
    word_of,
)
from at_fused.train.data import Data
from at_fused.train.experiment import Experiment, Result
from at_fused.train.loop import Callbacks, Curve, Job, Point
from at_fused.train.saved import load_network

Array = NDArray[np.float64]

LEAST_SEEDS = 3  # for an interval: with two the t-distribution's is 12.7 standard errors
# Colours of Okabe & Ito, told apart by colour-blind readers too.
COLOURS = ("#7f7f7f", "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000")


# ---- the terminal --------------------------------------------------------------------------------


class Terminal(Callbacks):
    """Lines of a run as it goes, and where there is a terminal a bar."""

    def __init__(self, program: str) -> None:
        super().__init__()
        self.program = program
        # Its own is a semaphore of the system, left over where a process ends at once.
        tqdm.set_lock(RLock())
        self.bar: Any = tqdm(disable=True)
        self.started = time.perf_counter()

    def line(self, text: str, file: Any = None) -> None:
        """Print a line at once, above the bar."""
        if parallel.first():
            print(text, file=file, flush=True) if self.bar.disable else self.bar.write(text, file)

    def log(self, text: str) -> None:
        """Say what went wrong, or was decided."""
        self.line(f"{self.program}: {text}", sys.stderr)

    def begin(self, experiment: Experiment) -> None:
        """Say what is trained, and with which options."""
        self.line(f"{heading(experiment)}\n")
        off, steps = None if parallel.first() else True, experiment.result.facts["steps"]
        # None: off where there is no terminal.
        self.bar = tqdm(total=steps, unit="step", dynamic_ncols=True, disable=off)

    def end(self, experiment: Experiment) -> None:
        """Print the table, for which no file is needed, and write the report."""
        self.close()
        if parallel.first():
            print(f"\n{text(experiment.result, experiment.config)}")
            write_report(experiment)
            seconds = time.perf_counter() - self.started
            print(f"\n{seconds:.0f} s in all; everything is in {experiment.out}", flush=True)

    def close(self) -> None:
        """End the bar."""
        self.bar.close()

    def job(self, job: Job) -> None:
        """Name the network on the bar."""
        self.bar.set_description(job.name)

    def step(self) -> None:
        """Count a step."""
        self.bar.update()

    def skipped(self, steps: int) -> None:
        """Count what was done before."""
        self.bar.update(steps)

    def point(self, job: Job, point: Point) -> None:
        """Print an evaluation, or show it on the bar."""
        if not self.bar.disable:
            self.bar.set_postfix_str(f"loss {point['loss']:.4g}, {point['accuracy']:.2f} %")
            return
        found = ", ".join(f"{name} {value:.4g}" for name, value in point.items() if value)
        self.line(f"{job.name}: {found}")


def heading(experiment: Experiment) -> str:
    """Return lines on a run, and the options of its trainings."""
    lines = [f"{'folder':15} {experiment.out}"]
    for name, fact in experiment.result.facts.items():
        if fact not in ({}, []):
            lines.append(f"{name.replace('_', ' '):15} {_shown(fact)}")
    return "\n".join([*lines, "", options_of(experiment.config, experiment.result)])


def _shown(fact: Any) -> str:
    if isinstance(fact, Mapping):
        return ", ".join(f"{name} {value}" for name, value in fact.items())
    if isinstance(fact, list):
        return ", ".join(":".join(each) if isinstance(each, list) else each for each in fact)
    return str(fact)


# ---- tables --------------------------------------------------------------------------------------


def table(columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> str:
    """Return a table for a terminal and in Markdown, of the columns that have anything in a row."""
    shown = ["", *(column for column in columns if any(row.get(column) for row in rows))]
    cells = [shown, *([row.get(column, "") for column in shown] for row in rows)]
    first, *widths = (max(map(len, column)) for column in zip(*cells, strict=True))
    lines = [
        f"| {' | '.join([title.ljust(first), *map(str.rjust, rest, widths)])} |"
        for title, *rest in cells
    ]
    rule = "".join(f"{'-' * (width + 1)}:|" for width in widths)
    return "\n".join([lines[0], f"|{'-' * (first + 2)}|{rule}", *lines[1:]])


def finals(curves: Sequence[Curve], name: str = "accuracy") -> Array:
    """Return (seeds,) the value of a quantity with the weights that are kept."""
    return np.array([curve.chosen[name] for curve in curves])


def paired_difference(a: Array, b: Array) -> tuple[float, float]:
    """Return the mean of a - b over the seeds and the half width of its 95 % Student-t interval."""
    from scipy import stats

    d = a - b
    half = stats.t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / math.sqrt(len(d))
    return float(d.mean()), float(half)


def table_of(result: Result, config: Config) -> str:
    """Return the table of the teacher's accuracy and of each method's."""
    known, several, base = published(config), config.seeds > 1, config.compare[0]
    # AT with KD is worth what it adds to KD, too.
    pairs = [(method, base) for method in config.compare if method != base]
    pairs += [("at+kd", "kd")] * ({"at+kd", "kd"} <= {*config.compare} and base != "kd")

    def row(title: str, method: str, *found: Array) -> dict[str, str]:
        cells = {"": title, "accuracy": f"{found[0].mean():.2f}"}
        if len(found) > 1:
            cells["top-5"] = f"{found[1].mean():.2f}"
        if wanted := known.get(method):
            errors = [100 - float(np.median(each)) for each in found[: len(wanted)]]
            for column, values in (("median error", errors), ("published", wanted)):
                cells[column] = " / ".join(f"{value:.2f}" for value in values)
        return cells

    rows = []
    if result.teacher is not None:
        rows.append(row("teacher", "teacher", *map(np.array, result.teacher)))
    for method, curves in result.students.items():
        names = [name for name in ("accuracy", "top5") if name in curves[0].chosen]
        found = [finals(curves, name) for name in names]
        cells = row(TITLES[method], method, *found)
        if several:
            cells["std"] = f"{found[0].std(ddof=1):.2f}"
        for other in (other for one, other in pairs if several and one == method):
            mean, half = paired_difference(found[0], finals(result.students[other]))
            interval = f" +- {half:.2f}" if config.seeds >= LEAST_SEEDS else ""
            cells[f"to {TITLES[other]}"] = f"{mean:+.2f}{interval}"
        ms = statistics.median(point["ms"] for curve in curves for point in curve.points)
        peak = max(curve.peak_bytes for curve in curves)
        rows.append({**cells, "ms/step": f"{ms:.1f}", "MB/step": f"{peak / 1e6:.1f}" * (peak > 0)})
    differences = dict.fromkeys(f"to {TITLES[other]}" for _, other in pairs)
    columns = ["accuracy", "std", "top-5", *differences, "median error", "published"]
    return table([*columns, "ms/step", "MB/step"], rows)


def notes(config: Config) -> list[str]:
    """Return lines on the networks and images of the table, what was limited, and its columns."""
    images = "validation" if config.evaluate == "val" else "test"
    labels = f"{config.labels} labelled images" if config.labels else "all labels"
    own = [name for name in config.given if name not in ("preset", "method")]
    own += [f"{method}.{n}" for method, each in config.given["method"].items() for n in each]
    lines = [
        f"{images} accuracy, %, of {_networks(config)} on {config.data}: {labels}, "
        f"{config.seeds} seed(s), {config.epochs} epochs",
        f"preset {config.preset}" + f", but for {', '.join(own)}" * bool(own),
    ]
    if config.validation:
        share = f"{100 * config.validation:g} % of the training images"
        lines.append(f"{share} chose the epoch of each network" + ", and beta" * bool(config.betas))
    if config.seeds > 1 and len(config.compare) > 1:
        lines.append(
            "differences: mean over seeds of the same images, first weights and batches; from "
            f"{LEAST_SEEDS} seeds on with the 95 % interval"
        )
    if published(config):
        lines.append("published: Zagoruyko & Komodakis, ICLR 2017, median errors of 5 seeds")
    return [*lines, "ms/step: median, with the reading of images; MB/step: allocated at its peak"]


def measured_betas(result: Result) -> list[str]:
    """Return a line for each method whose beta its first gradients chose."""
    lines = []
    for method, curves in result.students.items():
        last = [curve.points[-1] for curve in curves if "auto_beta" in curve.points[-1]]
        if last:
            found, steps = [point["auto_beta"] for point in last], last[0]["step"]
            short = f", not fixed yet: {steps} of {AUTO_STEPS} steps" if steps < AUTO_STEPS else ""
            lines.append(
                f"beta auto of {TITLES[method]}: {min(found):.3g} to {max(found):.3g}{short}"
            )
    return lines


def _networks(config: Config) -> str:
    return f"{config.student} from {config.teacher}" if config.needs_teacher else config.student


def text(result: Result, config: Config) -> str:
    """Return the tables of the results, with what there is to say on them."""
    lines = [*notes(config), *measured_betas(result)]
    parts = [table_of(result, config), "\n".join(f"- {line}" for line in lines)]
    return "\n\n".join([*parts, *[searched(result)] * bool(result.searched)])


def searched(result: Result) -> str:
    """Return the table of the accuracies on the validation share that chose beta."""
    rows = []
    for method, found in result.searched.items():
        means = {word_of(b): f"{finals(c, 'validation').mean():.2f}" for b, c in found.items()}
        title = f"validation accuracy, %, of {TITLES[method]} by beta"
        rows.append({"": title, **means, "chosen": word_of(result.chosen(method))})
    return table([*dict.fromkeys(column for row in rows for column in row if column)], rows)


def options_of(config: Config, result: Result) -> str:
    """Return the table of the teacher's options and of each method's, those that it reads."""
    of_teacher = ("epochs", "lr", "weight_decay")
    names = [*dict.fromkeys((*of_teacher, *METHOD_OPTIONS))]
    trainings: list[tuple[str, Config, Sequence[str]]] = []
    if config.trains_teacher:
        trainings.append(("teacher", config.for_teacher(), of_teacher))
    for method in config.compare:
        own = config.for_method(method)
        chosen = result.chosen(method) if config.betas else None
        if own.beta is None and (chosen is not None or not config.betas):
            own = replace(own, beta=own.beta_of(method) if chosen is None else chosen)
        trainings.append((method, own, [name for name in names if method in readers(name)]))
    rows = []
    for title, own, read in trainings:
        values = {name: getattr(own, name) for name in read}
        cells = {n: "to choose" if v is None else word_of(v) for n, v in values.items()}
        rows.append({"": title, **cells})
    return table(names, rows)


# ---- report.md -----------------------------------------------------------------------------------


def write_report(experiment: Experiment) -> None:
    """Write report.md and its figures into the run's folder."""
    result, config, out = experiment.result, experiment.config, experiment.out
    draw_curves(result, config, out / "curves.png")
    parts = [
        f"# {_networks(config)} on {config.data}",
        text(result, config),
        "![Loss and accuracy over the run](curves.png)",
        "Bands are one standard deviation over the seeds; seconds are those of the steps alone.",
    ]
    if experiment.pairs and experiment.data.channels in (1, 3):  # which a picture can show
        files = {TITLES[m]: out / f"student_{m}-seed0.pt" for m in drawn(config)}
        layers = [[getattr(pair, side) for pair in experiment.pairs] for side in Pair._fields]
        networks = {title: (load_network(file)[0], layers[0]) for title, file in files.items()}
        networks["teacher"] = (experiment.teacher, layers[1])
        _write(draw_maps(networks, experiment.data, 2), out / "attention.png")
        parts += [
            "![Attention maps](attention.png)",
            "Where the students of seed 0 and their teacher look, on the first images to report "
            "on. A row is a stage and has one colour scale, attention over its root mean square.",
        ]
    parts += [f"## The run\n\n```\n{heading(experiment)}\n```", f"```toml\n{to_toml(config)}```"]
    checkpoints.write(out / "report.md", ("\n\n".join(parts) + "\n").encode())


def values(curves: list[Curve], name: str) -> Array:
    """Return (seeds, points) of a quantity, at the steps that all curves have.

    A run that got more epochs later was evaluated where the first of them ended, too.
    """
    steps = set.intersection(*({point["step"] for point in curve.points} for curve in curves))
    return np.array([[p[name] for p in curve.points if p["step"] in steps] for curve in curves])


def seconds(curves: list[Curve]) -> Array:
    """Return (points,) of training until each point: its steps, at the median of their times."""
    steps, ms = np.diff(values(curves, "step")[0], prepend=0), np.median(values(curves, "ms"), 0)
    return np.cumsum(steps * ms / 1e3)


def _write(fig: Figure, path: Path, dpi: int = 120) -> None:
    found = io.BytesIO()
    fig.savefig(found, dpi=dpi, format="png")
    checkpoints.write(path, found.getvalue())


def draw_curves(result: Result, config: Config, path: Path) -> None:
    """Draw loss and accuracy by step, accuracy by second, and every seed's last word."""
    fig = Figure(figsize=(15, 8.6), layout="constrained")
    (loss, accuracy), (clock, last) = fig.subplots(2, 2)
    titles = [TITLES[method] for method in result.students]
    ends = np.array([finals(curves) for curves in result.students.values()])
    last.plot(range(len(ends)), ends, color="0.85", lw=1, zorder=1)
    for i, (title, curves) in enumerate(zip(titles, result.students.values(), strict=True)):
        colour, steps = COLOURS[i], values(curves, "step")[0]
        for ax, name, x in (
            (loss, "ce", steps),
            (accuracy, "accuracy", steps),
            (clock, "accuracy", seconds(curves)),
        ):
            # On the log axis of the loss the spread is a factor, so is its band.
            v = values(curves, name)
            v = np.log(np.maximum(v, 1e-9)) if ax is loss else v
            bands = v.mean(0) + np.outer([-1, 0, 1], v.std(0, ddof=len(v) > 1))
            low, middle, high = np.exp(bands) if ax is loss else bands
            ax.plot(x, middle, color=colour, label=title, lw=2, marker=".", ms=4)
            ax.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
        mean, spread = ends[i].mean(), ends[i].std(ddof=len(curves) > 1)
        last.scatter(np.full(len(curves), i), ends[i], color=colour, s=28, zorder=2)
        last.errorbar(i + 0.18, mean, spread, color=colour, fmt="D", capsize=4, zorder=3)
        last.text(i + 0.25, mean, f"{mean:.1f}", va="center")
    if result.teacher is not None:
        for ax in (accuracy, clock):
            ax.axhline(result.teacher[0], color="black", ls=":", label="teacher")
    loss.legend(*accuracy.get_legend_handles_labels(), frameon=False)
    loss.set(yscale="log", xlabel="step", ylabel="cross-entropy, augmented training images")
    loss.set_title("Cross-entropy with the labels")
    accuracy.set(xlabel="step", ylabel="accuracy, %", title="Accuracy: mean and one std")
    clock.set(xlabel="seconds of training", ylabel="accuracy, %", title="The same by time")
    kept = "With the weights of the best epoch" if config.validation else "After the last step"
    last.set(xticks=range(len(ends)), xticklabels=titles, xlim=(-0.4, len(ends) - 0.35))
    last.set(ylabel="accuracy, %", title=f"{kept}, {config.seeds} seed(s)")
    for ax in (loss, accuracy, clock, last):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="0.93")
        ax.set_axisbelow(True)
    _write(fig, path, dpi=110)


def draw_maps(
    networks: Mapping[str, tuple[nn.Module, Sequence[str]]], data: Data, count: int
) -> Figure:
    """Draw maps of layers of networks, by title, over the first images to report on."""
    rows = torch.arange(min(count, len(data.evaluate)))
    ((images, labels, _),) = data.evaluate.batches([rows], None)
    maps = {
        title: visualize.attention_maps(model.to(images.device), images, layers)
        for title, (model, layers) in networks.items()
    }
    names = [data.names[int(label)] for label in labels]
    return visualize.figure(images, maps, names=names, across=2, panel=0.95, **data.shown_by)
