#!/usr/bin/env python3
"""Checks over Pythons and torches that the package builds, installs, works and goes away again.

    scripts/check_versions.py [--python 3.11 ...] [--torch 2.10 newest ...]

For each Python on PATH: an sdist of the checkout; of that a wheel by each torch, without CUDA and,
where nvcc is of torch's CUDA, with it; each wheel under each torch; a build without a compiler; and
the sdist by pip alone, which fetches the newest torch to build with. For the first Python also a
wheel by the oldest g++. Whether a torch is one with CUDA is up to pip's settings. Works in a
temporary folder and leaves nothing; needs 6 GB for each torch with CUDA and 6 more for pip's own
build, and 10 minutes for each torch.
Exit status: 0 all well, 1 something failed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
OLDEST = "g++-11"  # that README names
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
TOOLS = ("build", "setuptools", "ninja", "pybind11", "numpy", "pytest", "hypothesis")
TESTS = ("tests/core/test_contract.py", "tests/core/test_operators.py")

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
assert table["cpu"].available == ("_cpu" in libraries)
assert ("installed with AT_FUSED_CPP=0" in "\\n".join(lines())) == (not libraries)
if "_cuda" in libraries and torch.version.cuda:
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

METADATA = "import packaging.metadata as m, sys; m.Metadata.from_email(sys.argv[1], validate=True)"


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


FAILED: list[str] = []


def attempt(what: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Return what a check returns. If it fails, print why and go on with None."""
    start = time.monotonic()
    try:
        found, state = function(*arguments, **options), "ok"
    except CheckError as error:
        print(error)
        found, state = None, "FAILED"
        FAILED.append(what)
    print(f"{state}: {what}, {time.monotonic() - start:.0f} s", flush=True)
    return found


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

    def pip(self, *arguments: str | Path, **options: Any) -> str:
        """Runs pip."""
        return self.call("-m", "pip", *arguments, **options)

    def files(self) -> set[str]:
        """All files and folders but for others' bytecode."""
        paths = {str(path.relative_to(self.folder)) for path in self.folder.rglob("*")}
        return {path for path in paths if "__pycache__" not in path or "at_fused" in path}

    def has_nvcc(self) -> bool:
        """Tell whether there is an nvcc that fits this torch."""
        there = self.cuda and shutil.which("nvcc")
        return bool(there) and f"release {self.cuda.split('.')[0]}." in run("nvcc", "--version")


class Build(NamedTuple):
    """Something for pip to install; without libraries, a wheel of Python alone."""

    name: str
    path: Path
    libraries: frozenset[str]


CPU = frozenset({"_build_info", "_cpu"})
CUDA = CPU | {"_cuda"}


