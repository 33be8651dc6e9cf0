"""Python processes in other folders: in the checkout they would import its source."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).parent
TESTS = SUPPORT.parent
ROOT = TESTS.parent


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder; a crash prints its stack."""
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=os.environ | environment,
    )


def output_of(folder: Path, *arguments: str, **environment: str) -> str:
    """Run Python in a folder; return its stdout, and fail if it exits with an error."""
    done = run(folder, *arguments, **environment)
    message = f"exited with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    assert done.returncode == 0, message
    return done.stdout
