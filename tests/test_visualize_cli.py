"""python -m at_fused.visualize: a run of at-fused-train as a picture."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import at_fused
from at_fused import visualize
from at_fused.train.data import load_digits
from at_fused.train.experiment import load, save
from at_fused.train.maps import OF_A_RUN, main, titles
from at_fused.train.wrn import WRN


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as at-fused-train leaves it, of networks that never trained."""
    folder = tmp_path_factory.mktemp("visualize") / "run"
    folder.mkdir()
    torch.manual_seed(0)
    for name in ("alone_seed0", "at_fused_seed0", "at_eager_seed0", "alone_seed1"):
        student = WRN(10, 1, in_channels=1, base=4)
        save(student, folder / f"student_{name}.pt", 12, labelled=torch.arange(3))
    save(WRN(16, 1, in_channels=1, base=8), folder / "teacher.pt", 12)
    save(WRN(10, 1, in_channels=1, base=4), folder / "larger.pt", 16)
    return folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that the command line saves."""
    figures: list[Figure] = []
    write = visualize.save

    def keep(fig: Figure, path: Path) -> None:
        figures.append(fig)
        write(fig, path)

    monkeypatch.setattr(visualize, "save", keep)
    return figures


def test_a_run_is_drawn_by_the_command(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "maps.svg"
    command = [sys.executable, "-m", "at_fused.visualize", str(run), "--out", str(out)]
    # Elsewhere, so that the package at hand runs and not a checkout in the current folder.
    done = subprocess.run(
        [*command, "--images", "1"], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{out}\n"
    assert out.read_text().count("<svg") == 1


def test_columns_are_the_networks_and_rows_the_digits(run: Path, drawn: list[Figure]) -> None:
    main([str(run), "--images", "3"])
    assert (run / "attention.png").stat().st_size > 10_000
    (fig,) = drawn
    axes = np.array(fig.axes[: 6 * 9]).reshape(6, 9)
    images, labels, split = load_digits(12)
    first = [f"digit {int(label)}" for label in labels[split.test[:3]]]
    heads = ["student\nalone", "student + AT", "teacher"]
    assert [ax.get_title() for ax in axes[0]] == [first[0], *heads, "", first[1], *heads]
    assert [ax.get_title() for ax in axes[3]] == [first[2], *heads, *[""] * 5]
    assert [ax.get_ylabel() for ax in axes[:, 0]] == [
        f"groups.{i}\n{size}x{size}" for i, size in enumerate((12, 6, 3))
    ] * 2
    # The features that the networks return are those that were drawn, each network's its own.
    for place, name in enumerate(OF_A_RUN, start=1):
        model, _ = load(run / name)
        with torch.no_grad():
            _, features = model(images[split.test[:3]])
        for stage, feature in enumerate(features):
            q = feature[2].square().mean(0)
            np.testing.assert_allclose(
                axes[3 + stage][place].images[1].get_array(),
                q / q.square().mean().sqrt(),
                rtol=1e-4,
            )


def test_files_and_layers_are_drawn_as_given(
    run: Path, drawn: list[Figure], tmp_path: Path
) -> None:
    files = [str(run / f"student_{name}.pt") for name in ("at_eager_seed0", "alone_seed0")]
    main([*files, "--images=1", "--layers", "stem", "--out", str(tmp_path / "a.png")])
    assert [ax.get_title() for ax in drawn[0].axes[:3]] == [
        "digit 0",
        "student\n+ AT, eager",
        "student\nalone",
    ]
    assert drawn[0].axes[0].get_ylabel() == "stem\n12x12"


def test_titles_tell_files_apart() -> None:
    def of(*names: str) -> list[str]:
        return titles([Path("run") / f"{name}.pt" for name in names])

    assert of("student_alone_seed0", "teacher", "mine") == ["student alone", "teacher", "mine"]
    assert of("student_alone_seed0", "student_alone_seed12", "teacher") == [
        "student alone, seed 0",
        "student alone, seed 12",
        "teacher",
    ]
    assert of("teacher", "../b/teacher") == ["run/teacher.pt", "run/../b/teacher.pt"]
    with pytest.raises(ValueError, match="given twice"):
        of("teacher", "teacher")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN/none.pt"], "argument CHECKPOINT: RUN/none.pt: no such file"),
        (["RUN/text.pt"], "CHECKPOINT: RUN/text.pt: not a checkpoint of at-fused-train (Unpick"),
        (["RUN/other.pt"], "CHECKPOINT: RUN/other.pt: not a checkpoint of at-fused-train (KeyE"),
        (["RUN/wrong.pt"], "CHECKPOINT: RUN/wrong.pt: not a checkpoint of at-fused-train (Runt"),
        (["RUN/teacher.pt", "RUN/larger.pt"], "images of one size for all, got [12, 16]"),
        (["RUN/teacher.pt", "RUN/teacher.pt"], "argument CHECKPOINT: a file is given twice"),
        (["RUN", "--layers", "group.0"], "argument --layers: layers: WRN has no module 'group.0'"),
        (["RUN", "--layers", "head"], "argument --layers: layer 'head': x must be (B, C, H, W)"),
        (["RUN", "--images", "0"], "argument --images: got '0', allowed is a whole number from 1"),
        (["RUN", "--out", "RUN/maps.pdf"], "argument --out: got 'RUN/maps.pdf', allowed is a .png"),
        (["RUN", "--out", "RUN/no/maps.png"], "argument --out: got 'RUN/no/maps.png', allowed is"),
        ([], "the following arguments are required: CHECKPOINT"),
    ],
)
def test_a_bad_argument_is_one_clear_error(
    arguments: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "text.pt").write_text("no weights")
    torch.save({"weights": torch.ones(2)}, run / "other.pt")
    saved = torch.load(run / "teacher.pt", weights_only=True)
    torch.save({**saved, "network": {**saved["network"], "width": 2}}, run / "wrong.pt")
    with pytest.raises(SystemExit) as stop:
        main([a.replace("RUN", str(run)) for a in arguments])
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.replace("RUN", str(run)) in last


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, types\n"
        "stub = types.ModuleType('at_fused')\n"
        f"stub.__path__ = {list(at_fused.__path__)!r}\n"
        "sys.modules['at_fused'] = stub\n"
        "from at_fused.train.maps import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as e:\n    assert e.code == 0\n"
        "print('LOADED', {'torch', 'numpy', 'sklearn', 'matplotlib'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "--layers" in done.stdout, done.stderr
    assert "LOADED set()" in done.stdout
