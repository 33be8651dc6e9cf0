"""Wide residual networks, and networks by name."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from at_fused.train.config import ConfigError, error_prefix, error_summary, import_function, suggest

_WRN = re.compile(r"wrn-(\d+)-([1-9]\d*)(?:-b([1-9]\d*))?")
_RESNET = re.compile(r"resnet-(18|34|50)(-cifar|(?<!50)-paper)?")
NETWORK_NAMES = (
    "wrn-DEPTH-WIDTH, resnet-18, -34 or -50 (-cifar for small images), resnet-18-paper or "
    "-34-paper, a torchvision model or MODULE:FUNCTION"
)


class Block(nn.Module):
    """Pre-activation residual block: BN, ReLU and 3x3 conv, twice, with a shortcut."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        same = c_in == c_out and stride == 1
        self.shortcut = None if same else nn.Conv2d(c_in, c_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, Cin, H, W) to (B, Cout, H/stride, W/stride)."""
        y = torch.relu(self.bn1(x))
        # A projection takes the activated input. An identity takes the raw input, so that chains
        # of identities pass the signal unchanged.
        skip = x if self.shortcut is None else self.shortcut(y)
        y = torch.relu(self.bn2(self.conv1(y)))
        residual: Tensor = self.conv2(y)
        return skip + residual


class WRN(nn.Module):
    """WRN-depth-width of Zagoruyko & Komodakis, "Wide Residual Networks" (BMVC 2016).

    Three groups of (depth - 4) / 6 blocks with base*width, 2*base*width and 4*base*width
    channels; the second and third group halve height and width. The published base is 16.
    """

    def __init__(
        self, depth: int, width: int, classes: int = 10, in_channels: int = 3, base: int = 16
    ) -> None:
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            raise ConfigError(f"depth must be 6n + 4 with n >= 1 (10, 16, 22, ...), got {depth}")
        n = (depth - 4) // 6
        c = base * width
        self.stem = nn.Conv2d(in_channels, base, 3, padding=1, bias=False)
        self.groups = nn.ModuleList(
            nn.Sequential(
                Block(c_in, c_out, stride), *(Block(c_out, c_out, 1) for _ in range(n - 1))
            )
            for c_in, c_out, stride in [(base, c, 1), (c, 2 * c, 2), (2 * c, 4 * c, 2)]
        )
        self.bn = nn.BatchNorm2d(4 * c)
        self.head = nn.Linear(4 * c, classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_in", nonlinearity="relu")
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Return the logits (B, classes) and the outputs of the three groups.

        The features are taken before the next block's BN and ReLU, so they are signed.
        """
        x = self.stem(x)
        g0 = self.groups[0](x)
        g1 = self.groups[1](g0)
        g2 = self.groups[2](g1)
        pooled = torch.relu(self.bn(g2)).mean(dim=(2, 3))
        return self.head(pooled), (g0, g1, g2)


def build(
    name: str, classes: int, channels: int, option: str = "network", init: str = "torch"
) -> nn.Module:
    """Return a network with random weights that maps (B, channels, H, W) to logits (B, classes).

    Args:
        name: one of NETWORK_NAMES. "wrn-16-2-b8" has half the published base width of 16. "-cifar"
            is a 3x3 stem without pooling, "-paper" means shortcuts without BatchNorm.
            MODULE:FUNCTION is called with ``num_classes``.
        option: the option to name in errors.
        init: "torch" keeps the initial weights of the module, "paper" draws them as the authors do.
    """
    wrn = _WRN.fullmatch(name)
    if ":" in name:
        model = _build_imported(name, classes, option)
    elif wrn:
        depth, width, base = (int(x or 16) for x in wrn.groups())
        with error_prefix(f"{option}: got {name!r}"):
            model = WRN(depth, width, classes, channels, base)
    else:
        model = _build_torchvision(name, classes, channels, option)
    if init == "paper":
        _init_as_authors(model)
    return model


def _build_torchvision(name: str, classes: int, channels: int, option: str) -> nn.Module:
    models = torchvision_models(name, option)
    resnet = _RESNET.fullmatch(name)
    model_name, variant = (f"resnet{resnet[1]}", resnet[2]) if resnet else (name, None)
    known = models.list_models(module=models)
    if model_name not in known:
        hint = suggest(name, [*known, "resnet-18", "resnet-34", "resnet-50"])
        raise ConfigError(f"{option}: got {name!r}, expected {NETWORK_NAMES}{hint}")
    if channels != 3 and variant != "-cifar":
        raise ConfigError(f"{option}: {name} takes images with 3 channels, not {channels}")
    model: Any = models.get_model(model_name, weights=None, num_classes=classes)
    if variant == "-paper":
        for stage in (model.layer2, model.layer3, model.layer4):
            stage[0].downsample = stage[0].downsample[0]
    elif variant == "-cifar":
        model.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    return model


def torchvision_models(name: str, option: str) -> Any:
    """Return torchvision.models; raise ConfigError if torchvision cannot be imported."""
    try:
        from torchvision import models
    except (ImportError, RuntimeError, OSError) as error:
        raise ConfigError(
            f"{option}: {name!r} requires torchvision, but importing it failed ({error}): "
            'pip install "at_fused[train]"'
        ) from error
    return models


def _build_imported(name: str, classes: int, option: str) -> nn.Module:
    function, call = import_function(option, name), f"{option}: {name}(num_classes={classes})"
    try:
        model = function(num_classes=classes)
    except Exception as error:
        raise ConfigError(f"{call} raises {error_summary(error)}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{call} must return a torch.nn.Module, got {type(model).__name__}")
    return model


def classifier_name(model: nn.Module) -> str:
    """Return the name of the last convolution or linear layer, or an empty string."""
    kinds = (nn.Linear, nn.Conv2d)
    return ([name for name, m in model.named_modules() if isinstance(m, kinds)] or [""])[-1]


def _init_as_authors(model: nn.Module) -> None:
    """Initialise weights as the authors' utils.py does.

    BatchNorm weights are uniform in [0, 1]. Convolutions and the last layer are normal with
    variance 2 / fan_in. Biases are 0.
    """
    last: Any = model.get_submodule(classifier_name(model))
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
    """Return the number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
