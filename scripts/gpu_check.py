#!/usr/bin/env python
"""Checks at_fused on a machine with a GPU, in eight minutes.

    python scripts/gpu_check.py [--out FOLDER] [--build]

Needs torch of 2.10 or later, pytest, numpy and setuptools, and no network. Takes the libraries in
at_fused/ if it has built them itself of the same sources, there or elsewhere: then carry
at_fused/*.so and build/gpu_check.sha256. Else it builds them first, with pybind11, nvcc and a C++
compiler, which may take half an hour more; --build does that alone, and needs no GPU.

Leaves two files to send in, in benchmarks/results or FOLDER: gpu_check_<device>_<date>.md, and the
times in a .json beside it. The most telling comes first. Goes on after a part that fails or takes
too long. Exit status: 0 all well, 1 a part failed, 2 cannot begin. AT_FUSED_GPU_DRY_RUN=1 runs a
little of each part on the CPU, with any libraries.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import importlib.util
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DRY_RUN = os.environ.get("AT_FUSED_GPU_DRY_RUN") == "1"
DEVICE, LIBRARIES = ("cpu", ["_cpu"]) if DRY_RUN else ("cuda", ["_cpu", "_cuda"])
PATIENCE = 10 if DRY_RUN else 1  # a dry run may be one of many things on few cores
LINES = 100  # of the end of what each command says, for the report
GRACE = 5  # the last seconds of a part, in which what is interrupted says what it knows
# This at_fused before others, and no plugins of pytest.
SET = {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
SET |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
# So many processes share the cores.
SHARED = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "2"}
PYTEST = ("-m", "pytest", "-v", "--tb=short", "--show-capture=no", "-p", "no:cacheprovider")
PYTEST += ("-o", "faulthandler_timeout=60")  # says where a test hangs
IN_USE = f"""
import benchmarks, at_fused.info, pathlib, sys
folder, row = pathlib.Path(at_fused.__file__).parents[1], at_fused.backends()[{LIBRARIES[-1][1:]!r}]
if folder != pathlib.Path({str(ROOT)!r}):
    sys.exit(f"another at_fused, in {{folder}}, stands in for this one: uninstall it")
if not row.in_use:
    sys.exit(f"the {{row.name}} library is not in use: {{row.reason}}")
print("\\n".join(at_fused.info.lines()))
"""


class Part(NamedTuple):
    """Commands that run at once, and the seconds they may take."""

    title: str
    seconds: float
    commands: list[Sequence[str]]
    environment: dict[str, str] = {}  # noqa: RUF012


class Done(NamedTuple):
    """A command's status, None if it ran out of time, and what it said."""

    status: int | None
    said: str


def refuse(why: str) -> None:
    """End with status 2."""
    print(f"gpu_check: {why}", file=sys.stderr)
    sys.exit(2)


def run(part: Part) -> list[Done]:
    """Run the commands of a part, each in a process group that is killed when its time is over."""
    end, grace = time.monotonic() + part.seconds, min(GRACE, part.seconds / 2)
    options = {"cwd": ROOT, "env": {**os.environ, **SET, **part.environment}}
    options |= {"stderr": subprocess.STDOUT, "start_new_session": True}
    with contextlib.ExitStack() as files:
        logs = [files.enter_context(tempfile.TemporaryFile("w+")) for _ in part.commands]
        started: list[subprocess.Popen[bytes]] = []

        def wait(until: float) -> list[int | None]:
            for process in started:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0, until - time.monotonic()))
            return [process.poll() for process in started]

        def send(number: signal.Signals) -> None:
            for process in started:
                if process.poll() is None:
                    os.killpg(process.pid, number)

        try:
            for command, log in zip(part.commands, logs, strict=True):
                started.append(subprocess.Popen(command, stdout=log, **options))
            statuses = wait(end - grace)
            send(signal.SIGINT)
            wait(end)
        finally:
            send(signal.SIGKILL)
            wait(math.inf)
        for log in logs:
            log.seek(0)
        return [Done(status, log.read()) for status, log in zip(statuses, logs, strict=True)]


def tests(processes: int, parts: int, *choice: str) -> list[list[str]]:
    """Run several processes, each with its part of the tests."""
    if DRY_RUN:
        processes, parts = 2, 14
    return [[sys.executable, *PYTEST, "--shard", f"{i}/{parts}", *choice] for i in range(processes)]


def parts(rows: Path) -> list[Part]:
    """All of it, the most telling first."""
    quick = [sys.executable, "-m", "benchmarks.quick", DEVICE, str(rows), *["1"] * DRY_RUN]
    driver = [sys.executable, "scripts/gpu_driver.py", DEVICE]
    checks = [driver] if DRY_RUN else []
    path = f"{os.environ['PATH']}:/usr/local/cuda/bin"
    if not DRY_RUN and (sanitizer := shutil.which("compute-sanitizer", path=path)):
        tools = "--tool=memcheck", "--tool=racecheck"
        checks = [[sanitizer, "--error-exitcode=1", tool, *driver] for tool in tools]
    # Not from the caching allocator, whose large blocks would hide accesses past a tensor's end.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    every = ["tests/kernels/test_gpu.py", "tests/kernels/test_triton.py"]
    smoke = tests(8, 8, "-m", "smoke", "-k", "not triton", every[0])
    contract = tests(14, 14, "-m", "not smoke", "-k", "not triton", every[0])
    triton = tests(8, 8, "-m", "smoke", "-k", "triton", every[0])
    triton += tests(6, 30, "-m", "not smoke", "-k", "triton", *every)
    return [
        Part("Smoke", 100, smoke, SHARED),
        # Dynamo's own compilation of the rivals is not for a dry run.
        Part("Benchmarks", 120, [quick], {"TORCHDYNAMO_DISABLE": "1"} if DRY_RUN else {}),
        Part("CUDA contract", 110, contract, SHARED),
        Part("compute-sanitizer", 80, checks, alone),
        Part("Triton's smoke and a fifth of its tests", 70, triton, SHARED),
    ]


