"""Two small CNNs, scikit-learn's digits, and a launcher of two processes for the examples."""

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
    """Return a network with maps of 8x8 and 4x4; GroupNorm makes samples independent."""

    def block(before: int, after: int, stride: int) -> nn.Module:
        conv = nn.Conv2d(before, after, 3, stride, padding=1)
        return nn.Sequential(conv, nn.GroupNorm(2, after), nn.ReLU())

    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))
    blocks = {"block1": block(1, width, 1), "block2": block(width, 2 * width, 2)}
    return nn.Sequential(OrderedDict(**blocks, head=head))


def networks(seed: int) -> tuple[nn.Module, nn.Module]:
    """Return a student and a teacher; a real teacher's weights would be loaded here."""
    torch.manual_seed(seed)
    return network(4), network(8).requires_grad_(False)


def batches(count: int = 4, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    """Return batches of digits (size, 1, 8, 8) and their labels."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    pairs = zip(images.split(size), torch.tensor(digits.target).split(size), strict=True)
    return list(pairs)[:count]


def local_part(x: Tensor) -> Tensor:
    """Return this process's part of a batch."""
    return x.tensor_split(dist.get_world_size())[dist.get_rank()]


def run_in_two_processes(train: Callable[[int], tuple[list[float], Any]], seed: int = 0) -> None:
    """Train in two processes that print their losses; ``torchrun`` would start them elsewhere."""
    with tempfile.TemporaryDirectory() as folder:
        # Forked processes need not import torch again. With a GPU, use "spawn".
        arguments = train, seed, f"file://{folder}/store"
        mp.start_processes(_run, arguments, nprocs=2, start_method="fork")


def _run(rank: int, train: Callable[[int], Any], seed: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    # One write per line, because two processes write.
    print(f"process {rank}: {format_losses(train(seed)[0])}\n", end="", flush=True)
    dist.destroy_process_group()


def format_losses(losses: list[float]) -> str:
    """Return the losses as text."""
    return " ".join(f"{loss:.3f}" for loss in losses)
