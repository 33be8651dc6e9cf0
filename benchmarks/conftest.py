"""The closing table: ratios within this run, their geometric means, and the machine."""

from __future__ import annotations

import json
import math
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import backends
from timing import COPY_BYTES

import at_fused
from at_fused.backends import cpu

PASSES = ("forward", "forward+backward")

# (program, back end) -> median milliseconds; those of others under the back end "auto"
Times = dict[tuple[str, str], float]
# device -> (case, dtype, layout) -> (pass -> times, the bytes that each pass has to move)
ROWS: dict[
    str, dict[tuple[str, str, str], tuple[dict[str, Times], dict[str, tuple[int, int]]]]
] = {}

# (variant, case, dtype, layout) -> program -> median milliseconds, forward and backward
METHOD_ROWS: dict[tuple[str, str, str, str], dict[str, float]] = {}

# networks -> what test_steps.py found of their steps
STEP_ROWS: dict[str, dict[str, Any]] = {}
# (case, dtype, layout) -> program -> median milliseconds of the backward of taps
TAP_ROWS: dict[tuple[str, str, str], dict[str, float]] = {}

# What the table shows: its name, the pass in whose rounds it was timed, the program, and the passes
# of Inputs.floors that it makes.
COLUMNS = (
    ("forward", "forward", "at_fused", ("forward",)),
    ("forward+backward", "forward+backward", "at_fused", ("forward", "backward")),
    ("value and gradient", "forward+backward", "value and gradient", ("value and gradient",)),
)


