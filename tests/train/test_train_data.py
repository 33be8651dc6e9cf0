"""The data of at-fused-train: what each set holds, and what an augmentation depends on."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pictures import (
    Noise,
    needs_torchvision,
    open_data,
    scans,
    torchvision,
    write_cifar,
    write_fashion_mnist,
    write_pictures,
)
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, TensorDataset

from at_fused.train.config import ConfigError, resolve
from at_fused.train.data import Data, Pictures, Samples, check_unreadable, folder, inspect
from at_fused.train.data.datasets import split_digits
from at_fused.train.data.folder import PictureFiles, decode
from at_fused.train.data.samples import (
    InMemory,
    OnDemand,
    few_labels,
    seeded,
    set_apart,
    standardiser,
    stratified,
)
from at_fused.train.experiment import Experiment

TEST_HEAD = [1768, 687, 1066, 1223, 858, 1656, 775, 288]
VAL_HEAD = [1724, 59, 1172, 1777, 1528, 829, 238, 1348]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
DIGITS = torch.from_numpy(load_digits().target).long()


PIXELS = torch.randint(256, (40, 7, 9, 3), generator=torch.Generator().manual_seed(1)).byte()


def in_memory(pixels: Tensor = PIXELS, flip: bool = True) -> InMemory:
    return InMemory(pixels, torch.arange(len(pixels)) % 5, MEAN, STD, 2, flip)


def on_disk(
    paths: Sequence[str], size: int, workers: int = 0, mean: Any = MEAN, std: Any = STD
) -> OnDemand:
    labels, finish = torch.arange(len(paths)) // 4, standardiser(mean, std, "cpu", False)
    return OnDemand(PictureFiles(paths, size), labels, finish, True, "cpu", workers)


@pytest.fixture(scope="module")
def from_files(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Samples]:
    """Opens eight pictures of a folder."""
    paths = write_pictures(tmp_path_factory.mktemp("pictures"), "train", ("a", "b"), 4)
    return lambda workers=0: on_disk(paths, 12, workers)


def rows(samples: Samples, chunks: Sequence[Sequence[int]], seed: int | None) -> Tensor:
    """The samples of all chunks; checks what else a batch has."""
    found = []
    given = [torch.tensor(chunk) for chunk in chunks]
    for chunk, (x, y, index) in zip(given, samples.batches(given, seed), strict=True):
        assert x.dtype == torch.float32
        assert torch.equal(index, chunk)
        assert torch.equal(y, samples.labels[chunk])
        found.append(x)
    return torch.cat(found)


def whole(samples: Samples, seed: int | None = None) -> Tensor:
    return rows(samples, [range(len(samples))], seed)


def random_states() -> list[Any]:
    return [torch.get_rng_state().tolist(), list(np.random.get_state()[1]), random.getstate()]


# ---- in memory


def crops(samples: InMemory, pixels: Tensor, seed: int) -> list[tuple[int, int, int]]:
    """The one (top, left, flip) of each picture that is its naive pad, crop and flip."""
    padded = np.pad(pixels.numpy(), ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    scaled = padded.astype(np.float32) / np.float32(255) - np.float32(MEAN)
    scaled = torch.from_numpy(scaled / np.float32(STD)).permute(0, 3, 1, 2)
    kinds = [(top, left, flip) for top in range(5) for left in range(5) for flip in (0, 1)]
    cropped = [scaled[:, :, y : y + 7, x : x + 9].flip([-1] * flip) for y, x, flip in kinds]
    hits = torch.stack([(whole(samples, seed) == each).flatten(1).all(1) for each in cropped])
    assert (hits.sum(0) == 1).all()
    return [kinds[i] for i in hits.int().argmax(0).tolist()]


def test_augmented_pictures_are_cropped_and_flipped_all_ways_alike() -> None:
    many = torch.randint(256, (2000, 7, 9, 3), generator=torch.Generator().manual_seed(1)).byte()
    drawn = crops(in_memory(many), many, 0)
    assert len(set(drawn)) == 50
    assert not any(flip for *_, flip in crops(in_memory(flip=False), PIXELS, 0))
    plain = (PIXELS / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(whole(in_memory()), plain.permute(0, 3, 1, 2))
    # In every process: a change here gives every run other pictures.
    assert crops(in_memory(), PIXELS, 3)[:4] == [(1, 3, 1), (3, 4, 1), (2, 1, 1), (2, 0, 0)]


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


@needs_torchvision
def test_subsets_are_the_samples_numbered_anew(from_files: Callable[..., Samples]) -> None:
    for samples, count, size in ((in_memory(), 40, (7, 9)), (from_files(), 8, (12, 12))):
        part = samples.subset(torch.tensor([5, 7, 3])).subset(torch.tensor([1, 2]))
        assert torch.equal(part.labels, samples.labels[[7, 3]])
        assert torch.equal(whole(part), whole(samples)[[7, 3]])
        assert whole(part, 2).shape == (2, 3, *size)
        assert torch.equal(whole(samples.subset(torch.arange(4), False), 2), whole(samples)[:4])
        assert len(samples) == count


# ---- what an augmentation is a function of


def check_function_of_seed_and_number(samples: Samples) -> None:
    n, first, plain = len(samples), whole(samples, 3), whole(samples)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).tolist()
    assert torch.equal(rows(samples, [order[:2], order[2:3], order[3:]], 3), first[order])
    assert torch.equal(rows(samples, [[n - 1], [0, n - 1]], 3), first[[n - 1, 0, n - 1]])
    assert torch.equal(rows(samples, [order], None), plain[order])
    assert not torch.equal(whole(samples, 4), first)
    assert not torch.equal(plain, first)


@needs_torchvision
def test_augmentation_is_of_seed_and_number_alone(from_files: Callable[..., Samples]) -> None:
    """Not of the workers either; and no draw of others changes."""
    before = random_states()
    check_function_of_seed_and_number(in_memory())
    samples = from_files()
    check_function_of_seed_and_number(samples)
    assert torch.equal(rows(from_files(2), [[0, 5], [7, 4]], 3), whole(samples, 3)[[0, 5, 7, 4]])
    open_data("digits", fraction=0.5)
    assert random_states() == before


@needs_torchvision
@pytest.mark.filterwarnings("error")
def test_no_more_workers_than_cpus(from_files: Callable[..., Samples]) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    try:
        os.sched_setaffinity(0, cpus[:1])
        assert torch.equal(whole(from_files(8)), whole(from_files()))
    finally:
        os.sched_setaffinity(0, cpus)


# ---- parts of the training samples


def test_a_part_of_every_class_is_kept_or_set_apart() -> None:
    labels = torch.tensor([0] * 100 + [1] * 20 + [2] * 2)[torch.randperm(122)]
    some, more = stratified(labels, 0.1), stratified(labels, 0.5)
    assert labels[some].bincount().tolist() == [10, 2, 1]
    assert labels[more].bincount().tolist() == [50, 10, 1]
    assert set(some.tolist()) < set(more.tolist())
    assert stratified(labels, 1e-9).shape == (3,)
    kept, held = set_apart(labels, 0.1)
    assert labels[held].bincount().tolist() == [10, 2, 1]
    assert torch.equal(torch.cat([kept, held]).sort().values, torch.arange(122))
    assert labels[set_apart(labels, 0.9)[0]].bincount().tolist() == [10, 2, 1]
    for found in (some, kept, held):
        assert torch.equal(found, found.sort().values)
    for again, found in ((stratified(labels, 0.1), some), (set_apart(labels, 0.1)[1], held)):
        assert torch.equal(again, found)
    with pytest.raises(ConfigError, match=r"validation: got 0\.1,.* is 0, as classes 3 have"):
        set_apart(torch.tensor([0, 0, 3]), 0.1)


@pytest.mark.parametrize("count", [10, 25])
def test_few_labels_are_balanced_and_seeded(count: int) -> None:
    found = few_labels(DIGITS, count, seed=3)
    assert len(set(found.tolist())) == count
    per_class = DIGITS[found].bincount(minlength=10)
    assert per_class.max() - per_class.min() == (1 if count % 10 else 0)
    assert torch.equal(found, few_labels(DIGITS, count, seed=3))
    assert not torch.equal(found, few_labels(DIGITS, count, seed=4))


# ---- the digits


def test_split_is_disjoint_complete_stratified_and_stable() -> None:
    split = split_digits(DIGITS)
    assert [len(split[name]) for name in ("train", "val", "test")] == [997, 300, 500]
    assert torch.equal(torch.cat([*split.values()]).sort().values, torch.arange(1797))
    share = DIGITS.bincount() / len(DIGITS)
    for part in split.values():
        own = DIGITS[part].bincount(minlength=10) / len(part)
        # Stratified: every class within one image of its share (of rounding, for the val part).
        assert ((own - share).abs() * len(part)).max() < 1.5
    # These are the held-out images: a change here changes every published figure.
    assert split["test"][:8].tolist() == TEST_HEAD
    assert split["val"][:8].tolist() == VAL_HEAD


def test_digits_are_the_enlarged_scans() -> None:
    data = open_data("digits")
    assert (data.classes, data.channels, data.image_size) == (10, 1, 16)
    assert data.names == tuple("0123456789")
    assert (len(data.train), len(data.evaluate)) == (997, 500)
    known = whole(data.train)
    assert known.shape == (997, 1, 16, 16)
    assert known.mean().abs() < 1e-5
    assert known.std() == pytest.approx(1.0, abs=1e-5)
    images = torch.from_numpy(load_digits().images[TEST_HEAD]).float()[:, None] / 16
    images = interpolate(images, size=(16, 16), mode="bilinear", align_corners=False)
    shown = rows(data.evaluate, [range(8)], 1) * data.std[0] + data.mean[0]
    assert (shown - images).abs().max() < 0.51 / 255
    assert data.evaluate.labels[:8].tolist() == DIGITS[TEST_HEAD].tolist()


def test_digits_options() -> None:
    val = open_data("digits", evaluate="val", image_size=9, fraction=0.1, channels_last=True)
    assert val.evaluate.labels[:8].tolist() == DIGITS[VAL_HEAD].tolist()
    assert whole(val.evaluate).shape == (300, 1, 9, 9)
    assert 95 <= len(val.train) <= 105
    own = open_data("digits", image_size=9)
    assert (val.mean, val.std) == (own.mean, own.std)  # of all images, not of the fraction
    given = open_data("digits", image_size=9, mean=(0.5,), std=(0.25,))
    assert (given.mean, given.std) == ((0.5,), (0.25,))
    x, y = whole(own.evaluate), whole(given.evaluate)
    assert (x * own.std[0] + own.mean[0] - (y * 0.25 + 0.5)).abs().max() < 1e-6
    assert given.digest == own.digest != val.digest
    with pytest.raises(ConfigError, match=r"mean: got 0.5, 0.5, allowed is a number for each ch"):
        open_data("digits", mean=(0.5, 0.5))


@needs_torchvision
def test_images_are_set_apart_to_tune_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--evaluate val reports on a sixth of the training images, and never on a test image."""
    write_cifar(tmp_path, "cifar10", monkeypatch)
    all_images = open_data("cifar10", tmp_path)
    tuned = open_data("cifar10", tmp_path, evaluate="val", validation=0.25)
    assert tuned.validation is not None
    parts = [tuned.train, tuned.evaluate, tuned.validation]
    assert [len(part) for part in parts] == [12, 4, 4]
    assert torch.bincount(tuned.evaluate.labels).tolist() == [2, 2]
    found = torch.cat([whole(part) for part in parts]).flatten(1)
    wanted = whole(all_images.train).flatten(1)
    assert torch.equal(found.unique(dim=0), wanted.unique(dim=0))
    assert torch.equal(whole(tuned.evaluate, 1), whole(tuned.evaluate))


