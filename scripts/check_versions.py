#!/usr/bin/env python3
"""Checks over Pythons and torches that the package builds, installs, works and goes away again.

    scripts/check_versions.py [--python 3.11 ...] [--torch 2.10 newest ...]

For each Python on PATH: an sdist of the commit; of that a wheel by each torch, without CUDA and,
where nvcc is of torch's CUDA, with it; each wheel under each torch; a build without a compiler; and
the sdist by pip alone, which fetches the newest torch to build with. Whether a torch is one with
CUDA is up to pip's settings. Works in a temporary folder and leaves nothing; needs 6 GB for each
torch with CUDA and 6 more for pip's own build, and 10 minutes for each torch.
Exit status: 0 all well, 1 something failed.
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

# Who has the libraries or asked for none is not warned, and has the popular lines' numbers.
SMOKE = """
import sys, warnings
import torch
import torch.nn.functional as F

warnings.simplefilter("error")
import at_fused
from at_fused.backends import users
from at_fused.info import lines
libraries, table = sys.argv[1:], at_fused.backends()
print(*lines(), sep="\\n")
assert at_fused.__file__.startswith(sys.prefix), at_fused.__file__
assert table["cpu"].available == ("cpu" in libraries)
assert ("installed with AT_FUSED_CPP=0" in "\\n".join(lines())) == (not libraries)
if "cuda" in libraries and torch.version.cuda:
    assert users()["cuda"] == "cuda", table["cuda"].reason

torch.manual_seed(0)
s, t = torch.randn(4, 8, 7, 7, requires_grad=True), torch.randn(4, 16, 7, 7)
a, b = (F.normalize(x.double().pow(2).mean(1).flatten(1)) for x in (s, t))
right = (a - b).pow(2).mean()
right = [right.float(), *torch.autograd.grad(right, s)]
for name in ["cpu", "eager"] if libraries else ["eager"]:
    with at_fused.use_backend(name):
        loss = at_fused.at_loss(s, t)
    found = [loss, *torch.autograd.grad(loss, s)]
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-9)
"""


class CheckError(Exception):
    """A check that did not hold, in words or as the log of a command."""


def check(holds: bool, message: str) -> None:
    """An assertion that the other checks survive."""
    if not holds:
        raise CheckError(message)


def run(*command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """Return what a command prints; it has to succeed."""
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, cwd=cwd, env=env, check=False, **out)
    check(done.returncode == 0, f"$ {shlex.join(map(str, command))}\n{done.stdout}")
    return done.stdout


@contextlib.contextmanager
def attempt(what: str) -> Iterator[None]:
    """Print how a check ended; one that failed does not end the others."""
    start, state = time.monotonic(), "ok"
    try:
        yield
    except CheckError as error:
        print(error)
        state = "FAILED"
        FAILED.append(what)
    print(f"{state}: {what}, {time.monotonic() - start:.0f} s", flush=True)


class Environment:
    """A virtual environment with a torch and nothing else; the tools are in a folder beside it."""

    def __init__(self, work: Path, python: str, torch: str) -> None:
        self.work, self.folder, self.tools = work, work / f"env-{torch}", work / "tools"
        run(f"python{python}", "-m", "venv", self.folder)
        self.pip("install", "torch" if torch == "newest" else f"torch=={torch}.*")
        # The last line: torch may warn that there is no NumPy.
        versions = "import torch; print(torch.__version__, torch.version.cuda or '')"
        self.torch, _, self.cuda = self.call("-c", versions).splitlines()[-1].partition(" ")
        if not self.tools.exists():
            self.pip("install", "--target", self.tools, *TOOLS)

    def call(self, *arguments: str | Path, tools: bool = False, **variables: str) -> str:
        """Runs its Python outside the checkout, as if nothing else were installed."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("AT_FUSED_", "PYTHON"))}
        kept |= {"TMPDIR": str(self.work), "PATH": f"{self.folder}/bin:{kept['PATH']}"}
        if tools:
            kept |= {"PYTHONPATH": str(self.tools), "PATH": f"{self.tools}/bin:{kept['PATH']}"}
        python = self.folder / "bin/python"
        return run(python, *arguments, cwd=self.work, env=kept | variables)

    def pip(self, *arguments: str | Path, **variables: str) -> str:
        """Runs pip."""
        return self.call("-m", "pip", *arguments, **variables)

    def build(self, kind: str, source: Path, label: str, **variables: str) -> Path:
        """An sdist or a wheel; what earlier builds have left in the source must not get in."""
        folder = self.work / f"{label} by {self.torch}"
        arguments = (f"--{kind}", "--no-isolation", "-o", folder, source)
        self.call("-m", "build", *arguments, tools=True, **variables)
        (path,) = folder.iterdir()
        return path

    def has_nvcc(self) -> bool:
        """Tell whether there is an nvcc that fits this torch."""
        there = self.cuda and shutil.which("nvcc")
        return bool(there) and f"release {self.cuda.split('.')[0]}." in run("nvcc", "--version")


