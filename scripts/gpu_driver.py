"""Every kernel of a back end, for compute-sanitizer: ``gpu_driver.py DEVICE``.

Little features of which some are shared by blocks, in each kind of a kernel and in more than one
launch.
"""

import sys
from typing import Any

import torch
from torch import Tensor

import at_fused

DEVICE = sys.argv[1]
NCHW, NHWC = torch.contiguous_format, torch.channels_last
LITTLE = [(4, 16, 32, 32), (3, 64, 7, 7), (3, 5, 5, 7), (2, 96, 56, 56)]
# Sizes, dtype, layout, p, and whether positions are masked.
LISTS: list[tuple[list[tuple[int, ...]], torch.dtype, torch.memory_format, float, bool]] = [
    (LITTLE, torch.float32, NCHW, 2, False),
    (LITTLE, torch.bfloat16, NHWC, 2, False),
    (LITTLE, torch.float64, NCHW, 2, False),
    (LITTLE, torch.float32, NHWC, 3, True),
    ([(2, 3, 5, 5)] * 17, torch.bfloat16, NCHW, 2, False),
]


def run(students: list[Tensor], teachers: list[Tensor], p: float, **mask: Any) -> None:
    """Call each operator once, and its gradient."""
    at_fused.at_value_and_grad(students, teachers, p=p, **mask)
    for collapse in ("mean", "max"):
        at_fused.at_loss(students, teachers, p=p, collapse=collapse, **mask).backward()
        taps = [at_fused.attention_tap(x * 1, p=p, collapse=collapse) for x in students]
        targets = [at_fused.attention_map(x, p=p, collapse=collapse) for x in teachers]
        loss = at_fused.map_loss([q for _, q in taps], targets, form="paper", **mask)
        (loss + sum(y.sum() for y, _ in taps)).backward()


with torch.device(DEVICE):
    for sizes, dtype, layout, p, masked in LISTS:
        students, teachers = (
            [torch.randn(size).to(dtype, memory_format=layout) for size in sizes] for _ in "st"
        )
        mask = {"mask": [torch.rand(n, h, w) < 0.5 for n, _, h, w in sizes]} if masked else {}
        run([x.requires_grad_() for x in students], teachers, p, **mask)
if DEVICE == "cuda":
    torch.cuda.synchronize()