def test_train_and_validation_are_the_images_to_train_with() -> None:
    def opened(**options: Any) -> Data:
        return open_data("digits", image_size=8, fraction=0.5, **options)

    both, data = opened(augment=False), opened(validation=0.25)
    rest = opened(validation=0.25, augment=False)
    assert data.validation is not None
    found = [x.numpy().tobytes() for x in (*whole(rest.train, 2), *whole(data.validation, 1))]
    assert sorted(found) == sorted(x.numpy().tobytes() for x in whole(both.train))
    assert (data.digest, both.validation) == (both.digest, None)


# ---- CIFAR


@needs_torchvision
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, pixels = write_cifar(tmp_path, name, monkeypatch)
    data = open_data(name, tmp_path)
    assert (data.classes, data.channels, data.image_size) == (2, 3, 32)
    assert (data.names, data.facts) == (("apple", "bear"), {})
    # The authors' program has those of CIFAR-10 for both.
    assert [value * 255 for value in data.mean] == pytest.approx([125.3, 123.0, 113.9])
    assert [value * 255 for value in data.std] == pytest.approx([63.0, 62.1, 66.7])
    mean, std = (torch.tensor(v)[:, None, None] for v in (data.mean, data.std))
    for part, expected in pixels.items():
        shown = whole(getattr(data, part)) * std + mean
        assert (shown * 255 - expected.permute(0, 3, 1, 2)).abs().max() < 1e-3
    assert data.evaluate.labels.tolist() == [0, 1, 0, 1]
    assert torch.equal(whole(data.evaluate, 1), whole(data.evaluate))
    check_function_of_seed_and_number(data.train)


