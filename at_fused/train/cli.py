"""The program at-fused-train. Imports torch only once the options are known to be good."""

from __future__ import annotations

import argparse
import os
import re
import sys
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from at_fused.train import config as options
from at_fused.train.config import OPTIONS, PRESETS, Config, ConfigError, is_import, naming

PROGRAM = "at-fused-train"
EXTRA = ("scipy", "sklearn", "matplotlib", "tqdm", "tensorboard")
# The options that --eval takes.
EVALUATED = (
    *("data", "root", "download", "image_size", "mean", "std", "skip_unreadable", "student"),
    *("device", "threads", "workers"),
)
# glibc then asks the kernel for large pages: features of megabytes are found and made ready faster.
TUNABLE = "glibc.malloc.hugetlb"


# ---- flags ---------------------------------------------------------------------------------------


def require(program: str, *modules: str) -> None:
    """End the program if one of these modules, of the extra, is not installed."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        sys.exit(f'{program}: needs {", ".join(missing)}: pip install "at_fused[train]"')


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def build_parser() -> argparse.ArgumentParser:
    """Return all flags; one not given is absent from the namespace: files and presets fill it."""
    parser = argparse.ArgumentParser(
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
    for flag, metavar, text in (
        ("--out", "DIR", "its folder (runs/DATE-TIME)"),
        ("--resume", "DIR", "go on with a folder's run, or add methods, seeds or epochs to it"),
        ("--eval", "FILE", "print the accuracy of a saved network, and train nothing"),
        ("--config", "FILE", "options as TOML, such as a run's config.toml"),
    ):
        run.add_argument(flag, type=Path, metavar=metavar, help=text)
    text = f"an option of one method alone ({', '.join(options.METHOD_OPTIONS)})"
    run.add_argument("--set", action="append", metavar="METHOD.OPTION=X", help=text)
    defaults = options.resolve()
    given = parser.add_argument_group("options, with the defaults of the preset digits")
    for name, rule in OPTIONS.items():
        unset = rule.default in (None, "", ()) and name != "preset"
        default = getattr(defaults, name)
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        text = rule.help if unset else f"{rule.help} ({shown})"
        flags = [_flag(name), *["--method"] * (name == "compare")]
        if isinstance(rule.default, bool):
            given.add_argument(*flags, action=argparse.BooleanOptionalAction, help=text)
        else:
            given.add_argument(*flags, type=rule.read, metavar=rule.metavar, help=text)
    return parser


# ---- from flags and files to a configuration -----------------------------------------------------


def _method_options(words: list[str]) -> dict[str, dict[str, Any]]:
    """Return the options of --set."""
    found: dict[str, dict[str, Any]] = {}
    with naming("set"):
        for word in words:
            if not (parts := re.fullmatch(r"(.+)\.(\w+)=(.*)", word)):
                raise ConfigError(
                    f"got {word!r}, allowed is METHOD.OPTION=VALUE, such as at.lr=0.1"
                )
            method, name, value = parts.groups()
            with naming(f"{method}.{name}"):
                read = options.method_rule(method, name).read
                found.setdefault(method, {})[name] = read(value)
    return found


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def file_of(flags: dict[str, Any]) -> Path | None:
    """Return the file of options that flags name."""
    return flags["resume"] / "config.toml" if "resume" in flags else flags.get("config")


def configure(flags: dict[str, Any], content: str | None) -> tuple[Config, Path | None]:
    """Return the configuration of flags and of their file's text, and the folder of the run."""
    layer: dict[str, Any] = {}
    if file := file_of(flags):
        if content is None:
            raise ConfigError("the first process has neither --config nor --resume")
        with naming(file):
            layer = options.from_toml(content)
    if "resume" in flags:
        if "out" in flags or "config" in flags:
            raise ConfigError(
                "resume: goes on in a folder, with its config.toml; not with --out, --config"
            )
        if "epochs" in flags:  # for the students, who have learned from the teacher that is there
            layer["teacher_epochs"] = options.resolve(layer).teacher_epochs
    return _over(flags, layer), flags.get("resume", flags.get("out"))


def _over(flags: dict[str, Any], layer: dict[str, Any]) -> Config:
    """Return the configuration of flags over a file's; each of them must change something."""
    given = {name: flags[name] for name in OPTIONS if name in flags}
    own = _method_options(flags.get("set", []))
    config = options.resolve(layer, {**given, "method": own})
    for name in given:
        if why := options.unused(config, name, _processes()):
            raise ConfigError(f"{name}: changes nothing in this run: {why}")
    if unknown := own.keys() - {*config.compare}:
        had = ", ".join(config.compare)
        raise ConfigError(f"set: got an option of {min(unknown)}, but --compare has {had}")
    if _processes() > 1 and config.nproc not in (1, _processes()):
        raise ConfigError(f"nproc: got {config.nproc}, but the launcher has {_processes()}")
    return config


# ---- the program ---------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Run at-fused-train: the entry point."""
    try:
        _main(argv)
    except KeyboardInterrupt:  # before the training, which has signals of its own
        sys.exit(130)


