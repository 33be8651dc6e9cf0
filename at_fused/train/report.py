"""The table on stdout and the figure in the folder."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from at_fused.train.config import Config
from at_fused.train.experiment import METHODS, Result, largest_difference
from at_fused.train.loop import Curve

Array = NDArray[np.float64]

# Colours of Okabe & Ito, told apart by colour-blind readers too.
STYLE = {
    "alone": ("#7f7f7f", "-"),
    "at_fused": ("#0072b2", "-"),
    "at_eager": ("#e69f00", (0, (2, 2))),
}


IMAGES = {"test": "test", "val": "validation"}


def final_accuracies(curves: list[Curve]) -> Array:
    """(seeds,) accuracy after the last step."""
    return np.array([c.accuracy[-1] for c in curves])


def paired_difference(a: Array, b: Array) -> tuple[float, float]:
    """Mean of a - b over the seeds and the half width of its 95 % Student-t interval."""
    from scipy import stats

    d = a - b
    half = stats.t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / math.sqrt(len(d))
    return float(d.mean()), float(half)


def table(result: Result, cfg: Config) -> str:
    """The results, one row a method, with what the columns mean below."""
    row = "{:20} {:>6} {:>5} {:>18} {:>11} {:>7} {:>8}".format
    teacher, alone = result.teacher, final_accuracies(result.students["alone"])
    rows = [
        row("", "mean", "std", "to alone, 95 % CI", "AT ms/step", "AT s", "total s"),
        row("teacher", f"{teacher.accuracy[-1]:.2f}", "", "", "", "", f"{teacher.seconds:.1f}"),
    ]
    for m in METHODS:
        curves = result.students[m.slug]
        acc = final_accuracies(curves)
        difference = ms = at_seconds = ""
        if m.at:
            mean, half = paired_difference(acc, alone)
            difference = f"{mean:+.2f} +- {half:.2f}"
            ms = f"{np.median([c.at_ms for c in curves]):.3f}"
            at_seconds = f"{sum(c.at_ms for c in curves) * cfg.steps / 1e3:.2f}"
        total = f"{sum(c.seconds for c in curves):.1f}"
        std = f"{acc.std(ddof=1):.2f}"
        rows.append(row(m.name, f"{acc.mean():.2f}", std, difference, ms, at_seconds, total))
    pairs = zip(result.students["at_fused"], result.students["at_eager"], strict=True)
    drift = max(largest_difference(a.at, b.at) for a, b in pairs)
    body = "\n".join(rows)
    return f"""\
{IMAGES[cfg.evaluate]} accuracy, %: {cfg.labels} labelled images, {cfg.seeds} seeds, \
beta = {cfg.beta:g}, p = {cfg.p:g}

{body}

to alone: mean over seeds of (method - student alone); same labels, first weights and batches.
AT ms/step: the AT loss and its gradient in the student's features, without the networks;
    median of a probe at every logged step. AT s: that, times all steps of all seeds.
total s: the whole training, with both networks, evaluation and probes.
largest relative difference of the fused and the eager AT loss curve: {result.check:.1e}
    (float64, {cfg.check_steps} steps); {drift:.1e} in the float32 runs of the table, where
    training magnifies rounding."""


def figure(result: Result, cfg: Config, path: Path) -> None:
    """Loss and accuracy against the step (mean, band of one std) and every seed's last word."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    images = IMAGES[cfg.evaluate]
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
    for m in METHODS:
        curves = result.students[m.slug]
        colour, dash = STYLE[m.slug]
        steps = curves[0].step
        for ax, values in (
            (left, np.array([c.ce for c in curves])),
            (middle, np.array([c.accuracy for c in curves])),
        ):
            # On the log axis of the loss the spread is a factor, so is its band.
            v = np.log(values) if ax is left else values
            mean, std = v.mean(0), v.std(0, ddof=1)
            back = np.exp if ax is left else np.asarray
            ax.plot(steps, back(mean), color=colour, linestyle=dash, label=m.name, lw=2)
            if m.slug != "at_eager":  # its band lies on the fused one and would only muddy it
                ax.fill_between(
                    steps, back(mean - std), back(mean + std), color=colour, alpha=0.2, lw=0
                )
    left.set(yscale="log", xlabel="step", ylabel="training cross-entropy")
    left.set_title(f"Loss on the {cfg.labels} labelled images")
    middle.set(
        xlabel="step", ylabel=f"{images} accuracy, %", title="Mean and one std over the seeds"
    )
    middle.axhline(result.teacher.accuracy[-1], color="black", ls=":", label="teacher, all images")
    # One legend for all panels, where no curve runs.
    left.legend(*middle.get_legend_handles_labels(), loc="upper right", frameon=False)

    finals = np.array([final_accuracies(result.students[m.slug]) for m in METHODS])
    right.plot(range(len(METHODS)), finals, color="0.85", lw=1, zorder=1)
    for x, (m, acc) in enumerate(zip(METHODS, finals, strict=True)):
        colour = STYLE[m.slug][0]
        right.scatter(np.full(len(acc), x), acc, color=colour, s=28, zorder=2)
        right.errorbar(
            x + 0.18, acc.mean(), acc.std(ddof=1), color=colour, fmt="D", capsize=4, zorder=3
        )
        right.annotate(
            f"{acc.mean():.1f}", (x + 0.18, acc.mean()), (8, 0),
            textcoords="offset points", va="center",
        )  # fmt: skip
    right.set_xticks(range(len(METHODS)), [m.name.replace(" + ", "\n+ ") for m in METHODS])
    right.set_xlim(-0.4, len(METHODS) - 0.35)
    right.set(ylabel=f"{images} accuracy, %", title=f"After the last step, {cfg.seeds} seeds")
    for ax in (left, middle, right):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="0.93")
        ax.set_axisbelow(True)
    fig.savefig(path, dpi=120)
    plt.close(fig)