@needs_torchvision
def test_cifar_that_is_not_the_published_is_refused_or_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(self: object) -> None:
        raise OSError("no network")

    folder, _ = write_cifar(tmp_path, "cifar10", monkeypatch)
    digest = open_data("cifar10", tmp_path).digest
    assert open_data("cifar10", tmp_path, download=True).digest == digest  # nothing is missing
    (folder / "test_batch").write_bytes((folder / "data_batch_1").read_bytes())
    needs = f"data 'cifar10': needs the published files in {folder}"
    with pytest.raises(ConfigError, match=rf"{needs} \(.*; --download fetches them$"):
        open_data("cifar10", tmp_path)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", download)
    with pytest.raises(ConfigError, match=rf"{needs} \(OSError: no network\)$"):
        open_data("cifar10", tmp_path, download=True)


# ---- Fashion-MNIST


@needs_torchvision
@pytest.mark.parametrize("size", [28, 31, 32])
@pytest.mark.parametrize("compressed", [False, True])
def test_fashion_mnist(compressed: bool, size: int, tmp_path: Path) -> None:
    folder = tmp_path / ("packed" if compressed else "FashionMNIST/raw")
    pixels = write_fashion_mnist(folder, compressed=compressed)
    root = folder if compressed else tmp_path
    data = open_data("fashion-mnist", root, image_size=size)
    assert (data.classes, data.channels, data.image_size) == (10, 1, size)
    assert data.names[::9] == ("T-shirt/top", "Ankle boot")
    margin = (size - 28) // 2
    for part, expected in pixels.items():
        shown = 255 * (whole(getattr(data, part))[:, 0] * data.std[0] + data.mean[0])
        assert shown.shape[1:] == (size, size)
        inside = shown[:, margin : margin + 28, margin : margin + 28]
        assert (inside - expected).abs().max() < 1e-3
        assert shown.abs().sum() - inside.abs().sum() < 1  # black
    assert data.evaluate.labels.tolist() == list(range(10))
    assert torch.equal(whole(data.evaluate, 1), whole(data.evaluate))
    check_function_of_seed_and_number(data.train)


