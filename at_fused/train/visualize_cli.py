"""Command line of at_fused.visualize: the attention maps of a run of at-fused-train."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from at_fused.train import config as options
from at_fused.train.cli import integer, require
from at_fused.train.config import TITLES
from at_fused.train.rules import ConfigError


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
    """What a file's name says of its network; its stem, where at-fused-train gave no such name."""
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
    from at_fused.train.data import open_data
    from at_fused.train.saved import compared_layers, load_network

    models, facts = {}, {}
    try:
        for path, name in zip(paths, named, strict=True):
            models[name], facts[name] = load_network(path)
        sizes = {each["image_size"] for each in facts.values()}
        if len(sizes) > 1:
            raise CheckpointError(f"images of one size for all, got {sorted(sizes)}")
        data = open_data(config.data, config.root, image_size=sizes.pop(), evaluate=config.evaluate)
    except (CheckpointError, OSError, ImportError) as error:
        parser.error(f"argument CHECKPOINT: {error}")

    rows = torch.arange(min(args.images, len(data.evaluate)))
    ((images, labels, _),) = data.evaluate.batches([rows], None)
    try:
        maps = {}
        for path, (name, model) in zip(paths, models.items(), strict=True):
            side = "teacher" if facts[name]["run"] == "teacher" else "student"
            layers = args.layers or compared_layers(_folder(path), side)
            maps[name] = visualize.attention_maps(model, images, layers)
    except (TypeError, ValueError) as error:
        parser.error(f"argument --layers: {error}")
    fig = visualize.figure(
        images,
        maps,
        names=[data.names[int(label)] for label in labels],
        across=2,
        mean=data.mean,
        std=data.std,
        panel=0.95,
    )
    visualize.save(fig, out)
    print(out)


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent
