"""Benchmark report: committed pages and charts match the committed results."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pretend_cuda
import pytest
import torch
from outside import output_of
from PIL import Image

import at_fused
from at_fused.backends import backend_by_device

sys.path.append(str(Path(__file__).parents[2]))
from benchmarks import (
    ROOT,
    charts,
    measure,
    quick,
    report,
    results,
    roofline,
    steps,
    tables,
    train_step,
)
from benchmarks.cases import (
    CASES,
    DEVICES,
    SETTINGS,
    TOKEN_OPTIONS,
    TOKENS,
    Inputs,
    eager_losses,
    eager_token_losses,
)
from benchmarks.measure import Comparison, Timer
from benchmarks.results import FOLDER, Result

RESULTS = results.load_all(FOLDER)
COUNTS = roofline.load()
PAGES = report.pages(ROOT)


def cpu_result() -> Result:
    return copy.deepcopy(next(r for r in RESULTS.values() if r["kind"] == "cpu"))


def gpu_result() -> Result:
    """Return the result of a pretend GPU with two back ends, with the CPU's times."""
    result = cpu_result() | {"device": "Pretend(R) GPU 9", "kind": "cuda"}
    result["backends"] = {"cuda": "CUDA kernels", "triton": "Triton kernels"}
    parts = result["parts"]
    for name, rows in parts.items():
        parts[name] = [row | {"backend": on} for row in rows for on in result["backends"]]
    for row in parts["cases"]:
        row["bytes"] = row["bytes"] | {"copy": 2**29}
        row["ms"] = row["ms"] | {"copy": 100.0}
    return result


