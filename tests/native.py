"""Programs and libraries that the tests compile, each once for what it is made of."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

COMPILER = os.environ.get("CXX", "g++")
FOLDER = Path(tempfile.gettempdir()) / f"at_fused_tests_{os.getuid()}"


def run(command: Sequence[str | Path]) -> None:
    """Runs a compiler; its words are in the error."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")


def digest(made_of: Iterable[object], files: Iterable[Path]) -> str:
    """Of what something is made of: of texts, and of files' contents."""
    found = hashlib.sha256(repr(list(made_of)).encode())
    for file in sorted(set(files)):
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


@contextmanager
def alone(target: Path) -> Iterator[Path]:
    """A folder to make ``target`` in: of several processes one does, with all cores."""
    FOLDER.mkdir(exist_ok=True)
    with open(f"{target}.lock", "w") as lock, tempfile.TemporaryDirectory(dir=FOLDER) as work:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Path(work)


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
    made_of = (COMPILER, jobs, link, key)
    target = FOLDER / f"{name}_{digest(made_of, [*headers, *(file for file, _ in jobs)])}"
    with alone(target) as work:
        if target.exists():
            return target

        def compile_one(job: tuple[Path, Sequence[str]]) -> Path:
            file, options = job
            made = work / f"{file.name}.o"
            run([COMPILER, *options, "-c", file, "-o", made])
            return made

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, jobs))
        run([COMPILER, *objects, *link, "-o", work / "made"])
        os.replace(work / "made", target)
    return target
