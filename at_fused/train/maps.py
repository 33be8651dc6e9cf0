"""Command line of at_fused.visualize: the attention maps of a run of at-fused-train."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from at_fused.train.cli import integer, require

# In a run's folder: one student of each kind, and the teacher.
OF_A_RUN = ("student_alone_seed0.pt", "student_at_fused_seed0.pt", "teacher.pt")
METHODS = {"alone": "student alone", "at_fused": "student + AT", "at_eager": "student + AT, eager"}
LAYERS = ("groups.0", "groups.1", "groups.2")
SUFFIXES = (".png", ".svg")


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
        help="a run's folder (its students of seed 0 and its teacher), or files in it; "
        "a column each, in this order",
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
        default=LAYERS,
        metavar="NAME",
        help=f"modules whose output is shown, a row each (default: {' '.join(LAYERS)})",
    )
    return parser


def title(path: Path) -> str:
    """What a file's name says of its network; its stem, where at-fused-train gave no such name."""
    student = re.fullmatch(r"student_(\w+)_seed\d+", path.stem)
    return METHODS.get(student[1], path.stem) if student else path.stem


def title_with_seed(path: Path) -> str:
    """The title, and the seed where the file's name has one."""
    seed = re.search(r"_seed(\d+)$", path.stem)
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
    paths: list[Path] = []
    for path in args.checkpoints:
        paths += [path / name for name in OF_A_RUN] if path.is_dir() else [path]
    out: Path = args.out or paths[0].parent / "attention.png"
    if out.suffix.lower() not in SUFFIXES or not out.parent.is_dir():
        parser.error(
            f"argument --out: got {str(out)!r}, allowed is a .png or .svg in a folder that exists"
        )
    for path in paths:
        if not path.is_file():
            parser.error(f"argument CHECKPOINT: {path}: no such file")
    require(parser.prog, "sklearn", "matplotlib")

    from at_fused import visualize
    from at_fused.train.data import load_digits
    from at_fused.train.experiment import load

    models, sizes = {}, set()
    try:
        for path, name in zip(paths, titles(paths), strict=True):
            try:
                models[name], size = load(path)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            sizes.add(size)
        if len(sizes) > 1:
            raise ValueError(f"images of one size for all, got {sorted(sizes)}")
    except ValueError as error:
        parser.error(f"argument CHECKPOINT: {error}")

    images, labels, split = load_digits(sizes.pop())
    chosen = split.test[: args.images]
    try:
        maps = {
            name: visualize.attention_maps(model, images[chosen], args.layers)
            for name, model in models.items()
        }
    except (TypeError, ValueError) as error:
        parser.error(f"argument --layers: {error}")
    fig = visualize.figure(
        images[chosen],
        maps,
        names=[f"digit {int(label)}" for label in labels[chosen]],
        across=2,
        panel=0.95,
    )
    visualize.save(fig, out)
    print(out)
