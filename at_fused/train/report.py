"""Output of a run: terminal, tables, report.md and its figures."""

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
    format_value,
    methods_to_draw,
    methods_using,
    published_errors,
    to_toml,
)
from at_fused.train.data import Data
from at_fused.train.experiment import Experiment, Result
from at_fused.train.loop import Callbacks, Curve, Job, Point
from at_fused.train.saved import load_network

Array = NDArray[np.float64]

MIN_SEEDS = 3  # for an interval, which two seeds would make 12.7 standard errors wide
# Okabe & Ito's palette, for colour-blind readers.
COLOURS = ("#7f7f7f", "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000")


# ---- terminal ------------------------------------------------------------------------------------


class Terminal(Callbacks):
    """Log lines of a run, and a progress bar on a terminal."""

    def __init__(self, program: str) -> None:
        super().__init__()
        self.program = program
        # tqdm's own lock is a system semaphore, which os._exit would leak.
        tqdm.set_lock(RLock())
        self.bar: Any = tqdm(disable=True)
        self.started = time.perf_counter()

    def line(self, text: str, file: Any = None) -> None:
        """Print a line on rank 0, above the bar."""
        if parallel.is_rank_0():
            print(text, file=file, flush=True) if self.bar.disable else self.bar.write(text, file)

    def log(self, text: str) -> None:
        """Print a warning or a decision."""
        self.line(f"{self.program}: {text}", sys.stderr)

    def on_run_start(self, experiment: Experiment) -> None:
        """Print the summary of the run, and start the progress bar."""
        self.line(f"{run_summary(experiment)}\n")
        # None disables the bar unless there is a terminal.
        disable, steps = None if parallel.is_rank_0() else True, experiment.result.facts["steps"]
        self.bar = tqdm(total=steps, unit="step", dynamic_ncols=True, disable=disable)

    def on_run_end(self, experiment: Experiment) -> None:
        """Print the table first, as it needs no file, then write the report."""
        self.close()
        if parallel.is_rank_0():
            print(f"\n{results_text(experiment.result, experiment.config)}")
            write_report(experiment)
            seconds = time.perf_counter() - self.started
            print(f"\nfinished in {seconds:.0f} s; results are in {experiment.out}", flush=True)

    def close(self) -> None:
        """Close the progress bar."""
        self.bar.close()

    def on_job_start(self, job: Job) -> None:
        """Show the network's name on the bar."""
        self.bar.set_description(job.name)

    def on_step(self) -> None:
        """Advance the bar by a step."""
        self.bar.update()

    def on_steps_skipped(self, steps: int) -> None:
        """Advance the bar by the completed steps."""
        self.bar.update(steps)

    def on_evaluation(self, job: Job, point: Point) -> None:
        """Show an evaluation on the bar, or print it."""
        if not self.bar.disable:
            self.bar.set_postfix_str(f"loss {point['loss']:.4g}, {point['accuracy']:.2f} %")
            return
        values = ", ".join(f"{name} {value:.4g}" for name, value in point.items() if value)
        self.line(f"{job.name}: {values}")


def run_summary(experiment: Experiment) -> str:
    """Return the facts about a run and a table of its options."""
    lines = [f"{'folder':15} {experiment.out}"]
    for name, fact in experiment.result.facts.items():
        if fact not in ({}, []):
            lines.append(f"{name.replace('_', ' '):15} {_format_fact(fact)}")
    return "\n".join([*lines, "", options_table(experiment.config, experiment.result)])


def _format_fact(fact: Any) -> str:
    if isinstance(fact, Mapping):
        return ", ".join(f"{name} {value}" for name, value in fact.items())
    if isinstance(fact, list):
        return ", ".join(":".join(each) if isinstance(each, list) else each for each in fact)
    return str(fact)


# ---- tables --------------------------------------------------------------------------------------


