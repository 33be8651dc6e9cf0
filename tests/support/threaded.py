"""Calls all operators from eight threads at once.

threaded.py ROUNDS   checks that all results have the bits that a single thread computes
threaded.py race     writes one gradient from all threads, which ThreadSanitizer must report
threaded.py digest   prints a hash of the results of a single thread
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
Call = Callable[[], list[Tensor]]


def with_gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]


def leaf(x: Tensor) -> Tensor:
    """Return a new leaf that shares the memory of ``x``.

    Threads that share a leaf can deadlock in torch: one holds the GIL and waits for the lock of the
    leaf's gradient accumulator, and the other the reverse.
    """
    return x.detach().requires_grad_(x.requires_grad)


# Several tasks per sample, several samples per task, and too little work for a second thread.
SHAPES = (1, 24, 60, 50), (40, 7, 12, 9), (2, 3, 5, 4)


def all_calls(*shapes: tuple[int, ...]) -> list[Call]:
    """Return calls of all operators, on features that threads may share."""
    torch.manual_seed(0)
    calls: list[Call] = []

    def add(function: Callable[..., list[Tensor]], *tensors: Tensor, **options: Any) -> None:
        calls.append(lambda: function(*map(leaf, tensors), **options))

    def loss(s: Tensor, t: Tensor, **options: Any) -> list[Tensor]:
        return with_gradients(at_fused.at_loss(s, t, **options), s)

    def value_and_grad(s: Tensor, t: Tensor, **options: Any) -> list[Tensor]:
        return list(at_fused.at_value_and_grad(s, t, **options))

    def tap(s: Tensor, t: Tensor, **options: Any) -> list[Tensor]:
        y, q = at_fused.attention_tap(s, **options)
        loss = at_fused.map_loss(q, at_fused.attention_map(t, **options), form="paper")
        # The value of the sum is not returned: torch's sum depends on the number of threads.
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
    return calls


def digest() -> str:
    """Return a hash of all results."""
    sha256 = hashlib.sha256()
    for call in all_calls():
        for x in call():
            sha256.update(x.flatten().view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()


def in_threads(work: Callable[[int], None]) -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        for result in [pool.submit(work, i) for i in range(THREADS)]:
            result.result()


def check_same_bits(rounds: int) -> None:
    calls = all_calls()
    expected = [call() for call in calls]

    def work(thread: int) -> None:
        order = random.Random(thread)
        for _ in range(rounds):
            for i in order.sample(range(len(calls)), len(calls)):
                results = calls[i]()
                assert all(map(torch.equal, results, expected[i])), f"call {i} in thread {thread}"

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
            check_same_bits(int(rounds))
            print("done")
