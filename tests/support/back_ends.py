"""Back ends that this machine can run, including the CUDA kernels in the emulator."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Without a GPU the Triton kernels run in Triton's interpreter. Triton reads this when imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from cuda_emulator import emulated

import at_fused
from at_fused.backends import triton

# Emulated devices for the CUDA kernels. The wide one splits even small samples among thread blocks.
# The small one keeps samples whole, and few of them fit in its shared memory.
EMULATED = {
    "emulator-wide": {"multiprocessors": 132},
    "emulator-small": {"multiprocessors": 1, "shared": 40 << 10},
}
BACKENDS = [name for name, row in at_fused.backends().items() if row.available]
ALL_BACKENDS = [*BACKENDS, *EMULATED]


@contextmanager
def use(name: str) -> Iterator[str]:
    with emulated(**EMULATED[name]) if name in EMULATED else at_fused.use_backend(name):
        yield name


def is_slow(name: str) -> bool:
    """Return True for Triton's interpreter, which is many times slower than the others."""
    return name == "triton" and triton.interpreted()
