"""Run every kernel of a back end on small features, for compute-sanitizer.

    python scripts/gpu_driver.py DEVICE

Covers features that several thread blocks share, each variant of a kernel, and lists that need more
than one launch.
"""

import sys
from typing import Any

import torch
from torch import Tensor

import at_fused

DEVICE = sys.argv[1]
NCHW, NHWC = torch.contiguous_format, torch.channels_last
SMALL = [(4, 16, 32, 32), (3, 64, 7, 7), (3, 5, 5, 7), (2, 96, 56, 56)]
# Shapes, dtype, memory format, p, and whether to pass masks.
LISTS: list[tuple[list[tuple[int, ...]], torch.dtype, torch.memory_format, float, bool]] = [
    (SMALL, torch.float32, NCHW, 2, False),
    (SMALL, torch.bfloat16, NHWC, 2, False),
    (SMALL, torch.float64, NCHW, 2, False),
    (SMALL, torch.float32, NHWC, 3, True),
    ([(2, 3, 5, 5)] * 17, torch.bfloat16, NCHW, 2, False),
]


def run(students: list[Tensor], teachers: list[Tensor], p: float, **mask: Any) -> None:
    """Call each operator and its gradient once."""
    at_fused.at_value_and_grad(students, teachers, p=p, **mask)
    for collapse in ("mean", "max"):
        at_fused.at_loss(students, teachers, p=p, collapse=collapse, **mask).backward()
        taps = [at_fused.attention_tap(x * 1, p=p, collapse=collapse) for x in students]
        targets = [at_fused.attention_map(x, p=p, collapse=collapse) for x in teachers]
        loss = at_fused.map_loss([q for _, q in taps], targets, form="paper", **mask)
        (loss + sum(y.sum() for y, _ in taps)).backward()


with torch.device(DEVICE):
    for shapes, dtype, layout, p, has_mask in LISTS:
        students, teachers = (
            [torch.randn(shape).to(dtype, memory_format=layout) for shape in shapes] for _ in "st"
        )
        mask = {"mask": [torch.rand(n, h, w) < 0.5 for n, _, h, w in shapes]} if has_mask else {}
        run([x.requires_grad_() for x in students], teachers, p, **mask)
if DEVICE == "cuda":
    torch.cuda.synchronize()
