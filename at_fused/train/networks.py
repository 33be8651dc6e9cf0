"""Networks by name."""

from __future__ import annotations

import re

from torch import nn

from at_fused.train.rules import ConfigError, nearest

_WRN = re.compile(r"wrn-(\d+)-(\d+)(?:-b(\d+))?")
_RESNET = re.compile(r"resnet-(18|34|50)(-cifar)?")
SHAPES = "wrn-DEPTH-WIDTH, resnet-18, -34 or -50 with -cifar for small images, a torchvision model"


def build(name: str, classes: int, channels: int, option: str = "network") -> nn.Module:
    """A new network, (B, channels, H, W) -> logits (B, classes), with random weights.

    Args:
        name: "wrn-16-2", with "-b8" for half the published base width of 16; "resnet-18",
            torchvision's, and "resnet-18-cifar", the same with a 3x3 stem and no pooling before the
            first stage; or what torchvision.models calls a classification model.
        classes, channels: as above.
        option: what errors call the name.

    Raises:
        ConfigError: there is no network of that name, or torchvision is missing.
    """
    if found := _WRN.fullmatch(name):
        from at_fused.train.wrn import WRN

        depth, width, base = (int(x) if x else 16 for x in found.groups())
        if depth < 10 or depth % 6 != 4 or not width or not base:
            raise ConfigError(
                f"{option}: got {name!r}, allowed is a depth of 6n + 4 (10, 16, 22, 28, 40, ...) "
                "and a width from 1"
            )
        return WRN(depth, width, classes, channels, base)
    models = _torchvision(name, option)
    resnet = _RESNET.fullmatch(name)
    called = f"resnet{resnet[1]}" if resnet else name
    known = models.list_models(module=models)
    if called not in known:
        names = [*known, "resnet-18", "resnet-34", "resnet-50", "resnet-18-cifar", "wrn-16-1"]
        raise ConfigError(f"{option}: got {name!r}, allowed is {SHAPES}{nearest(name, names)}")
    model: nn.Module = models.get_model(called, weights=None, num_classes=classes)
    if resnet and resnet[2]:
        model.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    elif channels != 3:
        raise ConfigError(f"{option}: {name} takes images of 3 channels, these have {channels}")
    return model


def _torchvision(name: str, option: str):  # type: ignore[no-untyped-def]
    try:
        from torchvision import models
    except (ImportError, RuntimeError, OSError) as error:
        raise ConfigError(
            f"{option}: {name!r} needs torchvision, which cannot be imported ({error}): "
            'pip install "at_fused[train]"'
        ) from error
    return models


def count_parameters(model: nn.Module) -> int:
    """Number of trainable scalars."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
