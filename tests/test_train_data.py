"""The data of at-fused-train: what each set holds, and what an augmentation depends on."""

from __future__ import annotations

import hashlib
import pickle
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import interpolate

from at_fused.train.config import resolve
from at_fused.train.data import Samples, open_data
from at_fused.train.data.digits import make_split
from at_fused.train.data.folder import SCALE, InFolder, crop_box
from at_fused.train.data.samples import InMemory, few_labels, stratified
from at_fused.train.experiment import Experiment

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
    from PIL import Image

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


def test_subsets_are_the_samples_numbered_anew() -> None:
    samples = in_memory()
    part = samples.subset(torch.tensor([7, 3]))
    assert len(part) == 2
    assert torch.equal(part.labels, samples.labels[[7, 3]])
    assert torch.equal(whole(part), whole(samples)[[7, 3]])
    assert whole(part, 2).shape == (2, 3, 7, 9)
    assert len(samples) == 40


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
    means = {"cifar10": [125.3, 123.0, 113.9], "cifar100": [129.3, 124.1, 112.4]}
    assert [value * 255 for value in data.mean] == pytest.approx(means[name])
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
    (tmp_path / "val" / "bee" / "0.png").unlink()
    (tmp_path / "val" / "bee" / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match="bee"):
        open_data("folder", tmp_path)


@needs_torchvision
@pytest.mark.parametrize("size", [12, 30])
def test_folder_pictures_are_torchvisions(size: int, tmp_path: Path) -> None:
    from PIL import Image
    from torchvision.transforms import functional as tv

    paths = write_pictures(tmp_path, "train", ("a", "b"), 3)
    samples = InFolder(paths, torch.zeros(6).long(), size, augment=True)
    for i, path in enumerate(paths):
        picture = Image.open(path)
        short = round(size * 256 / 224)
        expected = tv.center_crop(tv.resize(picture, [short]), [size, size])
        assert np.array_equal(samples._pictures[i, None].numpy(), np.array(expected))
        digest = hashlib.sha256(f"7 {i}".encode()).digest()
        g = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
        (left, top, right, bottom), flip = crop_box(*picture.size, g)
        box = (top, left, bottom - top, right - left)
        expected = tv.resized_crop(picture, *box, [size, size])
        expected = tv.hflip(expected) if flip else expected
        assert np.array_equal(samples._pictures[i, 7].numpy(), np.array(expected))


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


def test_folder_grey_and_unreadable_pictures(tmp_path: Path) -> None:
    from PIL import Image

    Image.fromarray(np.full((9, 9), 255, dtype=np.uint8)).save(tmp_path / "grey.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "grey.png").read_bytes()[:40])
    paths = [str(tmp_path / name) for name in ("grey.png", "bad.png")]
    samples = InFolder(paths, torch.zeros(2).long(), 4)
    assert samples._pictures[0, None].eq(255).all()
    assert samples._pictures[0, None].shape == (4, 4, 3)
    with pytest.raises(ValueError, match=r"cannot read the picture .*bad\.png"):
        rows(samples, [[0, 1]], None)


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


# ---- the program on them


@needs_torchvision
def test_a_folder_trains_torchvisions_networks(tmp_path: Path) -> None:
    """With workers, and a student and a teacher whose layers are found."""
    for part, each in (("train", 8), ("val", 4)):
        write_pictures(tmp_path, part, ("ant", "bee"), each)
    config = resolve(
        {"preset": "imagenet-resnet18-from-34", "root": str(tmp_path), "epochs": 1}
        | {"student": "mobilenet_v3_small", "teacher": "resnet-18", "image_size": 64}
        | {"batch_size": 8, "workers": 1, "speed": "exact", "threads": 1}
    )
    (tmp_path / "run").mkdir()
    experiment = Experiment(config, tmp_path / "run")
    assert [pair.teacher for pair in experiment.pairs][-1] == "layer4"
    result = experiment.run()
    (curve,) = result.students["at"]
    assert curve.last("step") == 2
    assert curve.last("transfer") > 0
    assert result.teacher is not None
