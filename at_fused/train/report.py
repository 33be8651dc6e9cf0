"""Results of a run: the table, and report.md with its figures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from at_fused.train import checkpoints
from at_fused.train.config import (
    METHODS,
    NEEDS_TEACHER,
    OF_A_METHOD,
    OPTIONS,
    TITLES,
    Config,
    beta_of,
    for_method,
    for_teacher,
    resolve,
    to_toml,
)
from at_fused.train.experiment import FREE, Experiment, Result
from at_fused.train.figures import draw_curves, draw_maps
from at_fused.train.loop import Curve
from at_fused.train.presets import preset, published

Array = NDArray[np.float64]
Table = list[list[str]]


LEAST_SEEDS = 3  # for an interval: with two the t-distribution's is 12.7 standard errors


def finals(curves: Sequence[Curve], name: str = "accuracy") -> Array:
    """(seeds,) the value of a quantity with the weights that are kept."""
    return np.array([curve.chosen[name] for curve in curves])


def paired_difference(a: Array, b: Array) -> tuple[float, float]:
    """Mean of a - b over the seeds and the half width of its 95 % Student-t interval."""
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
        if found != wanted and (name != "seeds" or found < wanted):
            parts.append(f"{found} {'of' if found < wanted else 'for'} {wanted} {name}")
    # The speed and the machine make no other figures.
    others = sorted({*OPTIONS} - FREE - {"epochs", "speed", "compile", "evaluate_every"})
    differ = [name for name in others if getattr(config, name) != getattr(whole, name)]
    differ += [
        f"{method}.{name}"
        for method in config.compare
        for name in OF_A_METHOD
        if name not in differ
        and getattr(for_method(config, method), name) != getattr(for_method(whole, method), name)
    ]
    parts += [f"its own {', '.join(differ)}"] * bool(differ)
    return ", ".join(parts)


def _error(values: Sequence[float]) -> str:
    return " / ".join(f"{value:.2f}" for value in values)


def table_of(result: Result, config: Config) -> Table:
    """The rows of the table, its head first."""
    known = published(config)
    several = config.seeds > 1
    five = any("top5" in point for curves in result.students.values() for point in curves[0].points)
    base = config.compare[0]
    head = ["", "accuracy", *["std"] * several, *["top-5"] * five]
    head += [f"to {TITLES[base]}"] * (several and len(config.compare) > 1)
    head += ["median error", "published"] * bool(known) + ["ms/step", "MB/step"]

    def errors(method: str, *accuracies: Array) -> list[str]:
        if not known:
            return []
        wanted = known.get(method, ())
        found = [100 - float(np.median(a)) for a in accuracies][: len(wanted) or None]
        return [_error(found), _error(wanted)]

    rows = [head]
    if result.teacher is not None:
        shown = list(result.teacher if five else result.teacher[:1])
        cells = ["teacher", f"{shown[0]:.2f}", *[""] * several, *(f"{x:.2f}" for x in shown[1:])]
        cells += [""] * (several and len(config.compare) > 1)
        rows.append([*cells, *errors("teacher", *map(np.array, shown)), "", ""])
    for method, curves in result.students.items():
        accuracy = finals(curves)
        cells = [TITLES[method], f"{accuracy.mean():.2f}"]
        cells += [f"{accuracy.std(ddof=1):.2f}"] if several else []
        found = [accuracy, *([finals(curves, "top5")] if five else [])]
        if five:
            cells.append(f"{found[1].mean():.2f}")
        if several and len(config.compare) > 1:
            mean, half = paired_difference(accuracy, finals(result.students[base]))
            interval = f" +- {half:.2f}" if config.seeds >= LEAST_SEEDS else ""
            cells.append("" if method == base else f"{mean:+.2f}{interval}")
        ms = statistics.median(point["ms"] for curve in curves for point in curve.points)
        peak = max(curve.peak_bytes for curve in curves)
        cells += [*errors(method, *found), f"{ms:.1f}", f"{peak / 1e6:.1f}" if peak else ""]
        rows.append(cells)
    return rows


def notes(config: Config) -> list[str]:
    """The networks and images of the table, and what was limited."""
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
    taught = any(method in NEEDS_TEACHER for method in config.compare)
    return f"{config.student} from {config.teacher}" if taught else config.student


def _columns(config: Config) -> list[str]:
    base = TITLES[config.compare[0]]
    lines = []
    if config.seeds > 1 and len(config.compare) > 1:
        interval = (
            "with its 95 % interval"
            if config.seeds >= LEAST_SEEDS
            else (f"which has an interval from {LEAST_SEEDS} seeds on")
        )
        lines.append(
            f"to {base}: mean over seeds of (method - {base}), {interval}; same images, first "
            "weights and batches."
        )
    if published(config):
        lines.append(
            "median error: test error, %, median over the seeds; published: that of "
            f"{preset(config.preset).source}, medians of 5 seeds."
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
    """The table for a terminal."""
    parts = [*notes(config), "", *_aligned(table_of(result, config)), "", *_columns(config)]
    if result.searched:
        parts += ["", *_aligned(searched(result))]
    return "\n".join(parts)


def searched(result: Result) -> Table:
    """The accuracies on the validation share that chose beta."""
    betas = next(iter(result.searched.values()))
    rows = [["validation accuracy, %, of beta", *(f"{beta:g}" for beta in betas), "chosen"]]
    for method, found in result.searched.items():
        means = [f"{finals(curves, 'validation').mean():.2f}" for curves in found.values()]
        rows.append([TITLES[method], *means, f"{result.chosen(method):g}"])
    return rows


def options_of(config: Config, result: Result) -> Table:
    """The options of the teacher's training and of each method's, those that it reads."""
    names = (
        "epochs",
        "lr",
        "weight_decay",
        *(n for n in OF_A_METHOD if n not in ("lr", "weight_decay")),
    )
    rows = [["", *(name.replace("_", " ") for name in names)]]
    teaches = any(method in NEEDS_TEACHER for method in config.compare)
    if teaches and not config.teacher_from:
        own = for_teacher(config)
        rows.append(
            ["teacher", *(f"{getattr(own, n):g}" for n in names[:3]), *[""] * (len(names) - 3)]
        )
    for method in config.compare:
        own = for_method(config, method)
        cells = [method]
        for name in names:
            value = getattr(own, name)
            if method not in OF_A_METHOD.get(name, METHODS):
                value = ""
            elif name == "beta" and value is None:
                to_choose = "to choose" if config.betas else beta_of(own, method)
                chosen = result.chosen(method)
                value = to_choose if chosen is None else chosen
            cells.append(value if isinstance(value, str) else f"{value:g}")
        rows.append(cells)
    # A column that no method reads says nothing.
    kept = [i for i in range(len(rows[0])) if i == 0 or any(row[i] for row in rows[1:])]
    return [[row[i] for i in kept] for row in rows]


def heading(experiment: Experiment) -> list[str]:
    """List what a run is about to do, in lines."""
    config, data, facts = experiment.config, experiment.data, experiment.result.facts
    size = "x".join(map(str, experiment.example.shape[1:]))
    images = f"{len(data.train)} images to train with"
    if data.validation is not None:
        images += f", {len(data.validation)} to choose by"
    rows = [
        ["folder", str(experiment.out)],
        [
            "data",
            f"{config.data}: {images}, {len(data.evaluate)} to report on; {data.classes} "
            f"classes, {size}",
        ],
        *(["", f"{name}: {fact}"] for name, fact in data.facts.items()),
    ]
    if experiment.needs_teacher:
        rows.append(["teacher", f"{config.teacher}, {facts['teacher_parameters']:,} parameters"])
    sees = f"{config.labels} labelled images" if config.labels else "all training images"
    rows.append(
        ["student", f"{config.student}, {facts['student_parameters']:,} parameters; sees {sees}"]
    )
    rows += [["", line] for line in experiment.loaded]
    if experiment.pairs:
        rows.append(["layers", ", ".join(":".join(pair) for pair in experiment.pairs)])
    training = f"batches of {config.batch_size}, {config.optimizer}, rate by {config.lr_schedule}"
    rows.append(
        [
            "training",
            f"{training}; {_seeds(config)}, {experiment.total_steps()} steps in all",
        ]
    )
    ways: dict[str, list[str]] = {}
    for method, way in facts["steps_run_in"].items():
        if method in config.compare or (experiment.needs_teacher and not config.teacher_from):
            ways.setdefault(way, []).append(method)
    rows += [["runs in", f"{way} ({', '.join(methods)})"] for way, methods in ways.items()]
    return [
        *(f"{name:9} {text}" for name, text in rows),
        "",
        *_aligned(options_of(config, experiment.result)),
        "",
    ]


def _markdown(rows: Table) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---" + "|--:" * (len(rows[0]) - 1) + "|")
    return "\n".join(lines)


def write_report(result: Result, experiment: Experiment) -> None:
    """Writes report.md and its figures into the run's folder."""
    config, out = experiment.config, experiment.out
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
    if drawn := draw_maps(experiment, out / "attention.png"):
        parts += ["![Attention maps](attention.png)", drawn]
    ways = "\n".join(f"- {m}: {w}" for m, w in result.facts["steps_run_in"].items())
    if experiment.loaded or result.facts["data"]:
        facts = [f"{name}: {fact}" for name, fact in result.facts["data"].items()]
        parts.append("\n".join(f"- {line}" for line in [*facts, *experiment.loaded]))
    parts += [
        "## Options",
        _markdown(options_of(config, result)),
        "## How the steps ran",
        ways,
        f"torch {result.facts['torch']}, at_fused {result.facts['at_fused']}, "
        f"{result.facts['processes']} process(es).",
        "## Configuration",
        f"```toml\n{to_toml(config)}```",
    ]
    checkpoints.write(out / "report.md", ("\n\n".join(parts) + "\n").encode())
