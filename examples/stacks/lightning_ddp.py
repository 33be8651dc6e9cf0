"""AttentionTransfer in Lightning: DDP with two processes, resumed from a checkpoint.

    python examples/stacks/lightning_ddp.py [FOLDER]

Lightning starts the second process. Checkpoints are written to FOLDER.
"""

from __future__ import annotations

import sys

import lightning
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from toy import BETA, LAYERS, batches, networks

from at_fused import AttentionTransfer


class Distillation(lightning.LightningModule):
    """A student that learns from the labels and from its teacher's attention."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.student, teacher = networks(seed)
        # In a list the teacher is not a submodule, so its weights are not in the checkpoints and
        # its parameters not in DDP.
        self.teacher = [teacher]
        self.at = AttentionTransfer(self.student, teacher, LAYERS, beta=BETA)

    def on_fit_start(self) -> None:
        self.teacher[0].to(self.device)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return cross_entropy(self.student(x), y) + self.at(x)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.student.parameters(), 0.05, momentum=0.9)


def train(folder: str, epochs: int, resume: str | None = None, seed: int = 0) -> str:
    """Train from a checkpoint or from scratch, and return the path of the last checkpoint."""
    images, labels = (torch.cat(parts) for parts in zip(*batches(2), strict=True))
    loader = DataLoader(TensorDataset(images, labels), batch_size=8)  # for each process
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Distillation(seed), loader, ckpt_path=resume)
    path = f"{folder}/epochs-{epochs}.ckpt"
    trainer.save_checkpoint(path)
    return path


if __name__ == "__main__":
    folder = sys.argv[1] if len(sys.argv) > 1 else "lightning_checkpoints"
    print(train(folder, epochs=2, resume=train(folder, epochs=1)))
