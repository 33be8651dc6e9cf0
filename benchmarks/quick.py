"""Measures a few cases in about two minutes: ``python -m benchmarks.quick DEVICE FILE [MOST]``.

Needs torch alone. Writes the rows into a file of JSON as they come, the most telling first;
MOST is of settings of a part.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks import results
from benchmarks.cases import CANONICAL, PASSES
from benchmarks.measure import PARTS, Row

KINDS = [
    (case, *kind) for kind in (("fp32", "NCHW"), ("bf16", "channels_last")) for case in CANONICAL
]
SETTINGS = {
    "cases": [(*kind, direction) for kind in KINDS for direction in PASSES],
    "taps": KINDS,
    "calls": PARTS["calls"][1],
}


def line(row: Row) -> str:
    """A row in words: microseconds, and the share of a copy's rate where that is known."""
    ms, moved = row["ms"], row.get("bytes", {})
    what = [f"{key} {value}" for key, value in row.items() if not isinstance(value, dict)]
    cells = []
    for name, time in ms.items():
        share = ""
        if "copy" in moved and name in moved:
            share = f" ({moved[name] / time * ms['copy'] / moved['copy']:.0%})"
        cells.append(f"{name} {1e3 * time:.1f}{share}")
    notes = [f"{name} not captured: {why}" for name, why in row.get("uncaptured", {}).items()]
    return f"{', '.join(what)}: {'; '.join([', '.join(cells), *notes])}"


def main(device: str, file: str, most: str = "100") -> None:
    """Entry point."""
    found = results.begin(device)
    print(results.describe(found), flush=True)
    for part, settings in SETTINGS.items():
        found["parts"][part] = []
        print(f"{part}, us", flush=True)
        for setting in settings[: int(most)]:
            rows = PARTS[part][0](device, *setting)._replace(seconds=0.5).rows()
            print(*map(line, rows), sep="\n", flush=True)
            found["parts"][part] += rows
            results.write(Path(file), found)


if __name__ == "__main__":
    main(*sys.argv[1:])
