"""Wide residual networks that also return the features attention transfer compares."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Pre-activation residual block: two times BN, ReLU, 3x3 conv, around a shortcut."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        same = c_in == c_out and stride == 1
        self.shortcut = None if same else nn.Conv2d(c_in, c_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, Cin, H, W) -> (B, Cout, H/stride, W/stride)."""
        y = torch.relu(self.bn1(x))
        # A projection takes the activated input, an identity the raw one: only then does a
        # chain of identities carry the signal untouched, the point of pre-activation.
        skip = x if self.shortcut is None else self.shortcut(y)
        y = torch.relu(self.bn2(self.conv1(y)))
        residual: Tensor = self.conv2(y)
        return skip + residual


class WRN(nn.Module):
    """WRN-depth-width of Zagoruyko & Komodakis, "Wide Residual Networks" (BMVC 2016).

    Three groups of (depth - 4) / 6 blocks with base*width, 2*base*width and 4*base*width
    channels; the second and the third halve the map. base=16 is the published network.
    """

    def __init__(
        self, depth: int, width: int, classes: int = 10, in_channels: int = 3, base: int = 16
    ) -> None:
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"depth must be 6n + 4 with n >= 1 (10, 16, 22, ...), got {depth}")
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
        """Logits (B, classes) and the three groups' outputs.

        The features are taken before the next block's BN and ReLU, so they are signed.
        """
        x = self.stem(x)
        g0 = self.groups[0](x)
        g1 = self.groups[1](g0)
        g2 = self.groups[2](g1)
        pooled = torch.relu(self.bn(g2)).mean(dim=(2, 3))
        return self.head(pooled), (g0, g1, g2)
