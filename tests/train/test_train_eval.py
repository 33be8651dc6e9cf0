"""at-fused-train --eval: the images on which a saved network is evaluated."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from image_data import Noise, needs_torchvision, open_data, save_network, write_images

from at_fused.train.cli import evaluate
from at_fused.train.config import ConfigError
from at_fused.train.data import scan_images
from at_fused.train.networks import build

pytestmark = needs_torchvision
Evaluate = Callable[..., str]


@pytest.fixture
def evaluate_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluate:
    """Return a function that evaluates a saved network of a folder in another working folder."""
    monkeypatch.chdir(tmp_path)
    for part in ("train", "val"):
        write_images(tmp_path / "pets", part, ("ant", "bee"), 3)
    (tmp_path / "pets/val/bee/0.png").write_bytes(b"not an image")
    images = {"data": "folder", "root": "pets", "image_size": 8, "skip_unreadable": 1}
    data = open_data("folder", "pets", image_size=8, scan=scan_images("pets"))
    save_network(Path("a.pt"), "wrn-10-1-b4", build("wrn-10-1-b4", 2, 3), data, images=images)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")

    def run(**options: Any) -> str:
        try:
            return evaluate(tmp_path / "a.pt", options)
        except (ConfigError, OSError) as error:
            return f"error: {error}"

    return run


def test_evaluation_uses_the_images_of_the_run(evaluate_network: Evaluate, tmp_path: Path) -> None:
    """Images that the run skipped are skipped and counted. Training images are not read."""
    start = f"{tmp_path}/a.pt: wrn-10-1-b4 on folder, 5 images (1 unreadable, skipped)"
    (tmp_path / "pets/train/bee/0.png").write_bytes(b"not an image")
    assert evaluate_network().startswith(start)
    message = "got 1 unreadable image, expected at most 0"
    assert message in evaluate_network(skip_unreadable=0)


def test_images_of_other_classes_are_refused(evaluate_network: Evaluate, tmp_path: Path) -> None:
    file, pets = tmp_path / "a.pt", tmp_path / "pets"
    message = f"{file}: mean: got 0.485, 0.456, 0.406, expected a number for"
    assert message in evaluate_network(data="digits")
    for part in ("train", "val"):
        (pets / part / "bee").rename(pets / part / "aardvark")
    assert "class 0 is 'ant' in the network, 'aardvark' in the data; both" in evaluate_network()
    (pets / "train").rename(pets / "gone")
    assert evaluate_network().endswith(f"No such file or directory: '{pets}/train'")


def test_missing_custom_data_is_named(
    evaluate_network: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pets", SimpleNamespace(data=lambda root: [Noise()] * 2))
    data = replace(open_data("pets:data", "here"), mean=(0.0,))
    images, model = {"data": "pets:data", "root": "here"}, build("wrn-10-1-b4", 3, 1)
    save_network(tmp_path / "a.pt", "wrn-10-1-b4", model, data, images=images)
    assert "the network takes images with 1 channels, the data have 2" in evaluate_network()
    monkeypatch.delitem(sys.modules, "pets")
    assert f"{tmp_path / 'a.pt'}: data: cannot import 'pets:data'" in evaluate_network()
