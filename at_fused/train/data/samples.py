"""Labelled pictures in batches: from memory, or read one by one.

Shapes: N samples, B of them in a batch, C channels, H x W pixels.
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

SUBSET_SEED = 0  # no option: what part of the data was seen belongs to the experiment
Constants = tuple[float, ...]


class Samples(ABC):
    """N labelled pictures. Those that are not augmented are the same whatever the seed."""

    def __init__(self, labels: Tensor, augment: bool, device: torch.device | str) -> None:
        self.labels = labels
        """(N,) int64, on the CPU."""
        # (N,), where they lie among the pictures that were opened.
        self._rows = torch.arange(len(labels))
        self._augment, self._device = augment, torch.device(device)

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: Tensor, augment: bool = True) -> Samples:
        """Return these samples, numbered anew from 0: their augmentation becomes another."""
        part = copy.copy(self)
        part.labels, part._rows = self.labels[index], self._rows[index]
        part._augment = self._augment and augment
        return part

    def batches(
        self, chunks: Sequence[Tensor], seed: int | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the batch of each chunk, a vector (B,) int64 of sample numbers on the CPU.

        A sample's augmentation is a function of (seed, sample number) alone: not of the chunks,
        their order, the workers or the process. So a run may resume in the middle of an epoch,
        several processes may share one, and a TeacherCache finds the sample again. Without a seed
        nothing is augmented.

        Yields:
            x (B, C, H, W) float32, standardised, and y (B,) int64, on the device; and the chunk.

        Raises:
            ConfigError: a picture cannot be read; names it.
        """
        pictures = self._read(chunks, seed if self._augment else None)
        for index, x in zip(chunks, pictures, strict=True):
            yield x, self.labels[index].to(self._device), index

    @abstractmethod
    def _read(self, chunks: Sequence[Tensor], seed: int | None) -> Iterator[Tensor]: ...


@dataclass(frozen=True)
class Pictures:
    """Results of reading every picture of a folder; ``dataclasses.asdict`` makes JSON of them."""

    digest: str  # of names, sizes, times and Pillow's version: unchanged, none is read again
    unreadable: dict[str, str]  # the reason, by the name from the root on
    content: str = ""  # sha256 of the bytes of those that can be read, in their order


@dataclass(frozen=True)
class Data:
    """A data set: samples to train with, samples to report on, and what they show.

    A picture's pixels, in [0, 1], are x * std + mean. ``image_size`` is its width.
    """

    names: tuple[str, ...]
    image_size: int
    train: Samples
    evaluate: Samples
    mean: Constants
    std: Constants
    validation: Samples | None = None
    """Training samples that were set apart to choose by, without augmentation."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Remarks for a report, as JSON takes them: what was left out, and such."""
    digest: str = ""
    """A hash of labels, names of classes, and content, whatever part of the data is used."""
    own: bool = False
    """True: a function made the images, and how they were normalised is not known."""
    pictures: Pictures | None = None
    """Results of reading a folder's, where they were read."""

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.names)

    @property
    def channels(self) -> int:
        """The number of channels."""
        return len(self.mean)

    @property
    def shown_by(self) -> dict[str, Any]:
        """The mean and std for a picture; of one's own images nobody knows them."""
        known = (None, None) if self.own else (self.mean, self.std)
        return dict(zip(("mean", "std"), known, strict=True))


def digest_of(names: Sequence[str], train: Samples, evaluate: Samples, *content: bytes) -> str:
    """Return the digest of a data set, as :class:`Data` has it."""
    digest = hashlib.sha256(repr(tuple(names)).encode())
    labels = [each.labels.numpy().tobytes() for each in (train, evaluate)]
    for part in (*labels, *content):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]


def normalisation(config: Config, known: tuple[Constants, Constants]) -> list[Constants]:
    """Return the mean and the std that are given; else those that are known of the data set."""
    found = []
    for name, own in zip(("mean", "std"), known, strict=True):
        given = getattr(config, name)
        if given and len(given) != len(own):
            raise ConfigError(
                f"{name}: got {', '.join(map(str, given))}, allowed is a number for each channel, "
                f"of which there are {len(own)}"
            )
        found.append(given or own)
    return found


def standardiser(
    mean: Constants, std: Constants, device: torch.device | str, channels_last: bool
) -> Callable[[Tensor], Tensor]:
    """Return uint8 pixels (B, H, W, C) -> float32 (B, C, H, W): (x / 255 - mean) / std.

    The bits are the same in both memory formats.
    """
    means, stds = (torch.tensor(v, dtype=torch.float32, device=device) for v in (mean, std))
    # A tensor: CUDA divides by a Python number by way of its reciprocal, and would have other
    # bits than the CPU.
    white = torch.tensor(255.0, device=device)

    def standardise(x: Tensor) -> Tensor:
        # Rows have W * C numbers: an inner loop of C numbers is slow on a CPU.
        width = x.shape[2]
        rows = x.flatten(2).float().div_(white).sub_(means.repeat(width)).div_(stds.repeat(width))
        x = rows.view(x.shape).permute(0, 3, 1, 2)
        return x if channels_last else x.clone(memory_format=torch.contiguous_format)

    return standardise


