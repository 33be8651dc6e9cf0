"""The program ``python -m at_fused.visualize``: attention maps of a run of at-fused-train.

Only this module imports both at_fused.visualize and the code that reads a run.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from at_fused import visualize
from at_fused.train import config as options
from at_fused.train.checkpoints import CheckpointError
from at_fused.train.cli import EXTRA_MODULES, require
from at_fused.train.config import error_prefix, is_import_path
from at_fused.train.data import SCAN_FILE, Data, ImageScan, open_data
from at_fused.train.saved import load_network


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all flags."""
    parser = argparse.ArgumentParser(
        prog="python -m at_fused.visualize",
        description="Draw the attention maps of networks from a run of at-fused-train, over its "
        "first test images. For other models, see at_fused.visualize.compare.",
    )
    add = parser.add_argument
    files = (
        "a run's folder (its students of the first method and of AT with seed 0, and its teacher), "
        "or files in it; each file is a column, in this order"
    )
    add("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help=files)
    out = "file to write, .png or .svg (default: attention.png next to the first checkpoint)"
    add("--out", type=Path, metavar="PATH", help=out)
    count = options.integer(1, 100).parse
    add("--images", type=count, default=4, metavar="N", help="number of test images (default: 4)")
    rows = "modules to draw, one row each (default: the layers that the run compares)"
    add("--layers", nargs="+", metavar="NAME", help=rows)
    return parser


def config_of(folder: Path) -> options.Config:
    """Return the configuration of a run."""
    file = folder / "config.toml"
    text = options.read_file(file)
    with error_prefix(file):
        return options.resolve(options.from_toml(text))


def checkpoints_of(folder: Path) -> list[Path]:
    """Return the checkpoints of a run to draw: students, then the teacher."""
    methods = options.methods_to_draw(config_of(folder))
    return [*(folder / f"student_{method}-seed0.pt" for method in methods), folder / "teacher.pt"]


def titles(paths: list[Path]) -> list[str]:
    """Return each file's method or name, or the paths if these are ambiguous."""
    methods = [re.sub(r"^student_(.+)-seed\d+$", r"\1", path.stem) for path in paths]
    short = [options.TITLES.get(method, method) for method in methods]
    return short if len(set(short)) == len(short) else list(map(str, paths))


def _compared_layers(folder: Path, network: str) -> list[str]:
    """Return the layers that a run compares, of its students or of its teacher."""
    pairs = json.loads((folder / "run.json").read_text(encoding="utf-8"))["layers"]
    return [pair[network == "teacher"] for pair in pairs]


def _open_images(folder: Path, facts: list[dict[str, Any]]) -> Data:
    """Return the data of a run, in the size that its networks take."""
    sizes = {fact["image_size"] for fact in facts}
    if len(sizes) > 1:
        raise CheckpointError(f"all networks must take images of one size, got {sorted(sizes)}")
    config, file = config_of(folder), folder / SCAN_FILE
    scan = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    is_own, root = is_import_path(config.data), facts[0].get("images", {}).get("root")
    # The checkpoint has the absolute root. If images were moved, use the root of the run.
    if root and (is_own or Path(root).exists()):
        config = replace(config, root=root)
    config = replace(config, image_size=None if is_own else sizes.pop(), workers=0, validation=0.0)
    return open_data(config, scan=ImageScan(**scan) if scan else None)


def main(argv: list[str] | None = None) -> None:
    """Draw the maps, and print the path of the picture."""
    parser = build_parser()
    args = parser.parse_args(argv)
    folders = [path if path.is_dir() else path.parent for path in args.checkpoints]
    out: Path = args.out or folders[0] / "attention.png"
    require(parser.prog, *EXTRA_MODULES)
    from at_fused.train.report import draw_maps

    try:
        lists = [checkpoints_of(path) if path.is_dir() else [path] for path in args.checkpoints]
        paths = list(dict.fromkeys(chain.from_iterable(lists)))
        columns = dict(zip(titles(paths), map(load_network, paths), strict=True))
        facts = [fact for _, fact in columns.values()]
        networks = {
            title: (model, args.layers or _compared_layers(path.parent, fact["run"]))
            for path, (title, (model, fact)) in zip(paths, columns.items(), strict=True)
        }
        visualize.save(draw_maps(networks, _open_images(folders[0], facts), args.images), out)
    except (CheckpointError, OSError, ImportError, TypeError, ValueError) as error:
        parser.error(str(error))
    print(out)


if __name__ == "__main__":
    main()
