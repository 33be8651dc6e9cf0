"""The benchmark report: committed pages match committed results; measuring works on the CPU."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pretend_cuda
import pytest
import torch
from outside import output_of
from PIL import Image

import at_fused
from at_fused.backends import backend_by_device

sys.path.append(str(Path(__file__).parents[2]))
from benchmarks import ROOT, charts, measure, report, results, roofline, steps, tables
from benchmarks.cases import (
    CASES,
    DEVICES,
    KINDS,
    TOKEN_OPTIONS,
    TOKENS,
    Inputs,
    popular_losses,
    popular_token_losses,
)
from benchmarks.measure import Clock, Comparison
from benchmarks.results import FOLDER, Result

RESULTS = results.load_all(FOLDER)
COUNTS = roofline.load()
IN_README = [name for _, _, name, _ in report.MARKED.findall(report.README.read_text())]


def cpu_result() -> Result:
    """Return the result in README.md, which has all parts."""
    return copy.deepcopy(next(RESULTS[name] for name in IN_README if name in RESULTS))


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


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the results of one device and a README, which the program uses in the test."""
    shutil.copy(roofline.FILE, tmp_path)
    path = results.path_of(cpu_result(), tmp_path)
    results.write(path, cpu_result())
    name = path.stem
    readme = f"before\n<!-- from benchmarks/results/{name}.json -->\nold\n<!-- end -->\nafter\n"
    (tmp_path / "README.md").write_text(readme)
    for module in (report, results):
        monkeypatch.setattr(module, "FOLDER", tmp_path)
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    return tmp_path


# ---- committed files -----------------------------------------------------------------------------


def test_reports_match_the_results() -> None:
    assert (FOLDER / "report.md").read_text() == report.text(RESULTS, COUNTS)
    assert roofline.FILE.with_suffix(".md").read_text() == roofline.text(COUNTS)
    text = report.README.read_text()
    assert report.in_readme(text, RESULTS, COUNTS) == text
    assert len(IN_README) == 3 == text.count("from benchmarks/results/")
    (picture,) = {f"benchmarks/results/{name}-cases.png" for name in IN_README if name in RESULTS}
    assert f"({picture})" in text


def test_pictures_match_the_results() -> None:
    for name, result in RESULTS.items():
        for part in report.DRAWN:
            with Image.open(FOLDER / f"{name}-{part}.png") as picture:
                assert picture.text["Description"] == charts.digest(result), (name, part)


# ---- several devices -----------------------------------------------------------------------------


def test_devices_are_merged(folder: Path) -> None:
    report.main(["--merge"])
    readme = (folder / "README.md").read_text()
    assert readme.startswith("before\n<!-- from")
    assert readme.endswith("<!-- end -->\nafter\n")
    assert "\nold\n" not in readme
    assert readme.count("\n| a |") == 4

    results.write(results.path_of(gpu_result(), folder), gpu_result())
    for _ in range(2):  # the second run replaces the files of the first
        report.main(["--merge"])
        assert (folder / "README.md").read_text() == readme
        text = (folder / "report.md").read_text()
        assert "## pretend-gpu-9\n" in text
        assert "| a | fp32 | NCHW | triton |" in text
        assert "of copy" in text
        assert "(pretend-gpu-9-cases.png)" in text
        with Image.open(folder / "pretend-gpu-9-cases.png") as picture:
            assert picture.size > (600, 300)


def test_speedups_divide_by_our_time() -> None:
    row = {"backend": "cpu", "case": "a", "dtype": "fp32", "layout": "NCHW", "pass": "forward"}
    ms = [{"floor": 1, "at_fused": 2, "compile": 3, "eager": 8}]
    ms += [{"floor": 1, "at_fused": 1, "compile": 3, "eager": 9}]
    text = tables.cases([row | {"ms": ms[0]}, row | {"case": "b", "ms": ms[1]}])
    assert "| a | fp32 | NCHW | 1.00 | 2.00 | 4.0x | 1.5x |" in text
    assert "| forward | 2 | 6.0x | 4.0x | 2.1x | 1.5x |" in text


# ---- damaged files -------------------------------------------------------------------------------


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
def test_damaged_files_raise_one_line_errors(folder: Path, file: str, text: str) -> None:
    (folder / file).write_text(text)
    with pytest.raises(SystemExit, match=rf"benchmarks\.report: .*{file}: not ") as error:
        report.main(["--merge"])
    assert "\n" not in str(error.value)
    assert "old" in (folder / "README.md").read_text()
    assert not (folder / "report.md").exists()


# ---- measuring -----------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rounds of small inputs without torch.compile: the times do not matter here."""
    monkeypatch.setattr(Clock, "least", 1)
    monkeypatch.setattr(Clock, "most", 1)
    for case in CASES:
        monkeypatch.setitem(CASES, case, (8, [(4, 6, 8), (2, 2, 4)]))
    for part, settings in {"sizes": [(1, 1), (4, 2)], "steps": [("wrn",)]}.items():
        monkeypatch.setitem(measure.PARTS, part, (measure.PARTS[part][0], settings))
    monkeypatch.setattr(steps, "NETWORKS", {"wrn": lambda: steps.wrn(batch=2)})
    monkeypatch.setattr(report, "NETWORKS", steps.NETWORKS)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.parametrize("layout", ["NCHW", "channels_last", "tokens"])