def make_sdist(env: Environment) -> tuple[Path, Path]:
    """The sdist, and where it is unpacked: has all that git has, as it is now, and nothing else."""
    listed = run("git", "ls-files", "-z", cwd=ROOT).split("\0")
    files = {name for name in listed if name and (ROOT / name).exists()}
    checkout, folder = env.work / "a checkout", env.work / "an sdist"
    for name in files:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, checkout / name)
    env.call("-m", "build", "--sdist", "--no-isolation", "-o", folder, checkout, tools=True)
    (sdist,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(sdist, folder)
    unpacked = folder / sdist.name.removesuffix(".tar.gz")
    found = {str(p.relative_to(unpacked)) for p in unpacked.rglob("*") if p.is_file()}
    made = {name for name in found if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    wrong = (found - made) ^ {name for name in files if not name.startswith(".")}
    check(not wrong, f"not both in the sdist and in the checkout: {sorted(wrong)}")
    return sdist, unpacked


def make_wheel(
    env: Environment, source: Path, label: str, libraries: frozenset[str], **variables: str
) -> Build:
    """Built where earlier builds, with other libraries, have left theirs: none may get in."""
    folder = env.work / f"{label} by {env.torch}"
    arguments = ("--wheel", "--no-isolation", "-o", folder, source)
    env.call("-m", "build", *arguments, tools=True, **variables)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        env.call("-c", METADATA, archive.read(metadata).decode(), tools=True)
    found = {re.sub(r"\.(abi3|cpython)[\w-]*\.so$", ".so", name) for name in names}
    about = {name for name in found if name.startswith(metadata.removesuffix("METADATA"))}
    expected = {str(p.relative_to(source)) for p in (source / "at_fused").rglob("*.py")}
    expected |= {"at_fused/py.typed", *(f"at_fused/{name}.so" for name in libraries)}
    wrong = sorted((found - about) ^ expected)
    check(not wrong, f"not both in {path.name} and expected there: {wrong}")
    check(path.name.endswith("-py3-none-any.whl") != bool(libraries), f"{path.name}: wrong tag")
    return Build(folder.name, path, libraries)


def try_out(env: Environment, build: Build, source: Path) -> None:
    """Installs it in the clean environment, runs a smoke check and tests, and uninstalls it."""
    before = env.files()
    env.pip("install", build.path)
    try:
        env.call("-c", SMOKE, *build.libraries)
        if build.libraries:
            # What CUDA's kernels do in the emulator, no version of torch has a part in.
            selection = ("-q", "-p", "no:cacheprovider", "-k", "not emulator")
            env.call("-m", "pytest", *selection, *(source / name for name in TESTS), tools=True)
    finally:
        env.pip("uninstall", "-y", "at_fused")
    wrong = sorted(env.files() ^ before)
    check(not wrong, f"not uninstalled, or more than that: {wrong}")


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
    try_out(env, make_wheel(env, source, "pure", frozenset(), AT_FUSED_CPP="0", **alone), source)


def check_python(python: str, torches: list[str], work: Path, oldest: str | None) -> None:
    """All there is to check with one Python, and a build by the oldest compiler."""
    environments = [Environment(work, python, torch) for torch in torches]
    first, last = environments[0], environments[-1]
    sdist, source = make_sdist(first)
    no_cuda = {"AT_FUSED_CUDA": "0"}
    wheels: list[tuple[Environment, str, frozenset[str], dict[str, str]]] = []
    for env in environments:
        wheels += [(env, "CUDA", CUDA, {"AT_FUSED_CUDA": "1"})] * env.has_nvcc()
        wheels += [(env, "CPU", CPU, no_cuda)]
    wheels += [(first, oldest, CPU, no_cuda | {"CXX": oldest})] if oldest else []
    builds = []
    for env, label, libraries, switches in wheels:
        what = f"Python {python}: {label} wheel by {env.torch}"
        builds.append(attempt(what, make_wheel, env, source, label, libraries, **switches))
    for env, build in itertools.product(environments, filter(None, builds)):
        what = f"Python {python}: {build.name} under {env.torch}"
        attempt(what, try_out, env, build, source)
    attempt(f"Python {python}: without a compiler", without_compiler, first, source)
    alone = Build("sdist", sdist, CPU)
    attempt(f"Python {python}: sdist by pip alone", try_out, last, alone, source)


def at_hand(python: str) -> bool:
    """Tell a Python that is there from a name that stands in for one."""
    try:
        return bool(run(f"python{python}", "--version"))
    except (OSError, CheckError):
        return False


def main() -> int:
    """Prints a line for each check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", nargs="+", default=PYTHONS, help="default: all on PATH")
    parser.add_argument("--torch", nargs="+", default=["2.10", "newest"], help="2.10 newest")
    options = parser.parse_args()
    # A run that is ended cleans up as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    pythons = [python for python in options.python if at_hand(python)]
    missing = [python for python in options.python if python not in pythons]
    oldest = OLDEST if shutil.which(OLDEST) else None
    print(f"not at hand: Python {', '.join(missing) or 'none'}{'' if oldest else f'; {OLDEST}'}")
    for python in pythons:
        with tempfile.TemporaryDirectory(prefix="at_fused-versions-") as work:
            what = f"Python {python}, all of it"
            attempt(what, check_python, python, options.torch, Path(work), oldest)
        oldest = None  # once is enough
    print("failed:", *FAILED or ["none"], sep="\n")
    return bool(FAILED or not pythons)


if __name__ == "__main__":
    sys.exit(main())
