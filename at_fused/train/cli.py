"""Command line of at-fused-train. Imports torch only once the options are known to be good."""

from __future__ import annotations

import argparse
import os
import sys
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
# The options that --eval takes.
EVALUATED = (
    *("data", "root", "download", "image_size", "mean", "std", "skip_unreadable", "student"),
    *("device", "threads", "workers"),
)
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
        usage=f"{PROGRAM} [OPTION ...]; see --help",
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
        "--resume",
        type=Path,
        metavar="DIR",
        help="go on with the run of a folder, or add methods, seeds or epochs to it",
    )
    run.add_argument(
        "--eval",
        type=Path,
        metavar="FILE",
        help="print the accuracy of a saved network, and train nothing",
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
    defaults = options.resolve()
    given = parser.add_argument_group("options, with the defaults of the preset digits")
    for name, option in OPTIONS.items():
        rule, default = option.metadata, getattr(defaults, name)
        if rule["kind"] == "switch":
            given.add_argument(
                _flag(name),
                action=argparse.BooleanOptionalAction,
                help=f"{rule['help']} ({default})",
            )
            continue
        if rule["kind"] == "choice":
            metavar = "|".join(rule["allowed"]) + "|MODULE:FUNCTION" * rule["imports"]
        else:
            metavar = {"whole": "N", "real": "X", "several": "A,B"}.get(rule["kind"]) or rule[
                "shape"
            ]
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        unset = option.default in (None, "", ()) and name != "preset"
        text = rule["help"] if unset else f"{rule['help']} ({shown})"
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


def settings(given: dict[str, Any], *under: dict[str, Any]) -> Config:
    """The configuration of the flags, over the file that they name, and other layers.

    Raises:
        ConfigError: an option is not allowed, or changes nothing in this run.
    """
    layers = [*under, *([_read(given["config"])] if "config" in given else [])]
    flags = {name: given[name] for name in OPTIONS if name in given}
    if "method" in given:
        if "compare" in given:
            raise ConfigError("method: got --method and --compare, allowed is one of them")
        flags["compare"] = (given["method"],)
    try:
        own = _of_methods(given.get("set", []))
    except ConfigError as error:
        raise ConfigError(f"set: {error}") from None
    config = options.resolve(*layers, {**flags, "method": own})
    for name in flags:
        if name in OPTIONS and (why := options.unused(config, name, _processes())):
            raise ConfigError(f"{name}: changes nothing in this run: {why}")
    if _processes() > 1 and config.nproc not in (1, _processes()):
        raise ConfigError(f"nproc: got {config.nproc}, but the launcher has {_processes()}")
    for method in own:
        if method not in config.compare:
            raise ConfigError(
                f"set: got an option of {method}, but --compare has {', '.join(config.compare)}"
            )
    return config


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _read(path: Path, missing: str = "") -> dict[str, Any]:
    """The options of a file, which of several processes the first reads: its machine has it."""

    def read() -> str:
        if missing and not path.is_file():
            raise ConfigError(missing)
        return options.read_file(path)

    if _processes() == 1:
        return options.from_file(path, read())
    from at_fused.train import parallel

    return options.from_file(path, parallel.text_of_first(read))


def _resumed(given: dict[str, Any]) -> tuple[Config, Path]:
    """The configuration of a run that goes on, with what flags add to it."""
    out: Path = given["resume"]
    if "out" in given or "config" in given:
        raise ConfigError(
            "resume: goes on in a folder, with its config.toml; not with --out, --config"
        )
    missing = f"resume: got {str(out)!r}, which has no config.toml of a run"
    content = _read(out / "config.toml", missing)
    before = options.resolve(content)
    if (
        "epochs" in given
        and "teacher_epochs" not in given
        and before.epochs == before.teacher_epochs
    ):
        # More epochs are for the students, who have learned from the teacher that is there.
        content = {**content, "teacher_epochs": before.teacher_epochs}
    config = settings(given, content)
    if config.preset != before.preset:
        raise ConfigError(f"preset: got {config.preset!r}, but the run has {before.preset!r}")
    if lost := [method for method in before.compare if method not in config.compare]:
        both = ",".join(dict.fromkeys(before.compare + config.compare))
        raise ConfigError(
            f"compare: got {','.join(config.compare)}, but the run has {', '.join(lost)}; methods "
            f"may be added: --compare {both}"
        )
    if config.compare[0] != before.compare[0]:
        raise ConfigError(
            f"compare: got {config.compare[0]} first, but the run's baseline is {before.compare[0]}"
        )
    for name in ("seeds", "epochs"):
        old, new = getattr(before, name), getattr(config, name)
        if new < old:
            raise ConfigError(f"{name}: got {new}, but the run has {old}; allowed is {old} or more")
    return config, out


def main(argv: list[str] | None = None) -> None:
    """Entry point of at-fused-train."""
    try:
        _main(argv)
    except KeyboardInterrupt:  # before the training, which has signals of its own
        sys.exit(130)


def _main(argv: list[str] | None) -> None:
    parser = build_parser()
    several = _processes() > 1
    if argv is None and several:
        # Before they meet, which a second start would have them do twice.
        _with_large_pages()
    try:
        given = vars(parser.parse_args(argv))
        if "eval" in given:
            _evaluate(given)
        config, out = _settled(given)
    except SystemExit as end:  # argparse has said why
        if several and end.code:
            _start(parser, "wrong options")
        raise
    except ConfigError as wrong:
        if several:
            _start(parser, str(wrong))
        _refuse(parser, str(wrong))
    if several:
        _start(parser, "")
    require(PROGRAM, *EXTRA)
    if argv is None:
        _with_large_pages(config)

    # From here on torch is there.
    from at_fused.train import main as program
    from at_fused.train import parallel

    work = (config, out, "resume" in given)
    if config.nproc > 1 and parallel.place().size == 1:
        sys.exit(parallel.launch(config.nproc, program.run, *work))
    parallel.end(program.run(*work))


def _settled(given: dict[str, Any]) -> tuple[Config, Path | None]:
    if "resume" in given:
        return _resumed(given)
    config, out = settings(given), given.get("out")
    # With several processes the first looks, once the others can hear of it.
    alone = _processes() == 1
    if alone and out and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"out: got {str(out)!r}, which already holds files; allowed is a new or an "
            "empty folder, or --resume to go on there"
        )
    return config, out


