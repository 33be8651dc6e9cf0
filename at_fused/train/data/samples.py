"""Labelled images in batches, from memory or read on demand.

Shapes: N samples, B samples in a batch, C channels, H x W pixels.
"""

from __future__ import annotations

import copy
import hashlib
import os
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from at_fused.train.config import Config, ConfigError

SUBSET_SEED = 0  # not an option: the subset is part of the experiment
ChannelValues = tuple[float, ...]


class Samples(ABC):
    """N labelled images. Without augmentation, they do not depend on the seed."""

    def __init__(self, labels: Tensor, augment: bool, device: torch.device | str) -> None:
        self.labels = labels
        """(N,) int64, on the CPU."""
        # (N,), indices of the samples in the data set that was opened.
        self._rows = torch.arange(len(labels))
        self._augment, self._device = augment, torch.device(device)

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: Tensor, augment: bool = True) -> Samples:
        """Return a subset, numbered from 0. The new numbers change its augmentation."""
        part = copy.copy(self)
        part.labels, part._rows = self.labels[index], self._rows[index]
        part._augment = self._augment and augment
        return part

    def batches(
        self, chunks: Sequence[Tensor], seed: int | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the batch of each chunk, a vector (B,) int64 of sample numbers on the CPU.

        A sample's augmentation depends on the seed and its number only, not on chunks, workers or
        processes. So a run can resume within an epoch, processes can share an epoch, and a
        TeacherCache recognises the sample. Without a seed nothing is augmented.

        Yields:
            x (B, C, H, W) float32, normalised, and y (B,) int64, on the device; and the chunk.

        Raises:
            ConfigError: an image cannot be read; the message has its path.
        """
        images = self._read(chunks, seed if self._augment else None)
        for index, x in zip(chunks, images, strict=True):
            yield x, self.labels[index].to(self._device), index

    @abstractmethod
    def _read(self, chunks: Sequence[Tensor], seed: int | None) -> Iterator[Tensor]: ...


@dataclass(frozen=True)
class ImageScan:
    """Result of reading every image of a folder; ``dataclasses.asdict`` makes JSON of it."""

    digest: str  # of names, sizes, times and Pillow's version; if it is the same, none is read
    unreadable: dict[str, str]  # reasons, by path relative to the root
    content: str = ""  # sha256 of the bytes of all readable images, in order


@dataclass(frozen=True)
class Data:
    """A data set: samples to train with and to report on.

    The pixels of an image, in [0, 1], are x * std + mean. ``image_size`` is its width.
    """

    names: tuple[str, ...]
    image_size: int
    train: Samples
    evaluate: Samples
    mean: ChannelValues
    std: ChannelValues
    validation: Samples | None = None
    """Training samples held out for validation, without augmentation."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Facts for the report that JSON can hold, such as skipped images."""
    digest: str = ""
    """Hash of labels, class names and content; the same for all subsets of the data."""
    is_custom: bool = False
    """True if a user's function made the images, so that their normalisation is unknown."""
    scan: ImageScan | None = None
    """Result of reading a folder's images, if they were read."""

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.names)

    @property
    def channels(self) -> int:
        """The number of channels."""
        return len(self.mean)

    @property
    def plot_options(self) -> dict[str, Any]:
        """The mean and std for at_fused.visualize; None if they are unknown."""
        constants = (None, None) if self.is_custom else (self.mean, self.std)
        return dict(zip(("mean", "std"), constants, strict=True))


def data_digest(names: Sequence[str], train: Samples, evaluate: Samples, *content: bytes) -> str:
    """Return ``digest`` of a :class:`Data`."""
    digest = hashlib.sha256(repr(tuple(names)).encode())
    labels = [each.labels.numpy().tobytes() for each in (train, evaluate)]
    for part in (*labels, *content):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]


