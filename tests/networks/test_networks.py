"""docs/networks.md says what the script finds now."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.stacks


def test_the_page_of_networks() -> None:
    torch.set_num_threads(1)
    script = runpy.run_path(str(ROOT / "scripts/networks.py"))
    top, _, last = (ROOT / "docs/networks.md").read_text().partition(script["SWEEP"])
    assert script["page"]() + "\n" == top
    assert "- sensible: " in last
    assert "WRONG" not in last
