"""Command line of at_fused.visualize: the attention maps of a run of at-fused-train."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from at_fused.train import config as options
from at_fused.train.cli import integer, require
from at_fused.train.config import TITLES
from at_fused.train.rules import ConfigError, is_import


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = argparse.ArgumentParser(
        prog="python -m at_fused.visualize",
        description="Draw the attention maps of networks that at-fused-train has trained, over the "
        "first of its test images. For other models see at_fused.visualize.compare.",
    )
    parser.add_argument(
        "checkpoints",
        nargs="+",
        type=Path,
        metavar="CHECKPOINT",
        help="a run's folder (the students of seed 0 of its first method and of AT, and its "
        "teacher), or files in it; a column each, in this order",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="PATH",
        help="the picture, .png or .svg (default: attention.png beside the first checkpoint)",
    )
    parser.add_argument(
        "--images", type=integer(1, 100), default=4, metavar="N", help="test images (default: 4)"
    )
    parser.add_argument(
        "--layers",
        nargs="+",
        metavar="NAME",
        help="modules whose output is shown, a row each (default: those that the run compares)",
    )
    return parser


def of_a_run(folder: Path) -> list[Path]:
    """The files of a run whose networks are shown."""
    shown = options.drawn(options.resolve(options.load(folder / "config.toml")))
    return [*(folder / f"student_{method}-seed0.pt" for method in shown), folder / "teacher.pt"]


def title(path: Path) -> str:
    """Return the title that a file's name gives its network, or its stem."""
    student = re.fullmatch(r"student_(.+)-seed\d+", path.stem)
    return TITLES.get(student[1], path.stem) if student else path.stem


def title_with_seed(path: Path) -> str:
    """The title, and the seed where the file's name has one."""
    seed = re.search(r"-seed(\d+)$", path.stem)
    return f"{title(path)}, seed {seed[1]}" if seed else title(path)


def titles(paths: list[Path]) -> list[str]:
    """A title for each file, as short as tells them apart."""
    for way in (title, title_with_seed, str):
        found = [way(path) for path in paths]
        if len(set(found)) == len(found):
            return found
    raise ValueError("a file is given twice")


def main(argv: list[str] | None = None) -> None:
    """Entry point of python -m at_fused.visualize."""
    parser = build_parser()
    args = parser.parse_args(argv)

    from at_fused._figure import SUFFIXES  # and torch with it, which --help needs not wait for

    out: Path = args.out or _folder(args.checkpoints[0]) / "attention.png"
    if out.suffix.lower() not in SUFFIXES or not out.parent.is_dir():
        parser.error(
            f"argument --out: got {str(out)!r}, allowed is a .png or .svg in a folder that exists"
        )
    require(parser.prog, "sklearn", "matplotlib")
    try:
        paths: list[Path] = []
        for path in args.checkpoints:
            paths += of_a_run(path) if path.is_dir() else [path]
        for path in paths:
            if not path.is_file():
                raise ConfigError(f"{path}: no such file")
        config = options.resolve(options.load(_folder(paths[0]) / "config.toml"))
        named = titles(paths)
    except ValueError as error:
        parser.error(f"argument CHECKPOINT: {error}")

    import torch

    from at_fused import visualize
    from at_fused.train.checkpoints import CheckpointError
    from at_fused.train.data import Pictures, open_data
    from at_fused.train.saved import compared_layers, load_network

    models, facts = {}, {}
    try:
        for path, name in zip(paths, named, strict=True):
            models[name], facts[name] = load_network(path)
        sizes = {each["image_size"] for each in facts.values()}
        if len(sizes) > 1:
            raise CheckpointError(f"images of one size for all, got {sorted(sizes)}")
        run, first = _folder(paths[0]) / "pictures.json", facts[named[0]]
        left_out = json.loads(run.read_text(encoding="utf-8")) if run.is_file() else None
        # As the network's file has it from the root on; moved images are where the run found them.
        root = first.get("images", {}).get("root")
        data = open_data(
            config.data,
            root if root and (is_import(config.data) or Path(root).exists()) else config.root,
            image_size=None if is_import(config.data) else sizes.pop(),
            evaluate=config.evaluate,
            mean=config.mean,
            std=config.std,
            pictures=Pictures(**left_out) if left_out else None,
        )
        rows = torch.arange(min(args.images, len(data.evaluate)))
        ((images, labels, _),) = data.evaluate.batches([rows], None)
    except (CheckpointError, OSError, ImportError, ValueError) as error:
        parser.error(f"argument CHECKPOINT: {error}")

    try:
        maps = {}
        for path, (name, model) in zip(paths, models.items(), strict=True):
            side = "teacher" if facts[name]["run"] == "teacher" else "student"
            layers = args.layers or compared_layers(_folder(path), side)
            maps[name] = visualize.attention_maps(model, images, layers)
    except (TypeError, ValueError) as error:
        parser.error(f"argument --layers: {error}")
    # Images that somebody else has normalised are shown from their least to their greatest value.
    mean, std = (None, None) if data.own else (data.mean, data.std)
    try:
        fig = visualize.figure(
            images,
            maps,
            names=[data.names[int(label)] for label in labels],
            across=2,
            mean=mean,
            std=std,
            panel=0.95,
        )
    except ValueError as error:  # one's own may be no pictures
        parser.error(f"argument CHECKPOINT: {error}")
    visualize.save(fig, out)
    print(out)


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent
