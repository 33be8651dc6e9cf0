"""Networks by name."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from at_fused.train.rules import ConfigError, imported, in_a_line, nearest

_WRN = re.compile(r"wrn-(\d+)-(\d+)(?:-b(\d+))?")
_RESNET = re.compile(r"resnet-(18|34|50)(-cifar|(?<!50)-paper)?")
SHAPES = (
    "wrn-DEPTH-WIDTH, resnet-18, -34 or -50 with -cifar for small images, resnet-18-paper or "
    "-34-paper, a torchvision model, MODULE:FUNCTION"
)


def build(
    name: str, classes: int, channels: int, option: str = "network", init: str = "torch"
) -> nn.Module:
    """Return a new network, (B, channels, H, W) -> logits (B, classes), with random weights.

    Args:
        name: "wrn-16-2", with "-b8" for half the published base width of 16; "resnet-18",
            torchvision's; "resnet-18-cifar", the same with a 3x3 stem and no pooling before the
            first stage; "resnet-18-paper", the authors', the same without BatchNorm in its
            shortcuts; what torchvision.models calls a classification model; or "MODULE:FUNCTION",
            of which ``function(num_classes=classes)`` is the network.
        classes, channels: as above.
        option: what errors call the name.
        init: "torch", the weights that the network is made with; "paper", the authors' in their
            place: weights of BatchNorm uniform in [0, 1], those of convolutions and of the last
            layer normal with variance 2 / fan_in, biases of BatchNorm and of the last layer 0.

    Raises:
        ConfigError: there is no network of that name, torchvision is missing, or MODULE:FUNCTION
            cannot be imported, raises, or returns something else.
    """
    model = _built(name, classes, channels, option)
    if init == "paper":
        _draw_as_authors(model)
    return model


def _built(name: str, classes: int, channels: int, option: str) -> nn.Module:
    if ":" in name:
        return _own(name, classes, option)
    if found := _WRN.fullmatch(name):
        from at_fused.train.wrn import WRN

        depth, width, base = (int(x) if x else 16 for x in found.groups())
        if depth < 10 or depth % 6 != 4 or not width or not base:
            raise ConfigError(
                f"{option}: got {name!r}, allowed is a depth of 6n + 4 (10, 16, 22, 28, 40, ...) "
                "and a width from 1"
            )
        return WRN(depth, width, classes, channels, base)
    models = torchvision_models(name, option)
    resnet = _RESNET.fullmatch(name)
    called = f"resnet{resnet[1]}" if resnet else name
    known = models.list_models(module=models)
    if called not in known:
        names = [*known, "resnet-18", "resnet-34", "resnet-50", "wrn-16-1"]
        names += ["resnet-18-cifar", "resnet-18-paper"]
        raise ConfigError(f"{option}: got {name!r}, allowed is {SHAPES}{nearest(name, names)}")
    model: Any = models.get_model(called, weights=None, num_classes=classes)
    if resnet and resnet[2] == "-paper":
        for stage in (model.layer2, model.layer3, model.layer4):
            stage[0].downsample = stage[0].downsample[0]
    if resnet and resnet[2] == "-cifar":
        model.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    elif channels != 3:
        raise ConfigError(f"{option}: {name} takes images of 3 channels, these have {channels}")
    return model


def torchvision_models(name: str, option: str) -> Any:
    """Return torchvision.models; ConfigError says that a network needs it."""
    try:
        from torchvision import models
    except (ImportError, RuntimeError, OSError) as error:
        raise ConfigError(
            f"{option}: {name!r} needs torchvision, which cannot be imported ({error}): "
            'pip install "at_fused[train]"'
        ) from error
    return models


def _own(name: str, classes: int, option: str) -> nn.Module:
    function = imported(option, name)
    try:
        model = function(num_classes=classes)
    except Exception as error:
        raise ConfigError(
            f"{option}: {name}(num_classes={classes}) raises {in_a_line(error)}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"{option}: {name}(num_classes={classes}) must return a torch.nn.Module, "
            f"got {type(model).__name__}"
        )
    return model


def last_layer(model: nn.Module) -> str:
    """Return the name of the layer that the classes come from; empty where there is none."""
    kinds = (nn.Linear, nn.Conv2d)
    return ([name for name, m in model.named_modules() if isinstance(m, kinds)] or [""])[-1]


def _draw_as_authors(model: nn.Module) -> None:
    """Draw the first weights as the authors' utils.py does."""
    last: Any = model.get_submodule(last_layer(model))
    module: Any
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d) or module is last:
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
    if getattr(last, "bias", None) is not None:
        nn.init.zeros_(last.bias)


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable scalars."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
