"""Command line of at-fused-train. Imports torch only once the flags are known to be good."""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from at_fused.train.config import FULL, QUICK, Config

EXTRA = {"scipy": "scipy", "sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"}


def integer(low: int, high: int) -> Callable[[str], int]:
    """An argparse type: a whole number from low to high."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d+", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(
                f"got {text!r}, allowed is a whole number from {low} to {high}"
            )
        return int(text)

    return parse


def real(low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a number from low to high."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"got {text!r}, allowed is a number from {low:g} to {high:g}"
            )
        return value

    return parse


def device(text: str) -> str:
    """An argparse type: the name of a device, whether or not it is there."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed is cpu, cuda or cuda:N")
    return text


def require(program: str, *modules: str) -> None:
    """Ends the program if one of these modules, of the extra, is not installed."""
    missing = [EXTRA[module] for module in modules if find_spec(module) is None]
    if missing:
        sys.exit(f'{program}: needs {", ".join(missing)}: pip install "at_fused[train]"')


def build_parser() -> argparse.ArgumentParser:
    """All flags; one not given is absent from the namespace, so that --quick can fill it."""
    parser = argparse.ArgumentParser(
        prog="at-fused-train",
        argument_default=argparse.SUPPRESS,
        description="Train a wide residual network on scikit-learn's handwritten digits, then "
        "small students on a few labelled images: alone, with attention transfer (fused), and "
        "with attention transfer (eager PyTorch). Prints a table; leaves metrics, checkpoints "
        "and a figure in a folder.",
    )

    def add(flag: str, kind: Callable[[str], object], metavar: str, text: str) -> None:
        name = flag[2:].replace("-", "_")
        full, quick = getattr(FULL, name), getattr(QUICK, name)
        default = f"{full}" if full == quick else f"{full}, with --quick {quick}"
        parser.add_argument(flag, type=kind, metavar=metavar, help=f"{text} (default: {default})")

    add("--labels", integer(10, 997), "N", "labelled images a student sees")
    add("--beta", real(0, 1e6), "X", "weight of the AT loss")
    add("--p", real(1, 8), "X", "power in the attention map, sum of |feature|^p")
    add("--seeds", integer(2, 100), "N", "students per method, each with its own labels and init")
    add("--steps", integer(1, 100_000), "N", "training steps of a student")
    add("--teacher-steps", integer(1, 100_000), "N", "training steps of the teacher")
    add("--threads", integer(1, 1024), "N", "CPU threads")
    add("--device", device, "DEV", "cpu, cuda or cuda:N")
    parser.add_argument(
        "--evaluate",
        choices=("test", "val"),
        help="images to report on: tune on val, report on test (default: test)",
    )
    parser.add_argument("--quick", action="store_true", help="a smaller run, well under a minute")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the run (default: runs/DATE-TIME)"
    )
    return parser


def settings(given: dict[str, Any]) -> Config:
    """The preset, with every flag that was given laid over it."""
    names = {f.name for f in fields(Config)}
    return replace(QUICK if "quick" in given else FULL, **{k: given[k] for k in names & set(given)})


def main(argv: list[str] | None = None) -> None:
    """Entry point of at-fused-train."""
    parser = build_parser()
    given = vars(parser.parse_args(argv))
    cfg = settings(given)
    out: Path = given.get("out", Path("runs") / time.strftime("%Y%m%d-%H%M%S"))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        parser.error(
            f"argument --out: got {str(out)!r}, which already holds files; "
            "allowed is a new or an empty folder"
        )
    require(parser.prog, *EXTRA)

    import torch

    if cfg.device.startswith("cuda"):
        count, n = torch.cuda.device_count(), int(cfg.device.partition(":")[2] or 0)
        if n >= count:
            parser.error(
                f"argument --device: got {cfg.device!r}, but PyTorch sees {count} CUDA devices; "
                "allowed is " + ", ".join(["cpu", *(f"cuda:{i}" for i in range(count))])
            )

    from tqdm import tqdm

    from at_fused.train.experiment import run, total_steps
    from at_fused.train.report import figure, table

    start = time.perf_counter()
    with tqdm(total=total_steps(cfg), unit="step", dynamic_ncols=True) as bar:
        result = run(cfg, out, tick=bar.update, say=bar.set_description)
    figure(result, cfg, out / "curves.png")
    print(table(result, cfg))
    print(f"\n{time.perf_counter() - start:.0f} s in all; everything is in {out}")
