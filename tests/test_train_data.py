"""The data of at-fused-train: what each set holds, and what an augmentation depends on."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import re
import struct
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset, TensorDataset

from at_fused.train.config import resolve
from at_fused.train.data import Pictures, Samples, check_unreadable, folder, inspect, open_data, own
from at_fused.train.data.digits import make_split
from at_fused.train.data.folder import SCALE, InFolder, crop_box, decode, reason_of
from at_fused.train.data.samples import InMemory, few_labels, set_apart, stratified
from at_fused.train.experiment import Experiment
from at_fused.train.rules import ConfigError

try:
    import torchvision
except (ImportError, OSError, RuntimeError) as error:  # absent, or made for another torch
    torchvision, reason = None, str(error)
else:
    reason = ""
needs_torchvision = pytest.mark.skipif(bool(reason), reason=f"no torchvision: {reason}")

TEST_HEAD = [1768, 687, 1066, 1223, 858, 1656, 775, 288]
VAL_HEAD = [1724, 59, 1172, 1777, 1528, 829, 238, 1348]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def scans(count: int, size: int, channels: int = 3) -> Tensor:
    """Digits (count, size, size, channels) uint8."""
    raw = torch.from_numpy(load_digits().images[:count]).float()[:, None]
    pixels = (interpolate(raw, size=(size, size)) * 255 / 16).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).repeat(1, 1, 1, channels).contiguous()


def in_memory(n: int = 40, **options: Any) -> InMemory:
    g = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (n, 7, 9, 3), generator=g).to(torch.uint8)
    labels = torch.arange(n) % 5
    return InMemory(pixels, labels, MEAN, STD, **{"pad": 2, "flip": True} | options)


def write_pictures(root: Path, part: str, classes: Sequence[str], each: int) -> list[str]:
    """PNG files of unlike sizes, no two the same: their paths."""
    paths = []
    for c, name in enumerate(classes):
        (root / part / name).mkdir(parents=True)
        for i in range(each):
            pixels = scans(c * each + i + 1, 20)[-1, : 14 + 3 * (i % 3), : 20 - 2 * c].numpy()
            paths.append(str(root / part / name / f"{i}.png"))
            Image.fromarray(pixels).save(paths[-1])
    return paths


@pytest.fixture
def in_folder(tmp_path: Path) -> InFolder:
    paths = write_pictures(tmp_path, "train", ("a", "b"), 4)
    return InFolder(paths, torch.arange(8) // 4, 12, augment=True)


def rows(samples: Samples, chunks: Sequence[Sequence[int]], seed: int | None) -> dict[int, Tensor]:
    """Each sample by its number; checks what else a batch has."""
    found = {}
    given = [torch.tensor(chunk) for chunk in chunks]
    for chunk, (x, y, index) in zip(given, samples.batches(given, seed), strict=True):
        assert x.dtype == torch.float32
        assert torch.equal(index, chunk)
        assert torch.equal(y, samples.labels[chunk])
        found |= dict(zip(chunk.tolist(), x, strict=True))
    return found


def whole(samples: Samples, seed: int | None = None) -> Tensor:
    return torch.stack(list(rows(samples, [range(len(samples))], seed).values()))


def same(a: dict[int, Tensor], b: dict[int, Tensor]) -> bool:
    return bool(a) and all(torch.equal(a[i], b[i]) for i in a)


# ---- in memory


@pytest.mark.parametrize("seed", [5, None])
def test_batches_are_the_naive_pad_crop_and_flip(seed: int | None) -> None:
    """Without a seed the pictures are as they are."""
    samples = in_memory()
    found = whole(samples, seed)
    (top, left), flips = samples._draw(5)
    g = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (40, 7, 9, 3), generator=g).to(torch.uint8).numpy()
    for i, picture in enumerate(pixels):
        if seed is not None:
            padded = np.pad(picture, ((2, 2), (2, 2), (0, 0)), mode="reflect")
            picture = padded[top[i] : top[i] + 7, left[i] : left[i] + 9]
            picture = picture[:, ::-1] if flips[i] else picture
        expected = picture.astype(np.float32) / np.float32(255) - np.float32(MEAN)
        expected /= np.float32(STD)
        assert np.array_equal(found[i].permute(1, 2, 0).numpy(), expected)


def test_all_corners_and_flips_are_drawn_alike() -> None:
    (top, left), flips = in_memory(5000)._draw(0)
    count = (top * 5 + left).bincount(minlength=25)
    assert (count - 200).abs().max() < 60  # 4.3 standard deviations
    assert (flips.sum() - 2500).abs() < 150
    assert not in_memory(flip=False)._draw(0)[1].any()
    # In every process: a change here gives every run other pictures.
    (top, left), flips = in_memory()._draw(3)
    assert [top[:6].tolist(), left[:6].tolist()] == [[1, 3, 2, 2, 0, 0], [3, 4, 1, 0, 4, 1]]
    assert flips[:6].int().tolist() == [1, 1, 1, 0, 0, 1]
    assert crop_box(20, 14, torch.Generator().manual_seed(3)) == ((0, 5, 11, 14), True)


@pytest.mark.parametrize("channels", [1, 3])
def test_memory_formats_agree_in_bits(channels: int) -> None:
    pixels, labels = scans(20, 16, channels), torch.zeros(20, dtype=torch.int64)
    # A view, as CIFAR's pixels are: batches must not inherit its strides.
    pixels = pixels.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    chunks = [torch.arange(20)]
    options = MEAN[:channels], STD[:channels], 2, True, "cpu"
    ((nchw, _, _),) = InMemory(pixels, labels, *options).batches(chunks, 1)
    ((nhwc, _, _),) = InMemory(pixels, labels, *options, channels_last=True).batches(chunks, 1)
    assert nchw.stride() == (channels * 256, 256, 16, 1)
    assert nhwc.stride() == (channels * 256, 1, 16 * channels, channels)
    assert torch.equal(nchw, nhwc)


def test_subsets_are_the_samples_numbered_anew(in_folder: InFolder) -> None:
    for samples, count, size in ((in_memory(), 40, (7, 9)), (in_folder, 8, (12, 12))):
        part = samples.subset(torch.tensor([7, 3]))
        assert len(part) == 2
        assert torch.equal(part.labels, samples.labels[[7, 3]])
        assert torch.equal(whole(part), whole(samples)[[7, 3]])
        assert whole(part, 2).shape == (2, 3, *size)
        assert len(samples) == count


# ---- what an augmentation is a function of


def check_function_of_seed_and_number(samples: Samples) -> None:
    n = len(samples)
    first = rows(samples, [range(n)], 3)
    order = torch.randperm(n).tolist()
    assert same(rows(samples, [order[:2], order[2:3], order[3:]], 3), first)
    assert same(rows(samples, [[n - 1], [0, n - 1]], 3), first)
    assert not same(rows(samples, [range(n)], 4), first)
    plain = rows(samples, [range(n)], None)
    assert not same(plain, first)
    assert same(rows(samples, [order], None), plain)
    assert same(rows(samples, [order], 3), first)


def test_augmentation_is_of_seed_and_number(in_folder: InFolder) -> None:
    check_function_of_seed_and_number(in_memory())
    check_function_of_seed_and_number(in_folder)


def test_workers_change_nothing(in_folder: InFolder) -> None:
    first = whole(in_folder, 3)
    in_folder._workers = 2
    found = rows(in_folder, [[0, 5], [2], [1, 3, 4], [6, 7]], 3)
    assert same(found, dict(enumerate(first)))


@pytest.mark.filterwarnings("error")
def test_no_more_workers_than_cpus(in_folder: InFolder) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    try:
        os.sched_setaffinity(0, cpus[:1])
        many = InFolder(in_folder._reader.paths, in_folder.labels, 12, workers=8)
        assert same(rows(many, [range(8)], None), rows(in_folder, [range(8)], None))
    finally:
        os.sched_setaffinity(0, cpus)


def test_no_global_randomness_is_used(in_folder: InFolder) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    open_data("digits", fraction=0.5)
    for samples in (in_memory(), in_folder):
        whole(samples, 3)
        whole(samples)
    in_folder._workers = 1
    whole(in_folder, 3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


# ---- parts of the training samples


def test_stratified_keeps_a_part_of_every_class() -> None:
    labels = torch.tensor([0] * 100 + [1] * 20 + [2])[torch.randperm(121)]
    some, more = stratified(labels, 0.1), stratified(labels, 0.5)
    assert labels[some].bincount().tolist() == [10, 2, 1]
    assert labels[more].bincount().tolist() == [50, 10, 1]
    assert set(some.tolist()) < set(more.tolist())
    assert torch.equal(some, stratified(labels, 0.1))
    assert torch.equal(some, some.sort().values)
    assert stratified(labels, 1e-9).shape == (3,)
    assert torch.equal(stratified(labels, 1.0), torch.arange(121))


@pytest.mark.parametrize("count", [10, 25, 50])
def test_few_labels_are_balanced_seeded_training_images(count: int) -> None:
    labels = torch.from_numpy(load_digits().target).long()
    candidates = make_split(labels).train
    idx = few_labels(labels, candidates, count, seed=3)
    assert len(set(idx.tolist())) == count
    assert set(idx.tolist()) <= set(candidates.tolist())
    per_class = labels[idx].bincount(minlength=10)
    assert per_class.max() - per_class.min() == (1 if count % 10 else 0)
    assert torch.equal(idx, few_labels(labels, candidates, count, seed=3))
    assert not torch.equal(idx, few_labels(labels, candidates, count, seed=4))


def test_a_share_of_every_class_is_set_apart() -> None:
    labels = torch.tensor([0] * 100 + [1] * 20 + [2] * 2)[torch.randperm(122)]
    kept, held = set_apart(labels, 0.1)
    assert labels[held].bincount().tolist() == [10, 2, 1]
    assert torch.equal(torch.cat([kept, held]).sort().values, torch.arange(122))
    for found in (kept, held):
        assert torch.equal(found, found.sort().values)
    assert torch.equal(held, set_apart(labels, 0.1)[1])
    assert labels[set_apart(labels, 0.9)[0]].bincount().tolist() == [10, 2, 1]
    with pytest.raises(ValueError, match=r"validation must be 0 .* got 0\.1.* classes 3 have"):
        set_apart(torch.tensor([0, 0, 3]), 0.1)


def check_parts(**source: Any) -> None:
    """For a tenth and for all: train and validation are those of train, without augmentation."""
    full = open_data(**source, augment=False)
    for fraction in (1.0, 0.5):
        both = whole(open_data(**source, augment=False, fraction=fraction).train)
        data = open_data(**source, fraction=fraction, validation=0.25)
        assert data.validation is not None
        rest = whole(open_data(**source, fraction=fraction, validation=0.25, augment=False).train)
        held = whole(data.validation, 1)
        assert len(data.train) == len(rest)
        counts = torch.cat([data.train.labels, data.validation.labels]).bincount().tolist()
        wanted = [min(n - 1, max(1, round(0.25 * n))) for n in counts]
        assert data.validation.labels.bincount().tolist() == wanted
        found = sorted(x.numpy().tobytes() for x in (*rest, *held))
        assert found == sorted(x.numpy().tobytes() for x in both)
        assert data.digest == full.digest
    assert full.validation is None


# ---- the digits


def test_split_is_disjoint_complete_stratified_and_stable() -> None:
    labels = torch.from_numpy(load_digits().target).long()
    split = make_split(labels)
    parts = (split.train, split.val, split.test)
    assert [len(p) for p in parts] == [997, 300, 500]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(1797))
    share = labels.bincount() / len(labels)
    for part in parts:
        own = labels[part].bincount(minlength=10) / len(part)
        # Stratified: every class within one image of its share (of rounding, for the val part).
        assert ((own - share).abs() * len(part)).max() < 1.5
    # These are the held-out images: a change here changes every published figure.
    assert split.test[:8].tolist() == TEST_HEAD
    assert split.val[:8].tolist() == VAL_HEAD


def test_digits_are_the_enlarged_scans() -> None:
    data = open_data("digits")
    assert (data.classes, data.channels, data.image_size) == (10, 1, 16)
    assert data.names == tuple("0123456789")
    assert (len(data.train), len(data.evaluate)) == (997, 500)
    known = whole(data.train)
    assert known.shape == (997, 1, 16, 16)
    assert known.mean().abs() < 1e-5
    assert known.std() == pytest.approx(1.0, abs=1e-5)
    raw = load_digits()
    images = torch.from_numpy(raw.images[TEST_HEAD]).float()[:, None] / 16
    images = interpolate(images, size=(16, 16), mode="bilinear", align_corners=False)
    shown = rows(data.evaluate, [range(8)], 1)
    for image, x in zip(images, shown.values(), strict=True):
        assert (x * data.std[0] + data.mean[0] - image).abs().max() < 0.51 / 255
    assert data.evaluate.labels[:8].tolist() == raw.target[TEST_HEAD].tolist()


def test_digits_options() -> None:
    val = open_data("digits", evaluate="val", image_size=9, fraction=0.1, channels_last=True)
    assert val.evaluate.labels[:8].tolist() == load_digits().target[VAL_HEAD].tolist()
    assert whole(val.evaluate).shape == (300, 1, 9, 9)
    assert 95 <= len(val.train) <= 105
    other = open_data("digits", image_size=9, augment=False)
    assert (val.mean, val.std) == (other.mean, other.std)  # of all images, not of the fraction
    for data in (other, open_data("digits")):
        plain = torch.equal(whole(data.train, 1), whole(data.train))
        assert plain == (data is other)
    check_parts(name="digits")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation": 0.91}, r"validation must be in \[0, 0.9\], got 0.91"),
        ({"mean": (0.5, 0.5)}, r"mean must be 1 numbers in \[0, 1\], one per .* got 0.5, 0.5"),
        ({"mean": (125.0,)}, "mean must be .* got 125.0"),
        ({"std": (0.0,)}, r"std must be 1 numbers in \(0, 1\], .* got 0.0"),
        ({"std": (float("nan"),)}, "std must be .* got nan"),
        ({"pictures": Pictures("", {}, {})}, "pictures must be those of data 'folder', not of"),
        ({"name": "imagenet"}, "must be one of digits, .*, or MODULE:FUNCTION, got 'imagenet'"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_data(**{"name": "digits"} | options)


def test_constants_may_be_given() -> None:
    own, given = open_data("digits"), open_data("digits", mean=(0.5,), std=(0.25,))
    assert (given.mean, given.std) == ((0.5,), (0.25,))
    for part in ("train", "evaluate"):
        x, y = (whole(getattr(data, part)) for data in (own, given))
        assert (x * own.std[0] + own.mean[0] - (y * 0.25 + 0.5)).abs().max() < 1e-6
    assert open_data("digits", std=(0.25,)).mean == own.mean
    assert given.digest == own.digest
    assert re.fullmatch("[0-9a-f]{16}", own.digest)
    assert own.digest != open_data("digits", evaluate="val").digest
    assert (own.facts, own.validation) == ({}, None)


# ---- CIFAR


def write_cifar(
    root: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, dict[str, Tensor]]:
    """The files of a tiny CIFAR, whose checksums torchvision takes for right."""
    fine = name == "cifar100"
    folder = root / ("cifar-100-python" if fine else "cifar-10-batches-py")
    folder.mkdir(parents=True)
    parts = ["train", "test"] if fine else [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    pixels = scans(4 * len(parts), 32).split(4)
    sums = {}

    def write(file: str, content: object) -> None:
        (folder / file).write_bytes(pickle.dumps(content))
        sums[file] = hashlib.md5((folder / file).read_bytes()).hexdigest()

    key = "fine_labels" if fine else "labels"
    for file, part in zip(parts, pixels, strict=True):
        data = part.permute(0, 3, 1, 2).reshape(4, -1).numpy()
        write(file, {"data": data, key: [0, 1, 0, 1]})
    meta = "meta" if fine else "batches.meta"
    write(meta, {"fine_label_names" if fine else "label_names": ["apple", "bear"]})
    dataset = getattr(torchvision.datasets, name.upper())
    monkeypatch.setattr(dataset, "train_list", [[file, sums[file]] for file in parts[:-1]])
    monkeypatch.setattr(dataset, "test_list", [[parts[-1], sums[parts[-1]]]])
    monkeypatch.setattr(dataset, "meta", dataset.meta | {"md5": sums[meta]})
    return folder, {"train": torch.cat(pixels[:-1]), "evaluate": pixels[-1]}


@needs_torchvision
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, pixels = write_cifar(tmp_path, name, monkeypatch)
    data = open_data(name, tmp_path)
    assert (data.classes, data.channels, data.image_size) == (2, 3, 32)
    assert data.names == ("apple", "bear")
    # The authors' program has those of CIFAR-10 for both.
    assert [value * 255 for value in data.mean] == pytest.approx([125.3, 123.0, 113.9])
    assert [value * 255 for value in data.std] == pytest.approx([63.0, 62.1, 66.7])
    mean, std = (torch.tensor(v)[:, None, None] for v in (data.mean, data.std))
    for part, expected in pixels.items():
        shown = whole(getattr(data, part)) * std + mean
        assert (shown * 255 - expected.permute(0, 3, 1, 2)).abs().max() < 1e-3
    assert data.evaluate.labels.tolist() == [0, 1, 0, 1]
    assert isinstance(data.train, InMemory)
    assert (data.train._pad, data.train._flip) == (4, True)
    assert torch.equal(whole(data.evaluate, 1), whole(data.evaluate))
    check_function_of_seed_and_number(data.train)
    last = open_data(name, str(tmp_path), channels_last=True)
    assert torch.equal(whole(last.train, 1), whole(data.train, 1))
    assert len(open_data(name, tmp_path, fraction=0.01).train) == 2
    check_parts(name=name, root=tmp_path) if name == "cifar10" else None
    assert data.facts == {}
    given = open_data(name, tmp_path, mean=(0.5,) * 3)
    assert (given.mean, given.std) == ((0.5,) * 3, data.std)


@needs_torchvision
def test_cifar_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = write_cifar(tmp_path, "cifar10", monkeypatch)
    digest = open_data("cifar10", tmp_path).digest
    good = {"data": np.zeros((3, 3072), np.uint8), "labels": [1, 0, 1]}
    for file in ("test_batch", "data_batch_2"):
        (folder / file).write_bytes(pickle.dumps(good))
    data = open_data("cifar10", tmp_path, download=True)  # nothing is missing
    assert data.facts == {"cifar10": "not the published files: data_batch_2, test_batch"}
    assert [len(data.train), len(data.evaluate)] == [19, 3]
    assert data.digest != digest
    good["data"][0] = 1  # only pixels
    (folder / "test_batch").write_bytes(pickle.dumps(good))
    assert open_data("cifar10", tmp_path).digest != data.digest
    for content, message in (
        (good | {"labels": [0, 1]}, "test has 3 images, and not a whole label for each"),
        (good | {"labels": [0, 1, 0.5]}, "not a whole label for each"),
        (good | {"labels": [0, 1, 2]}, r"labels that are not in \[0, 2\)"),
        (good | {"labels": [0, 1, -1]}, r"labels that are not in \[0, 2\)"),
        (good | {"data": np.zeros((3, 3072))}, "pixels .* torch.float64, not "),
        (good | {"data": np.zeros((3, 1024), np.uint8)}, "test has 1 images"),
        ({"pixels": good["data"]}, "KeyError: 'data'"),
    ):
        (folder / "test_batch").write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=f"damaged, or not as .*{message}.* test_batch.*dele"):
            open_data("cifar10", tmp_path)


@needs_torchvision
def test_damaged_cifar_and_a_failed_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(self: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", download)
    with pytest.raises(OSError, match=r"cifar-10-batches-py failed \(no network\)"):
        open_data("cifar10", tmp_path, download=True)
    folder, _ = write_cifar(tmp_path, "cifar10", monkeypatch)
    (folder / "data_batch_3").write_bytes(b"half")
    with pytest.raises(ValueError, match=f"files in {folder} are damaged"):
        open_data("cifar10", tmp_path)


def test_missing_cifar_says_what_is_wanted_and_where(tmp_path: Path) -> None:
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "cifar-100-python" / "train").touch()
    files = "cifar-100-python/ with train, test, meta in"
    where = f"test, meta not found in {tmp_path}/cifar-100-python.*--download"
    with pytest.raises(FileNotFoundError, match=f"{files} .*; {where}"):
        open_data("cifar100", tmp_path)


# ---- a folder


@needs_torchvision
def test_folder(tmp_path: Path) -> None:
    write_pictures(tmp_path, "train", ("ant", "bee", "cat"), 5)
    write_pictures(tmp_path, "val", ("ant", "bee", "cat"), 2)
    data = open_data("folder", tmp_path, image_size=12, fraction=0.4)
    assert (data.classes, data.channels, data.image_size) == (3, 3, 12)
    assert data.names == ("ant", "bee", "cat")
    assert data.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.evaluate.labels.tolist() == [0, 0, 1, 1, 2, 2]
    check_function_of_seed_and_number(data.train)
    assert torch.equal(whole(data.evaluate, 1), whole(data.evaluate))
    last = open_data("folder", tmp_path, image_size=12, fraction=0.4, channels_last=True, workers=1)
    assert torch.equal(whole(last.train, 1), whole(data.train, 1))
    ((x, _, _),) = last.evaluate.batches([torch.arange(6)], None)
    assert x.is_contiguous(memory_format=torch.channels_last)
    plain = open_data("folder", tmp_path, image_size=12, augment=False)
    assert torch.equal(whole(plain.train, 1), whole(plain.train))
    check_parts(name="folder", root=tmp_path, image_size=12)
    other = open_data("folder", tmp_path, image_size=12, mean=(0.5,) * 3, std=(0.5,) * 3)
    shown = [whole(d.evaluate) * d.std[0] + d.mean[0] for d in (data, other)]
    assert (shown[0] - shown[1])[:, 0].abs().max() < 1e-6
    # Hidden classes, folders and files are none.
    hidden = (".ipynb_checkpoints", "bee/.ipynb_checkpoints", "bee")
    for place, name in zip(hidden, ("0.png", "0.png", ".0.png"), strict=True):
        for part in ("train", "val"):
            (tmp_path / part / place).mkdir(exist_ok=True)
            picture = (tmp_path / part / "ant" / "0.png").read_bytes()
            (tmp_path / part / place / name).write_bytes(picture)
    seen = open_data("folder", tmp_path)
    assert (seen.names, seen.digest, len(seen.evaluate)) == (data.names, data.digest, 6)
    (tmp_path / "val" / "bee" / "0.png").rename(tmp_path / "val" / "bee" / "9.png")
    assert open_data("folder", tmp_path).digest != data.digest
    assert (data.facts, data.own) == ({}, False)
    (tmp_path / "val" / "bee" / "9.png").rename(tmp_path / "val" / "bee" / "9.GIF")
    (tmp_path / "val" / "ant" / "noname").touch()
    assert open_data("folder", tmp_path).facts == {"not_read": {".gif": 1, "no suffix": 1}}
    (tmp_path / "val" / "bee" / "1.png").unlink()
    message = f"no pictures .* {tmp_path}/val of bee; files that are not read: 1 .gif, 1 no suffix"
    with pytest.raises(FileNotFoundError, match=message):
        open_data("folder", tmp_path)


@needs_torchvision
@pytest.mark.parametrize("size", [12, 30])
def test_folder_pictures_are_torchvisions(size: int, tmp_path: Path) -> None:
    from torchvision.transforms import functional as tv

    paths = write_pictures(tmp_path, "train", ("a", "b"), 3)
    samples = InFolder(paths, torch.zeros(6).long(), size, augment=True)
    for i, path in enumerate(paths):
        picture = Image.open(path)
        short = round(size * 256 / 224)
        expected = tv.center_crop(tv.resize(picture, [short]), [size, size])
        assert np.array_equal(samples._reader[i, None].numpy(), np.array(expected))
        digest = hashlib.sha256(f"7 {i}".encode()).digest()
        g = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
        (left, top, right, bottom), flip = crop_box(*picture.size, g)
        box = (top, left, bottom - top, right - left)
        expected = tv.resized_crop(picture, *box, [size, size])
        expected = tv.hflip(expected) if flip else expected
        assert np.array_equal(samples._reader[i, 7].numpy(), np.array(expected))


def test_crop_boxes_are_in_the_picture_and_of_the_wanted_areas() -> None:
    g = torch.Generator().manual_seed(0)
    drawn = [crop_box(500, 400, g) for _ in range(2000)]
    left, top, right, bottom = torch.tensor([box for box, _ in drawn]).double().unbind(1)
    assert min(left.min(), top.min(), (right - left).min() - 1, (bottom - top).min() - 1) >= 0
    assert right.max() <= 500
    assert bottom.max() <= 400
    shares, ratios = (right - left) * (bottom - top) / 200_000, (right - left) / (bottom - top)
    assert SCALE[0] - 0.01 < shares.min() < 0.1
    assert 0.95 < shares.max() <= 1
    assert [ratios.min(), ratios.max()] == pytest.approx([0.75, 1.33], abs=0.01)
    assert 900 < sum(flip for _, flip in drawn) < 1100
    # So long that nothing fits: the middle.
    assert crop_box(1000, 3, g)[0] == (498, 0, 502, 3)
    assert crop_box(3, 1000, g)[0] == (0, 498, 3, 502)
    assert crop_box(1, 1, g)[0] == (0, 0, 1, 1)


def png(depth: int, colours: int, row: bytes, transparent: bytes) -> bytes:
    """A file of four pixels, one colour of which is transparent."""
    header = struct.pack(">IIBBBBB", 4, 1, depth, colours, 0, 0, 0)
    rows = zlib.compress(b"\0" + row)
    chunks = (b"IHDR" + header, b"tRNS" + transparent, b"IDAT" + rows, b"IEND")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks
    )


def write_picture(path: Path, content: Any, **options: Any) -> str:
    """A file of these bytes; or of four pixels of a mode."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        mode, pixels = content
        picture = Image.new(mode, (4, 1))
        picture.putdata(pixels)
        picture.save(path, **options)
    return str(path)


