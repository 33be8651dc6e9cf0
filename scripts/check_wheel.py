"""Check wheels as users meet them: platform tag, metadata, an installation without a compiler.

    python scripts/check_wheel.py dist/at_fused-*.whl --out wheelhouse

For each wheel: auditwheel repairs it into --out (torch's libraries stay outside), twine checks its
metadata, pip installs it in a fresh virtual environment without a compiler on PATH, and
scripts/smoke.py runs there. The environment takes torch from the one that runs this program.
Needs Linux and pip install ".[release]".
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from importlib.util import find_spec
from pathlib import Path

SMOKE = Path(__file__).resolve().parent / "smoke.py"
# At run time these are the ones of the user's torch.
EXCLUDED = ("libtorch*.so*", "libc10*.so*")


def run(*command: str | Path, **options: object) -> str:
    """Run a command, show it and what it prints, and return that; it has to succeed."""
    print("$", *command, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, **options)
    print(done.stdout, end="", flush=True)
    return done.stdout


def repaired(wheel: Path, out: Path) -> Path:
    """Return the wheel with the tag of the oldest Linux that it runs on."""
    exclude = [f"--exclude={name}" for name in EXCLUDED]
    run("auditwheel", "show", wheel)
    # Not straight into out, which may have a wheel of this name, or be the folder of this one.
    with tempfile.TemporaryDirectory() as work:
        run("auditwheel", "repair", "--plat=auto", *exclude, "-w", work, wheel)
        (path,) = Path(work).iterdir()
        return Path(shutil.copy(path, out))


def try_out(wheel: Path, libraries: list[str]) -> None:
    """Install the wheel where there is no compiler, and run the smoke test."""
    with tempfile.TemporaryDirectory(prefix="at_fused-wheel-") as work:
        folder = Path(work, "env")
        venv.create(folder, with_pip=True)
        python = folder / "bin/python"
        env = {k: v for k, v in os.environ.items() if not k.startswith(("AT_FUSED_", "PYTHON"))}
        env["PATH"] = str(folder / "bin")
        pip = ("-m", "pip", "install", "-q", "--no-deps", "--no-index")
        run(python, *pip, wheel.resolve(), cwd=work, env=env)
        # Not before: pip would count an at_fused that lies next to torch as installed.
        packages = sysconfig.get_path("purelib", vars={"base": str(folder)})
        torch = Path(find_spec("torch").origin).parents[1]
        Path(packages, "torch.pth").write_text(f"{torch}\n")
        run(python, SMOKE, *libraries, cwd=work, env=env)


def main() -> None:
    """Check each wheel, and leave the repaired ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheels", nargs="+", type=Path, metavar="WHEEL")
    parser.add_argument("--out", type=Path, default=Path("wheelhouse"), help="default: wheelhouse")
    parser.add_argument("--cuda", action="store_true", help="the wheels must have CUDA kernels")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for wheel in options.wheels:
        path = repaired(wheel, options.out)
        run(sys.executable, "-m", "twine", "check", "--strict", path)
        try_out(path, ["cpu", "cuda"] if options.cuda else ["cpu"])


if __name__ == "__main__":
    main()