@needs_torchvision
def test_fashion_mnist_that_is_damaged_or_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "FashionMNIST/raw"
    needs = f"data 'fashion-mnist': needs the published files in {folder}"
    for download, advice in ((False, "; --download fetches them"), (True, "")):
        monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", ["file:///nowhere/"])
        with pytest.raises(ConfigError, match=rf"{needs}.*\(RuntimeError: .*\){advice}$"):
            open_data("fashion-mnist", tmp_path, download=download)
    shutil.rmtree(tmp_path / "FashionMNIST", ignore_errors=True)
    write_fashion_mnist(folder)
    images = folder / "train-images-idx3-ubyte"
    whole_file = images.read_bytes()
    images.write_bytes(whole_file[:-1])
    with pytest.raises(ConfigError, match=needs):
        open_data("fashion-mnist", tmp_path)
    images.write_bytes(whole_file[:7] + b"\1" + whole_file[8 : 16 + 28 * 28])
    with pytest.raises(ConfigError, match="40 labels, \\(1, 28, 28\\) pixels"):
        open_data("fashion-mnist", tmp_path)
    packed = tmp_path / "packed"
    write_fashion_mnist(packed, compressed=True)
    file = packed / "t10k-labels-idx1-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ConfigError, match=f"root: {file} cannot be read: EOFError"):
        open_data("fashion-mnist", packed)