def block(name: str, kind: str = "") -> str:
    return f"<!-- {kind}from benchmarks/results/{name}.json -->\nold\n<!-- end -->\n"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a checkout with the results of one device and two pages, for the programs to use."""
    folder = tmp_path / "benchmarks/results"
    folder.mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    shutil.copy(roofline.FILE, folder)
    path = results.path_of(cpu_result(), folder)
    results.write(path, cpu_result())
    (tmp_path / "README.md").write_text(f"before\n{block(path.stem, 'figures ')}after\n")
    page = block(path.stem) + block(path.stem, "steps ") + block(roofline.FILE.stem)
    (tmp_path / "docs/page.md").write_text(page)
    (tmp_path / "docs/other.md").write_text("no blocks\n")
    for module in (report, results):
        monkeypatch.setattr(module, "FOLDER", folder)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    return tmp_path


# ---- committed files -----------------------------------------------------------------------------


def test_reports_match_the_results() -> None:
    assert (FOLDER / "report.md").read_text() == report.text(RESULTS, COUNTS)
    assert (FOLDER / "roofline.md").read_text() == roofline.text(COUNTS)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_blocks_match_the_results(page: Path) -> None:
    text = page.read_text()
    assert report.fill(page, FOLDER, RESULTS, COUNTS) == text
    assert len(report.BLOCK.findall(text)) == text.count("from benchmarks/results/")


def test_readme_shows_figures_and_chart_of_a_device() -> None:
    text = (ROOT / "README.md").read_text()
    names = {name for _, _, name, _ in report.BLOCK.findall(text)} & RESULTS.keys()
    assert names
    assert all(f"benchmarks/results/{name}-cases.png" in text for name in names)


def test_charts_match_the_results() -> None:
    for name, result in RESULTS.items():
        for part in report.CHARTS:
            with Image.open(FOLDER / f"{name}-{part}.png") as picture:
                assert picture.text["Description"] == charts.digest(result), (name, part)


# ---- several devices -----------------------------------------------------------------------------


def test_devices_are_merged(root: Path) -> None:
    folder = root / "benchmarks/results"
    report.main(["--merge"])
    readme, page = (root / "README.md").read_text(), (root / "docs/page.md").read_text()
    assert readme.startswith("before\n<!-- figures from")
    assert readme.endswith("<!-- end -->\nafter\n")
    assert "\nold\n" not in readme + page
    assert page.count("\n| a |") == 4
    assert (
        f"](../benchmarks/results/{results.path_of(cpu_result(), folder).stem}-cases.png)\n" in page
    )
    assert (folder / "roofline.md").read_text() == roofline.text(COUNTS)

    results.write(results.path_of(gpu_result(), folder), gpu_result())
    for _ in range(2):  # the second run replaces the files of the first
        report.main(["--merge"])
        assert (root / "README.md").read_text() == readme
        assert (root / "docs/page.md").read_text() == page
        text = (folder / "report.md").read_text()
        assert "## pretend-gpu-9\n" in text
        assert "| a | fp32 | NCHW | triton |" in text
        assert "of copy" in text
        assert "(pretend-gpu-9-cases.png)" in text
        with Image.open(folder / "pretend-gpu-9-cases.png") as picture:
            assert picture.size > (600, 300)


def test_speedups_are_baselines_over_at_fused() -> None:
    row = {"backend": "cpu", "case": "a", "dtype": "fp32", "layout": "NCHW", "pass": "forward"}
    ms = [{"floor": 1, "at_fused": 2, "compile": 3, "eager": 8}]
    ms += [{"floor": 1, "at_fused": 1, "compile": 3, "eager": 9}]
    text = tables.cases([row | {"ms": ms[0]}, row | {"case": "b", "ms": ms[1]}])
    assert "| a | fp32 | NCHW | 1.00 | 2.00 | 4.0x | 1.5x |" in text
    assert "| forward | 2 | 6.0x (4.0x to 9.0x) | 2.1x (1.5x to 3.0x) |" in text


@pytest.mark.parametrize("result", [cpu_result(), gpu_result()], ids=["cpu", "gpu"])
def test_headline_figures_are_those_of_the_tables(result: Result) -> None:
    line, _, *table = report.figures(result)
    version, threads = result["versions"]["torch"].partition("+")[0], result["threads"]
    assert line.startswith(result["device"])
    assert (f", {threads} threads, " in line) == (result["kind"] == "cpu")
    assert f", torch {version}, {result['date']}. " in line
    assert " over 12 settings of case, dtype and layout. " in line
    assert len(table) == 2 + 5
    ours = [row["ms"] for row in result["parts"]["cases"] if row["pass"] == "forward"]
    ratios = [ms["compile"] / ms["at_fused"] for ms in ours]
    assert f" ({min(ratios):.1f}x to {max(ratios):.1f}x) |" in table[2]
    peaks = result["parts"]["steps"][0]["bytes"]
    less = f"{peaks['prepared'] / peaks['eager'] - 1:+.1%}"
    assert table[5] == f"| peak memory of a step, WRN-16-2 to WRN-16-1 | {less} |  |"


def damaged(change: Callable[[Result], Any]) -> str:
    result = cpu_result()
    change(result)
    return json.dumps(result)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("damaged.json", damaged(lambda r: None)[:-100]),
        ("damaged.json", damaged(lambda r: r.update(schema=0))),
        ("damaged.json", damaged(lambda r: r["parts"]["calls"].append(3))),
        ("damaged.json", damaged(lambda r: r["parts"]["cases"][0]["ms"].update(eager=-1.0))),
        ("damaged.json", damaged(lambda r: r["parts"].update(other=[]))),
        ("roofline.json", '{"parts": {"rows": [{}]}}'),
    ],
)
def test_damaged_files_raise_one_line_errors(root: Path, file: str, text: str) -> None:
    (root / "benchmarks/results" / file).write_text(text)
    with pytest.raises(SystemExit, match=rf"benchmarks\.report: .*{file}: not ") as error:
        report.main(["--merge"])
    assert "\n" not in str(error.value)
    assert "old" in (root / "README.md").read_text()
    assert not (root / "benchmarks/results/report.md").exists()


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        (block("absent"), "page.md needs benchmarks/results/absent.json, which does not exist"),
        (block("roofline", "speed "), "page.md: 'speed' is not a kind of block; use figures, "),
    ],
)
def test_wrong_markers_raise_one_line_errors(root: Path, marker: str, message: str) -> None:
    (root / "docs/page.md").write_text(marker)
    with pytest.raises(SystemExit, match=message):
        report.main(["--merge"])
    assert "old" in (root / "README.md").read_text()


# ---- measuring -----------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure few rounds of small inputs without torch.compile: the times do not matter here."""
    monkeypatch.setattr(Timer, "min_rounds", 1)
    monkeypatch.setattr(Timer, "max_rounds", 1)
    for case in CASES:
        monkeypatch.setitem(CASES, case, (8, [(4, 6, 8), (2, 2, 4)]))
    for part, settings in {"sizes": [(1, 1), (4, 2)], "steps": [("wrn",)]}.items():
        monkeypatch.setitem(measure.PARTS, part, (measure.PARTS[part][0], settings))
    monkeypatch.setattr(steps, "NETWORKS", {"wrn": lambda: steps.wrn(batch=2)})
    monkeypatch.setattr(report, "NETWORKS", steps.NETWORKS)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.parametrize("program", [quick, report, roofline, train_step])
