"""The report's pictures: curves of every method, and where the networks look."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from at_fused import visualize
from at_fused.train import checkpoints
from at_fused.train.config import TITLES, Config, drawn
from at_fused.train.experiment import Experiment, Result
from at_fused.train.loop import Curve
from at_fused.train.saved import load_network

Array = NDArray[np.float64]

# Colours of Okabe & Ito, told apart by colour-blind readers too.
COLOURS = (
    "#7f7f7f",
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#d55e00",
    "#cc79a7",
    "#56b4e9",
    "#000000",
)
MAP_IMAGES = 2


def values(curves: list[Curve], name: str) -> Array:
    """(seeds, points) of a quantity, at the steps that all curves have.

    A run that got more epochs later was evaluated where the first of them ended, too.
    """
    steps = set.intersection(*({point["step"] for point in curve.points} for curve in curves))
    return np.array([[p[name] for p in curve.points if p["step"] in steps] for curve in curves])


def seconds(curves: list[Curve]) -> Array:
    """(points,) of training until each point: its steps, at the median of their times."""
    steps = [0.0, *values(curves, "step")[0]]
    ms = np.median(values(curves, "ms"), axis=0)
    return np.cumsum(
        [(b - a) * each / 1e3 for (a, b), each in zip(pairwise(steps), ms, strict=True)]
    )


def _write(fig: Figure, path: Path, dpi: int) -> None:
    found = io.BytesIO()
    fig.savefig(found, dpi=dpi, format="png")
    checkpoints.write(path, found.getvalue())


def draw_curves(result: Result, config: Config, path: Path) -> None:
    """Loss and accuracy by step, accuracy by second, and every seed's last word."""
    fig = Figure(figsize=(15, 8.6), layout="constrained")
    (loss, accuracy), (clock, last) = fig.subplots(2, 2)
    same: Callable[[Array], Array] = np.asarray
    for colour, (method, curves) in zip(COLOURS, result.students.items(), strict=False):
        steps = values(curves, "step")[0]
        for ax, name, x in (
            (loss, "ce", steps),
            (accuracy, "accuracy", steps),
            (clock, "accuracy", seconds(curves)),
        ):
            # On the log axis of the loss the spread is a factor, so is its band.
            there, back = (np.log, np.exp) if ax is loss else (same, same)
            v = there(np.maximum(values(curves, name), 1e-9))
            mean, std = v.mean(0), v.std(0, ddof=1) if len(v) > 1 else 0 * v[0]
            ax.plot(x, back(mean), color=colour, label=TITLES[method], lw=2, marker=".", ms=4)
            ax.fill_between(x, back(mean - std), back(mean + std), color=colour, alpha=0.15, lw=0)
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


def draw_maps(experiment: Experiment, path: Path) -> str:
    """Attention maps of the baseline's student, of AT's and of the teacher; their caption.

    Empty, and no picture, where no method has compared layers.
    """
    pairs, data = experiment.pairs, experiment.data
    if not pairs:
        return ""
    rows = torch.arange(MAP_IMAGES)
    ((images, labels, _),) = data.evaluate.batches([rows], None)
    if images.shape[1] not in (1, 3):  # which no picture shows
        return ""
    columns = {}
    for method in drawn(experiment.config):
        student, _ = load_network(experiment.out / f"student_{method}-seed0.pt")
        names = [pair.student for pair in pairs]
        student = student.to(images.device)
        columns[TITLES[method]] = list(visualize.attention_maps(student, images, names).values())
    names = [pair.teacher for pair in pairs]
    teacher = experiment.teacher
    columns["teacher"] = list(visualize.attention_maps(teacher, images, names).values())
    # Images that somebody else has normalised are shown from their least to their greatest value.
    mean, std = (None, None) if data.own else (data.mean, data.std)
    fig = visualize.figure(
        images,
        columns,
        stages=[f"{pair.student}\n{'x'.join(map(str, q.shape[1:]))}" for pair, q in
                zip(pairs, columns["teacher"], strict=True)],
        names=[data.names[int(label)] for label in labels],
        across=MAP_IMAGES,
        mean=mean,
        std=std,
        panel=0.95,
    )  # fmt: skip
    _write(fig, path, dpi=120)
    return (
        "Where the students of seed 0 and their teacher look, on the first images to report on. A "
        "row is a stage and has one colour scale, attention over its root mean square."
    )
