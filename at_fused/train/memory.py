"""The most memory that a training step takes beyond what was there before."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile


class Peak:
    """The result of ``peak`` once its block is left: bytes."""

    bytes = 0


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what the profiler's C++ says of itself off the terminal; Python's errors come later."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextmanager
def peak(device: torch.device) -> Iterator[Peak]:
    """Watches what is allocated on a device while the block runs."""
    found = Peak()
    gc.collect()  # else it may come while the block runs, and what it frees would be taken off
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        yield found
    records = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = 0
    for record in sorted(records, key=lambda e: e.start_ns()):
        now += record.nbytes()
        found.bytes = max(found.bytes, now)