class InMemory(Samples):
    """Pictures (N, H, W, C) uint8 in memory, on the device.

    Augmented ones are cut out of the picture that ``pad`` pixels of reflection are around; with
    ``flip`` half are mirrored.
    """

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor,
        mean: Constants,
        std: Constants,
        pad: int = 0,
        flip: bool = False,
        device: torch.device | str = "cpu",
        channels_last: bool = False,
    ) -> None:
        super().__init__(labels, True, device)
        padded = np.pad(pixels.numpy(), ((0, 0), (pad, pad), (pad, pad), (0, 0)), "reflect")
        self._pixels = torch.from_numpy(padded).contiguous().to(device)
        self._pad, self._flip = pad, flip
        self._standardise = standardiser(mean, std, device, channels_last)

    def _draw(self, seed: int | None) -> tuple[Tensor, Tensor]:
        """Draw corners (2, N) in [0, 2 pad] and flips (N,) bool of all samples."""
        n, pad = len(self), self._pad
        corners, flips = torch.full((2, n), pad), torch.zeros(n, dtype=torch.bool)
        if seed is not None:
            # Drawn on the CPU, so that a seed means the same on every device; and for all, so that
            # what a sample gets does not depend on which others are asked for.
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
            # On the CPU first, where a number out of range is a plain IndexError.
            n, picture = (i.to(device)[:, None] for i in (index, self._rows[index]))
            rows = top[n] + down
            cols = left[n] + torch.where(flips[n], right.flip(0), right)
            yield self._standardise(
                self._pixels[picture[:, :, None], rows[:, :, None], cols[:, None]]
            )


class OnDemand(Samples):
    """Samples that worker processes, or with 0 of them this one, read when they are needed.

    ``pictures`` has a tensor for (its index, sample number, seed of the augmentation), or a line
    that says why there is none; ``finish`` makes x (B, C, H, W) of a batch of them, on the device.
    """

    def __init__(
        self,
        pictures: Dataset[Tensor | str],
        labels: Tensor,
        finish: Callable[[Tensor], Tensor],
        augment: bool,
        device: torch.device | str,
        workers: int,
    ) -> None:
        super().__init__(labels, augment, device)
        self._pictures, self._finish = pictures, finish
        self._workers = usable_workers(workers)

    def _read(self, chunks: Sequence[Tensor], seed: int | None) -> Iterator[Tensor]:
        numbers = [(self._rows[chunk].tolist(), chunk.tolist()) for chunk in chunks]
        loader: DataLoader[Any] = DataLoader(
            self._pictures,
            batch_sampler=[[(*each, seed) for each in zip(*both, strict=True)] for both in numbers],
            collate_fn=_stacked,
            num_workers=self._workers,
            pin_memory=self._device.type == "cuda",
            # Its own, or it would draw the workers' seeds from the global one.
            generator=torch.Generator(),
        )
        for x in loader:
            if isinstance(x, str):  # not raised in a worker, whose traceback would come with it
                raise ConfigError(x)
            yield self._finish(x.to(self._device, non_blocking=True))


def _stacked(pictures: list[Any]) -> Tensor | str:
    """Return a batch of pictures; the first reason why there is none."""
    reasons = [each for each in pictures if isinstance(each, str)]
    return reasons[0] if reasons else torch.stack(pictures)


def usable_workers(count: int) -> int:
    """Return so many worker processes, but no more than the CPUs that this process may use."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(count, cpus or 1)


@contextmanager
def seeded(seed: int | None, number: int) -> Iterator[None]:
    """Start the global generators for one sample's augmentation; afterwards they are as before."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # From a hash, because torch uses 32 bits of a seed: all of both numbers count.
    digest = hashlib.sha256(f"{seed} {number}".encode()).digest()
    start = int.from_bytes(digest[:4], "little")
    random.seed(start)
    np.random.seed(start)
    torch.default_generator.manual_seed(start)  # torch.manual_seed is for the GPUs as well
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def as_labels(given: object, count: int) -> Tensor | None:
    """Return (count,) int64 of so many whole numbers; None of anything else."""
    try:
        found = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        return None
    whole = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    return found.cpu().long() if whole and found.shape == (count,) else None


# ---- parts of the samples


def _of_each_class(labels: Tensor, count: Callable[[int], int]) -> Tensor:
    """Return numbers, in order, of ``count(n)`` of each class's n samples, always the same."""
    g = torch.Generator().manual_seed(SUBSET_SEED)
    kept = []
    for c in torch.unique(labels):
        own = (labels == c).nonzero()[:, 0]
        kept.append(own[torch.randperm(len(own), generator=g)][: count(len(own))])
    return torch.cat(kept).sort().values


def stratified(labels: Tensor, fraction: float) -> Tensor:
    """Return numbers, in order, of this part of every class: at least one sample.

    A smaller fraction's samples are among those of a larger one.
    """
    return _of_each_class(labels, lambda n: max(1, round(fraction * n)))


def set_apart(labels: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Return numbers, in order, to train with and to validate with.

    The latter are this share of every class; each class has at least one of both.
    """
    classes, counts = torch.unique(labels, return_counts=True)
    if alone := classes[counts == 1].tolist():
        raise ConfigError(
            f"validation: got {share}, which takes an image of each class; allowed is 0, as "
            f"classes {', '.join(map(str, alone[:5]))} have one training image"
        )
    kept = _of_each_class(labels, lambda n: min(n - 1, max(1, n - round(share * n))))
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[kept] = False
    return kept, rest.nonzero()[:, 0]


def few_labels(labels: Tensor, count: int, seed: int) -> Tensor:
    """Return ``count`` numbers of samples, each class equally often (to one image)."""
    g = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=g)
    classes = torch.unique(labels)
    quota, left_over = divmod(count, len(classes))
    lucky = set(torch.randperm(len(classes), generator=g)[:left_over].tolist())
    return torch.cat(
        [shuffled[labels[shuffled] == c][: quota + (i in lucky)] for i, c in enumerate(classes)]
    )
