"""Scripts that search settings, study beta, and write the tables of results."""

from __future__ import annotations

import json
import re
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
from train_runs import SMALL, run, small

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import beta_study
import results
import search_settings

from at_fused.train.config import resolve
from at_fused.train.report import results_table


def test_search_compares_settings_on_validation_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"--{n.replace('_', '-')}={v}" for n, v in SMALL.items() if n != "seeds"]
    words += ["--seeds=2", f"--out={tmp_path}/run", "--set", "at.p=1", "--grid=none:lr=0.1,0"]
    monkeypatch.setattr(sys, "argv", ["search", *words, "--grid=at:collapse=max:beta=auto,10"])
    search_settings.main()
    points = json.loads((tmp_path / "run/search.json").read_text())
    accuracies = [point.pop("accuracy") for point in points]
    assert points == [
        {"method": "none", "lr": 0.1},
        {"method": "none", "lr": 0.0},
        {"method": "at", "collapse": "max", "beta": "auto"},
        {"method": "at", "collapse": "max", "beta": 10.0},
    ]
    assert all(len(of_point) == 2 for of_point in accuracies)
    # With 300 validation images, accuracies are multiples of 1/3 %; with 500 test images, of 1/5 %.
    assert all(x * 3 == pytest.approx(round(x * 3)) for of_point in accuracies for x in of_point)
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {line["seed"] for line in lines if line["run"] != "teacher"} == {100, 101}
    table = (tmp_path / "run/search.md").read_text().strip()
    assert table.endswith(capsys.readouterr().out[-40:-1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--grid=foo:lr=1"], "--grid: got 'foo:lr=1', expected METHOD:OPTION=X,Y"),
        (["--grid=at:lr"], "--grid: got 'at:lr', expected METHOD:OPTION=X,Y"),
        (["--grid=at:lr=x"], "--grid: at:lr: got 'x', expected a number"),
        (["--grid=at:lr=1:lr=2"], "--grid: got 'at:lr=1:lr=2', expected METHOD:OPTION=X,Y"),
        (["--grid=at:lr=1=2"], "--grid: at:lr: got '1=2', expected a number"),
        (["--grid=none:beta=1"], "got 'none', expected one of at"),
        (["--grid=none:lr=1", "--evaluate=test"], "--evaluate: not an option of a search"),
        (["--grid=at:beta=1", "--betas=1,10"], "--betas: not an option of a search"),
        (["--grid=at:beta=1", "--validation=0.1"], "--validation: not an option of a search"),
        (["--grid=at:p=1", "--config=validated.toml"], "--validation: not an option of a search"),
        (["--grid=at:form=paper"], "at-formpaper: beta: got None, expected auto, or a number"),
        (["--grid=f-actt:beta=auto"], "beta: got 'auto', expected a number for f-actt"),
        (["--grid=channel-at:beta=1"], "compare: channel-at does not work with wrn-10-1-b8"),
    ],
)
def test_search_reports_invalid_options(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("validated.toml").write_text("betas = [1.0, 10.0]\nvalidation = 0.1\n")
    monkeypatch.setattr(sys, "argv", ["search", *words])
    with pytest.raises(SystemExit):
        search_settings.main()
    assert message in capsys.readouterr().err


def test_study_records_ratios_and_skips_trained_students(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task: dict[str, Any] = {**beta_study.TASKS["digits-20"], **SMALL, "cache": 2}
    monkeypatch.setitem(beta_study.TASKS, "digits-20", task)
    words = f"--task=digits-20 --out={tmp_path} --results={tmp_path} --betas=1,100 --ratios=5"
    for seeds in (1, 2):
        monkeypatch.setattr(sys, "argv", ["study", *words.split(), f"--seeds={seeds}"])
        beta_study.main()
        students = json.loads((tmp_path / "digits-20.json").read_text())
        assert [student["beta"] for student in students.values()][:3] == [0, 1, 100]
        assert len(students) == 4 * seeds
    steps = [[step for step, _ in student["ratios"]] for student in students.values()]
    assert steps[:4] == [[], *[[*range(6)]] * 3]
    # Initial weights and images are the same, and recorded ratios are those at beta 1.
    assert students["at-beta1-seed0"]["ratios"][0] == students["at-beta100-seed0"]["ratios"][0]
    auto = students["at-ratio5-seed0"]
    mean = statistics.geometric_mean(ratio for _, ratio in auto["ratios"])
    assert auto["beta"] == pytest.approx(5 / mean, rel=1e-3)
    # Students with a result are skipped even if their weights are gone.
    shutil.rmtree(tmp_path / "digits-20")
    expected = (tmp_path / "digits-20.json").read_text()
    beta_study.main()
    assert (tmp_path / "digits-20.json").read_text() == expected


@pytest.mark.parametrize("name", beta_study.TASKS)
def test_study_tasks_resolve_to_configurations(name: str) -> None:
    config = resolve({"compare": ("none", "at"), **beta_study.TASKS[name]})
    assert config.validation > 0
    assert config.labels


def test_tables_in_pages_match_the_records() -> None:
    assert results.updated_pages() == {page: page.read_text() for page in results.PAGES}


def test_differences_in_the_readme_are_in_the_tables() -> None:
    root = Path(__file__).parents[2]
    tables = (root / "docs/results.md").read_text()
    differences = re.findall(r"(\d+\.\d+) \+- (\d+\.\d+)", (root / "README.md").read_text())
    assert differences
    assert all(re.search(rf"\| +\+{mean} \+- {half} \|", tables) for mean, half in differences)


def test_record_without_a_table_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(results.PAGES[0].read_text().replace("<!-- beta-auto -->", ""))
    monkeypatch.setattr(results, "PAGES", (page,))
    with pytest.raises(SystemExit, match="no page has a block <!-- NAME --> for beta-auto"):
        results.updated_pages()


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of records, and a page with a block for ``digits``."""
    page, folder = tmp_path / "page.md", tmp_path / "records"
    page.write_text("<!-- digits -->\n<!-- end -->\n")
    folder.mkdir()
    monkeypatch.setattr(results, "PAGES", (page,))
    monkeypatch.setattr(results, "FOLDER", folder)
    return folder


def test_differences_are_paired_by_seed(tmp_path: Path, records: Path) -> None:
    config = small(compare=["none", "at"], seeds=3)
    expected = results_table(run(config, tmp_path / "run"), config)
    file = tmp_path / "run/metrics.jsonl"
    # Students in another order, as after --resume if one was deleted.
    file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))
    lines = sorted(file.read_text().splitlines(keepends=True), key=lambda x: json.loads(x)["step"])
    file.write_text("".join(lines))
    results.add_records(tmp_path / "run", "digits")

    def accuracies(text: str) -> list[list[str]]:
        return [line.split("|")[2:5] for line in text.splitlines()]

    assert accuracies(results_table(*results.read_record("digits"))) == accuracies(expected)


@pytest.mark.parametrize("case", ["unknown", "unfinished", "missing student", "no config.toml"])
def test_incomplete_runs_are_rejected_without_changes(
    case: str, tmp_path: Path, records: Path
) -> None:
    folder, name = tmp_path / "run", "other" if case == "unknown" else "digits"
    run(small(compare=["none", "at"], seeds=2), folder)
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    per_student = len(lines) // 5
    end = {"unfinished": -1, "missing student": -per_student}.get(case)
    file.write_text("".join(lines[:end]))
    if case == "no config.toml":
        (folder / "config.toml").unlink()
    message = {
        "unknown": "no page has a block <!-- other -->",
        "no config.toml": "has no config.toml",
    }.get(case, "at-seed1 is not finished")
    with pytest.raises(SystemExit, match=message):
        results.add_records(folder, name)
    assert not [*records.iterdir()]
