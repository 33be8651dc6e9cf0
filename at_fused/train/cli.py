"""Command line of at-fused-train. Imports torch only after the options are valid."""

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
from at_fused.train.config import OPTIONS, PRESETS, Config, ConfigError, error_prefix

PROGRAM = "at-fused-train"
EXTRA_MODULES = ("scipy", "sklearn", "matplotlib", "tqdm", "tensorboard")
# Options that --eval allows.
EVAL_OPTIONS = (
    *("data", "root", "download", "image_size", "mean", "std", "skip_unreadable", "student"),
    *("device", "threads", "workers"),
)
# Makes glibc ask for huge pages, which speeds up the allocation of large features.
HUGE_PAGES_TUNABLE = "glibc.malloc.hugetlb"


# ---- flags ---------------------------------------------------------------------------------------


def require(program: str, *modules: str) -> None:
    """Exit with an install hint unless all of these modules of the [train] extra are installed."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        sys.exit(f'{program}: needs {", ".join(missing)}: pip install "at_fused[train]"')


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; flags that are not given are absent from its namespace."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [OPTION ...]; see --help",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train a teacher and students with and without attention transfer, and "
        "compare them. By default,\ntrain on scikit-learn's digits in about five minutes. Writes "
        "report.md, figures, metrics and\nweights to a folder.\n\npresets:\n"
        + "\n".join(f"  {name:28}{each.description}" for name, each in PRESETS.items()),
    )
    run = parser.add_argument_group("the run")
    for flag, metavar, text in (
        ("--out", "DIR", "output folder (runs/DATE-TIME)"),
        ("--resume", "DIR", "continue the run in a folder, or add methods, seeds or epochs to it"),
        ("--eval", "FILE", "print the accuracy of a saved network, without training"),
        ("--config", "FILE", "options as TOML, such as a run's config.toml"),
    ):
        run.add_argument(flag, type=Path, metavar=metavar, help=text)
    text = f"set an option for one method only ({', '.join(options.METHOD_OPTIONS)})"
    run.add_argument("--set", action="append", metavar="METHOD.OPTION=X", help=text)
    defaults = options.resolve()
    group = parser.add_argument_group("options, with the defaults of the preset digits")
    for name, rule in OPTIONS.items():
        unset = rule.default in (None, "", ()) and name != "preset"
        default = getattr(defaults, name)
        default_text = ",".join(map(str, default)) if isinstance(default, tuple) else default
        text = rule.help if unset else f"{rule.help} ({default_text})"
        flags = [_flag(name), *["--method"] * (name == "compare")]
        if isinstance(rule.default, bool):
            group.add_argument(*flags, action=argparse.BooleanOptionalAction, help=text)
        else:
            group.add_argument(*flags, type=rule.parse, metavar=rule.metavar, help=text)
    return parser


# ---- configuration -------------------------------------------------------------------------------


def _parse_set(arguments: list[str]) -> dict[str, dict[str, Any]]:
    method_options: dict[str, dict[str, Any]] = {}
    with error_prefix("set"):
        for argument in arguments:
            if not (parts := re.fullmatch(r"(.+)\.(\w+)=(.*)", argument)):
                raise ConfigError(
                    f"got {argument!r}, expected METHOD.OPTION=VALUE, such as at.lr=0.1"
                )
            method, name, value = parts.groups()
            with error_prefix(f"{method}.{name}"):
                parse = options.method_rule(method, name).parse
                method_options.setdefault(method, {})[name] = parse(value)
    return method_options


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def config_file(flags: dict[str, Any]) -> Path | None:
    """Return the file of options that --config or --resume names."""
    return flags["resume"] / "config.toml" if "resume" in flags else flags.get("config")


def configure(flags: dict[str, Any], content: str | None) -> tuple[Config, Path | None]:
    """Return the configuration from flags and the text of their file, and the run's folder."""
    layer: dict[str, Any] = {}
    if file := config_file(flags):
        if content is None:
            raise ConfigError("rank 0 has neither --config nor --resume")
        with error_prefix(file):
            layer = options.from_toml(content)
    if "resume" in flags:
        if "out" in flags or "config" in flags:
            raise ConfigError(
                "resume: uses the folder and the config.toml of the run; drop --out and --config"
            )
        if "epochs" in flags:  # for students only: the teacher is already trained
            layer["teacher_epochs"] = options.resolve(layer).teacher_epochs
    return _apply_flags(flags, layer), flags.get("resume", flags.get("out"))


def _apply_flags(flags: dict[str, Any], layer: dict[str, Any]) -> Config:
    """Return the configuration of flags on top of a file; raise if a flag has no effect."""
    general = {name: flags[name] for name in OPTIONS if name in flags}
    method_options = _parse_set(flags.get("set", []))
    config = options.resolve(layer, {**general, "method": method_options})
    for name in general:
        if reason := options.reason_unused(config, name, _world_size()):
            raise ConfigError(f"{name}: has no effect in this run: {reason}")
    if unknown := method_options.keys() - {*config.compare}:
        methods = ", ".join(config.compare)
        raise ConfigError(f"set: got an option for {min(unknown)}, but --compare is {methods}")
    if _world_size() > 1 and config.nproc not in (1, _world_size()):
        raise ConfigError(
            f"nproc: got {config.nproc}, but the launcher started {_world_size()} processes"
        )
    return config


# ---- the program ---------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Run at-fused-train."""
    try:
        _main(argv)
    except KeyboardInterrupt:  # before training, which handles signals itself
        sys.exit(130)


