"""Inside other people's frameworks and networks: torchdistill, torchvision and timm themselves."""

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
import torch.nn.functional as F
from torch import Tensor, nn

# That it is missing is an error: the extra "test" installs it. But pip gives a torch without CUDA
# a torchvision with it, whose operators do not load.
try:
    import torchvision
except (ImportError, OSError, RuntimeError) as error:
    if getattr(error, "name", "") == "torchvision":
        raise
    pytest.skip(f"torchvision does not fit this torch: {error}", allow_module_level=True)

import timm
import yaml
from outside import output_of
from test_train_data import write_cifar
from torchdistill.common.main_util import import_dependencies
from torchdistill.common.yaml_util import load_yaml_file
from torchdistill.core.distillation import DistillationBox, get_distillation_box
from torchdistill.losses.registry import MIDDLE_LEVEL_LOSS_DICT, get_mid_level_loss
from torchvision import models

from at_fused import AttentionTransfer, at_loss, kd_loss, match_layers
from at_fused.integrations.torchdistill import FusedATLoss

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Networks this small are slower on more."""
    torch.set_num_threads(1)


# ---- torchdistill's loss -------------------------------------------------------------------------


def pair(student: str, teacher: str, io: str = "output", **more: Any) -> dict[str, Any]:
    return {"student": {"io": io, "path": student}, "teacher": {"io": io, "path": teacher}, **more}


def loss_of(key: str, **kwargs: Any) -> nn.Module:
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


def test_importing_it_registers_it(tmp_path: Path) -> None:
    assert MIDDLE_LEVEL_LOSS_DICT["FusedATLoss"] is FusedATLoss
    assert type(loss_of("FusedATLoss", at_pairs=PAIRS)) is FusedATLoss
    code = """
import sys, torch, at_fused
print([name for name in sys.modules if "torchdistill" in name or "integrations" in name])
from torchdistill.common.main_util import import_dependencies
from torchdistill.losses.registry import MIDDLE_LEVEL_LOSS_DICT
print("FusedATLoss" in MIDDLE_LEVEL_LOSS_DICT)
import_dependencies(["at_fused.integrations.torchdistill"])
print("FusedATLoss" in MIDDLE_LEVEL_LOSS_DICT)
"""
    assert output_of(tmp_path, "-c", code).splitlines() == ["[]", "False", "True"]


@pytest.mark.parametrize("names", [["one"], ["two"], ["one", "two", "three"]], ids="-".join)
@pytest.mark.parametrize("mode", ["code", "paper"])
def test_value_and_gradients_are_atlosss(mode: str, names: list[str]) -> None:
    student, teacher = io_dicts()
    pairs, given = {name: PAIRS[name] for name in names}, leaves(student, teacher)
    results = []
    for key in ("FusedATLoss", "ATLoss"):
        loss = loss_of(key, at_pairs=pairs, mode=mode)(student, teacher, torch.arange(4))
        options = {"allow_unused": True, "materialize_grads": True}
        results.append([loss, *torch.autograd.grad(loss, given, **options)])
    torch.testing.assert_close(*results)


def test_the_options_of_at_loss() -> None:
    student, teacher = io_dicts()
    s, t = student["a"]["output"], teacher["x"]["output"]
    found = FusedATLoss(PAIRS)(student, teacher)
    torch.testing.assert_close(found, loss_of("ATLoss", at_pairs=PAIRS)(student, teacher))
    pairs = {"one": pair("a", "x", weight=3)}
    options = {"p": 4, "collapse": "max", "eps": 1e-6, "eps_mode": "add"}
    for mode in ("code", "paper"):
        loss = FusedATLoss(pairs, mode, **options)
        torch.testing.assert_close(loss(student, teacher), 3 * at_loss(s, t, form=mode, **options))
    assert repr(loss).startswith("FusedATLoss(a <- x * 3; mode='paper', collapse='max', p=4, ")
    found = FusedATLoss({"one": pair("a", "y")}, resize="maps")(student, teacher)
    torch.testing.assert_close(found, at_loss(s, teacher["y"]["output"], resize="maps"))
    tokens = {"t": {"output": torch.randn(4, 49, 6)}}
    found = FusedATLoss(
        {"one": pair("a", "t")}, channel_dim=[1, -1], skip_tokens=[0, 1], map_size=[None, [8, 6]]
    )(student, tokens)
    feature = tokens["t"]["output"][:, 1:].mT.unflatten(2, (8, 6))
    torch.testing.assert_close(found, at_loss(s, feature))


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "mode": ({"mode": "both"}, ValueError, "mode must be 'code' or 'paper', got 'both'"),
    "a list": ({"at_pairs": [1]}, TypeError, r"at_pairs must be a dict.*got \[1\]"),
    "one side": (
        {"at_pairs": {"one": {"student": {}}}},
        TypeError,
        r"at_pairs\['one'\] must be a dict with 'student' and 'teacher'",
    ),
    "io": (
        {"at_pairs": {"one": pair("a", "x", "outputs")}},
        TypeError,
        r"\['student'\] must be .* 'input' or 'output', got .*'outputs'",
    ),
    "a misspelt weight": (
        {"at_pairs": {"one": pair("a", "x", wight=2)}},
        ValueError,
        "no more than 'student', 'teacher' and 'weight', got 'wight'",
    ),
    "YAML's 1e3": (
        {"at_pairs": yaml.safe_load("{one: {student: 1, teacher: 2, weight: 1e3}}")},
        TypeError,
        r"\['weight'\] must be a number, got the string '1e3' \(YAML takes 1.0e\+3",
    ),
    "form": ({"form": "paper"}, TypeError, "no option 'form': mode names the formula"),
    "weights": ({"weights": [1]}, TypeError, "no option 'weights': each of at_pairs has its own"),
    "reduction": ({"reduction": "none"}, TypeError, "no option 'reduction': torchdistill adds"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_of_the_configuration(case: str) -> None:
    kwargs, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        loss_of("FusedATLoss", **{"at_pairs": PAIRS, **kwargs})


def test_errors_of_the_features() -> None:
    student, teacher = io_dicts()
    with pytest.raises(
        ValueError,
        match=r"at_pairs\['one'\]: the teacher kept no output of 'z', which forward_hook in its "
        r"configuration must list under 'output'; it kept output of '\.', output of 'x', input of",
    ):
        FusedATLoss({"one": pair("a", "z")})(student, teacher)
    with pytest.raises(ValueError, match="the student kept no input of 'b'"):
        FusedATLoss({"one": pair("b", "x", "input")})(student, teacher)
    with pytest.raises(ValueError, match="it kept nothing"):
        FusedATLoss(PAIRS)({}, teacher)
    with pytest.raises(ValueError, match="pair 0 must have the same map size"):
        FusedATLoss({"one": pair("a", "y")})(student, teacher)
    for d, path in ((student, "b"), (teacher, "y")):
        d[path]["output"] = d[path]["output"][:2]
    FusedATLoss(PAIRS)(student, teacher)
    with pytest.raises(ValueError, match=r"one batch size with mode 'paper', got \[4, 2, 4\]"):
        FusedATLoss(PAIRS, "paper")(student, teacher)


# ---- torchdistill's DistillationBox --------------------------------------------------------------

CONFIGURATION = """
dependencies:
  - name: 'at_fused.integrations.torchdistill'

