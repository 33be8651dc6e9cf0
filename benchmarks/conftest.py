"""The closing table: ratios within this run, their geometric means, and the machine."""

from __future__ import annotations

import math
import platform
from pathlib import Path

import pytest
import torch

import at_fused
from at_fused.backends import cpu

ROWS: list[dict[str, object]] = []


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
    """The rows that ran, as Markdown."""
    lines = [
        "| case | dtype | layout | pass | at_fused ms | read floor ms | eager | torch.compile |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        ms = row["ms"]
        assert isinstance(ms, dict)
        fused = ms["at_fused"]
        lines.append(
            f"| {row['case']} | {row['dtype']} | {row['layout']} | {row['pass']} "
            f"| {fused:.2f} | {ms['floor']:.2f} "
            f"| {ms['eager'] / fused:.1f}x | {ms['compile'] / fused:.2f}x |"
        )
    for name in dict.fromkeys(row["pass"] for row in ROWS):
        chosen = [row["ms"] for row in ROWS if row["pass"] == name]
        eager = [ms["eager"] / ms["at_fused"] for ms in chosen]
        compiled = [ms["compile"] / ms["at_fused"] for ms in chosen]
        lines.append(
            f"\n{name}: {geometric_mean(eager):.1f}x eager, {geometric_mean(compiled):.2f}x "
            f"torch.compile (geometric means of {len(chosen)} rows; least "
            f"{min(eager):.1f}x and {min(compiled):.2f}x)"
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