DEEP = [0, 25700, 25829, 65535]
WORDS = np.array(DEEP, dtype=">u2").tobytes()
CLEAR = [(9, 9, 9, 255), (9, 9, 9, 0), (0, 0, 0, 51), (9, 9, 9, 255)]
GREY, ALPHA = ["16-bit grayscale"], ["transparency"]
SIX = ([5, 255, 7, 5], ALPHA)  # of 5, 6, 7, 5, where 6 is transparent


@pytest.mark.parametrize(
    ("suffix", "content", "options", "expected", "done"),
    [
        ("png", ("I;16", DEEP), {}, [0, 100, 101, 255], GREY),
        ("tif", ("I;16", DEEP), {}, [0, 100, 101, 255], GREY),
        ("pgm", b"P5 4 1 65535\n" + WORDS, {}, [0, 100, 101, 255], GREY),
        ("png", png(16, 0, WORDS, b"\0\0"), {}, [255, 100, 101, 255], GREY),
        ("png", ("RGBA", CLEAR), {}, [9, 255, 204, 9], ALPHA),
        ("webp", ("RGBA", CLEAR), {"lossless": True, "exact": True}, [9, 255, 204, 9], ALPHA),
        ("png", ("LA", [each[2:] for each in CLEAR]), {}, [9, 255, 204, 9], ALPHA),
        ("png", ("RGBA", [(9, 9, 9, 255)] * 4), {}, [9] * 4, []),
        ("png", ("L", [5, 6, 7, 5]), {"transparency": 6}, *SIX),
        ("png", ("RGB", [(v, v, v) for v in (5, 6, 7, 5)]), {"transparency": (6, 6, 6)}, *SIX),
        ("png", ("1", [0, 255, 0, 255]), {}, [0, 255, 0, 255], []),
        ("tif", ("CMYK", [(0, 0, 0, 55)] * 4), {}, [200] * 4, ["CMYK colours"]),
        (
            "png",
            ("L", [1, 2, 3, 4]),
            {"save_all": True, "append_images": [Image.new("L", (4, 1))]},
            [1, 2, 3, 4],
            ["first of several frames"],
        ),
        (
            "webp",
            ("RGB", [(5, 5, 5)] * 4),
            {"lossless": True, "exif": b"Exif\0\0damaged"},
            [5] * 4,
            ["unreadable EXIF data"],
        ),
    ],
)
def test_pictures_are_decoded(
    suffix: str, content: Any, options: Any, expected: Any, done: Any, tmp_path: Path
) -> None:
    path = write_picture(tmp_path / f"x.{suffix}", content, **options)
    picture, said = decode(path)
    assert (picture.mode, said) == ("RGB", done)
    assert np.array_equal(np.array(picture)[0], np.array([expected] * 3).T)
    assert decode(path, draft=True)[1] == done


