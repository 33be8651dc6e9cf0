"""Measures a few cases in about two minutes: ``python -m benchmarks.quick DEVICE FILE [MOST]``.

Needs torch alone. Writes the rows into a file of JSON as they come, the most telling first;
MOST is of settings of a part.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks import results
from benchmarks.cases import CANONICAL, PASSES
from benchmarks.measure import PARTS

KINDS = (("fp32", "NCHW"), ("bf16", "channels_last"))
SETTINGS = {
    "cases": [(case, *kind, way) for kind in KINDS for case in CANONICAL for way in PASSES],
    "calls": PARTS["calls"][1],
}

if __name__ == "__main__":
    device, file, *most = sys.argv[1:]
    settings = {part: each[: int(*most) or None] for part, each in SETTINGS.items()}
    results.measure(device, settings, Path(file), seconds=0.5)
