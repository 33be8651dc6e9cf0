"""The notebook in examples/: it runs, and its stored outputs are complete."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason='pip install "at_fused[test]"')
nbclient = pytest.importorskip("nbclient", reason='pip install "at_fused[test]"')
pytest.importorskip("ipykernel", reason='pip install "at_fused[test]"')

NOTEBOOK = Path(__file__).parents[2] / "examples/quickstart.ipynb"
PNG = "image/png"


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def test_stored_outputs_are_complete_and_clean() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    stored = outputs(notebook)
    assert sum(PNG in output.get("data", {}) for output in stored) == 2
    assert {output.output_type for output in stored} <= {"stream", "display_data", "execute_result"}
    text = json.dumps([{k: v for k, v in x.items() if k != "data"} for x in stored])
    assert "Warning" not in text
    assert "site-packages" not in text
    assert NOTEBOOK.stat().st_size < 300_000


def test_notebook_runs(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.pop("outputs", None) if cell.cell_type == "markdown" else cell.update(outputs=[])
    # In the checkout, at_fused may have no compiled libraries.
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    assert sum(PNG in output.get("data", {}) for output in outputs(notebook)) == 2
    assert all(output.get("name") != "stderr" for output in outputs(notebook))
