"""Eight threads call everything at once: ``threaded.py ROUNDS``, or ``threaded.py race``.

Every result must have the bits that one thread alone gets. ``race`` lets all write one gradient in
place, which no caller may do: ThreadSanitizer has to see it. ``digest`` is of one thread.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

import at_fused
from at_fused import _ops

THREADS = 8
Work = Callable[[], list[Tensor]]


def differentiated(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]


def leaf(x: Tensor) -> Tensor:
    """A tensor of its own on memory that is shared.

    Of one leaf, two threads may wait for each other without end, in torch itself: one holds
    Python's lock and wants the leaf's, for its gradient's node, and the other the reverse.
    """
    return x.detach().requires_grad_(x.requires_grad)


# One sample cut into several tasks, several in one, and less than two threads are worth.
SHAPES = (1, 24, 60, 50), (40, 7, 12, 9), (2, 3, 5, 4)


def works(*shapes: tuple[int, ...]) -> list[Work]:
    """Calls of all operators, on features whose memory the threads share."""
    torch.manual_seed(0)
    found: list[Work] = []

    def add(function: Callable[..., list[Tensor]], *tensors: Tensor, **options: Any) -> None:
        found.append(lambda: function(*map(leaf, tensors), **options))

    def loss(s: Tensor, t: Tensor, **options: Any) -> list[Tensor]:
        return differentiated(at_fused.at_loss(s, t, **options), s)

    def value_and_grad(s: Tensor, t: Tensor, **options: Any) -> list[Tensor]:
        return list(at_fused.at_value_and_grad(s, t, **options))

    def tap(s: Tensor, t: Tensor, **options: Any) -> list[Tensor]:
        y, q = at_fused.attention_tap(s, **options)
        loss = at_fused.map_loss(q, at_fused.attention_map(t, **options), form="paper")
        # What follows has a gradient, and no value: torch's sum is another on other threads.
        return [loss.detach(), *torch.autograd.grad(loss + (y * y).sum(), s)]

    dtypes = torch.float32, torch.bfloat16
    layouts = torch.contiguous_format, torch.channels_last
    for shape, dtype, layout in itertools.product(shapes or SHAPES, dtypes, layouts):
        s = torch.randn(shape).to(dtype, memory_format=layout).requires_grad_()
        t = torch.randn_like(s.detach())
        half, mask, tokens = t[..., ::2, ::2], t[:, 0] > 0, {"channel_dim": -1, "skip_tokens": 2}
        flat = s.detach().flatten(2).mT.requires_grad_(), t.flatten(2).mT
        add(loss, s, t, form="paper")
        add(loss, s, t, collapse="max")
        add(loss, s, t, attend="channel", reduction="sample")
        add(loss, s, t, mask=mask, eps_mode="add", eps=1e-3, form="paper")
        add(loss, s, half, resize="features")
        add(loss, s, half, resize="maps", p=1.0, absolute=False)
        add(loss, *flat, **tokens)
        add(value_and_grad, s, t, p=3.0)
        add(value_and_grad, s, t, mask=mask, reduction="sample")
        add(value_and_grad, *flat, **tokens)
        add(tap, s, t)
        add(tap, s, t, collapse="max")
    return found


def digest() -> str:
    """A hash of all results."""
    found = hashlib.sha256()
    for call in works():
        for x in call():
            found.update(x.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def in_threads(work: Callable[[int], None]) -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        for result in [pool.submit(work, i) for i in range(THREADS)]:
            result.result()


def same_bits(rounds: int) -> None:
    calls = works()
    alone = [call() for call in calls]

    def work(thread: int) -> None:
        order = random.Random(thread)
        for _ in range(rounds):
            for i in order.sample(range(len(calls)), len(calls)):
                found = calls[i]()
                assert all(map(torch.equal, found, alone[i])), f"call {i} in thread {thread}"

    in_threads(work)


def race() -> None:
    x, k = torch.randn(2, 3, 8, 8), torch.randn(2, 64)
    gradient = torch.zeros_like(x)

    def work(thread: int) -> None:
        for _ in range(100):
            _ops.attention_tap_backward_(gradient, x, k, 2.0, "mean")

    in_threads(work)


if __name__ == "__main__":
    match sys.argv[1]:
        case "digest":
            print(digest())
        case "race":
            race()
        case rounds:
            same_bits(int(rounds))
            print("done")
