"""The back ends that this machine can run, CUDA's kernels in the emulator among them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Without a GPU the Triton kernels run in Triton's interpreter, which has to be known before Triton
# is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from cuda_emulator import emulated

import at_fused
from at_fused.backends import triton

# CUDA's kernels in the emulator: on a device so wide that even small samples are cut and several
# blocks meet, and on one so small that samples stay whole, few of them on chip.
EMULATED = {
    "emulator-wide": {"multiprocessors": 132},
    "emulator-small": {"multiprocessors": 1, "shared": 40 << 10},
}
BACKENDS = [name for name, row in at_fused.backends().items() if row.available]
EVERY = [*BACKENDS, *EMULATED]


@contextmanager
def use(name: str) -> Iterator[str]:
    with emulated(**EMULATED[name]) if name in EMULATED else at_fused.use_backend(name):
        yield name


def slow(name: str) -> bool:
    """Tell Triton's interpreter, which takes minutes for what others do in one."""
    return name == "triton" and triton.interpreted()
