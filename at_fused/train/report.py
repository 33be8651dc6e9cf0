"""Results of a run as people see them: on the terminal, in the table, report.md and its figures."""

from __future__ import annotations

import io
import math
import os
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from at_fused import visualize
from at_fused.train import checkpoints, parallel
from at_fused.train.config import (
    METHOD_OPTIONS,
    METHODS,
    OPTIONS,
    TITLES,
    TRANSFER,
    WITH_KD,
    Config,
    drawn,
    preset,
    published,
    resolve,
    to_toml,
)
from at_fused.train.data import Data
from at_fused.train.experiment import MAY_CHANGE, Experiment, Result
from at_fused.train.loop import Callbacks, Curve, Job, Point
from at_fused.train.saved import load_network

Array = NDArray[np.float64]
Table = list[list[str]]

LEAST_SEEDS = 3  # for an interval: with two the t-distribution's is 12.7 standard errors
# Colours of Okabe & Ito, told apart by colour-blind readers too.
COLOURS = ("#7f7f7f", "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000")


# ---- the terminal --------------------------------------------------------------------------------


class Terminal(Callbacks):
    """Lines of a run as it goes, and where there is a terminal a bar."""

    def __init__(self, program: str) -> None:
        super().__init__()
        self.program = program
        self.bar: Any = tqdm(disable=True)
        self.started = self.begun = time.perf_counter()
        self.steps = self.left = 0

    def line(self, text: str, file: Any = None) -> None:
        """Print a line at once, above the bar."""
        if parallel.first():
            print(text, file=file, flush=True) if self.bar.disable else self.bar.write(text, file)

    def log(self, text: str) -> None:
        """Say what went wrong, or was decided."""
        self.line(f"{self.program}: {text}", sys.stderr)

    def begin(self, experiment: Experiment) -> None:
        """Say what is trained, and with which options."""
        self.left = experiment.total_steps()
        self.line("\n".join(heading(experiment)))
        self.begun = time.perf_counter()
        # A bar needs a terminal with a width.
        terminal = parallel.first() and sys.stderr.isatty()
        if terminal and os.get_terminal_size(sys.stderr.fileno()).columns:
            self.bar = tqdm(total=self.left, unit="step", dynamic_ncols=True)

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
        self.steps += 1
        self.bar.update()

    def skipped(self, steps: int) -> None:
        """Count what was done before."""
        self.left -= steps
        self.bar.update(steps)

    def point(self, job: Job, point: Point) -> None:
        """Print an evaluation, or show it on the bar."""
        if not self.bar.disable:
            self.bar.set_postfix_str(f"loss {point['loss']:.4g}, {point['accuracy']:.2f} %")
            return
        parts = [f"cross-entropy {point['ce']:.4g}"]
        parts += [f"KD {point['kd']:.4g}"] * (job.method in WITH_KD)
        parts += [f"transfer {point['transfer']:.4g}"] * (job.method in TRANSFER)
        found = f"loss {point['loss']:.4g} ({', '.join(parts)}), accuracy {point['accuracy']:.2f} %"
        if "validation" in point:
            found += f", on the validation share {point['validation']:.2f} %"
        spent = time.perf_counter() - self.begun
        seconds = spent / max(1, self.steps) * (self.left - self.steps)
        self.line(
            f"{job.name}: epoch {point['epoch']:.0f} of {job.config.epochs}, {found}, "
            f"{point['ms']:.3g} ms a step, {duration(seconds)} left"
        )


