"""python -m at_fused.visualize: figures of runs of at-fused-train."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from image_data import Noise, needs_torchvision, open_data, save_network, write_images

from at_fused import visualize
from at_fused.train import checkpoints
from at_fused.train.config import resolve, to_toml
from at_fused.train.data import scan_images
from at_fused.train.networks import build
from at_fused.train.saved import load_network
from at_fused.visualize.__main__ import checkpoints_of, main, titles


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create the folder of a run, with untrained networks."""
    folder = tmp_path_factory.mktemp("visualize") / "run"
    folder.mkdir()
    torch.manual_seed(0)

    def save(path: Path, network: str, size: int, name: str) -> None:
        data = open_data("digits", image_size=size)
        save_network(path, network, build(network, 10, 1), data, run=name)

    for name in ("none-seed0", "at-seed0", "at+kd-seed0", "none-seed1"):
        save(folder / f"student_{name}.pt", "wrn-10-1-b4", 12, name)
    save(folder / "teacher.pt", "wrn-16-1-b8", 12, "teacher")
    save(folder / "larger.pt", "wrn-10-1-b4", 16, "at-seed0")
    config = resolve({"image_size": 12})
    (folder / "config.toml").write_text(to_toml(config))
    layers = [[f"groups.{i}"] * 2 for i in range(3)]
    (folder / "run.json").write_text(json.dumps({"layers": layers}))
    return folder