def test_the_packaged_fashion_mnist_is_found_where_no_root_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("at_fused.train.config.FASHION_MNIST", tmp_path / "packaged")
    layer = {"data": "fashion-mnist"}
    assert resolve(layer).root == "data"
    (tmp_path / "packaged").mkdir()
    assert resolve(layer).root == str(tmp_path / "packaged")
    assert resolve(layer, {"root": "data"}).root == "data"
    assert resolve({"data": "cifar10"}).root == "data"
    (tmp_path / "data/FashionMNIST").mkdir(parents=True)
    assert resolve(layer).root == "data"


# ---- a folder


@needs_torchvision
def test_folder(tmp_path: Path) -> None:
    classes, val = ("ant", "bee", "cat"), tmp_path / "val"
    for part, each in (("train", 5), ("val", 2)):
        write_pictures(tmp_path, part, classes, each)

    def opened(**options: Any) -> Data:
        return open_data("folder", tmp_path, image_size=12, **options)

    data = opened(fraction=0.4)
    assert (data.classes, data.channels, data.image_size) == (3, 3, 12)
    assert (data.names, data.facts, data.own) == (classes, {}, False)
    for samples in (data.train, data.evaluate):
        assert samples.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(whole(data.evaluate, 1), whole(data.evaluate))
    last = opened(fraction=0.4, channels_last=True, workers=1)
    assert torch.equal(whole(last.train, 1), whole(data.train, 1))
    (val / "bee" / "0.png").unlink()
    (val / "bee" / "1.png").rename(val / "bee" / "1.txt")
    with pytest.raises(FileNotFoundError, match=r"no valid file for the classes bee.*\.png"):
        opened()


@needs_torchvision
@pytest.mark.parametrize("size", [12, 30])
def test_folder_pictures_are_cut_as_for_imagenet(size: int, tmp_path: Path) -> None:
    from torchvision import transforms

    paths = write_pictures(tmp_path, "train", ("a", "b"), 3)
    samples = on_disk(paths, size, mean=(0, 0, 0), std=(1, 1, 1))
    for i, path in enumerate(paths):
        picture = Image.open(path)
        shorter = transforms.Resize(round(size * 256 / 224))
        cut = transforms.Compose([shorter, transforms.CenterCrop(size), transforms.ToTensor()])
        assert torch.equal(whole(samples)[i], cut(picture))
        draw = transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()
        with seeded(7, i):
            part = transforms.Compose([*draw, transforms.ToTensor()])(picture)
        assert torch.equal(whole(samples, 7)[i], part)


def write_picture(path: Path, mode: str, pixels: Any, **options: Any) -> str:
    """A file of four pixels."""
    picture = Image.new(mode, (4, 1))
    if mode == "P":
        picture.putpalette([0, 0, 0, 7, 7, 7])
    picture.putdata(pixels)
    picture.save(path, **options)
    return str(path)