def make_sdist(env: Environment) -> tuple[Path, Path]:
    """The sdist, and where it is unpacked: has all that git has, and nothing else."""
    checkout, unpacked = env.work / "a checkout", env.work / "an sdist"
    run("git", "clone", "-q", ROOT, checkout)
    files = set(run("git", "ls-files", cwd=checkout).splitlines())
    sdist = env.build("sdist", checkout, "sdist")
    shutil.unpack_archive(sdist, unpacked)
    (source,) = unpacked.iterdir()
    found = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    made = {name for name in found if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    wrong = (found - made) ^ {name for name in files if not name.startswith(".")}
    check(not wrong, f"not both in the sdist and in the checkout: {sorted(wrong)}")
    return sdist, source


def try_out(env: Environment, package: Path, source: Path, *libraries: str) -> None:
    """Installs it in the clean environment, runs a smoke check and tests, and uninstalls it."""
    env.pip("install", package)
    try:
        env.call("-c", SMOKE, *libraries)
        if libraries:
            # What CUDA's kernels do in the emulator, no version of torch has a part in.
            selection = ("-q", "-p", "no:cacheprovider", "-k", "not emulator")
            env.call("-m", "pytest", *selection, *(source / name for name in TESTS), tools=True)
    finally:
        env.pip("uninstall", "-y", "at_fused")
    left = sorted(env.folder.rglob("at_fused*"))
    check(not left, f"not uninstalled: {left}")


def without_compiler(env: Environment, source: Path) -> None:
    """A refusal in words, and the way out that it names."""
    alone = {"PATH": f"{env.folder}/bin:{env.tools}/bin", "CXX": "c++"}
    try:
        env.pip("install", "--no-build-isolation", source, tools=True, **alone)
    except CheckError as error:
        log = str(error)
    else:
        raise CheckError("was built without a compiler")
    check("no C++ compiler" in log and "AT_FUSED_CPP=0" in log and "Traceback" not in log, log)
    pure = env.build("wheel", source, "pure", AT_FUSED_CPP="0", **alone)
    check(pure.name.endswith("-py3-none-any.whl"), f"{pure.name}: wrong tag")
    try_out(env, pure, source)


def check_python(python: str, torches: list[str], work: Path) -> None:
    """All there is to check with one Python."""
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
        without_compiler(first, source)
    with attempt(f"Python {python}: sdist by pip alone"):
        try_out(last, sdist, source, "cpu")


def main() -> int:
    """Prints a line for each check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", nargs="+", default=PYTHONS, help="default: all on PATH")
    parser.add_argument("--torch", nargs="+", default=["2.10", "newest"], help="2.10 newest")
    options = parser.parse_args()
    # A run that is ended cleans up as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    pythons = [python for python in options.python if shutil.which(f"python{python}")]
    print("Python", *pythons or ["not at hand"])
    for python in pythons:
        work = tempfile.TemporaryDirectory(prefix="at_fused-versions-")
        with work as folder, attempt(f"Python {python}, all of it"):
            check_python(python, options.torch, Path(folder))
    print("failed:", *FAILED or ["none"], sep="\n")
    return bool(FAILED or not pythons)


if __name__ == "__main__":
    sys.exit(main())