def test_a_palette_may_be_transparent(tmp_path: Path) -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([9, 9, 9, 7, 7, 7])
    picture.putdata([0, 1])
    picture.save(tmp_path / "x.png", transparency=bytes([255, 0]))
    found, done = decode(str(tmp_path / "x.png"))
    assert (np.array(found)[0, :, 0].tolist(), done) == ([9, 255], ALPHA)


@pytest.mark.parametrize(
    ("suffix", "content", "options", "message"),
    [
        ("tif", ("F", [0.5] * 4), {}, "mode 'F', whose colours are not known"),
        ("tif", ("I", DEEP), {}, "does not say what white is"),
        ("tif", ("I;16", DEEP), {"tiffinfo": {262: 0}}, "does not say what white is"),  # it is 0
        ("tif", ("I;16", DEEP), {"tiffinfo": {339: 2}}, "does not say what white is"),  # signed
        ("png", png(4, 0, b"\x12\x34", b"\0\2"), {}, "a transparent colour .* L;4"),
        ("png", png(16, 2, bytes(24), bytes(6)), {}, "a transparent colour .* RGB;16B"),
    ],
)
def test_pictures_of_unknown_colours_are_refused(
    suffix: str, content: Any, options: Any, message: str, tmp_path: Path
) -> None:
    path = write_picture(tmp_path / f"x.{suffix}", content, **options)
    with pytest.raises(ConfigError, match=f"cannot read the picture {path}: .*{message}"):
        whole(InFolder([path], torch.zeros(1).long(), 4))


