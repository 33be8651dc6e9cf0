#!/usr/bin/env python3
"""Check that the package builds, installs, works and uninstalls under several Pythons and torches.

    scripts/check_versions.py [--python 3.11 ...] [--torch 2.10 newest ...]

For each Python on PATH, builds an sdist of the commit, and from it a wheel with each torch: without
CUDA and, if nvcc matches torch's CUDA version, with CUDA. Tests each wheel under each torch, a
build without a compiler, and a pip install of the sdist, where pip fetches the newest torch to
build with. pip's settings decide whether torch has CUDA. Works in a temporary folder that it
deletes. Needs 6 GB for each torch with CUDA, 6 GB for pip's own build, and 10 minutes per torch.
Exit status: 0 if all checks pass, otherwise 1.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
TOOLS = ("build", "setuptools", "ninja", "pybind11", "numpy", "pytest", "hypothesis")
TESTS = ("tests/core/test_contract.py", "tests/core/test_operators.py")
FAILED: list[str] = []


class CheckError(Exception):
    """A failed check; its message may be the log of a command."""


def check(holds: bool, message: str) -> None:
    """Raise CheckError, which ``attempt`` catches, unless the condition holds."""
    if not holds:
        raise CheckError(message)


def run(*command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """Run a command and return its output; CheckError if it fails."""
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, cwd=cwd, env=env, check=False, **out)
    check(done.returncode == 0, f"$ {shlex.join(map(str, command))}\n{done.stdout}")
    return done.stdout


@contextlib.contextmanager
def attempt(name: str) -> Iterator[None]:
    """Run a check, print its result, and continue if it failed."""
    start, state = time.monotonic(), "ok"
    try:
        yield
    except CheckError as error:
        print(error)
        state = "FAILED"
        FAILED.append(name)
    print(f"{state}: {name}, {time.monotonic() - start:.0f} s", flush=True)


class Environment:
    """A virtual environment with torch alone; build and test tools are in a separate folder."""

    def __init__(self, work: Path, python: str, torch: str) -> None:
        self.work, self.folder, self.tools = work, work / f"env-{torch}", work / "tools"
        run(f"python{python}", "-m", "venv", self.folder)
        self.pip("install", "torch" if torch == "newest" else f"torch=={torch}.*")
        # Torch may print a warning about missing NumPy before the last line.
        versions = "import torch; print(torch.__version__, torch.version.cuda or '')"
        self.torch, _, self.cuda = self.call("-c", versions).splitlines()[-1].partition(" ")
        if not self.tools.exists():
            self.pip("install", "--target", self.tools, *TOOLS)

    def call(self, *arguments: str | Path, tools: bool = False, **variables: str) -> str:
        """Run the environment's Python outside the checkout and return its output."""
        env = {k: v for k, v in os.environ.items() if not k.startswith(("AT_FUSED_", "PYTHON"))}
        env |= {"TMPDIR": str(self.work), "PATH": f"{self.folder}/bin:{env['PATH']}"}
        if tools:
            env |= {"PYTHONPATH": str(self.tools), "PATH": f"{self.tools}/bin:{env['PATH']}"}
        python = self.folder / "bin/python"
        return run(python, *arguments, cwd=self.work, env=env | variables)

    def pip(self, *arguments: str | Path, **variables: str) -> str:
        """Run pip and return its output."""
        return self.call("-m", "pip", *arguments, **variables)

    def build(self, kind: str, source: Path, label: str, **variables: str) -> Path:
        """Build an sdist or a wheel and return its path."""
        folder = self.work / f"{label} by {self.torch}"
        arguments = (f"--{kind}", "--no-isolation", "-o", folder, source)
        self.call("-m", "build", *arguments, tools=True, **variables)
        (path,) = folder.iterdir()
        return path

    def has_nvcc(self) -> bool:
        """Return whether PATH has an nvcc of torch's major CUDA version."""
        has_both = bool(self.cuda and shutil.which("nvcc"))
        return has_both and f"release {self.cuda.split('.')[0]}." in run("nvcc", "--version")


