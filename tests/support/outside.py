"""Pythons outside the checkout, which would stand in for the package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).parent
TESTS = SUPPORT.parent
ROOT = TESTS.parent


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs one in a folder; where it crashes it says in what."""
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=os.environ | environment,
    )


def output_of(folder: Path, *arguments: str, **environment: str) -> str:
    """What one prints that must not fail."""
    done = run(folder, *arguments, **environment)
    ended = f"ended with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    assert done.returncode == 0, ended
    return done.stdout
