"""Builds programs and libraries for the tests, and caches them by a hash of their inputs."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

COMPILER = os.environ.get("CXX", "g++")


def run(command: Sequence[str | Path]) -> None:
    """Run a compiler, and raise its output on errors."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")


def cached(
    name: str, key: Iterable[object], files: Iterable[Path], make: Callable[[Path], None]
) -> Path:
    """Return the cached result of ``make(path)``, which must create ``path``.

    The cache key is the hash of ``key`` and of the contents of ``files``. ``make`` may create other
    files in the folder of ``path``, which is deleted. Only one process runs it; others wait.
    """
    digest = hashlib.sha256(repr(list(key)).encode())
    for file in sorted(set(files)):
        digest.update(file.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"at_fused_tests_{os.getuid()}"
    folder.mkdir(exist_ok=True)
    target = folder / f"{name}_{digest.hexdigest()[:16]}"
    with open(f"{target}.lock", "w") as lock, tempfile.TemporaryDirectory(dir=folder) as work:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            result = Path(work) / "result"
            make(result)
            os.replace(result, target)
    return target


def build_library(
    name: str,
    jobs: Sequence[tuple[Path, Sequence[str]]],
    link: Sequence[str],
    headers: Iterable[Path],
    key: str = "",
) -> Path:
    """Compile each file of ``jobs`` with its options, link them, and return the cached result."""

    def make(result: Path) -> None:
        def compile_one(job: tuple[Path, Sequence[str]]) -> Path:
            compiled = result.with_name(f"{job[0].name}.o")
            run([COMPILER, *job[1], "-c", job[0], "-o", compiled])
            return compiled

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, jobs))
        run([COMPILER, *objects, *link, "-o", result])

    return cached(name, (COMPILER, jobs, link, key), [*headers, *(file for file, _ in jobs)], make)
