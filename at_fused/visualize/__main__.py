"""The program ``python -m at_fused.visualize``: attention maps of a run of at-fused-train.

Nothing else imports both at_fused.visualize and what reads a run.
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
from at_fused.train.cli import EXTRA, require
from at_fused.train.config import is_import, naming
from at_fused.train.data import PICTURES, Data, Pictures, open_data
from at_fused.train.saved import load_network


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all flags."""
    parser = argparse.ArgumentParser(
        prog="python -m at_fused.visualize",
        description="Draw the attention maps of networks that at-fused-train has trained, over the "
        "first of its test images. For other models see at_fused.visualize.compare.",
    )
    add = parser.add_argument
    files = (
        "a run's folder (the students of seed 0 of its first method and of AT, its teacher), or "
        "files in it; a column each, in this order"
    )
    add("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help=files)
    out = "the picture, .png or .svg (default: attention.png beside the first checkpoint)"
    add("--out", type=Path, metavar="PATH", help=out)
    count = options.whole(1, 100).read
    add("--images", type=count, default=4, metavar="N", help="test images (default: 4)")
    rows = "modules whose output is shown, a row each (default: those that the run compares)"
    add("--layers", nargs="+", metavar="NAME", help=rows)
    return parser


def config_of(folder: Path) -> options.Config:
    """Return the configuration of a run."""
    file = folder / "config.toml"
    text = options.read_file(file)
    with naming(file):
        return options.resolve(options.from_toml(text))


def of_a_run(folder: Path) -> list[Path]:
    """Return the files of a run whose networks are shown."""
    shown = options.drawn(config_of(folder))
    return [*(folder / f"student_{method}-seed0.pt" for method in shown), folder / "teacher.pt"]


def titles(paths: list[Path]) -> list[str]:
    """Return each file's method or name, or its path where these do not tell them apart."""
    methods = [re.sub(r"^student_(.+)-seed\d+$", r"\1", path.stem) for path in paths]
    short = [options.TITLES.get(method, method) for method in methods]
    return short if len(set(short)) == len(short) else list(map(str, paths))


def _compared_layers(folder: Path, network: str) -> list[str]:
    """Return the layers of a run's student, or of its teacher, that it compares."""
    pairs = json.loads((folder / "run.json").read_text(encoding="utf-8"))["layers"]
    return [pair[network == "teacher"] for pair in pairs]


def _images_of(folder: Path, facts: list[dict[str, Any]]) -> Data:
    """Return the data of a run, of the size that its networks take."""
    sizes = {each["image_size"] for each in facts}
    if len(sizes) > 1:
        raise CheckpointError(f"images of one size for all, got {sorted(sizes)}")
    config, known = config_of(folder), folder / PICTURES
    pictures = json.loads(known.read_text(encoding="utf-8")) if known.is_file() else None
    own, root = is_import(config.data), facts[0].get("images", {}).get("root")
    # As the network's file has it from the root on; moved images are where the run found them.
    if root and (own or Path(root).exists()):
        config = replace(config, root=root)
    config = replace(config, image_size=None if own else sizes.pop(), workers=0, validation=0.0)
    return open_data(config, pictures=Pictures(**pictures) if pictures else None)


def main(argv: list[str] | None = None) -> None:
    """Draw what the arguments name, and print the picture's path."""
    parser = build_parser()
    args = parser.parse_args(argv)
    folders = [path if path.is_dir() else path.parent for path in args.checkpoints]
    out: Path = args.out or folders[0] / "attention.png"
    require(parser.prog, *EXTRA)
    from at_fused.train.report import draw_maps

    try:
        given = [of_a_run(path) if path.is_dir() else [path] for path in args.checkpoints]
        paths = list(dict.fromkeys(chain.from_iterable(given)))
        columns = dict(zip(titles(paths), map(load_network, paths), strict=True))
        facts = [found for _, found in columns.values()]
        networks = {
            title: (model, args.layers or _compared_layers(path.parent, found["run"]))
            for path, (title, (model, found)) in zip(paths, columns.items(), strict=True)
        }
        visualize.save(draw_maps(networks, _images_of(folders[0], facts), args.images), out)
    except (CheckpointError, OSError, ImportError, TypeError, ValueError) as error:
        parser.error(str(error))
    print(out)


if __name__ == "__main__":
    main()
