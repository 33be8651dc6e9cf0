"""at-fused-train --eval: which images a network is judged by, and which it is not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pictures import Noise, needs_torchvision, open_data, save_network, write_pictures

from at_fused.train.cli import evaluate
from at_fused.train.config import ConfigError
from at_fused.train.data import inspect
from at_fused.train.networks import build

pytestmark = needs_torchvision
Judge = Callable[..., str]


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Judge:
    """Evaluates a network of a folder, whose root was relative, from another folder."""
    monkeypatch.chdir(tmp_path)
    for part in ("train", "val"):
        write_pictures(tmp_path / "pets", part, ("ant", "bee"), 3)
    (tmp_path / "pets/val/bee/0.png").write_bytes(b"no picture")
    images = {"data": "folder", "root": "pets", "image_size": 8, "skip_unreadable": 1}
    data = open_data("folder", "pets", image_size=8, pictures=inspect("pets"))
    save_network(Path("a.pt"), "wrn-10-1-b4", build("wrn-10-1-b4", 2, 3), data, images=images)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")

    def said(**given: Any) -> str:
        try:
            return evaluate(tmp_path / "a.pt", given)
        except (ConfigError, OSError) as error:
            return f"error: {error}"

    return said


def test_images_are_those_of_the_run(judge: Judge, tmp_path: Path) -> None:
    """Those that it left out are left out, and counted; those to train with are not read."""
    head = f"{tmp_path}/a.pt: wrn-10-1-b4 on folder, 5 images (1 that cannot be read are left out)"
    (tmp_path / "pets/train/bee/0.png").write_bytes(b"no picture")
    assert judge().startswith(head)
    assert "1 picture cannot be read, allowed is 0" in judge(skip_unreadable=0)


def test_other_images_are_refused(judge: Judge, tmp_path: Path) -> None:
    file, pets = tmp_path / "a.pt", tmp_path / "pets"
    assert f"{file}: mean: got 0.485, 0.456, 0.406, allowed is a number for" in judge(data="digits")
    for part in ("train", "val"):
        (pets / part / "bee").rename(pets / part / "aardvark")
    assert "class 0 of the network is 'ant', of the data 'aardvark'; both" in judge()
    (pets / "train").rename(pets / "gone")
    assert judge().endswith(f"No such file or directory: '{pets}/train'")


def test_own_data_that_are_gone_are_named(
    judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pets", SimpleNamespace(data=lambda root: [Noise()] * 2))
    data = replace(open_data("pets:data", "here"), mean=(0.0,))
    images, model = {"data": "pets:data", "root": "here"}, build("wrn-10-1-b4", 3, 1)
    save_network(tmp_path / "a.pt", "wrn-10-1-b4", model, data, images=images)
    assert "the network takes images of 1 channels, the data have 2" in judge()
    monkeypatch.delitem(sys.modules, "pets")
    assert f"{tmp_path / 'a.pt'}: data: 'pets:data' cannot be imported" in judge()