train:
  num_epochs: 2
  train_data_loader:
    dataset_id: 'tiny'
    sampler:
      class_or_func: !import_get
        key: 'torch.utils.data.SequentialSampler'
    kwargs:
      batch_size: 8
  teacher:
    forward_proc: 'forward_batch_only'
    forward_hook:
      output: ['layer1']
    requires_grad: False
  student:
    forward_proc: 'forward_batch_only'
    forward_hook:
      input: ['layer2']
  optimizer:
    key: 'SGD'
    kwargs:
      lr: 0.005
  criterion:
    key: 'WeightedSumLoss'
    kwargs:
      sub_terms:
        at:
          criterion:
            key: 'KEY'
            kwargs:
              at_pairs:
                pair1:
                  teacher:
                    io: 'output'
                    path: 'layer1'
                  student:
                    io: 'input'
                    path: 'layer2'
                  weight: 0.5
              mode: 'MODE'
          weight: 10.0
"""


def losses_of_a_box(key: str, mode: str, folder: Path) -> tuple[list[float], list[Tensor]]:
    """As torchdistill's example programs do: read, import, make a box, train."""
    dtype, file = torch.float64, folder / f"{key}-{mode}.yaml"
    file.write_text(CONFIGURATION.replace("KEY", key).replace("MODE", mode))
    configuration = load_yaml_file(str(file))
    import_dependencies(configuration["dependencies"])
    torch.manual_seed(0)
    teacher, student = (models.resnet18(num_classes=4).to(dtype) for _ in range(2))
    images, labels = torch.randn(16, 3, 32, 32, dtype=dtype), torch.arange(16) % 4
    data = torch.utils.data.TensorDataset(images, labels)
    device, settings = torch.device("cpu"), configuration["train"]
    box = get_distillation_box(teacher, student, {"tiny": data}, settings, device, None, False, 1)
    assert type(box) is DistillationBox
    assert (FusedATLoss in {type(term) for term, _ in box.criterion.term_dict.values()}) == (
        key == "FusedATLoss"
    )
    losses = []
    for epoch in range(box.num_epochs):
        box.pre_epoch_process(epoch=epoch)
        for x, y, more in box.train_data_loader:
            box.pre_forward_process()
            loss = box.forward_process(x, y, more)
            losses.append(loss.item())
            box.post_forward_process(loss=loss)
        box.post_epoch_process()
    box.clean_modules()
    return losses, list(student.parameters())


