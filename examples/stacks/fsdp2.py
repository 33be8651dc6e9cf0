"""AttentionTransfer in FSDP2, with student and teacher sharded over two processes.

    python examples/stacks/fsdp2.py

Each process has half of the weights and half of each batch.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from toy import BETA, LAYERS, batches, local_part, networks, run_in_two_processes

from at_fused import AttentionTransfer


def train(seed: int) -> tuple[list[float], dict[str, Tensor]]:
    """Train on this process's part of each batch, and return its losses and all weights."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    student, teacher = networks(seed)
    for model in (student, teacher):
        for name in LAYERS:
            fully_shard(model.get_submodule(name), mesh=mesh)
        fully_shard(model, mesh=mesh)
    at = AttentionTransfer(student, teacher, LAYERS, beta=BETA)
    optimizer = torch.optim.SGD(student.parameters(), 0.05, momentum=0.9)
    losses = []
    for x, y in batches():
        x, y = local_part(x), local_part(y)
        loss = cross_entropy(student(x), y) + at(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    at.remove()
    return losses, get_model_state_dict(student, options=StateDictOptions(full_state_dict=True))


if __name__ == "__main__":
    run_in_two_processes(train)