def table(columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> str:
    """Return a table for terminals and Markdown, without columns that are empty in all rows."""
    visible = ["", *(column for column in columns if any(row.get(column) for row in rows))]
    cells = [visible, *([row.get(column, "") for column in visible] for row in rows)]
    first, *widths = (max(map(len, column)) for column in zip(*cells, strict=True))
    lines = [
        f"| {' | '.join([title.ljust(first), *map(str.rjust, rest, widths)])} |"
        for title, *rest in cells
    ]
    rule = "".join(f"{'-' * (width + 1)}:|" for width in widths)
    return "\n".join([lines[0], f"|{'-' * (first + 2)}|{rule}", *lines[1:]])


def selected_values(curves: Sequence[Curve], name: str = "accuracy") -> Array:
    """Return a quantity at the selected evaluation of each curve, (seeds,)."""
    return np.array([curve.selected[name] for curve in curves])


def paired_difference(a: Array, b: Array) -> tuple[float, float]:
    """Return the mean of a - b over seeds and half the width of its 95 % Student-t interval."""
    from scipy import stats

    d = a - b
    half = stats.t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / math.sqrt(len(d))
    return float(d.mean()), float(half)


def results_table(result: Result, config: Config) -> str:
    """Return the table of results: a row for the teacher and for each method."""
    published, has_seeds, base = published_errors(config), config.seeds > 1, config.compare[0]
    # AT + KD is also compared with KD, to show what AT adds.
    pairs = [(method, base) for method in config.compare if method != base]
    pairs += [("at+kd", "kd")] * ({"at+kd", "kd"} <= {*config.compare} and base != "kd")

    def row(title: str, method: str, *values: Array) -> dict[str, str]:
        cells = {"": title, "accuracy": f"{values[0].mean():.2f}"}
        if len(values) > 1:
            cells["top-5"] = f"{values[1].mean():.2f}"
        if expected := published.get(method):
            errors = [100 - float(np.median(each)) for each in values[: len(expected)]]
            for column, percents in (("median error", errors), ("published", expected)):
                cells[column] = " / ".join(f"{percent:.2f}" for percent in percents)
        return cells

    rows = []
    if result.teacher is not None:
        rows.append(row("teacher", "teacher", *map(np.array, result.teacher)))
    for method, curves in result.students.items():
        names = [name for name in ("accuracy", "top5") if name in curves[0].selected]
        values = [selected_values(curves, name) for name in names]
        cells = row(TITLES[method], method, *values)
        if has_seeds:
            cells["std"] = f"{values[0].std(ddof=1):.2f}"
        for other in (other for one, other in pairs if has_seeds and one == method):
            mean, half = paired_difference(values[0], selected_values(result.students[other]))
            interval = f" +- {half:.2f}" if config.seeds >= MIN_SEEDS else ""
            cells[f"vs. {TITLES[other]}"] = f"{mean:+.2f}{interval}"
        ms = statistics.median(point["ms"] for curve in curves for point in curve.points)
        peak = max(curve.peak_bytes for curve in curves)
        rows.append({**cells, "ms/step": f"{ms:.1f}", "MB/step": f"{peak / 1e6:.1f}" * (peak > 0)})
    differences = dict.fromkeys(f"vs. {TITLES[other]}" for _, other in pairs)
    columns = ["accuracy", "std", "top-5", *differences, "median error", "published"]
    return table([*columns, "ms/step", "MB/step"], rows)


def table_notes(config: Config) -> list[str]:
    """Return notes on the table: networks, images, options and columns."""
    images = "validation" if config.evaluate == "val" else "test"
    labels = f"{config.labels} labelled images" if config.labels else "all labels"
    changed = [name for name in config.overrides if name not in ("preset", "method")]
    changed += [f"{method}.{n}" for method, own in config.overrides["method"].items() for n in own]
    lines = [
        f"{images} accuracy (%) of {_describe_networks(config)} on {config.data}: {labels}, "
        f"{config.seeds} seed(s), {config.epochs} epochs",
        f"preset {config.preset}" + f", changed: {', '.join(changed)}" * bool(changed),
    ]
    if config.validation:
        chosen = "epoch and beta" if config.betas else "epoch"
        lines.append(f"{chosen} chosen on {100 * config.validation:g} % of the training images")
    if config.seeds > 1 and len(config.compare) > 1:
        lines.append(
            "differences: mean over seeds, paired by images, initial weights and batches; with a "
            f"95 % interval from {MIN_SEEDS} seeds on"
        )
    if published_errors(config):
        lines.append("published: Zagoruyko & Komodakis, ICLR 2017, median error of 5 seeds")
    return [*lines, "ms/step: median, including data loading; MB/step: peak allocation"]


def auto_beta_notes(result: Result) -> list[str]:
    """Return a line for each method with automatic beta."""
    lines = []
    for method, curves in result.students.items():
        last = [curve.points[-1] for curve in curves if "auto_beta" in curve.points[-1]]
        if last:
            betas, steps = [point["auto_beta"] for point in last], last[0]["step"]
            early = f" (not final: {steps} of {AUTO_STEPS} steps)" if steps < AUTO_STEPS else ""
            lines.append(
                f"automatic beta of {TITLES[method]}: {min(betas):.3g} to {max(betas):.3g}{early}"
            )
    return lines


def _describe_networks(config: Config) -> str:
    student = config.student
    return f"{student} distilled from {config.teacher}" if config.needs_teacher else student


def results_text(result: Result, config: Config) -> str:
    """Return the tables of the results, with notes."""
    lines = [*table_notes(config), *auto_beta_notes(result)]
    parts = [results_table(result, config), "\n".join(f"- {line}" for line in lines)]
    return "\n\n".join([*parts, *[beta_search_table(result)] * bool(result.beta_search)])


def beta_search_table(result: Result) -> str:
    """Return the table of validation accuracy by beta."""
    rows = []
    for method, by_beta in result.beta_search.items():
        accuracies = {beta: selected_values(c, "validation").mean() for beta, c in by_beta.items()}
        cells = {format_value(beta): f"{accuracy:.2f}" for beta, accuracy in accuracies.items()}
        title = f"validation accuracy (%) of {TITLES[method]} by beta"
        rows.append({"": title, **cells, "chosen": format_value(result.chosen_beta(method))})
    return table([*dict.fromkeys(column for row in rows for column in row if column)], rows)


def options_table(config: Config, result: Result) -> str:
    """Return the table of the options that the teacher and each method use."""
    teacher_names = ("epochs", "lr", "weight_decay")
    names = [*dict.fromkeys((*teacher_names, *METHOD_OPTIONS))]
    trainings: list[tuple[str, Config, Sequence[str]]] = []
    if config.trains_teacher:
        trainings.append(("teacher", config.for_teacher(), teacher_names))
    for method in config.compare:
        method_config = config.for_method(method)
        chosen = result.chosen_beta(method) if config.betas else None
        if method_config.beta is None and (chosen is not None or not config.betas):
            method_config = replace(
                method_config, beta=method_config.initial_beta(method) if chosen is None else chosen
            )
        trainings.append(
            (method, method_config, [name for name in names if method in methods_using(name)])
        )
    rows = []
    for title, training_config, used in trainings:
        values = {name: getattr(training_config, name) for name in used}
        cells = {n: "not chosen yet" if v is None else format_value(v) for n, v in values.items()}
        rows.append({"": title, **cells})
    return table(names, rows)


# ---- report.md -----------------------------------------------------------------------------------


def write_report(experiment: Experiment) -> None:
    """Write report.md and its figures to the run's folder."""
    result, config, out = experiment.result, experiment.config, experiment.out
    draw_curves(result, config, out / "curves.png")
    parts = [
        f"# {_describe_networks(config)} on {config.data}",
        results_text(result, config),
        "![Loss and accuracy during training](curves.png)",
        "Bands are one standard deviation over seeds. Training time counts steps only.",
    ]
    if experiment.pairs and experiment.data.channels in (1, 3):  # other images cannot be drawn
        files = {TITLES[m]: out / f"student_{m}-seed0.pt" for m in methods_to_draw(config)}
        layers = [[getattr(pair, side) for pair in experiment.pairs] for side in Pair._fields]
        networks = {title: (load_network(file)[0], layers[0]) for title, file in files.items()}
        networks["teacher"] = (experiment.teacher, layers[1])
        _save_figure(draw_maps(networks, experiment.data, 2), out / "attention.png")
        parts += [
            "![Attention maps](attention.png)",
            "Attention maps of the students of seed 0 and of their teacher, for two images. Each "
            "row is a stage with its own colour scale: attention over its root mean square.",
        ]
    parts += [f"## The run\n\n```\n{run_summary(experiment)}\n```"]
    parts += [f"```toml\n{to_toml(config)}```"]
    checkpoints.atomic_write(out / "report.md", ("\n\n".join(parts) + "\n").encode())


def values_by_seed(curves: list[Curve], name: str) -> Array:
    """Return (seeds, points) of a quantity, at the steps that all curves share.

    Steps may differ: a run that was extended was also evaluated at its former end.
    """
    steps = set.intersection(*({point["step"] for point in curve.points} for curve in curves))
    return np.array([[p[name] for p in curve.points if p["step"] in steps] for curve in curves])


def training_seconds(curves: list[Curve]) -> Array:
    """Return the training time at each point, (points,): steps times their median duration."""
    steps = np.diff(values_by_seed(curves, "step")[0], prepend=0)
    ms = np.median(values_by_seed(curves, "ms"), 0)
    return np.cumsum(steps * ms / 1e3)


def _save_figure(fig: Figure, path: Path, dpi: int = 120) -> None:
    buffer = io.BytesIO()
    fig.savefig(buffer, dpi=dpi, format="png")
    checkpoints.atomic_write(path, buffer.getvalue())


def draw_curves(result: Result, config: Config, path: Path) -> None:
    """Draw loss and accuracy by step, accuracy by time, and the final accuracy of every seed."""
    fig = Figure(figsize=(15, 8.6), layout="constrained")
    (loss, accuracy), (clock, last) = fig.subplots(2, 2)
    titles = [TITLES[method] for method in result.students]
    ends = np.array([selected_values(curves) for curves in result.students.values()])
    last.plot(range(len(ends)), ends, color="0.85", lw=1, zorder=1)
    for i, (title, curves) in enumerate(zip(titles, result.students.values(), strict=True)):
        colour, steps = COLOURS[i], values_by_seed(curves, "step")[0]
        for ax, name, x in (
            (loss, "ce", steps),
            (accuracy, "accuracy", steps),
            (clock, "accuracy", training_seconds(curves)),
        ):
            # The loss axis is logarithmic, so its band is a factor.
            v = values_by_seed(curves, name)
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
    loss.set(yscale="log", xlabel="step", ylabel="cross-entropy on augmented training images")
    loss.set_title("Cross-entropy with the labels")
    accuracy.set(xlabel="step", ylabel="accuracy (%)", title="Accuracy: mean and one std")
    clock.set(xlabel="training time (s)", ylabel="accuracy (%)", title="Accuracy by training time")
    epoch = "Best epoch on validation images" if config.validation else "Last epoch"
    last.set(xticks=range(len(ends)), xticklabels=titles, xlim=(-0.4, len(ends) - 0.35))
    last.set(ylabel="accuracy (%)", title=f"{epoch}, {config.seeds} seed(s)")
    for ax in (loss, accuracy, clock, last):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="0.93")
        ax.set_axisbelow(True)
    _save_figure(fig, path, dpi=110)


def draw_maps(
    networks: Mapping[str, tuple[nn.Module, Sequence[str]]], data: Data, count: int
) -> Figure:
    """Draw attention maps of layers, a column per network, on the first images to report on."""
    rows = torch.arange(min(count, len(data.evaluate)))
    ((images, labels, _),) = data.evaluate.batches([rows], None)
    maps = {
        title: visualize.attention_maps(model.to(images.device), images, layers)
        for title, (model, layers) in networks.items()
    }
    names = [data.names[int(label)] for label in labels]
    return visualize.figure(images, maps, names=names, across=2, panel=0.95, **data.plot_options)
