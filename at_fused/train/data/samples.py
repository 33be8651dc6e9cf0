"""Labelled pictures in batches: in memory, cut out on the device they are on, or read one by one.

Shapes: N samples, B of them in a batch, C channels, H x W pixels.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from at_fused.train.rules import ConfigError

FRACTION_SEED = 0  # no option: what part of the data was seen belongs to the experiment


class Samples(Protocol):
    """N labelled pictures."""

    labels: Tensor
    """(N,) int64, on the CPU."""

    def __len__(self) -> int: ...

    def subset(self, index: Tensor) -> Samples:
        """These samples, numbered anew from 0: their augmentation becomes another."""
        ...

    def batches(
        self, chunks: Sequence[Tensor], seed: int | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The batch of each chunk, a vector (B,) int64 of sample numbers on the CPU.

        A sample's augmentation is a function of (seed, sample number) alone: not of the chunks,
        their order, the workers or the process. So a run may resume in the middle of an epoch,
        several processes may share one, and a TeacherCache finds the sample again.

        Args:
            chunks: the sample numbers of each batch.
            seed: that of the augmentation; None: no augmentation.

        Yields:
            x (B, C, H, W) float32, standardised, and y (B,) int64, on the device; and the chunk.
        """
        ...


@dataclass(frozen=True)
class Data:
    """A data set: samples to train with, samples to report on, and what they show.

    A picture's pixels, in [0, 1], are x * std + mean. ``image_size`` is its width.
    """

    classes: int
    channels: int
    image_size: int
    names: tuple[str, ...]
    train: Samples
    evaluate: Samples
    mean: tuple[float, ...]
    std: tuple[float, ...]
    validation: Samples | None = None
    """Training samples that were set apart to choose by, without augmentation."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Remarks for a report, as JSON takes them: what was converted, left out, and such."""
    digest: str = ""
    """16 hexadecimal digits of what identifies the data set, whatever part of it is used.

    Of the labels, the names of the classes, and the content: pixels in memory, the bytes of a
    folder's files (if :func:`inspect` read them), the first items of one's own data.
    """
    own: bool = False
    """True: a function made the images, and how they were normalised is not known."""


@dataclass(frozen=True)
class Opened:
    """A data set before a part of it is taken; the rest is as in :class:`Data`.

    labels: (N,) int64, of all training samples.
    part: those of these numbers, augmented or not.
    identity: what tells the data set from another one with the same labels.
    """

    names: tuple[str, ...]
    image_size: int
    labels: Tensor
    part: Callable[[Tensor, bool], Samples]
    evaluate: Samples
    mean: tuple[float, ...]
    std: tuple[float, ...]
    facts: dict[str, Any]
    identity: Sequence[bytes] = ()


@dataclass(frozen=True)
class Pixels:
    """A data set as it was read: pictures (N, H, W, C) uint8 with labels (N,), and what suits it.

    pad, flip: the augmentation, as in :class:`InMemory`. facts: as in :class:`Data`.
    """

    names: tuple[str, ...]
    train: tuple[Tensor, Tensor]
    evaluate: tuple[Tensor, Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int
    flip: bool
    facts: dict[str, Any] = field(default_factory=dict)


class Standardise:
    """uint8 pixels (B, H, W, C) -> float32 (B, C, H, W): (x / 255 - mean) / std by channel."""

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str,
        channels_last: bool,
    ) -> None:
        self._mean = torch.tensor(mean, dtype=torch.float32, device=device)
        self._std = torch.tensor(std, dtype=torch.float32, device=device)
        # A tensor: CUDA divides by a Python number by way of its reciprocal, and would have other
        # bits than the CPU.
        self._white = torch.tensor(255.0, device=device)
        self._channels_last = channels_last

    def __call__(self, x: Tensor) -> Tensor:
        """The same bits in both memory formats."""
        if self._channels_last:
            # Rows of W * C numbers: with C of them, in the inner loop, the CPU is slow.
            width = x.shape[2]
            rows = x.flatten(2).float().div_(self._white)
            rows = rows.sub_(self._mean.repeat(width)).div_(self._std.repeat(width))
            return rows.view(x.shape).permute(0, 3, 1, 2)
        x = x.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        mean, std = self._mean[:, None, None], self._std[:, None, None]
        return x.div_(self._white).sub_(mean).div_(std)


def _reflected(size: int, pad: int) -> Tensor:
    """Find pixels -pad ... size + pad - 1 of a line: (size + 2 pad,) in [0, size)."""
    at = torch.arange(-pad, size + pad).abs()
    return torch.where(at < size, at, 2 * (size - 1) - at)