@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_pictures_stand_upright(suffix: str, mode: str, tmp_path: Path) -> None:
    upright = np.zeros((24, 16), np.uint8)
    upright[:8, :8], upright[:8, 8:], upright[8:16, :8] = 250, 170, 90
    half = np.rot90(upright, 2)
    stored = [upright, upright[:, ::-1], half, upright[::-1], upright.T]
    stored += [np.rot90(upright), half.T, np.rot90(upright, -1)]
    for orientation, pixels in enumerate(stored, 1):
        picture = Image.fromarray(np.ascontiguousarray(pixels)).convert(mode)
        exif = picture.getexif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.{suffix}"
        picture.save(path, exif=exif, **({"quality": 100} if suffix == "jpg" else {}))
        found, done = decode(str(path))
        assert done == ["EXIF orientation"] * (orientation > 1)
        assert np.abs(np.array(found)[..., 0].astype(int) - upright).max() < 5, orientation


@pytest.mark.parametrize("options", [{"suffix": "png"}, {"suffix": "jpg"}, {"progressive": True}])
def test_truncated_pictures_are_found(options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / f"x.{options.pop('suffix', 'jpg')}"
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3)).astype(np.uint8)
    Image.fromarray(noise).save(path, **options)
    content = path.read_bytes()
    decode(str(path), draft=True)
    for kept in (0, 2, 40, *(int(len(content) * part) for part in (0.3, 0.6, 0.9, 0.99))):
        path.write_bytes(content[:kept])
        for draft in (False, True):
            with pytest.raises((OSError, SyntaxError)):
                decode(str(path), draft)
    assert reason_of(EOFError()) == "EOFError"  # never empty, which is the reason of none