@pytest.mark.parametrize("mode", ["code", "paper"])
def test_a_box_trains_as_with_atloss(mode: str, tmp_path: Path) -> None:
    right, weights = losses_of_a_box("ATLoss", mode, tmp_path)
    found, fused = losses_of_a_box("FusedATLoss", mode, tmp_path)
    assert len(set(found)) == 4
    # Training magnifies the last bit.
    assert found == pytest.approx(right, rel=1e-9)
    for a, b in zip(fused, weights, strict=True):
        assert (a - b).norm() <= 1e-8 * b.norm()


# ---- AttentionTransfer between the networks of torchvision and timm ------------------------------


def vision_transformer(depth: int, hidden: int) -> nn.Module:
    return models.VisionTransformer(64, 16, depth, 2, hidden, 32)


def vgg11_bn() -> nn.Module:
    model = models.vgg11_bn(init_weights=False)
    model.classifier = nn.Linear(512 * 7 * 7, 1000)  # a fifth of the weights
    return model


def timm_vit(depth: int, embed_dim: int, **options: Any) -> nn.Module:
    size = {"img_size": 64, "patch_size": 16, "num_heads": 2}
    return timm.create_model(
        "vit_tiny_patch16_224", depth=depth, embed_dim=embed_dim, **size, **options
    )


def timm_swin(width: int) -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=64,
        window_size=4,
        embed_dim=width,
        depths=(1, 1, 2, 1),
        num_heads=(1, 2, 4, 8),
        num_classes=1000,
        drop_path_rate=0.0,
    )


LAYERS = ["layer1", "layer2", "layer3", "layer4"]
BOTTLENECKS = ["features.1", "features.3", "features.6", "features.13"]
POOLED = ["features.6", "features.13", "features.20", "features.27"]
DENSE = [f"features.denseblock{i}" for i in (1, 2, 3, 4)]
CONVNEXT = ["features.1", "features.3", "features.5", "features.7"]
SWIN = ["layers.0", "layers.1", "layers.2", "layers.3"]
Make = Callable[[], nn.Module]

