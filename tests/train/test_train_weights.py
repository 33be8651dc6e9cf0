"""Weights from files: what is taken, what is refused, and that damage never loads."""

from __future__ import annotations

import argparse
import collections
import pathlib
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
    image_options,
    load_network,
    open_network,
    read_weights,
)

NAME = "wrn-10-1-b4"


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
    "args": argparse.Namespace(lr=0.1, out=pathlib.Path("runs/1"), layers=[1, 2]),
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
        (prefixed("module."), "46 tensors"),
        (prefixed("net.") | {"criterion.weight": torch.ones(2)}, "46 tensors of its 'net'"),
        ({"state_dict": prefixed("student.") | {"t.x": torch.ones(1)}}, "of its 'student'"),
        ({"model": prefixed("module._orig_mod.")}, "of its 'model'"),
        ({"model": prefixed("_orig_mod.module.")}, "of its 'model'"),
        ({"state_dict": prefixed("model."), "pytorch-lightning_version": "2"}, "'state_dict'"),
        ({"model_ema": {"n_averaged": torch.tensor(5), **prefixed("module.")}}, "'model_ema'"),
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


def test_weights_of_other_systems_and_versions_are_found(tmp_path: Path) -> None:
    """Paths of Windows and of Python 3.13, numbers of NumPy 1."""
    path, content = tmp_path / "weights.pth", {"state_dict": GIVEN, "x": pathlib.PurePosixPath("a")}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    old = path.read_bytes()
    assert old.count(b"cpathlib\nPurePosixPath\n") == 1
    for other in (b"cpathlib\nWindowsPath\n", b"cpathlib._local\nPosixPath\n"):
        path.write_bytes(old.replace(b"cpathlib\nPurePosixPath\n", other))
        assert same(loaded(path)[0], GIVEN)
    torch.save(content | {"x": np.float64(1)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"cnumpy._core.", b"cnumpy.core."))
    assert same(loaded(path)[0], GIVEN)


def test_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_of_it = pytest.importorskip("safetensors.torch")
    path = tmp_path / "model.safetensors"
    torch_of_it.save_file(prefixed("module."), path)
    assert same(loaded(path)[0], GIVEN)
    other = path.rename(tmp_path / "model.bin")
    assert same(loaded(other)[0], GIVEN)
    torch.save(GIVEN, path)
    assert same(loaded(path)[0], GIVEN)
    path.write_bytes(other.read_bytes()[:-8])
    assert "not readable (SafetensorError" in refused(path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert refused(path).endswith("needs safetensors: pip install safetensors")


def test_several_that_fit_are_a_choice(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"model": GIVEN, "ema": prefixed("module."), "step": 4, "bad": {"x": GIVEN}}, path)
    assert f"several that fit, model, ema: choose one as {path}:model" in refused(path)
    for key in ("ema", "bad"):
        assert same(loaded(f"{path}:{key}")[0], GIVEN)
    assert "it has no 'avg', but model, ema, step, bad" in refused(f"{path}:avg")
    assert "no such file" in refused(f"{path}x:ema")
    # A name that is a file's is that file's.
    torch.save(GIVEN, f"{path}:avg")
    assert same(loaded(f"{path}:avg")[0], GIVEN)
    # Two networks in one dictionary.
    both = prefixed("student.") | {f"teacher.{k}": v + 1 for k, v in GIVEN.items()}
    torch.save({"state_dict": both, "epoch": 3}, path)
    assert f"several that fit, student, teacher: choose one as {path}:student" in refused(path)
    assert same(loaded(f"{path}:student")[0], GIVEN)
    assert same(loaded(f"{path}:teacher")[0], {k: v + 1 for k, v in GIVEN.items()})
    assert "it has no 'other', but state_dict, epoch" in refused(f"{path}:other")
    torch.save({"a": prefixed("net."), "b": {k: v + 1 for k, v in prefixed("net.").items()}}, path)
    for source, fit in ((path, "a, b"), (f"{path}:net", "a, b")):
        assert f"several that fit, {fit}: choose" in refused(source)
    assert same(loaded(f"{path}:a")[0], GIVEN)


# ---- what does not fit


