"""Shared by the examples: two small CNNs, scikit-learn's digits, and a start in two processes."""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sklearn.datasets import load_digits
from torch import Tensor, nn

LAYERS, BETA = ["block1", "block2"], 100.0


def network(width: int) -> nn.Module:
    """Two blocks, with maps of 8x8 and 4x4, and a head; its GroupNorm looks at no other sample."""

    def block(before: int, after: int, stride: int) -> nn.Module:
        conv = nn.Conv2d(before, after, 3, stride, padding=1)
        return nn.Sequential(conv, nn.GroupNorm(2, after), nn.ReLU())

    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))
    blocks = {"block1": block(1, width, 1), "block2": block(width, 2 * width, 2)}
    return nn.Sequential(OrderedDict(**blocks, head=head))


def networks(seed: int) -> tuple[nn.Module, nn.Module]:
    """A student and a teacher; of a real one the weights would be loaded here."""
    torch.manual_seed(seed)
    return network(4), network(8).requires_grad_(False)


def batches(count: int = 4, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    """Batches (size, 1, 8, 8) of digits and what they show."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    pairs = zip(images.split(size), torch.tensor(digits.target).split(size), strict=True)
    return list(pairs)[:count]


def share(x: Tensor) -> Tensor:
    """This process's part of a batch."""
    return x.tensor_split(dist.get_world_size())[dist.get_rank()]


def in_two_processes(train: Callable[[int], tuple[list[float], Any]], seed: int = 0) -> None:
    """Trains in two processes that print their losses, as ``torchrun`` starts them elsewhere."""
    with tempfile.TemporaryDirectory() as folder:
        # Forked, they need not import torch again; with a GPU processes are to be spawned.
        arguments = train, seed, f"file://{folder}/store"
        mp.start_processes(_member, arguments, nprocs=2, start_method="fork")


def _member(rank: int, train: Callable[[int], Any], seed: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    # In one piece: two processes write.
    print(f"process {rank}: {show(train(seed)[0])}\n", end="", flush=True)
    dist.destroy_process_group()


def show(losses: list[float]) -> str:
    """The losses, to print."""
    return " ".join(f"{loss:.3f}" for loss in losses)