class InMemory:
    """Pictures in memory; augmented ones are cut out of the padded picture, and half are flipped.

    Args:
        pixels: (N, H, W, C) uint8.
        labels: (N,) int64.
        mean, std: of each channel, for pixels in [0, 1].
        pad: by so many pixels a picture may move, each way; what comes into it is its reflection.
        flip: whether half of the pictures are mirrored, left to right.
        device: where the pixels are kept, and the batches made.
        channels_last: the memory format of the batches.

    Raises:
        ValueError: shapes or dtypes are not these; ``pad`` is not in [0, min(H, W)).
    """

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        pad: int = 0,
        flip: bool = False,
        device: torch.device | str = "cpu",
        channels_last: bool = False,
    ) -> None:
        if pixels.dim() != 4 or pixels.dtype != torch.uint8:
            shape = tuple(pixels.shape)
            raise ValueError(f"pixels must be (N, H, W, C) uint8, got {shape} {pixels.dtype}")
        if labels.shape != pixels.shape[:1] or labels.dtype != torch.int64:
            wanted, shape = f"({len(pixels)},) int64", tuple(labels.shape)
            raise ValueError(f"labels must be {wanted}, got {shape} {labels.dtype}")
        height, width = pixels.shape[1:3]
        if not 0 <= pad < min(height, width):
            allowed = f"[0, {min(height, width)}) for pictures of {height} x {width}"
            raise ValueError(f"pad must be in {allowed}, got {pad}")
        self.labels = labels.cpu()
        padded = pixels[:, _reflected(height, pad).to(pixels.device)]
        padded = padded[:, :, _reflected(width, pad).to(pixels.device)]
        # Channels innermost: CIFAR's come as a transposed view, and indexing promises no strides.
        self._pixels = padded.contiguous().to(device)
        self._pad, self._flip = pad, flip
        self._standardise = Standardise(mean, std, device, channels_last)
        self._drawn: tuple[int | None, Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: Tensor) -> InMemory:
        """These samples, numbered anew from 0: their augmentation becomes another."""
        part = copy.copy(self)
        part.labels = self.labels[index]
        part._pixels = self._pixels[index.to(self._pixels.device)]
        part._drawn = None
        return part

    def _draw(self, seed: int | None) -> tuple[Tensor, Tensor]:
        """Corners (2, N) in [0, 2 pad] and flips (N,) bool of all samples, kept for one seed."""
        if self._drawn is None or self._drawn[0] != seed:
            n, pad = len(self), self._pad
            corners, flips = torch.full((2, n), pad), torch.zeros(n, dtype=torch.bool)
            if seed is not None:
                # Drawn on the CPU, so that a seed means the same on every device; and for all, so
                # that what a sample gets does not depend on which others are asked for.
                g = torch.Generator().manual_seed(seed)
                corners = torch.randint(2 * pad + 1, (2, n), generator=g)
                if self._flip:
                    flips = torch.rand(n, generator=g) < 0.5
            device = self._pixels.device
            self._drawn = seed, corners.to(device), flips.to(device)
        return self._drawn[1:]

    def batches(
        self, chunks: Sequence[Tensor], seed: int | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """See :class:`Samples`."""
        device = self._pixels.device
        height, width = (size - 2 * self._pad for size in self._pixels.shape[1:3])
        down, right = torch.arange(height, device=device), torch.arange(width, device=device)
        (top, left), flips = self._draw(seed)
        for index in chunks:
            y = self.labels[index]  # on the CPU, where a number out of range is a plain IndexError
            n = index.to(device)[:, None]
            rows = top[n] + down
            cols = left[n] + torch.where(flips[n], right.flip(0), right)
            x = self._pixels[n[:, :, None], rows[:, :, None], cols[:, None]]
            yield self._standardise(x), y.to(device), index


def as_labels(given: object, count: int) -> Tensor | None:
    """(count,) int64 of so many whole numbers; None of anything else."""
    try:
        found = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        return None
    whole = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    return found.cpu().long() if whole and found.shape == (count,) else None


class Reader(Protocol):
    """N pictures by (sample number, seed of the augmentation): without state, for the workers."""

    def __getitem__(self, key: tuple[int, int | None]) -> Tensor | str:
        """A tensor; or, in a line, why there is none."""
        ...

    def subset(self, index: Tensor) -> Reader:
        """These pictures, numbered anew from 0."""
        ...


def usable(workers: int) -> int:
    """So many worker processes, but no more than the CPUs that this process may use."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(workers, cpus or 1)


def seed_of(seed: int | None, number: int) -> int:
    """The seed of one sample's augmentation.

    A hash, because torch's generator uses 32 bits of its seed: all of both numbers count.
    """
    digest = hashlib.sha256(f"{seed} {number}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def stacked(items: list[Tensor | str]) -> Tensor | str:
    """A batch of what a :class:`Reader` has; the first reason why there is none."""
    for item in items:
        if isinstance(item, str):
            return item
    return torch.stack(cast("list[Tensor]", items))


class OnDemand:
    """Samples that are read when they are needed.

    Args:
        reader: has the N pictures.
        labels: (N,) int64.
        finish: makes x (B, C, H, W) float32 of the pictures of a batch, on the device.
        augment: False: no augmentation, whatever the seed.
        device: of the batches.
        workers: processes that read, at most one for each CPU; 0: this one does.
    """

    def __init__(
        self,
        reader: Reader,
        labels: Tensor,
        finish: Callable[[Tensor], Tensor],
        augment: bool,
        device: torch.device | str,
        workers: int,
    ) -> None:
        self.labels = labels
        self._reader, self._finish = reader, finish
        self._augment, self._workers = augment, usable(workers)
        self._device = torch.device(device)

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: Tensor) -> OnDemand:
        """These samples, numbered anew from 0: their augmentation becomes another."""
        part = copy.copy(self)
        part.labels = self.labels[index]
        part._reader = self._reader.subset(index)
        return part

    def batches(
        self, chunks: Sequence[Tensor], seed: int | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """See :class:`Samples`.

        Raises:
            ConfigError: a picture cannot be read; names it.
        """
        if not self._augment:
            seed = None
        loader: DataLoader[Tensor] = DataLoader(
            cast("Dataset[Tensor]", self._reader),
            batch_sampler=[[(i, seed) for i in chunk.tolist()] for chunk in chunks],
            collate_fn=stacked,
            num_workers=self._workers,
            pin_memory=self._device.type == "cuda",
            # Its own, or it would draw the workers' seeds from the global one.
            generator=torch.Generator(),
        )
        for index, x in zip(chunks, loader, strict=True):
            if isinstance(x, str):  # not raised in a worker, whose traceback would come with it
                raise ConfigError(x)
            x = self._finish(x.to(self._device, non_blocking=True))
            yield x, self.labels[index].to(self._device), index


def _of_each_class(labels: Tensor, count: Callable[[int], int]) -> Tensor:
    """Numbers, in order, of `count(n)` of the n samples of every class, the same every time."""
    g = torch.Generator().manual_seed(FRACTION_SEED)
    kept = []
    for c in torch.unique(labels):
        own = (labels == c).nonzero()[:, 0]
        shuffled = own[torch.randperm(len(own), generator=g)]
        kept.append(shuffled[: count(len(own))])
    return torch.cat(kept).sort().values


def stratified(labels: Tensor, fraction: float) -> Tensor:
    """Numbers, in order, of this part of every class: at least one sample, the same every time.

    A smaller fraction's samples are among those of a larger one.
    """
    return _of_each_class(labels, lambda n: max(1, round(fraction * n)))


def set_apart(labels: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Numbers, in order, to train with and to validate with, the same every time.

    The latter are this share of every class; each class has at least one of both.

    Raises:
        ValueError: a class has but one sample.
    """
    alone = torch.unique(labels)[torch.unique(labels, return_counts=True)[1] == 1]
    if len(alone):
        raise ValueError(
            f"validation must be 0 where a class has one training image, got {share}: it takes one "
            f"of each, and classes {', '.join(map(str, alone.tolist()[:5]))} have no other"
        )
    kept = _of_each_class(labels, lambda n: min(n - 1, max(1, n - round(share * n))))
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[kept] = False
    return kept, rest.nonzero()[:, 0]


def few_labels(labels: Tensor, candidates: Tensor, count: int, seed: int) -> Tensor:
    """`count` indices out of `candidates`, each class equally often (to one image)."""
    g = torch.Generator().manual_seed(seed)
    shuffled = candidates[torch.randperm(len(candidates), generator=g)]
    classes = torch.unique(labels[candidates])
    quota, left_over = divmod(count, len(classes))
    lucky = set(torch.randperm(len(classes), generator=g)[:left_over].tolist())
    picked = [
        shuffled[labels[shuffled] == c][: quota + (i in lucky)] for i, c in enumerate(classes)
    ]
    return torch.cat(picked)
