"""Calls operators with tensors next to inaccessible pages: ``guarded.py COUNT BACKEND``.

An access outside a tensor crashes this process, also by the masked vector instructions that
sanitizers do not check. A child process makes such an access first, and must crash. For Triton in
the interpreter, tensors that the back end allocates are guarded too.
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
from hostile import CHANNELS, valid_call
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from at_fused.backends import OPERATORS, triton

PAGE = mmap.PAGESIZE
C_LIBRARY = ctypes.CDLL(None, use_errno=True)
mappings: list[mmap.mmap] = []  # keeps guard pages mapped while their tensor is in use


def guarded(x: Tensor, at_end: bool, beyond: int = 0) -> Tensor:
    """Return a copy of a dense tensor that ends or begins at a guard page, or ``beyond`` it."""
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    inner = x.permute(order).contiguous()
    size = inner.numel() * inner.element_size()
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    mappings.append(memory)
    begin = (pages + 1) * PAGE - size if at_end else PAGE
    copy = torch.frombuffer(memory, dtype=x.dtype, count=inner.numel(), offset=begin + beyond)
    if not beyond:
        copy.copy_(inner.flatten())
    start = copy.data_ptr() - begin - beyond
    for page in (0, pages + 1):
        address = ctypes.c_void_p(start + page * PAGE)
        if C_LIBRARY.mprotect(address, ctypes.c_size_t(PAGE), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    return copy.view(inner.shape).permute([order.index(d) for d in range(x.dim())])


class GuardAllocations(TorchDispatchMode):
    """A dispatch mode that guards newly allocated tensors."""

    def __init__(self, at_end: bool) -> None:
        super().__init__()
        self.at_end = at_end

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        allocates = function.__name__.split(".")[0] in ("new_empty", "new_zeros", "empty_like")
        return guarded(result, self.at_end) if allocates and result.numel() else result


def call(backend: str, name: str, *arguments: Any, at_end: bool = True) -> None:
    """Call an operator. For Triton, call its Python function, so that allocations are guarded."""
    is_triton = backend == "triton"
    with GuardAllocations(at_end) if is_triton else nullcontext():
        getattr(triton if is_triton else torch.ops.at_fused, name)(*arguments)


def out_of_bounds_crashes(backend: str) -> bool:
    """Return True if a process that reads outside a tensor crashes."""
    child = os.fork()
    if child == 0:
        x = guarded(torch.randn(1, 3, 5), True, beyond=4)
        call(backend, "attention_map", [x], 2.0, "mean", [])
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def main(count: int, backend: str) -> None:
    with use(backend):
        assert out_of_bounds_crashes(backend)
        r = random.Random(0)
        for i in range(count):
            name, at_end, last = OPERATORS[i % len(OPERATORS)], r.random() < 0.5, r.random() < 0.5

            def guard(x: Tensor, at_end: bool = at_end, last: bool = last) -> Tensor:
                if last and x.dim() > 2:  # channels_last
                    x = x.movedim(1, -1).contiguous().movedim(-1, 1)
                return guarded(x, at_end)

            # 8 and 16 channels are one vector, which has its own code.
            arguments = tree_map_only(Tensor, guard, valid_call(name, r, (*CHANNELS, 8, 16)))
            call(backend, name, *arguments, at_end=at_end)
            del arguments, mappings[:-64]


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
    print("no access out of bounds")