def duration(seconds: float) -> str:
    """Return a time in words: "40 s", "12 min", "3.5 h", "2.1 days"."""
    for size, unit in ((86400, "days"), (3600, "h")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def heading(experiment: Experiment) -> list[str]:
    """Return lines on what a run is about to do."""
    config, data, facts = experiment.config, experiment.data, experiment.result.facts
    size = "x".join(map(str, experiment.example.shape[1:]))
    images = f"{len(data.train)} images to train with"
    if data.validation is not None:
        images += f", {len(data.validation)} to choose by"
    images += f", {len(data.evaluate)} to report on; {data.classes} classes, {size}"
    sees = f"{config.labels} labelled images" if config.labels else "all training images"
    rows = [("folder", f"{experiment.out}"), ("data", f"{config.data}: {images}")]
    rows += [("", f"{name}: {fact}") for name, fact in data.facts.items()]
    if config.needs_teacher:
        rows.append(("teacher", f"{config.teacher}, {facts['teacher_parameters']:,} parameters"))
    student = f"{config.student}, {facts['student_parameters']:,} parameters"
    rows += [("student", f"{student}; sees {sees}"), *(("", line) for line in experiment.loaded)]
    if experiment.pairs:
        rows.append(("layers", ", ".join(":".join(pair) for pair in experiment.pairs)))
    training = f"batches of {config.batch_size}, {config.optimizer}, rate by {config.lr_schedule}"
    steps = f"{_seeds(config)}, {experiment.total_steps()} steps in all"
    rows.append(("training", f"{training}; {steps}"))
    modes: dict[str, list[str]] = {}
    for method, mode in facts["steps_run_in"].items():
        if method in config.compare or config.trains_teacher:
            modes.setdefault(mode, []).append(method)
    rows += [("runs in", f"{mode} ({', '.join(methods)})") for mode, methods in modes.items()]
    options = _aligned(options_of(config, experiment.result))
    return [*(f"{name:9} {text}" for name, text in rows), "", *options, ""]


# ---- the table -----------------------------------------------------------------------------------


def finals(curves: Sequence[Curve], name: str = "accuracy") -> Array:
    """Return (seeds,) the value of a quantity with the weights that are kept."""
    return np.array([curve.chosen[name] for curve in curves])


def paired_difference(a: Array, b: Array) -> tuple[float, float]:
    """Return the mean of a - b over the seeds and the half width of its 95 % Student-t interval."""
    from scipy import stats

    d = a - b
    half = stats.t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / math.sqrt(len(d))
    return float(d.mean()), float(half)


def departures(config: Config) -> str:
    """Name where a run leaves the preset that has figures; empty where it does not."""
    if not (preset(config.preset).published or config.data == "digits"):
        return ""
    whole = resolve({"preset": config.preset, "data": config.data})
    parts = []
    for name in ("epochs", "seeds"):
        found, wanted = getattr(config, name), getattr(whole, name)
        if found < wanted or (found > wanted and name == "epochs"):
            parts.append(f"{found} {'of' if found < wanted else 'for'} {wanted} {name}")

    def differ(a: Config, b: Config, names: Iterable[str]) -> list[str]:
        return [name for name in names if getattr(a, name) != getattr(b, name)]

    # The speed and the machine make no other figures.
    others = sorted({*OPTIONS} - MAY_CHANGE - {"epochs", "speed", "compile", "evaluate_every"})
    own = differ(config, whole, others)
    rest = [name for name in METHOD_OPTIONS if name not in own]
    for method in config.compare:
        both = config.for_method(method), whole.for_method(method)
        own += [f"{method}.{name}" for name in differ(*both, rest)]
    parts += [f"its own {', '.join(own)}"] * bool(own)
    return ", ".join(parts)


def table_of(result: Result, config: Config) -> Table:
    """Return the rows of the table, its head first."""
    known, several, base = published(config), config.seeds > 1, config.compare[0]
    five = any("top5" in point for curves in result.students.values() for point in curves[0].points)
    to_base = f"to {TITLES[base]}"
    head = ["", "accuracy", *["std"] * several, *["top-5"] * five]
    head += [to_base] * (several and len(config.compare) > 1)
    head += ["median error", "published"] * bool(known) + ["ms/step", "MB/step"]

    def common(name: str, method: str, found: Sequence[Array]) -> dict[str, str]:
        wanted = known.get(method, ())
        errors = [100 - float(np.median(a)) for a in found][: len(wanted) or None]
        return {
            "": name,
            "accuracy": f"{found[0].mean():.2f}",
            "top-5": f"{found[-1].mean():.2f}",
            "median error": " / ".join(f"{value:.2f}" for value in errors),
            "published": " / ".join(f"{value:.2f}" for value in wanted),
        }

    rows = []
    if result.teacher is not None:
        shown = [np.array(value) for value in result.teacher[: 1 + five]]
        rows.append(common("teacher", "teacher", shown))
    for method, curves in result.students.items():
        found = [finals(curves, name) for name in ("accuracy", "top5")[: 1 + five]]
        row = common(TITLES[method], method, found)
        if several:
            row["std"] = f"{found[0].std(ddof=1):.2f}"
        if several and method != base:
            mean, half = paired_difference(found[0], finals(result.students[base]))
            interval = f" +- {half:.2f}" if config.seeds >= LEAST_SEEDS else ""
            row[to_base] = f"{mean:+.2f}{interval}"
        ms = statistics.median(point["ms"] for curve in curves for point in curve.points)
        peak = max(curve.peak_bytes for curve in curves)
        rows.append({**row, "ms/step": f"{ms:.1f}", "MB/step": f"{peak / 1e6:.1f}" if peak else ""})
    return [head, *([row.get(column, "") for column in head] for row in rows)]


def notes(config: Config) -> list[str]:
    """Return lines on the networks and images of the table, and what was limited."""
    images = {"test": "test", "val": "validation"}[config.evaluate]
    labels = f"{config.labels} labelled images" if config.labels else "all labels"
    lines = [
        f"{images} accuracy, %, of {_networks(config)} on {config.data}: {labels}, "
        f"{_seeds(config)}, {config.epochs} epochs"
    ]
    if changes := departures(config):
        lines.append(f"not comparable with the preset {config.preset}: {changes}")
    if config.validation:
        lines.append(
            f"{100 * config.validation:g} % of the training images chose the epoch of each network"
            + ", and beta" * bool(config.betas)
        )
    if config.cache:
        lines.append(
            f"all students saw the same {config.cache} augmentations of an image (--cache), for a "
            "fair comparison; the teacher's training was not limited"
        )
    return lines


def _seeds(config: Config) -> str:
    return f"{config.seeds} seed{'s' * (config.seeds > 1)}"


def _networks(config: Config) -> str:
    return f"{config.student} from {config.teacher}" if config.needs_teacher else config.student


def _columns(config: Config) -> list[str]:
    """Return lines on what the table's columns are."""
    base, lines = TITLES[config.compare[0]], []
    if config.seeds > 1 and len(config.compare) > 1:
        interval = "with its 95 % interval"
        if config.seeds < LEAST_SEEDS:
            interval = f"which has an interval from {LEAST_SEEDS} seeds on"
        lines.append(
            f"to {base}: mean over seeds of (method - {base}), {interval}; same images, first "
            "weights and batches."
        )
    if published(config):
        lines.append(
            "median error: test error, %, median over the seeds; published: that of "
            "Zagoruyko & Komodakis, ICLR 2017, medians of 5 seeds."
        )
    return [
        *lines,
        "ms/step: median, with the reading of images. MB/step: what a step allocates at its peak.",
    ]


def _aligned(rows: Table) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def text(result: Result, config: Config) -> str:
    """Return the table for a terminal."""
    parts = [*notes(config), "", *_aligned(table_of(result, config)), "", *_columns(config)]
    if result.searched:
        parts += ["", *_aligned(searched(result))]
    return "\n".join(parts)


def searched(result: Result) -> Table:
    """Return the accuracies on the validation share that chose beta."""
    betas = next(iter(result.searched.values()))
    rows = [["validation accuracy, %, of beta", *(f"{beta:g}" for beta in betas), "chosen"]]
    for method, found in result.searched.items():
        means = [f"{finals(curves, 'validation').mean():.2f}" for curves in found.values()]
        rows.append([TITLES[method], *means, f"{result.chosen(method):g}"])
    return rows


def options_of(config: Config, result: Result) -> Table:
    """Return the options of the teacher's training and of each method's, those that it reads."""
    of_teacher = ("epochs", "lr", "weight_decay")
    names = dict.fromkeys((*of_teacher, *METHOD_OPTIONS))
    rows = []
    if config.trains_teacher:
        own = config.for_teacher()
        rows.append({"": "teacher", **{n: f"{getattr(own, n):g}" for n in of_teacher}})
    for method in config.compare:
        own = config.for_method(method)
        found = {n: getattr(own, n) for n in names if method in METHOD_OPTIONS.get(n, METHODS)}
        if "beta" in found and own.beta is None:
            unknown = "to choose" if config.betas else own.beta_of(method)
            chosen = result.chosen(method)
            found["beta"] = unknown if chosen is None else chosen
        shown = {n: v if isinstance(v, str) else f"{v:g}" for n, v in found.items()}
        rows.append({"": method, **shown})
    # A column that no method reads says nothing.
    columns = ["", *(name for name in names if any(name in row for row in rows))]
    head = [name.replace("_", " ") for name in columns]
    return [head, *([row.get(name, "") for name in columns] for row in rows)]


# ---- report.md -----------------------------------------------------------------------------------


def _markdown(rows: Table) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---" + "|--:" * (len(rows[0]) - 1) + "|")
    return "\n".join(lines)


def write_report(experiment: Experiment) -> None:
    """Write report.md and its figures into the run's folder."""
    result, config, out = experiment.result, experiment.config, experiment.out
    facts = result.facts
    draw_curves(result, config, out / "curves.png")
    parts = [
        f"# {_networks(config)} on {config.data}",
        *(line[0].upper() + line[1:] + "." for line in notes(config)),
        _markdown(table_of(result, config)),
        *_columns(config),
        "![Loss and accuracy over the run](curves.png)",
        "Bands are one standard deviation over the seeds; seconds are those of the steps alone.",
    ]
    if result.searched:
        parts.append(_markdown(searched(result)))
    if experiment.pairs and experiment.data.channels in (1, 3):  # which a picture can show
        _write(draw_maps(_networks_to_draw(experiment), experiment.data, 2), out / "attention.png")
        parts += [
            "![Attention maps](attention.png)",
            "Where the students of seed 0 and their teacher look, on the first images to report "
            "on. A row is a stage and has one colour scale, attention over its root mean square.",
        ]
    remarks = [*(f"{name}: {fact}" for name, fact in facts["data"].items()), *experiment.loaded]
    parts += [
        *(["\n".join(f"- {line}" for line in remarks)] if remarks else []),
        "## Options",
        _markdown(options_of(config, result)),
        "## How the steps ran",
        "\n".join(f"- {method}: {mode}" for method, mode in facts["steps_run_in"].items()),
        f"torch {facts['torch']}, at_fused {facts['at_fused']}, {facts['processes']} process(es).",
        "## Configuration",
        f"```toml\n{to_toml(config)}```",
    ]
    checkpoints.write(out / "report.md", ("\n\n".join(parts) + "\n").encode())


def values(curves: list[Curve], name: str) -> Array:
    """Return (seeds, points) of a quantity, at the steps that all curves have.

    A run that got more epochs later was evaluated where the first of them ended, too.
    """
    steps = set.intersection(*({point["step"] for point in curve.points} for curve in curves))
    return np.array([[p[name] for p in curve.points if p["step"] in steps] for curve in curves])


def seconds(curves: list[Curve]) -> Array:
    """Return (points,) of training until each point: its steps, at the median of their times."""
    steps = [0.0, *values(curves, "step")[0]]
    ms = np.median(values(curves, "ms"), axis=0)
    return np.cumsum(
        [(b - a) * each / 1e3 for (a, b), each in zip(pairwise(steps), ms, strict=True)]
    )


def _write(fig: Figure, path: Path, dpi: int = 120) -> None:
    found = io.BytesIO()
    fig.savefig(found, dpi=dpi, format="png")
    checkpoints.write(path, found.getvalue())


def draw_curves(result: Result, config: Config, path: Path) -> None:
    """Draw loss and accuracy by step, accuracy by second, and every seed's last word."""
    fig = Figure(figsize=(15, 8.6), layout="constrained")
    (loss, accuracy), (clock, last) = fig.subplots(2, 2)
    for colour, (method, curves) in zip(COLOURS, result.students.items(), strict=False):
        steps = values(curves, "step")[0]
        for ax, name, x in (
            (loss, "ce", steps),
            (accuracy, "accuracy", steps),
            (clock, "accuracy", seconds(curves)),
        ):
            # On the log axis of the loss the spread is a factor, so is its band.
            v = values(curves, name)
            v = np.log(np.maximum(v, 1e-9)) if ax is loss else v
            mean, std = v.mean(0), v.std(0, ddof=1) if len(v) > 1 else 0 * v[0]
            bands = np.array([mean - std, mean, mean + std])
            low, middle, high = np.exp(bands) if ax is loss else bands
            ax.plot(x, middle, color=colour, label=TITLES[method], lw=2, marker=".", ms=4)
            ax.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
    loss.set(yscale="log", xlabel="step", ylabel="cross-entropy, augmented training images")
    loss.set_title("Cross-entropy with the labels")
    accuracy.set(xlabel="step", ylabel="accuracy, %", title="Accuracy: mean and one std")
    clock.set(xlabel="seconds of training", ylabel="accuracy, %", title="The same by time")
    if result.teacher is not None:
        for ax in (accuracy, clock):
            ax.axhline(result.teacher[0], color="black", ls=":", label="teacher")
    loss.legend(*accuracy.get_legend_handles_labels(), frameon=False)

    methods = list(result.students)
    ends = np.array([[curve.chosen["accuracy"] for curve in result.students[m]] for m in methods])
    last.plot(range(len(methods)), ends, color="0.85", lw=1, zorder=1)
    for place, (colour, end) in enumerate(zip(COLOURS, ends, strict=False)):
        last.scatter(np.full(len(end), place), end, color=colour, s=28, zorder=2)
        spread = end.std(ddof=1) if len(end) > 1 else 0
        last.errorbar(place + 0.18, end.mean(), spread, color=colour, fmt="D", capsize=4, zorder=3)
        last.annotate(
            f"{end.mean():.1f}", (place + 0.18, end.mean()), (8, 0),
            textcoords="offset points", va="center",
        )  # fmt: skip
    kept = "With the weights of the best epoch" if config.validation else "After the last step"
    last.set_xticks(range(len(methods)), [TITLES[m] for m in methods])
    last.set_xlim(-0.4, len(methods) - 0.35)
    last.set(ylabel="accuracy, %", title=f"{kept}, {config.seeds} seeds")
    for ax in (loss, accuracy, clock, last):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="0.93")
        ax.set_axisbelow(True)
    _write(fig, path, dpi=110)


def _networks_to_draw(experiment: Experiment) -> dict[str, tuple[nn.Module, list[str]]]:
    """Return the baseline's student, AT's and the teacher by title, with the layers to draw."""
    columns = {}
    for method in drawn(experiment.config):
        student, _ = load_network(experiment.out / f"student_{method}-seed0.pt")
        columns[TITLES[method]] = (student, [pair.student for pair in experiment.pairs])
    teacher = (experiment.teacher, [pair.teacher for pair in experiment.pairs])
    return {**columns, "teacher": teacher}


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