# Student, teacher, the layers found in each, of maps of one size.
NETWORKS: dict[str, tuple[Make, Make, list[str], list[str]]] = {
    "resnet18 <- resnet34": (models.resnet18, models.resnet34, LAYERS, LAYERS),
    "mobilenet_v2 <- vgg11_bn": (models.mobilenet_v2, vgg11_bn, BOTTLENECKS, POOLED),
    "densenet121 <- convnext_tiny": (models.densenet121, models.convnext_tiny, DENSE, CONVNEXT),
    "vit <- timm's vit with registers": (
        lambda: vision_transformer(2, 16),
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
    "timm's swin <- timm's swin": (lambda: timm_swin(16), lambda: timm_swin(24), SWIN, SWIN),
}


def captured(model: nn.Module, names: list[str], x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output, and those of the layers, by plain hooks."""
    features: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: features.update({name: output.clone()})
        )
        for name in names
    ]
    output = model(x)
    for handle in handles:
        handle.remove()
    return output, [features[name] for name in names]


def maps_of(model: nn.Module, feature: Tensor) -> Tensor:
    """The feature with channels first, a map's tokens at their places."""
    if feature.dim() == 3:
        side = int(feature.shape[1] ** 0.5)
        return feature[:, feature.shape[1] - side * side :].mT.unflatten(2, (side, side))
    return feature.movedim(-1, 1) if "Swin" in type(model).__name__ else feature


@pytest.mark.parametrize("case", NETWORKS)
def test_pairs_and_a_training_step(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    make_student, make_teacher, of_student, of_teacher = NETWORKS[case]
    student, teacher = make_student(), make_teacher()
    for module in [*student.modules(), *teacher.modules()]:
        if "StochasticDepth" in type(module).__name__ or isinstance(module, nn.Dropout):
            module.p = 0.0  # the step is taken twice
    x, y = torch.randn(2, 3, 64, 64), torch.tensor([3, 1])
    twin = copy.deepcopy(student)
    at = AttentionTransfer(student, teacher, example=x, beta=100.0)
    assert at.pairs == list(zip(of_student, of_teacher, strict=True))
    printed = capsys.readouterr().out.splitlines()
    for line, pair in zip(printed[1:], at.pairs, strict=False):
        assert [word for word in line.split() if word in pair] == [*pair]

    at.prepare(x)
    logits = student(x)
    transfer = at(x)
    (F.cross_entropy(logits, y) + kd_loss(logits, at.teacher_output) + transfer).backward()

    with torch.no_grad():
        output, targets = captured(teacher.eval(), of_teacher, x)
    torch.testing.assert_close(at.teacher_output, output)
    same, features = captured(twin, of_student, x)
    expected = 100 * at_loss(
        [maps_of(twin, feature) for feature in features],
        [maps_of(teacher, feature) for feature in targets],
    )
    torch.testing.assert_close(transfer, expected, rtol=1e-4, atol=1e-6)
    assert transfer > 0
    (F.cross_entropy(same, y) + kd_loss(same, output) + expected).backward()
    for (name, a), b in zip(student.named_parameters(), twin.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            assert (a.grad - b.grad).norm() <= 1e-3 * b.grad.norm() + 1e-5, name


def swin(width: int) -> nn.Module:
    return models.SwinTransformer([4, 4], width, [1, 1, 2, 1], [1, 2, 4, 8], [4, 4])


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_layers_by_name(family: str) -> None:
    """torchvision's Swin says nowhere that its channels are last."""
    make, layers, options = swin, [(name, name) for name in CONVNEXT], {}
    if family == "vit":
        make, options = lambda width: timm_vit(width // 4, width), {"skip_tokens": 1}
        layers = [("blocks.1", "blocks.2"), ("blocks.3", "blocks.5")]
    networks = make(16).eval(), make(24).eval()
    x = torch.randn(2, 3, 64, 64)
    if family == "swin":
        assert match_layers(*networks, x, verbose=False) == layers
    features = [
        captured(model, [pair[i] for pair in layers], x)[1] for i, model in enumerate(networks)
    ]
    expected = at_loss(*features, channel_dim=-1, **options)
    for given in ({}, {"channel_dim": -1}):
        at = AttentionTransfer(*networks, layers, beta=1.0, **given)
        networks[0](x)
        torch.testing.assert_close(at(x), expected, rtol=1e-4, atol=1e-7)
        at.remove()


# ---- examples ------------------------------------------------------------------------------------


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Runs a file as the interpreter would, up to its main: the folder is on the path."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield lambda name: runpy.run_path(str(EXAMPLES / name))["main"]
    sys.modules.pop("digits", None)


@pytest.mark.parametrize(
    ("name", "pairs"),
    [("torchvision_resnet.py", "layer4"), ("timm_vit.py", "blocks.3 <- blocks.5")],
)
def test_the_examples(
    name: str, pairs: str, examples: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--steps", "4", "--epochs", "1", "--batch", "8"]
    accuracy = examples(name)([*few, "--teacher-epochs", "1"])
    printed = capsys.readouterr().out
    assert 0 < accuracy <= 1
    assert "teacher's test accuracy 0." in printed
    assert pairs in printed
    assert f"student's test accuracy {accuracy:.3f}" in printed
    assert "AT 0.000" not in printed.splitlines()[-2]
    examples(name)([*few, "--no-at"])
    printed = capsys.readouterr().out
    assert "AT 0.000" in printed.splitlines()[-2]
    assert "teacher" not in printed


def test_the_resnet_example_on_a_folder_with_a_teacher(
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


def accuracies(printed: str) -> dict[str, float]:
    """Return the accuracy of each network of examples/wrn.py; checks that its lines are there."""
    found = re.findall(r"^(.+): test accuracy (\d+\.\d\d) %$", printed, re.M)
    for name, _ in found:
        assert re.search(rf"^{name}: epoch (\d+) of \1, loss \d+\.\d{{3}}$", printed, re.M)
    assert [name for name, _ in found] == ["teacher", "student alone", "student with AT"]
    return {name: float(percent) for name, percent in found}


def test_the_papers_program_on_digits(tmp_path: Path) -> None:
    found = accuracies(output_of(tmp_path, str(EXAMPLES / "wrn.py"), "--epochs", "80"))
    assert min(found.values()) > 40, found  # of ten classes
    assert found["teacher"] > 75, found


def test_the_papers_program_on_cifar(
    examples: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Train on 20 pictures and test on 4, in the files that torchvision reads."""
    write_cifar(tmp_path, "cifar10", monkeypatch)
    examples("wrn.py")(["--root", str(tmp_path), "--epochs", "2"])
    assert {a % 25 for a in accuracies(capsys.readouterr().out).values()} == {0}