def verdict(part: Part, done: list[Done]) -> tuple[bool, str]:
    """(whether a part is as it should be, in words)."""
    if not part.commands:
        return True, "not there"
    if any(each.status is None for each in done):
        return False, f"not done in {part.seconds:.0f} s"
    of_tests = "pytest" in part.commands[0]
    good = (0, 5) if of_tests else (0,)  # 5: no test is in this share of them
    if bad := [str(each.status) for each in done if each.status not in good]:
        return False, f"status {', '.join(bad)}"
    if of_tests and not any(re.search(r"\d+ passed", each.said) for each in done):
        return False, "no test has passed"
    return True, "passed"


def digest() -> str:
    """The SHA-256 of the libraries' sources together."""
    sources = hashlib.sha256()
    for file in sorted([ROOT / "setup.py", *(ROOT / "csrc").rglob("*.*")]):
        sources.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return sources.hexdigest()


def command(title: str, seconds: float, *arguments: str, **environment: str) -> str:
    """Return what Python prints that must not fail."""
    (done,) = run(Part(title, seconds, [[sys.executable, *arguments]], environment))
    if done.status != 0:
        print(done.said)
        refuse(f"{title}: {[f'status {done.status}', *done.said.strip().splitlines()][-1]}")
    return done.said


def build() -> None:
    """Build libraries that are missing, or that it has not built of these sources."""
    built, sources = ROOT / "build/gpu_check.sha256", digest()
    there = all(any((ROOT / "at_fused").glob(f"{name}.*so")) for name in LIBRARIES)
    if there and (DRY_RUN or (built.exists() and built.read_text() == sources)):
        return
    print(f"{ROOT / 'at_fused'} has no libraries built here of these sources: building", flush=True)
    arguments = "setup.py", "build_ext", "--inplace", "--force"
    command("cannot build", 1800, *arguments, AT_FUSED_CUDA=str(int(not DRY_RUN)))
    if not DRY_RUN:
        built.parent.mkdir(exist_ok=True)
        built.write_text(sources)


def prepare(only_build: bool) -> str:
    """Build what it has to; return what is in use."""
    names = "torch", "pytest", "numpy", "setuptools"  # the last for torch's C++ extensions
    if missing := [name for name in names if not importlib.util.find_spec(name)]:
        refuse(f"{sys.executable} has no {', '.join(missing)}")
    import torch

    if not (DRY_RUN or only_build or torch.cuda.is_available()):
        refuse(f"torch {torch.__version__} sees no GPU")
    build()
    in_use = "" if only_build else command("cannot begin", 120, "-c", IN_USE)
    return f"{in_use}sources    sha256 {digest()}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", metavar="FOLDER")
    parser.add_argument("--build", action="store_true", help="only build the libraries")
    given = parser.parse_args(arguments)
    # A program that a shell starts in the background ignores it, and so would all that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # nothing is left on the device
    in_use = prepare(given.build)
    if given.build:
        print(in_use, end="")
        return 0
    import torch

    device = "dry run" if DRY_RUN else torch.cuda.get_device_name()
    today = datetime.date.today().isoformat()
    name = f"gpu_check_{re.sub(r'[^A-Za-z0-9]+', '-', device)}_{today}.md"
    report = given.out.resolve() / name
    report.parent.mkdir(parents=True, exist_ok=True)
    if report.exists():
        refuse(f"{report} is there: move it away, or give another --out")
    report.write_text(f"# at_fused on {device}, {today}\n\n```\n{in_use}```\n")
    end, results, well = time.monotonic(), [], True
    for part in parts(report.with_suffix(".json")):
        begin = time.monotonic()
        end += part.seconds * PATIENCE  # what one leaves over the next may take
        part = part._replace(seconds=max(0, end - begin))
        done = run(part)
        good, words = verdict(part, done)
        well = well and good
        results.append(f"{part.title}, {time.monotonic() - begin:.0f} s: {words}")
        print(results[-1], flush=True)
        lines = [f"\n## {results[-1]}"]
        for arguments, each in zip(part.commands, done, strict=True):
            short = "pytest" in arguments and each.status in (0, 5)
            said = each.said.splitlines()[-2 if short else -LINES :]
            lines += ["", "```", f"$ {' '.join(arguments)}", *said, "```"]
        with report.open("a") as file:
            print(*lines, sep="\n", file=file)
    with report.open("a") as file:
        print("\n## Result\n", *(f"- {line}" for line in results), sep="\n", file=file)
    print(f"report: {report}")
    return int(not well)


if __name__ == "__main__":
    sys.exit(main())
