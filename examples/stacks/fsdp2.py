"""AttentionTransfer in FSDP2: student and teacher are sharded over two processes.

    python examples/stacks/fsdp2.py

Each process has half of the weights and of each batch.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from toy import BETA, LAYERS, batches, in_two_processes, networks, share

from at_fused import AttentionTransfer


def train(seed: int) -> tuple[list[float], dict[str, Tensor]]:
    """Trains on this process's part of each batch; its losses, and the student's whole weights."""
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
        x, y = share(x), share(y)
        loss = cross_entropy(student(x), y) + at(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    at.remove()
    return losses, get_model_state_dict(student, options=StateDictOptions(full_state_dict=True))


if __name__ == "__main__":
    in_two_processes(train)