def _refuse(parser: argparse.ArgumentParser, error: str) -> NoReturn:
    name, _, rest = error.partition(": ")
    known = name in {*OPTIONS, "out", "resume", "set", "method", "eval"}
    parser.error(f"argument {_flag(name)}: {rest}" if known else error)


def _start(parser: argparse.ArgumentParser, error: str) -> None:
    """Tells the other processes, which would wait for this one, and hears from them."""
    from at_fused.train import parallel

    try:
        parallel.start(error)
    except ConfigError as other:
        _refuse(parser, str(other))


def _evaluate(given: dict[str, Any]) -> NoReturn:
    """Prints the accuracy of a saved network, on the data that it was trained with or others."""
    flags = {name: given[name] for name in given if name in EVALUATED}
    if other := sorted({*given} - {*EVALUATED, "eval"}):
        raise ConfigError(
            f"eval: got --eval with {_flag(other[0])}, allowed are "
            f"{', '.join(map(_flag, EVALUATED))}"
        )
    require(PROGRAM, *EXTRA)
    from at_fused.train import main as program

    sys.exit(program.evaluate(given["eval"], flags))


def _with_large_pages(config: Config | None = None) -> None:
    """Starts the program anew with glibc's large pages, which it decides on as it starts."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if TUNABLE in tunables or sys.platform != "linux":
        return
    if config and (config.speed == "exact" or config.device != "cpu"):
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, f"{TUNABLE}=1"]))
    # As it was started: -m would look for the package in the working folder first.
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