def test_command_draws_attention_maps(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "maps.svg"
    files = [str(run / f"student_{name}.pt") for name in ("at+kd-seed0", "none-seed0")]
    monkeypatch.setattr(sys, "argv", [".", *files, f"--out={out}", "--images=1", "--layers=stem"])
    monkeypatch.delitem(sys.modules, "at_fused.visualize.__main__")
    runpy.run_module("at_fused.visualize", run_name="__main__")  # as python -m does
    assert capsys.readouterr() == (f"{out}\n", "")
    # SVG draws text as paths, with a comment for each.
    assert all(f"<!-- {text} -->" in out.read_text() for text in ("AT + KD", "stem", "12x12"))


def test_figure_has_a_column_per_network_and_a_row_per_stage(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, save = [], visualize.save
    monkeypatch.setattr(visualize, "save", lambda *args: (calls.append(args), save(*args)))
    main([str(run), "--images", "3"])
    assert (run / "attention.png").stat().st_size > 10_000
    ((fig, _),) = calls
    axes = np.array(fig.axes[: 6 * 9]).reshape(6, 9)
    data = open_data("digits", image_size=12)
    ((images, labels, _),) = data.evaluate.batches([torch.arange(3)], None)
    digits = [str(int(label)) for label in labels]
    heads = ["student\nalone", "AT", "teacher"]
    assert [ax.get_title() for ax in axes[0]] == [digits[0], *heads, "", digits[1], *heads]
    assert [ax.get_title() for ax in axes[3]] == [digits[2], *heads, *[""] * 5]
    assert [ax.get_ylabel() for ax in axes[:, 0]] == [
        f"groups.{i}\n{size}x{size}" for i, size in enumerate((12, 6, 3))
    ] * 2
    # Each column shows the features of its own network.
    for column, path in enumerate(checkpoints_of(run), start=1):
        model, _ = load_network(path)
        with torch.no_grad():
            _, features = model(images)
        for stage, feature in enumerate(features):
            q = feature[2].square().mean(0)
            actual = axes[3 + stage][column].images[1].get_array()
            np.testing.assert_allclose(actual, q / q.square().mean().sqrt(), rtol=1e-4)


@needs_torchvision
@pytest.mark.parametrize("is_custom", [False, True])
def test_images_are_those_of_the_run(
    is_custom: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Expect denormalised images of a folder, without skipped ones, or scaled custom images."""
    calls: list[Any] = []
    figure = visualize.figure
    monkeypatch.setattr(
        visualize, "figure", lambda *x, **y: (calls.append((x[0], y)), figure(*x, **y))[1]
    )
    mean, std = (0.4, 0.5, 0.6), (0.3, 0.3, 0.2)
    options: dict[str, Any] = {"data": "folder", "root": "pets", "mean": mean, "std": std}
    monkeypatch.chdir(tmp_path)
    if is_custom:
        options = {"data": "pets:data"}
        noise = Noise(12, ["ant", "bee", "cat"], transform=lambda x: x[:1])
        pets = SimpleNamespace(data=lambda root: [noise] * 2)
        monkeypatch.setitem(sys.modules, "pets", pets)
        data = open_data("pets:data", "")
    else:
        for part in ("train", "val"):
            write_images(tmp_path / "pets", part, ("ant", "bee"), 3)
        (tmp_path / "pets/val/ant/0.png").write_bytes(b"not an image")
        scan = scan_images("pets")
        (tmp_path / "pictures.json").write_text(json.dumps(asdict(scan)))
        options["image_size"] = 8
        data = open_data("folder", "pets", image_size=8, mean=mean, std=std, scan=scan)
    path, name = tmp_path / "student_at-seed0.pt", "wrn-10-1-b4"

    def save() -> None:
        model = build(name, data.classes, data.channels)
        save_network(path, name, model, data, images=options, run="at-seed0")

    save()
    (tmp_path / "config.toml").write_text(to_toml(resolve(options)))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    main([str(path), "--images=3", "--layers=stem"])
    ((images, keywords),) = calls
    ((expected, _, _),) = data.evaluate.batches([torch.arange(3)], None)
    assert torch.equal(images, expected)
    assert keywords["names"] == (["ant", "bee", "cat"] if is_custom else ["ant", "ant", "bee"])
    assert (keywords["mean"], keywords["std"]) == ((None, None) if is_custom else (mean, std))
    if is_custom:
        noise.transform = lambda x: x
        data, message = open_data("pets:data", ""), "images must be a tensor (B, 1, H, W) or "
        save()
    else:
        message = "cannot read image "
        for image in (tmp_path / "pets/val/ant").iterdir():
            image.write_bytes(b"damaged")
    with pytest.raises(SystemExit):
        main([str(path), "--layers=stem"])
    assert f"error: {message}" in capsys.readouterr().err


def test_titles_distinguish_files() -> None:
    def titles_of(*names: str) -> list[str]:
        return titles([Path("run") / f"{name}.pt" for name in names])

    assert titles_of("student_at+kd-seed0", "teacher", "mine") == ["AT + KD", "teacher", "mine"]
    assert titles_of("teacher", "../b/teacher") == ["run/teacher.pt", "run/../b/teacher.pt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN/none.pt"], "No such file or directory: 'RUN/none.pt'"),
        (["RUN/text.pt"], "RUN/text.pt: truncated, damaged, or not from this version"),
        (["RUN/wrong.pt"], "RUN/wrong.pt: not a network of at-fused-train (Error(s)"),
        (["RUN/teacher.pt", "RUN/larger.pt"], "must take images of one size, got [12, 16]"),
        (["RUN", "--layers", "group.0"], "layers: WRN has no module 'group.0'"),
        (["RUN", "--layers", "head"], "layer 'head': x must be (B, C, H, W)"),
        (["RUN", "--images", "0"], "argument --images: got 0, expected an integer from 1"),
        (["RUN", "--out", "RUN/maps.txt"], "Format 'txt' is not supported (supported formats: "),
        (["RUN", "--out", "RUN/no/maps.png"], "No such file or directory: 'RUN/no/maps.png'"),
        ([], "the following arguments are required: CHECKPOINT"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "text.pt").write_text("no weights")
    saved = torch.load(run / "teacher.pt", weights_only=True)
    checkpoints.save(run / "wrong.pt", "network", saved | {"network": "wrn-16-2"})
    with pytest.raises(SystemExit) as stop:
        main([a.replace("RUN", str(run)) for a in arguments])
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.replace("RUN", str(run)) in last
