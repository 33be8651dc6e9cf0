"""Measure a few cases in about two minutes; needs only torch.

python -m benchmarks.quick DEVICE FILE [LIMIT]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks import argument_parser, results
from benchmarks.cases import DEVICES, PASSES, TIMED_CASES
from benchmarks.measure import PARTS

FORMATS = (("fp32", "NCHW"), ("bf16", "channels_last"))
# The most informative settings come first.
SETTINGS = {
    "cases": [(case, *kind, name) for kind in FORMATS for case in TIMED_CASES for name in PASSES],
    "calls": PARTS["calls"][1],
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argument_parser("quick", __doc__)
    parser.add_argument("device", choices=DEVICES)
    parser.add_argument("file", type=Path, help="JSON file, written after each setting")
    parser.add_argument("limit", type=int, nargs="?", help="number of settings per part (all)")
    options = parser.parse_args(arguments)
    settings = {part: every[: options.limit] for part, every in SETTINGS.items()}
    results.measure(options.device, settings, options.file, seconds=0.5)


if __name__ == "__main__":
    main()
