"""Release files: versions, the repository's address, workflows and scripts/release.sh."""

from __future__ import annotations

import ast
import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

import at_fused

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def text(name: str) -> str:
    return (ROOT / name).read_text()


def test_version_is_the_same_everywhere() -> None:
    assert f"\nversion: {at_fused.__version__}\n" in text("CITATION.cff")
    assert re.search(r"^## (\S+)", text("CHANGELOG.md"), re.M)[1] == at_fused.__version__


def test_repository_address_is_only_in_pyproject() -> None:
    (address,) = re.findall(r'^Repository = "(.+)"', text("pyproject.toml"), re.M)
    files = subprocess.run(
        ["git", "grep", "-lF", address], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert files.returncode or files.stdout.split() == ["pyproject.toml"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_existing_files(path: Path) -> None:
    names = re.findall(
        r"(?:bash|python) (?:\{project\}/)?([\w./-]+\.\w+|\.ci/run)", path.read_text()
    )
    assert path.name == "docs.yml" or names
    assert all((ROOT / name).exists() for name in names)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow_jobs_have_a_timeout(path: Path) -> None:
    jobs = path.read_text().partition("\njobs:\n")[2]
    assert len(re.findall(r"^  \w+:$", jobs, re.M)) == jobs.count("timeout-minutes:")


def test_wheels_are_repaired_without_the_libraries_of_torch() -> None:
    (command,) = re.findall(r'^repair-wheel-command = "(.+)"$', text("pyproject.toml"), re.M)
    excluded = re.search(r"^EXCLUDED = (\(.+\))$", text("scripts/check_wheel.py"), re.M)[1]
    assert re.findall(r"--exclude '(.+?)'", command) == [*ast.literal_eval(excluded)]


def run_release(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(folder / "scripts/release.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files that release.sh reads, ready to publish 0.2.0."""
    for name in ("scripts/release.sh", "at_fused/_version.py", "CHANGELOG.md", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "at_fused/_version.py").write_text('__version__ = "0.2.0"\n')
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 0.2.0 (2026-12-01)\n")
    (tmp_path / "pyproject.toml").write_text('Repository = "https://git.example/at_fused"\n')
    return tmp_path


def test_check_passes_for_a_ready_release(checkout: Path) -> None:
    done = run_release("check", "v0.2.0", folder=checkout)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("at_fused/_version.py", '__version__ = "0.3.0"\n', "the tag is v0.2.0"),
        ("CHANGELOG.md", "## 0.2.0 (unreleased)\n", "no line '## 0.2.0 (YYYY-MM-DD)'"),
        ("pyproject.toml", 'Repository = "https://example.org/name"', "fill in the"),
    ],
)
def test_check_says_what_is_not_ready(
    checkout: Path, name: str, content: str, message: str
) -> None:
    (checkout / name).write_text(content)
    done = run_release("check", "v0.2.0", folder=checkout)
    assert done.returncode == 1
    assert message in done.stderr


def test_local_version_is_set_once(checkout: Path) -> None:
    for _ in range(2):
        assert not run_release("local-version", "cu13", folder=checkout).returncode
        assert (checkout / "at_fused/_version.py").read_text() == '__version__ = "0.2.0+cu13"\n'


def test_notes_are_those_of_the_version(checkout: Path) -> None:
    changelog = "# Changelog\n\n## 0.2.0 (2026-12-01)\n\nA [page](docs/a.md), a [site](https://b.example).\n"
    (checkout / "CHANGELOG.md").write_text(f"{changelog}\n## 0.1.0\n\nOld.\n")
    page = "https://git.example/at_fused/blob/v0.2.0/docs/a.md"
    expected = f"A [page]({page}), a [site](https://b.example)."
    assert run_release("notes", folder=checkout).stdout.strip() == expected


def test_notes_of_another_version_are_refused(checkout: Path) -> None:
    (checkout / "CHANGELOG.md").write_text("## 0.2.01 (unreleased)\n\nText.\n")
    done = run_release("notes", folder=checkout)
    assert (done.returncode, done.stdout) == (1, "")


def test_toolkit_does_not_overwrite_a_folder(checkout: Path) -> None:
    done = run_release("toolkit", str(checkout), folder=checkout)
    assert done.returncode == 1
    assert "exists" in done.stderr


def test_wheel_is_repaired_over_an_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """auditwheel's output may have the name of a wheel in the folder, or of its input."""
    tool, wheel = tmp_path / "auditwheel", tmp_path / "a.whl"
    tool.write_text('#!/bin/sh\n[ "$1" = show ] || cp "$7" "$6"\n')
    tool.chmod(0o755)
    wheel.write_text("wheel")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    repaired = runpy.run_path(str(ROOT / "scripts/check_wheel.py"))["repaired"]
    for folder in (tmp_path / "out", tmp_path / "out", tmp_path):
        folder.mkdir(exist_ok=True)
        assert repaired(wheel, folder).read_text() == "wheel"


def test_unknown_step_prints_usage() -> None:
    done = run_release("publish", folder=ROOT)
    assert done.returncode == 1
    assert "usage: release.sh check TAG | notes | sdist | wheel" in done.stderr