@needs_torchvision
def test_a_folder_is_inspected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("train", "val"):
        write_pictures(tmp_path, part, ("ant", "bee"), 3)
    bee = tmp_path / "train" / "bee"
    whole_file = (bee / "0.png").read_bytes()
    Image.new("1", (20000, 10000)).save(bee / "bomb.png")
    (bee / "cut.png").write_bytes(whole_file[:60])
    (bee / "text.jpg").write_text("not a picture")
    (bee / "gone.png").symlink_to(tmp_path / "nowhere")
    write_picture(bee / "grey.png", ("I;16", DEEP))
    write_picture(tmp_path / "val" / "ant" / "clear.png", ("RGBA", CLEAR))
    ticks: list[int] = []
    found = inspect(tmp_path, tick=ticks.append)
    assert sum(ticks) == 18
    assert found.converted == {"16-bit grayscale": 1, "transparency": 1}
    reasons = {
        "bomb": "200000000 pixels",
        "cut": "truncated",
        "gone": "No such file",
        "text": "pict",
    }
    assert list(found.unreadable) == [f"train/bee/{name}" for name in
                                      ("bomb.png", "cut.png", "gone.png", "text.jpg")]  # fmt: skip
    for said, (name, reason) in zip(found.unreadable.values(), reasons.items(), strict=True):
        assert reason in said, name
        assert "\n" not in said
    assert inspect(tmp_path, workers=2) == found

    with monkeypatch.context() as patch:  # which other parts' files never are asked for
        patch.setattr(folder, "decode", lambda path, draft: ("/val/" in path and [], []))
        assert inspect(tmp_path, parts=("val",), tick=ticks.append).unreadable == {}
    assert sum(ticks) == 25

    known = json.loads(json.dumps(asdict(found)))
    with monkeypatch.context() as patch:
        patch.setattr(folder, "decode", None)
        assert inspect(str(tmp_path), known=known) == found
    (bee / "cut.png").write_bytes(whole_file)
    assert list(inspect(tmp_path, known=known).unreadable) == [
        f"train/bee/{name}" for name in ("bomb.png", "gone.png", "text.jpg")
    ]

    check_unreadable(found, tmp_path, 4)
    message = (
        rf"4 pictures cannot be read, allowed is 3: {bee}/bomb.png \(.*, {bee}/cut.png \(.*, "
        rf"{bee}/gone.png \(No such file or directory\), \.\.\.; --skip-unreadable N leaves up to N"
    )
    with pytest.raises(ConfigError, match=message) as raised:
        check_unreadable(found, tmp_path, 3)
    assert "\n" not in str(raised.value)
    data = open_data("folder", tmp_path, image_size=4, pictures=found)
    assert [len(data.train), len(data.evaluate)] == [7, 7]
    assert whole(data.train, 1).shape == (7, 3, 4, 4)
    assert data.facts == {"converted": found.converted, "left_out": found.unreadable}
    for workers in (0, 1):
        every = open_data("folder", tmp_path, image_size=4, workers=workers)
        with pytest.raises(
            ConfigError, match=rf"cannot read the picture {bee}/bomb.png: .*$"
        ) as raised:
            whole(every.train, 1)
        assert "\n" not in str(raised.value)
    none = Pictures("", {}, {f"val/bee/{i}.png": "bad" for i in range(3)})
    with pytest.raises(
        FileNotFoundError, match=f"no pictures that can be read in {tmp_path}/val of"
    ):
        open_data("folder", tmp_path, pictures=none)


