"""Programs and libraries that the tests compile, each once for what it is made of."""

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
    """Runs a compiler; its words are in the error."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")


def once(
    name: str, made_of: Iterable[object], files: Iterable[Path], make: Callable[[Path], None]
) -> Path:
    """What ``make`` leaves at the path it is given, kept by the hash of what it is made of.

    Beside that path it may leave what it likes. Of several processes one makes it, the others wait.
    """
    found = hashlib.sha256(repr(list(made_of)).encode())
    for file in sorted(set(files)):
        found.update(file.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"at_fused_tests_{os.getuid()}"
    folder.mkdir(exist_ok=True)
    target = folder / f"{name}_{found.hexdigest()[:16]}"
    with open(f"{target}.lock", "w") as lock, tempfile.TemporaryDirectory(dir=folder) as work:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            made = Path(work) / "made"
            make(made)
            os.replace(made, target)
    return target


def built(
    name: str,
    jobs: Sequence[tuple[Path, Sequence[str]]],
    link: Sequence[str],
    headers: Iterable[Path],
    key: str = "",
) -> Path:
    """What the linker makes of the files, each compiled with its options."""

    def make(made: Path) -> None:
        def compile_one(job: tuple[Path, Sequence[str]]) -> Path:
            compiled = made.with_name(f"{job[0].name}.o")
            run([COMPILER, *job[1], "-c", job[0], "-o", compiled])
            return compiled

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, jobs))
        run([COMPILER, *objects, *link, "-o", made])

    return once(name, (COMPILER, jobs, link, key), [*headers, *(file for file, _ in jobs)], make)
