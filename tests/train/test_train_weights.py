"""Weights from files: what is taken, what is refused, and that damage never loads."""

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
from pictures import needs_torchvision, open_data, save_network
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
DAMAGED = "it is unreadable, damaged, or holds other than tensors and plain values; "


def network(classes: int = 10, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build(NAME, classes, 1)


GIVEN = network(seed=1).state_dict()


@pytest.fixture(scope="module")
def digits() -> Data:
    return open_data("digits", image_size=8)


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in GIVEN.items()}


def same(model: nn.Module, state: dict[str, Tensor]) -> bool:
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[k], v) for k, v in state.items())


def load(model: nn.Module, path: Path | str, name: str = NAME, **options: Any) -> str:
    """As a run does."""
    file = read_weights(str(path), "teacher_from", name)
    weights, line = find_weights(model, file, "teacher_from", network=name, **options)
    model.load_state_dict(weights, strict=False)
    return line


def loaded(path: Path | str, **options: Any) -> tuple[nn.Module, str]:
    model = network()
    return model, load(model, path, **options)


def refused(path: Path | str, **options: Any) -> str:
    """The error, once it is one line without torch's advice, and nothing was loaded."""
    model, before = network(), network().state_dict()
    with pytest.raises(ConfigError) as error:
        load(model, path, **options)
    text = str(error.value)
    assert text.startswith("teacher_from: ")
    assert "\n" not in text
    assert "weights_only" not in text
    assert same(model, before)
    return text


# ---- what people have