def test_help_is_printed(program: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        program.main(["--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m {program.__name__} [-h]")


@pytest.mark.parametrize("layout", ["NCHW", "channels_last", "tokens"])
def test_eager_losses_match_at_fused(layout: str) -> None:
    inputs = Inputs.make((8, [(4, 6, 14), (2, 2, 14)]), layout=layout)
    losses = eager_losses, at_fused.at_loss
    if layout == TOKENS:
        losses = eager_token_losses, partial(at_fused.at_loss, **TOKEN_OPTIONS)
    values = [inputs.step(loss, backward=False)() for loss in losses]
    gradients = [inputs.step(loss)() for loss in losses]
    torch.testing.assert_close(*values, rtol=1e-5, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-8)


@pytest.mark.exhaustive
@pytest.mark.usefixtures("tiny")
def test_program_measures_all_parts(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = root / "benchmarks/results"
    results.path_of(cpu_result(), folder).unlink()
    for page in report.pages(root):
        page.write_text("no blocks\n")
    report.main([])
    devices = results.load_all(folder)
    assert sorted(result["kind"] for result in devices.values()) == sorted(DEVICES)
    assert all(result["parts"].keys() == measure.PARTS.keys() for result in devices.values())
    text, printed = (folder / "report.md").read_text(), capsys.readouterr().out
    for part in tables.PARTS.values():
        assert f"### {part.title}\n" in text
        assert f"\n{part.title}\n\n| " in printed


def test_each_back_end_has_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "backends", lambda device: ["cpu", "eager"])
    used = []
    programs = [
        {name: lambda: used.append(backend_by_device()["cpu"])} for name in ("eager", "at_fused")
    ]
    contexts = measure.backend_contexts("cpu")
    rows = Comparison({"shape": [1]}, *programs, Timer(), contexts, 0).rows()
    assert [row["backend"] for row in rows] == ["cpu", "eager"]
    assert all(row["shape"] == [1] and row["ms"].keys() == {"eager", "at_fused"} for row in rows)
    assert rows[0]["ms"]["eager"] == rows[1]["ms"]["eager"]
    # Both programs run on the first back end, at_fused alone on the second.
    assert sorted(used) == sorted(["cpu", "cpu", "eager"] * (len(used) // 3))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> measure.GraphTimer:
    """Return a GPU's timer on a stand-in for CUDA, in which an operator takes one unit of time."""
    pretend_cuda.install(monkeypatch)
    monkeypatch.setattr(measure, "FLUSH_BYTES", 64)
    timer = measure.GraphTimer("cpu")
    monkeypatch.setattr(measure, "timer_for", lambda device: timer)
    return timer


def test_graph_replay_does_not_call_the_program(graphs: measure.GraphTimer) -> None:
    x, calls = torch.zeros(4), []
    run, reason = graphs.prepare(lambda: calls.append(x.add_(1).mul_(1)))
    assert (len(calls), reason) == (2 * measure.REPEATS, "")  # a warm-up and the capture
    assert graphs.measure(run) == graphs.measure(run) == 2  # without the reads that flush the cache
    assert len(calls) == 2 * measure.REPEATS
    assert x[0] == 4 * measure.REPEATS


def test_capture_errors_are_reported(
    graphs: measure.GraphTimer,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    x = torch.ones(4)
    programs = {"eager": lambda: x.sum().item()}, {"at_fused": lambda: x.abs().neg()}
    setting = {"pairs": 1, "shape": [1], "pass": "forward"}
    calls = Comparison(setting, *programs, graphs, measure.backend_contexts("cpu"), 0)
    monkeypatch.setitem(measure.PARTS, "calls", (lambda device: calls, [()]))
    path = results.measure("cpu", {"calls": [()]}, None)
    (row,) = results.load(path)["parts"]["calls"]
    assert row["uncaptured"] == {"eager": "operation not permitted when stream is capturing"}
    assert row["ms"]["at_fused"] == 2
    assert graphs.prepare(programs[1]["at_fused"])[1] == ""
    shown = row | {"ms": {"eager": 4.0, "at_fused": 2.0}}
    assert tables.times(shown, "eager", "at_fused") == ["4.00*", "2.00"]
    assert tables.speedups(shown, ["eager"]) == ["2.0x*"]
    message = "\\* eager: operation not permitted when stream is capturing\n"
    assert capsys.readouterr().out.endswith(message)


def test_gpu_is_compared_with_a_copy_of_equal_bytes(graphs: measure.GraphTimer) -> None:
    comparison = measure.compare_case("cpu", *SETTINGS[0], "forward")
    copy, moved = comparison.others["copy"], comparison.setting["bytes"]
    assert 2 * copy.args[0].nbytes == moved["copy"] == moved["at_fused"]
    assert graphs.measure(graphs.prepare(copy)[0]) == 1
    assert tables.copy_rate({"bytes": moved, "ms": {"copy": 1.0, "at_fused": 2.0}}) == ["50%"]


def test_joined_read_of_a_list_is_one_launch(graphs: measure.GraphTimer) -> None:
    inputs = Inputs.make((2, [(4, 6, 8), (2, 2, 4)]), layout="channels_last")
    assert graphs.measure(graphs.prepare(inputs.reader(joined=True))[0]) == 1
    assert graphs.measure(graphs.prepare(inputs.reader())[0]) == 4


def test_memory_is_gradient_and_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    (row,) = measure.compare_memory("cpu", 8).rows()
    assert row["gradient"] < row["bytes"]["at_fused"] < 1.1 * row["gradient"]
    assert row["bytes"]["eager"] > 2 * row["gradient"]


def test_installed_package_is_measured(tmp_path: Path) -> None:
    # The checkout comes first on sys.path, and may lack the compiled libraries.
    files = {
        "checkout/benchmarks/__init__.py": (ROOT / "benchmarks/__init__.py").read_text(),
        "checkout/benchmarks/which.py": "import at_fused\n",
        "checkout/at_fused/__init__.py": "print('checkout')",
        "installed/at_fused/__init__.py": "print('installed')",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    installed = {"PYTHONPATH": str(tmp_path / "installed")}
    printed = output_of(tmp_path / "checkout", "-m", "benchmarks.which", **installed)
    assert printed == "installed\n"
