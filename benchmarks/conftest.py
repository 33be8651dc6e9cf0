"""The closing tables of ``pytest benchmarks --benchmark-only``, as in the report."""

from __future__ import annotations

import pytest

from benchmarks import results, tables
from benchmarks.timing import Row

# (device, part) -> the rows that the tests have found
ROWS: dict[tuple[str, str], list[Row]] = {}


def keep(device: str, part: str, rows: list[Row]) -> None:
    """Adds rows to the closing tables."""
    ROWS.setdefault((device, part), []).extend(rows)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the tables after pytest-benchmark's own."""
    for (device, part), rows in ROWS.items():
        terminalreporter.section(f"{tables.TITLES[part]}, on {device}, medians")
        terminalreporter.write_line(f"{results.describe(results.begin(device))}\n")
        for line in tables.TABLES[part](rows):
            terminalreporter.write_line(line)
