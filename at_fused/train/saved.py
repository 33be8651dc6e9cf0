"""Trained networks as files: weights, and what builds the network that they fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from at_fused.train import checkpoints
from at_fused.train.config import Config
from at_fused.train.data import Data
from at_fused.train.networks import build
from at_fused.train.rules import ConfigError


def save_network(path: Path, name: str, model: nn.Module, data: Data, **facts: Any) -> None:
    """Writes weights, what builds the network that they fit, and a few facts."""
    network = {
        "network": name,
        "classes": data.classes,
        "channels": data.channels,
        "image_size": data.image_size,
    }
    checkpoints.save(path, "network", {"model": model.state_dict(), **network, **facts})


def load_network(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a file that ``save_network`` wrote, in eval mode, and the file's content.

    Raises:
        CheckpointError: it is another file.
    """
    state = checkpoints.load(path, "network")
    try:
        model = build(state["network"], state["classes"], state["channels"], str(path))
        model.load_state_dict(state["model"])
    except (KeyError, TypeError, RuntimeError, ConfigError) as error:
        reason = str(error).splitlines()[0]
        raise checkpoints.CheckpointError(f"{path}: no network of at-fused-train ({reason})") from (
            error
        )
    return model.eval(), state


def compared_layers(folder: Path, side: str) -> list[str]:
    """The layers of a run's students, or of its teacher, that it compares."""
    pairs = json.loads((folder / "run.json").read_text(encoding="utf-8"))["layers"]
    return [pair[side == "teacher"] for pair in pairs]


def load_given(teacher: nn.Module, config: Config) -> None:
    """Loads ``teacher_from``: a file of this program, or a plain state_dict."""
    path = Path(config.teacher_from)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        weights = state["model"] if isinstance(state, dict) and "what" in state else state
        teacher.load_state_dict(weights)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError(
            f"teacher_from: {path} has no weights of {config.teacher} for the data's classes "
            f"({reason})"
        ) from error
