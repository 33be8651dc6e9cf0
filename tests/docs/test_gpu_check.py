"""scripts/gpu_check.py: a dry run on the CPU, its exit paths, and its commands on a GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import outside
import pytest
import torch

import at_fused

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import gpu_check
from gpu_check import Done, Part

# Hides packages that a machine with only torch, pytest and numpy lacks.
HIDE_PACKAGES = """
import sys
from importlib.machinery import PathFinder

MISSING = "hypothesis xdist torchdistill torchvision matplotlib PIL tqdm scipy sklearn".split()

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in MISSING else super().find_spec(name, path, target)

sys.meta_path[:] = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
"""


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of this checkout with the package under test, which may be an installed one."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for item in gpu_check.ROOT.iterdir():
        if item.name not in ("at_fused", "scripts", ".git"):
            (folder / item.name).symlink_to(item)
    (folder / "at_fused").symlink_to(Path(at_fused.__file__).parent)
    shutil.copytree(gpu_check.ROOT / "scripts", folder / "scripts")
    return folder


@pytest.mark.exhaustive
def test_dry_run_passes_every_part(tmp_path: Path, checkout: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDE_PACKAGES)
    environment = {"PYTHONPATH": str(tmp_path), "AT_FUSED_GPU_DRY_RUN": "1"}
    script = str(checkout / "scripts/gpu_check.py")
    output = outside.output_of(tmp_path, script, "--out", "reports", **environment)
    (report,) = (tmp_path / "reports").glob("gpu_check_*.md")
    text = report.read_text()
    titles = [part.title for part in gpu_check.parts(report)]
    assert output.count(": passed\n") == len(titles) == 5
    assert all(f"\n## {title}, " in text and f"\n- {title}, " in text for title in titles)
    times = json.loads(report.with_suffix(".json").read_text())["parts"]
    assert times.keys() == {"cases", "calls"}
    assert all(row["ms"] for rows in times.values() for row in rows)


def test_failing_and_hanging_parts_do_not_stop_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "prepare", lambda only_build: "library versions\n")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Pretend(R) GPU 9")
    hang = "import time, signal; print('here', flush=True); {}; time.sleep(1e6)"
    ignore_sigint = "signal.signal(signal.SIGINT, signal.SIG_IGN)"
    bad_parts = [
        Part("Hangs", 4, [python(hang.format("pass")), python(hang.format(ignore_sigint))]),
        Part("Fails", 60, [python("print(1 / 0)"), python("")]),
        Part("Unavailable", 60, []),
    ]
    for parts, status in ((bad_parts[2:], 0), (bad_parts, 1)):
        monkeypatch.setattr(gpu_check, "parts", lambda rows, parts=parts: parts)
        assert gpu_check.main(["--out", str(tmp_path / str(status))]) == status
    output = capsys.readouterr().out
    assert "s: exit status 1\n" in output
    assert "s: timed out after 4 s\n" in output
    assert output.count("s: not available\n") == 2
    (report,) = tmp_path.glob("1/gpu_check_Pretend-R-GPU-9_*.md")
    with pytest.raises(SystemExit):  # the report would be overwritten
        gpu_check.main(["--out", str(report.parent)])
    assert "exists: move it" in capsys.readouterr().err
    text = report.read_text()
    assert "library versions" in text
    assert "ZeroDivisionError" in text
    assert text.count("\nhere\n") == 2
    assert text.count("\nKeyboardInterrupt\n") == 1  # a traceback of the part that hangs


def test_sigterm_kills_the_running_commands(tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(Path(gpu_check.__file__).parent)!r})
import gpu_check, torch
gpu_check.prepare = lambda only_build: ""
torch.cuda.get_device_name = lambda: "GPU"
sleeps = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(1e6)"
gpu_check.ROOT = gpu_check.Path({str(tmp_path)!r})
gpu_check.parts = lambda rows: [gpu_check.Part("", 600, [[sys.executable, "-c", sleeps]])]
gpu_check.main(["--out", {str(tmp_path)!r}])
"""
    process = subprocess.Popen(python(code), stderr=subprocess.PIPE)
    file = tmp_path / "pid"
    while not (file.exists() and file.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert b"KeyboardInterrupt" in process.communicate()[1]
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text()), 0)


