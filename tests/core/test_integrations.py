"""at_fused with torchdistill and with networks of torchvision and timm."""

from __future__ import annotations

import copy
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

# The extra "test" installs torchvision, so its absence is an error. But pip may install one built
# for CUDA next to a torch without CUDA, and then its operators do not load.
try:
    import torchvision
except (ImportError, OSError, RuntimeError) as error:
    if getattr(error, "name", "") == "torchvision":
        raise
    pytest.skip(f"torchvision does not fit this torch: {error}", allow_module_level=True)

import timm
import yaml
from image_data import write_cifar
from outside import output_of
from torchdistill.losses.registry import MIDDLE_LEVEL_LOSS_DICT, get_mid_level_loss
from torchvision import models

from at_fused import AttentionTransfer, at_loss
from at_fused.integrations.torchdistill import FusedATLoss

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Use one thread, because networks this small are slower on more."""
    torch.set_num_threads(1)


# ---- torchdistill's loss -------------------------------------------------------------------------


def pair(student: str, teacher: str, io: str = "output", **more: Any) -> dict[str, Any]:
    return {"student": {"io": io, "path": student}, "teacher": {"io": io, "path": teacher}, **more}


def make_loss(key: str, **kwargs: Any) -> nn.Module:
    return get_mid_level_loss({"key": key, "kwargs": kwargs})


def io_dicts() -> tuple[dict[str, Any], dict[str, Any]]:
    def feature(*shape: int) -> Tensor:
        return torch.randn(shape, requires_grad=True)

    student = {
        ".": {"output": feature(4, 10)},
        "a": {"output": feature(4, 3, 8, 6), "input": feature(4, 2, 8, 6)},
        "b": {"output": feature(4, 5, 4, 3)},
    }
    teacher = {
        ".": {"output": feature(4, 10)},
        "x": {"output": feature(4, 7, 8, 6), "input": feature(4, 6, 8, 6)},
        "y": {"output": feature(4, 9, 4, 3)},
    }
    return student, teacher


def leaves(*dicts: dict[str, Any]) -> list[Tensor]:
    return [x for d in dicts for path, ios in d.items() if path != "." for x in ios.values()]


PAIRS = {
    "one": pair("a", "x"),
    "two": pair("b", "y", weight=2.5),
    "three": pair("a", "x", "input", weight=0),
}


def test_import_registers_the_loss(tmp_path: Path) -> None:
    code = """