def _main(argv: list[str] | None) -> None:
    parser = build_parser()
    if several := _processes() > 1:
        if argv is None:
            _with_large_pages()  # before they meet, which a second start would have them do twice
        from at_fused.train import parallel

        parallel.join()
        in_all, from_first = parallel.in_all, parallel.from_first
    else:
        in_all = from_first = lambda function: function()
    try:
        flags = in_all(lambda: vars(parser.parse_args(argv)))
        if "eval" in flags:
            sys.exit(_evaluate(flags.pop("eval"), flags))
        file = file_of(flags)
        content = from_first(lambda: options.read_file(file) if file else None)
        config, out = in_all(lambda: configure(flags, content))
    except ConfigError as error:
        name, _, rest = str(error).partition(": ")
        known = name in {*OPTIONS, "resume", "set"}
        parser.error(f"argument {_flag(name)}: {rest}" if known else str(error))
    require(PROGRAM, *EXTRA)
    if argv is None and not several:
        _with_large_pages(config)

    from at_fused.train import parallel  # and torch

    work = (config, out, "resume" in flags)
    if config.nproc > 1 and not several:
        sys.exit(parallel.launch(config.nproc, run, *work))
    parallel.end(run(*work))


def _with_large_pages(config: Config | None = None) -> None:
    """Start the program anew with glibc's large pages, which it decides on as it starts."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if TUNABLE in tunables or sys.platform != "linux":
        return
    if config and (config.speed == "exact" or config.device != "cpu"):
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, f"{TUNABLE}=1"]))
    # As it was started: -m would look for the package in the working folder first.
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _expected() -> tuple[type[Exception], ...]:
    """Return the errors that a user can do something about; the rest are defects."""
    from at_fused.teacher_cache import StaleCacheError
    from at_fused.train.checkpoints import CheckpointError
    from at_fused.train.loop import NotFiniteError

    return ConfigError, CheckpointError, NotFiniteError, StaleCacheError, OSError, ImportError


def run(config: Config, out: Path | None, resume: bool = False) -> int:
    """Train and report, in this process; return the exit status."""
    from at_fused.train import loop, parallel
    from at_fused.train.experiment import Experiment
    from at_fused.train.report import Terminal

    terminal, experiment = Terminal(PROGRAM), None
    try:
        parallel.join()
        with closing(terminal), terminal.signals:
            experiment = Experiment(config, out, fresh=not resume, callbacks=terminal)
            experiment.run()
    except loop.Stopped as stopped:
        if experiment and parallel.first():
            _say(f"{stopped}; go on with {PROGRAM} --resume {experiment.out}")
        return stopped.status
    except parallel.FirstFailedError:
        return 1
    except _expected() as error:
        _say(str(error))
        return 1
    except KeyboardInterrupt:  # the second Ctrl-C, or one before or after the training
        return 130
    finally:
        parallel.leave()
    return 0


def _say(text: str) -> None:
    """Print an error, with the process that has it."""
    from at_fused.train.parallel import process

    me = process()
    who = PROGRAM if me.size == 1 else f"{PROGRAM}: process {me.rank} of {me.size}"
    print(f"\n{who}: {text}", file=sys.stderr)


# ---- --eval --------------------------------------------------------------------------------------


def _evaluate(path: Path, flags: dict[str, Any]) -> int:
    require(PROGRAM, *EXTRA)
    try:
        print(evaluate(path, flags))
    except _expected() as error:
        _say(str(error))
        return 1
    return 0


def evaluate(path: Path, given: dict[str, Any]) -> str:
    """Return a line on the accuracy of a saved network.

    Args:
        path: its file; one of this program says which network and which data it is of.
        given: the options that are given, over those of the file.
    """
    from at_fused.train.data import read_data
    from at_fused.train.loop import TOP5_FROM, accuracy
    from at_fused.train.saved import image_options, open_network, read_weights
    from at_fused.train.speed import prepare

    if other := sorted({*given} - {*EVALUATED}):
        allowed = ", ".join(map(_flag, EVALUATED))
        raise ConfigError(f"eval: got --eval with {_flag(other[0])}, allowed are {allowed}")
    file = read_weights(str(path), "eval")
    known = image_options(file.state) if file.state else {}
    if not known and "data" not in given:
        raise ConfigError(f"data: must be given for {path}, which does not say what its images are")
    if given.get("data", known.get("data")) != known.get("data"):
        # Other images, normalised as the network knows them.
        own = is_import(given["data"])
        known = {} if own else {n: known[n] for n in ("mean", "std") if n in known}
    config = options.resolve({name: value for name, value in known.items() if value}, given)
    device = prepare(config)
    with naming(path):
        data = read_data(config, device, parts=("val",))
    model, network = open_network(file, given.get("student", ""), data)
    found = accuracy(model.to(device), data.evaluate, device)
    if found is None:
        raise ConfigError(f"{path}: the network's outputs are not finite")
    top5 = f", top-5 {found[1]:.2f} %" if data.classes >= TOP5_FROM else ""
    left_out = len(data.facts.get("left_out", ()))
    unread = f" ({left_out} that cannot be read are left out)" if left_out else ""
    return (
        f"{path}: {network} on {config.data}, {len(data.evaluate)} images{unread}: "
        f"accuracy {found[0]:.2f} %{top5}"
    )
