"""The closing tables of ``pytest benchmarks --benchmark-only``, as in the report."""

from __future__ import annotations

import pytest

from benchmarks import results, tables
from benchmarks.measure import Row

# (device, part) -> the rows that the tests have found
ROWS: dict[tuple[str, str], list[Row]] = {}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the tables after pytest-benchmark's own."""
    for (device, part), rows in ROWS.items():
        terminalreporter.section(f"{tables.PARTS[part].title}, on {device}, medians")
        terminalreporter.write_line(f"{results.describe(results.begin(device))}\n")
        for line in tables.PARTS[part].table(rows):
            terminalreporter.write_line(line)
