"""Calls operators with tensors that end, or begin, where memory does: ``guarded.py COUNT BACKEND``.

A read or write beyond one is the end of this process, whatever instruction makes it: sanitizers do
not see those of masked vectors. A child process makes one, and must end. Of Triton in the
interpreter the tensors that it allocates are such as well.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import sys
from contextlib import nullcontext
from typing import Any

import torch
from back_ends import use
from hostile import CHANNELS, right_call
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from at_fused.backends import OPERATORS, triton

PAGE = mmap.PAGESIZE
C_LIBRARY = ctypes.CDLL(None, use_errno=True)
kept: list[mmap.mmap] = []  # a page must stay mapped, or the next tensor would lie beside this one


def guarded(x: Tensor, at_end: bool, beyond: int = 0) -> Tensor:
    """A copy of a dense tensor, its last byte or its first beside a page that nobody may touch."""
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    inner = x.permute(order).contiguous()
    size = inner.numel() * inner.element_size()
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    kept.append(memory)
    begin = (pages + 1) * PAGE - size if at_end else PAGE
    held = torch.frombuffer(memory, dtype=x.dtype, count=inner.numel(), offset=begin + beyond)
    if not beyond:
        held.copy_(inner.flatten())
    start = held.data_ptr() - begin - beyond
    for page in (0, pages + 1):
        address = ctypes.c_void_p(start + page * PAGE)
        if C_LIBRARY.mprotect(address, ctypes.c_size_t(PAGE), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    return held.view(inner.shape).permute([order.index(d) for d in range(x.dim())])


class Allocations(TorchDispatchMode):
    """Guards what is allocated."""

    def __init__(self, at_end: bool) -> None:
        super().__init__()
        self.at_end = at_end

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        makes = function.__name__.split(".")[0] in ("new_empty", "new_zeros", "empty_like")
        return guarded(found, self.at_end) if makes and found.numel() else found


def call(backend: str, name: str, *arguments: Any, at_end: bool = True) -> None:
    """Call an operator; of Triton the function itself, for its allocations to be seen."""
    of_triton = backend == "triton"
    with Allocations(at_end) if of_triton else nullcontext():
        getattr(triton if of_triton else torch.ops.at_fused, name)(*arguments)


def beyond_is_found(backend: str) -> bool:
    """Whether a process that reads beyond a tensor ends."""
    child = os.fork()
    if child == 0:
        x = guarded(torch.randn(1, 3, 5), True, beyond=4)
        call(backend, "attention_map", [x], 2.0, "mean", [])
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def main(count: int, backend: str) -> None:
    with use(backend):
        assert beyond_is_found(backend)
        r = random.Random(0)
        for i in range(count):
            name, at_end, last = OPERATORS[i % len(OPERATORS)], r.random() < 0.5, r.random() < 0.5

            def place(x: Tensor, at_end: bool = at_end, last: bool = last) -> Tensor:
                if last and x.dim() > 2:  # channels last
                    x = x.movedim(1, -1).contiguous().movedim(-1, 1)
                return guarded(x, at_end)

            # Kernels have code of their own for channels of one vector.
            arguments = tree_map_only(Tensor, place, right_call(name, r, (*CHANNELS, 8, 16)))
            call(backend, name, *arguments, at_end=at_end)
            del arguments, kept[:-64]


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
    print("nothing beyond was touched")
