"""Weights from files: formats, mismatches, and damage, which must never load."""

from __future__ import annotations

import argparse
import collections
import random
import re
import sys
import urllib.error
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_data import needs_torchvision, open_data, save_network
from test_train_networks import own_networks
from torch import Tensor, nn

from at_fused.train import checkpoints
from at_fused.train.checkpoints import CheckpointError
from at_fused.train.config import ConfigError
from at_fused.train.data import Data
from at_fused.train.networks import build
from at_fused.train.saved import (
    find_weights,
    load_network,
    open_network,
    read_weights,
)

NAME = "wrn-10-1-b4"
DAMAGED = "unreadable, damaged, or contains more than tensors and plain values; "


def network(classes: int = 10, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build(NAME, classes, 1)


WEIGHTS = network(seed=1).state_dict()


@pytest.fixture(scope="module")
def digits() -> Data:
    return open_data("digits", image_size=8)


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in WEIGHTS.items()}


def has_weights(model: nn.Module, state: dict[str, Tensor]) -> bool:
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[k], v) for k, v in state.items())


def load(model: nn.Module, path: Path | str, name: str = NAME, **options: Any) -> str:
    """Load weights as a run does; return the summary."""
    file = read_weights(str(path), "teacher_from", name)
    weights, line = find_weights(model, file, "teacher_from", network=name, **options)
    model.load_state_dict(weights, strict=False)
    return line


def loaded(path: Path | str, **options: Any) -> tuple[nn.Module, str]:
    model = network()
    return model, load(model, path, **options)


def load_error(path: Path | str, **options: Any) -> str:
    """Return the error: one line, without torch's advice, and with the network unchanged."""
    model, before = network(), network().state_dict()
    with pytest.raises(ConfigError) as error:
        load(model, path, **options)
    text = str(error.value)
    assert text.startswith("teacher_from: ")
    assert "\n" not in text
    assert "weights_only" not in text
    assert has_weights(model, before)
    return text


# ---- formats


# Objects that programs save with weights.
FACTS = {
    "epoch": 3,
    "args": argparse.Namespace(lr=0.1, out=Path("runs/1"), layers=[1, 2]),
    "best": np.float64(93.5),
    "torch": torch.__version__,
    "seen": [np.int64(3), np.float32(0.5), np.bool_(True)],
    "optimizer": torch.optim.SGD(network().parameters(), 0.1).state_dict(),
    "milestones": collections.Counter([30, 60]),
}


