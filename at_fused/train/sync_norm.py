"""BatchNorm over the whole batch where processes share it, so that they train as one would."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _Sum(torch.autograd.Function):
    """The sum over all processes, whose gradient is the sum of theirs; to any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        found = x.clone()
        dist.all_reduce(found)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _summed(gradient)


def _summed(x: Tensor) -> Tensor:
    found: Tensor = _Sum.apply(x)
    return found


class SharedBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d whose statistics in training mode are those of all processes' images.

    torch.nn.SyncBatchNorm does this on GPUs; it refuses CPU tensors.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same; B may differ between the processes."""
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        y = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        count = torch.tensor(float(x.numel() // x.shape[1]), dtype=y.dtype)
        dist.all_reduce(count)
        mean = _summed(y.sum(dim=(0, 2, 3))) / count
        centred = y - mean[:, None, None]
        # Of the centred values: the mean of squares less the squared mean would cancel.
        variance = _summed(centred.square().sum(dim=(0, 2, 3))) / count
        with torch.no_grad():
            self._follow(mean, variance * (count / (count - 1).clamp_min(1)))
        scale = torch.rsqrt(variance + self.eps) * self.weight
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    def _follow(self, mean: Tensor, unbiased: Tensor) -> None:
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        weight = self.momentum
        if weight is None:
            weight = 1.0 / float(self.num_batches_tracked)
        for running, value in ((self.running_mean, mean), (self.running_var, unbiased)):
            assert running is not None
            running.lerp_(value, weight)


def share_statistics(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with every BatchNorm replaced by one over all processes, its tensors the same."""
    if device.type == "cuda":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return converted
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.BatchNorm2d and child.affine and child.track_running_stats:
                shared = SharedBatchNorm(child.num_features, child.eps, child.momentum)
                # The very tensors, so that optimizers and checkpoints need not know.
                shared.weight, shared.bias = child.weight, child.bias
                shared._buffers.update(child._buffers)
                shared.train(child.training)
                setattr(parent, name, shared)
    return model
