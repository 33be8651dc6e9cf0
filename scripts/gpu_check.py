#!/usr/bin/env python
"""Test and benchmark at_fused on a machine with a GPU, in eight minutes.

    python scripts/gpu_check.py [--out FOLDER] [--build]

Needs torch 2.10 or later, pytest, numpy and setuptools, and no network. Builds the libraries first,
with pybind11, nvcc and a C++ compiler, which may take half an hour more; --build stops there, and
needs no GPU. Skips the build if this script built the libraries in at_fused/ from the same sources.
To reuse a build from another machine, copy at_fused/*.so and build/gpu_check.sha256.

Writes two files to send in, to benchmarks/results or FOLDER: gpu_check_<device>_<date>.md and, with
the times, gpu_check_<device>_<date>.json. The most informative parts run first, and a part that
fails or times out does not stop the others. Exit status: 0 if all parts pass, 1 if one fails, 2 if
the check cannot start. AT_FUSED_GPU_DRY_RUN=1 runs a little of each part on the CPU, with existing
libraries even if their sources have changed.
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
TIMEOUT_FACTOR = 10 if DRY_RUN else 1  # a dry run may share few cores with other programs
REPORT_LINES = 100  # last lines of a command's output in the report
GRACE = 5  # seconds between SIGINT, on which pytest prints a traceback, and SIGKILL
# The checkout's at_fused comes before an installed one.
ENVIRONMENT = {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
ENVIRONMENT |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
# A part may run 14 processes at once.
FEW_THREADS = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "2"}
PYTEST = ("-m", "pytest", "-v", "--tb=short", "--show-capture=no", "-p", "no:cacheprovider")
PYTEST += ("-o", "faulthandler_timeout=60")  # prints where a test hangs
PRINT_INFO = f"""
import benchmarks, at_fused.info, pathlib, sys
folder, row = pathlib.Path(at_fused.__file__).parents[1], at_fused.backends()[{LIBRARIES[-1][1:]!r}]
if folder != pathlib.Path({str(ROOT)!r}):
    sys.exit(f"Python imports another at_fused, from {{folder}}: uninstall it")
if not row.in_use:
    sys.exit(f"the {{row.name}} library is not in use: {{row.reason}}")
print("\\n".join(at_fused.info.lines()))
"""


class Part(NamedTuple):
    """Commands that run in parallel, with a time limit."""

    title: str
    seconds: float
    commands: list[Sequence[str]]
    environment: dict[str, str] = {}  # noqa: RUF012


class Done(NamedTuple):
    """A command's exit status, None if it timed out, and its output."""

    status: int | None
    output: str


def abort(message: str) -> None:
    """Print a message and exit with status 2."""
    print(f"gpu_check: {message}", file=sys.stderr)
    sys.exit(2)


def run(part: Part) -> list[Done]:
    """Run the commands of a part, each in a process group that is killed at the time limit."""
    end, grace = time.monotonic() + part.seconds, min(GRACE, part.seconds / 2)
    options = {"cwd": ROOT, "env": {**os.environ, **ENVIRONMENT, **part.environment}}
    options |= {"stderr": subprocess.STDOUT, "start_new_session": True}
    with contextlib.ExitStack() as files:
        logs = [files.enter_context(tempfile.TemporaryFile("w+")) for _ in part.commands]
        started: list[subprocess.Popen[bytes]] = []

        def wait(until: float) -> list[int | None]:
            for process in started:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0, until - time.monotonic()))
            return [process.poll() for process in started]

        def send(signal_number: signal.Signals) -> None:
            for process in started:
                if process.poll() is None:
                    os.killpg(process.pid, signal_number)

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


def pytest_commands(processes: int, shards: int, *selection: str) -> list[list[str]]:
    """Return a pytest command for each of the first shards of the selected tests."""
    if DRY_RUN:
        processes, shards = 2, 14
    command = [sys.executable, *PYTEST]
    return [[*command, "--shard", f"{i}/{shards}", *selection] for i in range(processes)]


def parts(times: Path) -> list[Part]:
    """Return the parts, most informative first; the benchmarks write their times to a file."""
    quick = [sys.executable, "-m", "benchmarks.quick", DEVICE, str(times), *["1"] * DRY_RUN]
    driver = [sys.executable, "scripts/gpu_driver.py", DEVICE]
    checks = [driver] if DRY_RUN else []
    path = f"{os.environ['PATH']}:/usr/local/cuda/bin"
    if not DRY_RUN and (sanitizer := shutil.which("compute-sanitizer", path=path)):
        tools = "--tool=memcheck", "--tool=racecheck"
        checks = [[sanitizer, "--error-exitcode=1", tool, *driver] for tool in tools]
    # The large blocks of the caching allocator would hide accesses past a tensor's end.
    no_caching = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    files = ["tests/kernels/test_gpu.py", "tests/kernels/test_triton.py"]
    smoke = pytest_commands(8, 8, "-m", "smoke", "-k", "not triton", files[0])
    contract = pytest_commands(14, 14, "-m", "not smoke", "-k", "not triton", files[0])
    triton = pytest_commands(8, 8, "-m", "smoke", "-k", "triton", files[0])
    triton += pytest_commands(6, 30, "-m", "not smoke", "-k", "triton", *files)
    return [
        Part("Smoke tests", 100, smoke, FEW_THREADS),
        # torch.compile of the baselines takes too long for a dry run.
        Part("Benchmarks", 120, [quick], {"TORCHDYNAMO_DISABLE": "1"} if DRY_RUN else {}),
        Part("CUDA tests", 110, contract, FEW_THREADS),
        Part("compute-sanitizer", 80, checks, no_caching),
        Part("Triton smoke tests and a fifth of the other Triton tests", 70, triton, FEW_THREADS),
    ]