@needs_torchvision
def test_a_folder_is_known_by_its_content(tmp_path: Path) -> None:
    def digest(root: Path, known: Pictures | None = None) -> tuple[str, Pictures]:
        found = inspect(root, known=known and asdict(known))
        return open_data("folder", root, image_size=4, pictures=found).digest, found

    root = tmp_path / "a"
    for part in ("train", "val"):
        write_pictures(root, part, ("ant", "bee"), 2)
    picture = root / "val" / "bee" / "0.png"
    first, found = digest(root)
    root = root.rename(tmp_path / "b")
    assert digest(root, found) == (first, found)
    picture = root / "val" / "bee" / "0.png"
    picture.touch()  # another time, the same content
    assert digest(root, found)[0] == first
    (root / "val" / "bee" / "bad.png").write_bytes(b"left out")
    assert digest(root)[0] == first
    # A byte more is seen by each machine alone; another byte by the one that reads them.
    content = picture.read_bytes()
    picture.write_bytes(content + b"0")
    assert open_data("folder", root, pictures=found).digest != first
    longer = digest(root)[0]
    picture.write_bytes(content + b"1")
    assert len({first, longer, digest(root)[0]}) == 3


def test_folders_that_are_not_as_wanted(tmp_path: Path) -> None:
    for made, error, message in (
        ("", FileNotFoundError, f"no folder {tmp_path}/train"),
        ("train/a", FileNotFoundError, r"train/<class>/<picture> and val/<class>/.*/val"),
        ("val", FileNotFoundError, f"no class folders {tmp_path}/val"),
        ("val/b", ValueError, "same classes; only one of them has a, b"),
    ):
        (tmp_path / made).mkdir(parents=True, exist_ok=True)
        with pytest.raises(error, match=message):
            open_data("folder", tmp_path)