# What programs keep beside weights.
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
    ("content", "said"),
    [
        (GIVEN, "46 tensors"),
        ({"state_dict": GIVEN} | FACTS, "46 tensors of its 'state_dict'"),
        ({"net": GIVEN, "acc": 93.5}, "of its 'net'"),
        ({"model_state": GIVEN, "mean": torch.zeros(3)}, "of its 'model_state'"),
        ({"ema": GIVEN, "model": {"another": torch.ones(3)}}, "of its 'ema'"),
        (prefixed("module.") | {"criterion.weight": torch.ones(2)}, "46 tensors of its 'module'"),
        ({"state_dict": prefixed("student.") | {"t.x": torch.ones(1)}}, "'state_dict.student'"),
        ({"model": prefixed("module._orig_mod.")}, "of its 'model.module._orig_mod'"),
        ({"ema": {"n_averaged": torch.tensor(5), **prefixed("module.")}}, "of its 'ema.module'"),
        ({k: v for k, v in GIVEN.items() if "num_batches" not in k}, "39 tensors"),
        ({k: v.double() for k, v in GIVEN.items()}, "46 tensors"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_weights_are_found(content: Any, said: str, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    model, line = loaded(path)
    assert same(model, GIVEN)
    assert line.startswith(f"{path}: ")
    assert line.endswith(said)


def test_numbers_of_numpy_1_are_read(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"x": np.float64(1), **GIVEN}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"cnumpy._core.", b"cnumpy.core."))
    assert same(loaded(path)[0], GIVEN)


def test_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_of_it = pytest.importorskip("safetensors.torch")
    path = tmp_path / "model.safetensors"
    torch_of_it.save_file(prefixed("module."), path)
    assert same(loaded(path)[0], GIVEN)
    path.write_bytes(path.read_bytes()[:-8])
    assert DAMAGED in refused(path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert refused(path).endswith("needs safetensors: pip install safetensors")


def test_several_that_fit_are_a_choice(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    other = {k: v + 1 for k, v in GIVEN.items()}
    torch.save({"model": GIVEN, "ema": {f"module.{k}": v for k, v in other.items()}}, path)
    assert f"several that fit, ema.module, model: choose one as {path}:ema.module" in refused(path)
    for key, wanted in (("ema", other), ("ema.module", other), ("model", GIVEN)):
        assert same(loaded(f"{path}:{key}")[0], wanted)
    assert "it has no avg, but ema.module, model" in refused(f"{path}:avg")
    assert "no such file" in refused(f"{path}x:ema")
    # A name that is a file's is that file's.
    torch.save(GIVEN, f"{path}:avg")
    assert same(loaded(f"{path}:avg")[0], GIVEN)


# ---- what does not fit


def test_a_mismatch_names_keys_and_shapes(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    wrong = {**GIVEN, "head.scale": torch.ones(1), "bn.bias": torch.zeros(3)}
    wrong["head.bias"] = torch.zeros(10, dtype=torch.int64)
    del wrong["stem.weight"]
    torch.save(wrong, path)
    assert refused(path, new_head=True).endswith(
        f"{path} has no weights of {NAME}: 4 of its tensors do not fit: stem.weight is missing, "
        "bn.bias is (3,), not (16,), head.bias is torch.int64, not torch.float32, head.scale is "
        "not in the network"
    )


def test_another_number_of_classes(tmp_path: Path) -> None:
    path, given = tmp_path / "weights.pth", network(1000, 1).state_dict()
    torch.save({"state_dict": given}, path)
    assert refused(path).endswith("it has 1000 classes, the data have 10")
    model, line = loaded(path, new_head=True)
    head = ("head.weight", "head.bias")
    assert line.endswith(
        "44 tensors of its 'state_dict'; its last layer, head, is left out (1000 classes, here 10)"
    )
    assert same(model, given | {name: network().state_dict()[name] for name in head})
    # A last layer of other inputs is another network's.
    torch.save(given | {"head.weight": torch.ones(1000, 8)}, path)
    assert "2 of its tensors do not fit: head.weight is (1000, 8)" in refused(path, new_head=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_weights_that_are_not_finite(value: float, tmp_path: Path) -> None:
    """Not those of float64 that float32 has no number for, either."""
    torch.save(
        GIVEN | {"bn.running_var": torch.full((16,), value, dtype=torch.float64)},
        tmp_path / "w.pth",
    )
    assert "NaN or inf in 1 of its tensors: bn.running_var" in refused(tmp_path / "w.pth")


@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_what_is_no_weights(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    for content, said in (
        (network(), DAMAGED),
        ({"model": GIVEN, "rng": random.Random(3)}, DAMAGED),
        ({f"net.{i}": torch.ones(2) for i in range(5)}, "name, but net.0, net.1, net.2 and 2 more"),
        ({"lr": 0.1, "model": {}}, "it has no tensor of such a name, but no tensors"),
        ([1, 2], "but no tensors"),
        (GIVEN | {"head.weight": GIVEN["head.weight"].to_sparse()}, "head.weight is missing"),
        (GIVEN | {"head.bias": GIVEN["head.bias"].to("meta")}, "head.bias is missing"),
    ):
        torch.save(content, path)
        assert said in refused(path)
    for raw in (b"", b"some text\n", b"PK\3\4 and more"):
        path.write_bytes(raw)
        assert DAMAGED in refused(path)


# ---- torchvision's

TORCHVISION = ("torchvision", "resnet-18")


@needs_torchvision
def test_torchvisions_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub/checkpoints/resnet18-f37072fd.pth"

    def fails(url: str, *_: object, **__: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fails)
    models = {classes: build("resnet-18", classes, 3) for classes in (1000, 10)}
    with pytest.raises(ConfigError, match=rf"fetched or read \(URLError: .*put it at {path}$"):
        load(models[1000], *TORCHVISION)
    given = {k: torch.rand_like(v.float()) for k, v in models[1000].state_dict().items()}
    torch.save(given, path)
    assert load(models[1000], *TORCHVISION) == f"{path}: 122 tensors"
    assert "fc, is left out (1000" in load(models[10], *TORCHVISION, new_head=True)
    for model in models.values():
        assert torch.equal(model.get_parameter("conv1.weight"), given["conv1.weight"])
    for other in ("resnet-18-paper", NAME):
        with pytest.raises(ConfigError, match="torchvision publishes no weights of this network"):
            load(models[10], "torchvision", other)


# ---- this program's files


def opened(path: Path | str, network: str, data: Data) -> nn.Module:
    """As at-fused-train --eval does."""
    model, _ = open_network(read_weights(str(path), "eval"), network, data)
    assert not model.training
    return model


def test_a_saved_network_comes_back(digits: Data, tmp_path: Path) -> None:
    path = tmp_path / "student.pt"
    save_network(path, NAME, network(seed=1), digits, run="at-seed0")
    # In one line, by torch alone.
    network().load_state_dict(torch.load(path, weights_only=True)["model"])
    model, facts = load_network(path)
    assert not model.training
    assert (facts["mean"], facts["std"]) == (list(digits.mean), list(digits.std))
    assert (facts["names"], facts["run"]) == ([str(i) for i in range(10)], "at-seed0")
    for found in (model, loaded(path)[0], opened(path, "", digits), opened(path, NAME, digits)):
        assert same(found, GIVEN)
    for name, other, said in (
        ("", replace(digits, names=tuple("0123")), "it has 10 classes, the data have 4"),
        ("wrn-16-1", digits, "of its tensors do not fit"),
    ):
        with pytest.raises(ConfigError, match=rf"eval: .*student\.pt.*{said}"):
            opened(path, name, other)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"names": tuple("1023456789")}, "class 0 of the network is '0', of the data '1'"),
        ({"mean": (0.5,) * 3}, "the network takes images of 1 channels, the data have 3"),
        ({"mean": (0.5,)}, r"as with --mean 0\.3\d{6} --std 0\.\d+, these .* --mean 0\.5 "),
        ({"std": (0.5,)}, r"these as with --mean 0\.3\d+ --std 0\.5; give the former"),
    ],
)
def test_a_network_of_other_images_is_refused(
    changes: dict[str, Any], said: str, digits: Data, tmp_path: Path
) -> None:
    path = tmp_path / "student.pt"
    save_network(path, NAME, network(seed=1), digits)
    assert re.search(rf"^teacher_from: .*{said}", refused(path, data=replace(digits, **changes)))
    # Nobody knows how a function has normalised its images.
    loaded(path, data=replace(digits, own=True, mean=(0.0,), std=(1.0,)))
    # A new last layer has no names in common with the old one.
    save_network(path, NAME, network(3), replace(digits, names=("a", "b", "c")))
    assert "(3 classes, here 10)" in loaded(path, data=digits, new_head=True)[1]


def test_a_plain_file_is_opened_by_its_networks_name(digits: Data, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"ema": GIVEN, "net": GIVEN}, path)
    assert same(opened(f"{path}:ema", NAME, digits), GIVEN)
    with pytest.raises(ConfigError, match="is no network of at-fused-train: name the network"):
        opened(path, "", digits)


def test_a_network_by_import_path_comes_back(
    digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_networks(tmp_path, monkeypatch)
    model, path = build("own_networks:Tiny", 10, 3), tmp_path / "student.pt"
    save_network(path, "own_networks:Tiny", model, digits)
    assert same(load_network(path)[0], model.state_dict())
    monkeypatch.delitem(sys.modules, "own_networks")
    (tmp_path / "own_networks.py").unlink()
    with pytest.raises(CheckpointError, match="'own_networks:Tiny' cannot be imported"):
        load_network(path)


# ---- damage


def damaged(whole: bytes) -> dict[str, bytes]:
    """The file with one thing wrong, many times."""
    draw, size = random.Random(0), len(whole)
    found = {"swapped": whole[size // 2 :] + whole[: size // 2], "longer": whole + b"\0"}
    # The archive's directory, from the first header of its records on, bit for bit.
    places = range(whole.index(b"PK\1\2"), size)
    places = [*draw.sample(range(size), 150), *draw.sample(places, 60)]
    for place in places:
        for bit in (draw.randrange(8), 4):
            changed = bytearray(whole)
            changed[place] ^= 1 << bit
            found[f"bit {bit} of {place}"] = bytes(changed)
    for place in draw.sample(range(size - 64), 20):
        found[f"zeros at {place}"] = whole[:place] + bytes(64) + whole[place + 64 :]
    return found


def saved(state: Any, path: Path) -> bytes:
    checkpoints.save(path, "network", state)
    return path.read_bytes()


class Evil:
    """Runs when it is unpickled."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("it ran",)


def test_damage_never_loads(tmp_path: Path) -> None:
    """Torch looks at no checksum: a bit of a weight, or of the directory, gives other weights."""
    state = {"model": {f"{i}.weight": torch.randn(8, 4) for i in range(2)}, "lr": 0.1}
    path = tmp_path / "step.pt"
    evil, whole = saved({"x": Evil()}, path), saved(state, path)
    assert checkpoints.load(path, "network")["lr"] == 0.1
    torch.save(state, path)
    others = {"foreign": path.read_bytes(), "code": evil, "empty": b""}
    for how, content in (damaged(whole) | others).items():
        path.write_bytes(content)
        if content != whole:
            with pytest.raises(CheckpointError, match=r"step\.pt: truncated, damaged, or no file"):
                pytest.fail(f"{how}: {checkpoints.load(path, 'network')}")


def test_damaged_weights_never_load(tmp_path: Path) -> None:
    """Those of other programs, by their CRC-32s: they are refused, or the same."""
    given, path = nn.Linear(8, 4).state_dict(), tmp_path / "weights.pth"
    torch.save(given, path)
    kept = []
    for how, content in damaged(path.read_bytes()).items():
        path.write_bytes(content)
        model = nn.Linear(8, 4)
        try:
            load(model, path, "linear")
        except ConfigError:
            continue
        kept.append(how)
        assert same(model, given), how
    assert 0 < len(kept) < 300
