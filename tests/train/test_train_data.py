"""Data sets of at-fused-train: their content, and the seeds of augmentation."""

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
from image_data import (
    Noise,
    digit_images,
    needs_torchvision,
    open_data,
    torchvision,
    write_cifar,
    write_fashion_mnist,
    write_images,
)
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, TensorDataset

from at_fused.train.config import ConfigError, resolve
from at_fused.train.data import Data, ImageScan, Samples, check_unreadable, folder, scan_images
from at_fused.train.data.datasets import split_digits
from at_fused.train.data.folder import ImageFiles, decode
from at_fused.train.data.samples import (
    InMemory,
    OnDemand,
    balanced_subset,
    hold_out,
    normaliser,
    seed_generators,
    stratified_subset,
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
    labels, finish = torch.arange(len(paths)) // 4, normaliser(mean, std, "cpu", False)
    return OnDemand(ImageFiles(paths, size), labels, finish, True, "cpu", workers)


@pytest.fixture(scope="module")
def from_files(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Samples]:
    """Return a function that opens a folder with eight images."""
    paths = write_images(tmp_path_factory.mktemp("images"), "train", ("a", "b"), 4)
    return lambda workers=0: on_disk(paths, 12, workers)


def rows(samples: Samples, chunks: Sequence[Sequence[int]], seed: int | None) -> Tensor:
    """Return the samples of all chunks, after checks of the batches."""
    batches = []
    tensors = [torch.tensor(chunk) for chunk in chunks]
    for chunk, (x, y, index) in zip(tensors, samples.batches(tensors, seed), strict=True):
        assert x.dtype == torch.float32
        assert torch.equal(index, chunk)
        assert torch.equal(y, samples.labels[chunk])
        batches.append(x)
    return torch.cat(batches)


def all_rows(samples: Samples, seed: int | None = None) -> Tensor:
    return rows(samples, [range(len(samples))], seed)


def random_states() -> list[Any]:
    return [torch.get_rng_state().tolist(), list(np.random.get_state()[1]), random.getstate()]


# ---- in memory


def crops(samples: InMemory, pixels: Tensor, seed: int) -> list[tuple[int, int, int]]:
    """Return the (top, left, flip) by which each image was padded, cropped and flipped."""
    padded = np.pad(pixels.numpy(), ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    scaled = padded.astype(np.float32) / np.float32(255) - np.float32(MEAN)
    scaled = torch.from_numpy(scaled / np.float32(STD)).permute(0, 3, 1, 2)
    kinds = [(top, left, flip) for top in range(5) for left in range(5) for flip in (0, 1)]
    cropped = [scaled[:, :, y : y + 7, x : x + 9].flip([-1] * flip) for y, x, flip in kinds]
    hits = torch.stack([(all_rows(samples, seed) == each).flatten(1).all(1) for each in cropped])
    assert (hits.sum(0) == 1).all()
    return [kinds[i] for i in hits.int().argmax(0).tolist()]


def test_all_crops_and_flips_are_drawn() -> None:
    many = torch.randint(256, (2000, 7, 9, 3), generator=torch.Generator().manual_seed(1)).byte()
    assert len(set(crops(in_memory(many), many, 0))) == 50
    assert not any(flip for *_, flip in crops(in_memory(flip=False), PIXELS, 0))
    plain = (PIXELS / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(all_rows(in_memory()), plain.permute(0, 3, 1, 2))
    # Fixed, as a change here would change the images of every run.
    assert crops(in_memory(), PIXELS, 3)[:4] == [(1, 3, 1), (3, 4, 1), (2, 1, 1), (2, 0, 0)]


@pytest.mark.parametrize("channels", [1, 3])
def test_memory_formats_give_the_same_bits(channels: int) -> None:
    pixels, labels = digit_images(20, 16, channels), torch.zeros(20, dtype=torch.int64)
    # A view, like CIFAR's pixels: batches must not inherit its strides.
    pixels = pixels.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    chunks = [torch.arange(20)]
    options = MEAN[:channels], STD[:channels], 2, True, "cpu"
    ((nchw, _, _),) = InMemory(pixels, labels, *options).batches(chunks, 1)
    ((nhwc, _, _),) = InMemory(pixels, labels, *options, channels_last=True).batches(chunks, 1)
    assert nchw.stride() == (channels * 256, 256, 16, 1)
    assert nhwc.stride() == (channels * 256, 1, 16 * channels, channels)
    assert torch.equal(nchw, nhwc)


@needs_torchvision
def test_subsets_are_renumbered(from_files: Callable[..., Samples]) -> None:
    for samples, count, size in ((in_memory(), 40, (7, 9)), (from_files(), 8, (12, 12))):
        part = samples.subset(torch.tensor([5, 7, 3])).subset(torch.tensor([1, 2]))
        assert torch.equal(part.labels, samples.labels[[7, 3]])
        assert torch.equal(all_rows(part), all_rows(samples)[[7, 3]])
        assert all_rows(part, 2).shape == (2, 3, *size)
        plain = samples.subset(torch.arange(4), augment=False)
        assert torch.equal(all_rows(plain, 2), all_rows(samples)[:4])
        assert len(samples) == count


# ---- augmentation


def check_augmentation_is_reproducible(samples: Samples) -> None:
    n, first, plain = len(samples), all_rows(samples, 3), all_rows(samples)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).tolist()
    assert torch.equal(rows(samples, [order[:2], order[2:3], order[3:]], 3), first[order])
    assert torch.equal(rows(samples, [[n - 1], [0, n - 1]], 3), first[[n - 1, 0, n - 1]])
    assert torch.equal(rows(samples, [order], None), plain[order])
    assert not torch.equal(all_rows(samples, 4), first)
    assert not torch.equal(plain, first)


@needs_torchvision
def test_augmentation_depends_on_seed_and_number_only(from_files: Callable[..., Samples]) -> None:
    """Vary chunks and workers; check also that the global generators stay unchanged."""
    before = random_states()
    check_augmentation_is_reproducible(in_memory())
    samples = from_files()
    check_augmentation_is_reproducible(samples)
    assert torch.equal(rows(from_files(2), [[0, 5], [7, 4]], 3), all_rows(samples, 3)[[0, 5, 7, 4]])
    open_data("digits", fraction=0.5)
    assert random_states() == before


@needs_torchvision
@pytest.mark.filterwarnings("error")
def test_workers_are_limited_to_cpus(from_files: Callable[..., Samples]) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    try:
        os.sched_setaffinity(0, cpus[:1])
        assert torch.equal(all_rows(from_files(8)), all_rows(from_files()))
    finally:
        os.sched_setaffinity(0, cpus)


# ---- subsets


def test_subsets_keep_the_class_balance() -> None:
    labels = torch.tensor([0] * 100 + [1] * 20 + [2] * 2)[torch.randperm(122)]
    small, large = stratified_subset(labels, 0.1), stratified_subset(labels, 0.5)
    assert labels[small].bincount().tolist() == [10, 2, 1]
    assert labels[large].bincount().tolist() == [50, 10, 1]
    assert set(small.tolist()) < set(large.tolist())
    assert stratified_subset(labels, 1e-9).shape == (3,)
    kept, held_out = hold_out(labels, 0.1)
    assert labels[held_out].bincount().tolist() == [10, 2, 1]
    assert torch.equal(torch.cat([kept, held_out]).sort().values, torch.arange(122))
    assert labels[hold_out(labels, 0.9)[0]].bincount().tolist() == [10, 2, 1]
    for subset in (small, kept, held_out):
        assert torch.equal(subset, subset.sort().values)
    assert torch.equal(stratified_subset(labels, 0.1), small)
    assert torch.equal(hold_out(labels, 0.1)[1], held_out)
    with pytest.raises(ConfigError, match=r"validation: got 0\.1,.* 0, because classes 3 have"):
        hold_out(torch.tensor([0, 0, 3]), 0.1)


@pytest.mark.parametrize("count", [10, 25])
def test_label_subset_is_balanced_and_seeded(count: int) -> None:
    subset = balanced_subset(DIGITS, count, seed=3)
    assert len(set(subset.tolist())) == count
    per_class = DIGITS[subset].bincount(minlength=10)
    assert per_class.max() - per_class.min() == (1 if count % 10 else 0)
    assert torch.equal(subset, balanced_subset(DIGITS, count, seed=3))
    assert not torch.equal(subset, balanced_subset(DIGITS, count, seed=4))


# ---- digits


def test_digits_split_is_disjoint_complete_stratified_and_fixed() -> None:
    split = split_digits(DIGITS)
    assert [len(split[name]) for name in ("train", "val", "test")] == [997, 300, 500]
    assert torch.equal(torch.cat([*split.values()]).sort().values, torch.arange(1797))
    fractions = DIGITS.bincount() / len(DIGITS)
    for part in split.values():
        own = DIGITS[part].bincount(minlength=10) / len(part)
        # Every class is within one image of its fraction (half an image more after rounding).
        assert ((own - fractions).abs() * len(part)).max() < 1.5
    # Fixed, as a change here would change all published results.
    assert split["test"][:8].tolist() == TEST_HEAD
    assert split["val"][:8].tolist() == VAL_HEAD


def test_digits_are_the_enlarged_scans() -> None:
    data = open_data("digits")
    assert (data.classes, data.channels, data.image_size) == (10, 1, 16)
    assert data.names == tuple("0123456789")
    assert (len(data.train), len(data.evaluate)) == (997, 500)
    x = all_rows(data.train)
    assert x.shape == (997, 1, 16, 16)
    assert x.mean().abs() < 1e-5
    assert x.std() == pytest.approx(1.0, abs=1e-5)
    images = torch.from_numpy(load_digits().images[TEST_HEAD]).float()[:, None] / 16
    images = interpolate(images, size=(16, 16), mode="bilinear", align_corners=False)
    actual = rows(data.evaluate, [range(8)], 1) * data.std[0] + data.mean[0]
    assert (actual - images).abs().max() < 0.51 / 255
    assert data.evaluate.labels[:8].tolist() == DIGITS[TEST_HEAD].tolist()


def test_digits_options() -> None:
    val = open_data("digits", evaluate="val", image_size=9, fraction=0.1, channels_last=True)
    assert val.evaluate.labels[:8].tolist() == DIGITS[VAL_HEAD].tolist()
    assert all_rows(val.evaluate).shape == (300, 1, 9, 9)
    assert 95 <= len(val.train) <= 105
    default = open_data("digits", image_size=9)
    assert (val.mean, val.std) == (default.mean, default.std)  # not those of the fraction
    changed = open_data("digits", image_size=9, mean=(0.5,), std=(0.25,))
    assert (changed.mean, changed.std) == ((0.5,), (0.25,))
    x, y = all_rows(default.evaluate), all_rows(changed.evaluate)
    assert (x * default.std[0] + default.mean[0] - (y * 0.25 + 0.5)).abs().max() < 1e-6
    assert changed.digest == default.digest != val.digest
    with pytest.raises(ConfigError, match=r"mean: got 0.5, 0.5, expected a number for each of"):
        open_data("digits", mean=(0.5, 0.5))


@needs_torchvision
def test_evaluate_val_holds_out_training_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--evaluate val reports on a sixth of the training images and ignores the test images."""
    write_cifar(tmp_path, "cifar10", monkeypatch)
    all_images = open_data("cifar10", tmp_path)
    tuned = open_data("cifar10", tmp_path, evaluate="val", validation=0.25)
    assert tuned.validation is not None
    parts = [tuned.train, tuned.evaluate, tuned.validation]
    assert [len(part) for part in parts] == [12, 4, 4]
    assert torch.bincount(tuned.evaluate.labels).tolist() == [2, 2]
    actual = torch.cat([all_rows(part) for part in parts]).flatten(1)
    expected = all_rows(all_images.train).flatten(1)
    assert torch.equal(actual.unique(dim=0), expected.unique(dim=0))
    assert torch.equal(all_rows(tuned.evaluate, 1), all_rows(tuned.evaluate))


def test_train_and_validation_partition_the_training_images() -> None:
    def digits(**options: Any) -> Data:
        return open_data("digits", image_size=8, fraction=0.5, **options)

    both, data = digits(augment=False), digits(validation=0.25)
    rest = digits(validation=0.25, augment=False)
    assert data.validation is not None
    images = [*all_rows(rest.train, 2), *all_rows(data.validation, 1)]
    actual = sorted(x.numpy().tobytes() for x in images)
    assert actual == sorted(x.numpy().tobytes() for x in all_rows(both.train))
    assert (data.digest, both.validation) == (both.digest, None)


# ---- CIFAR


@needs_torchvision
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, pixels = write_cifar(tmp_path, name, monkeypatch)
    data = open_data(name, tmp_path)
    assert (data.classes, data.channels, data.image_size) == (2, 3, 32)
    assert (data.names, data.facts) == (("apple", "bear"), {})
    # The authors use these constants of CIFAR-10 for both.
    assert [value * 255 for value in data.mean] == pytest.approx([125.3, 123.0, 113.9])
    assert [value * 255 for value in data.std] == pytest.approx([63.0, 62.1, 66.7])
    mean, std = (torch.tensor(v)[:, None, None] for v in (data.mean, data.std))
    for part, expected in pixels.items():
        actual = all_rows(getattr(data, part)) * std + mean
        assert (actual * 255 - expected.permute(0, 3, 1, 2)).abs().max() < 1e-3
    assert data.evaluate.labels.tolist() == [0, 1, 0, 1]
    assert torch.equal(all_rows(data.evaluate, 1), all_rows(data.evaluate))
    check_augmentation_is_reproducible(data.train)


@needs_torchvision
def test_cifar_must_match_its_checksums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(self: object) -> None:
        raise OSError("no network")

    folder, _ = write_cifar(tmp_path, "cifar10", monkeypatch)
    digest = open_data("cifar10", tmp_path).digest
    assert open_data("cifar10", tmp_path, download=True).digest == digest  # nothing to download
    (folder / "test_batch").write_bytes((folder / "data_batch_1").read_bytes())
    message = f"data 'cifar10': requires the published files in {folder}"
    with pytest.raises(ConfigError, match=rf"{message} \(.*; --download fetches them$"):
        open_data("cifar10", tmp_path)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", download)
    with pytest.raises(ConfigError, match=rf"{message} \(OSError: no network\)$"):
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
        actual = 255 * (all_rows(getattr(data, part))[:, 0] * data.std[0] + data.mean[0])
        assert actual.shape[1:] == (size, size)
        inside = actual[:, margin : margin + 28, margin : margin + 28]
        assert (inside - expected).abs().max() < 1e-3
        assert actual.abs().sum() - inside.abs().sum() < 1  # the margin is black
    assert data.evaluate.labels.tolist() == list(range(10))
    assert torch.equal(all_rows(data.evaluate, 1), all_rows(data.evaluate))
    check_augmentation_is_reproducible(data.train)


@needs_torchvision
def test_missing_or_damaged_fashion_mnist_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "FashionMNIST/raw"
    message = f"data 'fashion-mnist': requires the published files in {folder}"
    for download, advice in ((False, "; --download fetches them"), (True, "")):
        monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", ["file:///nowhere/"])
        with pytest.raises(ConfigError, match=rf"{message}.*\(RuntimeError: .*\){advice}$"):
            open_data("fashion-mnist", tmp_path, download=download)
    shutil.rmtree(tmp_path / "FashionMNIST", ignore_errors=True)
    write_fashion_mnist(folder)
    images = folder / "train-images-idx3-ubyte"
    whole_file = images.read_bytes()
    images.write_bytes(whole_file[:-1])
    with pytest.raises(ConfigError, match=message):
        open_data("fashion-mnist", tmp_path)
    images.write_bytes(whole_file[:7] + b"\1" + whole_file[8 : 16 + 28 * 28])
    with pytest.raises(ConfigError, match="40 labels, \\(1, 28, 28\\) pixels"):
        open_data("fashion-mnist", tmp_path)
    packed = tmp_path / "packed"
    write_fashion_mnist(packed, compressed=True)
    file = packed / "t10k-labels-idx1-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ConfigError, match=f"root: cannot read {file}: EOFError"):
        open_data("fashion-mnist", packed)


def test_fashion_mnist_package_is_used_without_a_root(
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


# ---- folders


@needs_torchvision
def test_folder(tmp_path: Path) -> None:
    classes, val = ("ant", "bee", "cat"), tmp_path / "val"
    for part, each in (("train", 5), ("val", 2)):
        write_images(tmp_path, part, classes, each)

    def open_folder(**options: Any) -> Data:
        return open_data("folder", tmp_path, image_size=12, **options)

    data = open_folder(fraction=0.4)
    assert (data.classes, data.channels, data.image_size) == (3, 3, 12)
    assert (data.names, data.facts, data.is_custom) == (classes, {}, False)
    for samples in (data.train, data.evaluate):
        assert samples.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(all_rows(data.evaluate, 1), all_rows(data.evaluate))
    channels_last = open_folder(fraction=0.4, channels_last=True, workers=1)
    assert torch.equal(all_rows(channels_last.train, 1), all_rows(data.train, 1))
    (val / "bee" / "0.png").unlink()
    (val / "bee" / "1.png").rename(val / "bee" / "1.txt")
    with pytest.raises(FileNotFoundError, match=r"no valid file for the classes bee.*\.png"):
        open_folder()


@needs_torchvision
@pytest.mark.parametrize("size", [12, 30])
def test_folder_images_are_transformed_as_for_imagenet(size: int, tmp_path: Path) -> None:
    from torchvision import transforms

    paths = write_images(tmp_path, "train", ("a", "b"), 3)
    samples = on_disk(paths, size, mean=(0, 0, 0), std=(1, 1, 1))
    for i, path in enumerate(paths):
        image = Image.open(path)
        resize = transforms.Resize(round(size * 256 / 224))
        crop = transforms.Compose([resize, transforms.CenterCrop(size), transforms.ToTensor()])
        assert torch.equal(all_rows(samples)[i], crop(image))
        augment = transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()
        with seed_generators(7, i):
            expected = transforms.Compose([*augment, transforms.ToTensor()])(image)
        assert torch.equal(all_rows(samples, 7)[i], expected)


def write_image(path: Path, mode: str, pixels: Any, **options: Any) -> str:
    """Write an image of four pixels; return its path."""
    image = Image.new(mode, (4, 1))
    if mode == "P":
        image.putpalette([0, 0, 0, 7, 7, 7])
    image.putdata(pixels)
    image.save(path, **options)
    return str(path)


TRANSPARENT = [(9, 9, 9, 255), (9, 9, 9, 0), (0, 0, 0, 51), (9, 9, 9, 255)]
FRAMES = {"save_all": True, "append_images": [Image.new("L", (4, 1))]}


@pytest.mark.parametrize(
    ("suffix", "mode", "pixels", "options", "expected"),
    [
        ("png", "RGBA", TRANSPARENT, {}, [9, 255, 204, 9]),
        ("webp", "RGBA", TRANSPARENT, {"lossless": True, "exact": True}, [9, 255, 204, 9]),
        ("png", "LA", [each[2:] for each in TRANSPARENT], {}, [9, 255, 204, 9]),
        ("png", "RGBA", [(v, v, v, 255) for v in (0, 9, 99, 255)], {}, [0, 9, 99, 255]),
        ("png", "L", [5, 6, 7, 5], {"transparency": 6}, [5, 255, 7, 5]),
        ("png", "P", [0, 1, 0, 1], {"transparency": bytes([255, 0])}, [0, 255, 0, 255]),
        ("png", "1", [0, 255, 0, 255], {}, [0, 255, 0, 255]),
        ("tif", "CMYK", [(0, 0, 0, 55)] * 4, {}, [200] * 4),
        ("png", "L", [1, 2, 3, 4], FRAMES, [1, 2, 3, 4]),
        ("webp", "RGB", [(5, 5, 5)] * 4, {"lossless": True, "exif": b"Exif\0\0damaged"}, [5] * 4),
    ],
)
def test_images_are_decoded_to_rgb_on_white(
    suffix: str, mode: str, pixels: Any, options: Any, expected: list[int], tmp_path: Path
) -> None:
    image = decode(write_image(tmp_path / f"x.{suffix}", mode, pixels, **options))
    assert image.mode == "RGB"
    assert np.array_equal(np.array(image)[0], np.array([expected] * 3).T)


@needs_torchvision
@pytest.mark.parametrize("mode", ["F", "I", "I;16"])
def test_images_of_more_than_8_bits_are_refused(mode: str, tmp_path: Path) -> None:
    path = write_image(tmp_path / "x.tif", mode, [0, 1, 2, 3])
    message = f"cannot read image {path}: .* got {mode} pixels, expected one of 1, .*: convert it"
    with pytest.raises(ConfigError, match=message):
        all_rows(on_disk([path], 4))


@pytest.mark.parametrize(
    ("suffix", "mode"), [("png", "L"), ("tif", "L"), ("tif", "RGB"), ("jpg", "RGB")]
)
def test_images_are_rotated_by_their_exif(suffix: str, mode: str, tmp_path: Path) -> None:
    upright = np.zeros((24, 16), np.uint8)
    upright[:8, :8], upright[:8, 8:], upright[8:16, :8] = 250, 170, 90
    half = np.rot90(upright, 2)
    stored = [upright, upright[:, ::-1], half, upright[::-1], upright.T]
    stored += [np.rot90(upright), half.T, np.rot90(upright, -1)]
    for orientation, pixels in enumerate(stored, 1):
        image = Image.fromarray(np.ascontiguousarray(pixels)).convert(mode)
        exif = image.getexif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.{suffix}"
        image.save(path, exif=exif, **({"quality": 100} if suffix == "jpg" else {}))
        decoded = np.array(decode(str(path)))[..., 0].astype(int)
        assert np.abs(decoded - upright).max() < 5, orientation


@pytest.mark.parametrize("options", [{"suffix": "png"}, {"suffix": "jpg"}, {"progressive": True}])
def test_truncated_images_are_detected(options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / f"x.{options.pop('suffix', 'jpg')}"
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3)).astype(np.uint8)
    Image.fromarray(noise).save(path, **options)
    content = path.read_bytes()
    decode(str(path), draft=True)
    for size in (0, 2, 40, *(int(len(content) * part) for part in (0.3, 0.6, 0.9, 0.99))):
        path.write_bytes(content[:size])
        for draft in (False, True):
            with pytest.raises((OSError, SyntaxError)):
                decode(str(path), draft)


@needs_torchvision
def test_unreadable_images_are_listed_and_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("train", "val"):
        write_images(tmp_path, part, ("ant", "bee"), 3)
    bee = tmp_path / "train" / "bee"
    whole_file = (bee / "0.png").read_bytes()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("1", (100, 50)).save(bee / "bomb.png")
    (bee / "cut.png").write_bytes(whole_file[:60])
    (bee / "text.jpg").write_text("not an image")
    write_image(bee / "deep.png", "I;16", [0] * 4)
    scan = scan_images(tmp_path)
    names = {"bomb.png": "5000 pixels", "cut.png": "truncated", "deep.png": "got I;16 pixels"}
    names["text.jpg"] = "cannot identify image file"
    assert list(scan.unreadable) == [f"train/bee/{name}" for name in names]
    for actual, reason in zip(scan.unreadable.values(), names.values(), strict=True):
        assert re.search(f"^.*{reason}.*$", actual)
    assert scan_images(tmp_path, workers=2) == scan
    assert scan_images(tmp_path, splits=("val",)).unreadable == {}

    known = json.loads(json.dumps(asdict(scan)))
    with monkeypatch.context() as patch:  # files have not changed, so none is read
        patch.setattr(folder, "decode", None)
        assert scan_images(str(tmp_path), known=known) == scan
    message = (
        rf"got 4 unreadable images, expected at most 3: {bee}/bomb.png \(.*, {bee}/cut.png \(.*, "
        rf"{bee}/deep.png \(.*\), \.\.\.; --skip-unreadable N skips up to N"
    )
    check_unreadable(scan, tmp_path, 4)
    with pytest.raises(ConfigError, match=message):
        check_unreadable(scan, tmp_path, 3)
    data = open_data("folder", tmp_path, image_size=4, scan=scan)
    assert [len(data.train), len(data.evaluate)] == [6, 6]
    assert data.facts == {"left_out": scan.unreadable}
    unscanned = open_data("folder", tmp_path, image_size=4, workers=1)
    with pytest.raises(ConfigError, match=rf"^cannot read image {bee}/bomb.png: .*$"):
        all_rows(unscanned.train, 1)
    no_bee = ImageScan("", {f"val/bee/{i}.png": "bad" for i in range(3)})
    with pytest.raises(ConfigError, match=f"no readable image of bee in {tmp_path}/val"):
        open_data("folder", tmp_path, scan=no_bee)
    (bee / "cut.png").write_bytes(whole_file)
    assert "train/bee/cut.png" not in scan_images(tmp_path, known=known).unreadable


@needs_torchvision
def test_folder_digest_depends_on_content_only(tmp_path: Path) -> None:
    def digest(root: Path, known: ImageScan | None = None) -> tuple[str, ImageScan]:
        scan = scan_images(root, known=known and asdict(known))
        return open_data("folder", root, image_size=4, scan=scan).digest, scan

    root = tmp_path / "a"
    for part in ("train", "val"):
        write_images(root, part, ("ant", "bee"), 2)
    first, scan = digest(root)
    root = root.rename(tmp_path / "b")
    assert digest(root, scan) == (first, scan)
    image = root / "val" / "bee" / "0.png"
    image.touch()  # a new time, the same content
    assert digest(root, scan)[0] == first
    (root / "val" / "bee" / "bad.png").write_bytes(b"skipped")
    assert digest(root)[0] == first
    image.write_bytes(image.read_bytes() + b"0")
    assert digest(root)[0] != first


def test_folders_with_missing_classes_are_refused(tmp_path: Path) -> None:
    for name, error, message in (
        ("x/a", FileNotFoundError, f"No such file or directory: '{tmp_path}/train'"),
        ("train/a", FileNotFoundError, r"train/<class>/<image> and val/<class>/.*/val'"),
        ("val/b", ConfigError, "same classes; only one of them has a, b"),
    ):
        write_images(tmp_path, *name.split("/"), 1)
        with pytest.raises(error, match=message):
            open_data("folder", tmp_path)


@pytest.mark.parametrize("name", ["folder", "cifar10", "fashion-mnist"])
def test_missing_torchvision_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("torchvision", "torchvision.datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
    advice = r'requires torchvision: pip install "at_fused\[train\]" \(ModuleNotFound.*torchvi'
    with pytest.raises(ImportError, match=f"'{name}' {advice}"):
        open_data(name, tmp_path, download=name != "folder")


# ---- custom data sets


@pytest.fixture
def open_custom(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a function that opens what a user's function returns or raises."""

    def open_(result: Any, **options: Any) -> Any:
        def data(root: str) -> Any:
            if isinstance(result, type) and issubclass(result, BaseException):
                raise result("two\nlines")
            return result(root) if callable(result) else result

        monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(data=data))
        return open_data("mine:data", "ROOT", **options)

    return open_


def test_custom_data(open_custom: Callable[..., Any]) -> None:
    roots, draws = [], []

    def make(root: str) -> Any:
        roots.append(root)
        draws.append(torch.rand(()).item())
        return Noise(12, ["a", "b", "c"], targets=np.arange(12) % 3), Noise(4)

    before = random_states()
    data = open_custom(make, channels_last=True)
    assert (data.classes, data.channels, data.image_size) == (3, 2, 5)
    assert (data.names, data.is_custom) == (("a", "b", "c"), True)
    check_augmentation_is_reproducible(data.train)
    assert torch.equal(all_rows(data.evaluate, None), all_rows(data.evaluate, None))
    ((x, _, _),) = data.train.batches([torch.arange(12)], 1)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert ((x / 10).floor().long()[:, 0, 0, 0] == torch.arange(12)).all()
    assert (x / 10 - (x / 10).floor()).max() < 0.31
    assert torch.equal(all_rows(open_custom(make, workers=2).train, 1), x)
    assert roots == ["ROOT"] * 2
    # The function is seeded, and the global generators are restored.
    assert len(set(draws)) == 1
    assert random_states() == before


def test_custom_data_without_names(open_custom: Callable[..., Any]) -> None:
    """Labels come from the items, class names from the labels."""
    pair = TensorDataset(torch.zeros(6, 1, 4, 4), torch.tensor([0, 3, 1, 0, 3, 1]))
    data = open_custom((pair, pair))
    assert data.names == ("0", "1", "2", "3")
    assert data.train.labels.tolist() == [0, 3, 1, 0, 3, 1]
    digests = {open_custom(parts).digest for parts in (
        (Noise(), Noise()),
        (Noise(transform=lambda x: x + 1), Noise()),
        (Noise(), Noise(transform=lambda x: x + 1)),
        (Noise(classes=["a", "b", "c"]), Noise()),
        (Noise(), Noise(11)),
    )}  # fmt: skip
    assert len(digests) == 5
    calls: list[int] = []
    targets = list(range(3)) * 16 + [0, 1]
    known = Noise(50, targets=targets, transform=lambda x: calls.append(1) or x)
    open_custom((known, known))
    assert len(calls) < 50  # of 100 items


NOISE = Noise()


def transformed(transform: Callable[[Tensor], Any]) -> tuple[Noise, Noise]:
    return Noise(transform=transform), NOISE


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (ZeroDivisionError, "data mine:data: raises ZeroDivisionError: two"),
        (5, r"must return \(train, test\), got int"),
        ((DataLoader(NOISE), NOISE), "data: train must be a non-empty map-.* got DataLoader"),
        ((NOISE, Noise(0)), "data: test must be a non-empty map-style torch Dataset, got Noise"),
        (([5], NOISE), r"train\[0\] must be \(x, label\) .* ToTensor .*; got int"),
        (transformed(lambda x: x.byte()), r"train\[0\] .* got \(torch.uint8 \(2, 4, 5\), int\)"),
        ((NOISE, Noise(transform=lambda x: x / 0)), r"data: test\[0\] contains NaN or inf"),
        (transformed(lambda x: {}["key"]), r"\[0\] raises KeyError: 'key'"),
        (
            (NOISE, Noise(transform=lambda x: x[:1])),
            r"test\[0\] must .*\(2, 4, 5\).* got \(1, 4, 5\)",
        ),
        ((Noise(targets=[2] * 12), NOISE), r"train\[0\] must .* targets, 2; got .* and 0"),
        ((Noise(classes=["a", "b"]), NOISE), "train must have labels from 0 to 1, .*got 0 to 2"),
        ((Noise(2), NOISE), "test must have labels from 0 to 1, the classes of .*; got 0 to 2"),
    ],
)
def test_invalid_custom_data_is_refused(
    parts: Any, message: str, open_custom: Callable[..., Any]
) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        open_custom(parts)
    assert "mine:data" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_invalid_item_is_an_error_in_a_worker(open_custom: Callable[..., Any]) -> None:
    train = Noise(12, transform=lambda x: {}[1] if x.max() > 110 else x, targets=[*range(3)] * 4)
    with pytest.raises(ConfigError, match=r"^data mine:data: train\[11\] raises KeyError: 1$"):
        all_rows(open_custom((train, Noise()), workers=1).train)


def test_example_of_custom_data_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    data = open_data("examples.own:data", "", validation=0.1)
    assert (data.classes, data.channels, data.image_size) == (10, 1, 16)
    assert data.validation is not None
    assert [len(data.train), len(data.validation), len(data.evaluate)] == [1167, 130, 500]
    for samples, is_constant in ((data.evaluate, True), (data.train, False)):
        few = samples.subset(torch.arange(9))
        assert torch.equal(all_rows(few, 1), all_rows(few, 2)) == is_constant


# ---- training


@needs_torchvision
def test_torchvision_networks_train_on_a_folder(tmp_path: Path) -> None:
    """Train with a worker, on automatically matched layers."""
    for part, each in (("train", 4), ("val", 1)):
        write_images(tmp_path, part, ("ant", "bee"), each)
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
    assert curve.selected["step"] == 2
    assert curve.selected["transfer"] > 0
    assert result.teacher is not None