def mean_and_std(
    config: Config, defaults: tuple[ChannelValues, ChannelValues]
) -> list[ChannelValues]:
    """Return mean and std from the configuration, or the data set's defaults."""
    result = []
    for name, default in zip(("mean", "std"), defaults, strict=True):
        value = getattr(config, name)
        if value and len(value) != len(default):
            raise ConfigError(
                f"{name}: got {', '.join(map(str, value))}, expected a number for each of the "
                f"{len(default)} channels"
            )
        result.append(value or default)
    return result


def normaliser(
    mean: ChannelValues, std: ChannelValues, device: torch.device | str, channels_last: bool
) -> Callable[[Tensor], Tensor]:
    """Return a function of uint8 (B, H, W, C) to float32 (B, C, H, W): (x / 255 - mean) / std.

    Both memory formats give the same bits.
    """
    means, stds = (torch.tensor(v, dtype=torch.float32, device=device) for v in (mean, std))
    # A tensor: CUDA would multiply by the reciprocal of a Python number, and differ from the CPU.
    white = torch.tensor(255.0, device=device)

    def normalise(x: Tensor) -> Tensor:
        # Over W * C numbers per row: an inner loop over C numbers is slow on CPUs.
        width = x.shape[2]
        rows = x.flatten(2).float().div_(white).sub_(means.repeat(width)).div_(stds.repeat(width))
        x = rows.view(x.shape).permute(0, 3, 1, 2)
        return x if channels_last else x.clone(memory_format=torch.contiguous_format)

    return normalise


class InMemory(Samples):
    """Images (N, H, W, C) uint8 in memory, on the device.

    To augment, images are padded with ``pad`` pixels of reflection and cropped at random; with
    ``flip`` half of them are mirrored.
    """

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor,
        mean: ChannelValues,
        std: ChannelValues,
        pad: int = 0,
        flip: bool = False,
        device: torch.device | str = "cpu",
        channels_last: bool = False,
    ) -> None:
        super().__init__(labels, True, device)
        padded = np.pad(pixels.numpy(), ((0, 0), (pad, pad), (pad, pad), (0, 0)), "reflect")
        self._pixels = torch.from_numpy(padded).contiguous().to(device)
        self._pad, self._flip = pad, flip
        self._normalise = normaliser(mean, std, device, channels_last)

    def _draw(self, seed: int | None) -> tuple[Tensor, Tensor]:
        """Draw crop corners (2, N) in [0, 2 pad] and flips (N,) bool of all samples."""
        n, pad = len(self), self._pad
        corners, flips = torch.full((2, n), pad), torch.zeros(n, dtype=torch.bool)
        if seed is not None:
            # On the CPU, so that all devices draw the same. For all samples, so that the draw of
            # one does not depend on the chunks.
            g = torch.Generator().manual_seed(seed)
            corners = torch.randint(2 * pad + 1, (2, n), generator=g)
            if self._flip:
                flips = torch.rand(n, generator=g) < 0.5
        return corners.to(self._device), flips.to(self._device)

    def _read(self, chunks: Sequence[Tensor], seed: int | None) -> Iterator[Tensor]:
        device = self._device
        height, width = (size - 2 * self._pad for size in self._pixels.shape[1:3])
        down, right = torch.arange(height, device=device), torch.arange(width, device=device)
        (top, left), flips = self._draw(seed)
        for index in chunks:
            # Indexed on the CPU first, where an index out of range raises an IndexError.
            n, image = (i.to(device)[:, None] for i in (index, self._rows[index]))
            rows = top[n] + down
            cols = left[n] + torch.where(flips[n], right.flip(0), right)
            yield self._normalise(self._pixels[image[:, :, None], rows[:, :, None], cols[:, None]])