CLEAR = [(9, 9, 9, 255), (9, 9, 9, 0), (0, 0, 0, 51), (9, 9, 9, 255)]
FRAMES = {"save_all": True, "append_images": [Image.new("L", (4, 1))]}


@pytest.mark.parametrize(
    ("suffix", "mode", "pixels", "options", "expected"),
    [
        ("png", "RGBA", CLEAR, {}, [9, 255, 204, 9]),
        ("webp", "RGBA", CLEAR, {"lossless": True, "exact": True}, [9, 255, 204, 9]),
        ("png", "LA", [each[2:] for each in CLEAR], {}, [9, 255, 204, 9]),
        ("png", "RGBA", [(v, v, v, 255) for v in (0, 9, 99, 255)], {}, [0, 9, 99, 255]),
        ("png", "L", [5, 6, 7, 5], {"transparency": 6}, [5, 255, 7, 5]),
        ("png", "P", [0, 1, 0, 1], {"transparency": bytes([255, 0])}, [0, 255, 0, 255]),
        ("png", "1", [0, 255, 0, 255], {}, [0, 255, 0, 255]),
        ("tif", "CMYK", [(0, 0, 0, 55)] * 4, {}, [200] * 4),
        ("png", "L", [1, 2, 3, 4], FRAMES, [1, 2, 3, 4]),
        ("webp", "RGB", [(5, 5, 5)] * 4, {"lossless": True, "exif": b"Exif\0\0damaged"}, [5] * 4),
    ],
)
def test_pictures_are_decoded(
    suffix: str, mode: str, pixels: Any, options: Any, expected: list[int], tmp_path: Path
) -> None:
    path = write_picture(tmp_path / f"x.{suffix}", mode, pixels, **options)
    picture = decode(path)
    assert picture.mode == "RGB"
    assert np.array_equal(np.array(picture)[0], np.array([expected] * 3).T)


@needs_torchvision
@pytest.mark.parametrize("mode", ["F", "I", "I;16"])
def test_pictures_of_more_than_8_bits_are_refused(mode: str, tmp_path: Path) -> None:
    path = write_picture(tmp_path / "x.tif", mode, [0, 1, 2, 3])
    message = f"cannot read the picture {path}: .* are {mode}, allowed are 1, .*: convert it to 8"
    with pytest.raises(ConfigError, match=message):
        whole(on_disk([path], 4))


@pytest.mark.parametrize(
    ("suffix", "mode"), [("png", "L"), ("tif", "L"), ("tif", "RGB"), ("jpg", "RGB")]
)
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
        found = np.array(decode(str(path)))[..., 0].astype(int)
        assert np.abs(found - upright).max() < 5, orientation


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