def test_a_mismatch_names_keys_and_shapes(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    wrong = {**GIVEN, "head.scale": torch.ones(1), "bn.bias": torch.zeros(3)}
    wrong["head.bias"] = torch.zeros(10, dtype=torch.int64)
    del wrong["stem.weight"]
    torch.save(wrong, path)
    for new_head in (True, False):
        assert refused(path, new_head=new_head).endswith(
            f"{path} has no weights of {NAME}: 4 of its tensors do not fit: stem.weight is "
            "missing; bn.bias is (3,), not (16,); head.bias is torch.int64, not torch.float32; "
            f"{NAME} has no head.scale"
        )
    foreign = {f"net.{i}.weight": torch.ones(2) for i in range(85)}
    torch.save(foreign, path)
    last = f"; {NAME} has no net.0.weight, net.1.weight, net.2.weight and 82 more"
    assert refused(path).endswith(last)
    torch.save({**GIVEN, "x": torch.ones(1)}, path)
    assert "1 of its tensors do not fit: wrn-10-1-b4 has no x" in refused(path)


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


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("groups.0.0.conv1.weight", float("nan"), "(1 of 144 values)"),
        ("bn.running_var", float("inf"), "(1 of 16 values)"),
        ("bn.running_var", 1e300, "(1 of 16 values)"),
        ("bn.running_var", -0.5, "bn.running_var has a negative variance, -0.5"),
    ],
)
def test_weights_that_are_not_finite(name: str, value: float, said: str, tmp_path: Path) -> None:
    """Not those of float64 that float32 has no number for, either."""
    given = {k: v.clone() for k, v in GIVEN.items()}
    given[name] = given[name].double()
    given[name].view(-1)[3] = value
    torch.save(given, tmp_path / "weights.pth")
    if "(" in said:
        said = f"NaN or inf in 1 of its 46 tensors, first in {name} {said}"
    assert said in refused(tmp_path / "weights.pth")


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_what_is_no_weights(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    assert refused(path).endswith("weights.pth: no such file")
    own = r"beside tensors it holds at_fused\.train\.networks\.\w+, .*WRN.* torch\.save\(model\.st"
    for content, said in (
        (network(), own),
        ({"model": GIVEN, "rng": random.Random(3)}, r"it holds random\.Random, which may run code"),
        ({"lr": 0.1, "epochs": 3}, "it has no dictionary of tensors alone, but lr, epochs"),
        ([1, 2], "it has no dictionary of tensors alone, but a list"),
        ({}, "it has no dictionary of tensors alone, but nothing"),
        ({"model": {}, "x": 1}, r"alone, but model \(empty\), x"),
        (GIVEN | {"head.weight": GIVEN["head.weight"].to_sparse()}, "weight is torch.sparse_coo"),
        (GIVEN | {"head.bias": GIVEN["head.bias"].to("meta")}, r"bias has no values \(meta\)"),
    ):
        torch.save(content, path)
        assert re.search(said, refused(path)), refused(path)
        torch.save(content, path, _use_new_zipfile_serialization=False)
        refused(path)
    torch.jit.script(nn.Linear(2, 2)).save(str(path))
    assert "it is damaged, or no dictionary of torch.save" in refused(path)
    for content in (b"", b"some text\n", b"PK\3\4 and more"):
        path.write_bytes(content)
        assert "damaged" in refused(path)


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
    with pytest.raises(ConfigError, match=r"cannot be fetched \(URLError: .*put it at ") as error:
        load(models[1000], *TORCHVISION)
    assert str(error.value).endswith(f"put it at {path}")
    given = {k: torch.rand_like(v.float()) for k, v in models[1000].state_dict().items()}
    torch.save(given, path)
    assert load(models[1000], *TORCHVISION) == f"{path}: 122 tensors"
    with pytest.raises(ConfigError, match="it has 1000 classes, the data have 10"):
        load(models[10], *TORCHVISION)
    assert load(models[10], *TORCHVISION, new_head=True).endswith(
        "fc, is left out (1000 classes, here 10)"
    )
    for model in models.values():
        assert torch.equal(model.get_parameter("conv1.weight"), given["conv1.weight"])
    for other in ("resnet-18-paper", "resnet-18-cifar", NAME):
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
        ("", renamed(digits, *map(str, range(100))), "it has 10 classes, the data have 100"),
        ("", replace(digits, mean=(0.5,) * 3), "takes images of 1 channels, the data have 3"),
        ("", renamed(digits, "1"), "class 0 of the network is '0', of the data '1'; both must"),
        ("wrn-16-1", digits, "of its tensors do not fit"),
    ):
        with pytest.raises(ConfigError, match=rf"eval: .*student\.pt.*{said}"):
            opened(path, name, other)


def renamed(data: Data, *names: str) -> Data:
    return replace(data, names=(*names, *data.names[len(names) :]))


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
    assert loaded(path, data=digits)[1].endswith(": 46 tensors of its 'model'")
    larger, own = (replace(digits, **each) for each in ({"image_size": 16}, {"own": True}))
    assert loaded(path, data=larger)[1].endswith("trained at image size 8, here it is 16")
    assert loaded(path, data=own)[1].endswith("normalised as these are is not known")
    # A new last layer has no names in common with the old one.
    save_network(path, NAME, network(3), replace(digits, names=("a", "b", "c")))
    assert "(3 classes, here 10)" in loaded(path, data=digits, new_head=True)[1]


def test_a_network_knows_where_its_images_are(
    digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "student.pt"
    for own, kept in ((False, str(tmp_path / "here")), (True, "here")):
        images = {"data": "m:f" if own else "folder", "root": "here"}
        save_network(path, NAME, network(), replace(digits, own=own), images=images)
        assert image_options(read_weights(str(path), "eval").state)["root"] == kept


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


def test_damage_never_loads(tmp_path: Path) -> None:
    """Torch looks at no checksum: a bit of a weight, or of the directory, gives other weights."""
    state = {"model": {f"{i}.weight": torch.randn(8, 4) for i in range(2)}, "lr": 0.1}
    path = tmp_path / "step.pt"
    checkpoints.save(path, "network", state)
    whole = path.read_bytes()
    assert checkpoints.load(path, "network")["lr"] == 0.1
    for how, content in damaged(whole).items():
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
