"""The closing table: ratios within this run, their geometric means, and the machine."""

from __future__ import annotations

import math
import platform
from pathlib import Path

import pytest
import torch

import at_fused
from at_fused.backends import cpu

# (case, dtype, layout) -> pass -> program -> median milliseconds
ROWS: dict[tuple[str, str, str], dict[str, dict[str, float]]] = {}
PASSES = ("forward", "forward+backward")


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


def table() -> list[str]:
    """The rows that ran, as Markdown, and the geometric means of their ratios."""
    lines = [
        "| case | dtype | layout | one read | forward | to eager | to compile "
        "| forward+backward | to eager | to compile |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for setting, passes in ROWS.items():
        cells = [*setting, f"{next(iter(passes.values()))['floor']:.2f}"]
        for name in PASSES:
            ms = passes.get(name)
            cells += (
                [
                    f"{ms['at_fused']:.2f}",
                    f"{ms['eager'] / ms['at_fused']:.1f}x",
                    f"{ms['compile'] / ms['at_fused']:.1f}x",
                ]
                if ms
                else ["", "", ""]
            )
        lines.append(f"| {' | '.join(cells)} |")
    for name in PASSES:
        chosen = [passes[name] for passes in ROWS.values() if name in passes]
        for rival in ("eager", "compile"):
            ratios = [ms[rival] / ms["at_fused"] for ms in chosen]
            if ratios:
                lines.append(
                    f"{name}, {rival} / at_fused: {geometric_mean(ratios):.2f} "
                    f"(geometric mean of {len(ratios)}), least {min(ratios):.2f}"
                )
    return lines


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the table after pytest-benchmark's own."""
    if not ROWS:
        return
    terminalreporter.section("at_fused: time of the others / time of at_fused, medians")
    terminalreporter.write_line(
        f"{processor()}, {torch.get_num_threads()} threads, {cpu.reason()}, "
        f"torch {torch.__version__}, at_fused {at_fused.__version__}\n"
    )
    for line in table():
        terminalreporter.write_line(line)