class OnDemand(Samples):
    """Samples that are read when needed, by worker processes or (0 workers) by this process.

    ``dataset`` maps (index, sample number, augmentation seed) to a tensor, or to a message if it
    cannot be read. ``finish`` makes x (B, C, H, W) of a batch of tensors, on the device.
    """

    def __init__(
        self,
        dataset: Dataset[Tensor | str],
        labels: Tensor,
        finish: Callable[[Tensor], Tensor],
        augment: bool,
        device: torch.device | str,
        workers: int,
    ) -> None:
        super().__init__(labels, augment, device)
        self._dataset, self._finish = dataset, finish
        self._workers = limit_workers(workers)

    def _read(self, chunks: Sequence[Tensor], seed: int | None) -> Iterator[Tensor]:
        numbers = [(self._rows[chunk].tolist(), chunk.tolist()) for chunk in chunks]
        loader: DataLoader[Any] = DataLoader(
            self._dataset,
            batch_sampler=[[(*each, seed) for each in zip(*both, strict=True)] for both in numbers],
            collate_fn=_collate,
            num_workers=self._workers,
            pin_memory=self._device.type == "cuda",
            # Otherwise it would draw the workers' seeds from the global generator.
            generator=torch.Generator(),
        )
        for x in loader:
            if isinstance(x, str):  # raised here, as workers would add their traceback
                raise ConfigError(x)
            yield self._finish(x.to(self._device, non_blocking=True))


def _collate(images: list[Any]) -> Tensor | str:
    messages = [each for each in images if isinstance(each, str)]
    return messages[0] if messages else torch.stack(images)


def limit_workers(count: int) -> int:
    """Return ``count``, limited to the number of CPUs that this process may use."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(count, cpus or 1)


@contextmanager
def seed_generators(seed: int | None, number: int) -> Iterator[None]:
    """Seed the global generators for one sample's augmentation, and restore them afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # Hashed, as torch uses only 32 bits of a seed and all bits of both numbers must count.
    digest = hashlib.sha256(f"{seed} {number}".encode()).digest()
    combined = int.from_bytes(digest[:4], "little")
    random.seed(combined)
    np.random.seed(combined)
    torch.default_generator.manual_seed(combined)  # torch.manual_seed would seed GPUs too
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def to_labels(values: object, count: int) -> Tensor | None:
    """Return ``count`` integers as an int64 tensor (count,); None for any other value."""
    try:
        labels = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        return None
    is_integer = not (
        labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool
    )
    return labels.cpu().long() if is_integer and labels.shape == (count,) else None


# ---- subsets -------------------------------------------------------------------------------------


def _sample_per_class(labels: Tensor, count: Callable[[int], int]) -> Tensor:
    """Return sorted indices of ``count(n)`` of the n samples of each class, always the same."""
    g = torch.Generator().manual_seed(SUBSET_SEED)
    rows = []
    for c in torch.unique(labels):
        own = (labels == c).nonzero()[:, 0]
        rows.append(own[torch.randperm(len(own), generator=g)][: count(len(own))])
    return torch.cat(rows).sort().values


def stratified_subset(labels: Tensor, fraction: float) -> Tensor:
    """Return sorted indices of this fraction of every class, at least one sample of each.

    A smaller fraction is a subset of a larger one.
    """
    return _sample_per_class(labels, lambda n: max(1, round(fraction * n)))


def hold_out(labels: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Return sorted indices to train with, and of this fraction of every class, held out.

    Both have at least one sample of each class.
    """
    classes, counts = torch.unique(labels, return_counts=True)
    if single := classes[counts == 1].tolist():
        raise ConfigError(
            f"validation: got {fraction}, which holds out an image of each class; expected 0, "
            f"because classes {', '.join(map(str, single[:5]))} have only one training image"
        )
    kept = _sample_per_class(labels, lambda n: min(n - 1, max(1, n - round(fraction * n))))
    is_held_out = torch.ones(len(labels), dtype=torch.bool)
    is_held_out[kept] = False
    return kept, is_held_out.nonzero()[:, 0]


def balanced_subset(labels: Tensor, count: int, seed: int) -> Tensor:
    """Return ``count`` indices with the same number of each class, to within one."""
    g = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=g)
    classes = torch.unique(labels)
    quota, remainder = divmod(count, len(classes))
    extra = set(torch.randperm(len(classes), generator=g)[:remainder].tolist())
    return torch.cat(
        [shuffled[labels[shuffled] == c][: quota + (i in extra)] for i, c in enumerate(classes)]
    )