@needs_torchvision
def test_pictures_that_cannot_be_read_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("train", "val"):
        write_pictures(tmp_path, part, ("ant", "bee"), 3)
    bee = tmp_path / "train" / "bee"
    whole_file = (bee / "0.png").read_bytes()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("1", (100, 50)).save(bee / "bomb.png")
    (bee / "cut.png").write_bytes(whole_file[:60])
    (bee / "text.jpg").write_text("not a picture")
    write_picture(bee / "deep.png", "I;16", [0] * 4)
    found = inspect(tmp_path)
    names = {"bomb.png": "5000 pixels", "cut.png": "truncated", "deep.png": "are I;16, allowed"}
    names["text.jpg"] = "cannot identify image file"
    assert list(found.unreadable) == [f"train/bee/{name}" for name in names]
    for said, reason in zip(found.unreadable.values(), names.values(), strict=True):
        assert re.search(f"^.*{reason}.*$", said)
    assert inspect(tmp_path, workers=2) == found
    assert inspect(tmp_path, parts=("val",)).unreadable == {}

    known = json.loads(json.dumps(asdict(found)))
    with monkeypatch.context() as patch:  # nothing has changed, and nothing is read
        patch.setattr(folder, "decode", None)
        assert inspect(str(tmp_path), known=known) == found
    message = (
        rf"4 pictures cannot be read, allowed is 3: {bee}/bomb.png \(.*, {bee}/cut.png \(.*, "
        rf"{bee}/deep.png \(.*\), \.\.\.; --skip-unreadable N leaves up to N"
    )
    check_unreadable(found, tmp_path, 4)
    with pytest.raises(ConfigError, match=message):
        check_unreadable(found, tmp_path, 3)
    data = open_data("folder", tmp_path, image_size=4, pictures=found)
    assert [len(data.train), len(data.evaluate)] == [6, 6]
    assert data.facts == {"left_out": found.unreadable}
    every = open_data("folder", tmp_path, image_size=4, workers=1)
    with pytest.raises(ConfigError, match=rf"^cannot read the picture {bee}/bomb.png: .*$"):
        whole(every.train, 1)
    none = Pictures("", {f"val/bee/{i}.png": "bad" for i in range(3)})
    with pytest.raises(ConfigError, match=f"no picture of bee in {tmp_path}/val can be read"):
        open_data("folder", tmp_path, pictures=none)
    (bee / "cut.png").write_bytes(whole_file)
    assert "train/bee/cut.png" not in inspect(tmp_path, known=known).unreadable


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
    picture.write_bytes(picture.read_bytes() + b"0")
    assert digest(root)[0] != first


def test_folders_that_are_not_as_wanted(tmp_path: Path) -> None:
    for made, error, message in (
        ("x/a", FileNotFoundError, f"No such file or directory: '{tmp_path}/train'"),
        ("train/a", FileNotFoundError, r"train/<class>/<picture> and val/<class>/.*/val'"),
        ("val/b", ConfigError, "same classes; only one of them has a, b"),
    ):
        write_pictures(tmp_path, *made.split("/"), 1)
        with pytest.raises(error, match=message):
            open_data("folder", tmp_path)


