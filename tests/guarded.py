"""Runs the operators on tensors that end, or begin, where memory does: ``guarded.py``.

A read or write beyond one is the end of this process, whatever instruction makes it: sanitizers do
not see those of masked vectors. ``guarded.py beyond`` makes one.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
import sys

import torch
from conftest import use
from reference import loss_arguments
from torch import Tensor

from at_fused import _ops

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


def run(shape: tuple[int, ...], dtype: torch.dtype, last: bool, at_end: bool) -> int:
    """All operators on features of one shape; the number of calls."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def place(x: Tensor) -> Tensor:
        return guarded(x, at_end)

    def feature() -> Tensor:
        x = torch.randn(shape).to(dtype)
        return place(x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x)

    x, y, gradient = feature(), feature(), feature()
    b, n = shape[0], math.prod(shape[2:])
    k = place(torch.randn(b, n, dtype=wide))
    calls = 0
    for p in (1.0, 2.0, 4.0, 2.5):
        _ops.attention_map([x], p, "mean")
        _ops.attention_map_backward([x], [k], None, [0], p)
        _ops.attention_tap_backward(gradient, x, k, p, "mean")
        _ops.attention_tap_backward_(gradient, x, k, p, "mean")
        calls += 4
    _, channels = _ops.attention_map([x], 3.0, "max")
    winners = place(channels)
    _ops.attention_map_backward([x], [k], None, [0], 3.0, [], [winners])
    _ops.attention_tap_backward_(gradient, x, k, 2.0, "max", winners)
    calls += 3
    operators = torch.ops.at_fused
    mask = place(torch.rand(b, n, dtype=wide))
    above = place(torch.rand(1, b, dtype=wide))
    for options in (
        {},
        {"collapse": "sum", "form": "paper", "masks": [mask], "eps_mode": "add"},
        {"masks": [mask], "reduction": "sample"},
    ):
        arguments = loss_arguments([x], [y], **options)
        operators.at_loss(*arguments, True, True)
        _ops.at_value_and_grad(*arguments, 1.0, None)
        _ops.at_value_and_grad(*arguments, 1.0, above)
        calls += 3
    if x.dim() == 3 and n > 2:
        skipped = [2, 2]
        _ops.attention_map([x, y], 2.0, "mean", skipped)
        few = place(torch.rand(b, n - 2, dtype=wide))
        _ops.attention_map_backward([x], [few], above, [0], 2.0, skipped[:1])
        operators.at_loss(*loss_arguments([x], [y], skip_tokens=skipped), True, True)
        arguments = loss_arguments([x], [y], skip_tokens=skipped, masks=[few])
        _ops.at_value_and_grad(*arguments, 1.0, None)
        calls += 4
    operators.map_loss([k], [k], [], "paper", "sum", "add", 1e-6, True, True)
    return calls + 1


def main() -> None:
    dtypes = torch.float32, torch.float64, torch.float16, torch.bfloat16
    shapes = [(2, c, n) for c, n in itertools.product((1, 3, 8, 17, 33), (1, 2, 7, 16, 31))]
    shapes += [(1, 5, 9, 7), (2, 40, 3, 5), (1, 70, 4, 2), (1, 2, 3, 4, 5)]
    calls = 0
    with use("cpu"):
        for case in itertools.product(shapes, dtypes, (False, True), (False, True)):
            calls += run(*case)
            while len(kept) > 64:
                kept.pop(0)
    print(f"{calls} calls")


if __name__ == "__main__":
    if sys.argv[1:] == ["beyond"]:
        x = torch.randn(1, 3, 5)
        _ops.attention_map([guarded(x, True, beyond=4)], 2.0, "mean")
    else:
        main()