def test_eager_losses_match_at_fused(layout: str) -> None:
    inputs = Inputs.make((8, [(4, 6, 14), (2, 2, 14)]), layout=layout)
    both = popular_losses, at_fused.at_loss
    if layout == TOKENS:
        both = popular_token_losses, partial(at_fused.at_loss, **TOKEN_OPTIONS)
    values = [inputs.step(loss, backward=False)() for loss in both]
    gradients = [inputs.step(loss)() for loss in both]
    torch.testing.assert_close(*values, rtol=1e-5, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-8)


@pytest.mark.exhaustive
@pytest.mark.usefixtures("tiny")
def test_program_measures_all_parts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results.path_of(cpu_result(), folder).unlink()
    (folder / "README.md").write_text("no tables\n")
    report.main([])
    by_device = results.load_all(folder)
    assert sorted(result["kind"] for result in by_device.values()) == sorted(DEVICES)
    assert all(result["parts"].keys() == measure.PARTS.keys() for result in by_device.values())
    text, output = (folder / "report.md").read_text(), capsys.readouterr().out
    for title, _ in tables.PARTS.values():
        assert f"### {title}\n" in text
        assert f"\n{title}\n\n| " in output


def test_each_back_end_has_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "backends", lambda device: ["cpu", "eager"])
    calls = []
    programs = [
        {name: lambda: calls.append(backend_by_device()["cpu"])} for name in ("eager", "at_fused")
    ]
    rows = Comparison({"shape": [1]}, *programs, Clock(), measure.on("cpu"), 0).rows()
    assert [row["backend"] for row in rows] == ["cpu", "eager"]
    assert all(row["shape"] == [1] and row["ms"].keys() == {"eager", "at_fused"} for row in rows)
    assert rows[0]["ms"]["eager"] == rows[1]["ms"]["eager"]
    # Both programs run on the first back end, at_fused alone on the second.
    assert sorted(calls) == sorted(["cpu", "cpu", "eager"] * (len(calls) // 3))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> measure.Graphs:
    """The GPU's meter on fake graphs, which take one unit of time per operator."""
    pretend_cuda.install(monkeypatch)
    monkeypatch.setattr(measure, "OTHER_BYTES", 64)
    meter = measure.Graphs("cpu")
    monkeypatch.setattr(measure, "clock", lambda device: meter)
    return meter


def test_graph_replay_does_not_call_the_program(graphs: measure.Graphs) -> None:
    x, calls = torch.zeros(4), []
    run, error = graphs.prepare(lambda: calls.append(x.add_(1).mul_(1)))
    assert (len(calls), error) == (2 * measure.REPEATS, "")  # a warm-up and the capture
    assert graphs.take(run) == graphs.take(run) == 2  # without the reads that flush the cache
    assert len(calls) == 2 * measure.REPEATS
    assert x[0] == 4 * measure.REPEATS


def test_capture_errors_are_reported(
    graphs: measure.Graphs,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    x = torch.ones(4)
    programs = {"eager": lambda: x.sum().item()}, {"at_fused": lambda: x.abs().neg()}
    settings = {"pairs": 1, "shape": [1], "pass": "forward"}
    calls = Comparison(settings, *programs, graphs, measure.on("cpu"), 0)
    monkeypatch.setitem(measure.PARTS, "calls", (lambda device: calls, [()]))
    path = results.measure("cpu", {"calls": [()]}, None)
    (row,) = results.load(path)["parts"]["calls"]
    assert row["uncaptured"] == {"eager": "operation not permitted when stream is capturing"}
    assert row["ms"]["at_fused"] == 2
    assert graphs.prepare(programs[1]["at_fused"])[1] == ""
    shown = row | {"ms": {"eager": 4.0, "at_fused": 2.0}}
    assert tables.times(shown, "eager", "at_fused") == ["4.00*", "2.00"]
    assert tables.to(shown, ["eager"]) == ["2.0x*"]
    reason = "\\* eager: operation not permitted when stream is capturing\n"
    assert capsys.readouterr().out.endswith(reason)


def test_gpu_is_compared_with_a_copy_of_equal_bytes(graphs: measure.Graphs) -> None:
    comparison = measure.at_loss("cpu", *KINDS[0], "forward")
    copy, moved = comparison.others["copy"], comparison.what["bytes"]
    assert 2 * copy.args[0].nbytes == moved["copy"] == moved["at_fused"]
    assert graphs.take(graphs.prepare(copy)[0]) == 1
    assert tables.of_copy({"bytes": moved, "ms": {"copy": 1.0, "at_fused": 2.0}}) == ["50%"]


def test_joined_read_of_a_list_is_one_launch(graphs: measure.Graphs) -> None:
    inputs = Inputs.make((2, [(4, 6, 8), (2, 2, 4)]), layout="channels_last")
    assert graphs.take(graphs.prepare(inputs.read_all(joined=True))[0]) == 1
    assert graphs.take(graphs.prepare(inputs.read_all())[0]) == 4


def test_memory_is_gradient_and_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    (row,) = measure.memory("cpu", 8).rows()
    assert row["gradient"] < row["bytes"]["at_fused"] < 1.1 * row["gradient"]
    assert row["bytes"]["eager"] > 2 * row["gradient"]


def test_installed_package_is_measured(tmp_path: Path) -> None:
    """Skip the checkout, which comes first on the path but may have no compiled libraries."""
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
    output = output_of(tmp_path / "checkout", "-m", "benchmarks.which", **installed)
    assert output == "installed\n"