from torchdistill.common.main_util import import_dependencies
from torchdistill.losses.registry import MIDDLE_LEVEL_LOSS_DICT
print("FusedATLoss" in MIDDLE_LEVEL_LOSS_DICT)
import_dependencies(["at_fused.integrations.torchdistill"])
print("FusedATLoss" in MIDDLE_LEVEL_LOSS_DICT)
"""
    assert output_of(tmp_path, "-c", code).splitlines() == ["False", "True"]
    assert MIDDLE_LEVEL_LOSS_DICT["FusedATLoss"] is FusedATLoss


@pytest.mark.parametrize("names", [["one"], ["two"], ["one", "two", "three"]], ids="-".join)
@pytest.mark.parametrize("mode", ["code", "paper"])
def test_value_and_gradients_match_torchdistills_loss(mode: str, names: list[str]) -> None:
    student, teacher = io_dicts()
    pairs, inputs = {name: PAIRS[name] for name in names}, leaves(student, teacher)
    results = []
    for key in ("FusedATLoss", "ATLoss"):
        loss = make_loss(key, at_pairs=pairs, mode=mode)(student, teacher, torch.arange(4))
        options = {"allow_unused": True, "materialize_grads": True}
        results.append([loss, *torch.autograd.grad(loss, inputs, **options)])
    torch.testing.assert_close(*results)


def test_loss_takes_the_options_of_at_loss() -> None:
    student, teacher = io_dicts()
    teacher["t"] = {"output": torch.randn(4, 49, 6)}
    s, t, small, tokens = (
        *(student["a"]["output"], teacher["x"]["output"]),
        *(teacher["y"]["output"], teacher["t"]["output"]),
    )
    options = {"p": 4, "collapse": "max", "eps": 1e-6, "eps_mode": "add"}
    for mode in ("code", "paper"):
        loss = FusedATLoss({"one": pair("a", "x", weight=3)}, mode, **options)
        torch.testing.assert_close(loss(student, teacher), 3 * at_loss(s, t, form=mode, **options))
    assert repr(loss).startswith("FusedATLoss(one, mode='paper', collapse='max', p=4, ")
    grid = {"channel_dim": [1, -1], "skip_tokens": [0, 1], "map_size": [None, [8, 6]]}
    for path, feature, options in (("y", small, {"resize": "maps"}), ("t", tokens, grid)):
        loss = FusedATLoss({"one": pair("a", path)}, **options)
        torch.testing.assert_close(loss(student, teacher), at_loss(s, feature, **options))


ERRORS: dict[str, dict[str, Any]] = {
    "mode must be 'code' or 'paper', got 'both'": {"mode": "both"},
    r"at_pairs must be a dict.*got \[1\]": {"at_pairs": [1]},
    r"\['one'\] must be a dict with 'student' and 'teacher', each .*got": {
        "at_pairs": {"one": {"student": {}}}
    },
    "with 'path' and 'io', and optionally 'weight', got .*'wight'": (
        {"at_pairs": {"one": pair("a", "x", wight=2)}}
    ),
    r"\['weight'\] must be a number, got str": (  # YAML reads 1.0e+3 as a number, but not 1e3
        {"at_pairs": {"one": pair("a", "x", **yaml.safe_load("weight: 1e3"))}}
    ),
    "FusedATLoss has no option 'form'": {"form": "paper"},
    "FusedATLoss has no option 'weights'": {"weights": [1]},
}


@pytest.mark.parametrize("message", ERRORS)
def test_configuration_errors(message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make_loss("FusedATLoss", **{"at_pairs": PAIRS, **ERRORS[message]})


def test_feature_errors() -> None:
    student, teacher = io_dicts()
    with pytest.raises(
        ValueError,
        match=r"at_pairs\['one'\]: no output of 'z' was stored for the teacher; list 'z' under",
    ):
        FusedATLoss({"one": pair("a", "z")})(student, teacher)
    with pytest.raises(ValueError, match="no input of 'b' was stored for the student"):
        FusedATLoss({"one": pair("b", "x", "input")})(student, teacher)
    for d, path in ((student, "b"), (teacher, "y")):
        d[path]["output"] = d[path]["output"][:2]
    FusedATLoss(PAIRS)(student, teacher)
    with pytest.raises(ValueError, match="mode 'paper', got 4 for pair 0 and 2 for pair 1"):
        FusedATLoss(PAIRS, "paper")(student, teacher)


# ---- AttentionTransfer with networks of torchvision and timm -------------------------------------


def timm_vit(depth: int, embed_dim: int, **options: Any) -> nn.Module:
    size = {"img_size": 64, "patch_size": 16, "num_heads": 2}
    return timm.create_model(
        "vit_tiny_patch16_224", depth=depth, embed_dim=embed_dim, **size, **options
    )


def swin(width: int) -> nn.Module:
    return models.SwinTransformer([4, 4], width, [1, 1, 2, 1], [1, 2, 4, 8], [4, 4])


BOTTLENECKS = ["features.3", "features.6", "features.13", "features.17"]
STAGES = ["features.1", "features.3", "features.5", "features.7"]
Make = Callable[[], nn.Module]

# Student, teacher, and the layers that AttentionTransfer chooses. docs/networks.md has many more.
NETWORKS: dict[str, tuple[Make, Make, list[str], list[str]]] = {
    "mobilenet_v2 <- convnext_tiny": (
        models.mobilenet_v2, models.convnext_tiny, BOTTLENECKS, STAGES,
    ),
    "vit <- timm's vit with registers": (
        lambda: models.VisionTransformer(64, 16, 2, 2, 16, 32),
        lambda: timm_vit(3, 32, reg_tokens=4),
        [f"encoder.layers.encoder_layer_{i}" for i in (0, 1)],
        ["blocks.0", "blocks.2"],
    ),
    "timm's vit <- resnet34": (
        lambda: timm_vit(2, 32, class_token=False, global_pool="avg"),
        models.resnet34,
        ["blocks"],
        ["layer3"],
    ),
    "swin <- swin": (lambda: swin(24), lambda: swin(32), STAGES, STAGES),
}  # fmt: skip


def features_of(model: nn.Module, names: list[str], x: Tensor) -> list[Tensor]:
    """Return features that plain hooks record, channels first, tokens on their grid."""
    features: dict[str, Tensor] = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: features.update({name: output.clone()})
        )
    model(x)
    for name, feature in features.items():
        if feature.dim() == 3:
            side = int(feature.shape[1] ** 0.5)
            features[name] = feature[:, -side * side :].mT.unflatten(2, (side, side))
        elif isinstance(model, models.SwinTransformer):
            features[name] = feature.movedim(-1, 1)
    return [features[name] for name in names]


@pytest.mark.parametrize("case", NETWORKS)
def test_layers_loss_and_gradients(case: str) -> None:
    make_student, make_teacher, *names = NETWORKS[case]
    student, teacher = make_student().eval(), make_teacher().eval()
    reference, x = copy.deepcopy(student), torch.randn(2, 3, 64, 64)
    at = AttentionTransfer(student, teacher, example=x, beta=100.0, verbose=False)
    assert at.pairs == list(zip(*names, strict=True))
    student(x)
    loss = at(x)
    with torch.no_grad():
        targets = features_of(copy.deepcopy(teacher), names[1], x)
        torch.testing.assert_close(at.teacher_output, teacher(x))
    expected = 100 * at_loss(features_of(reference, names[0], x), targets)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    loss.backward(), expected.backward()
    for (name, a), b in zip(student.named_parameters(), reference.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            assert (a.grad - b.grad).norm() <= 1e-3 * b.grad.norm() + 1e-5, name
    at.remove()
    at = AttentionTransfer(student, teacher, at.pairs, beta=100.0)
    student(x)
    torch.testing.assert_close(at(x), expected, rtol=1e-4, atol=1e-6)


# ---- examples ------------------------------------------------------------------------------------


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Load an example with its folder on the path, and return its main."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield lambda name: runpy.run_path(str(EXAMPLES / name))["main"]
    sys.modules.pop("digits", None)


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        pytest.param("torchvision_resnet.py", "layer4", marks=pytest.mark.exhaustive),
        ("timm_vit.py", "blocks.3 <- blocks.5"),
    ],
)
def test_examples_run(
    name: str, pairs: str, examples: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--steps", "4", "--epochs", "1", "--batch", "8"]
    accuracy = examples(name)([*options, "--teacher-epochs", "1"])
    output = capsys.readouterr().out
    assert 0 < accuracy <= 1
    assert "teacher's test accuracy 0." in output
    assert pairs in output
    assert f"student's test accuracy {accuracy:.3f}" in output
    assert "AT 0.000" not in output.splitlines()[-2]
    examples(name)([*options, "--no-at"])
    output = capsys.readouterr().out
    assert "AT 0.000" in output.splitlines()[-2]
    assert "teacher" not in output


def test_resnet_example_reads_a_folder_and_a_teacher(
    examples: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            image = torch.randint(256, (3, 40, 40), dtype=torch.uint8)
            torchvision.io.write_png(image, str(tmp_path / part / name / "1.png"))
    torch.save(models.resnet34(num_classes=2).state_dict(), tmp_path / "weights.pt")
    folder = ["--data", str(tmp_path), "--teacher", str(tmp_path / "weights.pt")]
    accuracy = examples("torchvision_resnet.py")([*folder, "--batch", "2"])
    assert accuracy in (0, 0.5, 1)
    assert "56x56  layer1" in capsys.readouterr().out


def accuracies(output: str) -> dict[str, float]:
    """Check the output of examples/wrn.py, and return the accuracy of each network."""
    lines = re.findall(r"^(.+): test accuracy (\d+\.\d\d) %$", output, re.M)
    for name, _ in lines:
        assert re.search(rf"^{name}: epoch (\d+) of \1, loss \d+\.\d{{3}}$", output, re.M)
    assert [name for name, _ in lines] == ["teacher", "student alone", "student with AT"]
    return {name: float(percent) for name, percent in lines}


@pytest.mark.exhaustive
def test_wrn_example_on_digits(tmp_path: Path) -> None:
    results = accuracies(output_of(tmp_path, str(EXAMPLES / "wrn.py"), "--epochs", "80"))
    assert min(results.values()) > 40, results  # chance is 10
    assert results["teacher"] > 75, results


def test_wrn_example_on_cifar(
    examples: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Train on 20 images and test on 4, in CIFAR's file format."""
    write_cifar(tmp_path, "cifar10", monkeypatch)
    examples("wrn.py")(["--root", str(tmp_path), "--epochs", "2"])
    assert {a % 25 for a in accuracies(capsys.readouterr().out).values()} == {0}