@pytest.mark.parametrize("name", ["folder", "cifar10"])
def test_without_torchvision(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
    advice = r'needs torchvision: pip install "at_fused\[train\]" \(ModuleNotFoundError: .*torchvi'
    with pytest.raises(ImportError, match=f"'{name}' {advice}"):
        open_data(name, tmp_path, download=name == "cifar10")
    assert len(open_data("digits").train) == 997


# ---- one's own


class Noise(Dataset[Any]):
    """Images that draw from every global generator; its labels count up."""

    def __init__(self, count: int = 12, classes: Any = None, **more: Any) -> None:
        self.count, self.classes, self.made = count, classes, lambda x: x
        vars(self).update(more)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[Tensor, Any]:
        x = torch.full((2, 4, 5), 10.0 * i, dtype=torch.float64)
        x += torch.rand(()) + random.random() + np.random.rand()
        return self.made(x), i % 3


class One(Noise):
    """Images of one class."""

    def __getitem__(self, i: int) -> tuple[Tensor, Any]:
        return super().__getitem__(i)[0], 0


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Opens what a function returns."""

    def opened(made: Any, **options: Any) -> Any:
        def data(root: str) -> Any:
            if isinstance(made, type) and issubclass(made, BaseException):
                raise made("two\nlines")
            return made(root) if callable(made) else made

        monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(data=data))
        return open_data("mine:data", "ROOT", **options)

    return opened


@pytest.mark.parametrize("workers", [0, 2])
def test_own_data(workers: int, mine: Callable[..., Any]) -> None:
    roots, drawn = [], []

    def make(root: str) -> Any:
        roots.append(root)
        drawn.append(torch.rand(()).item())
        return Noise(12, ["a", "b", "c"], targets=np.arange(12) % 3), Noise(4)

    data = mine(make, workers=workers, channels_last=True)
    assert (data.classes, data.channels, data.image_size) == (3, 2, 5)
    assert (data.names, data.mean, data.std) == (("a", "b", "c"), (0.0, 0.0), (1.0, 1.0))
    assert (data.facts, data.validation) == ({}, None)
    check_function_of_seed_and_number(data.train)
    assert torch.equal(whole(data.evaluate, None), whole(data.evaluate, None))
    ((x, _, _),) = data.train.batches([torch.arange(12)], 1)
    assert x.is_contiguous(memory_format=torch.channels_last)
    x = whole(data.train, 1)
    assert ((x / 10).floor().long()[:, 0, 0, 0] == torch.arange(12)).all()
    assert (x / 10 - (x / 10).floor()).max() < 0.31
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    half = mine(make, fraction=0.5, validation=0.5, workers=workers)
    assert [len(half.train), len(half.validation)] == [3, 3]
    held = [part.labels.sort().values.tolist() for part in (half.train, half.validation)]
    assert held == [[0, 1, 2]] * 2
    items = [
        whole(part).div(10).floor()[:, 0, 0, 0].tolist() for part in (half.train, half.validation)
    ]
    assert not set(items[0]) & set(items[1])
    assert "once" in half.facts["validation"]
    assert half.digest == data.digest
    assert roots == ["ROOT", "ROOT"]
    # A function draws the same each time, and changes no draw of others.
    assert drawn[0] == drawn[1]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


def test_own_data_without_names(mine: Callable[..., Any]) -> None:
    """Labels are those of the items, classes those of the labels."""
    pair = TensorDataset(torch.zeros(6, 1, 4, 4), torch.tensor([0, 3, 1, 0, 3, 1]))
    data = mine((pair, pair))
    assert data.names == ("0", "1", "2", "3")
    assert data.train.labels.tolist() == [0, 3, 1, 0, 3, 1]
    other = TensorDataset(torch.zeros(6, 1, 4, 4), torch.tensor([0, 3, 1, 0, 1, 3]))
    assert mine((other, pair)).digest != data.digest
    digests = {mine(made).digest for made in (
        (Noise(), Noise()),
        (Noise(made=lambda x: x + 1), Noise()),
        (Noise(), Noise(made=lambda x: x + 1)),
        (Noise(classes=["a", "b", "c"]), Noise()),
        (Noise(classes=["a", "c", "b"]), Noise()),
        (Noise(), Noise(11)),
    )}  # fmt: skip
    assert len(digests) == 6
    counted: list[int] = []
    known = Noise(50, targets=list(range(3)) * 16 + [0, 1], made=lambda x: counted.append(1) or x)
    mine((known, known))
    assert len(counted) < 50  # of 100


def uint8(x: Tensor) -> Tensor:
    return x.to(torch.uint8)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (ZeroDivisionError, "data mine:data: raises ZeroDivisionError: two"),
        (SystemExit, "data mine:data: raises SystemExit: two"),
        (5, r"must return \(train, test\), got int"),
        ((Noise(), Noise(), Noise()), r"must return \(train, test\), got \(Noise, Noise, Noise\)"),
        ((DataLoader(Noise()), Noise()), "data: train must be a map-style .* got DataLoader"),
        ((Noise(), Noise(0)), "data: test must be a map-style torch Dataset with items, got Noise"),
        (([5], Noise()), r"train\[0\] must be \(x, label\) .* ToTensor .*; got int"),
        ((Noise(made=uint8), Noise()), r"train\[0\] must .* got \(torch.uint8 \(2, 4, 5\), int\)"),
        ((Noise(), Noise(made=lambda x: x / 0)), r"data: test\[0\] has NaN or inf among its"),
        ((Noise(made=lambda x: x * 1e300), Noise()), r"train\[0\] has NaN or inf"),
        ((One(), One()), "mine:data': .* at least two classes, all are of '0'"),
        ((Noise(made=str), Noise()), r"got \(str, int\)"),
        ((Noise(made=torch.sum), Noise()), r"got \(torch.float64 \(\), int\)"),
        (([(torch.zeros(1, 2, 2), True)], Noise()), r"got \(torch.float32 \(1, 2, 2\), bool\)"),
        (([(torch.zeros(1, 2, 2), 0.5)], Noise()), r"got \(torch.float32 \(1, 2, 2\), float\)"),
        (
            (Noise(made=lambda x: x / 0 if 0 else {}["key"]), Noise()),
            r"\[0\] raises KeyError: 'key'",
        ),
        ((Noise(), Noise(made=lambda x: x[:1])), r"test\[0\] must .*\(2, 4, 5\).* got \(1, 4, 5\)"),
        ((Noise(targets=[2] * 12), Noise()), r"train\[0\] must .* label 2, .* got .* and 0"),
        ((Noise(3, targets=[0, 1, -1]), Noise()), r"train\[2\] must .* label -1"),
        (
            (Noise(classes=["a", "b"]), Noise()),
            "train must have labels from 0 to 1, .*; got 0 to 2",
        ),
        (
            (Noise(2), Noise()),
            "test must have labels from 0 to 1, the classes of train; got 0 to 2",
        ),
        (
            (Noise(made=lambda x: x + np.random.default_rng().random()), Noise()),
            r"train\[0\] differs from itself",
        ),
    ],
)
def test_own_data_that_are_none(made: Any, message: str, mine: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        mine(made)
    assert "mine:data" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (lambda x: x[:, :3], r"must .*\(2, 3, 5\) and 2"),
        (lambda x: {}[1], "raises KeyError: 1"),
        (lambda x: x * torch.nan, "has NaN or inf among its values"),
    ],
)
def test_a_wrong_item_ends_the_epoch(last: Any, message: str, mine: Callable[..., Any]) -> None:
    train = Noise(12, made=lambda x: last(x) if x.max() > 110 else x, targets=[*range(3)] * 4)
    with pytest.raises(ConfigError, match=rf"^data mine:data: train\[11\] {message}$"):
        whole(mine((train, Noise()), workers=1).train)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 4}, "image_size must not be given for 'mine:data', .*; got 4"),
        ({"mean": (0.5, 0.5)}, "mean must not"),
        ({"std": (0.5, 0.5)}, "std must not"),
        ({"augment": False}, "augment must not"),
        ({"evaluate": "val"}, "evaluate must be 'test'"),
    ],
)
def test_own_data_decide_themselves(
    options: dict[str, Any], message: str, mine: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match=message):
        mine((Noise(), Noise()), **options)


def test_own_data_that_cannot_go_to_workers(
    mine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own.multiprocessing, "get_start_method", lambda: "spawn")
    with pytest.raises(ConfigError, match=r"mine:data: train cannot be sent to workers .*lambda"):
        mine((Noise(), Noise()), workers=1)
    mine((Noise(), Noise()))


def test_own_modules_are_those_of_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    script = "import sys\nsys.exit('usage:')"
    for name, content in {"broken": "1 / 0", "script": script, "data": "data = 5"}.items():
        Path(f"my_{name}.py").write_text(content)
    for name, message in (
        ("my_absent:data", "data: 'my_absent:data' cannot be imported: ModuleNotFoundError: No"),
        ("my_broken:data", "cannot be imported: ZeroDivisionError"),
        ("my_script:data", "cannot be imported: SystemExit: usage"),
        ("my_data:test", "module 'my_data' has no attribute 'test'"),
        ("my_data:data", "data: 'my_data:data' must be a function, got int"),
        (":data", "cannot be imported: ValueError"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_data(name)
    assert sys.path[-1] == str(tmp_path)


def test_the_example_of_own_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    data = open_data("examples.own:data", "", validation=0.1)
    assert (data.classes, data.channels, data.image_size) == (10, 1, 16)
    assert data.validation is not None
    assert [len(data.train), len(data.validation), len(data.evaluate)] == [1167, 130, 500]
    assert torch.equal(whole(data.evaluate, 1), whole(data.evaluate, 2))
    assert not torch.equal(whole(data.train, 1), whole(data.train, 2))


# ---- the program on them


@needs_torchvision
def test_a_folder_trains_torchvisions_networks(tmp_path: Path) -> None:
    """With workers, and a student and a teacher whose layers are found."""
    for part, each in (("train", 8), ("val", 4)):
        write_pictures(tmp_path, part, ("ant", "bee"), each)
    config = resolve(
        {"preset": "imagenet-resnet18-from-34", "root": str(tmp_path), "epochs": 1}
        | {"student": "mobilenet_v3_small", "teacher": "resnet-18", "image_size": 64}
        | {"batch_size": 8, "workers": 1, "speed": "exact", "threads": 1, "teacher_from": ""}
    )
    (tmp_path / "run").mkdir()
    experiment = Experiment(config, tmp_path / "run")
    assert [pair.teacher for pair in experiment.pairs][-1] == "layer4"
    result = experiment.run()
    (curve,) = result.students["at"]
    assert curve.chosen["step"] == 2
    assert curve.chosen["transfer"] > 0
    assert result.teacher is not None
