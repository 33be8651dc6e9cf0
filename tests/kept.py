"""Bytes that each operator keeps of its first call, beside its outputs, for each back end: JSON.

Of the first: a later one may find enough in what an earlier one has kept.
"""

from __future__ import annotations

import gc
import json

import torch
from conftest import EVERY, use
from reference import loss_arguments
from torch.utils._pytree import tree_leaves

from at_fused.backends import OPERATORS


def kept() -> dict[str, int]:
    """Bytes by operator, on the back end that is in use."""
    s, t, q = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4), torch.rand(2, 16)
    of_loss = loss_arguments([s], [t])
    tap = torch.ones_like(s), s, q, 2.0, "mean", None
    calls = {
        "attention_map": ([s], 2.0, "max", []),
        "at_loss": (*of_loss, True, True),
        "at_value_and_grad": (*of_loss, 1.0, None),
        "attention_map_backward": ([s], [q], None, [0], 2.0, [], []),
        "attention_tap_backward": tap,
        "attention_tap_backward_": tap,
        "map_loss": ([q], [q + 1], [], "code", "sum", "max", 1e-12, True, True),
    }
    assert calls.keys() == set(OPERATORS)
    found = {}
    for name, arguments in calls.items():
        result = None  # that of the last call does not go while the next one is watched
        with torch.profiler.profile(profile_memory=True) as profile:
            result = getattr(torch.ops.at_fused, name)(*arguments)
            gc.collect()  # Triton's interpreter leaves cycles
        found[name] = sum(event.self_cpu_memory_usage for event in profile.events())
        found[name] -= sum(x.nbytes for x in tree_leaves(result) if x is not None)
    return found


if __name__ == "__main__":
    found = {}
    for name in EVERY:
        with use(name):
            found[name] = kept()
    print(json.dumps(found))