@pytest.mark.parametrize(
    ("content", "summary"),
    [
        (WEIGHTS, "46 tensors"),
        ({"state_dict": WEIGHTS} | FACTS, "46 tensors from 'state_dict'"),
        ({"net": WEIGHTS, "acc": 93.5}, "from 'net'"),
        ({"model_state": WEIGHTS, "mean": torch.zeros(3)}, "from 'model_state'"),
        ({"ema": WEIGHTS, "model": {"another": torch.ones(3)}}, "from 'ema'"),
        (prefixed("module.") | {"criterion.weight": torch.ones(2)}, "46 tensors from 'module'"),
        ({"state_dict": prefixed("student.") | {"t.x": torch.ones(1)}}, "'state_dict.student'"),
        ({"model": prefixed("module._orig_mod.")}, "from 'model.module._orig_mod'"),
        ({"ema": {"n_averaged": torch.tensor(5), **prefixed("module.")}}, "from 'ema.module'"),
        ({k: v for k, v in WEIGHTS.items() if "num_batches" not in k}, "39 tensors"),
        ({k: v.double() for k, v in WEIGHTS.items()}, "46 tensors"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_state_dict_is_found_in_a_file(
    content: Any, summary: str, zipped: bool, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    model, line = loaded(path)
    assert has_weights(model, WEIGHTS)
    assert line.startswith(f"{path}: ")
    assert line.endswith(summary)


def test_numpy_1_scalars_are_read(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"x": np.float64(1), **WEIGHTS}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"cnumpy._core.", b"cnumpy.core."))
    assert has_weights(loaded(path)[0], WEIGHTS)


def test_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "model.safetensors"
    safetensors.save_file(prefixed("module."), path)
    assert has_weights(loaded(path)[0], WEIGHTS)
    path.write_bytes(path.read_bytes()[:-8])
    assert DAMAGED in load_error(path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert load_error(path).endswith("requires safetensors: pip install safetensors")


def test_key_selects_one_of_several_state_dicts(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    other = {k: v + 1 for k, v in WEIGHTS.items()}
    torch.save({"model": WEIGHTS, "ema": {f"module.{k}": v for k, v in other.items()}}, path)
    message = f"several state_dicts match, ema.module, model: choose one, such as {path}:ema.module"
    assert message in load_error(path)
    for key, weights in (("ema", other), ("ema.module", other), ("model", WEIGHTS)):
        assert has_weights(loaded(f"{path}:{key}")[0], weights)
    assert "no avg, only ema.module, model" in load_error(f"{path}:avg")
    assert "no such file" in load_error(f"{path}x:ema")
    # The name of a file may contain a colon.
    torch.save(WEIGHTS, f"{path}:avg")
    assert has_weights(loaded(f"{path}:avg")[0], WEIGHTS)


# ---- mismatches


def test_mismatch_names_tensors_and_shapes(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    wrong = {**WEIGHTS, "head.scale": torch.ones(1), "bn.bias": torch.zeros(3)}
    wrong["head.bias"] = torch.zeros(10, dtype=torch.int64)
    del wrong["stem.weight"]
    torch.save(wrong, path)
    assert load_error(path, new_head=True).endswith(
        f"cannot load {path} into {NAME}: 4 tensors do not match: stem.weight is missing, bn.bias "
        "has shape (3,), expected (16,), head.bias has dtype torch.int64, expected torch.float32, "
        "head.scale is unexpected"
    )


def test_last_layer_is_skipped_for_another_number_of_classes(tmp_path: Path) -> None:
    path, weights = tmp_path / "weights.pth", network(1000, 1).state_dict()
    torch.save({"state_dict": weights}, path)
    assert load_error(path).endswith("it has 1000 classes, the data have 10")
    model, line = loaded(path, new_head=True)
    head = ("head.weight", "head.bias")
    assert line.endswith(
        "44 tensors from 'state_dict'; skipped its last layer, head (1000 classes, the data "
        "have 10)"
    )
    assert has_weights(model, weights | {name: network().state_dict()[name] for name in head})
    # A last layer with other inputs belongs to another network.
    torch.save(weights | {"head.weight": torch.ones(1000, 8)}, path)
    message = "2 tensors do not match: head.weight has shape (1000, 8)"
    assert message in load_error(path, new_head=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_nonfinite_weights_are_refused(value: float, tmp_path: Path) -> None:
    """Refuse also float64 values that overflow in float32."""
    torch.save(
        WEIGHTS | {"bn.running_var": torch.full((16,), value, dtype=torch.float64)},
        tmp_path / "w.pth",
    )
    assert "NaN or inf in 1 tensors: bn.running_var" in load_error(tmp_path / "w.pth")


@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_files_without_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    few = {f"net.{i}": torch.ones(2) for i in range(5)}
    for content, message in (
        (network(), DAMAGED),
        ({"model": WEIGHTS, "rng": random.Random(3)}, DAMAGED),
        (few, "no tensor with a name of the network, only net.0, net.1, net.2 and 2 more"),
        ({"lr": 0.1, "model": {}}, "no tensor with a name of the network, only no tensors"),
        ([1, 2], "only no tensors"),
        (WEIGHTS | {"head.weight": WEIGHTS["head.weight"].to_sparse()}, "head.weight is missing"),
        (WEIGHTS | {"head.bias": WEIGHTS["head.bias"].to("meta")}, "head.bias is missing"),
    ):
        torch.save(content, path)
        assert message in load_error(path)
    for content in (b"", b"some text\n", b"PK\3\4 and more"):
        path.write_bytes(content)
        assert DAMAGED in load_error(path)


# ---- torchvision

TORCHVISION = ("torchvision", "resnet-18")


@needs_torchvision
def test_torchvision_weights_are_downloaded_or_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub/checkpoints/resnet18-f37072fd.pth"

    def fails(url: str, *_: object, **__: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fails)
    models = {classes: build("resnet-18", classes, 3) for classes in (1000, 10)}
    message = rf"cannot download or read .*\(URLError: .*save it as {path}$"
    with pytest.raises(ConfigError, match=message):
        load(models[1000], *TORCHVISION)
    weights = {k: torch.rand_like(v.float()) for k, v in models[1000].state_dict().items()}
    torch.save(weights, path)
    assert load(models[1000], *TORCHVISION) == f"{path}: 122 tensors"
    assert "skipped its last layer, fc (1000" in load(models[10], *TORCHVISION, new_head=True)
    for model in models.values():
        assert torch.equal(model.get_parameter("conv1.weight"), weights["conv1.weight"])
    for other in ("resnet-18-paper", NAME):
        with pytest.raises(ConfigError, match="torchvision has no weights for this network"):
            load(models[10], "torchvision", other)


# ---- files of at-fused-train


def open_for_eval(path: Path | str, network: str, data: Data) -> nn.Module:
    """Open a network as --eval does."""
    model, _ = open_network(read_weights(str(path), "eval"), network, data)
    assert not model.training
    return model


def test_network_of_0_1_0_is_read_as_weights(digits: Data, tmp_path: Path) -> None:
    path, sizes = tmp_path / "teacher.pt", {"classes": 10, "channels": 1, "image_size": 8}
    state = {"format": 1, "what": "network", "model": WEIGHTS, "network": NAME, **sizes}
    torch.save({**state, "points": [], "peak_bytes": 0, "run": "teacher"}, path)
    assert has_weights(open_for_eval(path, NAME, digits), WEIGHTS)
    assert has_weights(loaded(path, data=digits)[0], WEIGHTS)
    with pytest.raises(ConfigError, match="does not name its network"):
        open_for_eval(path, "", digits)


def test_saved_network_is_restored(digits: Data, tmp_path: Path) -> None:
    path = tmp_path / "student.pt"
    save_network(path, NAME, network(seed=1), digits, run="at-seed0")
    # torch alone can load the weights.
    network().load_state_dict(torch.load(path, weights_only=True)["model"])
    model, facts = load_network(path)
    assert not model.training
    assert (facts["mean"], facts["std"]) == (list(digits.mean), list(digits.std))
    assert (facts["names"], facts["run"]) == ([str(i) for i in range(10)], "at-seed0")
    opened = open_for_eval(path, "", digits), open_for_eval(path, NAME, digits)
    for each in (model, loaded(path)[0], *opened):
        assert has_weights(each, WEIGHTS)
    for name, data, message in (
        ("", replace(digits, names=tuple("0123")), "it has 10 classes, the data have 4"),
        ("wrn-16-1", digits, "tensors do not match"),
    ):
        with pytest.raises(ConfigError, match=rf"eval: .*student\.pt.*{message}"):
            open_for_eval(path, name, data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": tuple("1023456789")}, "class 0 is '0' in the network, '1' in the data"),
        ({"mean": (0.5,) * 3}, "the network takes images with 1 channels, the data have 3"),
        ({"mean": (0.5,)}, r"expects --mean 0\.3\d{6} --std 0\.\d+, got --mean 0\.5 "),
        ({"std": (0.5,)}, r"got --mean 0\.3\d+ --std 0\.5; set the network's values"),
    ],
)
def test_network_of_other_images_is_refused(
    changes: dict[str, Any], message: str, digits: Data, tmp_path: Path
) -> None:
    path = tmp_path / "student.pt"
    save_network(path, NAME, network(seed=1), digits)
    error = load_error(path, data=replace(digits, **changes))
    assert re.search(rf"^teacher_from: .*{message}", error)
    # The normalisation of custom data is unknown, and not checked.
    loaded(path, data=replace(digits, is_custom=True, mean=(0.0,), std=(1.0,)))
    # Class names are not compared if the number of classes differs.
    save_network(path, NAME, network(3), replace(digits, names=("a", "b", "c")))
    assert "(3 classes, the data have 10)" in loaded(path, data=digits, new_head=True)[1]


def test_state_dict_needs_the_name_of_its_network(digits: Data, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"ema": WEIGHTS, "net": WEIGHTS}, path)
    assert has_weights(open_for_eval(f"{path}:ema", NAME, digits), WEIGHTS)
    with pytest.raises(ConfigError, match="does not name its network; give the network"):
        open_for_eval(path, "", digits)


def test_imported_network_is_restored(
    digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_networks(tmp_path, monkeypatch)
    model, path = build("own_networks:Tiny", 10, 3), tmp_path / "student.pt"
    save_network(path, "own_networks:Tiny", model, digits)
    assert has_weights(load_network(path)[0], model.state_dict())
    monkeypatch.delitem(sys.modules, "own_networks")
    (tmp_path / "own_networks.py").unlink()
    with pytest.raises(CheckpointError, match="cannot import 'own_networks:Tiny'"):
        load_network(path)


# ---- damage


def damaged(content: bytes) -> dict[str, bytes]:
    """Return many copies of a file's content, each with one kind of damage."""
    draw, size = random.Random(0), len(content)
    half = size // 2
    copies = {"swapped": content[half:] + content[:half], "longer": content + b"\0"}
    # Bit flips anywhere, and more in the archive's directory.
    directory = range(content.index(b"PK\1\2"), size)
    for offset in [*draw.sample(range(size), 150), *draw.sample(directory, 60)]:
        for bit in (draw.randrange(8), 4):
            flipped = bytearray(content)
            flipped[offset] ^= 1 << bit
            copies[f"bit {bit} of {offset}"] = bytes(flipped)
    for offset in draw.sample(range(size - 64), 20):
        copies[f"zeros at {offset}"] = content[:offset] + bytes(64) + content[offset + 64 :]
    return copies


def saved(state: Any, path: Path) -> bytes:
    checkpoints.save(path, "network", state)
    return path.read_bytes()


class Evil:
    """An object that fails the test when it is unpickled."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("it ran",)


def test_damaged_checkpoint_never_loads(tmp_path: Path) -> None:
    """torch verifies no checksum: a flipped bit gives wrong weights."""
    state = {"model": {f"{i}.weight": torch.randn(8, 4) for i in range(2)}, "lr": 0.1}
    path = tmp_path / "step.pt"
    evil, intact = saved({"x": Evil()}, path), saved(state, path)
    assert checkpoints.load(path, "network")["lr"] == 0.1
    torch.save(state, path)
    others = {"foreign": path.read_bytes(), "code": evil, "empty": b""}
    for damage, content in (damaged(intact) | others).items():
        path.write_bytes(content)
        if content != intact:
            with pytest.raises(CheckpointError, match=r"step\.pt: truncated, damaged, or not from"):
                pytest.fail(f"{damage}: {checkpoints.load(path, 'network')}")


def test_damaged_weights_are_refused_or_loaded_unchanged(tmp_path: Path) -> None:
    """Files of other programs have CRC-32s only, which do not cover the archive's directory."""
    weights, path = nn.Linear(8, 4).state_dict(), tmp_path / "weights.pth"
    torch.save(weights, path)
    accepted = []
    for damage, content in damaged(path.read_bytes()).items():
        path.write_bytes(content)
        model = nn.Linear(8, 4)
        try:
            load(model, path, "linear")
        except ConfigError:
            continue
        accepted.append(damage)
        assert has_weights(model, weights), damage
    assert 0 < len(accepted) < 300
