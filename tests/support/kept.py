"""Bytes that each operator keeps of its first call, beside its outputs, for each back end: JSON.

Of the first: a later one may find enough in what an earlier one has kept.
"""

from __future__ import annotations

import gc
import json
import random

import torch
from back_ends import EVERY, use
from hostile import right_call, tensors_of

from at_fused.backends import OPERATORS


def kept() -> dict[str, int]:
    """Bytes by operator, on the back end that is in use."""
    found = {}
    for name in OPERATORS:
        arguments = right_call(name, random.Random(0))
        result = None  # that of the last call does not go while the next one is watched
        with torch.profiler.profile(profile_memory=True) as profile:
            result = getattr(torch.ops.at_fused, name)(*arguments)
            gc.collect()  # Triton's interpreter leaves cycles
        found[name] = sum(event.self_cpu_memory_usage for event in profile.events())
        found[name] -= sum(x.nbytes for x in tensors_of(result))
    return found


if __name__ == "__main__":
    found = {}
    for name in EVERY:
        with use(name):
            found[name] = kept()
    print(json.dumps(found))