def _main(argv: list[str] | None) -> None:
    parser = build_parser()
    if is_distributed := _world_size() > 1:
        if argv is None:
            _restart_with_huge_pages()  # before the process group exists
        from at_fused.train import parallel

        parallel.init_process_group()
        run_on_all_ranks, run_on_rank_0 = parallel.run_on_all_ranks, parallel.run_on_rank_0
    else:
        run_on_all_ranks = run_on_rank_0 = lambda function: function()
    try:
        flags = run_on_all_ranks(lambda: vars(parser.parse_args(argv)))
        if "eval" in flags:
            sys.exit(_run_eval(flags.pop("eval"), flags))
        file = config_file(flags)
        content = run_on_rank_0(lambda: options.read_file(file) if file else None)
        config, out = run_on_all_ranks(lambda: configure(flags, content))
    except ConfigError as error:
        name, _, rest = str(error).partition(": ")
        is_flag = name in {*OPTIONS, "resume", "set"}
        parser.error(f"argument {_flag(name)}: {rest}" if is_flag else str(error))
    require(PROGRAM, *EXTRA_MODULES)
    if argv is None and not is_distributed:
        _restart_with_huge_pages(config)

    from at_fused.train import parallel  # imports torch

    arguments = (config, out, "resume" in flags)
    if config.nproc > 1 and not is_distributed:
        sys.exit(parallel.launch(config.nproc, run, *arguments))
    parallel.exit_process(run(*arguments))


def _restart_with_huge_pages(config: Config | None = None) -> None:
    """Restart the program with huge pages: glibc reads its tunables at start-up only."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if HUGE_PAGES_TUNABLE in tunables or sys.platform != "linux":
        return
    if config and (config.speed == "exact" or config.device != "cpu"):
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, f"{HUGE_PAGES_TUNABLE}=1"]))
    # The original arguments: -m would search the working folder first.
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _user_errors() -> tuple[type[Exception], ...]:
    """Return the errors that users can fix; all others are bugs and keep their traceback."""
    from at_fused.teacher_cache import StaleCacheError
    from at_fused.train.checkpoints import CheckpointError
    from at_fused.train.loop import NotFiniteError

    return ConfigError, CheckpointError, NotFiniteError, StaleCacheError, OSError, ImportError


def run(config: Config, out: Path | None, resume: bool = False) -> int:
    """Train and report in this process; return the exit status."""
    from at_fused.train import loop, parallel
    from at_fused.train.experiment import Experiment
    from at_fused.train.report import Terminal

    terminal, experiment = Terminal(PROGRAM), None
    try:
        parallel.init_process_group()
        with closing(terminal), terminal.signals:
            experiment = Experiment(config, out, fresh=not resume, callbacks=terminal)
            experiment.run()
    except loop.Stopped as stopped:
        if experiment and parallel.is_rank_0():
            _print_error(f"stopped by {stopped}; resume with {PROGRAM} --resume {experiment.out}")
        return stopped.status
    except parallel.RankZeroError:
        return 1
    except _user_errors() as error:
        _print_error(str(error))
        return 1
    except KeyboardInterrupt:  # the second Ctrl-C, or one outside of training
        return 130
    finally:
        parallel.destroy_process_group()
    return 0


def _print_error(text: str) -> None:
    from at_fused.train.parallel import process_info

    info = process_info()
    rank = "" if info.world_size == 1 else f": rank {info.rank} of {info.world_size}"
    print(f"\n{PROGRAM}{rank}: {text}", file=sys.stderr)


# ---- --eval --------------------------------------------------------------------------------------


def _run_eval(path: Path, flags: dict[str, Any]) -> int:
    require(PROGRAM, *EXTRA_MODULES)
    try:
        print(evaluate(path, flags))
    except _user_errors() as error:
        _print_error(str(error))
        return 1
    return 0


def evaluate(path: Path, overrides: dict[str, Any]) -> str:
    """Return a line with the accuracy of a saved network.

    Args:
        path: the network's file. Files of at-fused-train name their network and data.
        overrides: options that replace those in the file.
    """
    from at_fused.train.data import prepare_data
    from at_fused.train.loop import TOP5_MIN_CLASSES, accuracy
    from at_fused.train.saved import image_options, open_network, read_weights
    from at_fused.train.speed import setup_device

    if other := sorted({*overrides} - {*EVAL_OPTIONS}):
        allowed = ", ".join(map(_flag, EVAL_OPTIONS))
        raise ConfigError(f"eval: got --eval with {_flag(other[0])}, expected only {allowed}")
    file = read_weights(str(path), "eval")
    known = image_options(file.state) if file.state else {}
    if not known and "data" not in overrides:
        raise ConfigError(f"data: required for {path}, which does not describe its images")
    if overrides.get("data", known.get("data")) != known.get("data"):
        # Other images get the network's normalisation.
        is_own = options.is_import_path(overrides["data"])
        known = {} if is_own else {n: known[n] for n in ("mean", "std") if n in known}
    config = options.resolve({name: value for name, value in known.items() if value}, overrides)
    device = setup_device(config)
    with error_prefix(path):
        data = prepare_data(config, device, splits=("val",))
    model, network = open_network(file, overrides.get("student", ""), data)
    result = accuracy(model.to(device), data.evaluate, device)
    if result is None:
        raise ConfigError(f"{path}: the network's outputs are not finite")
    top5 = f", top-5 {result[1]:.2f} %" if data.classes >= TOP5_MIN_CLASSES else ""
    count = len(data.facts.get("left_out", ()))
    skipped = f" ({count} unreadable, skipped)" if count else ""
    return (
        f"{path}: {network} on {config.data}, {len(data.evaluate)} images{skipped}: "
        f"accuracy {result[0]:.2f} %{top5}"
    )