def make_sdist(env: Environment) -> tuple[Path, Path]:
    """Build the sdist and return it and its unpacked folder; it must have exactly git's files."""
    checkout, unpacked = env.work / "a checkout", env.work / "an sdist"
    run("git", "clone", "-q", ROOT, checkout)
    files = set(run("git", "ls-files", cwd=checkout).splitlines())
    sdist = env.build("sdist", checkout, "sdist")
    shutil.unpack_archive(sdist, unpacked)
    (source,) = unpacked.iterdir()
    packed = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    made = {name for name in packed if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    wrong = (packed - made) ^ {name for name in files if not name.startswith(".")}
    check(not wrong, f"only in the sdist or only in the checkout: {sorted(wrong)}")
    return sdist, source


def try_out(env: Environment, package: Path, source: Path, *libraries: str) -> None:
    """Install a package in a clean environment, run a smoke check and tests, and uninstall it."""
    env.pip("install", package)
    try:
        env.call(source / "scripts/smoke.py", *libraries)
        if libraries:
            # The CUDA emulator does not depend on the version of torch.
            selection = ("-q", "-p", "no:cacheprovider", "-k", "not emulator")
            env.call("-m", "pytest", *selection, *(source / name for name in TESTS), tools=True)
    finally:
        env.pip("uninstall", "-y", "at_fused")
    left = sorted(env.folder.rglob("at_fused*"))
    check(not left, f"left after uninstalling: {left}")


def check_without_compiler(env: Environment, source: Path) -> None:
    """Check the error of a build without a compiler, and the pure wheel that it suggests."""
    alone = {"PATH": f"{env.folder}/bin:{env.tools}/bin", "CXX": "c++"}
    try:
        env.pip("install", "--no-build-isolation", source, tools=True, **alone)
    except CheckError as error:
        log = str(error)
    else:
        raise CheckError("the build succeeded without a compiler")
    check("no C++ compiler" in log and "AT_FUSED_CPP=0" in log and "Traceback" not in log, log)
    pure = env.build("wheel", source, "pure", AT_FUSED_CPP="0", **alone)
    check(pure.name.endswith("-py3-none-any.whl"), f"wrong tag of a pure wheel: {pure.name}")
    try_out(env, pure, source)


def check_python(python: str, torches: list[str], work: Path) -> None:
    """Run all checks with one Python."""
    environments = [Environment(work, python, torch) for torch in torches]
    first, last = environments[0], environments[-1]
    sdist, source = make_sdist(first)
    wheels: list[tuple[Path, list[str]]] = []
    for env in environments:
        for libraries in (["cpu"], ["cpu", "cuda"])[: 1 + env.has_nvcc()]:
            with attempt(f"Python {python}: wheel of {libraries} by {env.torch}"):
                switch = str(int("cuda" in libraries))
                wheel = env.build("wheel", source, libraries[-1], AT_FUSED_CUDA=switch)
                wheels.append((wheel, libraries))
    for env, (wheel, libraries) in itertools.product(environments, wheels):
        with attempt(f"Python {python}: {wheel.parent.name} under {env.torch}"):
            try_out(env, wheel, source, *libraries)
    with attempt(f"Python {python}: without a compiler"):
        check_without_compiler(first, source)
    with attempt(f"Python {python}: sdist by pip alone"):
        try_out(last, sdist, source, "cpu")


def main() -> int:
    """Run the program, which prints a line for each check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", nargs="+", default=PYTHONS, help="default: all on PATH")
    parser.add_argument(
        "--torch", nargs="+", default=["2.10", "newest"], help="default: 2.10 newest"
    )
    options = parser.parse_args()
    # Raises SystemExit, so that the temporary folder is deleted.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    pythons = [python for python in options.python if shutil.which(f"python{python}")]
    print("Python", *pythons or ["not on PATH"])
    for python in pythons:
        work = tempfile.TemporaryDirectory(prefix="at_fused-versions-")
        with work as folder, attempt(f"Python {python}, all checks"):
            check_python(python, options.torch, Path(folder))
    print("failed:", *FAILED or ["none"], sep="\n")
    return bool(FAILED or not pythons)


if __name__ == "__main__":
    sys.exit(main())