def verdict(part: Part, done: list[Done]) -> tuple[bool, str]:
    """Return whether a part passed, and its result in words."""
    if not part.commands:
        return True, "not available"
    if any(command.status is None for command in done):
        return False, f"timed out after {part.seconds:.0f} s"
    runs_tests = "pytest" in part.commands[0]
    allowed = (0, 5) if runs_tests else (0,)  # 5: the shard is empty
    if failed := [str(command.status) for command in done if command.status not in allowed]:
        return False, f"exit status {', '.join(failed)}"
    if runs_tests and not any(re.search(r"\d+ passed", command.output) for command in done):
        return False, "no test passed"
    return True, "passed"


def digest() -> str:
    """Return the SHA-256 of all sources of the libraries."""
    sources = hashlib.sha256()
    for file in sorted([ROOT / "setup.py", *(ROOT / "csrc").rglob("*.*")]):
        sources.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return sources.hexdigest()


def run_python(error: str, seconds: float, *arguments: str, **environment: str) -> str:
    """Run Python and return its output; abort with the error if it fails."""
    (done,) = run(Part(error, seconds, [[sys.executable, *arguments]], environment))
    if done.status != 0:
        print(done.output)
        abort(f"{error}: {[f'status {done.status}', *done.output.strip().splitlines()][-1]}")
    return done.output


def build() -> None:
    """Build the libraries unless this script already built them from the same sources."""
    record, sources = ROOT / "build/gpu_check.sha256", digest()
    is_built = all(any((ROOT / "at_fused").glob(f"{name}.*so")) for name in LIBRARIES)
    if is_built and (DRY_RUN or (record.exists() and record.read_text() == sources)):
        return
    print(f"{ROOT / 'at_fused'} has no libraries of these sources: building", flush=True)
    arguments = "setup.py", "build_ext", "--inplace", "--force"
    run_python("cannot build", 1800, *arguments, AT_FUSED_CUDA=str(int(not DRY_RUN)))
    if not DRY_RUN:
        record.parent.mkdir(exist_ok=True)
        record.write_text(sources)


def prepare(only_build: bool) -> str:
    """Check the machine, build the libraries, and return lines about versions and libraries."""
    names = "torch", "pytest", "numpy", "setuptools"  # torch's C++ extensions need setuptools
    if missing := [name for name in names if not importlib.util.find_spec(name)]:
        abort(f"{sys.executable} has no {', '.join(missing)}")
    import torch

    if not (DRY_RUN or only_build or torch.cuda.is_available()):
        abort(f"torch {torch.__version__} sees no GPU")
    build()
    info = "" if only_build else run_python("cannot start", 120, "-c", PRINT_INFO)
    return f"{info}sources    sha256 {digest()}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", metavar="FOLDER")
    parser.add_argument("--build", action="store_true", help="only build the libraries")
    options = parser.parse_args(arguments)
    # Shells start background programs with SIGINT ignored, and child processes inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that run kills its processes
    info = prepare(options.build)
    if options.build:
        print(info, end="")
        return 0
    import torch

    device = "dry run" if DRY_RUN else torch.cuda.get_device_name()
    today = datetime.date.today().isoformat()
    name = f"gpu_check_{re.sub(r'[^A-Za-z0-9]+', '-', device)}_{today}.md"
    report = options.out.resolve() / name
    report.parent.mkdir(parents=True, exist_ok=True)
    if report.exists():
        abort(f"{report} exists: move it, or choose another --out")
    report.write_text(f"# at_fused on {device}, {today}\n\n```\n{info}```\n")
    end, results, all_passed = time.monotonic(), [], True
    for part in parts(report.with_suffix(".json")):
        begin = time.monotonic()
        end += part.seconds * TIMEOUT_FACTOR  # time that a part does not use is left to the next
        part = part._replace(seconds=max(0, end - begin))
        done = run(part)
        passed, description = verdict(part, done)
        all_passed = all_passed and passed
        results.append(f"{part.title}, {time.monotonic() - begin:.0f} s: {description}")
        print(results[-1], flush=True)
        lines = [f"\n## {results[-1]}"]
        for arguments, command in zip(part.commands, done, strict=True):
            is_short = "pytest" in arguments and command.status in (0, 5)
            output = command.output.splitlines()[-2 if is_short else -REPORT_LINES :]
            lines += ["", "```", f"$ {' '.join(arguments)}", *output, "```"]
        with report.open("a") as file:
            print(*lines, sep="\n", file=file)
    with report.open("a") as file:
        print("\n## Result\n", *(f"- {line}" for line in results), sep="\n", file=file)
    print(f"report: {report}")
    return int(not all_passed)


if __name__ == "__main__":
    sys.exit(main())