def test_part_without_passing_tests_fails() -> None:
    pytest_part = Part("", 9, [["python", "-m", "pytest"]] * 2)
    for part, done, passed in (
        (pytest_part, [Done(0, "3 passed"), Done(5, "no tests ran")], True),
        (pytest_part, [Done(5, "no tests ran")] * 2, False),
        (pytest_part, [Done(0, "3 passed"), Done(1, "2 passed, 1 failed")], False),
        (pytest_part, [Done(0, "3 passed"), Done(None, "")], False),
        (Part("", 9, [["sanitizer"]]), [Done(5, "")], False),
    ):
        assert gpu_check.verdict(part, done)[0] == passed, done


def test_errors_say_why_the_check_cannot_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            gpu_check.main(arguments)
        assert stop.value.code == 2
        return capsys.readouterr().err

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert error().endswith("sees no GPU\n")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    (tmp_path / "at_fused").mkdir()
    (tmp_path / "setup.py").write_text("import pybind99")
    assert error() == "gpu_check: cannot build: ModuleNotFoundError: No module named 'pybind99'\n"
    # The build succeeds, but the libraries are not in use.
    build = "import os, pathlib; assert os.environ['AT_FUSED_CUDA'] == '1'\n" + (
        "for name in ('_cpu', '_cuda'): pathlib.Path(f'at_fused/{name}.abi3.so').write_text('x')"
    )
    (tmp_path / "setup.py").write_text(build)
    monkeypatch.setattr(gpu_check, "PRINT_INFO", "raise SystemExit('not in use')")
    assert error() == "gpu_check: cannot start: not in use\n"
    # --build needs no GPU, and builds again only if the sources have changed.
    (tmp_path / "csrc").mkdir()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for changed, builds in (("", 0), ("csrc/x.cuh", 1), ("", 0)):
        if changed:
            (tmp_path / changed).write_text("changed")
        assert gpu_check.main(["--build"]) == 0
        output = capsys.readouterr().out
        assert output.count(": building\n") == builds, changed
        assert f"sha256 {gpu_check.digest()}\n" in output
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None)
    assert error().endswith("has no torch, pytest, numpy, setuptools\n")


def test_commands_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "compute-sanitizer").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    parts = gpu_check.parts(tmp_path / "times.json")
    smoke, _, contract, sanitizer, triton = parts
    assert sum(part.seconds for part in parts) == 8 * 60

    def shards(part: Part) -> list[str]:
        return [command[command.index("--shard") + 1] for command in part.commands]

    eight = [f"{i}/8" for i in range(8)]
    assert shards(smoke) == eight
    assert shards(contract) == [f"{i}/14" for i in range(14)]
    assert shards(triton) == [*eight, *(f"{i}/30" for i in range(6))]
    for command, tool in zip(sanitizer.commands, ("memcheck", "racecheck"), strict=True):
        assert command[:3:2] == [str(tmp_path / "compute-sanitizer"), f"--tool={tool}"]
        assert command[-2:] == ["scripts/gpu_driver.py", "cuda"]


@pytest.mark.exhaustive
def test_shards_are_even(checkout: Path) -> None:
    def collect(shard: int) -> list[str]:
        choice = f"-m|smoke|-k|not triton|--shard|{shard}/4|tests/kernels/test_gpu.py".split("|")
        options = "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"
        environment = {"AT_FUSED_GPU_DRY_RUN": "1", "PYTHONPATH": str(checkout)}
        output = outside.output_of(checkout, *options, *choice, **environment)
        return re.findall("^tests/.*::.*$", output, re.M)

    shards = [collect(i) for i in range(4)]
    names = [name for shard in shards for name in shard]
    assert len(names) == len(set(names)) > 20
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    # The slowest tests are in different shards, of 4 and so of gpu_check's 8.
    assert all(sum("max-autotune" in name for name in shard) <= 1 for shard in shards)
