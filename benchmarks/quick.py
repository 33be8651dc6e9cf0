"""Measures a few cases in about two minutes: ``python -m benchmarks.quick DEVICE FILE [MOST]``.

Needs torch alone. Writes the rows into a file of JSON as they come, the most telling first;
MOST is of settings of a part.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks import results, tables
from benchmarks.cases import CANONICAL, PASSES
from benchmarks.measure import PARTS, Row

TWO = (("fp32", "NCHW"), ("bf16", "channels_last"))
KINDS = [(case, *kind) for kind in TWO for case in CANONICAL]
CASES = [(*kind, direction) for kind in KINDS for direction in PASSES]
SETTINGS = {"cases": CASES, "taps": KINDS, "calls": PARTS["calls"][1]}


def lines(part: str, rows: list[Row]) -> list[str]:
    """The table of the report, and why some times are not of a CUDA graph."""
    found = {(name, why) for row in rows for name, why in row.get("uncaptured", {}).items()}
    return [*tables.PARTS[part][1](rows), *(f"\\* {name}: {why}" for name, why in sorted(found))]


def main(device: str, file: str, most: str = "100") -> None:
    found = results.begin(device)
    print(results.describe(found), flush=True)
    for part, settings in SETTINGS.items():
        rows = found["parts"][part] = []
        try:
            for setting in settings[: int(most)]:
                rows += PARTS[part][0](device, *setting)._replace(seconds=0.5).rows()
                results.write(Path(file), found)
        finally:  # when it is interrupted as well
            print("", tables.PARTS[part][0], "", *lines(part, rows), sep="\n", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
