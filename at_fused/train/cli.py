"""Command line of at-fused-train. Imports torch only once the options are known to be good."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from at_fused.train import config as options
from at_fused.train import rules
from at_fused.train.config import METHODS, OPTIONS, Config
from at_fused.train.presets import PRESETS
from at_fused.train.rules import ConfigError, nearest

PROGRAM = "at-fused-train"
EXTRA = {
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
    "tqdm": "tqdm",
    "tensorboard": "tensorboard",
}
# glibc then asks the kernel for large pages: features of megabytes are found and made ready faster.
TUNABLE = "glibc.malloc.hugetlb"


def integer(low: int, high: int) -> Callable[[str], int]:
    """An argparse type: a whole number from low to high."""
    return _parser({"kind": "whole", "low": low, "high": high})


def _parser(rule: Any) -> Callable[[str], Any]:
    def parse(word: str) -> Any:
        try:
            return rules.read(rule, word)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def require(program: str, *modules: str) -> None:
    """Ends the program if one of these modules, of the extra, is not installed."""
    missing = [EXTRA[module] for module in modules if find_spec(module) is None]
    if missing:
        sys.exit(f'{program}: needs {", ".join(missing)}: pip install "at_fused[train]"')


class _Parser(argparse.ArgumentParser):
    """Names the nearest flag where one does not exist."""

    def error(self, message: str) -> NoReturn:
        words = message.split()
        if message.startswith("unrecognized arguments: --"):
            flag = words[2].split("=")[0]
            message += nearest(flag, self._option_string_actions)
        super().error(message)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def build_parser() -> argparse.ArgumentParser:
    """All flags; one not given is absent from the namespace, so that files and presets fill it."""
    parser = _Parser(
        prog=PROGRAM,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train students with and without attention transfer from one teacher, and "
        "compare them: by default\non scikit-learn's digits, in about five minutes. Leaves a "
        "table, curves, weights and report.md in a folder.\n\npresets:\n"
        + "\n".join(f"  {name:28}{each.about}" for name, each in PRESETS.items()),
    )
    run = parser.add_argument_group("the run")
    run.add_argument("--out", type=Path, metavar="DIR", help="its folder (runs/DATE-TIME)")
    run.add_argument(
        "--resume", type=Path, metavar="DIR", help="go on with the interrupted run of a folder"
    )
    run.add_argument(
        "--config", type=Path, metavar="FILE", help="options as TOML, such as a run's config.toml"
    )
    run.add_argument("--method", metavar="NAME", choices=METHODS, help="--compare with one method")
    run.add_argument(
        "--set",
        action="append",
        metavar="METHOD.OPTION=X",
        help=f"an option of one method alone ({', '.join(options.OF_A_METHOD)})",
    )
    given = parser.add_argument_group("options, with the defaults of the preset digits")
    for name, option in OPTIONS.items():
        rule, default = option.metadata, option.default
        if rule["kind"] == "switch":
            given.add_argument(
                _flag(name),
                action=argparse.BooleanOptionalAction,
                help=f"{rule['help']} ({default})",
            )
            continue
        if rule["kind"] == "choice":
            metavar = "|".join(rule["allowed"])
        else:
            metavar = {"whole": "N", "real": "X", "several": "A,B"}.get(rule["kind"]) or rule[
                "shape"
            ]
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        text = rule["help"] if default in (None, "") else f"{rule['help']} ({shown})"
        given.add_argument(_flag(name), type=_parser(rule), metavar=metavar, help=text)
    return parser


def _of_methods(words: list[str]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for word in words:
        place, equals, value = word.partition("=")
        method, dot, name = place.rpartition(".")
        if not equals or not dot:
            raise ConfigError(f"got {word!r}, allowed is METHOD.OPTION=VALUE, such as at.lr=0.1")
        found.setdefault(method, {}).update([options.of_method(method, name, value, words=True)])
    return found


def settings(given: dict[str, Any]) -> Config:
    """What the flags come to, over the file that they name."""
    layers = [options.load(given["config"])] if "config" in given else []
    flags = {name: given[name] for name in OPTIONS if name in given}
    if "method" in given:
        if "compare" in given:
            raise ConfigError("method: got --method and --compare, allowed is one of them")
        flags["compare"] = (given["method"],)
    try:
        flags["method"] = _of_methods(given.get("set", []))
    except ConfigError as error:
        raise ConfigError(f"set: {error}") from None
    return options.resolve(*layers, flags)


def _resumed(given: dict[str, Any]) -> tuple[Config, Path]:
    """The configuration of an interrupted run; flags may repeat it, not change it."""
    out: Path = given["resume"]
    if "out" in given or "config" in given:
        raise ConfigError(
            "resume: goes on in a folder, with its config.toml; not with --out, --config"
        )
    file = out / "config.toml"
    if not file.is_file():
        raise ConfigError(f"resume: got {str(out)!r}, which has no config.toml of a run")
    config = options.resolve(options.load(file))
    wanted = settings({**given, "config": file})
    for name in (*OPTIONS, "method"):
        old, new = getattr(config, name), getattr(wanted, name)
        if old != new:
            raise ConfigError(
                f"{name}: got {new!r}, but the run was begun with {old!r}; start another with --out"
            )
    return config, out


def main(argv: list[str] | None = None) -> None:
    """Entry point of at-fused-train."""
    parser = build_parser()
    given = vars(parser.parse_args(argv))
    try:
        if "resume" in given:
            config, out = _resumed(given)
        else:
            config = settings(given)
            out = given.get("out", Path("runs") / time.strftime("%Y%m%d-%H%M%S"))
            first = os.environ.get("RANK", "0") == "0"  # of torchrun's; it makes the folder
            if first and out.exists() and (not out.is_dir() or any(out.iterdir())):
                raise ConfigError(
                    f"out: got {str(out)!r}, which already holds files; allowed is a new or an "
                    "empty folder, or --resume to go on there"
                )
    except ConfigError as error:
        name, _, rest = str(error).partition(": ")
        known = name in {*OPTIONS, "out", "resume", "set", "method"}
        parser.error(f"argument {_flag(name)}: {rest}" if known else str(error))
    require(PROGRAM, *EXTRA)
    if argv is None:
        _with_large_pages(config)

    # From here on torch is there.
    from at_fused.train import main as program
    from at_fused.train import parallel

    if config.nproc > 1 and parallel.place().size == 1:
        sys.exit(parallel.launch(config.nproc, program.run, config, out))
    sys.exit(program.run(config, out))


def _with_large_pages(config: Config) -> None:
    """Starts the program anew with glibc's large pages, which it decides on as it starts."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if config.speed == "exact" or config.device != "cpu" or TUNABLE in tunables:
        return
    if sys.platform != "linux":
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, f"{TUNABLE}=1"]))
    # As it was started: -m would look for the package in the working folder first.
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
