"""AttentionTransfer in transformers' Trainer, from a ViT to a smaller one.

    python examples/stacks/transformers_trainer.py

Each step accumulates two batches. With ``bf16=True`` both networks run in autocast.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import nn
from toy import batches, format_losses
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from at_fused import AttentionTransfer

LAYERS = [("vit.layers.0", "vit.layers.0"), ("vit.layers.1", "vit.layers.2")]


class ATTrainer(Trainer):
    """A Trainer that adds attention transfer to the network's own loss."""

    def __init__(self, *args: Any, teacher: nn.Module, beta: float, **options: Any) -> None:
        super().__init__(*args, **options)
        # Moves the teacher to the device, and runs it in autocast with bf16=True or fp16=True.
        teacher = self.accelerator.prepare_model(teacher, evaluation_mode=True)
        self.at = AttentionTransfer(self.model, teacher, LAYERS, beta=beta)
        # compute_loss returns a mean over the batch, which Trainer must divide by the number of
        # accumulated batches. With True it would not.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = outputs.loss + self.at(inputs)
        return (loss, outputs) if return_outputs else loss


def vit(width: int, depth: int) -> nn.Module:
    """Return a ViT for 8x8 images, with 4x4 tokens."""
    sizes = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
    sizes |= {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": depth}
    return ViTForImageClassification(ViTConfig(num_attention_heads=2, **sizes))


def train(seed: int, folder: str, **arguments: Any) -> tuple[list[float], nn.Module]:
    """Train one epoch, and return the logged losses and the student."""
    torch.manual_seed(seed)
    student, teacher = vit(16, 2), vit(32, 3)
    images, labels = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    data = [{"pixel_values": x, "labels": y} for x, y in zip(images, labels, strict=True)]
    options = {"output_dir": folder, "num_train_epochs": 1, "per_device_train_batch_size": 8}
    options |= {"gradient_accumulation_steps": 2, "learning_rate": 1e-2, "use_cpu": True}
    options |= {"logging_steps": 1, "report_to": "none", "disable_tqdm": True} | arguments
    trainer = ATTrainer(
        student, TrainingArguments(**options), train_dataset=data, teacher=teacher, beta=100.0
    )
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], student


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(format_losses(train(0, folder)[0]))
