"""Programs and libraries that the tests compile, each once for what it is made of."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

COMPILER = os.environ.get("CXX", "g++")


def run(command: Sequence[str | Path]) -> None:
    """Runs a compiler; its words are in the error."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")


def built(
    name: str,
    jobs: Sequence[tuple[Path, Sequence[str]]],
    link: Sequence[str],
    headers: Iterable[Path],
    key: str = "",
) -> Path:
    """What the linker makes of the files, each compiled with its options.

    Kept in a folder by the hash of all that: of the sources, the headers, and ``key`` for what is
    none of them.
    """
    made_of = hashlib.sha256(repr((COMPILER, jobs, link, key)).encode())
    for file in sorted({*headers, *(file for file, _ in jobs)}):
        made_of.update(file.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"at_fused_tests_{os.getuid()}"
    target = folder / f"{name}_{made_of.hexdigest()[:16]}"
    folder.mkdir(exist_ok=True)
    # Of several processes that want it one compiles, with all cores, and the others wait.
    with open(f"{target}.lock", "w") as lock, tempfile.TemporaryDirectory(dir=folder) as work:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target

        def compile_one(job: tuple[Path, Sequence[str]]) -> str:
            file, options = job
            made = f"{work}/{file.name}.o"
            run([COMPILER, *options, "-c", file, "-o", made])
            return made

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, jobs))
        run([COMPILER, *objects, *link, "-o", f"{work}/made"])
        os.replace(f"{work}/made", target)
    return target