@pytest.mark.parametrize("name", ["folder", "cifar10", "fashion-mnist"])
def test_without_torchvision(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("torchvision", "torchvision.datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
    advice = r'needs torchvision: pip install "at_fused\[train\]" \(ModuleNotFoundError: .*torchvi'
    with pytest.raises(ImportError, match=f"'{name}' {advice}"):
        open_data(name, tmp_path, download=name != "folder")


# ---- one's own


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


def test_own_data(mine: Callable[..., Any]) -> None:
    roots, drawn = [], []

    def make(root: str) -> Any:
        roots.append(root)
        drawn.append(torch.rand(()).item())
        return Noise(12, ["a", "b", "c"], targets=np.arange(12) % 3), Noise(4)

    before = random_states()
    data = mine(make, channels_last=True)
    assert (data.classes, data.channels, data.image_size) == (3, 2, 5)
    assert (data.names, data.own) == (("a", "b", "c"), True)
    check_function_of_seed_and_number(data.train)
    assert torch.equal(whole(data.evaluate, None), whole(data.evaluate, None))
    ((x, _, _),) = data.train.batches([torch.arange(12)], 1)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert ((x / 10).floor().long()[:, 0, 0, 0] == torch.arange(12)).all()
    assert (x / 10 - (x / 10).floor()).max() < 0.31
    assert torch.equal(whole(mine(make, workers=2).train, 1), x)
    assert roots == ["ROOT"] * 2
    # A function draws the same each time, and changes no draw of others.
    assert len(set(drawn)) == 1
    assert random_states() == before


def test_own_data_without_names(mine: Callable[..., Any]) -> None:
    """Labels are those of the items, classes those of the labels."""
    pair = TensorDataset(torch.zeros(6, 1, 4, 4), torch.tensor([0, 3, 1, 0, 3, 1]))
    data = mine((pair, pair))
    assert data.names == ("0", "1", "2", "3")
    assert data.train.labels.tolist() == [0, 3, 1, 0, 3, 1]
    digests = {mine(made).digest for made in (
        (Noise(), Noise()),
        (Noise(made=lambda x: x + 1), Noise()),
        (Noise(), Noise(made=lambda x: x + 1)),
        (Noise(classes=["a", "b", "c"]), Noise()),
        (Noise(), Noise(11)),
    )}  # fmt: skip
    assert len(digests) == 5
    counted: list[int] = []
    known = Noise(50, targets=list(range(3)) * 16 + [0, 1], made=lambda x: counted.append(1) or x)
    mine((known, known))
    assert len(counted) < 50  # of 100


NOISE = Noise()


def made(by: Callable[[Tensor], Any]) -> tuple[Noise, Noise]:
    return Noise(made=by), NOISE


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (ZeroDivisionError, "data mine:data: raises ZeroDivisionError: two"),
        (5, r"must return \(train, test\), got int"),
        ((DataLoader(NOISE), NOISE), "data: train must be a map-style .* got DataLoader"),
        ((NOISE, Noise(0)), "data: test must be a map-style torch Dataset with items, got Noise"),
        (([5], NOISE), r"train\[0\] must be \(x, label\) .* ToTensor .*; got int"),
        (made(lambda x: x.byte()), r"train\[0\] must .* got \(torch.uint8 \(2, 4, 5\), int\)"),
        ((NOISE, Noise(made=lambda x: x / 0)), r"data: test\[0\] has NaN or inf among its"),
        (made(lambda x: {}["key"]), r"\[0\] raises KeyError: 'key'"),
        ((NOISE, Noise(made=lambda x: x[:1])), r"test\[0\] must .*\(2, 4, 5\).* got \(1, 4, 5\)"),
        ((Noise(targets=[2] * 12), NOISE), r"train\[0\] must .* label 2, .* got .* and 0"),
        ((Noise(classes=["a", "b"]), NOISE), "train must have labels from 0 to 1, .*got 0 to 2"),
        ((Noise(2), NOISE), "test must have labels from 0 to 1, the classes of .*; got 0 to 2"),
    ],
)
def test_own_data_that_are_none(made: Any, message: str, mine: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        mine(made)
    assert "mine:data" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_wrong_item_ends_the_epoch(mine: Callable[..., Any]) -> None:
    train = Noise(12, made=lambda x: {}[1] if x.max() > 110 else x, targets=[*range(3)] * 4)
    with pytest.raises(ConfigError, match=r"^data mine:data: train\[11\] raises KeyError: 1$"):
        whole(mine((train, Noise()), workers=1).train)


def test_the_example_of_own_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    data = open_data("examples.own:data", "", validation=0.1)
    assert (data.classes, data.channels, data.image_size) == (10, 1, 16)
    assert data.validation is not None
    assert [len(data.train), len(data.validation), len(data.evaluate)] == [1167, 130, 500]
    for samples, same_always in ((data.evaluate, True), (data.train, False)):
        few = samples.subset(torch.arange(9))
        assert torch.equal(whole(few, 1), whole(few, 2)) == same_always


# ---- the program on them


@needs_torchvision
def test_a_folder_trains_torchvisions_networks(tmp_path: Path) -> None:
    """With workers, and a student and a teacher whose layers are found."""
    for part, each in (("train", 4), ("val", 1)):
        write_pictures(tmp_path, part, ("ant", "bee"), each)
    config = resolve(
        {"preset": "imagenet-resnet18-from-34", "root": str(tmp_path), "epochs": 1}
        | {"student": "shufflenet_v2_x0_5", "teacher": "mobilenet_v3_small", "image_size": 64}
        | {"batch_size": 4, "workers": 1, "speed": "exact", "threads": 1, "teacher_from": ""}
    )
    (tmp_path / "run").mkdir()
    experiment = Experiment(config, tmp_path / "run")
    assert [pair.student for pair in experiment.pairs] == ["stage2", "stage3", "stage4"]
    result = experiment.run()
    (curve,) = result.students["at"]
    assert curve.chosen["step"] == 2
    assert curve.chosen["transfer"] > 0
    assert result.teacher is not None