def processor() -> str:
    """The processor's name, as far as the system tells."""
    names = (
        [
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        if Path("/proc/cpuinfo").exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def geometric_mean(values: list[float]) -> float:
    """The mean of ratios."""
    return math.exp(sum(math.log(v) for v in values) / len(values))


def table(device: str) -> list[str]:
    """The rows that ran, as Markdown, and the geometric means of their ratios.

    On a GPU there is a row for each back end, and beside each time the share of the bandwidth of a
    plain copy at which the bytes were moved that have to be.
    """
    gpu = device != "cpu"
    head, ruler = "| case | dtype | layout |", "|---|---|---|"
    if gpu:
        head, ruler = head + " back end |", ruler + "---|"
    head, ruler = head + " one read |", ruler + "--:|"
    for name, *_ in COLUMNS:
        head += f" {name} | to eager | to compile |" + (" of copy |" if gpu else "")
        ruler += "--:|" * (4 if gpu else 3)
    lines = [head, ruler]
    ratios: dict[tuple[str, str, str], list[float]] = {}
    for setting, (passes, floors) in ROWS[device].items():
        for backend in backends(device):
            cells = [*setting, *([backend] if gpu else [])]
            cells.append(f"{next(iter(passes.values()))['floor', 'auto']:.2f}")
            for name, direction, program, parts in COLUMNS:
                times = passes.get(direction)
                if not times:
                    cells += [""] * (4 if gpu else 3)
                    continue
                ms = times[program, backend]
                cells.append(f"{ms:.3f}" if gpu else f"{ms:.2f}")
                for rival in ("eager", "compile"):
                    ratio = times[rival, "auto"] / ms
                    cells.append(f"{ratio:.1f}x")
                    ratios.setdefault((name, rival, backend), []).append(ratio)
                if gpu:
                    moved = sum(sum(floors[part]) for part in parts)
                    share = moved / ms / (2 * COPY_BYTES / times["copy", "auto"])
                    cells.append(f"{share:.0%}")
            lines.append(f"| {' | '.join(cells)} |")
    for (name, rival, backend), values in ratios.items():
        lines.append(
            f"{name}, {rival} / {backend if gpu else 'at_fused'}: {geometric_mean(values):.2f} "
            f"(geometric mean of {len(values)}), least {min(values):.2f}"
        )
    return lines


def method_table() -> list[str]:
    """A row for each variant: the geometric means of its ratios, and the least of them."""
    lines = [
        "| variant | settings | to eager | least | to compile | least |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name in dict.fromkeys(setting[0] for setting in METHOD_ROWS):
        rows = [ms for setting, ms in METHOD_ROWS.items() if setting[0] == name]
        cells = [name, str(len(rows))]
        for rival in ("eager", "compile"):
            ratios = [ms[rival] / ms["at_fused"] for ms in rows]
            cells += [f"{geometric_mean(ratios):.1f}x", f"{min(ratios):.1f}x"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| variant | case | dtype | layout | ms | to eager | to compile |",
        "|---" * 7 + "|",
    ]
    for setting, ms in METHOD_ROWS.items():
        ratios = [f"{ms[rival] / ms['at_fused']:.1f}x" for rival in ("eager", "compile")]
        cells = [*setting, f"{ms['at_fused']:.2f}", *ratios]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def step_table() -> list[str]:
    """Whole steps: their times, attention transfer's own, and the most that they hold."""
    lines = [
        "| networks | step | ms | AT's own ms | share | peak MB | to alone | to without |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in STEP_ROWS.items():
        own = {**row["alone ms"], "tap": row["own ms"]}
        for step, ms in row["ms"].items():
            size = row["bytes"]
            cells = [name, step, f"{ms:.0f}"]
            if step in own:
                share = row["own share"] if step == "tap" else own[step] / row["ms"]["without"]
                cells += [f"{own[step]:.2f}", f"{share:.2%}"]
            else:
                cells += ["", ""]
            cells += [f"{size[step] / 1e6:.1f}"]
            cells += [f"{size[step] / size[to] - 1:+.1%}" for to in ("alone", "without")]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def tap_table() -> list[str]:
    """The backward of taps, to the drop-in's gradient and its addition."""
    lines = ["| case | dtype | layout | tap ms | to drop-in | to eager |", "|---" * 6 + "|"]
    ratios: dict[str, list[float]] = {"drop-in": [], "eager": []}
    for setting, ms in TAP_ROWS.items():
        cells = [*setting, f"{ms['tap']:.2f}"]
        for rival, values in ratios.items():
            values.append(ms[rival] / ms["tap"])
            cells.append(f"{values[-1]:.1f}x")
        lines.append(f"| {' | '.join(cells)} |")
    for rival, values in ratios.items():
        lines.append(f"{rival} / tap: {geometric_mean(values):.2f}, least {min(values):.2f}")
    return lines


def machine(device: str) -> str:
    """What the times are of."""
    what = f"torch {torch.__version__}, at_fused {at_fused.__version__}"
    if device == "cpu":
        return f"{processor()}, {torch.get_num_threads()} threads, {cpu.reason()}, {what}"
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, {what}"


def write_results(device: str, name: str) -> Path:
    """All medians of a device, as results/<name>.json."""
    rows = [
        {
            "case": case,
            "dtype": dtype,
            "layout": layout,
            "floor_bytes": floors,
            "ms": {
                direction: {" ".join(key): value for key, value in times.items()}
                for direction, times in passes.items()
            },
        }
        for (case, dtype, layout), (passes, floors) in ROWS[device].items()
    ]
    found = {"machine": machine(device), "copy_bytes": COPY_BYTES, "rows": rows}
    path = Path(__file__).parent / f"results/{name.replace(' ', '_').replace('/', '_')}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    return path


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the tables after pytest-benchmark's own."""
    if METHOD_ROWS:
        terminalreporter.section("the rest of the method, forward and backward, medians")
        terminalreporter.write_line(f"{machine('cpu')}\n")
        for line in method_table():
            terminalreporter.write_line(line)
    for title, rows, lines_of in (
        ("training steps, medians", STEP_ROWS, step_table),
        ("the backward of taps, medians", TAP_ROWS, tap_table),
    ):
        if rows:
            terminalreporter.section(title)
            terminalreporter.write_line(f"{machine('cpu')}\n")
            for line in lines_of():
                terminalreporter.write_line(line)
    for device in ROWS:
        terminalreporter.section(
            f"at_fused on {device}: time of the others / time of at_fused, medians"
        )
        terminalreporter.write_line(f"{machine(device)}\n")
        for line in table(device):
            terminalreporter.write_line(line)
        if device != "cpu":
            path = write_results(device, torch.cuda.get_device_name())
            terminalreporter.write_line(f"\nwritten to {path}")
